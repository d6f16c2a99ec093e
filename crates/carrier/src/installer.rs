//! Pages that come when the guest runs already, or will at once: into its memory, or onto disks that come along.

use crate::disks::Disks;
use limosa_os::userfault::{InstallError, PageInstaller};
use limosa_pages::{PAGE_SIZE_USIZE, PageCount, PageRange, PageSet, Pfn};
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

/// Puts pages where they belong, each once, and knows which are missing. Those of memory are held back by
/// [`PageInstaller`], those of disks by [`limosa_os::disk::missing`].
#[derive(Debug)]
pub(crate) struct Installer {
    memory: Arc<PageInstaller>,
    disks: Arc<Disks>,
}

impl Installer {
    pub(crate) const fn new(memory: Arc<PageInstaller>, disks: Arc<Disks>) -> Self {
        Self { memory, disks }
    }

    /// Pages of the memory.
    pub(crate) fn memory_pages(&self) -> PageCount {
        self.memory.page_count()
    }

    /// The pages of the memory, and of each disk.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = PageRange> {
        self.disks.ranges()
    }

    /// Before the guest runs: the content of these pages is not here.
    pub(crate) fn mark_missing(&self, range: PageRange) -> Result<(), InstallError> {
        if self.disks.reaches(range) {
            return self.disks.mark_missing(range).map_err(on_disk);
        }
        self.memory.mark_missing(range)
    }

    /// Before the guest runs: these pages are where they belong.
    pub(crate) fn arrived_in_place(&self, range: PageRange) -> Result<(), InstallError> {
        if self.disks.reaches(range) {
            return self.disks.arrived_in_place(range).map_err(on_disk);
        }
        self.memory.arrived_in_place(range)
    }

    /// How many pages are missing.
    pub(crate) fn missing_count(&self) -> PageCount {
        let on_disks = self.disks.missing_count();
        self.memory.missing_count().saturating_add(on_disks)
    }

    /// All that are missing.
    pub(crate) fn missing(&self) -> PageSet {
        let mut of_memory = PageSet::empty(self.memory.page_count());
        self.memory.missing_set(&mut of_memory);
        let mut all = of_memory.widened(self.disks.pages());
        self.disks.add_missing(&mut all);
        all
    }

    /// Which pages have to arrive before an access to `page` can go on.
    pub(crate) fn missing_in_unit(&self, page: Pfn) -> Vec<PageRange> {
        let one = PageRange::new(page, PageCount::new(1));
        if self.disks.reaches(one) {
            return self.missing_on_disk(one);
        }
        self.memory.missing_in_unit(page)
    }

    /// Which of these pages of one disk are missing.
    pub(crate) fn missing_on_disk(&self, range: PageRange) -> Vec<PageRange> {
        self.disks.missing_in(range)
    }

    /// Puts pages in; how many of them had been missing. The others are dropped.
    pub(crate) fn install(&self, first: Pfn, content: &[u8]) -> Result<PageCount, InstallError> {
        let count = PageCount::new((content.len() / PAGE_SIZE_USIZE) as u64);
        let range = PageRange::new(first, count);
        if self.disks.reaches(range) {
            return self.disks.install(range, Some(content)).map_err(on_disk);
        }
        self.memory.install(first, content)
    }

    /// The same for pages that are zero.
    pub(crate) fn install_zeros(&self, range: PageRange) -> Result<PageCount, InstallError> {
        if self.disks.reaches(range) {
            return self.disks.install(range, None).map_err(on_disk);
        }
        self.memory.install_zeros(range)
    }

    /// Lets an access to a page go on that is not missing. Whoever waits for one of a disk was woken when it came.
    pub(crate) fn resolve(&self, page: Pfn) -> Result<(), InstallError> {
        if !self.disks.reaches(PageRange::new(page, PageCount::new(1))) {
            self.memory.resolve(page)?;
        }
        Ok(())
    }

    /// What becomes readable when somebody waits for a page.
    pub(crate) fn sources(&self) -> [Option<&dyn AsFd>; 2] {
        let disks = self.disks.asked();
        [Some(&*self.memory), disks.map(|asked| asked as &dyn AsFd)]
    }

    /// Adds what vCPUs and devices wait for that no thread has read yet, some of it, without waiting.
    pub(crate) fn read_faults(
        &self,
        pages: &mut Vec<Pfn>,
        on_disks: &mut Vec<PageRange>,
    ) -> Result<(), InstallError> {
        self.memory.read_faults(pages)?;
        self.disks
            .asked()
            .map_or(Ok(()), |asked| asked.read_asked(on_disks).map_err(on_disk))
    }

    /// Nobody waits for what is missing any more.
    pub(crate) fn give_up(&self) {
        self.disks.give_up();
    }

    /// Why what has come cannot be put in, as long as that is so.
    pub(crate) fn stuck(&self) -> Option<String> {
        self.disks.stuck()
    }

    /// Returns when what was put onto disks is safe there.
    pub(crate) fn flush(&self) -> Result<(), InstallError> {
        self.disks.flush().map_err(on_disk)
    }
}

fn on_disk(source: io::Error) -> InstallError {
    InstallError::Call {
        action: "write a disk that comes along",
        source,
    }
}
