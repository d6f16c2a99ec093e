//! Threads that move pages in bulk, and the guest that they share processors with.

use limosa_os::thread::ThreadId;

/// A third of a vCPU's share. On two processors with a guest that never rests, against none: its work
/// during a move doubles, its stalls halve, and the move is no longer (`docs/measurements.md`).
const NICE: i32 = 5;

/// The calling thread moves pages in bulk: where processors are scarce, the guest comes first, and so
/// does whoever brings a page that it waits for.
pub(crate) fn be_modest() {
    if let Err(error) = ThreadId::current().set_nice(NICE) {
        tracing::debug!(%error, "pages are moved at the cost of the guest");
    }
}
