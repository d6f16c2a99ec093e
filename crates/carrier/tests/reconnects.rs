//! A guest that runs at the target before its pages are there, and a link that breaks meanwhile.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "thread_guest/guest.rs"]
#[allow(dead_code, reason = "other tests need it")]
mod thread_guest;

use limosa_carrier::{
    Compression, Demanded, Guest, Listener, MigrateRequest, Migration, PushOrder, draw_id,
};
use limosa_engine::policy::{Limits, Mode};
use limosa_engine::report::Outcome;
use limosa_engine::source::Stage;
use limosa_pages::BytesPerSecond;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use thread_guest::{ThreadGuest, ThreadHost};

const PATIENCE: Duration = Duration::from_secs(60);

/// A link that can be cut: connections through it end, and new ones are refused until it is mended.
struct Link {
    address: SocketAddr,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    is_cut: Arc<AtomicBool>,
}

impl Link {
    fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let streams: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
        let is_cut = Arc::new(AtomicBool::new(false));
        let (known, cut) = (Arc::clone(&streams), Arc::clone(&is_cut));
        std::thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                if cut.load(Ordering::SeqCst) {
                    continue;
                }
                let far = TcpStream::connect(target).unwrap();
                for stream in [&near, &far] {
                    stream.set_nodelay(true).unwrap();
                    known.lock().unwrap().push(stream.try_clone().unwrap());
                }
                pass(near.try_clone().unwrap(), far.try_clone().unwrap());
                pass(far, near);
            }
        });
        Self {
            address,
            streams,
            is_cut,
        }
    }

    fn cut(&self) {
        self.is_cut.store(true, Ordering::SeqCst);
        for stream in self.streams.lock().unwrap().drain(..) {
            let _gone = stream.shutdown(Shutdown::Both);
        }
    }

    fn mend(&self) {
        self.is_cut.store(false, Ordering::SeqCst);
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream) {
    std::thread::spawn(move || {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            if to.write_all(&bytes[..count]).is_err() {
                break;
            }
        }
        let _gone = to.shutdown(Shutdown::Write);
    });
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn begin(
    guest: &Arc<ThreadGuest>,
    peer: SocketAddr,
    mode: Mode,
    copy_disks: bool,
) -> Arc<Migration> {
    let guest: Arc<dyn Guest> = guest.clone();
    let request = MigrateRequest {
        id: draw_id().unwrap(),
        peer: peer.to_string(),
        mode,
        limits: Limits::default(),
        streams: 2,
        verify: true,
        copy_disks,
        link: Some(BytesPerSecond::new(8_000_000)),
        compression: Compression::Off,
        push_order: PushOrder::Bubbling,
        demanded: Demanded::default(),
        credentials: None,
    };
    Migration::start(guest, request, None, Box::new(|_| {})).unwrap()
}

#[test]
fn a_link_that_breaks_delays_the_pages_and_loses_none() {
    let modes = [Mode::Demand, Mode::PostCopy, Mode::Hybrid].into_iter();
    // Without a disk, and with one that goes along.
    for (mode, disk) in modes.flat_map(|mode| [(mode, 0), (mode, (4 << 20) + 4608)]) {
        let host = Arc::new(ThreadHost::default());
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), host.clone(), None).unwrap();
        let link = Link::to(listener.local_addr());
        let guest = ThreadGuest::with_disk(8192, 3000, true, disk);
        let migration = begin(&guest, link.address, mode, disk > 0);
        let arrived = || host.guests.lock().unwrap()[0].1.clone();
        for _ in 0..3 {
            wait_until("the guest runs at the target", || {
                migration.status().stage == Stage::Serving
            });
            let worked = arrived().work.load(Ordering::SeqCst);
            let end = Instant::now() + PATIENCE;
            while arrived().work.load(Ordering::SeqCst) <= worked + 20 {
                let (status, incoming) = (migration.status(), listener.incoming());
                assert!(
                    Instant::now() < end,
                    "{mode}, disk {disk}: it does not work: {status:?} {incoming:?}"
                );
                std::thread::sleep(Duration::from_millis(1));
            }
            link.cut();
            wait_until("the source notices", || {
                migration.status().stage == Stage::Unresolved
            });
            assert!(!guest.runs(), "{mode}: it must not run twice");
            link.mend();
        }
        wait_until("the guest runs at the target", || {
            migration.status().stage == Stage::Serving
        });
        if mode == Mode::Demand {
            migration.set_mode(Mode::PostCopy).unwrap();
        }
        let Some(report) = migration.wait(PATIENCE) else {
            panic!("{mode}: {:?} {:?}", migration.status(), listener.incoming());
        };
        assert_eq!(report.outcome, Some(Outcome::Completed), "{mode}");
        assert_eq!(report.digest_equal, Some(true), "{mode}");
        let faults = report.faults.expect("there were page faults");
        assert!(faults.pulled.get() > 0, "{mode}");
        let arrived = arrived();
        assert_eq!(arrived.sweep(), 0, "{mode}");
        assert_eq!(arrived.errors.load(Ordering::SeqCst), 0, "{mode}");
    }
}
