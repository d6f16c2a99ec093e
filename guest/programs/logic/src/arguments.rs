//! Arguments: `key=value` separated by blanks.
//!
//! Sizes may end in K, M, G or T (powers of 1024). A key that is not known, stands twice, or has a
//! value that cannot be meant, is refused by name: a guest that ran with another load than the one
//! asked for would spoil a measurement without a word.

use core::fmt;
use core::net::Ipv4Addr;

use limosa_micro_abi::PAGE_BYTES;

use crate::limiter::Rate;
use crate::page::Content;
use crate::pattern::Pattern;

/// Why arguments were refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadArgument<'a> {
    /// The argument as it stands in the text.
    pub argument: &'a str,
    /// What had to stand there.
    pub expected: &'static str,
}

impl fmt::Display for BadArgument<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bad argument '{}': {}", self.argument, self.expected)
    }
}

/// Arguments that every program takes, since they are about how it lives and not what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LifeArguments {
    /// `rest`: how a vCPU passes the time in which nothing is due.
    pub rest: Rest,
    /// `monitor`: who hears its beats and gives it commands.
    pub monitor: Monitor,
}

/// How a vCPU passes the time in which nothing is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// It sleeps on the host.
    Wait,
    /// It looks at the clock.
    Spin,
}

/// Whose guest this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Monitor {
    /// One that has all the ports.
    Limosa,
    /// One that has the console and nothing else.
    Foreign,
}

/// Arguments of the writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriterArguments {
    /// `ws`: bytes of the working set.
    pub working_set_bytes: u64,
    /// `rate`: page operations a second over all vCPUs.
    pub rate: Rate,
    /// `pattern`: which page is next.
    pub pattern: Pattern,
    /// `reads`: percentage of operations that only verify.
    pub reads_percent: u64,
    /// `readers`: how many vCPUs, of the last ones, do nothing else.
    pub readers: u64,
    /// `seed` of the random generator.
    pub seed: u64,
    /// `touch`: bytes that are filled once.
    pub touched_bytes: u64,
    /// `content`: what fills the pages.
    pub content: Content,
}

/// Arguments of the compute program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ComputeArguments {
    /// `ws`: bytes of the table.
    pub table_bytes: u64,
    /// `rate`: blocks a second over all vCPUs.
    pub rate: Rate,
    /// `seed` of the table and of the random generator.
    pub seed: u64,
}

/// Arguments of the key-value program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvArguments {
    /// `ip`: its address and the bits of its network.
    pub address: Ipv4Addr,
    /// The bits of its network.
    pub prefix_bits: u8,
    /// `gateway`: who leads to other networks.
    pub gateway: Option<Ipv4Addr>,
    /// `port`: where it listens.
    pub port: u16,
    /// `connections`: most clients at a time.
    pub connections: usize,
}

impl LifeArguments {
    /// Picks the arguments of this kind; all others are left to the program.
    ///
    /// # Errors
    /// The first argument of this kind that cannot be used.
    pub fn parse(text: &str) -> Result<Self, BadArgument<'_>> {
        let mut rest = None;
        let mut monitor = Monitor::Limosa;
        for argument in arguments(text) {
            let Argument { whole, key, value } = argument?;
            let refuse = |expected| BadArgument {
                argument: whole,
                expected,
            };
            match (key, value) {
                ("rest", "wait") => rest = Some(Rest::Wait),
                ("rest", "spin") => rest = Some(Rest::Spin),
                ("rest", _) => return Err(refuse("one of wait, spin")),
                ("monitor", "limosa") => monitor = Monitor::Limosa,
                ("monitor", "foreign") => monitor = Monitor::Foreign,
                ("monitor", _) => return Err(refuse("one of limosa, foreign")),
                _ => {}
            }
        }
        // Nobody else lets a guest sleep: each try would only cost an exit.
        let usual = match monitor {
            Monitor::Limosa => Rest::Wait,
            Monitor::Foreign => Rest::Spin,
        };
        Ok(Self {
            rest: rest.unwrap_or(usual),
            monitor,
        })
    }
}

/// Whether an argument is one of [`LifeArguments`], which were read before.
fn is_of_life(key: &str) -> bool {
    matches!(key, "rest" | "monitor")
}

impl WriterArguments {
    /// Reads the writer's arguments.
    ///
    /// # Errors
    /// The first argument that cannot be used.
    pub fn parse(text: &str) -> Result<Self, BadArgument<'_>> {
        let mut this = Self {
            working_set_bytes: 64 << 20,
            rate: Rate::PerSecond(10_000),
            pattern: Pattern::Uniform,
            reads_percent: 0,
            readers: 0,
            seed: 1,
            touched_bytes: 0,
            content: Content::Noise,
        };
        for argument in arguments(text) {
            let Argument { whole, key, value } = argument?;
            let refuse = |expected| BadArgument {
                argument: whole,
                expected,
            };
            match key {
                "ws" => this.working_set_bytes = pages(value, 1).ok_or(refuse(WANT_PAGES))?,
                "rate" => this.rate = rate(value).ok_or(refuse(WANT_RATE))?,
                "pattern" => this.pattern = pattern(value).ok_or(refuse(WANT_PATTERN))?,
                "reads" => this.reads_percent = percent(value).ok_or(refuse(WANT_PERCENT))?,
                "readers" => this.readers = number(value).ok_or(refuse(WANT_NUMBER))?,
                "seed" => this.seed = number(value).ok_or(refuse(WANT_NUMBER))?,
                "touch" => this.touched_bytes = pages(value, 0).ok_or(refuse(WANT_TOUCH))?,
                "content" => this.content = content(value).ok_or(refuse(WANT_CONTENT))?,
                _ if is_of_life(key) => {}
                _ => {
                    return Err(refuse(
                        "known are ws, rate, pattern, reads, readers, seed, touch, content, rest, monitor",
                    ));
                }
            }
        }
        Ok(this)
    }
}

impl ComputeArguments {
    /// Reads the compute program's arguments.
    ///
    /// # Errors
    /// The first argument that cannot be used.
    pub fn parse(text: &str) -> Result<Self, BadArgument<'_>> {
        let mut this = Self {
            table_bytes: 64 << 20,
            rate: Rate::Max,
            seed: 1,
        };
        for argument in arguments(text) {
            let Argument { whole, key, value } = argument?;
            let refuse = |expected| BadArgument {
                argument: whole,
                expected,
            };
            match key {
                "ws" => this.table_bytes = pages(value, 1).ok_or(refuse(WANT_PAGES))?,
                "rate" => this.rate = rate(value).ok_or(refuse(WANT_RATE))?,
                "seed" => this.seed = number(value).ok_or(refuse(WANT_NUMBER))?,
                _ if is_of_life(key) => {}
                _ => return Err(refuse("known are ws, rate, seed, rest, monitor")),
            }
        }
        Ok(this)
    }
}

impl KvArguments {
    /// Reads the key-value program's arguments.
    ///
    /// # Errors
    /// The first argument that cannot be used, or that an address is missing.
    pub fn parse(text: &str) -> Result<Self, BadArgument<'_>> {
        let mut address = None;
        let (mut gateway, mut port, mut connections) = (None, 6379, CONNECTIONS);
        for argument in arguments(text) {
            let Argument { whole, key, value } = argument?;
            let refuse = |expected| BadArgument {
                argument: whole,
                expected,
            };
            match key {
                "ip" => address = Some(network(value).ok_or(refuse(WANT_ADDRESS))?),
                "gateway" => gateway = Some(value.parse().map_err(|_| refuse(WANT_GATEWAY))?),
                "port" => port = in_range(value, 1, 65_535).ok_or(refuse(WANT_PORT))?,
                "connections" => {
                    let most = u64::from(CONNECTIONS_MAX);
                    connections = in_range(value, 1, most).ok_or(refuse(WANT_CONNECTIONS))?;
                }
                _ if is_of_life(key) => {}
                _ => {
                    return Err(refuse(
                        "known are ip, gateway, port, connections, rest, monitor",
                    ));
                }
            }
        }
        let (address, prefix_bits) = address.ok_or(BadArgument {
            argument: "ip",
            expected: WANT_ADDRESS,
        })?;
        Ok(Self {
            address,
            prefix_bits,
            gateway,
            port,
            connections: usize::from(connections),
        })
    }
}

/// Checks that there are no arguments but those of every program.
///
/// # Errors
/// The first other argument, if there is one.
pub fn parse_none(text: &str) -> Result<(), BadArgument<'_>> {
    let is_other = |argument: &&str| {
        let key = argument.split_once('=').map(|(key, _)| key);
        !key.is_some_and(is_of_life)
    };
    match text.split_ascii_whitespace().find(is_other) {
        None => Ok(()),
        Some(argument) => Err(BadArgument {
            argument,
            expected: "this program takes no arguments but rest and monitor",
        }),
    }
}

const WANT_PAGES: &str = "a size of at least one page, such as 4096, 64M or 1G";
const WANT_TOUCH: &str = "a size, such as 0, 64M or 1G";
const WANT_RATE: &str = "operations a second from 1 to 1000000000, or max";
const WANT_CONTENT: &str = "one of noise, text";
const WANT_PATTERN: &str = "one of seq, uniform, zipf, phases";
const WANT_PERCENT: &str = "a percentage from 0 to 100";
const WANT_NUMBER: &str = "a whole number";
const WANT_ADDRESS: &str = "the guest's own address, such as ip=10.0.0.2/24";
const WANT_GATEWAY: &str = "an address, such as 10.0.0.1";
const WANT_PORT: &str = "a port from 1 to 65535";
const WANT_CONNECTIONS: &str = "a number from 1 to 256";

/// One that ends is in use until its client has heard so, while the same client makes others already.
const CONNECTIONS: u16 = 128;
/// Each connection has its buffers, and each packet that comes is compared with all of them.
const CONNECTIONS_MAX: u16 = 256;

/// Above this a rate cannot be reached by any machine and is a slip of the pen.
const RATE_MAX: u64 = 1_000_000_000;

struct Argument<'a> {
    whole: &'a str,
    key: &'a str,
    value: &'a str,
}

fn arguments(text: &str) -> impl Iterator<Item = Result<Argument<'_>, BadArgument<'_>>> {
    let tokens = || text.split_ascii_whitespace();
    tokens().enumerate().map(move |(index, whole)| {
        let refuse = |expected| BadArgument {
            argument: whole,
            expected,
        };
        let (key, value) = whole.split_once('=').ok_or(refuse("must be key=value"))?;
        let same = |other: &str| other.split_once('=').is_some_and(|(first, _)| first == key);
        if tokens().take(index).any(same) {
            return Err(refuse("stands twice"));
        }
        Ok(Argument { whole, key, value })
    })
}

fn number(value: &str) -> Option<u64> {
    // The parser of the standard library takes a plus sign, which is nowhere meant here.
    value
        .bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| value.parse().ok())?
}

fn in_range(value: &str, least: u64, most: u64) -> Option<u16> {
    let number = number(value)?;
    let is_in = (least..=most).contains(&number);
    is_in.then(|| u16::try_from(number).ok())?
}

/// An address of one interface, with the bits of its network.
fn network(value: &str) -> Option<(Ipv4Addr, u8)> {
    let (address, bits) = value.split_once('/')?;
    let address: Ipv4Addr = address.parse().ok()?;
    let bits = in_range(bits, 1, 32)?;
    let is_one = !address.is_unspecified() && !address.is_multicast() && !address.is_broadcast();
    is_one.then_some((address, bits as u8))
}

fn size(value: &str) -> Option<u64> {
    let shift = match value.bytes().last()? {
        b'K' => 10,
        b'M' => 20,
        b'G' => 30,
        b'T' => 40,
        _ => return number(value),
    };
    let (digits, _) = value.split_at(value.len() - 1);
    number(digits)?.checked_mul(1 << shift)
}

/// A size in whole pages: a rest is rounded down.
fn pages(value: &str, pages_min: u64) -> Option<u64> {
    let bytes = size(value)?;
    (bytes >= pages_min * PAGE_BYTES).then_some(bytes - bytes % PAGE_BYTES)
}

fn rate(value: &str) -> Option<Rate> {
    if value == "max" {
        return Some(Rate::Max);
    }
    let count = number(value)?;
    (1..=RATE_MAX)
        .contains(&count)
        .then_some(Rate::PerSecond(count))
}

fn pattern(value: &str) -> Option<Pattern> {
    match value {
        "seq" => Some(Pattern::Sequential),
        "uniform" => Some(Pattern::Uniform),
        "zipf" => Some(Pattern::Zipf),
        "phases" => Some(Pattern::Phases),
        _ => None,
    }
}

fn content(value: &str) -> Option<Content> {
    match value {
        "noise" => Some(Content::Noise),
        "text" => Some(Content::Text),
        _ => None,
    }
}

fn percent(value: &str) -> Option<u64> {
    number(value).filter(|&percent| percent <= 100)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    #[test]
    fn all_arguments_are_read() {
        let text = "ws=256M rate=max  pattern=zipf reads=20 readers=2 seed=9 touch=1G content=text";
        let expected = WriterArguments {
            working_set_bytes: 256 << 20,
            rate: Rate::Max,
            pattern: Pattern::Zipf,
            reads_percent: 20,
            readers: 2,
            seed: 9,
            touched_bytes: 1 << 30,
            content: Content::Text,
        };
        assert_eq!(WriterArguments::parse(text), Ok(expected));
        let expected = ComputeArguments {
            table_bytes: 4096,
            rate: Rate::PerSecond(5),
            seed: 1,
        };
        assert_eq!(ComputeArguments::parse("rate=5 ws=8191"), Ok(expected));
        assert!(WriterArguments::parse("").is_ok());
        assert_eq!(parse_none(" "), Ok(()));
    }

    #[test]
    fn arguments_of_every_program_are_read_apart() {
        let check = |text: &str, expect: Result<(Rest, Monitor), &str>| {
            let read = LifeArguments::parse(text).map(|life| (life.rest, life.monitor));
            let said = read.as_ref().err().map(ToString::to_string);
            assert_eq!(read.ok(), expect.ok(), "{text}");
            assert_eq!(said.as_deref(), expect.err(), "{text}");
        };
        check("ws=4K", Ok((Rest::Wait, Monitor::Limosa)));
        check("rest=spin ws=4K", Ok((Rest::Spin, Monitor::Limosa)));
        check("monitor=foreign", Ok((Rest::Spin, Monitor::Foreign)));
        check(
            "rest=sleep",
            Err("bad argument 'rest=sleep': one of wait, spin"),
        );
        check(
            "monitor=me",
            Err("bad argument 'monitor=me': one of limosa, foreign"),
        );
        let both = "rest=spin monitor=foreign";
        assert!(WriterArguments::parse(both).is_ok());
        assert!(ComputeArguments::parse(both).is_ok());
        assert_eq!(parse_none(both), Ok(()));
    }

    #[test]
    fn addresses_are_read() {
        let expected = KvArguments {
            address: Ipv4Addr::new(10, 0, 0, 2),
            prefix_bits: 24,
            gateway: Some(Ipv4Addr::new(10, 0, 0, 1)),
            port: 7,
            connections: 9,
        };
        let text = "ip=10.0.0.2/24 gateway=10.0.0.1 port=7 connections=9 rest=spin";
        assert_eq!(KvArguments::parse(text), Ok(expected));
        let short = KvArguments::parse("ip=10.0.0.2/24").unwrap();
        assert_eq!((short.port, short.connections), (6379, 128));
        let check = |text: &str, message: &str| {
            let refused = KvArguments::parse(text).unwrap_err().to_string();
            assert_eq!(refused, message);
        };
        let own = "the guest's own address, such as ip=10.0.0.2/24";
        check("", &std::format!("bad argument 'ip': {own}"));
        for ip in [
            "10.0.0.2",
            "10.0.0.2/33",
            "10.0.0/8",
            "224.0.0.1/4",
            "0.0.0.0/8",
            "::1/64",
        ] {
            let text = std::format!("ip={ip}");
            check(&text, &std::format!("bad argument '{text}': {own}"));
        }
        for (argument, expected) in [
            ("port=0", "a port from 1 to 65535"),
            ("port=65536", "a port from 1 to 65535"),
            ("connections=257", "a number from 1 to 256"),
            ("gateway=x", "an address, such as 10.0.0.1"),
            (
                "ws=1M",
                "known are ip, gateway, port, connections, rest, monitor",
            ),
        ] {
            let message = std::format!("bad argument '{argument}': {expected}");
            check(&std::format!("ip=1.2.3.4/8 {argument}"), &message);
        }
    }

    fn check(text: &str, message: &str) {
        let refused = WriterArguments::parse(text).unwrap_err();
        assert_eq!(refused.to_string(), message);
    }

    #[test]
    fn bad_arguments_are_named() {
        check("ws=1M foo", "bad argument 'foo': must be key=value");
        check("ws=1M ws=2M", "bad argument 'ws=2M': stands twice");
        check(
            "ws=12",
            "bad argument 'ws=12': a size of at least one page, such as 4096, 64M or 1G",
        );
        check(
            "size=1M",
            "bad argument 'size=1M': known are ws, rate, pattern, reads, readers, seed, touch, content, \
             rest, monitor",
        );
        check(
            "pattern=random",
            "bad argument 'pattern=random': one of seq, uniform, zipf, phases",
        );
        for text in [
            "ws=",
            "ws=M",
            "ws=-1",
            "ws=99999999999T",
            "ws=1MB",
            "rate=0",
            "rate=fast",
            "rate=+5",
            "reads=101",
            "reads=",
            "readers=-1",
            "seed=x",
            "touch=1.5G",
            "=",
            "=5",
        ] {
            let refused = WriterArguments::parse(text).unwrap_err();
            assert_eq!(refused.argument, text);
        }
        assert!(parse_none("ws=1M").is_err());
    }
}
