//! Values with units as they are typed, on a command line or in a plan: sizes, rates, times,
//! techniques.
//!
//! Each parser accepts a small set of forms and its error names them all, so that a typo costs one
//! look. Prefixes are powers of 1024 throughout: a size that is shown can be typed back.

use limosa_engine::policy::Mode;
use limosa_host::api::Compression;
use std::fmt;
use std::str::FromStr;

/// A number of bytes: `4096`, `512K`, `64M`, `1.5G`, `1T`, also with `iB` behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(u64);

impl Size {
    /// In bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        parse_bytes(text).map(Self).ok_or_else(|| {
            "expected bytes, or a number with K, M, G or T (powers of 1024), like 512M or 1.5G"
                .to_owned()
        })
    }
}

/// Bytes a second: like a size, also with `/s` behind; more than none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate(u64);

impl Rate {
    /// In bytes a second.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bytes = parse_bytes(text.strip_suffix("/s").unwrap_or(text));
        bytes.filter(|bytes| *bytes > 0).map(Self).ok_or_else(|| {
            "expected bytes a second, or a number with K, M, G or T (powers of 1024), like 500M or 1.2G/s"
                .to_owned()
        })
    }
}

/// A time: `500us`, `5ms`, `2s`, `1.5s`, `10m`, `1h`, or `0`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Milliseconds(f64);

impl Milliseconds {
    /// In milliseconds.
    pub const fn get(self) -> f64 {
        self.0
    }
}

impl FromStr for Milliseconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        /// A year: beyond it a time is a mistake of units.
        const MAX: f64 = 366.0 * 86_400_000.0;
        let (number, unit) = split_number(text);
        let factor = match unit {
            "us" | "µs" => Some(0.001),
            "ms" => Some(1.0),
            "s" => Some(1000.0),
            "m" | "min" => Some(60_000.0),
            "h" => Some(3_600_000.0),
            "" if number == "0" => Some(1.0),
            _ => None,
        };
        let value = number
            .parse::<f64>()
            .ok()
            .zip(factor)
            .map(|(number, factor)| number * factor);
        value
            .filter(|value| (0.0..=MAX).contains(value))
            .map(Self)
            .ok_or_else(|| "expected a number with us, ms, s, m or h, like 5ms or 1.5s".to_owned())
    }
}

/// A value, or `none` to lift a limit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum OrNone<T> {
    /// The limit.
    Some(T),
    /// No limit.
    None,
}

impl<T: FromStr<Err = String>> FromStr for OrNone<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self::None);
        }
        text.parse()
            .map(Self::Some)
            .map_err(|error: String| format!("{error}; or none"))
    }
}

/// Page writes a second of a guest: a number or `max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageRate {
    /// So many.
    PerSecond(u64),
    /// As many as it can.
    Max,
}

impl FromStr for PageRate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "max" {
            return Ok(Self::Max);
        }
        let number = text.replace('_', "").parse().map(Self::PerSecond);
        number.map_err(|_| "expected pages a second, like 50000, or max".to_owned())
    }
}

impl fmt::Display for PageRate {
    /// As guest programs take it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PerSecond(pages) => write!(f, "{pages}"),
            Self::Max => f.write_str("max"),
        }
    }
}

/// Reads the name of a technique.
///
/// # Errors
/// The known ones.
pub fn mode(text: &str) -> Result<Mode, String> {
    Mode::ALL
        .into_iter()
        .find(|mode| mode.name() == text)
        .ok_or_else(|| {
            let known: Vec<&str> = Mode::ALL.iter().map(|mode| mode.name()).collect();
            format!("known modes are {}", known.join(", "))
        })
}

/// Reads whether pages are coded.
///
/// # Errors
/// The known words.
pub fn compression(text: &str) -> Result<Compression, String> {
    Compression::ALL
        .into_iter()
        .find(|compression| compression.name() == text)
        .ok_or_else(|| "it is auto, on, off, lz4, zstd or delta".to_owned())
}

/// A number with its thousands apart: `1,234,567`.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes of `4096`, `512K`, `1.5G`, `1GiB`.
fn parse_bytes(text: &str) -> Option<u64> {
    let (number, unit) = split_number(text);
    let shift = match unit.trim_end_matches("iB") {
        "" | "B" => 0,
        "K" | "k" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(1 << shift);
    }
    // A fraction of a byte means nothing; of larger units it is rounded down to bytes.
    let bytes = number.parse::<f64>().ok().filter(|_| shift > 0)? * (1u64 << shift) as f64;
    (0.0..9e18).contains(&bytes).then_some(bytes as u64)
}

/// Splits behind the last digit or point.
fn split_number(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text
        .find(|char: char| !char.is_ascii_digit() && char != '.')
        .unwrap_or(text.len());
    (&text[..end], text[end..].trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let check = |text: &str, expect: Option<u64>| {
            assert_eq!(
                text.parse::<Size>().ok().map(Size::bytes),
                expect,
                "{text:?}"
            );
        };
        check("0", Some(0));
        check("4096", Some(4096));
        check("512K", Some(512 << 10));
        check("4G", Some(4 << 30));
        check("1.5G", Some(3 << 29));
        check("64MiB", Some(64 << 20));
        check("1.00 GiB", Some(1 << 30));
        for text in [
            "",
            "G",
            "4X",
            "-4G",
            "4 G B",
            "1.5",
            "1e9",
            "nan",
            "20000000T",
            "99999999999999999999",
        ] {
            check(text, None);
        }
        let error = "4X".parse::<Size>().unwrap_err();
        assert!(error.contains("like 512M"), "{error}");
    }

    #[test]
    fn rates() {
        let check = |text: &str, expect: Option<u64>| {
            assert_eq!(text.parse::<Rate>().ok().map(Rate::get), expect, "{text:?}");
        };
        check("500M", Some(500 << 20));
        check("1.2G/s", Some(1_288_490_188));
        check("0", None);
        check("fast", None);
    }

    #[test]
    fn times() {
        let check = |text: &str, expect: Option<f64>| {
            assert_eq!(
                text.parse::<Milliseconds>().ok().map(Milliseconds::get),
                expect,
                "{text:?}"
            );
        };
        check("5ms", Some(5.0));
        check("500us", Some(0.5));
        check("1.5s", Some(1500.0));
        check("2m", Some(120_000.0));
        check("1h", Some(3_600_000.0));
        check("0", Some(0.0));
        for text in ["", "5", "ms", "-5ms", "5 days", "9999999h", ".ms"] {
            check(text, None);
        }
    }

    #[test]
    fn limits_can_be_lifted() {
        assert_eq!("none".parse(), Ok(OrNone::<Rate>::None));
        assert_eq!("1K".parse(), Ok(OrNone::Some(Rate(1024))));
        let error = "x".parse::<OrNone<Milliseconds>>().unwrap_err();
        assert_eq!(
            error,
            "expected a number with us, ms, s, m or h, like 5ms or 1.5s; or none"
        );
    }

    #[test]
    fn page_rates_read_as_the_guest_reads_them() {
        for text in ["50000", "max"] {
            assert_eq!(text.parse::<PageRate>().unwrap().to_string(), text);
        }
        assert!("50k".parse::<PageRate>().is_err());
    }

    #[test]
    fn an_unknown_mode_lists_the_known_ones() {
        assert_eq!(mode("pre-copy"), Ok(Mode::PreCopy));
        assert_eq!(
            mode("precopy"),
            Err(
                "known modes are stop-and-copy, demand, post-copy, pre-copy, hybrid, auto"
                    .to_owned()
            )
        );
    }
}
