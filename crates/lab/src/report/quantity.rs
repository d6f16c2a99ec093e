//! Numbers as people read them, with the unit that fits.

use crate::statistics::Spread;
use crate::values::count;
use limosa_pages::ByteCount;

/// What a number counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Quantity {
    /// Milliseconds.
    Time,
    /// Things.
    Count,
    /// Bytes.
    Size,
    /// 0 to 1, shown in percent.
    Share,
}

impl Quantity {
    /// One number.
    pub(super) fn text(self, value: f64) -> String {
        match self {
            Self::Time => time(value),
            Self::Count => count(value.round().max(0.0) as u64),
            Self::Size => ByteCount::new(value.round().max(0.0) as u64).to_string(),
            Self::Share => format!("{:.1} %", value * 100.0),
        }
    }

    /// The range of several; `None` if they are all the same as shown.
    pub(super) fn range(self, spread: Spread) -> Option<String> {
        let (min, max) = (self.text(spread.min), self.text(spread.max));
        (min != max).then(|| format!("[{min} – {max}]"))
    }
}

/// Three digits that matter: `870 µs`, `4.21 ms`, `12.3 s`.
pub(super) fn time(milliseconds: f64) -> String {
    let (value, unit) = match milliseconds.abs() {
        0.0 => return "0 ms".to_owned(),
        ..1.0 => (milliseconds * 1000.0, "µs"),
        ..1000.0 => (milliseconds, "ms"),
        _ => (milliseconds / 1000.0, "s"),
    };
    let digits = match value.abs() {
        ..10.0 => 2,
        10.0..100.0 => 1,
        _ => 0,
    };
    let digits = if unit == "µs" { 0 } else { digits };
    format!("{value:.digits$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        let check = |quantity: Quantity, value: f64, expect: &str| {
            assert_eq!(quantity.text(value), expect);
        };
        check(Quantity::Time, 0.0, "0 ms");
        check(Quantity::Time, 0.87, "870 µs");
        check(Quantity::Time, 4.213, "4.21 ms");
        check(Quantity::Time, 123.4, "123 ms");
        check(Quantity::Time, 61_234.0, "61.2 s");
        check(Quantity::Count, 1_234_567.4, "1,234,567");
        check(Quantity::Size, 3.0 * 1024.0, "3.00 KiB");
        check(Quantity::Share, 0.123_45, "12.3 %");
        let spread = Spread::of([Some(1.0), Some(2.0)]).unwrap();
        let range = Quantity::Time.range(spread);
        assert_eq!(range.as_deref(), Some("[1.00 ms – 2.00 ms]"));
        let one = Spread::of([Some(1.0), Some(1.001)]).unwrap();
        assert_eq!(Quantity::Time.range(one), None);
    }
}
