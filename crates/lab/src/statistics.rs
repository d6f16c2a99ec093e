//! Medians and percentiles of small samples, defined so that anyone can repeat them by hand.

use serde::Serialize;

/// Where a set of measurements lies.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The smallest.
    pub min: f64,
    /// The middle one.
    pub median: f64,
    /// Nineteen of twenty are not larger.
    pub p95: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of the values that were measured; `None` if none was.
    pub fn of(values: impl IntoIterator<Item = Option<f64>>) -> Option<Self> {
        let values: Vec<f64> = values.into_iter().flatten().collect();
        Some(Self {
            min: values.iter().copied().reduce(f64::min)?,
            median: median(&values)?,
            p95: percentile(&values, 95)?,
            max: values.iter().copied().reduce(f64::max)?,
        })
    }
}

/// The middle value, or the mean of the two middle ones; `None` of nothing.
pub fn median(values: &[f64]) -> Option<f64> {
    let sorted = sorted(values);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    if sorted.len().is_multiple_of(2) {
        Some(f64::midpoint(sorted[middle - 1], upper))
    } else {
        Some(upper)
    }
}

/// The smallest value that at least `percent` of all values do not exceed (nearest rank).
pub fn percentile(values: &[f64], percent: u32) -> Option<f64> {
    assert!((1..=100).contains(&percent), "a percentile is 1 to 100");
    let sorted = sorted(values);
    let rank = (sorted.len() * percent as usize).div_ceil(100);
    sorted.get(rank.checked_sub(1)?).copied()
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(values: &[f64], expect: &str) {
        let text = format!("{:?} {:?}", median(values), percentile(values, 95));
        assert_eq!(text, expect);
    }

    #[test]
    fn golden_samples() {
        check(&[], "None None");
        check(&[3.0], "Some(3.0) Some(3.0)");
        check(&[4.0, -1.0], "Some(1.5) Some(4.0)");
        check(&[9.0, 1.0, 5.0], "Some(5.0) Some(9.0)");
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        check(&hundred, "Some(50.5) Some(95.0)");
        check(&hundred[..21], "Some(90.0) Some(99.0)");
    }
}
