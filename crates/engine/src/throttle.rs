//! The law by which a guest's writers are slowed down when rounds of pre-copy do not shrink.
//!
//! After each round the law is told what the link delivered and what the guest dirtied, and says how
//! fast the guest may write from now on: slower than the link by a fraction, so that each round is
//! smaller than the one before by that fraction `[Liu11]`.
//!
//! ```text
//!  rounds shrink ──────────▶ nothing                        rounds do not shrink
//!                                                                   │
//!       dirty rate above target: quota or share for the target ◀────┤
//!       dirty rate at target:    half the target (latency rules) ◀──┘
//! ```
//!
//! Where each vCPU's dirty pages are counted there is one quota of pages a second that no vCPU may
//! exceed, the level at which all of them together write at the target rate: who writes little is
//! not slowed, who only reads never is. Where they are not, all vCPUs get the same share of the time.
//!
//! Both go to the target in one step, not by fixed increments, and do not swing. The quota depends on
//! rates that it does not change; a looser one goes half of the way, since a quiet moment of the guest
//! is not a quiet guest. The share is multiplied by target over rate. A guest that runs for a share of
//! the time dirties that share of its pages, or more (a page that is written twice is dirty once, a
//! guest that paces itself catches up): then the steps approach the target from above. Or it dirties
//! less, where it takes long to enter a guest: then the first step goes too far, and small ones lead
//! back. Between half of the target and seven fifths of it nothing is changed; a share that was too
//! much and one that was too little are kept, and from then on the next one lies between them, so that
//! each step halves what is left.
//!
//! Idea of a quota for each vCPU: `[QEMU]` dirty-limit. Differs: the quota follows from the measured
//! bandwidth instead of being set by the operator, and is fair by levels. Idea of a share: `[QEMU]`
//! auto-converge. Differs: in one step instead of 10 % at a time, and with sleeps that whoever carries
//! it out keeps below a millisecond or so.

use alloc::vec::Vec;
use core::fmt;
use core::str::FromStr;
use core::time::Duration;
use limosa_pages::{BytesPerSecond, PageCount, PagesPerSecond};
use serde::{Deserialize, Serialize};

/// The dirty rate that is aimed at first, in thousandths of the bandwidth: each round is half as
/// large as the one before, and ten rounds make a thousandth of the rest. More would converge slowly,
/// less would slow the guest more than it helps.
const TARGET_FIRST: u64 = 500;
/// The lowest, for links where not bandwidth but latency keeps the rounds from shrinking.
const TARGET_MIN: u64 = TARGET_FIRST / 8;
/// Least quota of a vCPU: 1 MiB a second, what QEMU's dirty-limit begins with.
pub const QUOTA_MIN: PagesPerSecond = PagesPerSecond::new(256);
/// A guest whose rate is at most this many tenths of the target has been slowed down enough: its rounds
/// shrink to seven tenths.
const ENOUGH: u64 = 14;
/// One whose rate is below half of the target gets so much more of the time, in per cent of its share.
const LOOSENED: u64 = 125;
/// All of the time, in thousandths.
const WHOLE: u64 = 1000;
/// A throttle that differs by less than one part in so many is none that is worth telling.
const CHANGE_MIN: u64 = 20;

/// Whether a guest's writers may be slowed down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Throttling {
    /// Never: what does not converge ends by the other rules.
    #[default]
    Off,
    /// If rounds do not shrink.
    Auto,
}

impl Throttling {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Off, Self::Auto];

    /// Its name on a command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Auto => "auto",
        }
    }
}

impl fmt::Display for Throttling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Throttling {
    type Err = alloc::string::String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|one| one.name() == text);
        found.ok_or_else(|| alloc::format!("'{text}' is none of off, auto"))
    }
}

/// A share of the time, in thousandths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Share(u16);

impl Share {
    /// All of the time.
    pub const WHOLE: Self = Self(1000);
    /// A vCPU runs a twentieth of the time at least: 50 µs of each millisecond, below which a guest
    /// would be busy with leaving and entering.
    pub const MIN: Self = Self(50);

    /// So many thousandths, or the nearest share that there is.
    pub const fn clamped(thousandths: u64) -> Self {
        if thousandths <= Self::MIN.0 as u64 {
            Self::MIN
        } else if thousandths >= Self::WHOLE.0 as u64 {
            Self::WHOLE
        } else {
            Self(thousandths as u16)
        }
    }

    /// In thousandths.
    pub const fn thousandths(self) -> u16 {
        self.0
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{} %", self.0 / 10, self.0 % 10)
    }
}

/// How fast a guest may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Throttle {
    /// No vCPU dirties more pages than this; who stays below is not slowed.
    PerVcpu {
        /// Of each vCPU.
        quota: PagesPerSecond,
    },
    /// It is not known which vCPU writes: each runs for this share of the time.
    Equal {
        /// Of each vCPU.
        share: Share,
    },
}

impl Throttle {
    /// True if it lets the guest write less than `other`, which is of the same kind.
    pub fn is_tighter_than(self, other: Self) -> bool {
        self.amount() < other.amount()
    }

    fn amount(self) -> u64 {
        match self {
            Self::PerVcpu { quota } => quota.get(),
            Self::Equal { share } => u64::from(share.thousandths()),
        }
    }

    const fn is_like(self, other: Self) -> bool {
        matches!(
            (self, other),
            (Self::PerVcpu { .. }, Self::PerVcpu { .. }) | (Self::Equal { .. }, Self::Equal { .. })
        )
    }
}

impl fmt::Display for Throttle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PerVcpu { quota } => write!(f, "per vCPU, at most {quota} each"),
            Self::Equal { share } => write!(f, "equal, each vCPU runs {share} of the time"),
        }
    }
}

/// What a round has shown.
#[derive(Clone, Copy, Debug)]
pub struct Observation<'a> {
    /// Payload rate as delivered.
    pub bandwidth: BytesPerSecond,
    /// From the harvest before to this one.
    pub time: Duration,
    /// Distinct pages that were dirtied in this time.
    pub dirtied: PageCount,
    /// Of each vCPU; empty where nobody counts.
    pub by_vcpu: &'a [PageCount],
    /// The rest did not shrink by a tenth.
    pub is_stuck: bool,
}

/// Keeps what the law has to remember from round to round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Regulator {
    /// In thousandths of the bandwidth.
    target: u64,
    current: Option<Throttle>,
    /// A share, in thousandths, with which the guest dirtied too little.
    too_little: u64,
    /// One with which it dirtied too much.
    too_much: u64,
}

impl Default for Regulator {
    fn default() -> Self {
        Self {
            target: TARGET_FIRST,
            current: None,
            too_little: 0,
            too_much: WHOLE,
        }
    }
}

impl Regulator {
    /// What is in force.
    pub const fn current(&self) -> Option<Throttle> {
        self.current
    }

    /// The throttle from now on, if it is another one. The first one needs a round that is stuck.
    pub fn regulate(&mut self, seen: &Observation<'_>) -> Option<Throttle> {
        let rate = PagesPerSecond::measured(seen.dirtied, seen.time)?.get();
        if self.current.is_none() && !seen.is_stuck {
            return None;
        }
        // At the target and yet no smaller: what a round takes at least is too long for this rate.
        if seen.is_stuck && rate <= self.target_rate(seen).saturating_mul(ENOUGH) / 10 {
            self.target = (self.target / 2).max(TARGET_MIN);
            self.too_little = 0;
        }
        let target = self.target_rate(seen);
        let wanted = if seen.by_vcpu.is_empty() {
            self.share(rate, target, seen.is_stuck)
        } else {
            self.quota(seen, target)?
        };
        let next = match self.current {
            Some(Throttle::PerVcpu { quota }) => eased(quota, wanted),
            _ => wanted,
        };
        let before = match self.current {
            Some(current) if current.is_like(next) => current.amount(),
            None if next
                == (Throttle::Equal {
                    share: Share::WHOLE,
                }) =>
            {
                return None;
            }
            _ => u64::MAX,
        };
        if before.abs_diff(next.amount()) < before / CHANGE_MIN || before == next.amount() {
            return None;
        }
        self.current = Some(next);
        Some(next)
    }

    /// Nothing is in force any more.
    pub fn let_go(&mut self) {
        *self = Self::default();
    }

    /// Pages a second.
    fn target_rate(&self, seen: &Observation<'_>) -> u64 {
        let rate = u128::from(seen.bandwidth.pages().get()) * u128::from(self.target) / 1000;
        u64::try_from(rate).unwrap_or(u64::MAX)
    }

    fn share(&mut self, rate: u64, target: u64, is_stuck: bool) -> Throttle {
        let (share, enough) = match self.current {
            Some(Throttle::Equal { share }) => (share, target.saturating_mul(ENOUGH) / 10),
            _ => (Share::WHOLE, target),
        };
        let share = u64::from(share.thousandths());
        let share = if rate > enough {
            self.too_much = share;
            // The guest is not the one that it was.
            if is_stuck || self.too_little >= share {
                self.too_little = 0;
            }
            let wanted = u128::from(share) * u128::from(target) / u128::from(rate);
            let wanted = u64::try_from(wanted).unwrap_or(0);
            if self.too_little > 0 {
                wanted.max(u64::midpoint(self.too_little, share))
            } else {
                wanted
            }
        } else if rate < target / 2 {
            self.too_little = share;
            if self.too_much <= share {
                self.too_much = WHOLE;
            }
            (share * LOOSENED / 100).min(u64::midpoint(share, self.too_much))
        } else {
            share
        };
        Throttle::Equal {
            share: Share::clamped(share),
        }
    }

    /// The level at which all vCPUs together dirty `target` pages a second; nothing if they do not
    /// dirty so many, however much they may.
    fn quota(&self, seen: &Observation<'_>, target: u64) -> Option<Throttle> {
        let measured = |&pages: &PageCount| PagesPerSecond::measured(pages, seen.time);
        let limit = match self.current {
            Some(Throttle::PerVcpu { quota }) => Some(quota.get()),
            _ => None,
        };
        let mut demands: Vec<u64> = seen
            .by_vcpu
            .iter()
            .filter_map(measured)
            .map(|rate| match limit {
                // Held back at its quota: nobody knows how much more it would write.
                Some(limit) if rate.get() >= limit / 10 * 9 => u64::MAX,
                _ => rate.get(),
            })
            .collect();
        demands.sort_unstable();
        let mut left = target;
        for (index, &demand) in demands.iter().enumerate() {
            let level = left / (demands.len() - index) as u64;
            if demand > level {
                let quota = PagesPerSecond::new(level).max(QUOTA_MIN);
                return Some(Throttle::PerVcpu { quota });
            }
            left -= demand;
        }
        None
    }
}

/// All of the way to a tighter quota, half of the way to a looser one.
fn eased(current: PagesPerSecond, wanted: Throttle) -> Throttle {
    match wanted {
        Throttle::PerVcpu { quota } if quota > current => Throttle::PerVcpu {
            quota: PagesPerSecond::new(current.get() + (quota.get() - current.get()) / 2),
        },
        _ => wanted,
    }
}

#[cfg(test)]
mod tests;
