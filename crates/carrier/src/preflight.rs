//! Before a migration: would the target take the guest, and what does the way there carry?
//!
//! One connection of its own. The target compares what the guest needs with what it has and makes nothing;
//! then bytes of no meaning go over, in ever larger portions, until they took long enough to tell a rate.

use crate::bucket::Bucket;
use crate::channel::{Channel, Reader, Writer};
use crate::connection::{self, Dialler, HANDSHAKE_MAX};
use crate::credentials::Credentials;
use crate::source::draw_id;
use crate::target::TargetHost;
use limosa_engine::policy::Mode;
use limosa_engine::wire::{
    ControlFrame, CopiedDisk, DIFFERENCES_MAX, PROBE_BYTES_MAX, Preamble, Role, Start, clip,
};
use limosa_pages::{ByteCount, BytesPerSecond, PageCount};
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a target may compare: it opens disks, which may lie far away.
const ANSWER_MAX: Duration = Duration::from_secs(20);
/// A portion that took so long tells the rate.
const PROBE_TIME: Duration = Duration::from_millis(100);
/// Bytes of the first and of the largest portion; each is twice the one before.
const PORTION_MIN: u32 = 64 << 10;
const PORTION_MAX: u32 = 64 << 20;
/// Most frames of all portions: four of less than the most that one has, and all of the others.
const PROBES_MAX: u32 = 4 + 2 * PORTION_MAX / PROBE_BYTES_MAX;
/// What probes consist of.
const FILLER: u8 = 0x5a;
/// Round trips of which the shortest counts.
const ROUND_TRIPS: u32 = 8;

/// What is asked.
#[derive(Clone, Debug)]
pub struct PreflightRequest {
    /// The target daemon's peer address, `HOST:PORT`.
    pub peer: String,
    /// Emulates a link of this rate.
    pub link: Option<BytesPerSecond>,
    /// With these, the connection is encrypted, as those of the migration would be.
    pub credentials: Option<Arc<Credentials>>,
    /// What machine it is, for the target: [`crate::Guest::description`].
    pub vm: Vec<u8>,
    /// Its memory.
    pub memory: PageCount,
    /// Disks that are to be copied along.
    pub disks: Vec<CopiedDisk>,
    /// The technique.
    pub mode: Mode,
}

/// What a target answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preflight {
    /// What is in the way of the guest there, each in one line; nothing if it would be taken.
    pub differences: Vec<String>,
    /// The shortest way there and back that was seen.
    pub round_trip: Duration,
    /// Bytes a second that one connection carried, encrypted if it is.
    pub bandwidth: BytesPerSecond,
}

/// Asks.
///
/// # Errors
/// Why there is no answer, in one line.
pub fn preflight(request: &PreflightRequest) -> Result<Preflight, String> {
    let in_words = |error: io::Error| connection::in_words(&error);
    let dialler = Dialler {
        peer: request.peer.clone(),
        credentials: request.credentials.clone(),
    };
    let preamble = Preamble {
        migration: draw_id().map_err(|error| error.to_string())?,
        role: Role::Preflight,
        generation: 0,
    };
    let channel = dialler.dial(preamble).map_err(|error| error.to_string())?;
    let Channel { reader, writer } = channel;
    reader.set_timeout(Some(ANSWER_MAX)).map_err(in_words)?;
    let mut way = Way {
        writer,
        reader,
        link: Bucket::new(request.link),
    };
    let start = ControlFrame::Start(Start {
        mode: request.mode,
        memory_pages: request.memory,
        streams: 1,
        verify: false,
        disks: request.disks.clone(),
        vm: request.vm.clone(),
        demanded: Vec::new(),
    });
    let differences = match way.ask(&start)? {
        ControlFrame::Differences(all) => all.iter().map(|one| clip(one)).collect(),
        frame => return Err(unexpected(&frame)),
    };
    let (round_trip, bandwidth) = way.measure()?;
    Ok(Preflight {
        differences,
        round_trip,
        bandwidth,
    })
}

/// The connection, from the source's side.
struct Way {
    writer: Writer,
    reader: Reader,
    link: Bucket,
}

impl Way {
    fn ask(&mut self, frame: &ControlFrame) -> Result<ControlFrame, String> {
        self.write(&frame.encode())?;
        self.answer()
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.link.take(bytes.len() as u64);
        let written = self.writer.write_all(bytes);
        written.map_err(|error| format!("the connection broke: {}", connection::in_words(&error)))
    }

    fn answer(&mut self) -> Result<ControlFrame, String> {
        connection::read_frame(&mut self.reader).map_err(|error| error.to_string())
    }

    /// The round trip, and the rate.
    fn measure(&mut self) -> Result<(Duration, BytesPerSecond), String> {
        let mut round_trip = Duration::MAX;
        for _ in 0..ROUND_TRIPS {
            round_trip = round_trip.min(self.send_probes(0)?);
        }
        let mut portion = PORTION_MIN;
        loop {
            let took = self.send_probes(portion)?;
            if took >= PROBE_TIME || portion == PORTION_MAX {
                let time = took.saturating_sub(round_trip).max(Duration::from_nanos(1));
                let rate = BytesPerSecond::measured(ByteCount::new(portion.into()), time);
                return Ok((round_trip, rate.expect("some time passed")));
            }
            portion *= 2;
        }
    }

    /// How long it takes until the last of so many bytes has arrived and that is known here.
    fn send_probes(&mut self, bytes: u32) -> Result<Duration, String> {
        let count = bytes.div_ceil(PROBE_BYTES_MAX).max(1);
        let bytes = bytes / count;
        let mut probe = ControlFrame::Probe { bytes }.encode();
        probe.resize(probe.len() + bytes as usize, FILLER);
        let begun = Instant::now();
        // Answers are short: all of them fit into the socket's buffer.
        for _ in 0..count {
            self.write(&probe)?;
        }
        for _ in 0..count {
            match self.answer()? {
                ControlFrame::Probed => {}
                frame => return Err(unexpected(&frame)),
            }
        }
        Ok(begun.elapsed())
    }
}

fn unexpected(frame: &ControlFrame) -> String {
    match frame {
        ControlFrame::Refuse { reason } => format!("the target refused: {}", clip(reason)),
        frame => format!("the target answered with {}", frame.name()),
    }
}

/// The target's side: compares, and says when probes have come. Nothing is made, and nothing kept.
pub(crate) fn answer(host: &dyn TargetHost, channel: Channel) -> io::Result<()> {
    let Channel { mut reader, writer } = channel;
    let control = crate::target::control_writer(writer);
    let Ok(ControlFrame::Start(start)) = connection::read_frame(&mut reader) else {
        return Ok(());
    };
    let differences = host.differences(&start);
    let differences = differences.iter().take(DIFFERENCES_MAX);
    let differences = differences.map(|one| clip(one)).collect();
    control.send(&ControlFrame::Differences(differences))?;
    reader.set_timeout(Some(HANDSHAKE_MAX))?;
    for _ in 0..ROUND_TRIPS + PROBES_MAX {
        let Ok(ControlFrame::Probe { bytes }) = connection::read_frame(&mut reader) else {
            return Ok(());
        };
        let copied = io::copy(&mut (&mut reader).take(bytes.into()), &mut io::sink())?;
        if copied < u64::from(bytes) {
            return Ok(());
        }
        control.send(&ControlFrame::Probed)?;
    }
    Ok(())
}
