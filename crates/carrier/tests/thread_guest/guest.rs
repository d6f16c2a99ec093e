//! A guest without KVM: a thread that writes pages whose content proves itself, and a host that
//! makes such guests. Its dirty log behaves as KVM's with manual protection does: reading does not
//! clear, and everything is dirty until it is cleared. It may have a disk, whose pages prove themselves, too.

use limosa_carrier::{
    CommitError, Demanded, Guest, GuestError, LentDisks, Running, Saved, TargetHost,
};
use limosa_engine::Timestamp;
use limosa_engine::handover::{MigrationId, OnDaemonLost, Phase, Resolution};
use limosa_engine::source::Writers;
use limosa_engine::target::TargetOutcome;
use limosa_engine::throttle::Throttle;
use limosa_engine::wire::Start;
use limosa_os::disk::missing::{MissingPages, MissingThere};
use limosa_os::disk::{Disk, DiskBuffer};
use limosa_os::userfault::{FaultGate, PageInstaller};
use limosa_os::{PageKind, SharedBitmap, SharedMemory, monotonic_nanos};
use limosa_pages::{ByteCount, Numbering, PAGE_SIZE_USIZE, PageCount, PageRange, PageSet, Pfn};
use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// What the thread and the requests share.
struct Inside {
    phase: Phase,
    running: bool,
    ended: bool,
    tracking: bool,
    dirty: PageSet,
    /// What the last reading of the log found: a clear takes these away and no later ones.
    harvested: PageSet,
    /// The version that each page should have; zero for pages that were never written.
    versions: Vec<u64>,
    /// Pages that it was busy with before it arrived.
    worked_on: u64,
    disk: Option<ThreadDisk>,
}

/// A disk of a guest, written as real ones are.
struct ThreadDisk {
    disk: Disk,
    missing: MissingPages,
    numbering: Numbering,
    /// Its pages, behind those of the memory.
    pages: PageRange,
}

impl ThreadDisk {
    fn new(memory: PageCount, bytes: u64) -> Self {
        // In memory, if possible: a disk that is busy with something else would hold the guest up for a minute.
        let file = tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile());
        let file = file.unwrap();
        file.set_len(bytes).unwrap();
        let numbering = Numbering::new(memory, [ByteCount::new(bytes)]).unwrap();
        let pages = numbering.disks()[0];
        let disk = Disk::open_again(file.as_fd(), false).unwrap();
        let missing = MissingPages {
            all: Arc::default(),
            disk: 0,
        };
        Self {
            disk,
            missing,
            numbering,
            pages,
        }
    }

    /// Where a page is, and how many bytes of it there are; once it has come.
    fn place(&self, page: u64) -> (u64, usize) {
        let offset = (page - self.pages.first.get()) * PAGE_SIZE_USIZE as u64;
        let left = usize::try_from(self.disk.bytes() - offset).unwrap();
        let len = left.min(PAGE_SIZE_USIZE);
        self.missing.wait_for(offset, len as u64);
        (offset, len)
    }
}

/// A guest made of one thread.
pub struct ThreadGuest {
    /// The guest's own mapping, on which page faults are reported while the gate is there.
    memory: Arc<SharedMemory>,
    /// The daemon's.
    lent: Arc<SharedMemory>,
    gate: Mutex<Option<(FaultGate, Arc<PageInstaller>)>>,
    inside: Arc<(Mutex<Inside>, Condvar)>,
    /// Pages that did not hold what they should.
    pub errors: Arc<AtomicU64>,
    /// Pages written.
    pub work: Arc<AtomicU64>,
}

impl ThreadGuest {
    /// A guest that has written `touched` of its pages; with `busy` it goes on writing them.
    pub fn new(pages: u64, touched: u64, busy: bool) -> Arc<Self> {
        Self::with_disk(pages, touched, busy, 0)
    }

    /// The same, with a disk of so many bytes, if any: all of its pages are written, but every third.
    pub fn with_disk(pages: u64, touched: u64, busy: bool, disk: u64) -> Arc<Self> {
        let working_set = if busy { touched } else { 0 };
        let guest = Self::empty(pages, Phase::Running, working_set, disk);
        {
            let mut inside = guest.lock();
            for page in 0..touched {
                write_page(&guest.memory, &mut inside, page);
            }
            let on_disk = inside.disk.as_ref().map(|disk| disk.pages);
            for page in on_disk.into_iter().flat_map(PageRange::iter) {
                if page.get() % 3 != 0 {
                    write_page(&guest.memory, &mut inside, page.get());
                }
            }
            inside.running = true;
        }
        guest.inside.1.notify_all();
        Arc::new(guest)
    }

    fn empty(pages: u64, phase: Phase, working_set: u64, disk: u64) -> Self {
        let pages = PageCount::new(pages);
        let memory = Arc::new(SharedMemory::create(pages.bytes(), PageKind::Small).unwrap());
        let disk = (disk > 0).then(|| ThreadDisk::new(pages, disk));
        let pages = match &disk {
            Some(disk) => PageCount::new(disk.pages.end().get()),
            None => pages,
        };
        let file = memory.file().try_clone_to_owned().unwrap();
        let lent = Arc::new(SharedMemory::open(file).unwrap());
        let is_arriving = matches!(phase, Phase::Preparing { .. });
        let gate = is_arriving.then(|| gate(&memory, &lent)).flatten();
        let inside = Inside {
            phase,
            running: false,
            ended: false,
            tracking: false,
            dirty: PageSet::empty(pages),
            harvested: PageSet::empty(pages),
            versions: vec![0; usize::try_from(pages.get()).unwrap()],
            worked_on: 0,
            disk,
        };
        let guest = Self {
            memory,
            lent,
            gate: Mutex::new(gate),
            inside: Arc::new((Mutex::new(inside), Condvar::new())),
            errors: Arc::default(),
            work: Arc::default(),
        };
        let (memory, inside) = (Arc::clone(&guest.memory), Arc::clone(&guest.inside));
        let (errors, work) = (Arc::clone(&guest.errors), Arc::clone(&guest.work));
        std::thread::spawn(move || run(&memory, &inside, &errors, &work, working_set));
        guest
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.0.lock().unwrap()
    }

    /// Whether it runs.
    pub fn runs(&self) -> bool {
        let inside = self.lock();
        inside.running && !inside.ended
    }

    /// Whether it was ended.
    pub fn ended(&self) -> bool {
        self.lock().ended
    }

    /// What it has recorded.
    pub fn phase(&self) -> Phase {
        self.lock().phase.clone()
    }

    /// Checks every page.
    pub fn sweep(&self) -> u64 {
        let inside = self.lock();
        let pages = 0..inside.versions.len() as u64;
        pages
            .filter(|&page| !page_is_right(&self.memory, &inside, page))
            .count() as u64
    }

    /// What the VM process would do.
    pub fn lose_daemon(&self) {
        let mut inside = self.lock();
        match inside.phase.on_daemon_lost() {
            OnDaemonLost::ResumeHere => {
                inside.phase = Phase::Running;
                inside.running = true;
            }
            OnDaemonLost::Exit => inside.ended = true,
            OnDaemonLost::Stay => {}
        }
        self.inside.1.notify_all();
    }

    fn save(&self, inside: &Inside, dirty: Option<PageSet>) -> Saved {
        let now = Timestamp::from_nanos(monotonic_nanos());
        let state = inside
            .versions
            .iter()
            .flat_map(|version| version.to_le_bytes())
            .collect();
        Saved {
            state,
            stopped_first: now,
            stopped_last: now,
            harvested: now,
            saved: now,
            dirty,
            first_needed: vec![Pfn::new(0)],
        }
    }
}

/// Has page faults on `memory` reported; `None` where the kernel does not allow that.
fn gate(
    memory: &Arc<SharedMemory>,
    lent: &Arc<SharedMemory>,
) -> Option<(FaultGate, Arc<PageInstaller>)> {
    let gate = FaultGate::open(memory).ok()?;
    let missing = SharedBitmap::create_writable(memory.page_count()).unwrap();
    let descriptor = gate.descriptor().try_clone_to_owned().unwrap();
    let (base, path) = (gate.base(), gate.path());
    let installer = PageInstaller::new(descriptor, base, Arc::clone(lent), missing, path).unwrap();
    Some((gate, Arc::new(installer)))
}

/// The guest's only thread.
fn run(
    memory: &SharedMemory,
    inside: &(Mutex<Inside>, Condvar),
    errors: &AtomicU64,
    work: &AtomicU64,
    working_set: u64,
) {
    let mut seed = 1u64;
    loop {
        let mut state = inside.0.lock().unwrap();
        while !state.running && !state.ended {
            state = inside.1.wait(state).unwrap();
        }
        if state.ended {
            return;
        }
        // The working set of a guest that arrived is what it had written before.
        let busy = working_set.max(state.worked_on);
        for _ in 0..busy.min(8) {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let number = seed >> 33;
            let page = match &state.disk {
                // Also those that were never written.
                Some(disk) if number.is_multiple_of(2) => {
                    disk.pages.first.get() + number / 2 % disk.pages.count.get()
                }
                _ => number % busy,
            };
            if !page_is_right(memory, &state, page) {
                errors.fetch_add(1, Ordering::SeqCst);
            }
            write_page(memory, &mut state, page);
            work.fetch_add(1, Ordering::SeqCst);
        }
        drop(state);
        std::thread::sleep(Duration::from_micros(50));
    }
}

fn content(page: u64, version: u64) -> [u8; PAGE_SIZE_USIZE] {
    let mut bytes = [0; PAGE_SIZE_USIZE];
    if version > 0 {
        bytes
            .chunks_exact_mut(16)
            .enumerate()
            .for_each(|(index, chunk)| {
                chunk[..8].copy_from_slice(&(page ^ (index as u64) << 40).to_le_bytes());
                chunk[8..].copy_from_slice(&version.to_le_bytes());
            });
    }
    bytes
}

fn write_page(memory: &SharedMemory, inside: &mut Inside, page: u64) {
    let version = &mut inside.versions[usize::try_from(page).unwrap()];
    *version += 1;
    let content = content(page, *version);
    match &inside.disk {
        Some(disk) if page >= disk.pages.first.get() => {
            let (offset, len) = disk.place(page);
            let mut buffer = DiskBuffer::new(len);
            buffer.bytes_mut().copy_from_slice(&content[..len]);
            disk.disk.write_at(buffer.bytes_mut(), offset).unwrap();
        }
        _ => memory
            .write_at(Pfn::new(page).file_offset(), &content)
            .unwrap(),
    }
    inside.dirty.insert(Pfn::new(page));
}

fn page_is_right(memory: &SharedMemory, inside: &Inside, page: u64) -> bool {
    let mut bytes = [0; PAGE_SIZE_USIZE];
    let expected = content(page, inside.versions[usize::try_from(page).unwrap()]);
    match &inside.disk {
        Some(disk) if page >= disk.pages.first.get() => {
            let (offset, len) = disk.place(page);
            let mut buffer = DiskBuffer::new(len);
            disk.disk.read_at(buffer.bytes_mut(), offset).unwrap();
            *buffer.bytes_mut() == expected[..len]
        }
        // Between memory and disk there is nothing.
        _ if page >= memory.page_count().get() => true,
        _ => {
            let offset = Pfn::new(page).file_offset();
            memory.read_at(offset, &mut bytes).unwrap();
            bytes == expected
        }
    }
}

fn refused(error: impl std::fmt::Display) -> GuestError {
    GuestError(error.to_string())
}

impl Guest for ThreadGuest {
    fn description(&self) -> Result<Vec<u8>, GuestError> {
        Ok(b"thread".to_vec())
    }

    fn memory(&self) -> Arc<SharedMemory> {
        Arc::clone(&self.lent)
    }

    fn disks(&self, is_read_only: bool) -> Result<LentDisks, GuestError> {
        let inside = self.lock();
        let disk = inside.disk.as_ref().ok_or_else(|| refused("no disk"))?;
        let lent = disk.missing.all.lend(&disk.numbering).map_err(refused)?;
        let [bitmap, asked] = lent.map(|end| end.try_clone_to_owned().unwrap());
        Ok(LentDisks {
            disks: vec![Disk::open_again(disk.disk.file(), is_read_only).map_err(refused)?],
            missing: MissingThere::new(&disk.numbering, bitmap, asked).map_err(refused)?,
        })
    }

    fn installer(&self) -> Option<Arc<PageInstaller>> {
        let gate = self.gate.lock().unwrap();
        gate.as_ref().map(|(_, installer)| Arc::clone(installer))
    }

    fn disarm(&self) -> Result<(), GuestError> {
        if let Some((gate, _)) = self.gate.lock().unwrap().take() {
            gate.close().map_err(refused)?;
        }
        Ok(())
    }

    fn is_gone(&self) -> bool {
        false
    }

    fn start_tracking(&self) -> Result<(), GuestError> {
        let mut inside = self.lock();
        inside.tracking = true;
        inside.dirty = PageSet::full(inside.dirty.capacity());
        Ok(())
    }

    fn stop_tracking(&self) -> Result<(), GuestError> {
        self.lock().tracking = false;
        Ok(())
    }

    fn throttle(&self, _: Option<Throttle>) -> Result<(), GuestError> {
        Ok(())
    }

    fn harvests_freely(&self) -> bool {
        true
    }

    fn harvest(&self, into: &mut PageSet) -> Result<Writers, GuestError> {
        let mut inside = self.lock();
        inside.harvested = inside.dirty.clone();
        into.clone_from(&inside.harvested);
        Ok(Writers::default())
    }

    fn clear(&self, range: PageRange, kept: Vec<PageRange>) -> Result<(), GuestError> {
        let mut inside = self.lock();
        let Inside {
            dirty, harvested, ..
        } = &mut *inside;
        kept.into_iter().for_each(|run| harvested.remove_range(run));
        harvested
            .runs_in(range)
            .for_each(|run| dirty.remove_range(run));
        Ok(())
    }

    fn rehearse(&self) -> Result<Saved, GuestError> {
        let inside = self.lock();
        Ok(self.save(&inside, None))
    }

    fn pause_and_save(&self, log: Option<PageSet>) -> Result<Saved, GuestError> {
        let mut inside = self.lock();
        if inside.ended {
            return Err(refused("the guest has ended"));
        }
        inside.running = false;
        let dirty = log.map(|_| inside.dirty.clone());
        Ok(self.save(&inside, dirty))
    }

    fn resume(&self) -> Result<(), GuestError> {
        let mut inside = self.lock();
        if !inside.phase.may_run() {
            return Err(refused("the phase forbids it"));
        }
        inside.running = true;
        self.inside.1.notify_all();
        Ok(())
    }

    fn record(&self, phase: &Phase) -> Result<(), GuestError> {
        let mut inside = self.lock();
        if inside.ended {
            return Err(refused("the guest has ended"));
        }
        inside.phase.check(phase).map_err(refused)?;
        inside.phase = phase.clone();
        Ok(())
    }

    fn load(&self, state: &[u8], _is_rehearsal: bool) -> Result<Duration, GuestError> {
        let mut inside = self.lock();
        if state.len() != inside.versions.len() * 8 {
            return Err(refused("the state is of another guest"));
        }
        inside.versions = state
            .chunks_exact(8)
            .map(|chunk| u64::from_le_bytes(chunk.try_into().unwrap()))
            .collect();
        let is_busy = inside.versions.iter().any(|&version| version > 1);
        let pages = usize::try_from(self.memory.page_count().get()).unwrap();
        let written = inside.versions[..pages]
            .iter()
            .filter(|&&version| version > 0)
            .count();
        inside.worked_on = if is_busy { written as u64 } else { 0 };
        Ok(Duration::from_micros(1))
    }

    fn commit_and_run(
        &self,
        id: MigrationId,
        _stopped_at: Timestamp,
        keeps_faults: bool,
    ) -> Result<Running, CommitError> {
        if !keeps_faults {
            self.disarm().map_err(CommitError::Refused)?;
            let wrong = self.sweep();
            self.errors.fetch_add(wrong, Ordering::SeqCst);
        }
        self.record(&Phase::Arrived { id })
            .and_then(|()| self.resume())
            .map_err(CommitError::Refused)?;
        Ok(Running {
            first_instruction_at: Timestamp::from_nanos(monotonic_nanos()),
        })
    }

    fn stop(&self) -> Result<(), GuestError> {
        self.lock().ended = true;
        self.inside.1.notify_all();
        Ok(())
    }
}

/// A host whose VMs are threads.
#[derive(Default)]
pub struct ThreadHost {
    /// Refuse everything with this.
    pub refuse: Mutex<Option<String>>,
    /// Every guest that was made.
    pub guests: Mutex<Vec<(MigrationId, Arc<ThreadGuest>)>>,
    /// What guests had to ask for that came without all their pages.
    pub asked_for: Mutex<HashMap<MigrationId, Demanded>>,
    ledger: Mutex<HashSet<MigrationId>>,
}

impl TargetHost for ThreadHost {
    fn create(&self, id: MigrationId, start: &Start) -> Result<Arc<dyn Guest>, String> {
        if let Some(reason) = self.refuse.lock().unwrap().clone() {
            return Err(reason);
        }
        if start.vm != b"thread" || start.memory_pages.get() > 1 << 20 {
            return Err("not a machine that this host can make".to_owned());
        }
        let guest = Arc::new(ThreadGuest::empty(
            start.memory_pages.get(),
            Phase::Preparing { id },
            0,
            start.disks.first().map_or(0, |disk| disk.size.get()),
        ));
        self.guests.lock().unwrap().push((id, Arc::clone(&guest)));
        Ok(guest)
    }

    fn differences(&self, start: &Start) -> Vec<String> {
        let refuse = self.refuse.lock().unwrap().clone();
        let unknown = (start.vm != b"thread").then(|| "not a machine for this host".to_owned());
        refuse.into_iter().chain(unknown).collect()
    }

    fn running(&self, id: MigrationId, _is_filling: bool) {
        self.ledger.lock().unwrap().insert(id);
    }

    fn filled(&self, id: MigrationId, asked_for: Demanded) {
        self.asked_for.lock().unwrap().insert(id, asked_for);
    }

    fn finished(&self, id: MigrationId, outcome: &TargetOutcome) {
        if matches!(outcome, TargetOutcome::Dropped { .. }) {
            self.guests
                .lock()
                .unwrap()
                .retain(|(known, guest)| *known != id || !guest.ended());
        }
    }

    fn resolve(&self, id: MigrationId) -> Resolution {
        if self.ledger.lock().unwrap().contains(&id) {
            Resolution::Runs
        } else {
            Resolution::Barred
        }
    }

    fn confirmed(&self, id: MigrationId) {
        for (known, guest) in &*self.guests.lock().unwrap() {
            if *known == id {
                guest.record(&Phase::Running).unwrap();
            }
        }
    }
}
