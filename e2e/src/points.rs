//! The points at which a migration is held, in the order in which it comes to them.

use limosa_engine::policy::Mode;
use std::fmt;

/// An action before which a migration can be held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// As the daemon's test hook names it.
    pub name: &'static str,
    /// Only modes that copy while the guest runs come here.
    pub live_only: bool,
    /// The VM process at the target exists by then.
    pub has_target_vm: bool,
}

impl Point {
    const fn new(name: &'static str, live_only: bool, has_target_vm: bool) -> Self {
        Self {
            name,
            live_only,
            has_target_vm,
        }
    }
}

/// Every point from the operator's word to the commit. At `source.record-committed` it is too
/// late for an abort, though not for a failure: the record is not written yet.
pub const BEFORE_COMMIT: [Point; 20] = [
    Point::new("source.connect", false, false),
    Point::new("source.start", false, false),
    Point::new("target.create", false, false),
    Point::new("target.accept", false, true),
    Point::new("source.record-offered", false, true),
    Point::new("source.start-tracking", true, true),
    Point::new("source.rehearse", false, true),
    Point::new("source.rehearsal", false, true),
    Point::new("target.load-rehearsal", false, true),
    Point::new("target.rehearsed", false, true),
    Point::new("source.harvest", true, true),
    Point::new("source.clear", true, true),
    Point::new("source.send-piece", false, true),
    Point::new("source.send-barrier", false, true),
    Point::new("target.round-received", true, true),
    Point::new("source.pause", false, true),
    Point::new("source.state", false, true),
    Point::new("target.load", false, true),
    Point::new("target.prepared", false, true),
    Point::new("source.record-committed", false, true),
];

/// A point in a mode that comes there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The point.
    pub point: Point,
    /// The mode.
    pub mode: Mode,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.point.name, self.mode)
    }
}

/// All of [`BEFORE_COMMIT`] in all modes that come there.
pub fn places_before_commit() -> Vec<Place> {
    let places = BEFORE_COMMIT
        .into_iter()
        .flat_map(|point| Mode::ALL.map(|mode| Place { point, mode }));
    places
        .filter(|place| place.mode.copies_live() || !place.point.live_only)
        .collect()
}
