//! Clients of the guest: they fill it, and then work while it moves.
//!
//! Some ask as soon as they are answered, and one asks when a request is due. Each knows what it has to be answered
//! and goes on with what it knows after a move, over the same connection: a connection that is lost, or a wrong
//! answer, is the last thing that its client does, and is told in the record of the move.

mod figures;

use crate::bed::interrupt::Interrupt;
use crate::bed::observation::Moments;
use crate::bed::observer;
use anyhow::{Context, bail, ensure};
use limosa_clients::load::Ended;
use limosa_clients::redis::{Answer, ClientError, Connection};
use limosa_clients::{Client, Keeper, Keys, Lan, Load, Seen};
use limosa_engine::Timestamp;
use limosa_lab::clients::{ClientFigures, Clients as Settings};
use std::time::{Duration, Instant};

/// Where the guest listens, if it is not told another port.
const PORT: u16 = 6379;
/// Until a guest that is ready is found on its network.
const CONNECT_MAX: Duration = Duration::from_secs(20);
/// Between two tries to reach it.
const TRY_EVERY: Duration = Duration::from_millis(20);
/// Requests on their way at once while the guest is filled.
const FILLING_AT_ONCE: u32 = 64;
/// Longest silence while the guest is filled, and nothing else happens to it.
const FILLING_ANSWER_MAX: Duration = Duration::from_secs(30);

/// The clients of a guest that has its keys.
#[derive(Debug)]
pub(crate) struct Clients {
    settings: Settings,
    /// Those who rest, the first of which asks when a request is due.
    resting: Vec<Client>,
    /// How many there were.
    connections: usize,
    /// What made others of them end.
    ended: Vec<ClientError>,
}

/// The clients at work. They lose their connections if nobody lets them rest again.
#[derive(Debug)]
pub(crate) struct Working {
    loads: Vec<Load>,
    began: Timestamp,
}

impl Clients {
    /// Connects them to a guest that is ready, and gives it all keys. A client of a guest that moves may wait for an
    /// answer as long as `answer_max`.
    pub(crate) fn start(
        lan: &Lan,
        settings: &Settings,
        seed: u64,
        answer_max: Duration,
        interrupt: &Interrupt,
    ) -> anyhow::Result<Self> {
        let keys = Keys {
            count: settings.keys,
            value_bytes: usize::try_from(settings.value_bytes).context("a value is too long")?,
        };
        fill(
            connect(lan, FILLING_ANSWER_MAX, interrupt)?,
            keys,
            interrupt,
        )
        .context("the guest cannot be filled")?;
        let all = u32::from(settings.connections) + 1;
        let resting = (0..all).map(|index| {
            let connection = connect(lan, answer_max, interrupt)?;
            let keeper = Keeper::new(keys, (index, all), settings.sets_percent, seed);
            anyhow::Ok(Client::new(connection, keeper))
        });
        Ok(Self {
            settings: *settings,
            resting: resting.collect::<anyhow::Result<_>>()?,
            connections: all as usize,
            ended: Vec::new(),
        })
    }

    /// Has them work, from now on.
    pub(crate) fn work(&mut self) -> anyhow::Result<Working> {
        ensure!(
            self.ended.is_empty(),
            "clients were lost in an earlier move: {}",
            self.ended[0]
        );
        let (began, epoch) = (observer::now(), Instant::now());
        let period = Duration::from_secs_f64(self.settings.period_ms / 1000.0);
        let loads = self.resting.drain(..).enumerate().map(|(index, client)| {
            if index == 0 {
                Load::open(client, period, epoch)
            } else {
                Load::closed(client, epoch)
            }
        });
        let loads: std::io::Result<Vec<Load>> = loads.collect();
        Ok(Working {
            loads: loads.context("cannot start a client")?,
            began,
        })
    }

    /// Lets them rest when each has its last answer; what they have seen of the move.
    pub(crate) fn rest(&mut self, working: Working, moments: &Moments) -> ClientFigures {
        let mut seen = Seen::default();
        // All at once, or the first would end long before the last.
        working.loads.iter().for_each(Load::tell);
        for load in working.loads {
            let Ended { client, seen: more } = load.end();
            seen = seen.and(more);
            match client {
                Ok(client) => self.resting.push(client),
                Err(error) => self.ended.push(error),
            }
        }
        let window = figures::Window::new(moments, working.began);
        let is_lost = |error: &&ClientError| matches!(error, ClientError::Lost(_));
        let lost = self.ended.iter().filter(is_lost).count();
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let told = ClientFigures {
            connections: count(self.connections),
            lost_connections: count(lost),
            wrong_answers: count(self.ended.len() - lost),
            problem: self.ended.first().map(ToString::to_string),
            ..ClientFigures::default()
        };
        if self.ended.is_empty() {
            figures::add(told, &seen, &window)
        } else {
            // Those who ended early have seen too little to be compared with others.
            told
        }
    }
}

/// A connection to the guest, as soon as it is found.
fn connect(lan: &Lan, answer_max: Duration, interrupt: &Interrupt) -> anyhow::Result<Connection> {
    let give_up = Instant::now() + CONNECT_MAX;
    loop {
        match lan.connect(PORT) {
            Ok(stream) => {
                return Connection::new(stream, answer_max).context("cannot set up a connection");
            }
            Err(error) if Instant::now() > give_up => {
                return Err(error).context("no client reaches the guest");
            }
            Err(_) => interrupt.sleep(TRY_EVERY)?,
        }
    }
}

/// Gives the guest the first value of each key, and counts what it has.
fn fill(mut connection: Connection, keys: Keys, interrupt: &Interrupt) -> anyhow::Result<()> {
    let mut requests = Vec::new();
    let mut next = 0;
    while next < keys.count {
        interrupt.check()?;
        let end = keys.count.min(next + FILLING_AT_ONCE);
        requests.clear();
        (next..end).for_each(|key| keys.write_first(key, &mut requests));
        let (asker, answers) = connection.halves();
        asker.send(&requests)?;
        for _ in next..end {
            answers.receive()?.expect(&Answer::Word("OK".to_owned()))?;
        }
        next = end;
    }
    match connection.ask(&[b"DBSIZE"])? {
        Answer::Number(count) if count == i64::from(keys.count) => Ok(()),
        other => bail!("it was given {} keys, and says {other:?}", keys.count),
    }
}
