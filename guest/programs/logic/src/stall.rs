//! Noticing that time passed without us.
//!
//! A vCPU that works looks at the time stamp counter at every operation. A gap between two looks
//! that is longer than any operation takes is a stall: the host ran something else, the virtual
//! machine was paused or moved, or memory was waited for. A deliberate wait is no stall, but what
//! it overslept is.

use limosa_micro_abi::Report;
use limosa_micro_abi::report::{
    STALL_MICROSECONDS_MIN, STALLS_RING, Stall, StallGroup, stall_group,
};

use crate::ticks::TickRate;

/// Watches the clock of one vCPU and writes stalls into its report.
#[derive(Clone, Debug)]
pub struct StallWatch {
    last: u64,
    length_min: u64,
}

impl StallWatch {
    /// A watch that has looked at the clock just now.
    #[must_use]
    pub const fn new(ticks: TickRate, now: u64) -> Self {
        Self {
            last: now,
            length_min: ticks.from_microseconds(STALL_MICROSECONDS_MIN),
        }
    }

    /// A look at the clock between two operations.
    #[inline]
    pub fn look(&mut self, now: u64, report: &mut Report) {
        let gap = now.wrapping_sub(self.last);
        if gap >= self.length_min {
            self.gap(now, report);
        }
        self.last = now;
    }

    /// A look at the clock after a wait that was meant to end at `deadline`.
    pub fn look_after_wait(&mut self, deadline: u64, now: u64, report: &mut Report) {
        // Waking early is no gap; a counter that went backwards is, and is seen against the last
        // look before the wait.
        if now >= self.last {
            self.last = deadline.min(now);
        }
        self.look(now, report);
    }

    #[cold]
    fn gap(&self, now: u64, report: &mut Report) {
        if now < self.last {
            report.tsc_backwards += 1;
            return;
        }
        let stall = Stall {
            start_tsc: self.last,
            length_tsc: now - self.last,
        };
        let next = report.stall_next as usize % STALLS_RING;
        report.stalls[next] = stall;
        report.stall_next = ((next + 1) % STALLS_RING) as u64;
        report.stall_total += 1;
        keep_longest(report, stall);
        let group = &mut report.stall_groups[stall_group(stall.length_tsc)];
        group.ticks = group.ticks.wrapping_add(stall.length_tsc);
        group.count += 1;
    }
}

/// Forgets the longest stalls, and begins anew to group them by length.
pub fn clear(report: &mut Report) {
    report.long_stalls.fill(Stall::default());
    report.stall_groups.fill(StallGroup::default());
}

fn keep_longest(report: &mut Report, stall: Stall) {
    let longest = &mut report.long_stalls;
    let place = longest.partition_point(|kept| kept.length_tsc >= stall.length_tsc);
    if let Some(tail) = longest.get_mut(place..)
        && !tail.is_empty()
    {
        tail.rotate_right(1);
        tail[0] = stall;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    /// One tick is a nanosecond.
    const TICKS: TickRate = TickRate::from_khz(1_000_000);

    fn watched(looks: &[u64]) -> Report {
        let mut report = Report::new(0);
        let mut watch = StallWatch::new(TICKS, looks[0]);
        for &now in looks {
            watch.look(now, &mut report);
        }
        report
    }

    fn recent(report: &Report) -> Vec<(u64, u64)> {
        report
            .recent_stalls()
            .map(|stall| (stall.start_tsc, stall.length_tsc))
            .collect()
    }

    #[test]
    fn only_long_gaps_are_stalls() {
        let report = watched(&[1000, 2000, 201_999, 401_999, 402_000, 5_402_000]);
        assert_eq!(recent(&report), [(201_999, 200_000), (402_000, 5_000_000)]);
        assert_eq!(report.stall_total, 2);
        assert_eq!(report.long_stalls[0].length_tsc, 5_000_000);
    }

    #[test]
    fn a_wait_counts_by_what_it_overslept() {
        let mut report = Report::new(0);
        let mut watch = StallWatch::new(TICKS, 0);
        watch.look_after_wait(1_000_000, 1_100_000, &mut report);
        watch.look_after_wait(2_000_000, 1_500_000, &mut report);
        watch.look_after_wait(3_000_000, 3_300_000, &mut report);
        assert_eq!(recent(&report), [(3_000_000, 300_000)]);
        watch.look_after_wait(4_000_000, 10, &mut report);
        assert_eq!((report.stall_total, report.tsc_backwards), (1, 1));
    }

    #[test]
    fn a_clock_that_goes_back_is_counted_apart() {
        let report = watched(&[1_000_000, 900_000, 900_100]);
        assert_eq!((report.stall_total, report.tsc_backwards), (0, 1));
    }

    #[test]
    fn stalls_are_grouped_by_length_until_cleared() {
        let mut looks = std::vec![0];
        for length in [210_000, 5_000_000, 220_000, 211_000] {
            looks.push(looks[looks.len() - 1] + length);
        }
        let mut report = watched(&looks);
        let groups = |report: &Report| {
            let groups = report.stall_groups.iter();
            let groups = groups.filter(|group| group.count > 0);
            groups
                .map(|group| (group.count, group.ticks))
                .collect::<Vec<_>>()
        };
        assert_eq!(groups(&report), [(3, 641_000), (1, 5_000_000)]);
        clear(&mut report);
        assert_eq!(groups(&report), []);
        assert_eq!(report.stall_total, 4);
    }

    #[test]
    fn the_longest_are_kept_in_order_until_cleared() {
        let mut looks = std::vec![0];
        for index in 0..100_u64 {
            let length = 200_000 + (index * 37 % 100) * 1000;
            looks.push(looks[looks.len() - 1] + length);
        }
        let mut report = watched(&looks);
        let longest: Vec<u64> = report.long_stalls.iter().map(|s| s.length_tsc).collect();
        let expected: Vec<u64> = (84..100).rev().map(|n| 200_000 + n * 1000).collect();
        assert_eq!(longest, expected);
        assert_eq!(report.recent_stalls().count(), STALLS_RING);
        clear(&mut report);
        assert_eq!(report.long_stalls[0], Stall::default());
        assert_eq!(report.stall_total, 100);
    }
}
