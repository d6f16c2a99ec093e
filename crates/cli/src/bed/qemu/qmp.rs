//! A client of QEMU's control protocol: one JSON object a line over a Unix socket.
//!
//! Commands are answered one after the other; events may stand between and are kept in their order.
//! Each carries a time of day from QEMU, which is laid on the clock that all stamps of this machine
//! share as soon as it is read, so it does not matter when that is. [QMP] has the form.
//!
//! Invariants: nothing waits longer than it was told to; what comes from the socket, whatever it is,
//! becomes an error and no panic.

use crate::bed::observer;
use limosa_engine::Timestamp;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant, SystemTime};

/// The longest line that is taken: answers have some kilobytes.
const LINE_BYTES_MAX: usize = 1 << 20;
/// Events that are kept unread: a move has some dozens.
const EVENTS_MAX: usize = 10_000;
/// A command is answered within milliseconds; a machine that is busy with a move takes longer.
const ANSWER_MAX: Duration = Duration::from_secs(20);
/// A shorter time is none: a socket would wait for one or two ticks of the kernel's clock.
const WAIT_MIN: Duration = Duration::from_micros(100);

/// Why QEMU cannot be talked to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QmpError {
    /// The other end is gone.
    #[error("QEMU closed its control socket")]
    Closed,
    /// No answer in time.
    #[error("QEMU did not answer {command} in time")]
    Late {
        /// To which command.
        command: String,
    },
    /// Something that is no line of the protocol.
    #[error("QEMU sent what is no line of its protocol: {line}")]
    Garbage {
        /// The beginning of it.
        line: String,
    },
    /// A command was refused.
    #[error("QEMU refused {command}: {reason}")]
    Refused {
        /// Which one.
        command: String,
        /// In its words.
        reason: String,
    },
    /// The socket.
    #[error("QEMU's control socket failed")]
    Socket(#[from] io::Error),
}

/// Something that happened in QEMU.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Event {
    /// When, on the clock of this machine.
    pub at: Timestamp,
    /// What.
    pub name: String,
    /// The status that it tells of, if it tells of one.
    pub status: Option<String>,
    /// The pass over memory that begins, if it tells of one.
    pub pass: Option<u64>,
}

/// The connection.
#[derive(Debug)]
pub(crate) struct Qmp {
    stream: UnixStream,
    buffer: Vec<u8>,
    events: VecDeque<Event>,
    /// As QEMU says it: its version, with that of the package.
    pub version: String,
}

impl Qmp {
    /// Greets.
    pub(crate) fn start(stream: UnixStream) -> Result<Self, QmpError> {
        let mut this = Self {
            stream,
            buffer: Vec::new(),
            events: VecDeque::new(),
            version: String::new(),
        };
        let give_up = Instant::now() + ANSWER_MAX;
        let greeting = this.message(give_up)?.ok_or_else(|| late("a connection"))?;
        this.version = version(&greeting).ok_or_else(|| garbage(&greeting.to_string()))?;
        this.execute("qmp_capabilities", json!({}))?;
        Ok(this)
    }

    /// Has a command carried out; its answer.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string() + "\n";
        self.stream.set_nonblocking(false)?;
        self.stream.set_write_timeout(Some(ANSWER_MAX))?;
        self.stream.write_all(line.as_bytes())?;
        let give_up = Instant::now() + ANSWER_MAX;
        loop {
            let Some(mut message) = self.message(give_up)? else {
                return Err(late(command));
            };
            if let Some(error) = message.get("error") {
                let reason = error.get("desc").and_then(Value::as_str);
                return Err(QmpError::Refused {
                    command: command.to_owned(),
                    reason: reason.unwrap_or("it gave no reason").to_owned(),
                });
            }
            if let Some(answer) = message.get_mut("return") {
                return Ok(answer.take());
            }
            self.keep(&message)?;
        }
    }

    /// The next event; `None` if there is none within so long.
    pub(crate) fn event(&mut self, wait: Duration) -> Result<Option<Event>, QmpError> {
        let give_up = Instant::now() + wait;
        while self.events.is_empty() {
            match self.message(give_up)? {
                Some(message) => self.keep(&message)?,
                None => return Ok(None),
            }
        }
        Ok(self.events.pop_front())
    }

    fn keep(&mut self, message: &Value) -> Result<(), QmpError> {
        let event = event(message, (SystemTime::now(), observer::now()));
        let event = event.ok_or_else(|| garbage(&message.to_string()))?;
        if self.events.len() >= EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
        Ok(())
    }

    /// The next message; `None` if none is whole in time.
    fn message(&mut self, give_up: Instant) -> Result<Option<Value>, QmpError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let text = String::from_utf8_lossy(&line);
                if text.trim().is_empty() {
                    continue;
                }
                let message: Option<Value> = serde_json::from_str(&text).ok();
                let message = message.filter(Value::is_object);
                return message.map(Some).ok_or_else(|| garbage(&text));
            }
            if self.buffer.len() > LINE_BYTES_MAX {
                return Err(garbage(&String::from_utf8_lossy(&self.buffer)));
            }
            if !self.receive(give_up)? {
                return Ok(None);
            }
        }
    }

    /// Takes what has come; whether something has in time.
    fn receive(&mut self, give_up: Instant) -> Result<bool, QmpError> {
        let wait = give_up.saturating_duration_since(Instant::now());
        self.stream.set_nonblocking(wait < WAIT_MIN)?;
        self.stream.set_read_timeout(Some(wait.max(WAIT_MIN)))?;
        let mut bytes = [0; 16 << 10];
        match self.stream.read(&mut bytes) {
            Ok(0) => Err(QmpError::Closed),
            Ok(count) => {
                self.buffer.extend_from_slice(&bytes[..count]);
                Ok(true)
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Ok(false),
                io::ErrorKind::Interrupted => Ok(true),
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Err(QmpError::Closed),
                _ => Err(error.into()),
            },
        }
    }
}

fn late(command: &str) -> QmpError {
    QmpError::Late {
        command: command.to_owned(),
    }
}

fn garbage(line: &str) -> QmpError {
    QmpError::Garbage {
        line: line.chars().take(80).collect(),
    }
}

fn version(greeting: &Value) -> Option<String> {
    let version = greeting.get("QMP")?.get("version")?;
    let number = |name: &str| version.get("qemu")?.get(name)?.as_u64();
    let (major, minor, micro) = (number("major")?, number("minor")?, number("micro")?);
    let package = version.get("package").and_then(Value::as_str);
    let package = package.map(str::trim).filter(|text| !text.is_empty());
    Some(match package {
        Some(package) => format!("{major}.{minor}.{micro} ({package})"),
        None => format!("{major}.{minor}.{micro}"),
    })
}

/// The event in a message, if it is one. `now` is this moment as time of day and on our clock.
fn event(message: &Value, now: (SystemTime, Timestamp)) -> Option<Event> {
    let name = message.get("event")?.as_str()?.to_owned();
    let number = |name: &str| message.get("timestamp")?.get(name)?.as_u64();
    let told = Duration::from_secs(number("seconds")?)
        .checked_add(Duration::from_micros(number("microseconds")?))?;
    let day = now.0.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    let ago = i64::try_from(day.as_nanos()).ok()? - i64::try_from(told.as_nanos()).ok()?;
    let data = message.get("data");
    let status = data.and_then(|data| data.get("status")?.as_str());
    Some(Event {
        at: Timestamp::from_nanos(now.1.as_nanos().saturating_add_signed(-ago)),
        name,
        status: status.map(str::to_owned),
        pass: data.and_then(|data| data.get("pass")?.as_u64()),
    })
}

#[cfg(test)]
mod tests;
