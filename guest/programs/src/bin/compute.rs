//! Reads much and writes little: computes results over a table and compares them with known ones.
//!
//! A unit of work reads one block of 64 KiB, chosen at random. The known result was computed from
//! the rule of the table, not from memory, so wrong memory gives a wrong result.
#![no_std]
#![no_main]

use limosa_micro_abi::{BootInfo, PAGE_BYTES};
use limosa_micro_logic::arguments::ComputeArguments;
use limosa_micro_logic::layout::{Share, Wanted};
use limosa_micro_logic::limiter::Limiter;
use limosa_micro_logic::random::Random;
use limosa_micro_logic::table::{Block, known_result};
use limosa_micro_runtime::{Program, Refusal, Sound, Swept, Vcpu, claim};

limosa_micro_runtime::program!(Compute);

const BLOCK_BYTES: u64 = size_of::<Block>() as u64;

struct Compute {
    known: &'static [u64],
    blocks: &'static [Block],
    first_number: u64,
    random: Random,
    limiter: Limiter,
}

impl Program for Compute {
    fn prepare<'a>(
        vcpu: &mut Vcpu,
        boot: &'a BootInfo,
        arguments: &'a str,
    ) -> Result<Self, Refusal<'a>> {
        let arguments = ComputeArguments::parse(arguments)?;
        let wanted = Wanted {
            units: arguments.table_bytes.div_ceil(BLOCK_BYTES),
            unit_bytes: BLOCK_BYTES,
            entry_bytes: size_of::<u64>() as u64,
            touched_pages: 0,
        };
        if wanted.units < u64::from(vcpu.count) {
            return Err(Refusal::Vcpus);
        }
        let heap = boot.heap_start..boot.memory_bytes;
        let share = Share::new(&wanted, heap, vcpu.index, vcpu.count)?;
        // SAFETY: shares lie in the heap, are page aligned and disjoint, within a vCPU and among
        // them; this is the only place that claims them; integers take any bytes.
        let (known, blocks) = unsafe {
            (
                claim::<u64>(&share.table),
                claim::<Block>(&share.working_set),
            )
        };
        let known = &mut known[..blocks.len()];
        for (index, (block, known)) in blocks.iter_mut().zip(known.iter_mut()).enumerate() {
            let unit = share.first_unit + index as u64;
            block.fill(arguments.seed, unit, || {
                vcpu.look();
            });
            *known = known_result(arguments.seed, unit);
            vcpu.look();
        }
        let now = vcpu.look();
        Ok(Self {
            known,
            blocks,
            first_number: share.working_set.start / PAGE_BYTES,
            random: Random::new(arguments.seed, vcpu.index),
            limiter: Limiter::new(arguments.rate, vcpu.count, vcpu.ticks, now),
        })
    }

    fn step(&mut self, vcpu: &mut Vcpu, now: u64) -> bool {
        if !self.limiter.take(now) {
            return false;
        }
        let index = self.random.below(self.blocks.len() as u64) as usize;
        self.check(vcpu, index);
        vcpu.report.work += 1;
        true
    }

    fn sweep(&mut self, vcpu: &mut Vcpu) -> Swept {
        let mut swept = Swept::default();
        for index in 0..self.blocks.len() {
            swept.count(BLOCK_BYTES / PAGE_BYTES, self.check(vcpu, index));
            let now = vcpu.look();
            self.step(vcpu, now);
        }
        swept
    }
}

impl Compute {
    fn check(&self, vcpu: &mut Vcpu, index: usize) -> Sound {
        let page = self.first_number + index as u64 * (BLOCK_BYTES / PAGE_BYTES);
        vcpu.note(page, self.blocks[index].verify(self.known[index]))
    }
}
