//! Several vCPUs that fault at once, and a source that is played.

use super::*;
use crate::channel::Channel;
use crate::disks::Disks;
use limosa_os::userfault::{FaultGate, FaultPath, GateError, PageInstaller};
use limosa_os::{PageKind, SharedBitmap, SharedMemory};
use limosa_pages::PAGE_SIZE;
use std::net::{TcpListener, TcpStream};

const VCPUS: u64 = 4;
const PAGES: u64 = 96;

struct Bed {
    guest: Arc<SharedMemory>,
    _gate: FaultGate,
    faults: Arc<Faults>,
    source: TcpStream,
}

/// A guest all of whose pages are missing, and the source's end of its pull stream; `None` where page
/// faults cannot be had.
fn bed() -> Option<Bed> {
    let size = PageCount::new(PAGES).bytes();
    let guest = Arc::new(SharedMemory::create(size, PageKind::Small).unwrap());
    let gate = match FaultGate::open_with(&guest, FaultPath::Copy) {
        Ok(gate) => gate,
        Err(GateError::NotPermitted(error)) => {
            println!("skipped: {error}");
            return None;
        }
        Err(error) => panic!("{error}"),
    };
    let own = SharedMemory::open(guest.file().try_clone_to_owned().unwrap()).unwrap();
    let installer = PageInstaller::new(
        gate.descriptor().try_clone_to_owned().unwrap(),
        gate.base(),
        Arc::new(own),
        SharedBitmap::create_writable(guest.page_count()).unwrap(),
        FaultPath::Copy,
    );
    let installer = installer.unwrap();
    installer
        .mark_missing(PageRange::new(Pfn::new(0), guest.page_count()))
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let pull = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let disks = Arc::new(Disks::none(guest.page_count()));
    let installer = Installer::new(Arc::new(installer), disks);
    let faults = Arc::new(Faults::new(installer));
    faults.attach(Channel::plain(pull).writer);
    let (source, _) = listener.accept().unwrap();
    source
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    Some(Bed {
        guest,
        _gate: gate,
        faults,
        source,
    })
}

fn one(page: Pfn) -> PageRange {
    PageRange::new(page, PageCount::new(1))
}

fn content(page: Pfn) -> Vec<u8> {
    (page.get() + 1).to_le_bytes().repeat(PAGE_SIZE_USIZE / 8)
}

/// The next page that is asked for; `None` if it takes too long.
fn next_want(source: &mut TcpStream) -> Option<Pfn> {
    let mut header = [0; PUSH_HEADER_BYTES];
    source.read_exact(&mut header).ok()?;
    match PullHeader::decode(&header, PageCount::new(PAGES)).unwrap() {
        PullHeader::Want(range) => {
            assert_eq!(range.count, PageCount::new(1));
            Some(range.first)
        }
        other => panic!("{other:?}"),
    }
}

/// Every vCPU reads every page, each in an order of its own; they meet at many of them.
fn read_all(guest: &SharedMemory, vcpu: u64) {
    for step in 0..PAGES {
        let page = match vcpu {
            0 => step,
            1 => PAGES - 1 - step,
            _ => (step * 7 + vcpu * 13) % PAGES,
        };
        let word = guest.read_word(page * PAGE_SIZE).unwrap();
        assert_eq!(word, page + 1);
    }
}

#[test]
fn each_page_is_asked_for_once_and_everyone_is_woken() {
    let Some(mut bed) = bed() else { return };
    start(Arc::clone(&bed.faults), |reason| panic!("{reason}")).unwrap();
    let mut wanted = BTreeMap::new();
    thread::scope(|scope| {
        for vcpu in 0..VCPUS {
            let guest = &bed.guest;
            scope.spawn(move || read_all(guest, vcpu));
        }
        // Until all are there, somebody waits for one that was not asked for before.
        while let Some(page) = (wanted.len() < PAGES as usize)
            .then(|| next_want(&mut bed.source).expect("a page that somebody waits for"))
        {
            *wanted.entry(page).or_insert(0) += 1;
            let way = if page.get() % 3 == 0 {
                Way::Pushed
            } else {
                Way::Pulled
            };
            bed.faults.install(one(page), &content(page), way).unwrap();
        }
    });
    assert!(wanted.values().all(|&times| times == 1), "{wanted:?}");
    bed.source
        .set_read_timeout(Some(Duration::from_millis(50)))
        .unwrap();
    assert_eq!(next_want(&mut bed.source), None, "asked for again");
    assert!(bed.faults.state().waited_for.is_empty());
    let report = bed.faults.report();
    let waits: u32 = report.latency_log2_us.iter().sum();
    assert_eq!(u64::from(waits), PAGES);
    bed.faults.end();
}

/// Those that are read together: the same page twice, one that has come meanwhile, one that was asked
/// for before.
#[test]
fn faults_that_are_read_together_are_asked_for_together() {
    let Some(mut bed) = bed() else { return };
    let [first, here, again, last] = [3, 5, 7, 11].map(Pfn::new);
    let mut wants = Vec::new();
    bed.faults.serve(&[again], &[], &mut wants).unwrap();
    assert_eq!(next_want(&mut bed.source), Some(again));
    bed.faults
        .install(one(here), &content(here), Way::Pushed)
        .unwrap();
    bed.faults
        .serve(&[first, here, first, again, last], &[], &mut wants)
        .unwrap();
    assert_eq!(wants.len(), 2 * PUSH_HEADER_BYTES);
    assert_eq!(next_want(&mut bed.source), Some(first));
    assert_eq!(next_want(&mut bed.source), Some(last));
    let waited_for: Vec<Pfn> = bed.faults.state().waited_for.keys().copied().collect();
    assert_eq!(waited_for, [first, again, last]);
}
