//! The law against guests of a model: it comes to rest, at its goal, and slows nobody without need.

use super::*;
use alloc::format;
use alloc::string::String;
use alloc::vec;
use proptest::prelude::*;

/// A link that carries so many pages a second.
fn link(pages: u64) -> BytesPerSecond {
    BytesPerSecond::new(PageCount::new(pages).bytes().get())
}

fn seen(bandwidth: u64, dirtied: u64, by_vcpu: &[PageCount], is_stuck: bool) -> Observation<'_> {
    Observation {
        bandwidth: link(bandwidth),
        time: Duration::from_secs(1),
        dirtied: PageCount::new(dirtied),
        by_vcpu,
        is_stuck,
    }
}

/// The throttle after one second in which the vCPUs dirtied so many pages each; a link of 10,000.
fn check(regulator: &mut Regulator, by_vcpu: &[u64], is_stuck: bool, expect: &str) {
    let pages: Vec<PageCount> = by_vcpu.iter().copied().map(PageCount::new).collect();
    let sum = by_vcpu.iter().sum();
    let next = regulator.regulate(&seen(10_000, sum, &pages, is_stuck));
    let text = next.map_or_else(|| String::from("-"), |next| format!("{next}"));
    assert_eq!(text, expect, "{by_vcpu:?}");
}

#[test]
fn a_guest_whose_rounds_shrink_is_not_slowed() {
    check(&mut Regulator::default(), &[40_000], false, "-");
    let none = Regulator::default().regulate(&seen(10_000, 40_000, &[], false));
    assert_eq!(none, None);
}

#[test]
fn the_quota_is_a_level_and_spares_who_writes_little() {
    let one = "per vCPU, at most 5000 pages/s each";
    check(&mut Regulator::default(), &[40_000], true, one);
    let mut two = Regulator::default();
    let level = "per vCPU, at most 3500 pages/s each";
    check(&mut two, &[40_000, 1500, 0], true, level);
    // At its quota: the law has nothing to add.
    check(&mut two, &[3500, 1500, 0], false, "-");
    // The light writer writes more: the level sinks, at once.
    let lower = "per vCPU, at most 2500 pages/s each";
    check(&mut two, &[3500, 3000, 0], false, lower);
    // It writes nothing: half of the way back.
    let higher = "per vCPU, at most 3750 pages/s each";
    check(&mut two, &[2500, 0, 0], false, higher);
    // Everybody is quiet: what is not reached slows nobody.
    check(&mut two, &[10, 0, 0], false, "-");
}

#[test]
fn a_rate_at_its_target_that_does_not_help_is_halved_down_to_a_floor() {
    let mut regulator = Regulator::default();
    let quota = |pages| format!("per vCPU, at most {pages} pages/s each");
    check(&mut regulator, &[40_000], true, &quota(5000));
    for (rate, expect) in [(5000, 2500), (2500, 1250), (1250, 620)] {
        check(&mut regulator, &[rate], true, &quota(expect));
    }
    check(&mut regulator, &[620], true, "-");
}

#[test]
fn a_share_is_the_target_over_the_rate() {
    let mut regulator = Regulator::default();
    let mut check = |dirtied, is_stuck, expect: Option<u64>| {
        let share = expect.map(|share| Throttle::Equal {
            share: Share::clamped(share),
        });
        let next = regulator.regulate(&seen(10_000, dirtied, &[], is_stuck));
        assert_eq!(next, share, "{dirtied}");
    };
    check(20_000, true, Some(250));
    check(5000, false, None);
    check(7000, false, None);
    check(0, false, Some(312));
    check(5_000_000, true, Some(50));
    check(5_000_000, true, None);
}

#[test]
fn a_target_of_no_time_or_no_bandwidth_is_no_reason_to_panic() {
    let mut regulator = Regulator::default();
    let mut nothing = seen(10_000, 1, &[], true);
    nothing.time = Duration::ZERO;
    assert_eq!(regulator.regulate(&nothing), None);
    let floor = Throttle::Equal { share: Share::MIN };
    assert_eq!(regulator.regulate(&seen(0, 9, &[], true)), Some(floor));
    assert_eq!("auto".parse(), Ok(Throttling::Auto));
    assert!("on".parse::<Throttling>().is_err());
}

/// A guest of the model.
#[derive(Clone, Copy, Debug)]
struct Model {
    /// Pages that it writes a second while it runs.
    most: f64,
    /// Pages that it wants to write a second.
    paced: f64,
    /// Pages that it writes at all.
    set: f64,
    /// What of a millisecond it takes to enter it, of which it has nothing.
    entry: f64,
}

/// Distinct pages a second of a guest that runs for a share of the time, a millisecond of sleep after
/// each run (the formula of `docs/techniques.md` 9, by squaring since there is no exponential here).
fn dirties(share: Share, model: Model) -> f64 {
    let Model {
        most,
        paced,
        set,
        entry,
    } = model;
    let share = f64::from(share.thousandths()) / 1000.0;
    let run = share / (1.0 - share).max(0.001);
    let share = (run - entry).max(0.02) / (run + 1.0);
    let written = (share * most).min(paced);
    let mut left = 1.0 - written / set / 65_536.0;
    for _ in 0..16 {
        left *= left;
    }
    set * (1.0 - left.clamp(0.0, 1.0))
}

proptest! {
    /// Whatever the guest, equal shares get below the bandwidth and come to rest.
    #[test]
    fn shares_converge_and_do_not_swing(most in 10_000f64..400_000.0, paced in 5_000f64..400_000.0, set in 1_000f64..1_000_000.0,
                                        entry in 0f64..0.3, bandwidth in 2_000u64..100_000) {
        let model = Model { most, paced, set, entry };
        let mut regulator = Regulator::default();
        let mut share = Share::WHOLE;
        let mut shares = vec![share];
        let mut changed_at = 0;
        for round in 0..60 {
            let rate = dirties(share, model);
            let is_stuck = rate > bandwidth as f64 * 0.9;
            if let Some(Throttle::Equal { share: next }) = regulator.regulate(&seen(bandwidth, rate as u64, &[], is_stuck)) {
                share = next;
                shares.push(share);
                changed_at = round;
            }
        }
        let turns = shares.windows(3).filter(|three| three[1] > three[0] && three[2] < three[1]).count();
        prop_assert!(turns <= 3 && changed_at < 30, "{turns} turns: {shares:?}");
        let rate = dirties(share, model);
        let goal = bandwidth as f64 * if shares.len() == 1 { 0.9 } else { 0.72 };
        let is_floor = share.thousandths() <= Share::MIN.thousandths() + 2;
        prop_assert!(rate <= goal + 2.0 || is_floor, "{rate} of {bandwidth}: {shares:?}");
    }

    /// A quota that is obeyed is set once, keeps the sum at the target, and slows no light writer.
    #[test]
    fn quotas_keep_the_sum_at_the_target(demands in prop::collection::vec(0u64..400_000, 1..8), bandwidth in 8_192u64..100_000) {
        let mut regulator = Regulator::default();
        let mut quota = u64::MAX;
        let mut changes = 0;
        for _ in 0..10 {
            let written: Vec<PageCount> = demands.iter().map(|&demand| PageCount::new(demand.min(quota))).collect();
            let sum: u64 = written.iter().map(|pages| pages.get()).sum();
            let is_stuck = sum * 10 > bandwidth * 9;
            if let Some(Throttle::PerVcpu { quota: next }) = regulator.regulate(&seen(bandwidth, sum, &written, is_stuck)) {
                quota = next.get();
                changes += 1;
            }
        }
        let sum: u64 = demands.iter().map(|&demand| demand.min(quota)).sum();
        let was_above = demands.iter().sum::<u64>() * 10 > bandwidth * 9;
        prop_assert_eq!(changes > 0, was_above);
        prop_assert!(changes <= 3, "{changes} changes");
        let goal = if was_above { bandwidth * 55 / 100 } else { bandwidth };
        prop_assert!(sum <= goal, "{sum} of {bandwidth} at {quota}");
    }
}
