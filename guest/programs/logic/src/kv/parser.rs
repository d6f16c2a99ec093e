//! What a client asks for: RESP2, as arrays of texts or as words in a line.
//!
//! ```text
//!           ┌── `*` ─▶ Count ─▶ Mark `$` ─▶ Length ─▶ Bytes ─▶ End ──▶ request
//!  Begin ───┤                      ▲───────────────────────────┘
//!           └── else ─▶ Line: words up to the end of the line ───────▶ request
//! ```
//!
//! Bytes may come in pieces of any size. An argument for which there is no room, and those that are too many,
//! are read over to their end, so that the client hears why and may go on. What breaks the protocol ends the
//! connection, since nobody knows where the next request would begin.

use super::blocks::{Blocks, Text};

/// Most arguments of a request, its name included.
pub const ARGUMENTS_MAX: usize = 128;
/// Most arguments that are read over, as redis has it.
const COUNT_MAX: i64 = 1 << 20;
/// Longest argument: the limit of redis.
const LENGTH_MAX: i64 = 512 << 20;
/// Longest line of words, as redis has it.
const LINE_BYTES_MAX: u32 = 64 << 10;
/// Longest number: any of 64 bits, with a sign.
const DIGITS_MAX: u8 = 20;

/// What the next byte belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    Begin,
    Count(Number),
    Mark,
    Length(Number),
    Bytes(u32),
    /// The two bytes behind an argument: how many are left.
    End(u8),
    Line {
        bytes: u32,
        in_word: bool,
    },
    /// Nothing any more.
    Broken,
}

/// A number as far as it was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Number {
    value: i64,
    digits: u8,
    is_negative: bool,
    is_over: bool,
}

/// Why a request is not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Full,
    TooMany,
}

/// How far it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// All bytes were read.
    NeedsMore,
    /// A request is complete: it is in the arguments, or was refused.
    Request(Option<Refusal>),
    /// The protocol is broken, in that way.
    Broken(&'static str),
}

/// Reads requests of one client.
#[derive(Debug)]
pub(super) struct Parser {
    expect: Expect,
    /// Arguments of this request that are still to come.
    left: u32,
    arguments: [Text; ARGUMENTS_MAX],
    count: usize,
    refusal: Option<Refusal>,
}

impl Number {
    /// Takes a byte; true at the end of the line.
    fn take(&mut self, byte: u8) -> Result<bool, ()> {
        match byte {
            b'\n' if self.is_over && self.digits > 0 => return Ok(true),
            b'\r' if !self.is_over => self.is_over = true,
            b'-' if self.digits == 0 && !self.is_negative && !self.is_over => {
                self.is_negative = true;
            }
            b'0'..=b'9' if !self.is_over && self.digits < DIGITS_MAX => {
                self.digits += 1;
                let value = self.value.checked_mul(10).ok_or(())?;
                self.value = value.checked_add(i64::from(byte - b'0')).ok_or(())?;
            }
            _ => return Err(()),
        }
        Ok(false)
    }

    const fn get(self) -> i64 {
        if self.is_negative {
            -self.value
        } else {
            self.value
        }
    }
}

impl Parser {
    pub(super) const fn new() -> Self {
        Self {
            expect: Expect::Begin,
            left: 0,
            arguments: [Text::EMPTY; ARGUMENTS_MAX],
            count: 0,
            refusal: None,
        }
    }

    /// The arguments of the request that is complete. They are the caller's, who takes what it keeps.
    pub(super) fn arguments(&mut self) -> &mut [Text] {
        &mut self.arguments[..self.count]
    }

    /// Forgets the arguments that nobody has taken.
    pub(super) fn clear(&mut self, blocks: &mut Blocks<'_>) {
        for argument in &mut self.arguments[..self.count] {
            blocks.release(argument.take());
        }
        self.count = 0;
    }

    /// Begins anew, for another client.
    pub(super) fn reset(&mut self, blocks: &mut Blocks<'_>) {
        self.clear(blocks);
        (self.expect, self.left, self.refusal) = (Expect::Begin, 0, None);
    }

    /// Reads up to the end of a request; how many bytes it has read.
    pub(super) fn feed(&mut self, blocks: &mut Blocks<'_>, input: &[u8]) -> (usize, Step) {
        let mut at = 0;
        while let Some(rest) = input.get(at..).filter(|rest| !rest.is_empty()) {
            if self.expect == Expect::Begin && rest[0] != b'*' {
                self.expect = Expect::Line {
                    bytes: 0,
                    in_word: false,
                };
            }
            let (read, step) = match self.expect {
                Expect::Bytes(left) => self.take_bytes(blocks, left, rest),
                Expect::Line { bytes, in_word } => self.take_words(blocks, bytes, in_word, rest),
                _ => (1, self.take_byte(rest[0])),
            };
            at += read;
            if let Some(step) = step {
                if matches!(step, Step::Broken(_)) {
                    self.expect = Expect::Broken;
                }
                return (at, step);
            }
        }
        (at, Step::NeedsMore)
    }

    fn take_byte(&mut self, byte: u8) -> Option<Step> {
        let broken = |why| Some(Step::Broken(why));
        match self.expect {
            Expect::Begin if byte == b'*' => self.expect = Expect::Count(Number::default()),
            Expect::Begin => unreachable!("a line is taken elsewhere"),
            Expect::Count(mut number) => match number.take(byte) {
                Ok(false) => self.expect = Expect::Count(number),
                Ok(true) => return self.begin_array(number.get()),
                Err(()) => return broken("invalid multibulk length"),
            },
            Expect::Mark if byte == b'$' => self.expect = Expect::Length(Number::default()),
            Expect::Mark => return broken("expected '$'"),
            Expect::Length(mut number) => match number.take(byte) {
                Ok(false) => self.expect = Expect::Length(number),
                Ok(true) => return self.begin_bytes(number.get()),
                Err(()) => return broken("invalid bulk length"),
            },
            Expect::End(2) if byte == b'\r' => self.expect = Expect::End(1),
            Expect::End(1) if byte == b'\n' => return self.end_argument(),
            Expect::End(_) => return broken("expected the end of a line"),
            Expect::Broken => return broken("it was broken before"),
            Expect::Bytes(_) | Expect::Line { .. } => unreachable!("taken elsewhere"),
        }
        None
    }

    fn begin_array(&mut self, count: i64) -> Option<Step> {
        if count > COUNT_MAX {
            return Some(Step::Broken("invalid multibulk length"));
        }
        // Less than one is no request, and no mistake.
        self.left = u32::try_from(count).unwrap_or(0);
        self.expect = if self.left > 0 {
            Expect::Mark
        } else {
            Expect::Begin
        };
        None
    }

    fn begin_bytes(&mut self, length: i64) -> Option<Step> {
        let Some(length) = u32::try_from(length).ok().filter(|_| length <= LENGTH_MAX) else {
            return Some(Step::Broken("invalid bulk length"));
        };
        self.begin_argument();
        self.expect = if length > 0 {
            Expect::Bytes(length)
        } else {
            Expect::End(2)
        };
        None
    }

    fn begin_argument(&mut self) {
        if self.count < ARGUMENTS_MAX {
            self.count += 1;
        } else {
            self.refusal.get_or_insert(Refusal::TooMany);
        }
    }

    /// Adds to the last argument.
    fn append(&mut self, blocks: &mut Blocks<'_>, bytes: &[u8]) {
        if self.refusal.is_some() {
            return;
        }
        let last = &mut self.arguments[self.count - 1];
        if blocks.append(last, bytes).is_err() {
            self.refusal = Some(Refusal::Full);
            // Others have use for it.
            self.clear(blocks);
        }
    }

    fn take_bytes(
        &mut self,
        blocks: &mut Blocks<'_>,
        left: u32,
        rest: &[u8],
    ) -> (usize, Option<Step>) {
        let now = rest.len().min(left as usize);
        self.append(blocks, &rest[..now]);
        self.expect = match left - now as u32 {
            0 => Expect::End(2),
            left => Expect::Bytes(left),
        };
        (now, None)
    }

    fn end_argument(&mut self) -> Option<Step> {
        self.left -= 1;
        if self.left > 0 {
            self.expect = Expect::Mark;
            return None;
        }
        self.end_request()
    }

    fn end_request(&mut self) -> Option<Step> {
        self.expect = Expect::Begin;
        Some(Step::Request(self.refusal.take()))
    }

    /// Takes the rest of a word, or what lies between two.
    fn take_words(
        &mut self,
        blocks: &mut Blocks<'_>,
        bytes: u32,
        in_word: bool,
        rest: &[u8],
    ) -> (usize, Option<Step>) {
        let is_word = |byte: &u8| !byte.is_ascii_whitespace() && !b"\0\"'".contains(byte);
        let word = rest.iter().take_while(|byte| is_word(byte)).count();
        let read = word.max(1);
        let bytes = bytes.saturating_add(read as u32);
        self.expect = Expect::Line {
            bytes,
            in_word: word > 0,
        };
        if bytes > LINE_BYTES_MAX {
            return (read, Some(Step::Broken("too big inline request")));
        }
        if word > 0 {
            if !in_word {
                self.begin_argument();
            }
            self.append(blocks, &rest[..word]);
            return (read, None);
        }
        let step = match rest[0] {
            b'\n' if self.count == 0 && self.refusal.is_none() => {
                self.expect = Expect::Begin;
                None
            }
            b'\n' => self.end_request(),
            b'\0' | b'"' | b'\'' => Some(Step::Broken("quotes are not taken in a line")),
            _ => None,
        };
        (read, step)
    }
}
