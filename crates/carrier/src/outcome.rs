//! Questions to the target about how an attempt ended, on a connection of their own.

use crate::bucket::Bucket;
use crate::connection::{self, ControlWriter, Dialler};
use crate::credentials::Credentials;
use limosa_engine::handover::{MigrationId, Resolution};
use limosa_engine::wire::{ControlFrame, Preamble, Role, clip};
use std::sync::Arc;
use std::time::Duration;

/// How long an answer may take: the target may have to ask its VM process first.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// Asks. Gives the answer, and where to say that the source is done.
pub(crate) fn ask(
    dialler: &Dialler,
    preamble: Preamble,
    link: Arc<Bucket>,
) -> Result<(Resolution, ControlWriter), String> {
    let channel = dialler.dial(preamble).map_err(|error| error.to_string())?;
    let (mut reader, writer) = (channel.reader, channel.writer);
    reader
        .set_timeout(Some(ANSWER_MAX))
        .map_err(|error| error.to_string())?;
    let writer = ControlWriter::new(writer, link);
    writer
        .send(&ControlFrame::Resolve)
        .map_err(|error| error.to_string())?;
    match connection::read_frame(&mut reader).map_err(|error| error.to_string())? {
        ControlFrame::Resolved(resolution) => Ok((resolution, writer)),
        ControlFrame::Refuse { reason } => Err(format!("the target refused: {reason}")),
        frame => Err(format!("the target answered with {}", frame.name())),
    }
}

/// Tells the target of attempt `id` that the source's memory is lost, for the `reason` in one line,
/// and hears how the attempt stands there;
/// with `credentials` on an encrypted connection. If its guest misses pages, the target gives it up: the
/// next answer says so. Otherwise the target learns that the source holds nothing any more.
///
/// # Errors
/// Why there is no answer, in one line. Ask again.
pub fn tell_memory_lost(
    peer: &str,
    credentials: Option<Arc<Credentials>>,
    id: MigrationId,
    reason: &str,
) -> Result<Resolution, String> {
    let dialler = Dialler {
        peer: peer.to_owned(),
        credentials,
    };
    let preamble = Preamble {
        migration: id,
        role: Role::Resolve,
        generation: 0,
    };
    let (resolution, writer) = ask(&dialler, preamble, Arc::new(Bucket::new(None)))?;
    let word = match resolution {
        Resolution::Needs => ControlFrame::Lost {
            reason: clip(reason),
        },
        Resolution::Runs | Resolution::Gone => ControlFrame::Done,
        Resolution::Barred => return Ok(resolution),
    };
    writer.send(&word).map_err(|error| error.to_string())?;
    Ok(resolution)
}
