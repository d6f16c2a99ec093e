//! A target that a test plays: it can take a migration as far as the test wants.
//!
//! It makes no VM. It answers as if it had one, and keeps what the source sent, so that a test can
//! play the source of the same guest later.

use super::{ANSWER_MAX, now, prepare, read, send};
use crate::wait;
use limosa_engine::Timestamp;
use limosa_engine::handover::MigrationId;
use limosa_engine::wire::{
    CODED_LENGTH_BYTES, ControlFrame, PREAMBLE_BYTES, PUSH_HEADER_BYTES, Preamble, PushHeader,
    Role, Start, bits_bytes, check_coded_length,
};
use limosa_pages::PageCount;
use std::io::{self, Read};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Time to load that a played target claims.
const LOAD: Duration = Duration::from_micros(200);

/// The word of a host with another kernel that can serve no page faults.
pub const ACCEPT: ControlFrame = ControlFrame::Accept {
    boot_id: 1,
    can_fault: false,
};

/// Listens like a daemon.
#[derive(Debug)]
pub struct FakeTarget {
    listener: TcpListener,
}

/// A migration that a played target takes.
#[derive(Debug)]
pub struct Taken {
    /// The attempt.
    pub id: MigrationId,
    /// What was announced.
    pub start: Start,
    /// The control stream.
    pub control: TcpStream,
    /// The stream on which pages can be asked for.
    pub pull: TcpStream,
    /// A round, and by how many streams it goes.
    barriers: Receiver<(u32, u8)>,
    streams: Vec<JoinHandle<Vec<u8>>>,
}

/// A migration as it was sent, for a test that plays its source.
#[derive(Clone, Debug)]
pub struct Recording {
    /// What was announced.
    pub start: Start,
    /// The rehearsed state.
    pub rehearsal: Vec<u8>,
    /// The bytes of each push stream, barriers included.
    pub streams: Vec<Vec<u8>>,
    /// The last round.
    pub round: u32,
    /// When the guest stopped.
    pub stopped_at: Timestamp,
    /// The guest's state.
    pub state: Vec<u8>,
}

impl FakeTarget {
    /// Begins to listen.
    ///
    /// # Panics
    /// If the kernel gives no port.
    pub fn listen() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.set_nonblocking(true).expect("a listener");
        Self { listener }
    }

    /// Where it listens.
    ///
    /// # Panics
    /// Never: a bound listener has an address.
    pub fn address(&self) -> String {
        self.listener
            .local_addr()
            .expect("a bound listener")
            .to_string()
    }

    /// The next connection and its preamble.
    ///
    /// # Panics
    /// If none comes, or its preamble is not right.
    #[track_caller]
    pub fn accept(&self) -> (Preamble, TcpStream) {
        let mut stream = wait::until("a source connects", || self.listener.accept().ok()).0;
        stream.set_nonblocking(false).expect("a socket");
        prepare(&stream);
        let mut bytes = [0; PREAMBLE_BYTES];
        stream
            .read_exact(&mut bytes)
            .expect("a source sends its preamble");
        (Preamble::decode(&bytes).expect("a sound preamble"), stream)
    }

    /// The control connection of the next migration; its push streams are taken and forgotten.
    ///
    /// # Panics
    /// If none comes.
    #[track_caller]
    pub fn accept_control(&self) -> TcpStream {
        let (preamble, stream) = self.accept();
        assert_eq!(preamble.role, Role::Control);
        stream
    }

    /// Takes a migration up to its start frame, with all its streams.
    ///
    /// # Panics
    /// If none comes.
    #[track_caller]
    pub fn take(&self) -> Taken {
        let (preamble, control) = self.accept();
        assert_eq!(preamble.role, Role::Control);
        let frame = read(&control);
        let Some(ControlFrame::Start(start)) = frame else {
            panic!("expected start: {frame:?}")
        };
        let (tell, barriers) = channel();
        let mut streams = Vec::new();
        let (dialled, pull) = self.accept();
        let role = Role::Pull;
        assert_eq!(dialled, Preamble { role, ..preamble });
        for expect in 0..start.streams {
            let (dialled, stream) = self.accept();
            let role = Role::Push(expect);
            assert_eq!(dialled, Preamble { role, ..preamble });
            let (tell, memory) = (tell.clone(), start.memory_pages);
            streams.push(thread::spawn(move || drain(stream, memory, &tell)));
        }
        Taken {
            id: preamble.migration,
            start,
            control,
            pull,
            barriers,
            streams,
        }
    }
}

impl Taken {
    /// Sends a control frame.
    pub fn send(&self, frame: &ControlFrame) {
        send(&self.control, frame);
    }

    /// The next control frame; probes of the clock are answered on the way.
    ///
    /// # Panics
    /// If nothing comes.
    #[track_caller]
    pub fn read(&self) -> Option<ControlFrame> {
        self.read_with_clock(now)
    }

    /// The same, with a clock of the test's.
    ///
    /// # Panics
    /// If nothing comes.
    #[track_caller]
    pub fn read_with_clock(&self, clock: impl Fn() -> Timestamp) -> Option<ControlFrame> {
        loop {
            match read(&self.control) {
                Some(ControlFrame::ClockProbe { number }) => {
                    self.send(&ControlFrame::ClockEcho {
                        number,
                        now: clock(),
                    });
                }
                other => return other,
            }
        }
    }

    /// Accepts the guest as a host with another kernel, and gives the rehearsed state.
    ///
    /// # Panics
    /// If no rehearsal comes.
    #[track_caller]
    pub fn accept(&self) -> Vec<u8> {
        self.send(&ACCEPT);
        match self.read() {
            Some(ControlFrame::Rehearsal { state }) => state,
            other => panic!("expected a rehearsal: {other:?}"),
        }
    }

    /// Says that the rehearsal was loaded.
    pub fn rehearsed(&self) {
        self.send(&ControlFrame::Rehearsed { load: LOAD });
    }

    /// Waits until every stream by which `round` goes has delivered it.
    ///
    /// # Panics
    /// If one does not.
    #[track_caller]
    pub fn wait_for_round(&self, round: u32) {
        let mut awaited = 1;
        let mut come = 0;
        while come < awaited {
            let barrier = self.barriers.recv_timeout(ANSWER_MAX);
            let (number, streams) = barrier.expect("every stream ends the round");
            assert_eq!(number, round, "barriers follow each other");
            awaited = streams;
            come += 1;
        }
    }

    /// Receives the rest of the migration up to the state: last round, when the guest stopped,
    /// state. The migration must have been limited to one live round, after which nothing but the
    /// state can follow.
    ///
    /// # Panics
    /// If it does not come.
    #[track_caller]
    pub fn receive(&self) -> (u32, Timestamp, Vec<u8>) {
        if self.start.mode.copies_live() {
            self.wait_for_round(0);
            self.send(&ControlFrame::RoundReceived { round: 0 });
        }
        match self.read() {
            Some(ControlFrame::State {
                round,
                stopped_at,
                state,
                ..
            }) => {
                self.wait_for_round(round);
                (round, stopped_at, state)
            }
            other => panic!("expected the state: {other:?}"),
        }
    }

    /// Says that everything is in place and waits for the commit.
    ///
    /// # Panics
    /// If it does not come.
    #[track_caller]
    pub fn prepare(&self) {
        self.send(&ControlFrame::Prepared {
            received_at: now(),
            loaded_at: now(),
        });
        assert_eq!(self.read(), Some(ControlFrame::Commit));
    }

    /// Takes the migration up to the state, then ends it, and gives everything that was sent.
    ///
    /// # Panics
    /// If the source does not send it.
    #[track_caller]
    pub fn record(self) -> Recording {
        let rehearsal = self.accept();
        self.rehearsed();
        let (round, stopped_at, state) = self.receive();
        let start = self.start.clone();
        self.send(&ControlFrame::Abort {
            reason: "it is only recorded".to_owned(),
        });
        let streams = self
            .streams
            .into_iter()
            .map(|stream| stream.join().expect("it only reads"));
        Recording {
            start,
            rehearsal,
            streams: streams.collect(),
            round,
            stopped_at,
            state,
        }
    }
}

/// Reads a push stream to its end, tells its barriers, and keeps its bytes.
fn drain(mut stream: TcpStream, memory: PageCount, tell: &Sender<(u32, u8)>) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.set_read_timeout(None).expect("a socket");
    while let Ok(barrier) = take_header(&mut stream, memory, &mut bytes) {
        if let Some(barrier) = barrier
            && tell.send(barrier).is_err()
        {
            break;
        }
    }
    bytes
}

fn take_header(
    stream: &mut TcpStream,
    memory: PageCount,
    bytes: &mut Vec<u8>,
) -> io::Result<Option<(u32, u8)>> {
    let mut header = [0; PUSH_HEADER_BYTES];
    stream.read_exact(&mut header)?;
    bytes.extend_from_slice(&header);
    match PushHeader::decode(&header, memory).expect("a sound header") {
        PushHeader::Barrier { round, streams } => Ok(Some((round, streams))),
        PushHeader::Zeros(_) | PushHeader::Stale(_) => Ok(None),
        PushHeader::StaleBits(range) => {
            let from = bytes.len();
            bytes.resize(from + bits_bytes(range), 0);
            stream.read_exact(&mut bytes[from..])?;
            Ok(None)
        }
        PushHeader::Pages(range) => {
            let from = bytes.len();
            let length = usize::try_from(range.bytes().get()).expect("limited by the header");
            bytes.resize(from + length, 0);
            stream.read_exact(&mut bytes[from..])?;
            Ok(None)
        }
        PushHeader::Coded { range, .. } => {
            let mut length = [0; CODED_LENGTH_BYTES];
            stream.read_exact(&mut length)?;
            bytes.extend_from_slice(&length);
            let from = bytes.len();
            let length = check_coded_length(length, range).expect("a sound length");
            bytes.resize(from + length, 0);
            stream.read_exact(&mut bytes[from..])?;
            Ok(None)
        }
    }
}
