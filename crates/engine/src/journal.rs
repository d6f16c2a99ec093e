//! The journal of a machine: what it was told, when, and what it answered.
//!
//! An engine is a function of its events, so a journal replays to the same actions on any machine
//! of the same version: a report from the field becomes a test. Actions are kept as a hash, since
//! they follow from the events.

use crate::time::Timestamp;
use alloc::vec::Vec;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

/// Entries after which a journal stops growing: about 50 MiB, days of an ordinary migration.
pub const ENTRIES_MAX: usize = 1 << 19;

/// A state machine of the engine: facts in, things to do out.
pub trait Machine {
    /// A fact about the world.
    type Event: Serialize + DeserializeOwned;
    /// Something that the world shall do.
    type Action: Serialize;

    /// Takes one fact, learnt at `now`, and says what to do, in order.
    fn handle(&mut self, now: Timestamp, event: Self::Event) -> Vec<Self::Action>;
}

/// One step of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry<E> {
    /// When the fact was learnt.
    pub now: Timestamp,
    /// The fact.
    pub event: E,
    /// Hash of the actions that followed.
    pub actions: u64,
}

/// A machine that keeps its journal.
#[derive(Debug)]
pub struct Journaled<M: Machine> {
    machine: M,
    entries: Vec<Entry<M::Event>>,
}

impl<M: Machine> Journaled<M>
where
    M::Event: Clone,
{
    /// Starts the journal of a machine that has not been told anything yet.
    pub const fn new(machine: M) -> Self {
        Self {
            machine,
            entries: Vec::new(),
        }
    }

    /// Like [`Machine::handle`], and writes it down.
    pub fn handle(&mut self, now: Timestamp, event: M::Event) -> Vec<M::Action> {
        if self.entries.len() >= ENTRIES_MAX {
            return self.machine.handle(now, event);
        }
        let actions = self.machine.handle(now, event.clone());
        self.entries.push(Entry {
            now,
            event,
            actions: hash(&actions),
        });
        actions
    }

    /// The machine.
    pub const fn machine(&self) -> &M {
        &self.machine
    }

    /// What happened so far.
    pub fn entries(&self) -> &[Entry<M::Event>] {
        &self.entries
    }
}

/// Where a replay differs from its journal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("step {step} of the journal replays to other actions")]
pub struct Divergence {
    /// Index of the entry.
    pub step: usize,
}

/// Tells a fresh machine everything that the journal tells.
///
/// # Errors
/// The first step at which it answers otherwise.
pub fn replay<M: Machine>(
    machine: &mut M,
    entries: impl IntoIterator<Item = Entry<M::Event>>,
) -> Result<usize, Divergence> {
    let mut steps = 0;
    for entry in entries {
        let actions = machine.handle(entry.now, entry.event);
        if hash(&actions) != entry.actions {
            return Err(Divergence { step: steps });
        }
        steps += 1;
    }
    Ok(steps)
}

fn hash<A: Serialize>(actions: &Vec<A>) -> u64 {
    let bytes = postcard::to_allocvec(actions).expect("actions of plain data serialize");
    xxh3_64(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers with the sum of what it was told.
    #[derive(Default)]
    struct Sum(u64);

    impl Machine for Sum {
        type Event = u64;
        type Action = u64;

        fn handle(&mut self, now: Timestamp, event: u64) -> Vec<u64> {
            self.0 += event + now.as_nanos();
            alloc::vec![self.0]
        }
    }

    fn journal() -> Vec<Entry<u64>> {
        let mut machine = Journaled::new(Sum::default());
        for number in 0..5 {
            machine.handle(Timestamp::from_nanos(number), number);
        }
        machine.entries().to_vec()
    }

    #[test]
    fn a_journal_replays_to_the_same_actions() {
        assert_eq!(replay(&mut Sum::default(), journal()), Ok(5));
    }

    #[test]
    fn a_lost_or_altered_event_is_found_where_it_matters() {
        let mut lost = journal();
        lost.remove(2);
        assert_eq!(
            replay(&mut Sum::default(), lost),
            Err(Divergence { step: 2 })
        );
        let mut altered = journal();
        altered[3].event += 1;
        assert_eq!(
            replay(&mut Sum::default(), altered),
            Err(Divergence { step: 3 })
        );
    }
}
