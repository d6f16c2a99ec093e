//! The law against links that are functions of the number of streams.

use super::*;
use alloc::format;
use alloc::vec::Vec;

const MIB: u64 = 1 << 20;

/// What so many streams deliver, in MiB a second.
type World = fn(u64) -> u64;

/// Pieces of 8 MiB over so many milliseconds; the numbers that were in use for a tenth of them or more,
/// and the last one.
fn climb(climber: &mut Climber, from: u64, milliseconds: u64, world: World) -> (Vec<u8>, u8) {
    let (mut now, end) = (from * 1_000_000, (from + milliseconds) * 1_000_000);
    let mut times = [0; STREAMS_MAX as usize + 1];
    while now < end {
        let in_use = climber.in_use();
        let took = 8 * 1_000_000_000 / world(u64::from(in_use));
        times[usize::from(in_use)] += took;
        now += took;
        let at = Timestamp::from_nanos(now);
        climber.sent(at, ByteCount::new(8 * MIB), true);
    }
    let often = (0u8..)
        .zip(times)
        .filter(|(_, time)| time * 10 >= milliseconds * 1_000_000);
    (often.map(|(number, _)| number).collect(), climber.in_use())
}

#[test]
fn as_many_are_used_as_pay() {
    let check = |world: World, expect: &str| {
        let mut climber = Climber::new(8);
        climb(&mut climber, 0, 20_000, world);
        let seen = climb(&mut climber, 20_000, 60_000, world);
        assert_eq!(format!("{:?}", seen.0), expect);
    };
    // A link that is full with one.
    check(|_| 500, "[1]");
    // A processor for each of four.
    check(|streams| 900 * streams.min(4), "[4]");
    // Two processors that both ends share.
    check(
        |streams| [0, 1500, 2400, 2300, 2200, 2100, 2000, 1900, 1800][streams as usize],
        "[2]",
    );
    // Each one a little more: the third is not worth it, to do without the second neither.
    check(|streams| 1000 + 50 * streams, "[2]");
    // A long way, where each connection has its window.
    check(|streams| 100 * streams, "[8]");
}

#[test]
fn a_change_ends_a_rest() {
    let mut climber = Climber::new(8);
    climb(&mut climber, 0, 40_000, |_| 500);
    assert_eq!(climber.in_use(), 1);
    // Pages are encrypted now. The rest would have been one of 16 s.
    let (_, last) = climb(&mut climber, 40_000, 8_000, |streams| 300 * streams.min(6));
    assert_eq!(last, 6);
}

#[test]
fn it_does_not_swing_where_rates_do() {
    let mut climber = Climber::new(8);
    let mut changes = 0;
    let mut now = 0;
    for piece in 0..20_000u64 {
        // Up to 8 % around what two deliver, more of them no more.
        let noise = 920 + piece.wrapping_mul(0x9e37_79b9_7f4a_7c15) % 160;
        let rate = noise * u64::from(climber.in_use().min(2));
        now += 8 * 1_000_000_000 / rate;
        let before = climber.in_use();
        climber.sent(Timestamp::from_nanos(now), ByteCount::new(8 * MIB), true);
        changes += u64::from(before != climber.in_use());
    }
    let seconds = now / 1_000_000_000;
    assert!((1..4).contains(&climber.in_use()));
    assert!(changes < seconds, "{changes} changes in {seconds} s");
}

#[test]
fn what_is_sent_with_nothing_behind_it_says_nothing() {
    let mut climber = Climber::new(8);
    for piece in 1..10_000 {
        let now = Timestamp::from_nanos(piece * 10_000_000);
        climber.sent(now, ByteCount::new(8 * MIB), piece % 4 != 0);
    }
    climber.interrupt();
    assert_eq!(climber, Climber::new(8));
}

#[test]
fn it_stays_within_what_is_open() {
    for most in 1..=STREAMS_MAX {
        let mut climber = Climber::new(most);
        climber.restart(STREAMS_MAX);
        assert_eq!(climber.in_use(), most);
        climber.restart(1);
        let (often, _) = climb(&mut climber, 0, 60_000, |streams| 100 * streams);
        assert_eq!(often.last(), Some(&most));
    }
}

#[test]
fn they_are_written_as_people_write_them() {
    let check = |text: &str, expect: Option<&str>| {
        let parsed = text.parse::<Streams>().ok();
        assert_eq!(
            parsed.map(|streams| format!("{streams}")).as_deref(),
            expect
        );
    };
    check("auto", Some("auto"));
    check("1", Some("1"));
    check("16", Some("16"));
    for text in ["0", "17", "Auto", "", "-1", "2.5"] {
        check(text, None);
    }
    assert_eq!(Streams::default(), Streams::AUTO);
    assert_eq!(Streams::AUTO.connections(), OPEN_MIN);
    assert_eq!(Streams::fixed(12).map(Streams::connections), Some(12));
}
