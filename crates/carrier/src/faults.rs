//! The fault server of an arriving guest: who waits for which page, and since when.
//!
//! ```text
//!  vCPU touches a missing page ─▶ fault thread ─▶ Want ─▶ source
//!            ▲                                              │
//!            └── installer ◀── answer thread ◀── content ───┘      (push streams install, too)
//! ```
//!
//! The fault thread lives from before the state is loaded until nothing is missing; connections come
//! and go. What was asked for on one that broke is asked again on the next: who waits is written
//! down here, whoever brings the page. A page that is not missing is resolved without the network. A device that
//! waits for pages of a disk that comes along is served in the same way.
//!
//! One fault thread, whatever the number of vCPUs: it reads the faults of all that wait at once and asks
//! for their pages in one write, so that its work for a fault shrinks as vCPUs are added. To bring the
//! page costs more than to ask for it, here and at the source, and a second thread would be woken for
//! each fault that the first one serves; `docs/measurements.md` has the figures.

use crate::channel::{Reader, Writer};
use crate::demanded::{Demanded, Record};
use crate::installer::Installer;
use crate::receiver;
use hdrhistogram::Histogram;
use limosa_engine::report::{FAULT_BUCKETS, FaultReport};
use limosa_engine::wire::{PUSH_HEADER_BYTES, PullHeader, PushHeader, WireError};
use limosa_os::socket::wait_readable;
use limosa_os::thread::{ThreadId, set_precise_waits};
use limosa_os::userfault::InstallError;
use limosa_pages::{ByteCount, PAGE_SIZE_USIZE, PageCount, PageRange, Pfn};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How often the fault thread looks whether it is still needed.
const LOOK_EVERY_MS: u16 = 200;
/// Longest latency that is told apart: beyond it a connection has been lost meanwhile.
const LATENCY_MAX: Duration = Duration::from_secs(3600);

/// How a page came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// In answer to a request.
    Pulled,
    /// By itself.
    Pushed,
}

/// What the threads of a guest that misses pages share.
pub(crate) struct Faults {
    installer: Installer,
    state: Mutex<State>,
    /// Requests for pages go here, while there is a connection.
    pull: Mutex<Option<Writer>>,
    is_over: AtomicBool,
    /// All pages are there, and that was told.
    is_told: AtomicBool,
}

struct State {
    /// Pages that somebody waits for, and since when.
    waited_for: BTreeMap<Pfn, Instant>,
    /// All that somebody has waited for, for the next move.
    asked_for: Record,
    latencies: Histogram<u64>,
    report: FaultReport,
}

impl std::fmt::Debug for Faults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Faults").finish_non_exhaustive()
    }
}

impl Faults {
    pub(crate) fn new(installer: Installer) -> Self {
        let longest = u64::try_from(LATENCY_MAX.as_nanos()).expect("an hour fits");
        let latencies = Histogram::new_with_bounds(1, longest, 2).expect("sound bounds");
        let asked_for = Record::new(installer.memory_pages());
        Self {
            installer,
            state: Mutex::new(State {
                waited_for: BTreeMap::new(),
                asked_for,
                latencies,
                report: FaultReport::default(),
            }),
            pull: Mutex::new(None),
            is_over: AtomicBool::new(false),
            is_told: AtomicBool::new(false),
        }
    }

    pub(crate) const fn installer(&self) -> &Installer {
        &self.installer
    }

    /// Puts pages in, and notes who need not wait any more.
    pub(crate) fn install(
        &self,
        range: PageRange,
        content: &[u8],
        way: Way,
    ) -> Result<(), InstallError> {
        let new = self.installer.install(range.first, content)?;
        let bytes = content.len() as u64 + PUSH_HEADER_BYTES as u64;
        self.note(range, new, bytes, way);
        Ok(())
    }

    /// Pages that are zero: they stay holes, but for those that somebody waits for.
    pub(crate) fn install_zeros(&self, range: PageRange, way: Way) -> Result<(), InstallError> {
        let new = self.installer.install_zeros(range)?;
        let waited_for: Vec<Pfn> = {
            let state = self.state();
            let inside = state.waited_for.range(range.first..range.end());
            inside.map(|(&page, _)| page).collect()
        };
        for page in waited_for {
            self.installer.resolve(page)?;
        }
        self.note(range, new, PUSH_HEADER_BYTES as u64, way);
        Ok(())
    }

    fn note(&self, range: PageRange, new: PageCount, bytes: u64, way: Way) {
        let mut state = self.state();
        match way {
            Way::Pulled => {
                state.report.pulled = state.report.pulled.saturating_add(new);
                let sum = state.report.pulled_bytes;
                state.report.pulled_bytes = sum.saturating_add(ByteCount::new(bytes));
            }
            Way::Pushed => state.report.pushed = state.report.pushed.saturating_add(new),
        }
        let inside = state.waited_for.range(range.first..range.end());
        let done: Vec<(Pfn, Instant)> = inside.map(|(&page, &since)| (page, since)).collect();
        for (page, since) in done {
            // Of a huge page others may still be missing.
            if self.installer.missing_in_unit(page).is_empty() {
                state.waited_for.remove(&page);
                state.record(since.elapsed());
            }
        }
    }

    /// True once, when nothing is missing any more and what came onto disks is safe there.
    pub(crate) fn is_filled_now(&self) -> Result<bool, InstallError> {
        let is_so = self.installer.missing_count() == PageCount::ZERO
            && !self.is_told.swap(true, Ordering::SeqCst);
        if is_so {
            self.installer.flush()?;
        }
        Ok(is_so)
    }

    /// What the guest went through.
    pub(crate) fn report(&self) -> FaultReport {
        let state = self.state();
        let at = |quantile| Duration::from_nanos(state.latencies.value_at_quantile(quantile));
        FaultReport {
            latency_p50: at(0.5),
            latency_p99: at(0.99),
            latency_max: Duration::from_nanos(state.latencies.max()),
            ..state.report.clone()
        }
    }

    /// What the guest has asked for so far, in that order.
    pub(crate) fn asked_for(&self) -> Demanded {
        self.state().asked_for.demanded()
    }

    /// Ends the fault thread soon. The pull stream stays open: its end would be the first that the
    /// source hears.
    pub(crate) fn end(&self) {
        self.is_over.store(true, Ordering::SeqCst);
        self.installer.give_up();
    }

    /// There is nobody to ask for now.
    pub(crate) fn detach(&self) {
        if let Some(pull) = self.pull().take() {
            pull.handle().close();
        }
    }

    /// The source can be asked for pages from now on.
    pub(crate) fn attach(&self, pull: Writer) {
        *self.pull() = Some(pull);
    }

    /// The same after a reconnection: the source is told what is missing, and asked again for what
    /// somebody waits for; how many pages are missing.
    pub(crate) fn reattach(&self, mut pull: Writer) -> io::Result<PageCount> {
        let mut slot = self.pull();
        let missing = self.installer.missing();
        let mut bytes = Vec::new();
        for range in self.installer.ranges() {
            for (part, bits) in crate::missing::encode(&missing, range) {
                bytes.extend_from_slice(&part.missing().encode());
                bytes.extend_from_slice(&bits);
            }
        }
        bytes.extend_from_slice(&PullHeader::MissingEnd.encode());
        pull.write_all(&bytes)?;
        bytes.clear();
        let waited_for: Vec<Pfn> = self.state().waited_for.keys().copied().collect();
        for page in waited_for {
            let missing = self.installer.missing_in_unit(page);
            missing.iter().for_each(|&run| want(&mut bytes, run));
        }
        pull.write_all(&bytes)?;
        *slot = Some(pull);
        Ok(missing.count())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pull(&self) -> MutexGuard<'_, Option<Writer>> {
        self.pull.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// vCPUs wait for these pages, and devices for these of disks: what of them is missing and was not asked for
    /// is asked for at once.
    fn serve(
        &self,
        pages: &[Pfn],
        on_disks: &[PageRange],
        wants: &mut Vec<u8>,
    ) -> Result<(), InstallError> {
        wants.clear();
        for &page in pages {
            self.fault(page, wants)?;
        }
        for &range in on_disks {
            self.fault_on_disk(range, wants);
        }
        if wants.is_empty() {
            return Ok(());
        }
        let mut pull = self.pull();
        let broken = pull.as_mut().and_then(|pull| pull.write_all(wants).err());
        if let Some(error) = broken {
            // Its reader reports it; what is waited for is asked again on the next connection.
            tracing::debug!(%error, "pages could not be asked for");
        }
        Ok(())
    }

    /// Notes that somebody waits for `page`, for which `missing` has to come; true if nobody did.
    fn wait_for(&self, page: Pfn, missing: &[PageRange]) -> bool {
        let mut state = self.state();
        // Who asks again has waited since the first time.
        let is_new = !state.waited_for.contains_key(&page);
        if is_new {
            state.waited_for.insert(page, Instant::now());
            missing.iter().for_each(|&run| state.asked_for.note(run));
        }
        is_new
    }

    /// A vCPU waits for `page`; adds what is to be asked for because of it.
    fn fault(&self, page: Pfn, wants: &mut Vec<u8>) -> Result<(), InstallError> {
        let missing = self.installer.missing_in_unit(page);
        if missing.is_empty() {
            self.installer.resolve(page)?;
            return Ok(());
        }
        let is_new = self.wait_for(page, &missing);
        // It may have come between the look and the note, and whoever brought it did not see the
        // note.
        if self.installer.missing_in_unit(page).is_empty() {
            self.state().waited_for.remove(&page);
            self.installer.resolve(page)?;
            return Ok(());
        }
        if is_new {
            missing.iter().for_each(|&run| want(wants, run));
        }
        Ok(())
    }

    /// A device waits for these pages of a disk.
    fn fault_on_disk(&self, range: PageRange, wants: &mut Vec<u8>) {
        for run in self.installer.missing_on_disk(range) {
            // Whoever asks again has asked before, but for what it had not come to then.
            let new: Vec<Pfn> = run
                .iter()
                .filter(|&page| self.wait_for(page, &[]))
                .collect();
            for part in new.chunk_by(|page, next| next.get() - page.get() == 1) {
                want(
                    wants,
                    PageRange::new(part[0], PageCount::new(part.len() as u64)),
                );
            }
        }
        // As with a page of memory: some may have come before they were noted.
        let mut state = self.state();
        let inside = state.waited_for.range(range.first..range.end());
        let noted: Vec<Pfn> = inside.map(|(&page, _)| page).collect();
        for page in noted {
            if self.installer.missing_in_unit(page).is_empty() {
                state.waited_for.remove(&page);
            }
        }
    }
}

impl State {
    fn record(&mut self, latency: Duration) {
        if self.latencies.is_empty() {
            self.report.first_stall = latency;
        }
        let nanos = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.latencies.saturating_record(nanos);
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        let bucket = (u64::BITS - micros.leading_zeros()) as usize;
        let count = &mut self.report.latency_log2_us[bucket.min(FAULT_BUCKETS - 1)];
        *count = count.saturating_add(1);
    }
}

fn want(wants: &mut Vec<u8>, run: PageRange) {
    let most = u64::from(limosa_engine::wire::PUSH_PAGES_MAX);
    let mut first = run.first;
    while first < run.end() {
        let count = most.min(run.end().get() - first.get());
        let part = PageRange::new(first, PageCount::new(count));
        wants.extend_from_slice(&PullHeader::Want(part).encode());
        first = part.end();
    }
}

/// Starts the fault thread. `failed` is called at most once, when the VM process takes no more pages.
pub(crate) fn start(
    faults: Arc<Faults>,
    failed: impl FnOnce(String) + Send + 'static,
) -> io::Result<()> {
    thread::Builder::new()
        .name("faults".to_owned())
        .spawn(move || {
            hurry();
            let (mut pages, mut on_disks, mut wants) = (Vec::new(), Vec::new(), Vec::new());
            while !faults.is_over.load(Ordering::SeqCst) {
                let served = serve(&faults, &mut pages, &mut on_disks, &mut wants);
                if let Err(error) = served {
                    if !faults.is_over.load(Ordering::SeqCst) {
                        failed(error.to_string());
                    }
                    return;
                }
            }
        })?;
    Ok(())
}

fn serve(
    faults: &Faults,
    pages: &mut Vec<Pfn>,
    on_disks: &mut Vec<PageRange>,
    wants: &mut Vec<u8>,
) -> Result<(), InstallError> {
    let sources = faults.installer.sources();
    // An interrupted or failed wait is a short one.
    if wait_readable(sources, Some(LOOK_EVERY_MS.into())).is_err() {
        return Ok(());
    }
    pages.clear();
    on_disks.clear();
    faults.installer.read_faults(pages, on_disks)?;
    faults.serve(pages, on_disks, wants)
}

/// A vCPU waits for this thread.
fn hurry() {
    if let Err(error) = ThreadId::current().set_urgent(true) {
        tracing::debug!(%error, "page faults may be served late");
    }
    if let Err(error) = set_precise_waits() {
        tracing::debug!(%error, "page faults may be served late");
    }
}

#[derive(Debug, thiserror::Error)]
enum AnswerError {
    #[error("the pull stream broke: {}", crate::connection::in_words(.0))]
    Broken(#[from] io::Error),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("the source answered a request with something else than pages")]
    Foreign,
    #[error(transparent)]
    Install(#[from] InstallError),
}

/// Starts the thread that takes the answers of one pull stream; it ends with the connection.
pub(crate) fn take_answers(
    mut pull: Reader,
    shared: Arc<receiver::Shared>,
    faults: Arc<Faults>,
    report: impl Fn(receiver::Report) + Send + 'static,
) -> io::Result<()> {
    pull.set_timeout(None)?;
    thread::Builder::new()
        .name("answers".to_owned())
        .spawn(move || {
            hurry();
            let mut content = Vec::new();
            loop {
                let error = match take_answer(&mut pull, &shared, &faults, &mut content) {
                    Ok(false) => continue,
                    Ok(true) => {
                        report(receiver::Report::Filled);
                        continue;
                    }
                    Err(error) => error,
                };
                // Where no answers are waited for, other streams say that the connection broke.
                if faults.is_over.load(Ordering::SeqCst) || !shared.is_filling() {
                    return;
                }
                let reason = error.to_string();
                return report(match error {
                    AnswerError::Install(_) => receiver::Report::NotInstalled { reason },
                    _ => receiver::Report::Broken { reason },
                });
            }
        })?;
    Ok(())
}

/// Takes one answer; true if nothing is missing any more.
fn take_answer(
    pull: &mut Reader,
    shared: &receiver::Shared,
    faults: &Faults,
    content: &mut Vec<u8>,
) -> Result<bool, AnswerError> {
    let mut header = [0; PUSH_HEADER_BYTES];
    pull.read_exact(&mut header)?;
    let header = shared.decode(&header)?;
    match header {
        PushHeader::Pages(range) => {
            let pages = usize::try_from(range.count.get()).expect("limited by the header");
            content.resize(pages * PAGE_SIZE_USIZE, 0);
            pull.read_exact(content)?;
            shared.put_in(faults, range, content, Way::Pulled)?;
        }
        PushHeader::Zeros(range) => shared.put_zeros_in(faults, range, Way::Pulled)?,
        _ => return Err(AnswerError::Foreign),
    }
    Ok(faults.is_filled_now()?)
}

#[cfg(test)]
mod tests;
