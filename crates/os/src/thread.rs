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
        let signal = *INTERRUPT.get_or_init(install_interrupt);
        // SAFETY: the signal has a handler that does nothing; the thread is one of this process, or
        // the kernel finds none. Its only possible failure is that the thread has ended.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.0, signal) };
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
