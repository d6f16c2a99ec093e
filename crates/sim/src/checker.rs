//! What must never be, looked for after every step of a world.
//!
//! A checker knows the whole world and no engine's mind: it looks at who runs, whose memory holds
//! what, and who is still at work. The rules are named here; the looks themselves are taken by the
//! world, after every step, at every stated outcome, and when it has come to rest.

/// Which rule was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rule {
    /// At most one side runs.
    OneRuns,
    /// The guest stands only while something is at work that will decide.
    StandsForAReason,
    /// The guest reads what it wrote last; its registers are never set back.
    NothingStale,
    /// A guest is throttled only while a migration is at work that can let it go.
    NeverLeftThrottled,
    /// At the target's first instruction its memory is the source's.
    EqualAtTheSwitch,
    /// An attempt is committed once, and never after it was given up.
    CommittedOnce,
    /// An outcome says what is true.
    TruthfulOutcome,
    /// The report's numbers agree with what the world saw.
    TruthfulReport,
    /// A healed world comes to rest in bounded time, with one guest and nothing left over.
    Progress,
    /// A healed world migrates its guest there and back.
    NextMigration,
    /// A journal replays to the same actions.
    Replay,
}

/// A rule that was broken, and how.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{rule:?}: {text}")]
pub struct Violation {
    /// The rule.
    pub rule: Rule,
    /// What was seen.
    pub text: String,
}
