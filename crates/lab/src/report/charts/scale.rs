//! A logarithmic scale in whole decades, drawn on a linear axis of exponents.

use std::ops::Range;

/// The exponents that span these values, at least one decade; values that are not above zero have
/// none, and are left to [`exponent`].
pub(super) fn decades(values: impl Iterator<Item = f64>) -> Option<Range<f64>> {
    let logarithms: Vec<f64> = values
        .filter(|value| *value > 0.0)
        .map(f64::log10)
        .collect();
    let low = logarithms.iter().copied().reduce(f64::min)?.floor();
    let high = logarithms.iter().copied().reduce(f64::max)?.ceil();
    Some(low..high.max(low + 1.0))
}

/// Where a value lies; what is too small, zero included, lies at the lower end.
pub(super) fn exponent(value: f64, decades: &Range<f64>) -> f64 {
    if value > 0.0 {
        value.log10().max(decades.start)
    } else {
        decades.start
    }
}

/// What stands at a place of the axis: a whole decade, or nothing.
pub(super) fn tick(place: f64, text: impl Fn(f64) -> String) -> String {
    at_whole(place, |exponent| text(10f64.powf(exponent)))
}

/// What stands at a place of an axis on which only whole numbers mean something.
pub(super) fn at_whole(place: f64, text: impl Fn(f64) -> String) -> String {
    if (place - place.round()).abs() < 1e-6 {
        text(place.round())
    } else {
        String::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decades_hold_their_values() {
        let check = |values: &[f64], expect: Option<Range<f64>>| {
            assert_eq!(decades(values.iter().copied()), expect);
        };
        check(&[0.5, 20.0, 0.0], Some(-1.0..2.0));
        check(&[10.0], Some(1.0..2.0));
        check(&[0.0], None);
        check(&[], None);
        assert_eq!(exponent(0.0, &(-1.0..2.0)).to_string(), "-1");
        assert_eq!(exponent(100.0, &(-1.0..2.0)).to_string(), "2");
        assert_eq!(tick(2.0, |value| value.to_string()), "100");
        assert_eq!(tick(1.5, |value| value.to_string()), "");
    }
}
