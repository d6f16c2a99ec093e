//! Rewrites pages that prove themselves: the guest by which a migration is judged.
//!
//! Every page of the working set carries its number, a version and a checksum of all its bytes.
//! Before a page is rewritten it must be the one that was written last: its version is compared
//! with a table that lies in other pages. So lost pages, stale pages, torn pages and pages of
//! somebody else are all seen, at the latest by a sweep. Beside the working set there may be
//! memory that is filled once and then only swept.
//!
//! Each vCPU has its own part of all this and shares nothing.
#![no_std]
#![no_main]

use limosa_micro_abi::{BootInfo, ErrorKind, PAGE_BYTES};
use limosa_micro_logic::arguments::WriterArguments;
use limosa_micro_logic::layout::{Share, Wanted};
use limosa_micro_logic::limiter::Limiter;
use limosa_micro_logic::page::{Content, Fault, Page};
use limosa_micro_logic::pattern::Chooser;
use limosa_micro_logic::random::Random;
use limosa_micro_runtime::{Program, Refusal, Sound, Swept, Vcpu, claim};

limosa_micro_runtime::program!(Writer);

/// Version of a page that was written for the first time.
const FIRST_VERSION: u32 = 1;

/// Versions that are added up between two looks at the clock: some microseconds.
const VERSIONS_BETWEEN_LOOKS: usize = 4096;

struct Writer {
    /// Versions of the pages of the working set, modulo 2^32.
    versions: &'static mut [u32],
    pages: &'static mut [Page],
    touched: &'static [Page],
    /// Numbers of the first page of each, in the memory file.
    pages_number: u64,
    touched_number: u64,
    chooser: Chooser,
    random: Random,
    limiter: Limiter,
    reads_percent: u64,
    content: Content,
    /// What all versions add up to, modulo 2^32; kept apart from the table.
    versions_sum: u32,
}

impl Program for Writer {
    fn prepare<'a>(
        vcpu: &mut Vcpu,
        boot: &'a BootInfo,
        arguments: &'a str,
    ) -> Result<Self, Refusal<'a>> {
        let arguments = WriterArguments::parse(arguments)?;
        let wanted = Wanted {
            units: arguments.working_set_bytes / PAGE_BYTES,
            unit_bytes: PAGE_BYTES,
            entry_bytes: size_of::<u32>() as u64,
            touched_pages: arguments.touched_bytes / PAGE_BYTES,
        };
        if wanted.units < u64::from(vcpu.count) {
            return Err(Refusal::Vcpus);
        }
        let heap = boot.heap_start..boot.memory_bytes;
        let share = Share::new(&wanted, heap, vcpu.index, vcpu.count)?;
        // SAFETY: shares lie in the heap, are page aligned and disjoint, within a vCPU and among
        // them; this is the only place that claims them; integers take any bytes.
        let (versions, pages, touched) = unsafe {
            (
                claim::<u32>(&share.table),
                claim::<Page>(&share.working_set),
                claim::<Page>(&share.touched),
            )
        };
        let versions = &mut versions[..pages.len()];
        versions.fill(FIRST_VERSION);
        let pages_number = share.working_set.start / PAGE_BYTES;
        let touched_number = share.touched.start / PAGE_BYTES;
        write_all(vcpu, pages, pages_number, arguments.content);
        write_all(vcpu, touched, touched_number, arguments.content);
        let now = vcpu.look();
        Ok(Self {
            versions_sum: FIRST_VERSION.wrapping_mul(pages.len() as u32),
            chooser: Chooser::new(arguments.pattern, pages.len() as u64, vcpu.ticks, now),
            random: Random::new(arguments.seed, vcpu.index),
            limiter: Limiter::new(arguments.rate, vcpu.count, vcpu.ticks, now),
            reads_percent: if u64::from(vcpu.index).saturating_add(arguments.readers)
                >= vcpu.count.into()
            {
                100
            } else {
                arguments.reads_percent
            },
            content: arguments.content,
            versions,
            pages,
            touched,
            pages_number,
            touched_number,
        })
    }

    #[inline]
    fn step(&mut self, vcpu: &mut Vcpu, now: u64) -> bool {
        if !self.limiter.take(now) {
            return false;
        }
        let index = self.chooser.choose(&mut self.random, now) as usize;
        self.check(vcpu, index);
        if self.reads_percent > 0 && self.random.below(100) < self.reads_percent {
            vcpu.report.reads += 1;
        } else {
            self.rewrite(index);
            vcpu.report.work += 1;
        }
        true
    }

    /// Goes on writing meanwhile, so that a sweep does not look like a guest that stands still.
    fn sweep(&mut self, vcpu: &mut Vcpu) -> Swept {
        let mut swept = Swept::default();
        for index in 0..self.pages.len() {
            swept.count(1, self.check(vcpu, index));
            let now = vcpu.look();
            self.step(vcpu, now);
        }
        for index in 0..self.touched.len() {
            let number = self.touched_number + index as u64;
            let result = self.touched[index].verify(number, u64::from(FIRST_VERSION));
            swept.count(1, vcpu.note(number, result));
            let now = vcpu.look();
            self.step(vcpu, now);
        }
        let result = self.verify_sum(vcpu);
        swept.count(0, vcpu.note(self.pages_number, result));
        swept
    }
}

impl Writer {
    /// Whether the page is the one that was written last.
    #[inline]
    fn check(&self, vcpu: &mut Vcpu, index: usize) -> Sound {
        let number = self.pages_number + index as u64;
        let version = u64::from(self.versions[index]);
        vcpu.note(number, self.pages[index].verify(number, version))
    }

    #[inline]
    fn rewrite(&mut self, index: usize) {
        let number = self.pages_number + index as u64;
        let version = self.versions[index].wrapping_add(1);
        self.pages[index].write(number, u64::from(version), self.content);
        self.versions[index] = version;
        self.versions_sum = self.versions_sum.wrapping_add(1);
    }

    /// A table and its pages could be stale together; the count of all writes would still tell.
    fn verify_sum(&mut self, vcpu: &mut Vcpu) -> Result<(), Fault> {
        let mut sum = 0_u32;
        for versions in self.versions.chunks(VERSIONS_BETWEEN_LOOKS) {
            sum = versions
                .iter()
                .fold(sum, |sum, &version| sum.wrapping_add(version));
            vcpu.look();
        }
        let expected = core::mem::replace(&mut self.versions_sum, sum);
        if sum == expected {
            return Ok(());
        }
        Err(Fault {
            kind: ErrorKind::VersionSum,
            expected: u64::from(expected),
            found: u64::from(sum),
        })
    }
}

fn write_all(vcpu: &mut Vcpu, pages: &mut [Page], first_number: u64, content: Content) {
    for (index, page) in pages.iter_mut().enumerate() {
        page.write(
            first_number + index as u64,
            u64::from(FIRST_VERSION),
            content,
        );
        vcpu.look();
    }
}
