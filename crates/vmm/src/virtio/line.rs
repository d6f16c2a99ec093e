//! How a device says that it has something for its driver.

use crate::board::Wake;
use limosa_os::kvm::InterruptLine;
use std::io;
use std::sync::Arc;

/// A way to a driver.
#[derive(Debug)]
pub(super) enum Line {
    /// An interrupt.
    Interrupt(InterruptLine),
    /// The end of a wait: there are no interrupt controllers.
    Wake(Arc<Wake>),
}

impl Line {
    /// Calls the driver once. One call too many does no harm: the driver looks why.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn pulse(&self) -> io::Result<()> {
        match self {
            Self::Interrupt(line) => line.pulse(),
            Self::Wake(wake) => {
                wake.pulse();
                Ok(())
            }
        }
    }
}
