//! Memory for texts of any length: equal blocks, of which each text has a chain.
//!
//! ```text
//!  first block │next│owners, last │ 52 bytes │ ─▶ │next│ 60 bytes │ ─▶ …
//! ```
//!
//! Equal blocks never leave gaps that nobody can use, so memory is full when it is full and not before.
//! Texts of the same bytes are cut into the same pieces, so pieces can be compared and hashed one by one.
//! A text that is being sent is kept by a count of its owners, while another one takes its place.
//!
//! Blocks that nobody has used yet are not touched: memory that a store does not need stays untouched.

/// Bytes of a block.
const BLOCK_BYTES: usize = 64;
/// Bytes of text in a block.
const PIECE_BYTES: usize = BLOCK_BYTES - 4;
/// Where the text begins in the first block, behind the number of owners and of the last block.
const HEAD_BYTES: usize = 8;
/// Bytes of text in the first block.
const FIRST_PIECE_BYTES: usize = PIECE_BYTES - HEAD_BYTES;
/// Where the number of the last block is.
const LAST: usize = 4;
/// The number of no block.
const NONE: u32 = 0;

/// A block; any bytes are one.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub struct Block {
    next: u32,
    bytes: [u8; PIECE_BYTES],
}

/// A text in blocks. It has to be given back to them: nothing happens when it is dropped.
#[derive(Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[must_use]
pub struct Text {
    first: u32,
    len: u32,
}

/// No block is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// All blocks.
#[derive(Debug)]
pub struct Blocks<'a> {
    blocks: &'a mut [Block],
    /// The first block that was never used, and so are all behind it.
    fresh: u32,
    /// The first of those that were given back.
    free: u32,
    used: u32,
}

impl Block {
    /// An empty block.
    pub const ZERO: Self = Self {
        next: 0,
        bytes: [0; PIECE_BYTES],
    };

    fn word(&self, at: usize) -> u32 {
        let bytes = self.bytes[at..at + 4].try_into();
        u32::from_le_bytes(bytes.expect("four bytes are four bytes"))
    }

    fn set_word(&mut self, at: usize, word: u32) {
        self.bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
    }
}

impl Text {
    /// A text without bytes, which needs no block.
    pub const EMPTY: Self = Self { first: 0, len: 0 };

    /// Its bytes.
    #[must_use]
    pub const fn len(&self) -> u32 {
        self.len
    }

    /// Whether it has none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The text, and an empty one in its place.
    pub const fn take(&mut self) -> Self {
        core::mem::replace(self, Self::EMPTY)
    }

    const fn block_count(&self) -> u32 {
        if self.len == 0 {
            return 0;
        }
        1 + self
            .len
            .saturating_sub(FIRST_PIECE_BYTES as u32)
            .div_ceil(PIECE_BYTES as u32)
    }

    /// Bytes in its last block that are text.
    const fn last_piece_bytes(&self) -> usize {
        let len = self.len as usize;
        match len.checked_sub(FIRST_PIECE_BYTES) {
            None | Some(0) => len,
            Some(others) => (others - 1) % PIECE_BYTES + 1,
        }
    }
}

impl<'a> Blocks<'a> {
    /// Takes blocks of any content.
    #[must_use]
    pub fn new(blocks: &'a mut [Block]) -> Self {
        Self {
            blocks,
            // The first one has the number of none.
            fresh: 1,
            free: NONE,
            used: 0,
        }
    }

    /// How many are in use.
    #[must_use]
    pub const fn used(&self) -> u32 {
        self.used
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u32 {
        u32::try_from(self.blocks.len().saturating_sub(1)).unwrap_or(u32::MAX)
    }

    fn take(&mut self) -> Result<u32, Full> {
        let taken = if self.free != NONE {
            let taken = self.free;
            self.free = self.blocks[taken as usize].next;
            taken
        } else if (self.fresh as usize) < self.blocks.len() && self.fresh < u32::MAX {
            self.fresh += 1;
            self.fresh - 1
        } else {
            return Err(Full);
        };
        self.blocks[taken as usize].next = NONE;
        self.used += 1;
        Ok(taken)
    }

    /// Adds bytes to a text that has one owner.
    ///
    /// # Errors
    /// There is no room. What fitted is part of the text.
    ///
    /// # Panics
    /// The text would have 4 GiB.
    pub fn append(&mut self, text: &mut Text, mut bytes: &[u8]) -> Result<(), Full> {
        if bytes.is_empty() {
            return Ok(());
        }
        if text.first == NONE {
            text.first = self.take()?;
            let first = &mut self.blocks[text.first as usize];
            first.set_word(0, 1);
            first.set_word(LAST, text.first);
        }
        let mut last = self.blocks[text.first as usize].word(LAST);
        let begin = if last == text.first { HEAD_BYTES } else { 0 };
        let mut at = begin + text.last_piece_bytes();
        loop {
            let (now, later) = bytes.split_at(bytes.len().min(PIECE_BYTES - at));
            self.blocks[last as usize].bytes[at..at + now.len()].copy_from_slice(now);
            text.len += now.len() as u32;
            bytes = later;
            if bytes.is_empty() {
                return Ok(());
            }
            let next = self.take()?;
            self.blocks[last as usize].next = next;
            self.blocks[text.first as usize].set_word(LAST, next);
            (last, at) = (next, 0);
        }
    }

    /// A text of these bytes.
    ///
    /// # Errors
    /// There is no room for it; nothing is taken then.
    pub fn text(&mut self, bytes: &[u8]) -> Result<Text, Full> {
        let mut text = Text::EMPTY;
        match self.append(&mut text, bytes) {
            Ok(()) => Ok(text),
            Err(full) => {
                self.release(text);
                Err(full)
            }
        }
    }

    /// The same text for one more owner.
    pub fn share(&mut self, text: &Text) -> Text {
        if let Some(first) = self.first(text) {
            let owners = first.word(0);
            first.set_word(0, owners + 1);
        }
        Text { ..*text }
    }

    fn first(&mut self, text: &Text) -> Option<&mut Block> {
        (text.first != NONE).then(|| &mut self.blocks[text.first as usize])
    }

    /// Gives a text back. Its blocks are free when the last owner has done so.
    pub fn release(&mut self, text: Text) {
        let free = self.free;
        let Some(first) = self.first(&text) else {
            return;
        };
        let owners = first.word(0) - 1;
        first.set_word(0, owners);
        if owners > 0 {
            return;
        }
        let last = first.word(LAST);
        self.blocks[last as usize].next = free;
        self.free = text.first;
        self.used -= text.block_count();
    }

    /// The bytes, piece by piece.
    pub fn pieces<'b>(&'b self, text: &Text) -> impl Iterator<Item = &'b [u8]> + use<'b, 'a> {
        let mut place = Place::start_of(text);
        core::iter::from_fn(move || {
            let piece = self.piece(&place);
            self.advance(&mut place, piece.len());
            (!piece.is_empty()).then_some(piece)
        })
    }

    /// What lies at that place and behind it within the same block; nothing at the end.
    #[must_use]
    pub fn piece(&self, place: &Place) -> &[u8] {
        if place.left == 0 {
            return &[];
        }
        let piece = &self.blocks[place.block as usize].bytes[usize::from(place.at)..];
        &piece[..piece.len().min(place.left as usize)]
    }

    /// Goes on by some bytes of the piece.
    pub fn advance(&self, place: &mut Place, bytes: usize) {
        place.left -= bytes as u32;
        place.at += bytes as u8;
        if usize::from(place.at) == PIECE_BYTES && place.left > 0 {
            place.block = self.blocks[place.block as usize].next;
            place.at = 0;
        }
    }

    /// Whether two texts have the same bytes.
    #[must_use]
    pub fn equal(&self, one: &Text, other: &Text) -> bool {
        one.len == other.len && self.pieces(one).eq(self.pieces(other))
    }

    /// Copies a short text; `None` if it is longer than that.
    #[must_use]
    pub fn copy<'b>(&self, text: &Text, into: &'b mut [u8]) -> Option<&'b [u8]> {
        let into = into.get_mut(..text.len as usize)?;
        let mut at = 0;
        for piece in self.pieces(text) {
            into[at..at + piece.len()].copy_from_slice(piece);
            at += piece.len();
        }
        Some(into)
    }
}

#[cfg(test)]
impl Blocks<'_> {
    /// Changes a byte of the first block that begins with that text.
    pub(super) fn damage(&mut self, text: &[u8]) {
        let mut all = self.blocks.iter_mut();
        let found = all.find(|block| block.bytes[HEAD_BYTES..].starts_with(text));
        found.unwrap().bytes[HEAD_BYTES] ^= 1;
    }
}

/// A place in a text.
#[derive(Clone, Copy, Debug, Default)]
pub struct Place {
    block: u32,
    at: u8,
    left: u32,
}

impl Place {
    /// Before its first byte.
    #[must_use]
    pub const fn start_of(text: &Text) -> Self {
        Self {
            block: text.first,
            at: HEAD_BYTES as u8,
            left: text.len,
        }
    }

    /// How many bytes lie behind it.
    #[must_use]
    pub const fn left(&self) -> u32 {
        self.left
    }
}

const _: () = assert!(size_of::<Block>() == BLOCK_BYTES);
