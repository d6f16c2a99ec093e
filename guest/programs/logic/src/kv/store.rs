//! Which value a key has: a hash table with open addressing, of a fixed number of slots.
//!
//! A key lies in the first free slot at or behind the one that its hash names; what is removed is filled by
//! those behind it that would rather be there, so no slot is ever marked as deleted and a search ends at the
//! first empty one. The slots are as many as memory has room for entries, so the table never grows, and a
//! slot that was never needed was never touched.
//!
//! Each entry keeps a sum over its value. A look at every slot therefore tells whether all of memory is what
//! was written there: keys lie where their hash leads to, values have their sums.

use super::blocks::{Block, Blocks, Full, Text};
use limosa_micro_abi::PAGE_BYTES;

use crate::random::{GOLDEN, mix};

/// Slots that are counted together.
pub const GROUP_SLOTS: usize = 128;
/// Memory for each slot: the slot, and blocks for a small key and value with little to spare.
const BYTES_PER_SLOT: u64 = 128;
/// Marks a slot in use; the other bits are those of the hash.
const IN_USE: u32 = 1 << 31;

/// A place for an entry; all zero if there is none.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Slot {
    key: Text,
    value: Text,
    mark: u32,
    sum: u32,
}

/// Keys, values and the memory for both.
#[derive(Debug)]
pub struct Store<'a> {
    /// The memory for texts, of which clients' arguments take their part.
    pub blocks: Blocks<'a>,
    slots: &'a mut [Slot],
    /// How many slots of each group are in use, so that others need not be looked at.
    groups: &'a mut [u8],
    len: u32,
    seed: u64,
}

/// How memory is divided: how many there are of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Slots of the table.
    pub slots: usize,
    /// Groups of slots.
    pub groups: usize,
    /// Blocks.
    pub blocks: usize,
}

impl Shape {
    /// Divides memory of so many bytes, where slots, groups and blocks begin at pages.
    #[must_use]
    pub const fn of(bytes: u64) -> Self {
        let slots = bytes / BYTES_PER_SLOT;
        let groups = slots.div_ceil(GROUP_SLOTS as u64);
        let table = (slots * size_of::<Slot>() as u64).next_multiple_of(PAGE_BYTES);
        let others = bytes.saturating_sub(table + groups.next_multiple_of(PAGE_BYTES));
        let blocks = others / size_of::<Block>() as u64;
        Self {
            slots: slots as usize,
            groups: groups as usize,
            // Numbers of blocks have 32 bits.
            blocks: if blocks < u32::MAX as u64 {
                blocks as usize
            } else {
                u32::MAX as usize
            },
        }
    }
}

/// What is wrong with a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// A search for its key does not lead there: the hash that it was put in by, and the one that it has.
    Key(u32, u32),
    /// Its value has another sum: the one that was kept, and the one that it has.
    Value(u32, u32),
    /// Another number of slots of a group is in use: the one that was counted, and the one that is.
    Count(u32, u32),
}

impl<'a> Store<'a> {
    /// An empty store over slots and groups that are all zero. Keys are scattered by the seed, which those who choose
    /// keys should not know.
    ///
    /// # Panics
    /// There is no slot, or there are not as many groups as slots need.
    #[must_use]
    pub fn new(slots: &'a mut [Slot], groups: &'a mut [u8], blocks: Blocks<'a>, seed: u64) -> Self {
        assert!(!slots.is_empty(), "a store has a slot");
        assert_eq!(groups.len(), slots.len().div_ceil(GROUP_SLOTS));
        Self {
            blocks,
            slots,
            groups,
            len: 0,
            seed,
        }
    }

    /// How many entries it has.
    #[must_use]
    pub const fn len(&self) -> u32 {
        self.len
    }

    /// Whether it has none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many slots there are.
    #[must_use]
    pub fn slot_count(&self) -> usize {
        self.slots.len()
    }

    /// How many groups there are.
    #[must_use]
    pub fn group_count(&self) -> usize {
        self.groups.len()
    }

    /// Most entries: searches stay short while some slots are empty.
    fn len_max(&self) -> usize {
        self.slots.len() / 8 * 7
    }

    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &Text) -> Option<&Text> {
        let index = self.find(key, self.mark_of(key)).ok()?;
        Some(&self.slots[index].value)
    }

    /// The value of a key, for one more owner.
    pub fn get_shared(&mut self, key: &Text) -> Option<Text> {
        let index = self.find(key, self.mark_of(key)).ok()?;
        Some(self.blocks.share(&self.slots[index].value))
    }

    /// Gives a key a value and takes both.
    ///
    /// # Errors
    /// There is no slot for another key. Both are given back to the blocks.
    pub fn set(&mut self, key: Text, value: Text) -> Result<(), Full> {
        let mark = self.mark_of(&key);
        let sum = self.sum(&value);
        match self.find(&key, mark) {
            Ok(index) => {
                let slot = &mut self.slots[index];
                let old = core::mem::replace(&mut slot.value, value);
                slot.sum = sum;
                self.blocks.release(old);
                self.blocks.release(key);
                Ok(())
            }
            Err(index) if (self.len as usize) < self.len_max() => {
                let slot = Slot {
                    key,
                    value,
                    mark,
                    sum,
                };
                self.fill_slot(index, slot);
                self.len += 1;
                Ok(())
            }
            Err(_) => {
                self.blocks.release(key);
                self.blocks.release(value);
                Err(Full)
            }
        }
    }

    /// Forgets a key; false if there was none.
    pub fn remove(&mut self, key: &Text) -> bool {
        let Ok(index) = self.find(key, self.mark_of(key)) else {
            return false;
        };
        let Slot { key, value, .. } = self.empty_slot(index);
        self.blocks.release(key);
        self.blocks.release(value);
        self.len -= 1;
        self.close_gap(index);
        true
    }

    fn fill_slot(&mut self, index: usize, slot: Slot) {
        self.slots[index] = slot;
        self.groups[index / GROUP_SLOTS] += 1;
    }

    fn empty_slot(&mut self, index: usize) -> Slot {
        self.groups[index / GROUP_SLOTS] -= 1;
        core::mem::take(&mut self.slots[index])
    }

    /// Fills an empty slot by the next entry that would rather be there, and so on.
    fn close_gap(&mut self, mut gap: usize) {
        let mut index = gap;
        loop {
            index = self.after(index);
            let mark = self.slots[index].mark;
            if mark == 0 {
                return;
            }
            // How far each lies behind the slot that the hash names, in the order of a search.
            let home = self.home(mark);
            if self.distance(home, index) >= self.distance(gap, index) {
                let slot = self.empty_slot(index);
                self.fill_slot(gap, slot);
                gap = index;
            }
        }
    }

    /// The key in a slot.
    #[cfg(test)]
    pub(super) fn shared_key(&mut self, index: usize) -> Option<Text> {
        let slot = &self.slots[index];
        (slot.mark != 0).then(|| self.blocks.share(&slot.key))
    }

    /// Looks whether all slots of a group are sound. One of which none is in use is not touched.
    ///
    /// # Errors
    /// What is wrong first.
    pub fn check_group(&self, group: usize) -> Result<(), Damage> {
        let counted = self.groups[group];
        if counted == 0 {
            return Ok(());
        }
        let first = group * GROUP_SLOTS;
        let mut used = 0;
        for index in first..self.slots.len().min(first + GROUP_SLOTS) {
            used += u32::from(self.check(index)?);
        }
        if used != u32::from(counted) {
            return Err(Damage::Count(counted.into(), used));
        }
        Ok(())
    }

    /// Looks whether a slot is sound; false if it is empty.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn check(&self, index: usize) -> Result<bool, Damage> {
        let slot = &self.slots[index];
        if slot.mark == 0 {
            return Ok(false);
        }
        let mark = self.mark_of(&slot.key);
        if self.find(&slot.key, mark) != Ok(index) {
            return Err(Damage::Key(slot.mark, mark));
        }
        let sum = self.sum(&slot.value);
        if sum != slot.sum {
            return Err(Damage::Value(slot.sum, sum));
        }
        Ok(true)
    }

    /// The slot of a key, or the empty one in which it would be.
    fn find(&self, key: &Text, mark: u32) -> Result<usize, usize> {
        let mut index = self.home(mark);
        loop {
            let slot = &self.slots[index];
            if slot.mark == 0 {
                return Err(index);
            }
            if slot.mark == mark && self.blocks.equal(&slot.key, key) {
                return Ok(index);
            }
            index = self.after(index);
        }
    }

    /// The slot that a hash names. Larger hashes never name smaller slots.
    fn home(&self, mark: u32) -> usize {
        let hash = u64::from(mark & !IN_USE);
        ((hash * self.slots.len() as u64) >> 31) as usize
    }

    const fn after(&self, index: usize) -> usize {
        if index + 1 == self.slots.len() {
            0
        } else {
            index + 1
        }
    }

    const fn distance(&self, from: usize, to: usize) -> usize {
        if to >= from {
            to - from
        } else {
            to + self.slots.len() - from
        }
    }

    fn mark_of(&self, key: &Text) -> u32 {
        (self.hash(key, self.seed) >> 32) as u32 | IN_USE
    }

    fn sum(&self, value: &Text) -> u32 {
        self.hash(value, GOLDEN) as u32
    }

    fn hash(&self, text: &Text, seed: u64) -> u64 {
        let mut hash = mix(seed ^ u64::from(text.len()));
        for piece in self.blocks.pieces(text) {
            for bytes in piece.chunks(8) {
                let mut word = [0; 8];
                word[..bytes.len()].copy_from_slice(bytes);
                let word = u64::from_le_bytes(word);
                hash = (hash.rotate_left(23) ^ word).wrapping_mul(GOLDEN);
            }
        }
        mix(hash)
    }
}
