//! `--throttle auto`: whom it slows down, and whom it leaves alone.

use limosa_e2e::cases::Places;
use limosa_e2e::pair::{body, end};
use limosa_e2e::{Daemon, Pair, VM, guest, has_kvm, skip, wait};
use limosa_engine::policy::Mode;
use limosa_host::api::{Compression, ThrottleInfo, ThrottleKind, Throttling, TrackerKind};
use limosa_os::kvm::Kvm;
use std::time::{Duration, Instant};

/// Bytes a second of a link that carries much less than one vCPU writes.
const LINK: u64 = 40 << 20;
/// For how long a speed is measured.
const TIME: Duration = Duration::from_millis(400);

/// One vCPU writes, the other one reads. Where the tracker tells them apart, the reader goes on as before.
#[test]
fn a_quota_holds_back_the_writer_and_a_share_both() {
    if !has_kvm() {
        return;
    }
    let _places = Places::all();
    for (tracker, kind) in [
        (TrackerKind::Ring, ThrottleKind::PerVcpu),
        (TrackerKind::Bitmap, ThrottleKind::Equal),
    ] {
        if let Err(error) = Kvm::open().and_then(|kvm| kvm.create_vm(tracker)) {
            skip(&format!("{tracker}: {error}"));
            continue;
        }
        let (throttle, [writer, reader]) = kept_under_throttle(tracker);
        println!("{throttle:?}: the writer keeps {writer:.2} of its speed, the reader {reader:.2}");
        assert_eq!(throttle.kind, kind);
        // Whatever else this machine does slows both.
        let favour = reader / writer;
        match kind {
            ThrottleKind::PerVcpu => {
                assert!(favour > 5.0, "the reader is held back, too: {favour}")
            }
            ThrottleKind::Equal => assert!(favour < 3.0, "only the writer is held back: {favour}"),
        }
    }
}

/// How much of its speed each vCPU keeps while it is throttled: one that writes, and one that reads.
fn kept_under_throttle(tracker: TrackerKind) -> (ThrottleInfo, [f64; 2]) {
    let pair = Pair::start();
    let mut spec = guest::writer(VM, "ws=64M rate=max readers=1");
    (spec.vcpus, spec.dirty_tracker) = (2, tracker);
    spec.memory_bytes = 128 << 20;
    pair.boot(spec);
    let before = speeds(&pair.a);
    let mut body = body(&pair.b, Mode::PreCopy);
    (body.link, body.rounds_max) = (Some(LINK), Some(1000));
    (body.throttle, body.compress) = (Throttling::Auto, Compression::Off);
    let client = pair.a.client();
    let id = client.migrate(VM, &body).expect("accepted");
    let throttle = || client.migration(&id).expect("it is known").throttle;
    let throttled = wait::until("its writers are slowed down", throttle);
    let during = speeds(&pair.a);
    assert!(throttle().is_some(), "it was let go while it was measured");
    client.abort(&id).expect("an abort in time");
    end(&pair.a, &id);
    let kept = [0, 1].map(|vcpu| during[vcpu] / before[vcpu]);
    (throttled, kept)
}

/// Operations a second of each vCPU.
fn speeds(daemon: &Daemon) -> [f64; 2] {
    let operations = || {
        let report = daemon.client().guest(VM).expect("it runs here");
        let of = |vcpu: usize| report.vcpus[vcpu].work + report.vcpus[vcpu].reads;
        [of(0), of(1)]
    };
    let (begun, before) = (Instant::now(), operations());
    std::thread::sleep(TIME);
    let (took, after) = (begun.elapsed().as_secs_f64(), operations());
    [0, 1].map(|vcpu| (after[vcpu] - before[vcpu]) as f64 / took)
}
