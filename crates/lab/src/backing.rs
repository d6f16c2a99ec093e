//! What backs a guest's memory: small pages, or larger ones that the host has reserved or makes.
//!
//! Transparent huge pages are a setting of the whole host, so a plan that compares them says what the
//! setting shall be while a guest is there. A plan that says nothing leaves the host alone.
//!
//! Deliberately absent: the setting itself. Whoever makes the moves changes it and puts it back.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Pages behind a guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backing {
    /// What the host's setting gives, which is left alone.
    #[default]
    Host,
    /// Pages of 4 KiB and no others.
    Small,
    /// Transparent huge pages of 2 MiB, where the kernel makes them.
    Transparent,
    /// Pages of 2 MiB that the host has reserved.
    Reserved,
}

impl Backing {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Host, Self::Small, Self::Transparent, Self::Reserved];

    /// As it is typed.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Small => "small",
            Self::Transparent => "transparent",
            Self::Reserved => "reserved",
        }
    }
}

impl fmt::Display for Backing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_plans_and_results() {
        for backing in Backing::ALL {
            assert_eq!(serde_json::to_value(backing).unwrap(), backing.name());
        }
        assert_eq!(Backing::default(), Backing::Host);
    }
}
