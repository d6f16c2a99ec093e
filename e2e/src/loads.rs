//! Loads of clients of a guest that keeps values, which know what they have been answered.

use limosa_clients::redis::{Answer, ClientError, Connection};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Most requests of an open loop that wait for their answers.
const WAITING_MAX: usize = 100_000;

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
    thread: JoinHandle<Result<Done, ClientError>>,
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

    fn start(run: impl FnOnce(&AtomicBool) -> Result<Done, ClientError> + Send + 'static) -> Self {
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
) -> Result<Done, ClientError> {
    let mut done = Done::default();
    let mut turn = 0_usize;
    while !is_over.load(Ordering::SeqCst) {
        let key = format!("{name}-{}", turn % 50);
        // Of a few bytes to more than a packet.
        let value = format!("{turn}.").repeat(1 + turn % 7 * 80).into_bytes();
        let ok = Answer::Word("OK".to_owned());
        let begun = Instant::now();
        let set = connection.ask(&[b"SET", key.as_bytes(), &value])?;
        set.expect(&ok)?;
        let written = Answer::Value(Some(value));
        let got = connection.ask(&[b"GET", key.as_bytes()])?;
        got.expect(&written)?;
        let answer = connection.ask(&[b"INCR", counter.as_bytes()])?;
        done.counts.push(counted(answer)?);
        done.answered += 3;
        done.longest = done.longest.max(begun.elapsed());
        turn += 1;
    }
    Ok(done)
}

/// What an answer counts.
fn counted(answer: Answer) -> Result<i64, ClientError> {
    match answer {
        Answer::Number(count) => Ok(count),
        other => Err(ClientError::Wrong(format!("{other:?} is no count"))),
    }
}

fn count(
    connection: Connection,
    counter: &str,
    period: Duration,
    is_over: &AtomicBool,
) -> Result<Done, ClientError> {
    let (mut asker, mut answers) = connection.split();
    let (tell, told) = mpsc::sync_channel::<Instant>(WAITING_MAX);
    let listener = thread::spawn(move || {
        let mut done = Done::default();
        for due in told {
            done.counts.push(counted(answers.receive()?)?);
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
