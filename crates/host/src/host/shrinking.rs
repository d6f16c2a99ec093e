//! Before a move: has a guest give up the memory that it does not use, so that nobody carries it.
//!
//! Its balloon is filled in steps of half of what is free beyond a floor, as its driver tells it anew after
//! each, until that is hardly anything, until the guest gives no more, or for as long as is reasonable. The guest keeps
//! what it has cached. What it gave up it has back where it arrives, or here if it stays: the VM process sees to
//! the one, and to the other if this daemon is lost meanwhile.

use crate::machine::{Activity, Look, Machine};
use crate::refusal::Refusal;
use limosa_vmm::answer::BalloonInfo;
use std::thread;
use std::time::{Duration, Instant};

/// How long a guest may take; who asked waits for it.
const SHRINK_MAX: Duration = Duration::from_secs(20);
/// How long it may do nothing.
const PATIENCE: Duration = Duration::from_secs(3);
/// How soon it is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// What stays free: this much, and this part of all that it has. Below it kernels begin to write back and
/// to drop what they have cached.
const FREE_MIN: u64 = 48 << 20;
const FREE_PART: u64 = 16;
/// Less than that is not worth another step.
const STEP_MIN: u64 = 8 << 20;

/// How far a guest has come with giving up memory.
#[derive(Debug)]
struct Shrinking {
    /// What its balloon was told to hold, and what it holds.
    wanted: u64,
    held: u64,
    /// What it tells counts from this telling on: the one before may have been under way.
    counts_from: Option<u64>,
    /// When something happened last.
    moved_at: Instant,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Wait,
    Fill(u64),
    Over,
}

impl Shrinking {
    fn next(&mut self, now: Instant, info: &BalloonInfo) -> Next {
        let held = info.held.get();
        if held > self.held {
            self.moved_at = now;
        }
        self.held = held;
        let is_held = held >= self.wanted;
        let from = match self.counts_from {
            Some(from) => from,
            None if is_held => {
                self.moved_at = now;
                *self.counts_from.insert(info.tellings + 2)
            }
            None => u64::MAX,
        };
        if info.tellings >= from {
            self.moved_at = now;
            self.counts_from = None;
            return match step(info) {
                Some(wanted) => {
                    self.wanted = wanted;
                    Next::Fill(wanted)
                }
                None => Next::Over,
            };
        }
        if now.saturating_duration_since(self.moved_at) > PATIENCE {
            Next::Over
        } else {
            Next::Wait
        }
    }
}

/// What the balloon should hold next; `None` if that is enough, or nobody knows how much is free.
fn step(info: &BalloonInfo) -> Option<u64> {
    let memory = info.memory?;
    let (free, total) = (memory.free?.get(), memory.total?.get());
    let spare = free.checked_sub(FREE_MIN.max(total / FREE_PART))?;
    (spare >= STEP_MIN).then(|| info.held.get() + spare / 2)
}

/// Shrinks the guest if that is wanted.
///
/// # Errors
/// It cannot be, or its VM process does not answer.
pub(super) fn shrink_if(is_wanted: bool, machine: &dyn Machine) -> Result<(), Refusal> {
    if !is_wanted {
        return Ok(());
    }
    let failed = |error| Refusal::failed(format!("the guest is not shrunk: {error}"));
    let begun = Instant::now();
    let mut shrinking: Option<Shrinking> = None;
    while begun.elapsed() < SHRINK_MAX {
        let now = Instant::now();
        let info = usable(machine.look().map_err(failed)?)?;
        let shrinking = shrinking.get_or_insert_with(|| Shrinking {
            wanted: info.held.get(),
            held: info.held.get(),
            counts_from: None,
            moved_at: now,
        });
        match shrinking.next(now, &info) {
            Next::Wait => thread::sleep(LOOK_AGAIN),
            Next::Fill(wanted) => machine.lend_balloon(wanted).map_err(failed)?,
            Next::Over => break,
        }
    }
    let held = shrinking.map_or(0, |shrinking| shrinking.held);
    tracing::info!(held, took = ?begun.elapsed(), "the guest was asked for what it does not use");
    Ok(())
}

/// The balloon of a guest that runs and has a driver for it.
fn usable(look: Look) -> Result<BalloonInfo, Refusal> {
    if look.activity != Activity::Running {
        return Err(Refusal::conflict(
            "the guest does not run, so it gives nothing up: migrate it without --balloon",
        ));
    }
    look.balloon.filter(|info| info.has_driver).ok_or_else(|| {
        Refusal::bad_request(
            "the guest has no balloon, or no driver for it (virtio_balloon): migrate it without --balloon",
        )
    })
}

/// The guest stays: it has back what it gave up for a move. Does no harm to one that gave up nothing.
pub(super) fn give_back(machine: &dyn Machine) {
    if let Err(error) = machine.lend_balloon(0) {
        tracing::warn!(%error, "the guest may stay small");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::fake::FakeMachine;
    use limosa_engine::handover::Phase;
    use limosa_pages::ByteCount;
    use limosa_vmm::answer::GuestMemory;

    const MIB: u64 = 1 << 20;

    fn info(held: u64, free: u64, tellings: u64) -> BalloonInfo {
        let bytes = |mib: u64| ByteCount::new(mib * MIB);
        BalloonInfo {
            has_driver: true,
            target: bytes(0),
            held: bytes(held),
            reclaimed: bytes(0),
            memory: Some(GuestMemory {
                total: Some(bytes(1024)),
                free: Some(bytes(free)),
                available: None,
            }),
            tellings,
        }
    }

    #[test]
    fn a_guest_is_shrunk_to_the_floor_and_has_it_back() {
        let guest = FakeMachine::new(1, Phase::Running);
        let refused = shrink_if(true, &*guest).unwrap_err().to_string();
        assert!(refused.contains("no balloon, or no driver"), "{refused}");
        guest.have_balloon(ByteCount::new(512 * MIB));
        shrink_if(false, &*guest).unwrap();
        assert_eq!(guest.balloon_target(), ByteCount::new(0));
        shrink_if(true, &*guest).unwrap();
        // 48 MiB stay free, and what is too little for a step.
        let free = 512 * MIB - guest.balloon_target().get();
        assert!((FREE_MIN..FREE_MIN + STEP_MIN).contains(&free), "{free}");
        give_back(&*guest);
        assert_eq!(guest.balloon_target(), ByteCount::new(0));
    }

    #[test]
    fn steps_end_above_the_floor() {
        let check = |held, free, expect: Option<u64>| {
            assert_eq!(step(&info(held, free, 0)).map(|bytes| bytes / MIB), expect);
        };
        check(0, 1000, Some(468));
        check(468, 532, Some(702));
        // The floor of 1 GiB is 64 MiB.
        check(900, 72, Some(904));
        check(900, 71, None);
        check(900, 10, None);
        let mut unknown = info(0, 1000, 0);
        unknown.memory = Some(GuestMemory::default());
        assert_eq!(step(&unknown), None);
        unknown.memory = None;
        assert_eq!(step(&unknown), None);
    }

    #[test]
    fn each_step_waits_for_what_is_told_after_it() {
        let begun = Instant::now();
        let mut shrinking = Shrinking {
            wanted: 0,
            held: 0,
            counts_from: None,
            moved_at: begun,
        };
        let mut next = |seconds: u64, told| {
            let now = begun + Duration::from_secs(seconds);
            match shrinking.next(now, &told) {
                Next::Fill(bytes) => format!("fill {}", bytes / MIB),
                other => format!("{other:?}"),
            }
        };
        assert_eq!(next(0, info(0, 1000, 1)), "Wait");
        assert_eq!(next(1, info(0, 1000, 2)), "Wait");
        assert_eq!(next(2, info(0, 1000, 3)), "fill 468");
        // Told while it fills, which says nothing.
        assert_eq!(next(3, info(200, 700, 9)), "Wait");
        assert_eq!(next(4, info(468, 532, 10)), "Wait");
        assert_eq!(next(5, info(468, 532, 12)), "fill 702");
        // It gives no more.
        assert_eq!(next(6, info(500, 500, 13)), "Wait");
        assert_eq!(next(9, info(500, 500, 20)), "Wait");
        assert_eq!(next(10, info(500, 500, 21)), "Over");
    }
}
