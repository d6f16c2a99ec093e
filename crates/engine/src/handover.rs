//! Who may run the guest: the phase record that each VM process holds.
//!
//! Daemons die and are restarted; the two VM processes are what a handover rests on. Each holds one
//! [`Phase`], changes it only along [`Phase::check`], and asks it before it lets a vCPU run. Rule:
//! at most one side runs. The source records *committed* before the commit frame leaves, so from
//! then on it cannot resume without an answer from the target; the target records *committed*
//! before its first instruction.
//!
//! ```text
//!  source VM                                target VM
//!  Running ──offer──▶ Offered{id}           Preparing{id} ──commit──▶ Arrived{id} ──done──▶ Running
//!     ▲  ▲─withdraw───┘   │ commit             │ abort / daemon lost
//!     │                   ▼                    ▼
//!     └─resolved────── Committed{id}          gone
//!                         │ released
//!                         ▼
//!                        gone
//! ```
//!
//! Absent on purpose: time, retries, the network. [`crate::source`] and [`crate::target`] drive
//! these transitions; `sim` checks the rule at every step with every process restarted.

use alloc::string::String;
use core::fmt;
use serde::{Deserialize, Serialize};

/// Names one attempt to move one guest. Drawn at random for each attempt, never used again, so that
/// *barred for ever* needs no list of the future.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MigrationId(pub u128);

impl fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What a VM process knows about where its guest may run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// The guest belongs here and no migration holds it.
    Running,
    /// A migration away is under way and not committed: the guest may run or be paused, and resumes
    /// by itself if the daemon is lost.
    Offered {
        /// The attempt.
        id: MigrationId,
    },
    /// The commit has left, or is about to: the guest must not run here until it is resolved.
    Committed {
        /// The attempt.
        id: MigrationId,
        /// Where to ask: the target daemon's peer address, as the operator gave it.
        peer: String,
    },
    /// A guest is arriving: memory and state come in, nothing may run.
    Preparing {
        /// The attempt.
        id: MigrationId,
    },
    /// The commit was received: the guest runs here. The source has not said yet that it is done,
    /// so the attempt is remembered to answer *resolve*.
    Arrived {
        /// The attempt.
        id: MigrationId,
    },
}

/// A change of phase that would break the rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest cannot go from {from} to {to}")]
pub struct IllegalTransition {
    /// The phase it is in.
    pub from: Phase,
    /// The phase that was asked for.
    pub to: Phase,
}

/// What a VM process does when it loses the daemon that controls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDaemonLost {
    /// The guest goes on (or starts again if it was paused); the phase becomes [`Phase::Running`].
    ResumeHere,
    /// Nothing changes: it runs if it ran, stays paused if it was paused.
    Stay,
    /// The guest was not here yet: the process ends.
    Exit,
}

impl Phase {
    /// True if the vCPUs may run in this phase.
    pub const fn may_run(&self) -> bool {
        matches!(
            self,
            Self::Running | Self::Offered { .. } | Self::Arrived { .. }
        )
    }

    /// The attempt that holds the guest, if one does.
    pub const fn migration(&self) -> Option<MigrationId> {
        match self {
            Self::Running => None,
            Self::Offered { id }
            | Self::Committed { id, .. }
            | Self::Preparing { id }
            | Self::Arrived { id } => Some(*id),
        }
    }

    /// Checks that `next` may follow.
    ///
    /// # Errors
    /// [`IllegalTransition`] if it may not; the phase then stays what it was.
    pub fn check(&self, next: &Self) -> Result<(), IllegalTransition> {
        let legal = match (self, next) {
            // A repeated record is a retried request and changes nothing.
            (from, to) if from == to => true,
            (Self::Running, Self::Offered { .. }) => true,
            (Self::Offered { .. }, Self::Running) => true,
            (Self::Offered { id }, Self::Committed { id: same, .. }) => id == same,
            // Only a resolution leads here: the target has barred the attempt.
            (Self::Committed { .. }, Self::Running) => true,
            (Self::Preparing { id }, Self::Arrived { id: same }) => id == same,
            (Self::Arrived { .. }, Self::Running) => true,
            _ => false,
        };
        if legal {
            Ok(())
        } else {
            Err(IllegalTransition {
                from: self.clone(),
                to: next.clone(),
            })
        }
    }

    /// What to do when the controlling daemon is gone. Safe because the phase was recorded before
    /// the frame that it stands for was sent.
    pub const fn on_daemon_lost(&self) -> OnDaemonLost {
        match self {
            // Running too: a daemon may die between the record that puts a paused guest back and
            // the request that resumes it, and nobody else would.
            Self::Running | Self::Offered { .. } => OnDaemonLost::ResumeHere,
            Self::Preparing { .. } => OnDaemonLost::Exit,
            Self::Committed { .. } | Self::Arrived { .. } => OnDaemonLost::Stay,
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Running => write!(f, "running"),
            Self::Offered { id } => write!(f, "offered ({id})"),
            Self::Committed { id, peer } => write!(f, "committed to {peer} ({id})"),
            Self::Preparing { id } => write!(f, "preparing ({id})"),
            Self::Arrived { id } => write!(f, "arrived ({id})"),
        }
    }
}

/// The target's answer to *resolve*: does the guest of this attempt run there?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Resolution {
    /// It does, or did, with all its pages: the source must never run it again.
    Runs,
    /// It does, and still misses pages that only the source has.
    Needs,
    /// It did, and ended before all its pages had come.
    Gone,
    /// It does not, and never will: the source resumes.
    Barred,
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    fn phases() -> Vec<Phase> {
        let mut all = alloc::vec![Phase::Running];
        for number in [1, 2] {
            let id = MigrationId(number);
            all.push(Phase::Offered { id });
            all.push(Phase::Committed {
                id,
                peer: String::from("b:1"),
            });
            all.push(Phase::Preparing { id });
            all.push(Phase::Arrived { id });
        }
        all
    }

    /// The golden list of every legal step with a change in it; all others are refused.
    #[test]
    fn exactly_these_steps_are_legal() {
        let mut legal = Vec::new();
        for from in phases() {
            for to in phases() {
                if from != to && from.check(&to).is_ok() {
                    legal.push(alloc::format!("{from} -> {to}"));
                }
            }
        }
        let short = legal
            .join("\n")
            .replace("0000000000000000000000000000000", "");
        assert_eq!(
            short,
            "running -> offered (1)\nrunning -> offered (2)\n\
             offered (1) -> running\noffered (1) -> committed to b:1 (1)\n\
             committed to b:1 (1) -> running\npreparing (1) -> arrived (1)\narrived (1) -> running\n\
             offered (2) -> running\noffered (2) -> committed to b:1 (2)\n\
             committed to b:1 (2) -> running\npreparing (2) -> arrived (2)\narrived (2) -> running"
        );
    }

    #[test]
    fn a_guest_that_may_run_is_never_dropped_when_the_daemon_is_lost() {
        for phase in phases() {
            let exits = phase.on_daemon_lost() == OnDaemonLost::Exit;
            assert!(!(exits && phase.may_run()), "{phase}");
            let resumes = phase.on_daemon_lost() == OnDaemonLost::ResumeHere;
            assert!(!resumes || phase.may_run(), "{phase}");
        }
    }
}
