//! A source that a test plays: it announces a guest and then does what the test wants.

use super::{dial, fresh_id, read, send, write};
use limosa_engine::handover::MigrationId;
use limosa_engine::wire::{ControlFrame, Role, Start};
use std::net::TcpStream;

/// The connections of a played source.
#[derive(Debug)]
pub struct RawSource {
    /// The attempt.
    pub id: MigrationId,
    /// The control stream.
    pub control: TcpStream,
    /// The stream on which the target asks for pages.
    pub pull: TcpStream,
    /// The push streams.
    pub pushes: Vec<TcpStream>,
}

impl RawSource {
    /// Connects, with as many push streams as `start` announces, and sends `start`.
    ///
    /// # Panics
    /// If nobody listens.
    #[track_caller]
    pub fn open(address: &str, start: &Start) -> Self {
        let id = fresh_id();
        let control = dial(address, id, Role::Control);
        let pull = dial(address, id, Role::Pull);
        let pushes = (0..start.streams)
            .map(|index| dial(address, id, Role::Push(index)))
            .collect();
        send(&control, &ControlFrame::Start(start.clone()));
        Self {
            id,
            control,
            pull,
            pushes,
        }
    }

    /// The same, and waits until the target has made its VM.
    ///
    /// # Panics
    /// If it does not accept.
    #[track_caller]
    pub fn accepted(address: &str, start: &Start) -> Self {
        let source = Self::open(address, start);
        let answer = source.read();
        assert!(
            matches!(answer, Some(ControlFrame::Accept { .. })),
            "{answer:?}"
        );
        source
    }

    /// Sends a control frame.
    pub fn send(&self, frame: &ControlFrame) {
        send(&self.control, frame);
    }

    /// The next control frame.
    ///
    /// # Panics
    /// If nothing comes.
    #[track_caller]
    pub fn read(&self) -> Option<ControlFrame> {
        read(&self.control)
    }

    /// Writes bytes on a push stream.
    pub fn push(&self, stream: usize, bytes: &[u8]) {
        write(&self.pushes[stream], bytes);
    }
}
