//! The peer: how QEMU is asked to move a guest, and what it says about a move.
//!
//! A variant is a set of switches that somebody who knows QEMU would choose for a purpose. Each has
//! the technique of ours to which it comes closest, so that charts can show both in one colour.
//!
//! Deliberately absent: starting it. Whoever makes the moves does that.

use limosa_engine::policy::Mode;
use limosa_host::api::Compression;
use serde::{Deserialize, Serialize};

/// Channels of the variants that use several.
pub const CHANNELS: u8 = 4;

/// A way in which QEMU moves a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QemuWay {
    /// Which switches are on.
    pub variant: Variant,
    /// The downtime that it aims at, in whole milliseconds, as it takes them.
    pub downtime_limit_ms: u32,
    /// When a move that goes on is cancelled.
    pub cancel_after_ms: u64,
}

/// Switches that go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Variant {
    /// Pre-copy as it comes.
    Plain,
    /// Pre-copy over several channels.
    Multifd,
    /// The same with pages compressed by zstd.
    Zstd,
    /// Pre-copy that sends differences of pages that it has sent before.
    Xbzrle,
    /// Pre-copy that slows the guest's processors down until it converges.
    AutoConverge,
    /// The same over several channels.
    MultifdAutoConverge,
    /// Post-copy from the first page.
    PostCopy,
    /// The same with a channel of its own for pages that the guest waits for.
    PostCopyPreempt,
    /// Post-copy after one round of pre-copy.
    Hybrid,
    /// The same with a channel of its own for pages that the guest waits for.
    HybridPreempt,
}

impl Variant {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Plain,
        Self::Multifd,
        Self::Zstd,
        Self::Xbzrle,
        Self::AutoConverge,
        Self::MultifdAutoConverge,
        Self::PostCopy,
        Self::PostCopyPreempt,
        Self::Hybrid,
        Self::HybridPreempt,
    ];

    /// As it is typed.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Multifd => "multifd",
            Self::Zstd => "zstd",
            Self::Xbzrle => "xbzrle",
            Self::AutoConverge => "auto-converge",
            Self::MultifdAutoConverge => "multifd-auto-converge",
            Self::PostCopy => "post-copy",
            Self::PostCopyPreempt => "post-copy-preempt",
            Self::Hybrid => "hybrid",
            Self::HybridPreempt => "hybrid-preempt",
        }
    }

    /// The technique that is most like it.
    pub const fn technique(self) -> Mode {
        match self {
            Self::Plain
            | Self::Multifd
            | Self::Zstd
            | Self::Xbzrle
            | Self::AutoConverge
            | Self::MultifdAutoConverge => Mode::PreCopy,
            Self::PostCopy | Self::PostCopyPreempt => Mode::PostCopy,
            Self::Hybrid | Self::HybridPreempt => Mode::Hybrid,
        }
    }

    /// Streams that carry pages.
    pub const fn streams(self) -> u8 {
        match self {
            Self::Multifd | Self::Zstd | Self::MultifdAutoConverge => CHANNELS,
            _ => 1,
        }
    }

    /// Whether pages are coded.
    pub const fn compress(self) -> Compression {
        match self {
            Self::Zstd | Self::Xbzrle => Compression::On,
            _ => Compression::Off,
        }
    }
}

/// What QEMU says about a move. None of it is measured by us, and some of it is known to be odd: the
/// downtime of a post-copy is that of the switch alone.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct QemuFigures {
    /// Its version, with that of the package.
    pub version: String,
    /// The downtime as it counts it.
    pub downtime_ms: Option<f64>,
    /// How often it went over the memory.
    pub passes: Option<u64>,
    /// How much it slowed the guest down at last, in percent.
    pub throttle_percent: Option<u64>,
    /// Pages that the guest waited for, as requests.
    pub postcopy_requests: Option<u64>,
    /// For how long the guest waited for pages in all.
    pub postcopy_blocktime_ms: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_plans_and_results() {
        for variant in Variant::ALL {
            let json = serde_json::to_value(variant).unwrap();
            assert_eq!(json, variant.name());
        }
    }
}
