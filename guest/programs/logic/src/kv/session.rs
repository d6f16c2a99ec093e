//! What one client is answered.
//!
//! Requests are carried out one by one, each only if there is room for any short answer. Values are longer:
//! they are shared with the store, piece after piece goes out as there is room, and the next request waits.
//! So a client that does not read its answers is not heard any more, and costs nobody anything.

use super::blocks::{Blocks, Full, Place, Text};
use super::parser::{ARGUMENTS_MAX, Parser, Refusal, Step};
use super::store::Store;
use core::fmt::{self, Write};

/// Room for any answer but a value.
pub const REPLY_BYTES_MAX: usize = 512;
/// Longest name of a command.
const NAME_BYTES_MAX: usize = 16;
/// Longest number as text, with its sign.
const NUMBER_BYTES_MAX: usize = 20;

/// Where answers go.
#[derive(Debug)]
pub struct Output<'a> {
    bytes: &'a mut [u8],
    len: usize,
}

impl<'a> Output<'a> {
    /// An output with room for so many bytes.
    #[must_use]
    pub const fn new(bytes: &'a mut [u8]) -> Self {
        Self { bytes, len: 0 }
    }

    /// How many bytes were answered.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing was answered.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What was answered.
    #[must_use]
    pub fn bytes_so_far(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    const fn room(&self) -> usize {
        self.bytes.len() - self.len
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }
}

/// Answers that are too long for the room that was waited for are our own mistake.
impl Write for Output<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.put(text.as_bytes());
        Ok(())
    }
}

/// A value, or that there is none.
#[derive(Debug)]
enum Found {
    Value(Text),
    Nothing,
}

/// What is still to be answered of a request: values, as one or in an array.
#[derive(Debug)]
struct Values {
    found: [Found; ARGUMENTS_MAX],
    count: usize,
    next: usize,
    /// Within a value whose length was told.
    place: Option<Place>,
}

/// A client.
#[derive(Debug)]
pub struct Session {
    parser: Parser,
    values: Values,
    is_over: bool,
    requests: u64,
}

/// What follows from a request.
enum Answer {
    Given,
    Over,
}

impl Default for Session {
    fn default() -> Self {
        Self::new()
    }
}

impl Session {
    /// A client that has said nothing yet.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            parser: Parser::new(),
            values: Values {
                found: [const { Found::Nothing }; ARGUMENTS_MAX],
                count: 0,
                next: 0,
                place: None,
            },
            is_over: false,
            requests: 0,
        }
    }

    /// Whether the client is to go, once it has got all answers.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        self.is_over && self.values.count == 0
    }

    /// Whether nothing is left to be answered of what it has sent so far.
    #[must_use]
    pub const fn is_idle(&self) -> bool {
        self.values.count == 0
    }

    /// How many requests were carried out since the last time that this was asked.
    pub const fn take_requests(&mut self) -> u64 {
        core::mem::replace(&mut self.requests, 0)
    }

    /// Forgets the client and gives back all that it holds.
    pub fn reset(&mut self, store: &mut Store<'_>) {
        self.parser.reset(&mut store.blocks);
        self.values.clear(&mut store.blocks);
        self.is_over = false;
    }

    /// Reads what the client has sent and answers as far as there is room; how many bytes it has read.
    pub fn serve(&mut self, store: &mut Store<'_>, input: &[u8], output: &mut Output<'_>) -> usize {
        let mut read = 0;
        loop {
            self.values.emit(&mut store.blocks, output);
            if self.values.count > 0 {
                return read;
            }
            if self.is_over {
                // Nobody will read the rest.
                return input.len();
            }
            if output.room() < REPLY_BYTES_MAX {
                return read;
            }
            let (bytes, step) = self.parser.feed(&mut store.blocks, &input[read..]);
            read += bytes;
            match step {
                Step::NeedsMore => return read,
                Step::Request(refusal) => {
                    self.requests += 1;
                    let answer = match refusal {
                        None => self.obey(store, output),
                        Some(why) => refuse(why, output),
                    };
                    self.parser.clear(&mut store.blocks);
                    self.is_over = matches!(answer, Answer::Over);
                }
                Step::Broken(why) => {
                    self.parser.clear(&mut store.blocks);
                    error(output, format_args!("ERR Protocol error: {why}"));
                    self.is_over = true;
                }
            }
        }
    }

    fn obey(&mut self, store: &mut Store<'_>, output: &mut Output<'_>) -> Answer {
        let [name, arguments @ ..] = self.parser.arguments() else {
            return Answer::Given;
        };
        let mut place = [0; NAME_BYTES_MAX];
        let len = match store.blocks.copy(name, &mut place) {
            Some(name) => name.len(),
            None => 0,
        };
        let name = &mut place[..len];
        name.make_ascii_uppercase();
        match (&*name, arguments.len()) {
            (b"PING", 0) => simple(output, "PONG"),
            (b"PING" | b"ECHO", 1) => self.values.one(Found::Value(arguments[0].take())),
            (b"GET", 1) => {
                let found = look_up(store, &arguments[0]);
                self.values.one(found);
            }
            (b"MGET", 1..) => {
                put(output, format_args!("*{}\r\n", arguments.len()));
                for key in arguments {
                    let found = look_up(store, key);
                    self.values.one(found);
                }
            }
            (b"SET", 2) => {
                let (key, value) = (arguments[0].take(), arguments[1].take());
                match store.set(key, value) {
                    Ok(()) => simple(output, "OK"),
                    Err(Full) => out_of_memory(output),
                }
            }
            (b"SET", 3..) => error(
                output,
                format_args!("ERR syntax error: SET takes no options"),
            ),
            (b"DEL", 1..) => {
                let removed = arguments.iter().filter(|key| store.remove(key)).count();
                number(output, removed as i64);
            }
            (b"EXISTS", 1..) => {
                let there = arguments.iter().filter(|key| store.get(key).is_some());
                number(output, there.count() as i64);
            }
            (b"INCR", 1) => increment(store, arguments[0].take(), output),
            (b"DBSIZE", 0) => number(output, i64::from(store.len())),
            (b"INFO", _) => info(store, output),
            // Nobody needs to know them all to use some.
            (b"COMMAND", _) => put(output, format_args!("*0\r\n")),
            (b"CONFIG", 1..) => self.configure(store, output),
            (b"SELECT", 1) => select(store, &arguments[0], output),
            (b"QUIT", 0) => {
                simple(output, "OK");
                return Answer::Over;
            }
            (name, _) => not_so(name, output),
        }
        Answer::Given
    }

    /// Tells a setting: each is there, and says nothing.
    fn configure(&mut self, store: &mut Store<'_>, output: &mut Output<'_>) {
        let mut place = [0; NAME_BYTES_MAX];
        let arguments = self.parser.arguments();
        let what = store.blocks.copy(&arguments[1], &mut place);
        let is_get = what.is_some_and(|what| what.eq_ignore_ascii_case(b"GET"));
        match arguments {
            [_, _, name] if is_get => {
                put(output, format_args!("*2\r\n"));
                self.values.one(Found::Value(name.take()));
                self.values.one(Found::Value(Text::EMPTY));
            }
            _ => error(
                output,
                format_args!("ERR only CONFIG GET with one name is known"),
            ),
        }
    }
}

impl Values {
    /// Adds one to be answered. There are no more than arguments of a request.
    fn one(&mut self, found: Found) {
        self.found[self.count] = found;
        self.count += 1;
    }

    fn clear(&mut self, blocks: &mut Blocks<'_>) {
        for found in &mut self.found[self.next..self.count] {
            if let Found::Value(text) = core::mem::replace(found, Found::Nothing) {
                blocks.release(text);
            }
        }
        (self.count, self.next, self.place) = (0, 0, None);
    }

    /// Answers as much as there is room for.
    fn emit(&mut self, blocks: &mut Blocks<'_>, output: &mut Output<'_>) {
        while self.next < self.count {
            let text = match &mut self.found[self.next] {
                Found::Value(text) => text,
                Found::Nothing if output.room() < REPLY_BYTES_MAX => return,
                Found::Nothing => {
                    put(output, format_args!("$-1\r\n"));
                    self.next += 1;
                    continue;
                }
            };
            let place = match &mut self.place {
                Some(place) => place,
                None if output.room() < REPLY_BYTES_MAX => return,
                None => {
                    put(output, format_args!("${}\r\n", text.len()));
                    self.place.insert(Place::start_of(text))
                }
            };
            while place.left() > 0 {
                let piece = blocks.piece(place);
                let bytes = piece.len().min(output.room());
                if bytes == 0 {
                    return;
                }
                output.put(&piece[..bytes]);
                blocks.advance(place, bytes);
            }
            if output.room() < 2 {
                return;
            }
            output.put(b"\r\n");
            blocks.release(text.take());
            self.place = None;
            self.found[self.next] = Found::Nothing;
            self.next += 1;
        }
        self.clear(blocks);
    }
}

fn look_up(store: &mut Store<'_>, key: &Text) -> Found {
    match store.get_shared(key) {
        Some(value) => Found::Value(value),
        None => Found::Nothing,
    }
}

/// Adds one to a number and takes its key.
fn increment(store: &mut Store<'_>, key: Text, output: &mut Output<'_>) {
    let mut place = [0; NUMBER_BYTES_MAX];
    let old = match store.get(&key) {
        None => Some(0),
        Some(value) => store.blocks.copy(value, &mut place).and_then(parse_number),
    };
    let new = old.map(|old| old.checked_add(1));
    let Some(Some(new)) = new else {
        store.blocks.release(key);
        let why = if old.is_none() {
            "value is not an integer or out of range"
        } else {
            "increment or decrement would overflow"
        };
        return error(output, format_args!("ERR {why}"));
    };
    let mut text = Output::new(&mut place);
    put(&mut text, format_args!("{new}"));
    let len = text.len();
    let value = match store.blocks.text(&place[..len]) {
        Ok(value) => value,
        Err(Full) => {
            store.blocks.release(key);
            return out_of_memory(output);
        }
    };
    match store.set(key, value) {
        Ok(()) => number(output, new),
        Err(Full) => out_of_memory(output),
    }
}

/// A number as redis takes it: no sign but a minus, no needless zeros.
fn parse_number(text: &[u8]) -> Option<i64> {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    let is_plain = match digits {
        [b'0'] => text.len() == 1,
        [b'1'..=b'9', ..] => true,
        _ => false,
    };
    let text = core::str::from_utf8(text).ok().filter(|_| is_plain)?;
    text.parse().ok()
}

fn select(store: &Store<'_>, index: &Text, output: &mut Output<'_>) {
    let mut place = [0; NUMBER_BYTES_MAX];
    match store.blocks.copy(index, &mut place) {
        Some(b"0") => simple(output, "OK"),
        _ => error(output, format_args!("ERR DB index is out of range")),
    }
}

fn info(store: &Store<'_>, output: &mut Output<'_>) {
    let mut place = [0; REPLY_BYTES_MAX / 2];
    let mut text = Output::new(&mut place);
    put(
        &mut text,
        format_args!(
            "# limosa kv\r\nkeys:{}\r\nkeys_max:{}\r\nused_memory:{}\r\nmaxmemory:{}\r\n",
            store.len(),
            store.slot_count(),
            u64::from(store.blocks.used()) * size_of::<super::Block>() as u64,
            u64::from(store.blocks.count()) * size_of::<super::Block>() as u64,
        ),
    );
    let len = text.len();
    put(output, format_args!("${len}\r\n"));
    output.put(&place[..len]);
    output.put(b"\r\n");
}

fn not_so(name: &[u8], output: &mut Output<'_>) {
    const KNOWN: [&[u8]; 12] = [
        b"PING", b"ECHO", b"GET", b"MGET", b"SET", b"DEL", b"EXISTS", b"INCR", b"DBSIZE",
        b"CONFIG", b"SELECT", b"QUIT",
    ];
    if !KNOWN.contains(&name) {
        return error(output, format_args!("ERR unknown command"));
    }
    let name = core::str::from_utf8(name).unwrap_or_default();
    error(
        output,
        format_args!("ERR wrong number of arguments for {name}"),
    );
}

fn refuse(why: Refusal, output: &mut Output<'_>) -> Answer {
    match why {
        Refusal::Full => out_of_memory(output),
        Refusal::TooMany => error(
            output,
            format_args!("ERR too many arguments: a request has at most {ARGUMENTS_MAX}"),
        ),
    }
    Answer::Given
}

fn out_of_memory(output: &mut Output<'_>) {
    error(output, format_args!("OOM the guest's memory is full"));
}

fn error(output: &mut Output<'_>, text: fmt::Arguments<'_>) {
    put(output, format_args!("-{text}\r\n"));
}

fn simple(output: &mut Output<'_>, text: &str) {
    put(output, format_args!("+{text}\r\n"));
}

fn number(output: &mut Output<'_>, number: i64) {
    put(output, format_args!(":{number}\r\n"));
}

fn put(output: &mut Output<'_>, text: fmt::Arguments<'_>) {
    output
        .write_fmt(text)
        .expect("an output takes all that there is room for");
}
