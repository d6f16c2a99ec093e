//! The network between the two hosts: one link, connections of several streams over it.
//!
//! Frames of one stream arrive in their order; frames of different streams in any. All push streams
//! share the link's rate, so a sender that would be faster waits. A connection that is cut loses
//! what is in flight and swallows what is sent from then on; whether and when the two ends notice
//! is decided by the fault, not here: a silent cut is found by the engines' own clocks.

use crate::random::Random;
use core::time::Duration;
use limosa_engine::Timestamp;
use limosa_engine::wire::{ControlFrame, PUSH_HEADER_BYTES};
use limosa_pages::{BytesPerSecond, PAGE_SIZE, PageRange};
use std::collections::VecDeque;

/// What a link can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkProfile {
    /// Bytes a second in each direction, all streams together.
    pub rate: BytesPerSecond,
    /// One way, without a load.
    pub delay: Duration,
    /// Up to this much more, drawn for each frame.
    pub jitter: Duration,
}

/// The two ends of a connection, and the two hosts' roles in a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Source = 0,
    Target = 1,
}

/// Control frames to the target.
pub(crate) const CONTROL_TO_TARGET: usize = 0;
/// Control frames to the source.
pub(crate) const CONTROL_TO_SOURCE: usize = 1;
/// Requests for pages, to the source.
pub(crate) const WANT: usize = 2;
/// Their answers.
pub(crate) const ANSWER: usize = 3;
/// The first push stream.
pub(crate) const PUSH: usize = 4;

/// Something on its way.
#[derive(Debug)]
pub(crate) enum Frame {
    Control(ControlFrame),
    Pages {
        first: u64,
        content: Vec<u64>,
    },
    Zeros(PageRange),
    /// A round, and by how many streams it goes.
    Barrier(u32, u8),
    /// Pages that the target does not have, whatever it has in their place.
    Stale(Vec<PageRange>),
    /// Somebody waits for this page.
    Want(u64),
    /// After a reconnection: pages that are missing.
    Missing(Vec<PageRange>),
    /// All of them were told.
    MissingEnd,
    /// The other end closed the connection.
    Close,
}

impl Frame {
    /// Bytes on the wire.
    pub(crate) fn bytes(&self) -> u64 {
        let header = PUSH_HEADER_BYTES as u64;
        match self {
            Self::Control(ControlFrame::State { state, .. }) => 64 + state.len() as u64,
            Self::Control(ControlFrame::Rehearsal { state }) => 64 + state.len() as u64,
            Self::Control(_) | Self::Close => 64,
            Self::Pages { content, .. } => header + content.len() as u64 * PAGE_SIZE,
            Self::Zeros(_) | Self::Barrier(..) | Self::Want(_) | Self::MissingEnd => header,
            Self::Stale(ranges) | Self::Missing(ranges) => header * ranges.len() as u64,
        }
    }
}

/// One direction of one stream.
#[derive(Debug, Default)]
pub(crate) struct Channel {
    pub(crate) in_flight: VecDeque<Frame>,
    last_arrival: Timestamp,
    pub(crate) is_cut: bool,
}

/// The control stream, the pull stream and the push streams of one migration.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) source: usize,
    pub(crate) target: usize,
    pub(crate) channels: Vec<Channel>,
    /// Whether each side still listens.
    pub(crate) open: [bool; 2],
}

impl Connection {
    pub(crate) fn new(source: usize, target: usize, streams: u8) -> Self {
        Self {
            source,
            target,
            channels: (0..PUSH + usize::from(streams))
                .map(|_| Channel::default())
                .collect(),
            open: [false, true],
        }
    }

    /// Loses everything in flight and to come.
    pub(crate) fn cut(&mut self) {
        for channel in &mut self.channels {
            channel.is_cut = true;
            channel.in_flight.clear();
        }
    }
}

/// The wire.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) profile: LinkProfile,
    pub(crate) is_up: bool,
    pub(crate) stalled_until: Timestamp,
    busy_until: Timestamp,
    random: Random,
}

impl Link {
    pub(crate) const fn new(profile: LinkProfile, random: Random) -> Self {
        Self {
            profile,
            is_up: true,
            stalled_until: Timestamp::ZERO,
            busy_until: Timestamp::ZERO,
            random,
        }
    }

    /// The time that one small message takes now, one way.
    pub(crate) fn latency(&mut self) -> Duration {
        let jitter = u64::try_from(self.profile.jitter.as_nanos()).unwrap_or(u64::MAX - 1);
        self.profile.delay + Duration::from_nanos(self.random.below(jitter + 1))
    }

    /// Puts `bytes` of a push stream onto the wire: when the sender is done with them.
    pub(crate) fn occupy(
        &mut self,
        now: Timestamp,
        bytes: u64,
        limit: Option<BytesPerSecond>,
    ) -> Timestamp {
        let rate = limit.map_or(self.profile.rate, |limit| limit.min(self.profile.rate));
        let took = Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / rate.get().max(1));
        let start = now.max(self.busy_until).max(self.stalled_until);
        self.busy_until = start.after(took);
        self.busy_until
    }

    /// When a frame that left at `left` arrives, behind everything before it in its channel.
    pub(crate) fn arrival(&mut self, channel: &mut Channel, left: Timestamp) -> Timestamp {
        let arrival = left.after(self.latency()).max(channel.last_arrival);
        channel.last_arrival = arrival;
        arrival
    }
}
