//! The throttle of the vCPUs: what they share about it, and how each carries it out on its own thread.
//!
//! A vCPU that is throttled is interrupted by an alarm of its own thread, settles its account
//! ([`crate::throttle`]) outside the guest, and sleeps there if it owes. Without a throttle all this is
//! one look at a number before each entry.

use super::seat::Shared;
use crate::throttle::{Account, Seen};
use limosa_engine::throttle::Throttle;
use limosa_os::alarm::Alarm;
use limosa_os::kvm::{Vcpu, kvm_regs};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// What all vCPUs are told, and what they have done about it.
#[derive(Debug, Default)]
pub(super) struct Rule {
    throttle: Mutex<Option<Throttle>>,
    /// Counts its changes.
    change: AtomicU64,
    /// How long vCPUs were held back, all together, in nanoseconds.
    held: AtomicU64,
}

impl Rule {
    /// True if that changes anything; the vCPUs have to be told then.
    pub(super) fn set(&self, throttle: Option<Throttle>) -> bool {
        let mut own = self.lock();
        if *own == throttle {
            return false;
        }
        *own = throttle;
        self.change.fetch_add(1, Ordering::SeqCst);
        true
    }

    pub(super) fn throttle(&self) -> Option<Throttle> {
        *self.lock()
    }

    pub(super) fn held(&self) -> Duration {
        Duration::from_nanos(self.held.load(Ordering::Relaxed))
    }

    pub(super) fn forget_held(&self) {
        self.held.store(0, Ordering::Relaxed);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Throttle>> {
        self.throttle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How one vCPU keeps to it, as long as it runs.
pub(super) struct Pace<'a> {
    shared: &'a Shared,
    change: u64,
    held_back: Option<HeldBack>,
}

/// A vCPU that is throttled.
struct HeldBack {
    account: Account,
    alarm: Alarm,
    /// How often the alarm rings.
    period: Duration,
    looked_at: Instant,
    look_after: Duration,
    entered_at: u64,
    seen: Seen,
    /// As they were at the last look.
    registers: Option<kvm_regs>,
}

impl<'a> Pace<'a> {
    pub(super) const fn new(shared: &'a Shared) -> Self {
        Self {
            shared,
            change: 0,
            held_back: None,
        }
    }

    /// Before an entry: holds the vCPU back if it owes, unless it is to halt.
    pub(super) fn before_entry(&mut self, vcpu: &Vcpu) {
        let change = self.shared.rule.change.load(Ordering::SeqCst);
        if change != self.change {
            self.change = change;
            self.take_up(vcpu);
        }
        if let Some(held_back) = &mut self.held_back {
            held_back.settle(vcpu, self.shared, change);
            held_back.entered_at = limosa_os::monotonic_nanos();
        }
    }

    /// After an exit, at that time.
    pub(super) fn after_exit(&mut self, at: u64) {
        if let Some(held_back) = &mut self.held_back {
            let ran = at.saturating_sub(held_back.entered_at);
            held_back.seen.ran += Duration::from_nanos(ran);
        }
    }

    fn take_up(&mut self, vcpu: &Vcpu) {
        self.held_back = None;
        let Some(throttle) = self.shared.rule.throttle() else {
            return;
        };
        match HeldBack::new(throttle, vcpu) {
            Ok(held_back) => self.held_back = Some(held_back),
            // The guest runs on unthrottled, which the migration sees in its rounds.
            Err(error) => tracing::warn!(%error, "a vCPU cannot be held back"),
        }
    }
}

impl HeldBack {
    fn new(throttle: Throttle, vcpu: &Vcpu) -> std::io::Result<Self> {
        let account = Account::new(throttle, vcpu.dirtied().unwrap_or(0));
        let alarm = Alarm::of_this_thread()?;
        let period = account.look_after();
        alarm.ring_every(period)?;
        Ok(Self {
            account,
            alarm,
            period,
            looked_at: Instant::now(),
            look_after: period,
            entered_at: 0,
            seen: Seen::default(),
            registers: None,
        })
    }

    /// Looks at the account, if it is time, and pays.
    fn settle(&mut self, vcpu: &Vcpu, shared: &Shared, change: u64) {
        let passed = self.looked_at.elapsed();
        if passed < self.look_after {
            return;
        }
        self.looked_at += passed;
        let mut seen = std::mem::take(&mut self.seen);
        seen.passed = passed;
        seen.dirtied = vcpu.dirtied();
        let registers = vcpu.registers().ok();
        seen.is_stuck = registers.is_some() && registers == self.registers;
        self.registers = registers;
        let sentence = self.account.look(seen);
        self.look_after = sentence.sleep + sentence.run;
        if !sentence.sleep.is_zero() {
            // It would ring into the sleep.
            self.ring_every(Duration::ZERO);
            self.seen.held = sleep(sentence.sleep, shared, change);
            let held = u64::try_from(self.seen.held.as_nanos()).unwrap_or(u64::MAX);
            shared.rule.held.fetch_add(held, Ordering::Relaxed);
        }
        self.ring_every(sentence.run);
    }

    fn ring_every(&mut self, period: Duration) {
        if period == self.period {
            return;
        }
        match self.alarm.ring_every(period) {
            Ok(()) => self.period = period,
            Err(error) => tracing::warn!(%error, "a vCPU is held back too late"),
        }
    }
}

/// Sleeps, until the vCPU is to halt or there is another throttle; how long.
fn sleep(time: Duration, shared: &Shared, change: u64) -> Duration {
    let begun = Instant::now();
    loop {
        let slept = begun.elapsed();
        let is_over = slept >= time
            || shared.is_halting()
            || shared.rule.change.load(Ordering::SeqCst) != change;
        if is_over {
            return slept;
        }
        thread::park_timeout(time - slept);
    }
}
