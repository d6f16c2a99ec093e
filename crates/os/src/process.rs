//! Processes: ones that outlive whoever started them.

use crate::socket::wait_readable;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

/// Makes this process deaf to a closed terminal and to broken pipes, which then are errors of the
/// calls that meet them.
pub fn ignore_hangup() {
    for signal in [libc::SIGHUP, libc::SIGPIPE] {
        // SAFETY: ignoring a signal installs no handler.
        let previous = unsafe { libc::signal(signal, libc::SIG_IGN) };
        assert!(previous != libc::SIG_ERR, "these signals can be ignored");
    }
}

/// Gives large blocks of memory back to the kernel as soon as they are freed. By itself the allocator
/// keeps blocks up to the size of the largest that was ever freed, in each thread's arena.
pub fn return_freed_blocks() {
    /// Bytes from which on a block counts as large: the allocator's own first choice.
    const LARGE: libc::c_int = 128 << 10;
    // SAFETY: it sets a parameter of the allocator, under the allocator's lock.
    let is_known = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE) } == 1;
    debug_assert!(is_known, "the allocator knows the parameter");
}

/// Starts a command in a session of its own, so that no signal to our terminal or process group
/// reaches it.
///
/// # Errors
/// The command cannot be started.
pub fn spawn_detached(command: &mut Command) -> io::Result<Child> {
    // SAFETY: between fork and exec only `setsid` is called, which is async-signal-safe and touches
    // no memory.
    unsafe {
        command.pre_exec(|| match libc::setsid() {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    command.spawn()
}

/// Another process, named so that a later one with the same number is never mistaken for it.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    handle: OwnedFd,
}

impl Process {
    /// The process that has this number now.
    ///
    /// # Errors
    /// There is none, or it cannot be named.
    pub fn open(pid: u32) -> io::Result<Self> {
        let number = libc::pid_t::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the call takes numbers and makes a descriptor, which is closed on exec.
        let handle = unsafe { libc::syscall(libc::SYS_pidfd_open, number, 0) };
        let handle = i32::try_from(handle).ok().filter(|&handle| handle >= 0);
        let handle = handle.ok_or_else(io::Error::last_os_error)?;
        // SAFETY: the kernel has just made this descriptor for us alone.
        let handle = unsafe { OwnedFd::from_raw_fd(handle) };
        Ok(Self { pid, handle })
    }

    /// Its number.
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// Ends it at once; true if there was one to end.
    pub fn kill(&self) -> bool {
        let nothing = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: the call takes numbers and a pointer that may be null.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.handle.as_raw_fd(),
                libc::SIGKILL,
                nothing,
                0,
            ) == 0
        }
    }

    /// Waits until it has ended, for some time at most; true if it has.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn wait_end(&self, milliseconds: u32) -> io::Result<bool> {
        // The descriptor of a process is readable once it has ended.
        let [has_ended] = wait_readable([Some(&self.handle)], Some(milliseconds))?;
        Ok(has_ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Stdio;

    #[test]
    fn a_detached_process_leads_its_own_session_and_can_be_killed() {
        let mut command = Command::new("sleep");
        let mut child = spawn_detached(command.arg("60").stdin(Stdio::null())).unwrap();
        let pid = libc::pid_t::try_from(child.id()).unwrap();
        // SAFETY: the call takes a number only.
        assert_eq!(unsafe { libc::getsid(pid) }, pid);
        let process = Process::open(child.id()).unwrap();
        assert_eq!(process.pid(), child.id());
        assert!(!process.wait_end(0).unwrap());
        assert!(process.kill());
        assert!(process.wait_end(10_000).unwrap());
        assert!(!child.wait().unwrap().success());
        assert!(!process.kill());
        assert!(Process::open(u32::MAX).is_err());
    }
}
