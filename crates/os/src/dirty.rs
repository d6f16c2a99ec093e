//! Who notices which pages a guest writes: three trackers behind one trait.
//!
//! | | [`log`]: KVM's bitmap | [`ring`]: KVM's dirty rings | [`write_protect`]: userfaultfd |
//! |---|---|---|---|
//! | who notices | KVM, a bit a page | KVM, an entry a page and vCPU | the kernel's page tables |
//! | a harvest looks at | every page's bit | what was written | every mapped page |
//! | tracked anew | when cleared | when harvested | when harvested |
//! | knows which vCPU | no | yes | no |
//! | sees what the VM process itself writes | no | no | yes |
//!
//! All three keep one contract: a harvest tells every page that was written since it was last
//! cleared, all pages at first; it clears nothing. Clearing takes away what the last harvest told.
//! A page that is read after it was cleared is at least as new as all that no later harvest tells.
//!
//! KVM has either the bitmap or the rings, and is told which when a machine is made.
//!
//! What the VM process writes for its devices is noted by [`device`], and told with every harvest; what it
//! writes to disks that are followed is noted by [`disks`].

pub mod device;
pub mod disks;
mod log;
mod ring;
pub mod scan;
mod seen;
mod write_protect;

pub(crate) use log::DirtyLog;
pub(crate) use ring::{DirtyRings, RING_BYTES_WANTED, RingTracker};
pub(crate) use write_protect::WriteProtect;

use crate::bitmap::SharedBitmap;
use crate::kvm::KvmError;
use crate::kvm::slots::Slots;
use limosa_pages::PageRange;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Which tracker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrackerKind {
    /// KVM's dirty bitmap (`KVM_GET_DIRTY_LOG`), manually cleared.
    #[default]
    Bitmap,
    /// KVM's dirty rings (`KVM_CAP_DIRTY_LOG_RING`), one a vCPU.
    Ring,
    /// userfaultfd's asynchronous write protection, read by `PAGEMAP_SCAN`.
    WriteProtect,
}

impl TrackerKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Bitmap, Self::Ring, Self::WriteProtect];

    /// Its name on a command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bitmap => "bitmap",
            Self::Ring => "ring",
            Self::WriteProtect => "write-protect",
        }
    }

    /// True if it is known which vCPU has written how much.
    pub const fn knows_vcpus(self) -> bool {
        matches!(self, Self::Ring)
    }

    /// What follows from the choice, in a line.
    pub const fn consequence(self) -> &'static str {
        match self {
            Self::Bitmap => {
                "a harvest reads a bit for each page; which vCPU writes how much is not known"
            }
            Self::Ring => {
                "a harvest takes as long as there are dirty pages; each vCPU's dirty rate is known; \
                 a vCPU that fills its ring is stopped until it was emptied"
            }
            Self::WriteProtect => {
                "a harvest walks the mapped pages; what the VM process writes for its devices is \
                 seen, too; which vCPU writes how much is not known"
            }
        }
    }
}

impl fmt::Display for TrackerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for TrackerKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|kind| kind.name() == text);
        found.ok_or_else(|| format!("'{text}' is none of bitmap, ring, write-protect"))
    }
}

/// Notices which pages are written, of one machine.
pub(crate) trait DirtyTracker: fmt::Debug + Send + Sync {
    /// From now on writes are noticed, and all pages count as written.
    fn start(&self, slots: &Slots) -> Result<(), KvmError>;

    /// Writes are not noticed any more, and all that was is forgotten.
    fn stop(&self, slots: &Slots) -> Result<(), KvmError>;

    /// Overwrites the bitmap with the pages that were written since they were cleared.
    fn harvest(&self, slots: &Slots, into: &SharedBitmap) -> Result<(), KvmError>;

    /// Clears, of the pages in `range`, those that are set in the bitmap.
    fn clear(
        &self,
        slots: &Slots,
        harvested: &SharedBitmap,
        range: PageRange,
    ) -> Result<(), KvmError>;
}
