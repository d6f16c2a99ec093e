//! A client of guests that speak as redis does, with no more of RESP2 than tests need; and loads of such
//! clients that know what they have been answered.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Longest that an answer may take, whatever is moved meanwhile.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// Most requests of an open loop that wait for their answers.
const WAITING_MAX: usize = 100_000;

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

impl Asker {
    /// Asks.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn ask(&mut self, arguments: &[&[u8]]) -> io::Result<()> {
        let mut bytes = format!("*{}\r\n", arguments.len()).into_bytes();
        for argument in arguments {
            bytes.extend(format!("${}\r\n", argument.len()).bytes());
            bytes.extend(*argument);
            bytes.extend(b"\r\n");
        }
        self.0.write_all(&bytes)
    }
}

impl Answers {
    /// The next answer.
    ///
    /// # Errors
    /// The connection is broken, or this is none; also what the guest says to be an error.
    pub fn receive(&mut self) -> io::Result<Answer> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        let wrong = |line: &str| io::Error::other(format!("this is no answer: {line:?}"));
        let rest = line.strip_suffix("\r\n").ok_or_else(|| wrong(&line))?;
        let number = || rest[1..].parse().map_err(|_| wrong(rest));
        match rest.bytes().next() {
            Some(b'+') => Ok(Answer::Word(rest[1..].to_owned())),
            Some(b':') => Ok(Answer::Number(number()?)),
            Some(b'$') => match usize::try_from(number()?) {
                Err(_) => Ok(Answer::Value(None)),
                Ok(bytes) => {
                    let mut value = vec![0; bytes + 2];
                    self.0.read_exact(&mut value)?;
                    value.truncate(bytes);
                    Ok(Answer::Value(Some(value)))
                }
            },
            _ => Err(wrong(rest)),
        }
    }
}

impl Connection {
    /// Speaks on that stream.
    ///
    /// # Errors
    /// The stream is broken.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER_MAX))?;
        Ok(Self {
            answers: Answers(BufReader::new(stream.try_clone()?)),
            asker: Asker(stream),
        })
    }

    /// Asks and waits for the answer.
    ///
    /// # Errors
    /// As [`Answers::receive`].
    pub fn ask(&mut self, arguments: &[&[u8]]) -> io::Result<Answer> {
        self.asker.ask(arguments)?;
        self.answers.receive()
    }

    /// Its two halves, for two threads.
    pub fn split(self) -> (Asker, Answers) {
        (self.asker, self.answers)
    }
}

/// What a load has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Requests that were answered.
    pub answered: u64,
    /// All that its counter was said to be, in the order of the answers.
    pub counts: Vec<i64>,
    /// The longest time from when a request was due to its answer.
    pub longest: Duration,
}

/// A client that works until it is told to stop.
#[derive(Debug)]
pub struct Load {
    is_over: Arc<AtomicBool>,
    thread: JoinHandle<io::Result<Done>>,
}

impl Load {
    /// A closed loop: counts, writes a value of its own, and reads it again, each as soon as the last one is
    /// answered. A value that is another one than was written ends it.
    pub fn closed(connection: Connection, name: &str, counter: &str) -> Self {
        let (name, counter) = (name.to_owned(), counter.to_owned());
        Self::start(move |is_over| work(connection, &name, &counter, is_over))
    }

    /// An open loop: counts once in each period, however long the answers take.
    pub fn open(connection: Connection, counter: &str, period: Duration) -> Self {
        let counter = counter.to_owned();
        Self::start(move |is_over| count(connection, &counter, period, is_over))
    }

    fn start(run: impl FnOnce(&AtomicBool) -> io::Result<Done> + Send + 'static) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&is_over);
        Self {
            is_over,
            thread: thread::spawn(move || run(&told)),
        }
    }

    /// Ends it, when the last answer has come.
    ///
    /// # Panics
    /// If a connection was lost, or an answer was wrong.
    #[track_caller]
    pub fn end(self) -> Done {
        self.is_over.store(true, Ordering::SeqCst);
        let done = self.thread.join().expect("a load does not panic");
        done.unwrap_or_else(|error| panic!("a client has lost its guest: {error}"))
    }
}

fn work(
    mut connection: Connection,
    name: &str,
    counter: &str,
    is_over: &AtomicBool,
) -> io::Result<Done> {
    let mut done = Done::default();
    let mut turn = 0_usize;
    while !is_over.load(Ordering::SeqCst) {
        let key = format!("{name}-{}", turn % 50);
        // Of a few bytes to more than a packet.
        let value = format!("{turn}.").repeat(1 + turn % 7 * 80).into_bytes();
        let ok = Answer::Word("OK".to_owned());
        let begun = Instant::now();
        expect(connection.ask(&[b"SET", key.as_bytes(), &value])?, &ok)?;
        let written = Answer::Value(Some(value));
        expect(connection.ask(&[b"GET", key.as_bytes()])?, &written)?;
        let Answer::Number(count) = connection.ask(&[b"INCR", counter.as_bytes()])? else {
            return Err(io::Error::other("a count is a number"));
        };
        done.counts.push(count);
        done.answered += 3;
        done.longest = done.longest.max(begun.elapsed());
        turn += 1;
    }
    Ok(done)
}

fn expect(answer: Answer, expected: &Answer) -> io::Result<()> {
    if answer == *expected {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "answered {answer:?}, not {expected:?}"
    )))
}

fn count(
    connection: Connection,
    counter: &str,
    period: Duration,
    is_over: &AtomicBool,
) -> io::Result<Done> {
    let (mut asker, mut answers) = connection.split();
    let (tell, told) = mpsc::sync_channel::<Instant>(WAITING_MAX);
    let listener = thread::spawn(move || {
        let mut done = Done::default();
        for due in told {
            let Answer::Number(count) = answers.receive()? else {
                return Err(io::Error::other("a count is a number"));
            };
            done.counts.push(count);
            done.answered += 1;
            done.longest = done.longest.max(due.elapsed());
        }
        Ok(done)
    });
    let mut due = Instant::now();
    while !is_over.load(Ordering::SeqCst) {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        asker.ask(&[b"INCR", counter.as_bytes()])?;
        if tell.send(due).is_err() {
            break;
        }
        due += period;
    }
    drop(tell);
    listener.join().expect("a listener does not panic")
}
