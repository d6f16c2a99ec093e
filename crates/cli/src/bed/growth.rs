//! What the daemons held over a run, and what grew though it should not have.

use serde::Serialize;

/// Anonymous memory that a daemon may gain over a run without being suspected of a leak: arenas of
/// the allocator, buffers of past migrations.
const GROWTH_BYTES_MAX: u64 = 16 << 20;
/// The same for each move: a finished migration stays listed with its rounds.
const GROWTH_BYTES_MAX_PER_MOVE: u64 = 64 << 10;

/// What both daemons together hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Resources {
    /// Open file descriptors.
    pub open_fds: u64,
    /// Threads.
    pub threads: u64,
    /// Anonymous memory; guest memory is not in it.
    pub anonymous_bytes: u64,
}

impl Resources {
    /// Both.
    pub(crate) const fn plus(self, other: Self) -> Self {
        Self {
            open_fds: self.open_fds + other.open_fds,
            threads: self.threads + other.threads,
            anonymous_bytes: self.anonymous_bytes + other.anonymous_bytes,
        }
    }
}

/// What the daemons held over a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Growth {
    /// Before the guest was made.
    pub idle: Resources,
    /// After the first moves, when everything that is made once had been made.
    pub first: Resources,
    /// After the last move.
    pub last: Resources,
    /// Moves between `first` and `last`.
    pub moves: u32,
    /// The most anonymous memory that was seen after any move.
    pub anonymous_bytes_max: u64,
}

impl Growth {
    /// What grew though it should not have, in words.
    pub(crate) fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut compare = |what: &str, first: u64, last: u64, allowed: u64| {
            if last > first.saturating_add(allowed) {
                let moves = self.moves;
                problems.push(format!(
                    "the daemons' {what} grew from {first} to {last} over {moves} moves"
                ));
            }
        };
        let allowed = GROWTH_BYTES_MAX + u64::from(self.moves) * GROWTH_BYTES_MAX_PER_MOVE;
        let (first, last) = (&self.first, &self.last);
        compare("file descriptors", first.open_fds, last.open_fds, 0);
        compare("threads", first.threads, last.threads, 0);
        compare(
            "anonymous bytes",
            first.anonymous_bytes,
            last.anonymous_bytes,
            allowed,
        );
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn growth(last: Resources, moves: u32) -> Growth {
        let first = Resources {
            open_fds: 40,
            threads: 8,
            anonymous_bytes: 5 << 20,
        };
        Growth {
            idle: first,
            first,
            last: first.plus(last),
            moves,
            anonymous_bytes_max: 0,
        }
    }

    fn check(open_fds: u64, threads: u64, anonymous_bytes: u64, expect: &str) {
        let last = Resources {
            open_fds,
            threads,
            anonymous_bytes,
        };
        assert_eq!(growth(last, 100).problems().join("; "), expect);
    }

    #[test]
    fn growth_is_a_problem() {
        check(0, 0, 0, "");
        check(0, 0, 20 << 20, "");
        check(
            1,
            2,
            0,
            "the daemons' file descriptors grew from 40 to 41 over 100 moves; \
             the daemons' threads grew from 8 to 10 over 100 moves",
        );
        check(
            0,
            0,
            23 << 20,
            "the daemons' anonymous bytes grew from 5242880 to 29360128 over 100 moves",
        );
    }
}
