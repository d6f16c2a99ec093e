//! The manners in which a guest is moved, and the points at which its migration is held.

use crate::guest;
use crate::pair::VM;
use limosa_engine::policy::Mode;
use limosa_host::api::{MigrateBody, VmSpec};
use std::fmt;

/// A rate at which the few megabytes of a guest take a fifth of a second.
const SLOW: u64 = 50_000_000;

/// Less than the bulk round of the guest that makes auto switch takes at this rate, so that it does
/// however little of the machine the guest gets to write with.
const SHORT_MS: f64 = 300.0;

/// How a guest is moved: a technique, and a guest that makes it do what it is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Manner {
    /// The technique, with a guest that dirties its pages slowly.
    Of(Mode),
    /// [`Mode::Auto`] with a guest that writes faster than the link carries, so that it switches.
    AutoThatSwitches,
}

impl Manner {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Of(Mode::StopAndCopy),
        Self::Of(Mode::Demand),
        Self::Of(Mode::PostCopy),
        Self::Of(Mode::PreCopy),
        Self::Of(Mode::Hybrid),
        Self::Of(Mode::Auto),
        Self::AutoThatSwitches,
    ];

    /// The technique.
    pub const fn mode(self) -> Mode {
        match self {
            Self::Of(mode) => mode,
            Self::AutoThatSwitches => Mode::Auto,
        }
    }

    /// The guest runs at the target before its pages are there.
    pub const fn switches(self) -> bool {
        self.mode().needs_faults() || matches!(self, Self::AutoThatSwitches)
    }

    /// Its guest.
    pub fn spec(self) -> VmSpec {
        guest::writer(
            VM,
            match self {
                // Something is to be left to switch for, however little of the machine it gets.
                Self::Of(Mode::Hybrid) => "ws=24M rate=max touch=2M",
                Self::AutoThatSwitches => "ws=24M rate=max",
                Self::Of(_) => "ws=8M rate=5000 touch=2M",
            },
        )
    }

    /// What is asked for to move it to the daemon at `address`.
    pub fn body(self, address: &str) -> MigrateBody {
        let mut body = MigrateBody::new(address, self.mode());
        body.verify = true;
        if self.mode().copies_live() && self.switches() {
            // At full speed nothing would be left to switch for.
            body.bandwidth_max = Some(SLOW);
            body.downtime_max_ms = Some(0.01);
        }
        if self == Self::AutoThatSwitches {
            body.deadline_ms = Some(SHORT_MS);
        }
        body
    }
}

impl fmt::Display for Manner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Of(mode) => mode.fmt(f),
            Self::AutoThatSwitches => f.write_str("auto-that-switches"),
        }
    }
}

/// Which manners come to a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Comes {
    Always,
    /// Those that copy while the guest runs.
    Live,
    /// Those that copy before the guest runs at the target.
    Copying,
    /// Those that run it there without all its pages.
    Switching,
    /// Those that copied before they do that.
    Telling,
}

/// An action before which a migration can be held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// As the daemon's test hook names it.
    pub name: &'static str,
    comes: Comes,
    /// The VM process at the target exists by then.
    pub has_target_vm: bool,
    /// All that was done until then is the same in every mode.
    is_common: bool,
}

impl Point {
    /// A point before anything that a mode decides.
    const fn common(name: &'static str, has_target_vm: bool) -> Self {
        Self {
            name,
            comes: Comes::Always,
            has_target_vm,
            is_common: true,
        }
    }

    const fn new(name: &'static str, comes: Comes) -> Self {
        Self {
            name,
            comes,
            has_target_vm: true,
            is_common: false,
        }
    }

    /// Whether a migration in this manner comes here.
    pub const fn comes(self, manner: Manner) -> bool {
        let mode = manner.mode();
        match self.comes {
            Comes::Always => true,
            Comes::Live => mode.copies_live(),
            Comes::Copying => mode.copies_live() || !mode.needs_faults(),
            Comes::Switching => manner.switches(),
            Comes::Telling => manner.switches() && mode.copies_live(),
        }
    }
}

/// Every point from the operator's word to the commit. At [`TOO_LATE`] it is too late for an abort,
/// though not for a failure: the record is not written yet.
pub const BEFORE_COMMIT: [Point; 24] = [
    Point::common("source.connect", false),
    Point::common("source.start", false),
    Point::common("target.create", false),
    Point::common("target.accept", true),
    Point::common("source.record-offered", true),
    Point::new("source.start-tracking", Comes::Live),
    Point::common("source.rehearse", true),
    Point::common("source.rehearsal", true),
    Point::common("target.load-rehearsal", true),
    Point::common("target.rehearsed", true),
    Point::new("source.harvest", Comes::Live),
    Point::new("source.clear", Comes::Live),
    Point::new("source.send-piece", Comes::Copying),
    Point::new("source.send-barrier", Comes::Always),
    Point::new("target.round-received", Comes::Live),
    Point::new("source.harvest-stale", Comes::Telling),
    Point::new("source.send-stale", Comes::Switching),
    Point::new("source.pause", Comes::Always),
    Point::new("source.send-first", Comes::Switching),
    Point::new("source.state", Comes::Always),
    Point::new("target.serve-faults", Comes::Switching),
    Point::new("target.load", Comes::Always),
    Point::new("target.prepared", Comes::Always),
    Point::new(TOO_LATE, Comes::Always),
];

/// The point at which the decision to commit is made.
pub const TOO_LATE: &str = "source.record-committed";

/// A point in a manner that comes there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The point.
    pub point: Point,
    /// The manner.
    pub manner: Manner,
}

impl Place {
    /// Whether it is tested each time, or in the complete matrix only. Left out is what repeats:
    ///
    /// - what happens before a mode decides anything, in more than one mode;
    /// - demand, which is post-copy until the guest runs at the target;
    /// - auto, which is pre-copy until it switches and hybrid from then on.
    fn is_everyday(self) -> bool {
        if self.point.is_common {
            return self.manner == Manner::Of(Mode::PreCopy);
        }
        let repeats = [
            Manner::Of(Mode::Demand),
            Manner::Of(Mode::Auto),
            Manner::AutoThatSwitches,
        ];
        !repeats.contains(&self.manner)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.point.name, self.manner)
    }
}

/// [`BEFORE_COMMIT`] in the manners that come there: all, or those that are tested each time.
pub fn places_before_commit() -> Vec<Place> {
    let places = BEFORE_COMMIT
        .into_iter()
        .flat_map(|point| Manner::ALL.map(|manner| Place { point, manner }));
    places
        .filter(|place| place.point.comes(place.manner))
        .filter(|place| is_complete() || place.is_everyday())
        .collect()
}

/// Whether the complete matrix was asked for, by `LIMOSA_E2E_MATRIX=all`, and not only that part
/// of it in which each case differs from all others.
///
/// # Panics
/// If the variable says anything else.
pub fn is_complete() -> bool {
    match std::env::var("LIMOSA_E2E_MATRIX").as_deref() {
        Err(_) | Ok("") => false,
        Ok("all") => true,
        Ok(other) => panic!("LIMOSA_E2E_MATRIX is 'all' or not set, not '{other}'"),
    }
}
