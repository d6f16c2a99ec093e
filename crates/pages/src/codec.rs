//! Page codecs: what a page takes on the wire when bytes are dear.
//!
//! * [`lz4`]: fast compression of one or more pages as they are.
//! * [`zstd`]: shorter than that, for more processor time. `[RFC8878]`
//! * [`delta`]: what has changed in a page since an earlier version that the other side has, in runs
//!   (XBZRLE). `[Svard11]`
//!
//! Contract of each: decoding gives back what was encoded; an encoding that would not be smaller than
//! the pages is none; foreign bytes are an error, never a panic, and never more output than the pages
//! that they stand for.
//!
//! Absent on purpose: when to use which, which takes clocks.

/// Why bytes cannot be decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodecError {
    /// They are no encoding at all, or end too soon.
    Malformed,
    /// They stand for more or fewer bytes than the pages that were announced.
    OtherLength,
}

impl core::fmt::Display for CodecError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Malformed => "pages came in an encoding that cannot be read",
            Self::OtherLength => "pages came in an encoding of another length",
        })
    }
}

impl core::error::Error for CodecError {}

/// LZ4 blocks.
pub mod lz4 {
    use super::CodecError;
    use alloc::vec::Vec;
    use lz4_flex::block::{compress_into, decompress_into, get_maximum_output_size};

    /// Appends `pages` compressed to `out`; false, and nothing is appended, if that is not smaller.
    pub fn encode(pages: &[u8], out: &mut Vec<u8>) -> bool {
        let start = out.len();
        out.resize(start + get_maximum_output_size(pages.len()), 0);
        match compress_into(pages, &mut out[start..]) {
            Ok(length) if length < pages.len() => {
                out.truncate(start + length);
                true
            }
            Ok(_) | Err(_) => {
                out.truncate(start);
                false
            }
        }
    }

    /// Fills `pages` from what [`encode`] made of them.
    ///
    /// # Errors
    /// The bytes were made otherwise; `pages` holds anything then.
    pub fn decode(encoded: &[u8], pages: &mut [u8]) -> Result<(), CodecError> {
        match decompress_into(encoded, pages) {
            Ok(length) if length == pages.len() => Ok(()),
            Ok(_) => Err(CodecError::OtherLength),
            Err(_) => Err(CodecError::Malformed),
        }
    }
}

/// Zstandard frames. `[RFC8878]`
///
/// By the format's own library, in C: what is in Rust reads frames, but writes none that are worth
/// their time. It gets slices of known length, and checks what it reads against them.
pub mod zstd {
    use super::CodecError;
    use alloc::vec::Vec;
    use zstd_safe::zstd_sys::ZSTD_ErrorCode;
    use zstd_safe::{CCtx, CParameter, DCtx, ErrorCode};

    /// The level: the fastest that still writes literals shorter (entropy coding), which is what it has
    /// over LZ4. Others: `benches/codecs.rs`.
    pub const LEVEL: i32 = 1;

    /// Writes frames. Its tables are used again for the next: below 1.5 MiB for 256 pages at once,
    /// and nothing before the first.
    pub struct Encoder {
        context: CCtx<'static>,
    }

    /// Reads frames. Its tables take below 256 KiB whatever a frame asks for: there is no window but
    /// the pages themselves.
    pub struct Decoder {
        context: DCtx<'static>,
    }

    impl Encoder {
        /// An encoder of [`LEVEL`].
        ///
        /// # Panics
        /// If there is no memory for some KiB.
        pub fn new() -> Self {
            Self::with_level(LEVEL)
        }

        /// An encoder of another level, for measurements: 1 to 22, or below 0 for quicker and longer.
        ///
        /// # Panics
        /// If there is no memory for some KiB.
        pub fn with_level(level: i32) -> Self {
            let mut context = CCtx::create();
            context
                .set_parameter(CParameter::CompressionLevel(level))
                .expect("the library clamps a level");
            Self { context }
        }

        /// Appends `pages` compressed to `out`, one frame; false, and nothing is appended, if that is
        /// not smaller.
        pub fn encode(&mut self, pages: &[u8], out: &mut Vec<u8>) -> bool {
            let start = out.len();
            // What would take as much as the pages finds no room.
            out.resize(start + pages.len().saturating_sub(1), 0);
            if let Ok(length) = self.context.compress2(&mut out[start..], pages) {
                out.truncate(start + length);
                return true;
            }
            out.truncate(start);
            false
        }

        /// Bytes of memory it takes now.
        pub fn memory_bytes(&self) -> usize {
            self.context.sizeof()
        }
    }

    impl Decoder {
        /// A decoder of frames of all levels.
        ///
        /// # Panics
        /// If there is no memory for 256 KiB.
        pub fn new() -> Self {
            Self {
                context: DCtx::create(),
            }
        }

        /// Fills `pages` from what [`Encoder::encode`] made of them.
        ///
        /// # Errors
        /// The bytes were made otherwise; `pages` holds anything then.
        pub fn decode(&mut self, encoded: &[u8], pages: &mut [u8]) -> Result<(), CodecError> {
            let expected = pages.len();
            match self.context.decompress(pages, encoded) {
                Ok(length) if length == expected => Ok(()),
                Ok(_) => Err(CodecError::OtherLength),
                Err(code) if is_too_small(code) => Err(CodecError::OtherLength),
                Err(_) => Err(CodecError::Malformed),
            }
        }

        /// Bytes of memory it takes now.
        pub fn memory_bytes(&self) -> usize {
            self.context.sizeof()
        }
    }

    /// The library returns the negative of its error's number.
    fn is_too_small(code: ErrorCode) -> bool {
        code.wrapping_neg() == ZSTD_ErrorCode::ZSTD_error_dstSize_tooSmall as usize
    }

    impl Default for Encoder {
        fn default() -> Self {
            Self::new()
        }
    }

    impl Default for Decoder {
        fn default() -> Self {
            Self::new()
        }
    }

    impl core::fmt::Debug for Encoder {
        fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
            f.debug_struct("Encoder").finish_non_exhaustive()
        }
    }

    impl core::fmt::Debug for Decoder {
        fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
            f.debug_struct("Decoder").finish_non_exhaustive()
        }
    }
}

/// The difference of two versions of a page.
///
/// Alternating runs: how many bytes are the same, how many differ, and these. Lengths take one byte
/// below 128 and two otherwise; what is the same at the end is left out.
pub mod delta {
    use super::CodecError;
    use crate::PAGE_SIZE_USIZE;
    use alloc::vec::Vec;

    /// A run of equal bytes that is shorter does not end a run of others: its two lengths would take
    /// more than it saves.
    const SAME_MIN: usize = 4;
    /// Bytes that are compared at once.
    const WORD: usize = 8;

    /// Appends to `out` what turns `old` into `new`; false, and nothing is appended, if that would
    /// take `limit` bytes or more.
    ///
    /// # Panics
    /// If they are not of one length, or longer than a page.
    pub fn encode(old: &[u8], new: &[u8], limit: usize, out: &mut Vec<u8>) -> bool {
        assert_eq!(old.len(), new.len(), "versions of one page");
        assert!(new.len() <= PAGE_SIZE_USIZE, "a page at a time");
        let start = out.len();
        let mut at = 0;
        loop {
            let same = same_bytes(&old[at..], &new[at..]);
            let from = at + same;
            if from == new.len() {
                return true;
            }
            let others = other_bytes(&old[from..], &new[from..]);
            if out.len() - start + others + WORD > limit {
                out.truncate(start);
                return false;
            }
            push_length(same, out);
            push_length(others, out);
            out.extend_from_slice(&new[from..from + others]);
            at = from + others;
        }
    }

    /// Turns the old version in `page` into the new one.
    ///
    /// # Errors
    /// The bytes were not made by [`encode`]; `page` holds anything then.
    pub fn decode(mut encoded: &[u8], page: &mut [u8]) -> Result<(), CodecError> {
        let mut at = 0;
        while !encoded.is_empty() {
            at += take_length(&mut encoded)?;
            let others = take_length(&mut encoded)?;
            let bytes = encoded.get(..others).ok_or(CodecError::Malformed)?;
            let place = page.get_mut(at..at + others);
            place.ok_or(CodecError::OtherLength)?.copy_from_slice(bytes);
            encoded = &encoded[others..];
            at += others;
        }
        Ok(())
    }

    /// How many bytes are the same at the front.
    fn same_bytes(old: &[u8], new: &[u8]) -> usize {
        let words = old.chunks_exact(WORD).zip(new.chunks_exact(WORD));
        let whole = words.take_while(|(old, new)| old == new).count() * WORD;
        let rest = old[whole..].iter().zip(&new[whole..]);
        whole + rest.take_while(|(old, new)| old == new).count()
    }

    /// How many bytes there are before the next ones that are the same, and enough of them.
    fn other_bytes(old: &[u8], new: &[u8]) -> usize {
        let mut same = 0;
        for (at, (old, new)) in old.iter().zip(new).enumerate() {
            same = if old == new { same + 1 } else { 0 };
            if same == SAME_MIN {
                return at + 1 - SAME_MIN;
            }
        }
        new.len() - same
    }

    fn push_length(length: usize, out: &mut Vec<u8>) {
        // At most 4096, so that two times seven bits are enough.
        let [low, high] = [(length & 0x7f) as u8, (length >> 7) as u8];
        if high == 0 {
            out.push(low);
        } else {
            out.extend_from_slice(&[low | 0x80, high]);
        }
    }

    fn take_length(encoded: &mut &[u8]) -> Result<usize, CodecError> {
        let (length, rest) = match **encoded {
            [low, ref rest @ ..] if low < 0x80 => (usize::from(low), rest),
            [low, high, ref rest @ ..] => (usize::from(low & 0x7f) | usize::from(high) << 7, rest),
            _ => return Err(CodecError::Malformed),
        };
        *encoded = rest;
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PAGE_SIZE_USIZE;
    use alloc::vec;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    fn check_lz4(pages: &[u8], is_smaller: bool) {
        let mut out = vec![7];
        assert_eq!(lz4::encode(pages, &mut out), is_smaller);
        if !is_smaller {
            assert_eq!(out, [7]);
            return;
        }
        assert!(out.len() <= pages.len());
        let mut decoded = vec![1; pages.len()];
        lz4::decode(&out[1..], &mut decoded).unwrap();
        assert_eq!(decoded, pages);
        let mut longer = vec![0; pages.len() + 1];
        let refused = lz4::decode(&out[1..], &mut longer);
        assert_eq!(refused, Err(CodecError::OtherLength));
        let refused = lz4::decode(&out[1..], &mut longer[2..]);
        assert!(refused.is_err());
    }

    #[test]
    fn what_does_not_shrink_is_no_encoding() {
        check_lz4(&[1; 4096], true);
        check_lz4(&[1, 2, 3, 4].repeat(2048), true);
        let noise: Vec<u8> = (0..4096_u32)
            .map(|at| {
                (at.wrapping_mul(2_654_435_761) >> 13) as u8 ^ (at.wrapping_mul(40_503) >> 7) as u8
            })
            .collect();
        check_lz4(&noise[..64], false);
    }

    #[test]
    fn an_encoder_is_used_again_and_stays_small() {
        let (mut encoder, mut decoder) = (zstd::Encoder::new(), zstd::Decoder::new());
        let largest = 256 * PAGE_SIZE_USIZE;
        for length in [PAGE_SIZE_USIZE, largest, 2 * PAGE_SIZE_USIZE] {
            let pages: Vec<u8> = (0..length).map(|at| (at * at / 977) as u8 & 0x3f).collect();
            let mut out = vec![7];
            assert!(encoder.encode(&pages, &mut out));
            assert!(out.len() < length / 4 * 3, "{} of {length}", out.len());
            let mut decoded = vec![1; length];
            decoder.decode(&out[1..], &mut decoded).unwrap();
            assert_eq!(decoded, pages);
            let mut longer = vec![0; length + 1];
            let refused = decoder.decode(&out[1..], &mut longer);
            assert_eq!(refused, Err(CodecError::OtherLength));
            let refused = decoder.decode(&out[1..], &mut longer[2..]);
            assert_eq!(refused, Err(CodecError::OtherLength));
            let refused = decoder.decode(&out[1..out.len() - 1], &mut decoded);
            assert_eq!(refused, Err(CodecError::Malformed));
        }
        assert!(
            encoder.memory_bytes() < 3 << 19,
            "{}",
            encoder.memory_bytes()
        );
        assert!(
            decoder.memory_bytes() < 256 << 10,
            "{}",
            decoder.memory_bytes()
        );
        let noise: Vec<u8> = (0..64_u32)
            .map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect();
        let mut out = vec![7];
        assert!(!encoder.encode(&noise, &mut out));
        assert_eq!(out, [7]);
    }

    #[test]
    fn runs_are_told_by_their_lengths() {
        let check = |new: &[u8], expect: &[u8]| {
            let old = vec![0; new.len()];
            let mut out = Vec::new();
            assert!(delta::encode(&old, new, 4096, &mut out));
            assert_eq!(out, expect, "{new:?}");
        };
        check(&[0; 20], &[]);
        check(&[1, 0, 0, 0, 0, 0], &[0, 1, 1]);
        // Three equal bytes are not worth a run of their own, four are.
        check(&[0, 5, 0, 0, 0, 6], &[1, 5, 5, 0, 0, 0, 6]);
        check(&[0, 5, 0, 0, 0, 0, 6], &[1, 1, 5, 4, 1, 6]);
        let mut far = [0; 300];
        far[200] = 9;
        check(&far, &[200 | 0x80, 1, 1, 9]);
    }

    proptest! {
        #[test]
        fn a_delta_makes_the_new_version(
            old in prop::collection::vec(0..3_u8, PAGE_SIZE_USIZE),
            writes in prop::collection::vec((0..PAGE_SIZE_USIZE, any::<u8>(), 1..300_usize), 0..40),
            limit in 0..5000_usize,
        ) {
            let mut new = old.clone();
            for (at, byte, count) in writes {
                new.iter_mut().skip(at).take(count).for_each(|place| *place ^= byte);
            }
            let mut out = Vec::new();
            if delta::encode(&old, &new, limit, &mut out) {
                prop_assert!(out.len() <= limit);
                let mut page = old.clone();
                delta::decode(&out, &mut page).unwrap();
                prop_assert_eq!(page, new);
            } else {
                prop_assert!(out.is_empty());
            }
        }

        #[test]
        fn foreign_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let mut page = vec![0; PAGE_SIZE_USIZE];
            let _delta = delta::decode(&bytes, &mut page);
            let _lz4 = lz4::decode(&bytes, &mut page);
            let _zstd = zstd::Decoder::new().decode(&bytes, &mut page);
        }

        #[test]
        fn damaged_frames_write_their_pages_at_most(at in any::<usize>(), byte in 1..=255_u8, cut in 0..3_usize) {
            let content = b"words of a page ".repeat(PAGE_SIZE_USIZE / 16);
            let mut out = Vec::new();
            prop_assert!(zstd::Encoder::new().encode(&content, &mut out));
            let at = at % out.len();
            out[at] ^= byte;
            out.truncate(out.len() - cut);
            let mut page = vec![7; PAGE_SIZE_USIZE + 64];
            let mut decoder = zstd::Decoder::new();
            let _damaged = decoder.decode(&out, &mut page[..PAGE_SIZE_USIZE]);
            prop_assert_eq!(&page[PAGE_SIZE_USIZE..], &[7; 64]);
            prop_assert!(decoder.memory_bytes() < 256 << 10);
        }

        #[test]
        fn compressed_pages_come_back(
            words in prop::collection::vec(any::<u16>(), 1..50),
            pages in 1..4_usize,
        ) {
            let content: Vec<u8> = (0..pages * PAGE_SIZE_USIZE)
                .map(|at| words[at * 7 % words.len()] as u8)
                .collect();
            let mut out = Vec::new();
            if lz4::encode(&content, &mut out) {
                let mut decoded = vec![0; content.len()];
                lz4::decode(&out, &mut decoded).unwrap();
                prop_assert_eq!(&decoded, &content);
            }
            out.clear();
            let mut decoded = vec![0; content.len()];
            if zstd::Encoder::new().encode(&content, &mut out) {
                zstd::Decoder::new().decode(&out, &mut decoded).unwrap();
                prop_assert_eq!(decoded, content);
            }
        }
    }
}
