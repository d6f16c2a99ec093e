//! A set of missing pages on the wire: runs where it has few, bits where it has many.
//!
//! Source to target it says which pages are stale, target to source which ones have not come; the
//! form is the same, the kind of the header tells which.

use limosa_engine::wire::{
    MISSING_PAGES_MAX, PUSH_HEADER_BYTES, PullHeader, PushHeader, bits_bytes,
};
use limosa_pages::{PageCount, PageRange, PageSet, Pfn};

/// What a header speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// All pages of the range.
    Run(PageRange),
    /// Those whose bits are set in the words behind it.
    Bits(PageRange),
}

impl Part {
    /// As the source says it.
    pub(crate) const fn stale(self) -> PushHeader {
        match self {
            Self::Run(range) => PushHeader::Stale(range),
            Self::Bits(range) => PushHeader::StaleBits(range),
        }
    }

    /// As the target says it.
    pub(crate) const fn missing(self) -> PullHeader {
        match self {
            Self::Run(range) => PullHeader::Missing(range),
            Self::Bits(range) => PullHeader::MissingBits(range),
        }
    }
}

/// The members of `set` within `range`, each part with the words behind it.
pub(crate) fn encode(set: &PageSet, range: PageRange) -> Vec<(Part, Vec<u8>)> {
    let window = u64::from(MISSING_PAGES_MAX);
    let mut parts: Vec<(Part, Vec<u8>)> = Vec::new();
    let mut first = range.first.get();
    while first < range.end().get() {
        // Windows begin where a word does, except for the first one.
        let end = (first / window * window + window).min(range.end().get());
        let part = PageRange::new(Pfn::new(first), PageCount::new(end - first));
        encode_window(set, part, &mut parts);
        first = end;
    }
    parts
}

fn encode_window(set: &PageSet, window: PageRange, parts: &mut Vec<(Part, Vec<u8>)>) {
    let first = Pfn::new(window.first.get() / 64 * 64);
    let count = window.end().get() - first.get();
    let bits = PageRange::new(first, PageCount::new(count));
    let runs: Vec<PageRange> = set.runs_in(window).collect();
    let is_aligned = first == window.first || runs.is_empty();
    if runs.len() * PUSH_HEADER_BYTES <= PUSH_HEADER_BYTES + bits_bytes(bits) || !is_aligned {
        parts.extend(runs.into_iter().map(|run| (Part::Run(run), Vec::new())));
        return;
    }
    let from = usize::try_from(first.get() / 64).expect("a word of the set");
    let words = &set.words()[from..from + bits_bytes(bits) / 8];
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    // Bits beyond the window belong to somebody else's part.
    let used = count % 64;
    if used != 0 {
        let last = bytes.len() - 8;
        let word = set.words()[from + last / 8] & ((1 << used) - 1);
        bytes[last..].copy_from_slice(&word.to_le_bytes());
    }
    parts.push((Part::Bits(bits), bytes));
}

/// The runs of pages that words behind a header of `range` stand for, whatever a peer put there.
pub(crate) fn decode(range: PageRange, bytes: &[u8]) -> Vec<PageRange> {
    let mut set = PageSet::empty(range.count);
    set.fill_words(|index| {
        let at = index * 8;
        let mut word = [0; 8];
        if let Some(bytes) = bytes.get(at..at + 8) {
            word.copy_from_slice(bytes);
        }
        u64::from_le_bytes(word)
    });
    set.runs()
        .map(|run| PageRange::new(Pfn::new(range.first.get() + run.first.get()), run.count))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(capacity: u64, range: (u64, u64), member: impl Fn(u64) -> bool, expect: &str) {
        let mut set = PageSet::empty(PageCount::new(capacity));
        (0..capacity).filter(|&page| member(page)).for_each(|page| {
            set.insert(Pfn::new(page));
        });
        let range = PageRange::new(Pfn::new(range.0), PageCount::new(range.1 - range.0));
        let mut back = PageSet::empty(PageCount::new(capacity));
        let mut text = Vec::new();
        for (part, bytes) in encode(&set, range) {
            match part {
                Part::Run(run) => {
                    text.push(format!("r{}+{}", run.first.get(), run.count.get()));
                    back.insert_range(run);
                }
                Part::Bits(bits) => {
                    assert_eq!(bytes.len(), bits_bytes(bits));
                    text.push(format!("b{}+{}", bits.first.get(), bits.count.get()));
                    decode(bits, &bytes)
                        .into_iter()
                        .for_each(|run| back.insert_range(run));
                }
            }
        }
        let inside = |page: &Pfn| page.get() >= range.first.get() && *page < range.end();
        let wanted: Vec<Pfn> = set.iter().filter(inside).collect();
        assert_eq!(back.iter().collect::<Vec<_>>(), wanted);
        assert_eq!(text.join(" "), expect);
    }

    #[test]
    fn a_set_survives_the_wire_in_its_shorter_form() {
        check(100, (0, 100), |_| false, "");
        check(100, (0, 100), |_| true, "r0+100");
        check(200, (0, 200), |page| page % 2 == 0, "b0+200");
        check(200, (64, 130), |page| page % 2 == 0, "b64+66");
        check(
            70_000,
            (0, 70_000),
            |page| page % 3 == 0,
            "b0+32768 b32768+32768 b65536+4464",
        );
        check(
            70_000,
            (0, 70_000),
            |page| page > 32_000,
            "r32001+767 r32768+32768 r65536+4464",
        );
    }

    #[test]
    fn foreign_words_stay_inside_the_range() {
        let range = PageRange::new(Pfn::new(64), PageCount::new(70));
        let runs = decode(range, &[0xff; 16]);
        assert_eq!(runs, [range]);
        assert!(decode(range, &[0xff; 3]).is_empty());
    }
}
