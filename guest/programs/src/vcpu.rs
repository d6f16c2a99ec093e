//! One vCPU: its report, its clock, its waits.

use core::ops::Range;

use limosa_micro_abi::{BootInfo, FirstError, PAGE_BYTES, Report, State, memory_map};
use limosa_micro_logic::arguments::{LifeArguments, Monitor, Rest};
use limosa_micro_logic::page::Fault;
use limosa_micro_logic::stall::StallWatch;
use limosa_micro_logic::ticks::TickRate;

use crate::command_board::{Announcer, Listener};
use crate::port;
use crate::program::Sound;

/// Time between two heartbeats.
const BEAT_MICROSECONDS: u64 = 1000;

/// Shorter waits are spent looking at the clock: a wait costs the host two exits and a sleep.
const WAIT_MICROSECONDS_MIN: u64 = 300;

const REPORT_WORDS: usize = size_of::<Report>() / 8;

/// A vCPU and what it says about itself.
#[derive(Debug)]
pub struct Vcpu {
    /// The report; it becomes visible at the next beat.
    pub report: Report,
    /// Which vCPU this is.
    pub index: u32,
    /// How many there are.
    pub count: u32,
    /// How fast the time stamp counter runs.
    pub ticks: TickRate,
    pub(crate) listener: Listener,
    announcer: Announcer,
    watch: StallWatch,
    next_beat: u64,
    beat_ticks: u64,
    wait_ticks_min: u64,
    monitor: Monitor,
}

impl Vcpu {
    /// The vCPU with that index.
    pub(crate) fn new(boot: &BootInfo, index: u32) -> Self {
        let ticks = TickRate::from_khz(boot.tsc_khz);
        let now = port::tsc();
        Self {
            report: Report::new(index),
            index,
            count: boot.vcpu_count,
            ticks,
            listener: Listener::default(),
            announcer: Announcer::default(),
            watch: StallWatch::new(ticks, now),
            next_beat: now,
            beat_ticks: ticks.from_microseconds(BEAT_MICROSECONDS),
            wait_ticks_min: ticks.from_microseconds(WAIT_MICROSECONDS_MIN),
            monitor: Monitor::Limosa,
        }
    }

    /// From now on it lives as the arguments say.
    pub(crate) fn heed(&mut self, life: LifeArguments) {
        self.monitor = life.monitor;
        if life.rest == Rest::Spin {
            self.wait_ticks_min = u64::MAX;
        }
    }

    /// Looks at the clock: notices stalls, beats when it is time. To be called between any two
    /// operations, however short.
    #[inline]
    pub fn look(&mut self) -> u64 {
        let now = port::tsc();
        self.watch.look(now, &mut self.report);
        // One comparison sees both a beat that is due (the difference wraps) and one that lies
        // farther ahead than it can, because the clock went backwards.
        if self.next_beat.wrapping_sub(now).wrapping_sub(1) >= 2 * self.beat_ticks {
            self.beat(now);
        }
        now
    }

    /// Nothing is to be done now: rests until the next beat, on the host if that is worth it.
    /// Operations that fall due meanwhile are done in one go afterwards.
    pub fn rest(&mut self, now: u64) {
        let deadline = self.next_beat;
        if deadline.saturating_sub(now) < self.wait_ticks_min {
            core::hint::spin_loop();
            return;
        }
        loop {
            let now = port::tsc();
            if deadline.saturating_sub(now) < self.wait_ticks_min {
                self.watch.look_after_wait(deadline, now, &mut self.report);
                return;
            }
            let microseconds = self.ticks.to_microseconds(deadline - now);
            port::wait(u32::try_from(microseconds).unwrap_or(u32::MAX));
        }
    }

    /// Nothing is to be done before `deadline`, unless a device has something: rests until then on the host,
    /// if that is worth it. The next beat may become late by that.
    pub fn rest_until(&mut self, deadline: u64) {
        let now = port::tsc();
        if deadline.saturating_sub(now) < self.wait_ticks_min.min(deadline) {
            core::hint::spin_loop();
            return;
        }
        let microseconds = self.ticks.to_microseconds(deadline - now);
        port::wait(u32::try_from(microseconds).unwrap_or(u32::MAX));
        let now = port::tsc();
        self.watch.look_after_wait(deadline, now, &mut self.report);
    }

    /// Notes the result of a check of a page.
    #[inline]
    pub fn note(&mut self, page: u64, result: Result<(), Fault>) -> Sound {
        match result {
            Ok(()) => Sound::Yes,
            Err(fault) => {
                self.note_fault(page, fault);
                Sound::No
            }
        }
    }

    #[cold]
    fn note_fault(&mut self, page: u64, fault: Fault) {
        if self.report.errors == 0 {
            self.report.first_error = FirstError {
                page,
                expected: fault.expected,
                found: fault.found,
                kind: fault.kind.to_word(),
            };
        }
        self.report.errors += 1;
    }

    /// Sets the state and shows it at once.
    pub fn set_state(&mut self, state: State) {
        self.report.state = state.to_word();
        self.publish();
    }

    #[cold]
    fn beat(&mut self, now: u64) {
        self.report.beat_tsc = now;
        self.publish();
        if self.index == 0 {
            self.announcer.hear(match self.monitor {
                Monitor::Limosa => port::heartbeat(),
                Monitor::Foreign => port::heartbeat_on_console(),
            });
        }
        self.next_beat += self.beat_ticks;
        if self.next_beat <= now || self.next_beat > now + self.beat_ticks {
            self.next_beat = now + self.beat_ticks;
        }
    }

    /// Shows the report as it is now.
    pub(crate) fn publish(&self) {
        // SAFETY: a report is made of `REPORT_WORDS` integers of 64 bits without padding, which the
        // contract checks, and the reference lives as long as the one to the report.
        let words = unsafe { &*(&raw const self.report).cast::<[u64; REPORT_WORDS]>() };
        let page = memory_map::report_address(self.index) as *mut u64;
        for (offset, &word) in words.iter().enumerate().rev() {
            // SAFETY: the report page of a vCPU is valid, aligned and written by nobody else. It
            // is read from outside at any time, hence volatile.
            unsafe { page.add(offset).write_volatile(word) };
        }
    }
}

/// Shows a state without a [`Vcpu`] at hand, for a panic.
pub(crate) fn publish_state(index: u32, state: State) {
    let page = memory_map::report_address(index) as *mut Report;
    // SAFETY: as in `publish`; other words of the page stay as they are.
    unsafe { (&raw mut (*page).state).write_volatile(state.to_word()) };
}

/// Takes a range of the heap for a vCPU. What the range holds is taken as it is: zeros in fresh
/// memory.
///
/// # Safety
/// The range lies in the heap, starts at a page boundary, and nothing else refers to any of it as
/// long as the guest lives. Any bytes are a `T`.
#[must_use]
pub unsafe fn claim<T>(range: &Range<u64>) -> &'static mut [T] {
    assert!(range.start >= memory_map::IMAGE_START);
    assert!(range.start.is_multiple_of(PAGE_BYTES));
    const { assert!(align_of::<T>() as u64 <= PAGE_BYTES) };
    let count = (range.end - range.start) / size_of::<T>() as u64;
    // SAFETY: the caller vouches for the memory and for its being ours alone; alignment was
    // checked, and `count` elements fit by the division.
    unsafe { core::slice::from_raw_parts_mut(range.start as *mut T, count as usize) }
}
