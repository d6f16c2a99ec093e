//! On what machine a measurement was made, since it means little without.

use limosa_pages::ByteCount;
use serde::{Deserialize, Serialize};
use std::fs;

/// Facts about this machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Release of the kernel.
    pub kernel: String,
    /// Model of the processor.
    pub cpu: String,
    /// Processors that this program may use.
    pub cpus: usize,
    /// Memory of the machine.
    pub memory_bytes: u64,
    /// Which modules stand behind `/dev/kvm`, such as `kvm_intel`; empty if that is not known.
    pub kvm_modules: Vec<String>,
    /// Processes that were ready to run, averaged over a minute, when it began.
    pub load: f64,
}

impl Machine {
    /// This one, as far as it can be read.
    pub fn here() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        Self {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            cpu: field(&read("/proc/cpuinfo"), "model name").to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: kibibytes(field(&read("/proc/meminfo"), "MemTotal")),
            kvm_modules: kvm_modules(&read("/proc/modules")),
            load: first_number(&read("/proc/loadavg")),
        }
    }

    /// Its hardware in words, and what stands behind `/dev/kvm`.
    pub(crate) fn hardware(&self) -> String {
        format!(
            "{}, {} processors, {} of memory, {}",
            or_unknown(&self.cpu),
            self.cpus,
            ByteCount::new(self.memory_bytes),
            match self.kvm_modules.as_slice() {
                [] => "KVM module unknown".to_owned(),
                modules => modules.join(" "),
            },
        )
    }
}

/// What could not be read is said to be unknown.
pub(crate) fn or_unknown(text: &str) -> &str {
    if text.is_empty() { "unknown" } else { text }
}

/// The value of the first line `name: value`.
fn field<'a>(text: &'a str, name: &str) -> &'a str {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map_or("", |(_, value)| value.trim())
}

fn kibibytes(text: &str) -> u64 {
    let count = text
        .strip_suffix(" kB")
        .and_then(|count| count.parse().ok());
    count.map_or(0, |count: u64| count.saturating_mul(1024))
}

fn first_number(text: &str) -> f64 {
    let first = text.split_whitespace().next();
    first.and_then(|number| number.parse().ok()).unwrap_or(0.0)
}

fn kvm_modules(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| name.starts_with("kvm_"))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_proc_are_read() {
        let cpuinfo = "processor\t: 0\nmodel name\t: Some CPU @ 2.60GHz\n\nprocessor\t: 1\n";
        assert_eq!(field(cpuinfo, "model name"), "Some CPU @ 2.60GHz");
        assert_eq!(field("", "model name"), "");
        assert_eq!(
            kibibytes(field("MemTotal:       24 kB\n", "MemTotal")),
            24 << 10
        );
        assert_eq!(kibibytes("unknown"), 0);
        assert_eq!(
            first_number("0.25 0.10 0.05 1/200 1234\n").to_string(),
            "0.25"
        );
        let modules = "kvm_intel 400 0 - Live\nkvm 100 1 kvm_intel, Live\nxfs 1 0\n";
        assert_eq!(kvm_modules(modules), ["kvm_intel"]);
    }
}
