//! Clients that work for a while, and what they have seen.
//!
//! A *closed* loop asks as soon as it is answered: it tells what the guest gets done, but not how long others would
//! have waited, since it asks nothing while it waits. An *open* loop asks whenever a request is due, and a request
//! waits from when it was due until it is answered, whether it could be sent by then or not: so each moment of a
//! stop counts, and not only the one request that met it. [Schroeder06]

use crate::keeper::Keeper;
use crate::redis::{Answer, Answers, Asker, Breaker, ClientError, Connection};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Most requests of an open loop that wait for their answers: minutes of them.
const WAITING_MAX: usize = 200_000;
/// Most that are noted of one load: more than an hour of an open loop, or of a closed one's milliseconds.
const NOTES_MAX: usize = 4_000_000;

/// A connection, and what its client knows.
#[derive(Debug)]
pub struct Client {
    connection: Connection,
    keeper: Keeper,
}

/// A request of an open loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// When it was due, since the load began to count.
    pub due: Duration,
    /// How long after that it was answered.
    pub wait: Duration,
}

/// What a load has seen, counted from a moment that its maker chose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Answers in each millisecond, of closed loops.
    pub answers: Vec<u32>,
    /// Requests in the order in which they were due, of open loops.
    pub requests: Vec<Request>,
}

/// How a load ended.
#[derive(Debug)]
pub struct Ended {
    /// Its client, to go on with, or why it cannot.
    pub client: Result<Client, ClientError>,
    /// What it has seen until then.
    pub seen: Seen,
}

/// A client that works until it is told to stop.
#[derive(Debug)]
pub struct Load {
    is_over: Arc<AtomicBool>,
    breaker: Breaker,
    /// Taken when it is joined.
    thread: Option<JoinHandle<Ended>>,
}

impl Client {
    /// With this connection.
    pub const fn new(connection: Connection, keeper: Keeper) -> Self {
        Self { connection, keeper }
    }
}

impl Load {
    /// Asks as fast as it is answered. Times are counted from `epoch`.
    ///
    /// # Errors
    /// There is no thread or descriptor left.
    pub fn closed(client: Client, epoch: Instant) -> io::Result<Self> {
        Self::start("closed", client, move |client, is_over| {
            closed(client, epoch, is_over)
        })
    }

    /// Asks once in each period, however long the answers take.
    ///
    /// # Errors
    /// As [`Load::closed`].
    pub fn open(client: Client, period: Duration, epoch: Instant) -> io::Result<Self> {
        Self::start("open", client, move |client, is_over| {
            open(client, period, epoch, is_over)
        })
    }

    fn start(
        name: &str,
        client: Client,
        run: impl FnOnce(Client, &AtomicBool) -> Ended + Send + 'static,
    ) -> io::Result<Self> {
        let breaker = client.connection.breaker()?;
        let is_over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&is_over);
        let thread = thread::Builder::new().name(format!("client-{name}"));
        Ok(Self {
            is_over,
            breaker,
            thread: Some(thread.spawn(move || run(client, &told))?),
        })
    }

    /// It asks nothing more.
    pub fn tell(&self) {
        self.is_over.store(true, Ordering::SeqCst);
    }

    /// Ends it, when the last answer has come.
    ///
    /// # Panics
    /// If a thread of it did.
    pub fn end(mut self) -> Ended {
        self.tell();
        let thread = self.thread.take().expect("it is joined once");
        thread.join().expect("a load does not panic")
    }
}

impl Drop for Load {
    /// Ends it without waiting for answers.
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        self.tell();
        self.breaker.cut();
        // What it says is that its connection was lost.
        drop(thread.join());
    }
}

fn closed(mut client: Client, epoch: Instant, is_over: &AtomicBool) -> Ended {
    let mut answers = Vec::new();
    let done = work(&mut client, epoch, &mut answers, is_over);
    Ended {
        client: done.map(|()| client),
        seen: Seen {
            answers,
            requests: Vec::new(),
        },
    }
}

fn work(
    client: &mut Client,
    epoch: Instant,
    answers: &mut Vec<u32>,
    is_over: &AtomicBool,
) -> Result<(), ClientError> {
    let (asker, answered) = client.connection.halves();
    let mut request = Vec::new();
    while !is_over.load(Ordering::SeqCst) {
        request.clear();
        let expected = client.keeper.next(&mut request);
        asker.send(&request)?;
        answered.receive()?.expect(&expected)?;
        let millisecond = epoch.elapsed().as_millis() as usize;
        if millisecond >= answers.len() && millisecond < NOTES_MAX {
            answers.resize(millisecond + 1, 0);
        }
        if let Some(count) = answers.get_mut(millisecond) {
            *count += 1;
        }
    }
    Ok(())
}

/// What an open loop has asked.
struct Asked {
    due: Instant,
    expected: Answer,
}

fn open(client: Client, period: Duration, epoch: Instant, is_over: &AtomicBool) -> Ended {
    let Client {
        connection,
        mut keeper,
    } = client;
    let (mut asker, answers) = connection.split();
    let (tell, told) = mpsc::sync_channel(WAITING_MAX);
    let (asked, (answers, requests, answered)) = thread::scope(|scope| {
        let listener = scope.spawn(move || listen(answers, told, epoch));
        let asked = ask(&mut asker, &mut keeper, period, &tell, is_over);
        // The listener ends with the last answer.
        drop(tell);
        (asked, listener.join().expect("a listener does not panic"))
    });
    // What the listener found is why nobody takes requests any more.
    let done = answered.and(asked.map_err(ClientError::from));
    Ended {
        client: done.map(|()| Client::new(Connection::joined(asker, answers), keeper)),
        seen: Seen {
            answers: Vec::new(),
            requests,
        },
    }
}

fn ask(
    asker: &mut Asker,
    keeper: &mut Keeper,
    period: Duration,
    tell: &mpsc::SyncSender<Asked>,
    is_over: &AtomicBool,
) -> io::Result<()> {
    let mut request = Vec::new();
    let mut due = Instant::now();
    while !is_over.load(Ordering::SeqCst) {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        request.clear();
        let expected = keeper.next(&mut request);
        asker.send(&request)?;
        if tell.send(Asked { due, expected }).is_err() {
            break;
        }
        due += period;
    }
    Ok(())
}

fn listen(
    mut answers: Answers,
    told: mpsc::Receiver<Asked>,
    epoch: Instant,
) -> (Answers, Vec<Request>, Result<(), ClientError>) {
    let mut requests = Vec::new();
    for Asked { due, expected } in told {
        let answer = answers.receive();
        let wait = due.elapsed();
        if let Err(error) = answer.and_then(|answer| answer.expect(&expected)) {
            return (answers, requests, Err(error));
        }
        if requests.len() < NOTES_MAX {
            let due = due.saturating_duration_since(epoch);
            requests.push(Request { due, wait });
        }
    }
    (answers, requests, Ok(()))
}

impl Seen {
    /// What both have seen, of which at most one has requests.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        let length = self.answers.len().max(other.answers.len());
        self.answers.resize(length, 0);
        for (sum, count) in self.answers.iter_mut().zip(&other.answers) {
            *sum += count;
        }
        self.requests.extend(other.requests);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keeper::Keys;
    use crate::keeper::tests::{answer, words_from};
    use std::collections::BTreeMap;
    use std::io::{BufReader, Write};
    use std::mem;
    use std::net::{TcpListener, TcpStream};

    const KEYS: Keys = Keys {
        count: 3,
        value_bytes: 40,
    };
    /// The answer that goes wrong.
    const BAD: usize = 30;
    /// Requests after which a server that does nothing wrong has done enough.
    const ENOUGH: usize = 100;

    /// What a server does wrong.
    #[derive(Clone, Copy, PartialEq)]
    enum Fault {
        None,
        /// No answer is sent before the bad one.
        Late,
        /// One answer is left out.
        Dropped,
        /// One answer is given twice.
        Twice,
        /// Requests that write are answered and not carried out from then on.
        Forgotten,
        /// The connection ends.
        Closed,
    }

    /// Answers as a store does, for one connection.
    fn serve(mut stream: TcpStream, fault: Fault, is_enough: &mpsc::Sender<()>) -> io::Result<()> {
        let mut store = BTreeMap::new();
        let mut requests = Vec::new();
        (0..KEYS.count).for_each(|key| KEYS.write_first(key, &mut requests));
        let mut first = BufReader::new(&requests[..]);
        while let Some(words) = words_from(&mut first)? {
            answer(&mut store, &words);
        }
        let mut reader = BufReader::new(stream.try_clone()?);
        let mut unsent = Vec::new();
        for number in 1.. {
            let Some(words) = words_from(&mut reader)? else {
                break;
            };
            let before = store.clone();
            let bytes = written(answer(&mut store, &words));
            let is_bad = number >= BAD;
            match fault {
                Fault::Closed if is_bad => return Ok(()),
                Fault::Dropped if number == BAD => continue,
                Fault::Twice if number == BAD => unsent.extend(&bytes),
                Fault::Forgotten if is_bad => store = before,
                _ => {}
            }
            unsent.extend(bytes);
            if fault != Fault::Late || is_bad {
                stream.write_all(&mem::take(&mut unsent))?;
            }
            if number == ENOUGH {
                is_enough.send(()).unwrap();
            }
        }
        Ok(())
    }

    fn written(answer: Answer) -> Vec<u8> {
        match answer {
            Answer::Word(word) => format!("+{word}\r\n").into_bytes(),
            Answer::Number(count) => format!(":{count}\r\n").into_bytes(),
            Answer::Value(None) => b"$-1\r\n".to_vec(),
            Answer::Value(Some(value)) => {
                let head = format!("${}\r\n", value.len()).into_bytes();
                [head, value, b"\r\n".to_vec()].concat()
            }
        }
    }

    /// A client of such a server, which tells when it has done enough.
    fn client(fault: Fault) -> (Client, mpsc::Receiver<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (served, _) = listener.accept().unwrap();
        let (tell, told) = mpsc::channel();
        // It ends when its client has left, which may be in the middle of an answer.
        thread::spawn(move || drop(serve(served, fault, &tell)));
        let silence_max = match fault {
            Fault::Dropped => Duration::from_millis(200),
            _ => Duration::from_secs(20),
        };
        let connection = Connection::new(stream, silence_max).unwrap();
        let client = Client::new(connection, Keeper::new(KEYS, (0, 1), 40, 5));
        (client, told)
    }

    const PERIOD: Duration = Duration::from_micros(300);

    /// Both loads, until their server has done enough, or they end by themselves.
    fn run(fault: Fault) -> [Ended; 2] {
        [false, true].map(|is_open| {
            let (client, told) = client(fault);
            let epoch = Instant::now();
            let load = if is_open {
                Load::open(client, PERIOD, epoch)
            } else {
                Load::closed(client, epoch)
            };
            let mut load = load.unwrap();
            if fault == Fault::None {
                told.recv().unwrap();
                return load.end();
            }
            load.thread.take().unwrap().join().unwrap()
        })
    }

    fn check(fault: Fault, expect: [&str; 2]) {
        for (ended, expect) in run(fault).into_iter().zip(expect) {
            let said = match ended.client {
                Ok(_) => "fine".to_owned(),
                Err(error) => error.to_string(),
            };
            assert!(said.starts_with(expect), "{said}, not {expect}");
            let answers: u32 = ended.seen.answers.iter().sum();
            let done = answers as usize + ended.seen.requests.len();
            assert!(done + 1 >= BAD, "{done}");
        }
    }

    #[test]
    fn a_server_that_does_its_work_is_believed() {
        check(Fault::None, ["fine"; 2]);
    }

    #[test]
    fn whatever_a_server_does_wrong_is_seen() {
        check(Fault::Closed, ["a connection was lost"; 2]);
        check(Fault::Twice, ["a wrong answer"; 2]);
        check(Fault::Forgotten, ["a wrong answer"; 2]);
        // A closed loop waits for it in vain, an open one takes the next answer for it.
        let expect = [
            "a connection was lost: no answer came in time",
            "a wrong answer",
        ];
        check(Fault::Dropped, expect);
    }

    #[test]
    fn a_wait_begins_when_a_request_is_due() {
        let (client, told) = client(Fault::Late);
        let load = Load::open(client, PERIOD, Instant::now()).unwrap();
        told.recv().unwrap();
        let requests = load.end().seen.requests;
        assert!(requests.len() >= ENOUGH, "{}", requests.len());
        // None is sent before it is due, and the first is answered when the last of them was sent.
        for (request, left) in requests.iter().zip((0..BAD as u32).rev()) {
            assert!(request.wait >= PERIOD * left, "{request:?} {left}");
        }
        let mut pairs = requests.windows(2);
        assert!(pairs.all(|pair| pair[1].due - pair[0].due == PERIOD));
    }
}
