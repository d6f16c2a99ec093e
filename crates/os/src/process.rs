//! Processes: ones that outlive whoever started them.

use std::io;
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

/// Ends another process at once. True if there was one to end.
pub fn kill(pid: u32) -> bool {
    let Ok(pid) = libc::pid_t::try_from(pid) else {
        return false;
    };
    // Zero and one would mean a group and init.
    // SAFETY: the call takes numbers only.
    pid > 1 && unsafe { libc::kill(pid, libc::SIGKILL) } == 0
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
        assert!(kill(child.id()));
        assert!(!child.wait().unwrap().success());
        assert!(!kill(1));
    }
}
