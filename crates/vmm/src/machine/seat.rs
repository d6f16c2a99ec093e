//! The owner's side of the vCPU threads: giving orders, collecting replies, kicking.

use super::pace::Rule;
use super::vcpu_thread::{Order, Reply, StartAt, VcpuThread};
use super::{LIMIT, MachineError};
use crate::answer::{ExitReason, Running};
use limosa_engine::Timestamp;
use limosa_engine::throttle::Throttle;
use limosa_os::kvm::Kicker;
use limosa_os::thread::ThreadId;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// What all vCPU threads and their owner share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// The vCPUs are to leave the guest.
    halt: AtomicBool,
    exit: Mutex<Option<ExitReason>>,
    kicks: OnceLock<Vec<Kick>>,
    /// KVM's clock at the stop, as it was loaded.
    clock: Mutex<Option<u64>>,
    /// How fast the vCPUs may write.
    pub(super) rule: Rule,
}

/// How to get a vCPU out of the guest, or out of a wait for it.
#[derive(Debug)]
pub(super) struct Kick {
    kicker: Kicker,
    id: ThreadId,
    thread: Thread,
}

impl Shared {
    pub(super) fn is_halting(&self) -> bool {
        self.halt.load(Ordering::SeqCst)
    }

    /// Ends the machine; the first reason counts.
    pub(super) fn end(&self, reason: ExitReason) {
        tracing::info!(%reason, "the machine ends");
        self.exit
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(reason);
        self.halt();
    }

    pub(super) fn exit(&self) -> Option<ExitReason> {
        self.exit
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub(super) fn set_clock(&self, nanos: u64) {
        *self.clock.lock().unwrap_or_else(PoisonError::into_inner) = Some(nanos);
    }

    pub(super) fn clock(&self) -> Option<u64> {
        *self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gets all vCPUs out of the guest. The flag comes first, so that a thread that sees the kick
    /// sees the reason.
    fn halt(&self) {
        self.halt.store(true, Ordering::SeqCst);
        for kick in self.kicks.get().into_iter().flatten() {
            kick.kicker.kick(kick.id);
            kick.thread.unpark();
        }
    }

    /// Tells the vCPUs how fast they may write; those in the guest come out to hear it.
    pub(super) fn throttle(&self, throttle: Option<Throttle>) {
        if !self.rule.set(throttle) {
            return;
        }
        for kick in self.kicks.get().into_iter().flatten() {
            kick.kicker.kick(kick.id);
            kick.thread.unpark();
        }
    }

    /// Lets the threads run before all others, since the guest is stopped: a thread that has been
    /// kicked but has no processor would keep the others waiting for some scheduler slices. Each
    /// gives this up when it has saved. Not before the kick, or an urgent guest would keep us from
    /// kicking.
    fn hurry(&self) {
        for kick in self.kicks.get().into_iter().flatten() {
            if let Err(error) = kick.id.set_urgent(true) {
                tracing::debug!(%error, "a stop of the guest may take longer on a busy host");
                return;
            }
        }
    }

    /// Lets vCPUs into the guest again. None runs now.
    fn release(&self) {
        for kick in self.kicks.get().into_iter().flatten() {
            kick.kicker.release();
        }
        self.halt.store(false, Ordering::SeqCst);
        // The guest may have ended between the pause and here.
        if self.exit().is_some() {
            self.halt();
        }
    }
}

/// All vCPU threads of a machine.
#[derive(Debug)]
pub(super) struct Seats {
    seats: Vec<Seat>,
    replies: Receiver<(u64, u8, Reply)>,
    shared: Arc<Shared>,
    /// Number of the last question: a reply to an older one came too late and is dropped.
    ticket: u64,
}

#[derive(Debug)]
struct Seat {
    orders: Sender<(u64, Order)>,
    /// When it last entered the guest after an order to run, zero while it has not.
    entered_at: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Seats {
    /// Starts the threads and waits until each is there.
    pub(super) fn start(
        threads: Vec<VcpuThread>,
        shared: Arc<Shared>,
    ) -> Result<Self, MachineError> {
        let (reply, replies) = mpsc::channel();
        let mut seats = Self {
            seats: Vec::new(),
            replies,
            shared,
            ticket: 0,
        };
        let mut kickers = Vec::new();
        for thread in threads {
            kickers.push(thread.vcpu.kicker());
            let (orders, inbox) = mpsc::channel();
            let entered_at = Arc::new(AtomicU64::new(0));
            let (reply, entered) = (reply.clone(), Arc::clone(&entered_at));
            let handle = thread::Builder::new()
                .name(format!("vcpu-{}", thread.index))
                .spawn(move || thread.serve(&inbox, &reply, &entered))
                .map_err(|source| MachineError::Io {
                    action: "start a vCPU's thread",
                    source,
                })?;
            seats.seats.push(Seat {
                orders,
                entered_at,
                thread: Some(handle),
            });
        }
        let ids = seats
            .ask(|_| Order::Name)?
            .into_iter()
            .map(Reply::into_name);
        let handles = seats.seats.iter().filter_map(|seat| seat.thread.as_ref());
        let kicks = ids
            .zip(kickers)
            .zip(handles)
            .map(|((id, kicker), handle)| Kick {
                kicker,
                id,
                thread: handle.thread().clone(),
            })
            .collect();
        seats
            .shared
            .kicks
            .set(kicks)
            .expect("threads are started once");
        Ok(seats)
    }

    /// Gives each vCPU an order and collects the replies, in the order of the vCPUs.
    pub(super) fn ask(
        &mut self,
        order: impl FnMut(usize) -> Order,
    ) -> Result<Vec<Reply>, MachineError> {
        self.give(order);
        self.collect()
    }

    /// Gets all vCPUs out of the guest; each carries out the order as soon as it is.
    pub(super) fn pause(
        &mut self,
        mut order: impl FnMut() -> Order,
    ) -> Result<Vec<Reply>, MachineError> {
        // The orders are there before the kick, so that no thread goes to sleep in between.
        self.give(|_| order());
        self.shared.halt();
        self.shared.hurry();
        self.collect()
    }

    /// Lets all vCPUs run and waits until each has entered the guest.
    pub(super) fn run(&mut self, at: Option<StartAt>) -> Result<Running, MachineError> {
        self.shared.release();
        for seat in &self.seats {
            seat.entered_at.store(0, Ordering::SeqCst);
        }
        self.give(|_| Order::Run(at));
        let began = Instant::now();
        loop {
            let entered: Vec<u64> = self
                .seats
                .iter()
                .map(|seat| seat.entered_at.load(Ordering::SeqCst))
                .collect();
            if let (Some(&first), Some(&last)) = (entered.iter().min(), entered.iter().max())
                && first != 0
            {
                return Ok(Running {
                    first_instruction_at: Timestamp::from_nanos(first),
                    last_entered_at: Timestamp::from_nanos(last),
                });
            }
            wait_a_moment(began)?;
        }
    }

    fn give(&mut self, mut order: impl FnMut(usize) -> Order) {
        self.ticket += 1;
        for (index, seat) in self.seats.iter().enumerate() {
            // A thread that has died does not answer, which is noticed when replies are collected.
            let _is_alive = seat.orders.send((self.ticket, order(index))).is_ok();
        }
    }

    fn collect(&self) -> Result<Vec<Reply>, MachineError> {
        let deadline = Instant::now() + LIMIT;
        let mut replies: Vec<Option<Reply>> = self.seats.iter().map(|_| None).collect();
        while replies.iter().any(Option::is_none) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.replies.recv_timeout(left) {
                Ok((ticket, index, reply)) if ticket == self.ticket => {
                    replies[usize::from(index)] = Some(reply);
                }
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    return Err(MachineError::Stuck);
                }
            }
        }
        Ok(replies.into_iter().flatten().collect())
    }
}

/// Waits for threads that have been woken. Sleeping, although that may see them late: whoever spins
/// here keeps a processor from one of them.
fn wait_a_moment(began: Instant) -> Result<(), MachineError> {
    const SHORTEST: Duration = Duration::from_micros(30);
    const LONGEST: Duration = Duration::from_millis(1);
    let waited = began.elapsed();
    if waited >= LIMIT {
        return Err(MachineError::Stuck);
    }
    thread::sleep((waited / 2).clamp(SHORTEST, LONGEST));
    Ok(())
}

impl Drop for Seats {
    fn drop(&mut self) {
        self.shared.halt();
        for seat in &self.seats {
            let _is_alive = seat.orders.send((0, Order::End)).is_ok();
        }
        let end = Instant::now() + LIMIT;
        for thread in self.seats.iter_mut().filter_map(|seat| seat.thread.take()) {
            // A thread that waits for a page that never comes ends with the process.
            while !thread.is_finished() && Instant::now() < end {
                thread::sleep(Duration::from_micros(100));
            }
            if !thread.is_finished() {
                tracing::error!("a vCPU's thread does not end");
            } else if thread.join().is_err() {
                tracing::error!("a vCPU's thread had panicked");
            }
        }
    }
}
