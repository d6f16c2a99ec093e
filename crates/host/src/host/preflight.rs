//! What would come of a migration: the target is asked, the guest's writes and the way are measured.
//!
//! The guest runs on. While its writes are followed, each page costs it a little when it is written first;
//! and it stands once for as long as it takes to save it.

use super::{Host, parse_name};
use crate::api::{DirtyPoint, EstimateInfo, MigrateBody, PreflightInfo, milliseconds};
use crate::refusal::Refusal;
use crate::registry::Vm;
use limosa_carrier::{Guest, GuestError, Preflight, PreflightRequest, copied_disks};
use limosa_engine::estimate::Sample;
use limosa_engine::policy::Mode;
use limosa_os::memory::ExistingPages;
use limosa_pages::{ByteCount, BytesPerSecond, Numbering, PageCount, PageRange, PageSet, Pfn};
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
        let (differences, sample) = looked?;
        let modes = Mode::ALL.into_iter();
        let estimates = modes.map(|mode| EstimateInfo::new(&sample.estimate(mode, &limits)));
        let point = |(after, pages): &(Duration, PageCount)| DirtyPoint::new(*after, *pages);
        Ok(PreflightInfo {
            vm: name.to_string(),
            to: body.to.clone(),
            differences,
            encrypted: self.credentials.is_some(),
            round_trip_ms: milliseconds(sample.round_trip),
            bandwidth: sample.bandwidth.get(),
            memory_bytes: vm.machine.shape().memory_bytes,
            existing_bytes: sample.existing.bytes().get(),
            dirtied: sample.dirtied.iter().map(point).collect(),
            save_ms: milliseconds(sample.save),
            state_bytes: sample.state.get(),
            estimates: estimates.collect(),
        })
    }

    /// What is in the way at the target, and what was measured.
    fn look_ahead(&self, vm: &Vm, body: &MigrateBody) -> Result<(Vec<String>, Sample), Refusal> {
        let guest = vm.machine.guest();
        let silent =
            |error: GuestError| Refusal::failed(format!("the VM does not answer: {error}"));
        let disks = if body.copy_disks {
            copied_disks(&*guest).map_err(|error| Refusal::bad_request(error.to_string()))?
        } else {
            Vec::new()
        };
        let sizes = disks.iter().map(|disk| disk.size);
        let numbering = Numbering::new(guest.memory().page_count(), sizes);
        let all = numbering.expect("disks that can be copied").end();
        let on_disks = disks.iter().fold(PageCount::ZERO, |sum, disk| {
            sum.saturating_add(disk.data.pages_ceil())
        });
        let request = PreflightRequest {
            peer: body.to.clone(),
            link: body.link.map(BytesPerSecond::new),
            credentials: self.credentials.clone(),
            vm: guest.description().map_err(silent)?,
            memory: guest.memory().page_count(),
            disks,
            mode: body.mode,
        };
        let way = limosa_carrier::preflight(&request).map_err(Refusal::failed)?;
        let mut sample = measure(&*guest, all, &way).map_err(silent)?;
        sample.existing = sample.existing.saturating_add(on_disks);
        Ok((way.differences, sample))
    }
}

/// Of a guest with so many pages, those of disks that are copied among them.
fn measure(guest: &dyn Guest, all: PageCount, way: &Preflight) -> Result<Sample, GuestError> {
    let existing = ExistingPages::new(guest.memory()).all();
    let existing = existing.map_err(|error| GuestError(error.to_string()))?;
    guest.start_tracking()?;
    let dirtied = follow_writes(guest, all);
    guest.stop_tracking()?;
    let saved = guest.rehearse()?;
    Ok(Sample {
        existing: existing.count(),
        dirtied: dirtied?,
        bandwidth: way.bandwidth,
        round_trip: way.round_trip,
        save: saved.saved.since(saved.stopped_first),
        state: ByteCount::new(saved.state.len() as u64),
    })
}

/// The curve of what the guest writes: pages that it has written since the start, after so long.
fn follow_writes(
    guest: &dyn Guest,
    all: PageCount,
) -> Result<Vec<(Duration, PageCount)>, GuestError> {
    let mut set = PageSet::empty(all);
    // All memory counts as written until it is cleared.
    guest.harvest(&mut set)?;
    let memory = PageRange::new(Pfn::new(0), guest.memory().page_count());
    guest.clear(memory, Vec::new())?;
    let begun = Instant::now();
    let mut curve = Vec::new();
    for look in LOOKS {
        thread::sleep(look.saturating_sub(begun.elapsed()));
        guest.harvest(&mut set)?;
        curve.push((begun.elapsed(), set.count()));
    }
    Ok(curve)
}
