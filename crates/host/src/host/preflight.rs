//! What would come of a migration: the target is asked, the guest's writes and the way are measured.
//!
//! The guest runs on. While its writes are followed, each page costs it a little when it is written first;
//! and it stands once for as long as it takes to save it.

use super::{Host, parse_name};
use crate::api::{DirtyPoint, EstimateInfo, MigrateBody, PreflightInfo};
use crate::refusal::Refusal;
use crate::registry::Vm;
use limosa_carrier::{Guest, GuestError, PreflightRequest};
use limosa_engine::estimate::Sample;
use limosa_engine::policy::Mode;
use limosa_pages::{ByteCount, BytesPerSecond, PageCount, PageRange, PageSet, Pfn};
use std::thread;
use std::time::{Duration, Instant};

/// When the pages that the guest has written are counted, since the first moment.
const LOOKS: [Duration; 5] = [
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
    Duration::from_millis(1000),
];

impl Host {
    /// Asks a target whether it would take a virtual machine, and estimates each technique.
    ///
    /// # Errors
    /// The request is wrong, the virtual machine is not resident, or the target does not answer.
    pub fn preflight(&self, name: &str, body: &MigrateBody) -> Result<PreflightInfo, Refusal> {
        let name = parse_name(name)?;
        let limits = body.limits().map_err(Refusal::bad_request)?;
        self.check_peer(&body.to, body.insecure)?;
        // Held as for a migration: both follow what the guest writes.
        let vm = self.registry().begin_leaving(&name)?;
        let looked = self.look_ahead(&vm, body);
        self.registry().hold(&name, vm.hold);
        let (answer, measured) = looked?;
        let sample = Sample {
            existing: measured.existing,
            dirtied: measured.dirtied,
            bandwidth: answer.bandwidth,
            round_trip: answer.round_trip,
            save: measured.save,
            state: measured.state,
        };
        let modes = Mode::ALL.into_iter();
        let estimates = modes.map(|mode| EstimateInfo::new(&sample.estimate(mode, &limits)));
        let point = |(after, pages): &(Duration, PageCount)| DirtyPoint::new(*after, *pages);
        Ok(PreflightInfo {
            vm: name.to_string(),
            to: body.to.clone(),
            differences: answer.differences,
            encrypted: self.credentials.is_some(),
            round_trip_ms: crate::api::milliseconds(sample.round_trip),
            bandwidth: sample.bandwidth.get(),
            memory_bytes: vm.machine.shape().memory_bytes,
            existing_bytes: sample.existing.bytes().get(),
            dirtied: sample.dirtied.iter().map(point).collect(),
            save_ms: crate::api::milliseconds(sample.save),
            state_bytes: sample.state.get(),
            estimates: estimates.collect(),
        })
    }

    fn look_ahead(
        &self,
        vm: &Vm,
        body: &MigrateBody,
    ) -> Result<(limosa_carrier::Preflight, Measured), Refusal> {
        let guest = vm.machine.guest();
        let silent =
            |error: GuestError| Refusal::failed(format!("the VM does not answer: {error}"));
        let request = PreflightRequest {
            peer: body.to.clone(),
            link: body.link.map(BytesPerSecond::new),
            credentials: self.credentials.clone(),
            vm: guest.description().map_err(silent)?,
            memory: guest.memory().page_count(),
            mode: body.mode,
        };
        let answer = limosa_carrier::preflight(&request).map_err(Refusal::failed)?;
        let measured = measure(&*guest).map_err(silent)?;
        Ok((answer, measured))
    }
}

/// What was measured of a guest.
struct Measured {
    existing: PageCount,
    dirtied: Vec<(Duration, PageCount)>,
    save: Duration,
    state: ByteCount,
}

fn measure(guest: &dyn Guest) -> Result<Measured, GuestError> {
    let memory = guest.memory();
    let whole = PageRange::new(Pfn::new(0), memory.page_count());
    let extents = memory
        .data_extents(whole)
        .map_err(|error| GuestError(error.to_string()))?;
    let existing = extents
        .iter()
        .fold(PageCount::ZERO, |sum, run| sum.saturating_add(run.count));
    guest.start_tracking()?;
    let dirtied = follow_writes(guest, whole);
    guest.stop_tracking()?;
    let saved = guest.rehearse()?;
    Ok(Measured {
        existing,
        dirtied: dirtied?,
        save: saved.saved.since(saved.stopped_first),
        state: ByteCount::new(saved.state.len() as u64),
    })
}

/// The curve of what the guest writes: pages that it has written since the start, after so long.
fn follow_writes(
    guest: &dyn Guest,
    whole: PageRange,
) -> Result<Vec<(Duration, PageCount)>, GuestError> {
    let mut set = PageSet::empty(whole.count);
    // Everything counts as written until it is cleared.
    guest.harvest(&mut set)?;
    guest.clear(whole, Vec::new())?;
    let begun = Instant::now();
    let mut curve = Vec::new();
    for look in LOOKS {
        thread::sleep(look.saturating_sub(begun.elapsed()));
        guest.harvest(&mut set)?;
        curve.push((begun.elapsed(), set.count()));
    }
    Ok(curve)
}
