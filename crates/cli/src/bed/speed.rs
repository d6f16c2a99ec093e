//! The guest's speed over time: through the whole move, and closer around its switch.
//!
//! ```text
//!   a second │ begun      stopped  running      ended │ a second
//!  ──────────┼────────────────┤        ├──────────────┼──────────▶
//!   ├─────┼─────┼─────┼─────┼─────┼─────┼─────┼─────┼─────┤  through the move
//!                      ├┼┼┼┼┼┼┼┼┼┼┼┼┼┼┼┼┼┼┤                  at the switch
//! ```
//!
//! A guest that is late makes up for it: one that stood for some milliseconds has soon done what was due meanwhile, so
//! that little of a short stop is seen in slots that are longer. Slots of a series are equally long, as long as they
//! must be to be few enough, and only whole ones count.
//!
//! Work is taken to have grown evenly between two beats, so what is done right before a stop and right after it is
//! spread over the stop: about a millisecond's work.

use crate::bed::beats::Beats;
use crate::bed::observation::{MARGIN, Moments, earlier, milliseconds};
use limosa_engine::Timestamp;
use limosa_lab::record::SpeedSeries;
use std::time::Duration;

/// How long slots are at least, and how many there are at most.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    slot_min: Duration,
    slots_max: u32,
}

/// A slot has about ten beats: one that comes late moves a tenth of the work into the next one. There are about as many
/// as a chart has points to show.
const THROUGH: Bounds = Bounds {
    slot_min: Duration::from_millis(10),
    slots_max: 400,
};
/// Two beats each: with fewer, every late one would look like a stop.
const AT_SWITCH: Bounds = Bounds {
    slot_min: Duration::from_millis(2),
    slots_max: 200,
};
/// What is shown before a switch and after it: more than a guest takes to make up for a short one.
const AROUND_SWITCH: Duration = Duration::from_millis(100);

/// From a second before the move to a second after its end; `None` if beats tell of no slot.
pub(crate) fn through_move(moments: &Moments, beats: &Beats) -> Option<SpeedSeries> {
    let from = earlier(moments.begun, MARGIN);
    let (slot, slots) = THROUGH.slots(moments.ended.after(MARGIN).since(from));
    series(moments, beats.rates(from, slot, slots), from, slot)
}

/// Around the switch, with a slot that begins when the guest stopped; `None` without one, too.
pub(crate) fn at_switch(moments: &Moments, beats: &Beats) -> Option<SpeedSeries> {
    let (stopped, running) = moments.switch?;
    let end = running.after(AROUND_SWITCH);
    let (slot, slots) = AT_SWITCH.slots(end.since(earlier(stopped, AROUND_SWITCH)));
    let slots_before = AROUND_SWITCH.as_nanos() / slot.as_nanos();
    let from = earlier(stopped, slot * u32::try_from(slots_before).ok()?);
    series(moments, beats.rates(from, slot, slots), from, slot)
}

fn series(
    moments: &Moments,
    rates: Vec<Option<f64>>,
    from: Timestamp,
    slot: Duration,
) -> Option<SpeedSeries> {
    if rates.iter().all(Option::is_none) {
        return None;
    }
    let begun = moments.begun;
    // One of both is zero.
    let since_begun =
        |moment: Timestamp| milliseconds(moment.since(begun)) - milliseconds(begun.since(moment));
    Some(SpeedSeries {
        begin_ms: since_begun(from),
        slot_ms: milliseconds(slot),
        stopped_ms: moments.switch.map(|(stopped, _)| since_begun(stopped)),
        running_ms: moments.switch.map(|(_, running)| since_begun(running)),
        work_per_s: rates.iter().map(|rate| rate.map(f64::round)).collect(),
    })
}

impl Bounds {
    /// How long slots are, in multiples of the shortest, and how many whole ones there are in so long a time.
    fn slots(self, length: Duration) -> (Duration, u32) {
        let (length, least) = (length.as_nanos(), self.slot_min.as_nanos());
        let most = u128::from(self.slots_max);
        let times = length.div_ceil(most).div_ceil(least).max(1);
        let slot = self.slot_min * u32::try_from(times).unwrap_or(u32::MAX);
        let slots = u32::try_from(length / slot.as_nanos()).unwrap_or(u32::MAX);
        (slot, slots.min(self.slots_max))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bed::beats::tests::{at, beats};

    /// From 1 s to 1.4 s, with the guest away from 1.302 s to 1.308 s.
    fn moments() -> Moments {
        Moments {
            begun: at(1_000_000),
            ended: at(1_400_000),
            switch: Some((at(1_302_000), at(1_308_000))),
        }
    }

    /// 50 a millisecond up to these milliseconds, but for the stop; the beats of 1.5 s to 1.52 s are lost.
    fn heard(until_ms: u64) -> Beats {
        let mut work = 0;
        let mut series = Vec::new();
        for ms in 0..=until_ms {
            if !(1303..1308).contains(&ms) && !(1500..1520).contains(&ms) {
                series.push((ms * 1000, work));
            }
            work += if (1302..1308).contains(&ms) { 0 } else { 50 };
        }
        beats(&series)
    }

    #[test]
    fn a_stop_is_a_dip_and_lost_beats_are_none() {
        let found = through_move(&moments(), &heard(2405)).unwrap();
        assert_eq!(
            (found.begin_ms, found.slot_ms, found.work_per_s.len()),
            (-1000.0, 10.0, 240)
        );
        assert_eq!(
            (found.stopped_ms, found.running_ms),
            (Some(302.0), Some(308.0))
        );
        let others = |(slot, rate): (usize, &Option<f64>)| {
            (*rate != Some(50_000.0)).then_some((slot, *rate))
        };
        let dips: Vec<_> = found
            .work_per_s
            .iter()
            .enumerate()
            .filter_map(others)
            .collect();
        assert_eq!(dips, [(130, Some(20_000.0))]);
    }

    #[test]
    fn a_guest_that_is_not_heard_of_any_more_has_no_speed() {
        let found = through_move(&moments(), &heard(2000)).unwrap();
        assert_eq!(found.work_per_s[199..202], [Some(50_000.0), None, None]);
        let stayed = Moments {
            switch: None,
            ..moments()
        };
        let found = through_move(&stayed, &heard(2405)).unwrap();
        assert_eq!((found.stopped_ms, found.running_ms), (None, None));
        assert_eq!(through_move(&moments(), &Beats::default()), None);
    }

    #[test]
    fn at_the_switch_a_slot_begins_with_the_stop() {
        let found = at_switch(&moments(), &heard(2405)).unwrap();
        assert_eq!(
            (found.begin_ms, found.slot_ms, found.work_per_s.len()),
            (202.0, 2.0, 103)
        );
        let stop = [
            Some(50_000.0),
            Some(0.0),
            Some(0.0),
            Some(0.0),
            Some(50_000.0),
        ];
        assert_eq!(found.work_per_s[49..54], stop);
        let stayed = Moments {
            switch: None,
            ..moments()
        };
        assert_eq!(at_switch(&stayed, &heard(2405)), None);
        let long = Moments {
            switch: Some((at(1_102_000), at(1_390_000))),
            ..moments()
        };
        let found = at_switch(&long, &heard(2405)).unwrap();
        assert_eq!(
            (found.begin_ms, found.slot_ms, found.work_per_s.len()),
            (2.0, 4.0, 122)
        );
    }

    #[test]
    fn a_long_move_has_longer_slots_and_not_more() {
        let check = |millis: u64, slot_ms: u64, expect: u32| {
            let expect = (Duration::from_millis(slot_ms), expect);
            let found = THROUGH.slots(Duration::from_millis(millis));
            assert_eq!(found, expect, "{millis} ms");
        };
        check(2015, 10, 201);
        check(4000, 10, 400);
        check(4001, 20, 200);
        check(62_000, 160, 387);
        check(86_400_000, 216_000, 400);
    }
}
