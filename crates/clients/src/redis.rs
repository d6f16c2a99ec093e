//! A client of guests that speak as redis does, with no more of RESP2 than is asked here.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

/// Longest answer that is believed: of the values that are asked for here none is longer.
const VALUE_BYTES_MAX: usize = 16 << 20;

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A word.
    Word(String),
    /// A number.
    Number(i64),
    /// A value, or that there is none.
    Value(Option<Vec<u8>>),
}

/// Why a client cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The connection is broken, or is silent for too long.
    #[error("a connection was lost: {0}")]
    Lost(io::Error),
    /// The guest answers, but not what is right.
    #[error("a wrong answer: {0}")]
    Wrong(String),
}

impl From<io::Error> for ClientError {
    /// A time-out has a name of its own, which says nothing to who reads of it.
    fn from(error: io::Error) -> Self {
        let is_silence = matches!(
            error.kind(),
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
        );
        if is_silence {
            return Self::Lost(io::Error::new(error.kind(), "no answer came in time"));
        }
        Self::Lost(error)
    }
}

/// The half of a connection that asks.
#[derive(Debug)]
pub struct Asker(TcpStream);

/// The half that is answered.
#[derive(Debug)]
pub struct Answers(BufReader<TcpStream>);

/// Both halves.
#[derive(Debug)]
pub struct Connection {
    asker: Asker,
    answers: Answers,
}

impl Answer {
    /// Compares it with what it has to be.
    ///
    /// # Errors
    /// It is another one.
    pub fn expect(&self, expected: &Self) -> Result<(), ClientError> {
        if self == expected {
            return Ok(());
        }
        Err(ClientError::Wrong(format!(
            "{}, not {}",
            self.shown(),
            expected.shown()
        )))
    }

    /// Its kind, and as much of it as fits into a line.
    fn shown(&self) -> String {
        const SHOWN: usize = 24;
        match self {
            Self::Value(Some(bytes)) => {
                let (begin, rest) = bytes.split_at(bytes.len().min(SHOWN));
                let more = if rest.is_empty() { "" } else { "…" };
                format!("{} bytes '{}{more}'", bytes.len(), begin.escape_ascii())
            }
            Self::Value(None) => "no value".to_owned(),
            Self::Word(word) => format!("the word '{word}'"),
            Self::Number(number) => format!("the number {number}"),
        }
    }
}

impl Asker {
    /// Asks.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn ask(&mut self, arguments: &[&[u8]]) -> io::Result<()> {
        let mut bytes = Vec::new();
        write_request(arguments, &mut bytes);
        self.send(&bytes)
    }

    /// Sends requests that are written already.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn send(&mut self, requests: &[u8]) -> io::Result<()> {
        self.0.write_all(requests)
    }
}

/// Writes a request behind what is there.
pub fn write_request(arguments: &[&[u8]], bytes: &mut Vec<u8>) {
    bytes.extend(format!("*{}\r\n", arguments.len()).bytes());
    for argument in arguments {
        bytes.extend(format!("${}\r\n", argument.len()).bytes());
        bytes.extend(*argument);
        bytes.extend(b"\r\n");
    }
}

impl Answers {
    /// The next answer.
    ///
    /// # Errors
    /// The connection is broken, or this is none; also what the guest says to be an error.
    pub fn receive(&mut self) -> Result<Answer, ClientError> {
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        let wrong = || ClientError::Wrong(format!("{line:?} is none"));
        let rest = line.strip_suffix("\r\n").ok_or_else(wrong)?;
        let number = || rest[1..].parse().map_err(|_| wrong());
        match rest.bytes().next() {
            Some(b'+') => Ok(Answer::Word(rest[1..].to_owned())),
            Some(b':') => Ok(Answer::Number(number()?)),
            Some(b'$') => match usize::try_from(number()?) {
                Err(_) => Ok(Answer::Value(None)),
                Ok(bytes) if bytes > VALUE_BYTES_MAX => Err(wrong()),
                Ok(bytes) => {
                    let mut value = vec![0; bytes + 2];
                    self.0.read_exact(&mut value)?;
                    value.truncate(bytes);
                    Ok(Answer::Value(Some(value)))
                }
            },
            _ => Err(wrong()),
        }
    }
}

impl Connection {
    /// Speaks on that stream; an answer that takes longer than `answer_max` counts as lost.
    ///
    /// # Errors
    /// The stream is broken.
    pub fn new(stream: TcpStream, answer_max: Duration) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(answer_max))?;
        stream.set_write_timeout(Some(answer_max))?;
        Ok(Self {
            answers: Answers(BufReader::new(stream.try_clone()?)),
            asker: Asker(stream),
        })
    }

    /// Asks and waits for the answer.
    ///
    /// # Errors
    /// As [`Answers::receive`].
    pub fn ask(&mut self, arguments: &[&[u8]]) -> Result<Answer, ClientError> {
        self.asker.ask(arguments)?;
        self.answers.receive()
    }

    /// Its two halves, for two threads.
    pub fn split(self) -> (Asker, Answers) {
        (self.asker, self.answers)
    }

    /// Both halves together again.
    pub fn joined(asker: Asker, answers: Answers) -> Self {
        Self { asker, answers }
    }

    /// Both halves, to use in turn.
    pub fn halves(&mut self) -> (&mut Asker, &mut Answers) {
        (&mut self.asker, &mut self.answers)
    }

    /// Something by which another thread can break it.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub fn breaker(&self) -> io::Result<Breaker> {
        Ok(Breaker(self.asker.0.try_clone()?))
    }
}

/// Breaks a connection that somebody may be waiting on.
#[derive(Debug)]
pub struct Breaker(TcpStream);

impl Breaker {
    /// From now on nothing comes and nothing can be asked.
    pub fn cut(&self) {
        // One that is broken already needs no more.
        drop(self.0.shutdown(Shutdown::Both));
    }
}
