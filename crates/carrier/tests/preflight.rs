//! Whether a target would take a guest, asked over real sockets; no KVM needed.
#![allow(missing_docs, clippy::unwrap_used)]

// Each test program uses a part of it.
#[allow(dead_code)]
#[path = "thread_guest/guest.rs"]
mod thread_guest;

use limosa_carrier::{Listener, PreflightRequest, preflight};
use limosa_engine::policy::Mode;
use limosa_engine::wire::TEXT_BYTES_MAX;
use limosa_pages::{BytesPerSecond, PageCount};
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use thread_guest::ThreadHost;

fn listen() -> (Arc<ThreadHost>, Listener) {
    let host = Arc::new(ThreadHost::default());
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), host.clone(), None).unwrap();
    (host, listener)
}

fn request(listener: &Listener) -> PreflightRequest {
    PreflightRequest {
        peer: listener.local_addr().to_string(),
        link: Some(BytesPerSecond::new(20_000_000)),
        credentials: None,
        vm: b"thread".to_vec(),
        memory: PageCount::new(1000),
        disks: Vec::new(),
        mode: Mode::Auto,
    }
}

#[test]
fn a_target_that_takes_the_guest_makes_nothing_and_the_way_is_measured() {
    let (host, listener) = listen();
    let answer = preflight(&request(&listener)).unwrap();
    assert_eq!(answer.differences, Vec::<String>::new());
    let rate = answer.bandwidth.get();
    assert!((10_000_000..=25_000_000).contains(&rate), "{rate}");
    assert!(answer.round_trip < Duration::from_secs(1));
    assert!(host.guests.lock().unwrap().is_empty());
    assert!(listener.incoming().is_empty());
}

#[test]
fn all_that_is_in_the_way_is_told_in_lines_of_limited_length() {
    let (host, listener) = listen();
    *host.refuse.lock().unwrap() = Some(format!("no\u{1b}[31m {}", "room ".repeat(1000)));
    let other = PreflightRequest {
        vm: b"other".to_vec(),
        ..request(&listener)
    };
    let [room, machine] = preflight(&other).unwrap().differences.try_into().unwrap();
    assert!(room.starts_with("no [31m room") && room.len() == TEXT_BYTES_MAX);
    assert_eq!(machine, "not a machine for this host");
}

#[test]
fn many_may_ask_at_once_and_none_is_left_waiting() {
    let (_host, listener) = listen();
    let request = request(&listener);
    thread::scope(|scope| {
        let asking: Vec<_> = (0..24)
            .map(|_| scope.spawn(|| preflight(&request)))
            .collect();
        let answers = asking.into_iter().map(|asking| asking.join().unwrap());
        for answer in answers {
            let is_told = |error: &String| error.contains("too many preflights at once");
            assert!(answer.as_ref().err().is_none_or(is_told), "{answer:?}");
        }
    });
    preflight(&request).unwrap();
}

#[test]
fn nobody_there_is_told() {
    let (_host, listener) = listen();
    let nobody = PreflightRequest {
        peer: "127.0.0.1:1".to_owned(),
        ..request(&listener)
    };
    let error = preflight(&nobody).unwrap_err();
    assert!(error.contains("no limosa host answers"), "{error}");
}
