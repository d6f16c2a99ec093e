//! Pages that are put under a running guest: post-copy.
//!
//! The target's guest runs while pages are missing. Its memory is one file, mapped by the VM process
//! (mapping A, which KVM uses) and by the daemon (mapping B). The VM process opens a [`FaultGate`]
//! over all of A: whoever touches a page that is not there waits, KVM included. The daemon holds a
//! duplicate of the gate's descriptor in its [`PageInstaller`], reads the faults and puts pages in.
//! Which pages are missing is said by a bitmap in shared memory that outlives the daemon.
//!
//! Two paths, chosen by what backs the memory:
//!
//! ```text
//!  path      page is made by                      visible by      at most once by
//!  Copy      UFFDIO_COPY from a private buffer    the same call   the kernel: EEXIST
//!  Continue  a write through B, after a claim     UFFDIO_CONTINUE the claim
//! ```
//!
//! Huge pages need *continue*, since a page of 4 KiB arrives alone and 2 MiB become visible at once.
//!
//! # Rules
//! 1. A bit is cleared only when the content is in place: after the copy, after the write through B,
//!    or because the page is known to be zero and is a hole.
//! 2. On the path *continue* the bit is cleared before the page is made visible. A daemon that dies in
//!    between leaves a page that is not missing and that nobody can have written; the other way
//!    round its successor would write over what the guest wrote. On the path *copy* the bit is
//!    cleared afterwards, and a successor's copy is refused, since the page exists.
//! 3. The daemon never touches a missing page through B but under a claim: a read would make it.
//! 4. Whoever makes a page visible, or finds that it is, wakes those who wait for it.
//!
//! # Races
//! *A fault thread finds the bit set, and an installer finishes meanwhile.* The page is asked for in
//! vain, its second copy is dropped, and the waiter was woken by the installer: it waits in the
//! kernel's queue since before the page was visible, and the wake comes after.
//!
//! *A fault thread finds the bit clear, and the page is not visible yet* (rule 2). It resolves: maps
//! the page itself, which the installer then finds done. Both wake.
//!
//! *The guest faults between the clearing of a bit and the wake.* The kernel looks again after
//! queueing: either the page is visible by then, or the waiter is in the queue when the wake comes.
//!
//! *A page is found to be zero.* Nothing is made; the bit is cleared and waiters are woken. They
//! fault again, and the fault thread finds the bit clear and resolves. It cannot be missed: a fault
//! before the wake is woken by it, one after it is reported anew.
//!
//! *Two threads bring the last two pages of a huge page.* Clearing a bit and looking at the others are
//! sequentially consistent, so at least one of them sees all bits clear; if both do, a flag decides
//! who maps. If that thread is slow, a waiter is still woken by it.
//!
//! *A daemon has read a fault and dies.* The kernel does not report it again by itself. A new
//! installer therefore wakes everybody once, and those whose page is still missing fault anew.
//!
//! *The guest writes the page before a late second copy comes.* Copy: the page exists. Continue: the
//! claim is taken, or the bit is clear; claims are never given back.
//!
//! Deliberately absent: which page to ask for first, and over what.

mod gate;
mod installer;
pub(crate) mod request;
#[cfg(test)]
mod tests;

pub use gate::{FaultGate, GateError};
pub use installer::{InstallError, PageInstaller};

/// How pages are put in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FaultPath {
    /// The kernel copies whole pages from a private buffer. Small pages only.
    Copy,
    /// Pages are written through the daemon's mapping and then made visible.
    Continue,
}
