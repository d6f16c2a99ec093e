//! An alarm of a thread: a signal that interrupts it again and again.
//!
//! For a vCPU that has to be out of the guest after some tens of microseconds: the interrupt that rings
//! comes to the processor on which the thread is, so nobody has to be woken first to send it. An alarm
//! that rings between two system calls interrupts none; hence it rings periodically, and one that was
//! missed costs a period.

use crate::thread::{ThreadId, interrupt_signal};
use std::io;
use std::time::Duration;

/// Interrupts the thread that made it; dropped, it never rings again.
#[derive(Debug)]
pub struct Alarm {
    timer: libc::c_int,
}

impl Alarm {
    /// An alarm of the calling thread, which does not ring yet.
    ///
    /// # Errors
    /// The kernel gives no timer.
    pub fn of_this_thread() -> io::Result<Self> {
        let mut timer: libc::c_int = 0;
        // SAFETY: an all-zero event is a valid one to start from.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = interrupt_signal();
        event.sigev_notify_thread_id = ThreadId::current().number();
        // SAFETY: the kernel reads the event and writes the timer's number, an integer. The signal has
        // a handler that does nothing.
        let failed = unsafe {
            libc::syscall(
                libc::SYS_timer_create,
                libc::CLOCK_MONOTONIC,
                &raw const event,
                &raw mut timer,
            )
        } != 0;
        if failed {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { timer })
    }

    /// Lets it ring each time that so much time has passed, from now on; zero silences it.
    ///
    /// # Errors
    /// The kernel takes no such time.
    pub fn ring_every(&self, period: Duration) -> io::Result<()> {
        let seconds = libc::time_t::try_from(period.as_secs());
        let period = libc::timespec {
            tv_sec: seconds.map_err(|_| io::ErrorKind::InvalidInput)?,
            tv_nsec: libc::c_long::from(period.subsec_nanos().cast_signed()),
        };
        let setting = libc::itimerspec {
            it_interval: period,
            it_value: period,
        };
        // SAFETY: the timer is ours until it is dropped; the kernel reads the setting and writes none.
        let failed = unsafe {
            libc::syscall(
                libc::SYS_timer_settime,
                self.timer,
                0,
                &raw const setting,
                std::ptr::null_mut::<libc::itimerspec>(),
            )
        } != 0;
        if failed {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: the timer is ours and nobody uses it after this.
        unsafe { libc::syscall(libc::SYS_timer_delete, self.timer) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_thread_that_waits_is_interrupted_again_and_again() {
        let (_near, mut far) = UnixStream::pair().unwrap();
        let alarm = Alarm::of_this_thread().unwrap();
        alarm.ring_every(Duration::from_micros(100)).unwrap();
        for _ in 0..3 {
            let error = far.read(&mut [0; 1]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::Interrupted);
        }
        alarm.ring_every(Duration::ZERO).unwrap();
        drop(alarm);
    }
}
