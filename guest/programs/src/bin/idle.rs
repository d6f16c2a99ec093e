//! Does nothing but live: beats, and now and then looks whether a page of its own is still sound.
//!
//! What a host full of sleeping guests looks like to a migration: hardly a page is ever dirtied
//! but those of the reports and stacks.
#![no_std]
#![no_main]

use limosa_micro_abi::{BootInfo, PAGE_BYTES};
use limosa_micro_logic::arguments;
use limosa_micro_logic::layout::{Share, Wanted};
use limosa_micro_logic::limiter::{Limiter, Rate};
use limosa_micro_logic::page::{Content, Page};
use limosa_micro_runtime::{Program, Refusal, Sound, Swept, Vcpu, claim};

limosa_micro_runtime::program!(Idle);

/// Pages that each vCPU keeps an eye on.
const PAGES: u64 = 16;

/// Checks a second, by each vCPU.
const CHECKS_PER_SECOND: u64 = 1000;

const VERSION: u64 = 1;

struct Idle {
    pages: &'static [Page],
    first_number: u64,
    next: usize,
    limiter: Limiter,
}

impl Program for Idle {
    fn prepare<'a>(
        vcpu: &mut Vcpu,
        boot: &'a BootInfo,
        arguments: &'a str,
    ) -> Result<Self, Refusal<'a>> {
        arguments::parse_none(arguments)?;
        let wanted = Wanted {
            units: PAGES * u64::from(vcpu.count),
            unit_bytes: PAGE_BYTES,
            entry_bytes: 0,
            touched_pages: 0,
        };
        let heap = boot.heap_start..boot.memory_bytes;
        let share = Share::new(&wanted, heap, vcpu.index, vcpu.count)?;
        // SAFETY: the share lies in the heap, is page aligned and no other vCPU's; this is the
        // only place that claims it; integers take any bytes.
        let pages = unsafe { claim::<Page>(&share.working_set) };
        let first_number = share.working_set.start / PAGE_BYTES;
        for (index, page) in pages.iter_mut().enumerate() {
            page.write(first_number + index as u64, VERSION, Content::Noise);
        }
        let rate = Rate::PerSecond(CHECKS_PER_SECOND);
        let now = vcpu.look();
        Ok(Self {
            pages,
            first_number,
            next: 0,
            limiter: Limiter::new(rate, 1, vcpu.ticks, now),
        })
    }

    fn step(&mut self, vcpu: &mut Vcpu, now: u64) -> bool {
        if !self.limiter.take(now) {
            return false;
        }
        self.check(vcpu, self.next);
        self.next = (self.next + 1) % self.pages.len();
        vcpu.report.work += 1;
        true
    }

    fn sweep(&mut self, vcpu: &mut Vcpu) -> Swept {
        let mut swept = Swept::default();
        for index in 0..self.pages.len() {
            swept.count(1, self.check(vcpu, index));
        }
        swept
    }
}

impl Idle {
    fn check(&self, vcpu: &mut Vcpu, index: usize) -> Sound {
        let number = self.first_number + index as u64;
        vcpu.note(number, self.pages[index].verify(number, VERSION))
    }
}
