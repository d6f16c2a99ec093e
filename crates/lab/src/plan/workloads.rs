//! One `[workloads.NAME]` of a plan: a guest program, and what it takes.

use super::parsed;
use super::text::Text;
use crate::clients::Clients;
use crate::values::{Milliseconds, PageRate, Size};
use crate::workload::{Content, GuestProgram, Pattern, Rest, Workload};
use serde::Deserialize;

/// The table as it is typed.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WorkloadTable {
    guest: Text<GuestProgram>,
    working_set: Option<Text<Size>>,
    touch: Option<Text<Size>>,
    rate: Option<Text<PageRate>>,
    pattern: Option<Text<Pattern>>,
    content: Option<Text<Content>>,
    #[serde(default)]
    rest: Option<Text<Rest>>,
    keys: Option<u32>,
    value_size: Option<Text<Size>>,
    sets: Option<u8>,
    clients: Option<u8>,
    period: Option<Text<Milliseconds>>,
}

impl WorkloadTable {
    pub(super) fn into_workload(self, name: &str) -> Result<Workload, String> {
        let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "-_".contains(letter);
        if name.is_empty() || !name.chars().all(is_plain) {
            return Err(format!(
                "the workload's name '{name}' has more than letters, digits, '-' and '_'"
            ));
        }
        let guest = self.guest.0;
        let takes = takes(guest);
        if let Some(key) = self.keys_given().find(|key| !takes.contains(key)) {
            let (guest, takes) = (guest.name(), takes.join(", "));
            return Err(format!(
                "workload '{name}': the guest {guest} has no {key}; it takes {takes}"
            ));
        }
        let clients = guest.serves().then(|| self.clients());
        if let Some(problem) = clients.as_ref().and_then(Clients::problem) {
            return Err(format!("workload '{name}': {problem}"));
        }
        Ok(Workload {
            guest,
            clients,
            working_set: self
                .working_set
                .map_or_else(|| parsed("256M"), |text| text.0),
            touch: self.touch.map_or_else(|| parsed("0"), |text| text.0),
            rate: self.rate.map_or_else(|| parsed("50000"), |text| text.0),
            pattern: self.pattern.map_or(Pattern::Uniform, |text| text.0),
            content: self.content.map_or(Content::Noise, |text| text.0),
            rest: self.rest.map_or(Rest::Wait, |text| text.0),
        })
    }

    /// The keys that stand there, in the order in which they are told.
    fn keys_given(&self) -> impl Iterator<Item = &'static str> {
        let given = [
            ("working_set", self.working_set.is_some()),
            ("rate", self.rate.is_some()),
            ("touch", self.touch.is_some()),
            ("pattern", self.pattern.is_some()),
            ("content", self.content.is_some()),
            ("rest", self.rest.is_some()),
            ("keys", self.keys.is_some()),
            ("value_size", self.value_size.is_some()),
            ("sets", self.sets.is_some()),
            ("clients", self.clients.is_some()),
            ("period", self.period.is_some()),
        ];
        given
            .into_iter()
            .filter_map(|(key, is_given)| is_given.then_some(key))
    }

    fn clients(&self) -> Clients {
        let usual = Clients::default();
        Clients {
            keys: self.keys.unwrap_or(usual.keys),
            value_bytes: self
                .value_size
                .map_or(usual.value_bytes, |text| text.0.bytes()),
            connections: self.clients.unwrap_or(usual.connections),
            period_ms: self.period.map_or(usual.period_ms, |text| text.0.get()),
            sets_percent: self.sets.unwrap_or(usual.sets_percent),
        }
    }
}

/// What a guest program takes.
const fn takes(guest: GuestProgram) -> &'static [&'static str] {
    match guest {
        GuestProgram::Writer => &["working_set", "touch", "rate", "pattern", "content", "rest"],
        GuestProgram::Compute => &["working_set", "rate", "rest"],
        GuestProgram::Idle => &["rest"],
        GuestProgram::Kv => &["keys", "value_size", "sets", "clients", "period", "rest"],
    }
}
