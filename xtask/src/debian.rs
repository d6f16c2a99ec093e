//! The Debian packages that the checks need, each with its reason.
//!
//! As root they are installed, for a clean machine that only checks; for anybody else they are
//! named, since changing somebody's system is theirs to decide.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// A package, how its absence shows, and why we need it.
struct DebianPackage {
    name: &'static str,
    /// A program or file that it brings.
    brings: &'static str,
    reason: &'static str,
}

const NEEDED: [DebianPackage; 3] = [
    DebianPackage {
        name: "gcc",
        brings: "cc",
        reason: "rustc links with it, guests included",
    },
    DebianPackage {
        name: "iproute2",
        brings: "ip",
        reason: "tests of networks make taps and namespaces",
    },
    DebianPackage {
        name: "git",
        brings: "git",
        reason: "tidy asks it which files there are",
    },
];

/// Sees to it that all packages are there.
pub fn ensure_installed() -> Result<()> {
    let path = std::env::var("PATH").unwrap_or_default();
    let missing: Vec<_> = NEEDED
        .iter()
        .filter(|package| !is_there(&path, package))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    for package in &missing {
        println!("missing: {} ({})", package.name, package.reason);
    }
    let names: Vec<_> = missing.iter().map(|package| package.name).collect();
    if !is_root()? {
        bail!(
            "install what is missing: apt-get install {}",
            names.join(" ")
        );
    }
    apt_get(&["update", "--quiet"])?;
    let install = ["install", "--quiet", "--yes", "--no-install-recommends"];
    apt_get(&[&install[..], &names].concat())
}

fn is_there(path: &str, package: &DebianPackage) -> bool {
    path.split(':')
        .any(|directory| Path::new(directory).join(package.brings).exists())
}

fn is_root() -> Result<bool> {
    let status = std::fs::read_to_string("/proc/self/status").context("/proc is not mounted")?;
    let line = status
        .lines()
        .find(|line| line.starts_with("Uid:"))
        .context("no user id")?;
    // Real, effective, saved, file system: the effective one counts.
    Ok(line.split_whitespace().nth(2) == Some("0"))
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    let status = Command::new("apt-get")
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .status()
        .context("apt-get could not be started")?;
    ensure!(
        status.success(),
        "apt-get {} ended with {status}",
        arguments.join(" ")
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_looked_for_in_the_path() {
        let package = |brings| DebianPackage {
            name: "p",
            brings,
            reason: "r",
        };
        assert!(is_there("/nowhere:/proc/self", &package("status")));
        assert!(!is_there("/nowhere", &package("status")));
        assert!(!is_there("", &package("no such program")));
    }
}
