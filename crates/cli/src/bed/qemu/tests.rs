//! A real move of a small guest, where there are KVM and QEMU.

use super::*;
use limosa_engine::streams::Streams;
use limosa_host::api::{Compression, Deferral, Throttling};
use limosa_lab::backing::Backing;
use limosa_lab::qemu::Variant;

fn bed(variant: Variant, arguments: &str) -> Option<QemuBed> {
    if let Some(problem) = crate::bed::kvm_problem() {
        println!("skipped: {problem}");
        return None;
    }
    let program = Path::new(program::USUAL);
    if let Err(error) = program::check(program) {
        println!("skipped: {error}");
        return None;
    }
    let setup = Setup {
        guest: "writer".to_owned(),
        arguments: arguments.to_owned(),
        memory_bytes: 64 << 20,
        vcpus: 1,
        pages: Backing::default(),
        dirty_tracker: limosa_host::api::TrackerKind::default(),
        link: None,
        streams: Streams::fixed(1),
        push_order: limosa_host::api::PushOrder::default(),
        compress: Compression::Off,
        throttle: Throttling::Off,
        defer: Deferral::Off,
        tls: false,
        deadline_ms: None,
        rounds_max: None,
        downtime_max_ms: 5.0,
        verify: false,
        seed: 1,
        clients: None,
    };
    let way = QemuWay {
        variant,
        downtime_limit_ms: 300,
        cancel_after_ms: 10_000,
    };
    let interrupt = Interrupt::install().unwrap();
    match QemuBed::start(&setup, way, program, &interrupt) {
        Ok(bed) => Some(bed),
        Err(error) => {
            assert!(error.to_string().contains("the guest said"), "{error:#}");
            let text = format!("{error:#}");
            assert!(text.contains("bad argument 'ws=7'"), "{text}");
            None
        }
    }
}

#[test]
fn a_guest_moves_between_two_qemus_and_is_whole() {
    let variant = Variant::PostCopyPreempt;
    let Some(mut bed) = bed(variant, "ws=16M touch=43M rate=2000 rest=spin") else {
        return;
    };
    let record = bed.make_move(1).unwrap();
    assert!(record.is_completed(), "{record:?}");
    assert_eq!(record.integrity_errors, 0);
    assert_eq!(record.swept_pages, Some(59 << 8));
    assert!(record.heartbeat_gap_ms.is_some());
    assert!(record.guest_writes_per_s.before.is_some());
    assert_eq!(record.mode, variant.technique());
    let figures = record.qemu.unwrap();
    assert!(!figures.version.is_empty());
    // In touched memory, which nobody rewrites.
    bed.target.memory.spoil(60 << 20);
    let swept = bed.command(Role::Target, CommandKind::Sweep, PATIENCE);
    assert_eq!(swept.unwrap().sweep_errors, 1, "the sweep bites");
}

#[test]
fn a_guest_that_refuses_its_arguments_is_heard() {
    assert!(bed(Variant::Plain, "ws=7").is_none());
}

fn event(name: &str, status: Option<&str>, pass: Option<u64>) -> Event {
    Event {
        at: Timestamp::from_nanos(5),
        name: name.to_owned(),
        status: status.map(str::to_owned),
        pass,
    }
}

#[test]
fn a_move_is_over_when_both_ends_say_so() {
    let mut followed = Followed::default();
    followed.heed_source(&event("STOP", None, None));
    followed.heed_source(&event("MIGRATION", Some("completed"), None));
    assert!(!followed.is_over());
    followed.heed_target(&event("RESUME", None, None));
    followed.heed_target(&event("MIGRATION", Some("completed"), None));
    assert!(followed.is_over());
    let mut cancelled = Followed::default();
    cancelled.heed_source(&event("STOP", None, None));
    cancelled.heed_source(&event("RESUME", None, None));
    cancelled.heed_source(&event("MIGRATION", Some("cancelled"), None));
    assert!(cancelled.is_over() && cancelled.stopped.is_none());
}

#[test]
fn post_copy_begins_when_its_variant_says() {
    let check = |variant, event: Event, expect| {
        let way = QemuWay {
            variant,
            downtime_limit_ms: 1,
            cancel_after_ms: 1,
        };
        assert_eq!(is_time_to_switch(&way, &event), expect);
    };
    let active = || event("MIGRATION", Some("active"), None);
    let pass = |number| event("MIGRATION_PASS", None, Some(number));
    check(Variant::Plain, active(), false);
    check(Variant::PostCopy, active(), true);
    check(Variant::Hybrid, active(), false);
    check(Variant::Hybrid, pass(1), false);
    check(Variant::HybridPreempt, pass(2), true);
}
