//! Threads: a signal that only interrupts, precise sleeping.

use std::io;
use std::sync::OnceLock;

/// Names a thread of this process to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadId(libc::pid_t);

impl ThreadId {
    /// The calling thread.
    pub fn current() -> Self {
        // SAFETY: the call takes nothing and always succeeds.
        Self(unsafe { libc::gettid() })
    }

    /// Interrupts the system call that the thread is in, if any. A thread that has ended is left
    /// in peace.
    pub fn interrupt(self) {
        let signal = interrupt_signal();
        // SAFETY: the signal has a handler that does nothing; the thread is one of this process, or
        // the kernel finds none. Its only possible failure is that the thread has ended.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.0, signal) };
    }

    pub(crate) const fn number(self) -> libc::pid_t {
        self.0
    }
}

/// The signal that only interrupts; from here on it has a handler.
pub(crate) fn interrupt_signal() -> libc::c_int {
    *INTERRUPT.get_or_init(install_interrupt)
}

impl ThreadId {
    /// Lets the thread run before all ordinary ones, on whatever processor is free of its like, or
    /// makes it an ordinary one again. For work of microseconds that something waits for.
    ///
    /// # Errors
    /// This user may not do so, or the thread has ended.
    pub fn set_urgent(self, is_urgent: bool) -> io::Result<()> {
        let (class, priority) = if is_urgent {
            (libc::SCHED_RR, 1)
        } else {
            (libc::SCHED_OTHER, 0)
        };
        let parameters = libc::sched_param {
            sched_priority: priority,
        };
        // SAFETY: the parameters are valid and are only read.
        if unsafe { libc::sched_setscheduler(self.0, class, &raw const parameters) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Sets the thread's share of the processor: -20 is the largest, 0 what everyone has.
    ///
    /// # Errors
    /// This user may not do so, or the thread has ended.
    pub fn set_nice(self, nice: i32) -> io::Result<()> {
        let thread = libc::id_t::try_from(self.0).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the call takes numbers only.
        if unsafe { libc::setpriority(libc::PRIO_PROCESS, thread, nice) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

static INTERRUPT: OnceLock<libc::c_int> = OnceLock::new();

/// Gives the first real-time signal a handler that does nothing, without which it would end the
/// process. Without `SA_RESTART`, so that system calls really return.
fn install_interrupt() -> libc::c_int {
    extern "C" fn nothing(_: libc::c_int) {}
    let signal = libc::SIGRTMIN();
    // SAFETY: an all-zero action is a valid one to start from; the handler touches nothing, so it is
    // safe at any point of any thread.
    let failed = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        libc::sigaction(signal, &raw const action, std::ptr::null_mut())
    } != 0;
    assert!(!failed, "a real-time signal can be handled");
    signal
}

/// Lets the calling thread's timed waits end on time: the kernel's default slack is 50 µs.
///
/// # Errors
/// The kernel refuses.
pub fn set_precise_waits() -> io::Result<()> {
    const SLACK_NANOS: libc::c_ulong = 1000;
    // SAFETY: the call takes numbers only.
    if unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, SLACK_NANOS) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;
    use std::thread;

    #[test]
    fn a_thread_becomes_urgent_and_ordinary_again() {
        let me = ThreadId::current();
        match me.set_urgent(true).and_then(|()| me.set_nice(-20)) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                println!("skipped: {error}")
            }
            Err(error) => panic!("{error}"),
        }
        me.set_urgent(false).unwrap();
    }

    #[test]
    fn an_interrupted_call_returns() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let (tell, told) = mpsc::channel();
        let reader = thread::spawn(move || {
            set_precise_waits().unwrap();
            tell.send(ThreadId::current()).unwrap();
            far.read(&mut [0; 1]).unwrap_err().kind()
        });
        let id = told.recv().unwrap();
        while !reader.is_finished() {
            id.interrupt();
            thread::yield_now();
        }
        assert_eq!(reader.join().unwrap(), io::ErrorKind::Interrupted);
        id.interrupt();
        drop(near);
    }
}
