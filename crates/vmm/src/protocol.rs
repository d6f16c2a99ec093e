//! What a VM process and its daemon say to each other.
//!
//! One request, one reply, in order, over a Unix stream socket. A frame is two lengths, a message in
//! postcard, and bytes that are passed on as they are (an image, a state). Descriptors come with the
//! first bytes of a frame. Neither side trusts the other: lengths are limited, buffers grow as bytes
//! arrive, and whatever does not fit ends the connection.

use crate::answer::{Loaded, RunState, Running, SaveTimes, SectionInfo, Status};
use crate::config::VmConfig;
use limosa_engine::Timestamp;
use limosa_engine::handover::{MigrationId, Phase};
use limosa_engine::source::Writers;
use limosa_engine::throttle::Throttle;
use limosa_os::descriptor;
use limosa_pages::{ByteCount, PageRange, Pfn};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// Version of this protocol; a process and a daemon of different versions do not talk.
pub(crate) const PROTOCOL_VERSION: u32 = 9;
/// Largest message: the list of all sections of the largest state.
const MESSAGE_BYTES_MAX: usize = 128 << 10;
/// Most pages that a save names as needed first: the page tables of some vCPUs and what they point at;
/// what of more vCPUs does not fit is asked for when it is needed.
pub(crate) const FIRST_NEEDED_MAX: usize = 256;
/// Most bytes beside a message: an image with its debug information.
pub(crate) const BYTES_MAX: usize = 64 << 20;
const HEADER_BYTES: usize = 8;
/// What is read at once; a save of some vCPUs fits.
const READ_BYTES: usize = 64 << 10;

/// What the daemon asks.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// The first one: who are you? Answered with descriptors if there is a machine.
    Attach {
        version: u32,
    },
    /// Make the machine, and boot it.
    Create {
        config: Box<VmConfig>,
        phase: Phase,
        boot: Boot,
    },
    Run,
    Stop,
    Status,
    Inspect,
    StartTracking,
    StopTracking,
    /// Follow what is written to disks, too, from now on, and wait for pages of them that are missing. Answered
    /// with descriptors: a bitmap to which a harvest goes and one of what is missing, from the first disk's
    /// first page on; a pipe with what is asked for; each disk's file.
    LendDisks,
    Harvest,
    Clear {
        range: PageRange,
        /// What the last harvest found of these is not cleared. All lie within the range.
        kept: Vec<PageRange>,
    },
    /// Slow the guest's writers down, or let them go. Whoever pauses the guest, stops tracking or goes
    /// away lets them go, too.
    Throttle {
        throttle: Option<Throttle>,
    },
    PauseAndSave {
        harvest: bool,
    },
    Rehearse,
    /// The state is in the bytes.
    Load {
        is_rehearsal: bool,
    },
    Record {
        phase: Phase,
    },
    CommitAndRun {
        id: MigrationId,
        stopped_at: Timestamp,
        /// Pages are missing still; otherwise nobody is held back from the first instruction on.
        keeps_faults: bool,
    },
    /// No page is missing any more.
    Disarm,
    /// Pause and save nothing.
    Pause,
    SetObserver {
        address: Option<SocketAddr>,
    },
    Command {
        kind: u8,
    },
    /// What has come from outside for a guest that was committed to another host; in the bytes.
    TakeStrays,
    /// In the bytes is what has come for the guest where it was before.
    GiveStrays,
    /// Have the guest give up so much memory.
    SetBalloon {
        target: ByteCount,
    },
    /// Have it give up so much at least until it has been moved; zero to end that. Whoever resumes the
    /// guest alone ends it, too.
    LendBalloon {
        least: ByteCount,
    },
}

/// What a machine is to boot.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Boot {
    /// Nothing: a state will be loaded.
    Nothing,
    /// A micro guest, whose image is in the bytes.
    Micro,
    /// A stock kernel, whose file comes as a descriptor; behind it its initial file system, if any.
    Linux { cmdline: String },
}

/// What the process answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    Done,
    Attached {
        config: Option<VmConfig>,
        phase: Phase,
        run_state: RunState,
        faults: Faults,
    },
    Status(Status),
    Running(Running),
    /// The dirty log is in the shared bitmap.
    Harvested(Writers),
    /// The state is in the bytes, the dirty log in the shared bitmap.
    Saved {
        times: SaveTimes,
        /// At most [`FIRST_NEEDED_MAX`].
        first_needed: Vec<Pfn>,
    },
    Loaded(Loaded),
    Sections(Vec<SectionInfo>),
    Sequence(u32),
    Refused {
        why: Refusal,
        message: String,
    },
}

/// Whether accesses to missing pages are held back, and so whether two more descriptors come behind
/// those of the memory and the dirty log: the page faults' and the bitmap of missing pages.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Faults {
    Held {
        /// Where the process has the memory.
        base: u64,
        /// Whether pages are continued, not copied.
        is_continued: bool,
    },
    /// Not any more, or they never were.
    NotHeld { why: String },
}

/// Kinds of refusals that a daemon tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Refusal {
    /// The record of who may run the guest forbids it.
    Phase,
    /// The guest has ended.
    Exited,
    /// Another daemon controls the process.
    Busy,
    /// Anything else.
    Other,
}

/// Why a frame did not arrive.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameError {
    /// The peer has closed, between frames.
    #[error("the connection was closed")]
    Closed,
    /// The connection broke, or the peer kept silent within a frame.
    #[error("the connection broke")]
    Broken(#[from] io::Error),
    /// The peer does not speak this protocol.
    #[error("the peer sent what is no frame")]
    Foreign,
}

/// A message with the bytes and descriptors that came with it.
#[derive(Debug)]
pub(crate) struct Frame<T> {
    pub(crate) message: T,
    pub(crate) bytes: Vec<u8>,
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// Sends one frame.
pub(crate) fn send<T: Serialize>(
    socket: &UnixStream,
    message: &T,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut head = postcard::to_extend(message, vec![0; HEADER_BYTES])
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    let message_bytes = head.len() - HEADER_BYTES;
    let is_small = message_bytes <= MESSAGE_BYTES_MAX && bytes.len() <= BYTES_MAX;
    let lengths = u32::try_from(message_bytes)
        .ok()
        .zip(u32::try_from(bytes.len()).ok())
        .filter(|_| is_small);
    let (message_bytes, extra) = lengths.ok_or(io::ErrorKind::InvalidInput)?;
    head[..4].copy_from_slice(&message_bytes.to_le_bytes());
    head[4..HEADER_BYTES].copy_from_slice(&extra.to_le_bytes());
    let mut sent = 0;
    while sent < head.len() + bytes.len() {
        let with = if sent == 0 { descriptors } else { &[] };
        let (first, second) = if sent < head.len() {
            (&head[sent..], bytes)
        } else {
            (&[][..], &bytes[sent - head.len()..])
        };
        sent += descriptor::send(socket, &[first, second], with)?;
    }
    Ok(())
}

/// Receives one frame.
pub(crate) fn receive<T: DeserializeOwned>(socket: &UnixStream) -> Result<Frame<T>, FrameError> {
    let mut descriptors = Vec::new();
    let mut frame: Vec<u8> = Vec::new();
    let mut len = HEADER_BYTES;
    let mut scratch = vec![0; READ_BYTES];
    while frame.len() < len {
        // Never beyond this frame, so that nothing has to be kept for the next one.
        let wanted = if frame.len() < HEADER_BYTES {
            HEADER_BYTES - frame.len()
        } else {
            READ_BYTES.min(len - frame.len())
        };
        let received = descriptor::receive(socket, &mut scratch[..wanted], &mut descriptors)?;
        if received == 0 {
            let error = if frame.is_empty() {
                FrameError::Closed
            } else {
                FrameError::Broken(io::ErrorKind::UnexpectedEof.into())
            };
            return Err(error);
        }
        frame.extend(&scratch[..received]);
        if frame.len() == HEADER_BYTES {
            let length = |at: usize| {
                u32::from_le_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]])
                    as usize
            };
            if length(0) > MESSAGE_BYTES_MAX || length(4) > BYTES_MAX {
                return Err(FrameError::Foreign);
            }
            len = HEADER_BYTES + length(0) + length(4);
        }
    }
    let message_end =
        HEADER_BYTES + u32::from_le_bytes([frame[0], frame[1], frame[2], frame[3]]) as usize;
    let message =
        postcard::from_bytes(&frame[HEADER_BYTES..message_end]).map_err(|_| FrameError::Foreign)?;
    frame.drain(..message_end);
    Ok(Frame {
        message,
        bytes: frame,
        descriptors,
    })
}

/// An error and its causes in one line.
pub(crate) fn in_one_line(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::thread;

    #[test]
    fn frames_arrive_whole_with_their_descriptors() {
        let (near, far) = UnixStream::pair().unwrap();
        let bytes = vec![7; 3 << 20];
        thread::scope(|scope| {
            scope.spawn(|| {
                send(
                    &near,
                    &Request::Load { is_rehearsal: true },
                    &bytes,
                    &[near.as_fd()],
                )
                .unwrap();
                send(&near, &Request::Status, &[], &[]).unwrap();
            });
            let frame: Frame<Request> = receive(&far).unwrap();
            assert!(matches!(
                frame.message,
                Request::Load { is_rehearsal: true }
            ));
            assert_eq!((frame.bytes.len(), frame.descriptors.len()), (3 << 20, 1));
            let frame: Frame<Request> = receive(&far).unwrap();
            assert!(matches!(frame.message, Request::Status));
        });
        drop(near);
        assert!(matches!(
            receive::<Request>(&far).unwrap_err(),
            FrameError::Closed
        ));
    }

    #[test]
    fn foreign_bytes_end_the_connection() {
        let check = |bytes: &[u8], expect: &str| {
            let (mut near, far) = UnixStream::pair().unwrap();
            near.write_all(bytes).unwrap();
            drop(near);
            assert_eq!(receive::<Request>(&far).unwrap_err().to_string(), expect);
        };
        check(b"", "the connection was closed");
        check(b"GET / HTTP/1.1\r\n\r\n", "the peer sent what is no frame");
        check(&[1, 0, 0, 0], "the connection broke");
        check(
            &[1, 0, 0, 0, 0, 0, 0, 0, 99],
            "the peer sent what is no frame",
        );
        check(
            &[1, 0, 0, 0, 0xff, 0xff, 0xff, 0x03, 2],
            "the connection broke",
        );
        check(
            &[1, 0, 0, 0, 0xff, 0xff, 0xff, 0x7f, 2],
            "the peer sent what is no frame",
        );
    }
}
