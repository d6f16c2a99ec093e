//! The VM process's side: the gate that holds back whoever touches a page that is not there.

use super::FaultPath;
use super::request::{Userfault, feature, mode};
use crate::memory::{PageKind, SharedMemory};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// Why faults cannot be held back.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// Faults that the kernel meets for a process are reported to the privileged only.
    #[error(
        "this user may not have page faults of KVM reported: run with CAP_SYS_PTRACE, set vm.unprivileged_userfaultfd to 1, or allow access to /dev/userfaultfd"
    )]
    NotPermitted(#[source] io::Error),
    /// The kernel refused.
    #[error("cannot {action}")]
    Call {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Holds back every access of this process, and of KVM for it, to pages that are not there.
///
/// Close it when nothing is missing any more. If it is dropped, a duplicate of its descriptor
/// elsewhere keeps it working; with the last one gone, missing pages would read as zeros.
#[derive(Debug)]
pub struct FaultGate {
    faults: Userfault,
    memory: Arc<SharedMemory>,
    path: FaultPath,
}

impl FaultGate {
    /// Holds back accesses through this mapping from now on, in the way that suits the memory.
    ///
    /// # Errors
    /// This user may not, or the kernel cannot.
    pub fn open(memory: &Arc<SharedMemory>) -> Result<Self, GateError> {
        let path = match memory.kind() {
            PageKind::Small => FaultPath::Copy,
            PageKind::Huge => FaultPath::Continue,
        };
        Self::open_with(memory, path)
    }

    /// The same, by a path of the caller's choice.
    ///
    /// # Errors
    /// As [`FaultGate::open`].
    ///
    /// # Panics
    /// If huge pages are to be copied.
    pub fn open_with(memory: &Arc<SharedMemory>, path: FaultPath) -> Result<Self, GateError> {
        let (features, modes) = match (memory.kind(), path) {
            (PageKind::Small, FaultPath::Copy) => (feature::MISSING_SHMEM, mode::MISSING),
            (PageKind::Small, FaultPath::Continue) => (
                feature::MISSING_SHMEM | feature::MINOR_SHMEM,
                mode::MISSING | mode::MINOR,
            ),
            (PageKind::Huge, FaultPath::Continue) => (
                feature::MISSING_HUGETLBFS | feature::MINOR_HUGETLBFS,
                mode::MISSING | mode::MINOR,
            ),
            (PageKind::Huge, FaultPath::Copy) => panic!("huge pages do not arrive whole"),
        };
        let open = |source: io::Error| match source.kind() {
            io::ErrorKind::PermissionDenied => GateError::NotPermitted(source),
            _ => call("have page faults reported")(source),
        };
        let faults = Userfault::open(features, true).map_err(open)?;
        let gate = Self {
            faults,
            memory: Arc::clone(memory),
            path,
        };
        let (start, len) = (gate.base(), memory.size().get());
        gate.faults
            .register(start, len, modes)
            .map_err(call("have faults on the guest's memory reported"))?;
        Ok(gate)
    }

    /// The descriptor that the daemon needs.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.faults.as_fd()
    }

    /// Where the memory is mapped, which the daemon has to know.
    pub fn base(&self) -> u64 {
        self.memory
            .host_address(0, 0)
            .expect("a mapping has a start")
    }

    /// How pages are to be put in.
    pub const fn path(&self) -> FaultPath {
        self.path
    }

    /// Takes every page out of the mapping, so that each is reported at its next access, unless it
    /// exists and existing pages are not reported. To be called before the guest runs: a huge page
    /// that something has touched before would stay visible, whatever became missing in it since.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn unmap_pages(&self) -> Result<(), GateError> {
        self.memory
            .unmap_pages()
            .map_err(call("take pages out of the mapping"))
    }

    /// Holds back nobody any more and wakes everybody.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn close(self) -> Result<(), GateError> {
        self.faults
            .unregister(self.base(), self.memory.size().get())
            .map_err(call("let go of the guest's memory"))
    }
}

fn call(action: &'static str) -> impl Fn(io::Error) -> GateError {
    move |source| GateError::Call { action, source }
}
