//! Peers that a test plays itself, byte by byte: a source that breaks rules, a target that does.
//!
//! They speak the protocol with the engine's own encoding, so that a rule is broken where the test
//! breaks it and nowhere else.

pub mod source;
pub mod target;

use limosa_engine::Timestamp;
use limosa_engine::handover::MigrationId;
use limosa_engine::wire::{ControlFrame, Preamble, Role};
use rustix::time::{ClockId, clock_gettime};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// How long any single answer may take: a daemon gives a silent peer ten seconds.
pub const ANSWER_MAX: Duration = Duration::from_secs(20);

/// What a played source calls its only connections.
const GENERATION: u32 = 1;

/// An id that no migration has.
pub fn fresh_id() -> MigrationId {
    let state = RandomState::new();
    let (high, low) = (state.hash_one(1u8), state.hash_one(2u8));
    MigrationId(u128::from(high) << 64 | u128::from(low))
}

/// The machine's monotonic clock, which all limosa processes on it use.
pub fn now() -> Timestamp {
    let time = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(time.tv_sec).expect("it counts from the boot");
    let nanos = u64::try_from(time.tv_nsec).expect("below a second");
    Timestamp::from_nanos(seconds * 1_000_000_000 + nanos)
}

/// Connects and says nothing.
///
/// # Panics
/// If nobody listens.
#[track_caller]
pub fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).expect("a daemon that listens");
    prepare(&stream);
    stream
}

/// Connects and sends a preamble.
///
/// # Panics
/// If nobody listens.
#[track_caller]
pub fn dial(address: &str, migration: MigrationId, role: Role) -> TcpStream {
    let stream = connect(address);
    let preamble = Preamble {
        migration,
        role,
        generation: GENERATION,
    };
    write(&stream, &preamble.encode());
    stream
}

/// Time-outs for everything, so that no test hangs.
fn prepare(stream: &TcpStream) {
    stream.set_nodelay(true).expect("a TCP socket");
    stream
        .set_read_timeout(Some(ANSWER_MAX))
        .expect("above zero");
    stream
        .set_write_timeout(Some(ANSWER_MAX))
        .expect("above zero");
}

/// Writes; whether the other side still listens is its business.
pub fn write(mut stream: &TcpStream, bytes: &[u8]) {
    if let Err(error) = stream.write_all(bytes) {
        println!("the other side does not listen: {error}");
    }
}

/// Sends a frame; see [`write`].
pub fn send(stream: &TcpStream, frame: &ControlFrame) {
    write(stream, &frame.encode());
}

/// The next frame that is neither a keepalive nor the word that a round has come, which a target gives only
/// if the round's barriers are there before the state; `None` if the connection ended instead.
///
/// # Panics
/// If nothing comes in time, or something that is no frame.
#[track_caller]
pub fn read(mut stream: &TcpStream) -> Option<ControlFrame> {
    loop {
        let mut prefix = [0; 4];
        if !fill(stream, &mut prefix) {
            return None;
        }
        let length = ControlFrame::check_length(prefix).expect("a daemon sends sound lengths");
        let mut body = vec![0; length];
        stream
            .read_exact(&mut body)
            .expect("a daemon sends whole frames");
        let frame = ControlFrame::decode(&body).expect("a daemon sends sound frames");
        if !matches!(
            frame,
            ControlFrame::Keepalive | ControlFrame::RoundReceived { .. }
        ) {
            return Some(frame);
        }
    }
}

/// Reads until the other side ends the connection; the reason that it gave, or an empty text.
///
/// # Panics
/// If it does not end it, or sends something that is no goodbye.
#[track_caller]
pub fn goodbye(stream: &TcpStream) -> String {
    let mut reason = String::new();
    while let Some(frame) = read(stream) {
        match frame {
            ControlFrame::Abort { reason: why } | ControlFrame::Refuse { reason: why } => {
                reason = why
            }
            other => panic!("{} is no goodbye", other.name()),
        }
    }
    reason
}

/// Fills the buffer; false if the connection ended first.
#[track_caller]
fn fill(mut stream: &TcpStream, bytes: &mut [u8]) -> bool {
    match stream.read_exact(bytes) {
        Ok(()) => true,
        Err(error) if is_time_out(&error) => panic!("no answer within {ANSWER_MAX:?}"),
        Err(_) => false,
    }
}

fn is_time_out(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}
