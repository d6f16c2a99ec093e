//! VM processes for tests: this test program again, told by its environment to be one.

use limosa_os::process::spawn_detached;
use limosa_vmm::client::{VmError, VmHandle};
use limosa_vmm::process::{ServeOptions, serve};
use std::env;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const SOCKET: &str = "LIMOSA_TEST_VM_SOCKET";

/// The main function of the process. As a test it does nothing.
#[test]
fn be_a_vm_process() {
    if let Some(socket) = env::var_os(SOCKET) {
        serve(&ServeOptions {
            socket: socket.into(),
            host_tag: "here".to_owned(),
            ledger: None,
            daemon: None,
        })
        .unwrap();
    }
}

/// What was started by a daemon that is gone by now waits for nobody.
#[test]
fn a_process_without_its_daemon_ends() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("vm.sock");
    let parent = std::os::unix::process::parent_id();
    serve(&ServeOptions {
        socket: socket.clone(),
        host_tag: String::new(),
        ledger: None,
        daemon: Some(parent.wrapping_add(1)),
    })
    .unwrap();
    assert!(!socket.exists());
}

/// A VM process that is killed when the test forgets it.
pub(crate) struct VmProcess {
    pub(crate) socket: PathBuf,
    child: Child,
}

impl VmProcess {
    pub(crate) fn start(directory: &Path, name: &str) -> Self {
        let socket = directory.join(name);
        let mut command = Command::new(env::current_exe().unwrap());
        command
            .args(["--exact", "vm_process::be_a_vm_process"])
            .env(SOCKET, &socket);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        Self {
            socket,
            child: spawn_detached(&mut command).unwrap(),
        }
    }

    pub(crate) fn connect(&self) -> Result<VmHandle, VmError> {
        VmHandle::connect_within(&self.socket, Duration::from_secs(10))
    }

    /// True once it has ended by itself.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub(crate) fn wait_end(&mut self) {
        let began = Instant::now();
        while !self.has_ended() {
            assert!(
                began.elapsed() < Duration::from_secs(10),
                "the VM process does not end"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(!self.socket.exists(), "the socket is gone with the process");
    }
}

impl Drop for VmProcess {
    fn drop(&mut self) {
        // It may have ended by itself, and then there is nothing to end.
        if self.child.kill().is_ok() {
            self.child.wait().unwrap();
        }
    }
}
