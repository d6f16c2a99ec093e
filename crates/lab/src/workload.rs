//! What a guest does while it is moved: a micro guest and its settings.

use crate::clients::Clients;
use crate::values::{PageRate, Size};
use std::str::FromStr;

/// Programs that come with limosa.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestProgram {
    /// Rewrites pages that prove themselves.
    Writer,
    /// Does nothing but live.
    Idle,
    /// Reads much, writes little, checks its results.
    Compute,
    /// Keeps values for clients.
    Kv,
}

impl GuestProgram {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Writer, Self::Idle, Self::Compute, Self::Kv];

    /// Its name for the daemon.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Writer => "writer",
            Self::Idle => "idle",
            Self::Compute => "compute",
            Self::Kv => "kv",
        }
    }

    /// Whether it has nothing to do without clients.
    pub const fn serves(self) -> bool {
        matches!(self, Self::Kv)
    }

    /// What it does, in a few words.
    pub const fn explain(self) -> &'static str {
        match self {
            Self::Writer => "Rewrites pages that prove themselves",
            Self::Idle => "Does nothing but live",
            Self::Compute => "Reads much, writes little, checks its results",
            Self::Kv => "Keeps values for clients",
        }
    }
}

impl FromStr for GuestProgram {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter();
        known
            .clone()
            .find(|program| program.name() == text)
            .ok_or_else(|| one_of("guest", known.map(Self::name)))
    }
}

/// Which page is next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// One after the other.
    Sequential,
    /// Any, with equal chances.
    Uniform,
    /// Few pages often, many seldom.
    Zipf,
    /// One part of the working set after the other.
    Phases,
}

impl Pattern {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Sequential, Self::Uniform, Self::Zipf, Self::Phases];

    /// As it is typed.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sequential => "sequential",
            Self::Uniform => "uniform",
            Self::Zipf => "zipf",
            Self::Phases => "phases",
        }
    }

    /// What it does, in a few words.
    pub const fn explain(self) -> &'static str {
        match self {
            Self::Sequential => "One after the other",
            Self::Uniform => "Any, with equal chances",
            Self::Zipf => "Few pages often, many seldom",
            Self::Phases => "One part of the working set after the other",
        }
    }

    /// As the guest program takes it.
    const fn argument(self) -> &'static str {
        match self {
            Self::Sequential => "seq",
            other => other.name(),
        }
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter();
        known
            .clone()
            .find(|pattern| pattern.name() == text || pattern.argument() == text)
            .ok_or_else(|| one_of("pattern", known.map(Self::name)))
    }
}

/// What fills the writer's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing that could be written shorter.
    Noise,
    /// Words of few kinds, of which a rewrite changes an eighth.
    Text,
}

impl Content {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Noise, Self::Text];

    /// As it is typed.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Noise => "noise",
            Self::Text => "text",
        }
    }

    /// What it is, in a few words.
    pub const fn explain(self) -> &'static str {
        match self {
            Self::Noise => "Nothing that could be written shorter",
            Self::Text => "Words of few kinds, of which a rewrite changes an eighth",
        }
    }
}

impl FromStr for Content {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter();
        known
            .clone()
            .find(|content| content.name() == text)
            .ok_or_else(|| one_of("content", known.map(Self::name)))
    }
}

/// How the guest passes the time in which nothing is due.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rest {
    /// It sleeps on the host.
    #[default]
    Wait,
    /// It looks at the clock, so that it sees every stall.
    Spin,
}

impl Rest {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Wait, Self::Spin];

    /// As it is typed.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Wait => "wait",
            Self::Spin => "spin",
        }
    }
}

impl FromStr for Rest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter();
        known
            .clone()
            .find(|rest| rest.name() == text)
            .ok_or_else(|| one_of("way to rest", known.map(Self::name)))
    }
}

/// A guest and what it does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Workload {
    /// The program.
    pub guest: GuestProgram,
    /// Memory that it rewrites (writer) or reads (compute).
    pub working_set: Size,
    /// More memory that the writer fills once at its start.
    pub touch: Size,
    /// Pages that it writes, or blocks that it reads, a second.
    pub rate: PageRate,
    /// The order in which the writer takes its pages.
    pub pattern: Pattern,
    /// What fills the writer's pages.
    pub content: Content,
    /// What it does when nothing is due.
    pub rest: Rest,
    /// Who asks it, if it serves.
    pub clients: Option<Clients>,
}

impl Workload {
    /// The arguments of the guest program; `seed` is that of its choices.
    pub fn arguments(&self, seed: u64) -> String {
        let work = self.work(seed);
        match self.rest {
            Rest::Wait => work,
            Rest::Spin => format!("{work} rest=spin").trim_start().to_owned(),
        }
    }

    fn work(&self, seed: u64) -> String {
        let (set, rate) = (self.working_set.bytes(), self.rate);
        match self.guest {
            // Where it is on its network is known to who makes that.
            GuestProgram::Idle | GuestProgram::Kv => String::new(),
            GuestProgram::Compute => format!("ws={set} rate={rate} seed={seed}"),
            GuestProgram::Writer => {
                let (pattern, touch) = (self.pattern.argument(), self.touch.bytes());
                let usual =
                    format!("ws={set} rate={rate} pattern={pattern} seed={seed} touch={touch}");
                match self.content {
                    Content::Noise => usual,
                    Content::Text => usual + " content=text",
                }
            }
        }
    }

    /// Memory that it needs at least, besides its own image.
    pub const fn touched_bytes(&self) -> u64 {
        if let Some(clients) = &self.clients {
            return clients.memory_bytes();
        }
        match self.guest {
            GuestProgram::Idle | GuestProgram::Kv => 0,
            GuestProgram::Compute => self.working_set.bytes(),
            GuestProgram::Writer => self.working_set.bytes().saturating_add(self.touch.bytes()),
        }
    }
}

fn one_of<'a>(what: &str, known: impl Iterator<Item = &'a str>) -> String {
    let known: Vec<&str> = known.collect();
    format!("expected a {what}: {}", known.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(guest: GuestProgram, expect: &str) {
        let workload = Workload {
            guest,
            working_set: "64M".parse().unwrap(),
            touch: "1M".parse().unwrap(),
            rate: PageRate::Max,
            pattern: Pattern::Sequential,
            content: Content::Text,
            rest: Rest::Wait,
            clients: guest.serves().then(Clients::default),
        };
        let spinning = Workload {
            rest: Rest::Spin,
            ..workload
        };
        let both = format!("{} rest=spin", workload.arguments(7));
        assert_eq!(spinning.arguments(7), both.trim_start());
        let text = format!("{} {}", workload.arguments(7), workload.touched_bytes());
        assert_eq!(text, expect);
    }

    #[test]
    fn a_guest_gets_what_it_understands() {
        check(GuestProgram::Idle, " 0");
        check(GuestProgram::Kv, " 176777216");
        check(
            GuestProgram::Compute,
            "ws=67108864 rate=max seed=7 67108864",
        );
        check(
            GuestProgram::Writer,
            "ws=67108864 rate=max pattern=seq seed=7 touch=1048576 content=text 68157440",
        );
    }

    #[test]
    fn names_are_read_and_wrong_ones_answered() {
        assert_eq!("seq".parse(), Ok(Pattern::Sequential));
        assert_eq!(
            "random".parse::<Pattern>(),
            Err("expected a pattern: sequential, uniform, zipf, phases".to_owned())
        );
        assert_eq!(
            "linux".parse::<GuestProgram>(),
            Err("expected a guest: writer, idle, compute, kv".to_owned())
        );
    }
}
