//! Who may use whom among our own packages.
//!
//! The table is the picture in ARCHITECTURE.md as data: a new edge is a decision, is made here and
//! there, and its reason stands in the commit message. That there is no cycle is checked by Cargo.

use super::Finding;
use crate::workspace::{Kind, Package};

/// What a package may use of ours.
struct Row {
    package: &'static str,
    /// By itself or by its build script.
    uses: &'static [&'static str],
    /// Besides, by its tests only.
    tests_use: &'static [&'static str],
}

/// Guest programs to run in tests, and how they talk.
const GUESTS: &[&str] = &["limosa-micro", "limosa-micro-abi"];

const ALLOWED: [Row; 15] = [
    Row {
        package: "limosa-pages",
        uses: &[],
        tests_use: &[],
    },
    Row {
        package: "limosa-engine",
        uses: &["limosa-pages"],
        tests_use: &[],
    },
    Row {
        package: "limosa-sim",
        uses: &["limosa-engine", "limosa-pages"],
        tests_use: &[],
    },
    Row {
        package: "limosa-os",
        uses: &["limosa-pages"],
        tests_use: GUESTS,
    },
    Row {
        package: "limosa-vmm",
        uses: &[
            "limosa-os",
            "limosa-engine",
            "limosa-pages",
            "limosa-micro-abi",
        ],
        tests_use: &["limosa-micro"],
    },
    Row {
        package: "limosa-carrier",
        uses: &["limosa-engine", "limosa-vmm", "limosa-os", "limosa-pages"],
        tests_use: GUESTS,
    },
    Row {
        package: "limosa-host",
        uses: &[
            "limosa-carrier",
            "limosa-vmm",
            "limosa-os",
            "limosa-engine",
            "limosa-pages",
            "limosa-micro",
            "limosa-micro-abi",
        ],
        tests_use: &[],
    },
    Row {
        package: "limosa-lab",
        uses: &["limosa-host", "limosa-engine", "limosa-pages"],
        tests_use: &[],
    },
    Row {
        package: "limosa-clients",
        uses: &[],
        tests_use: &[],
    },
    Row {
        package: "limosa-cli",
        uses: &[
            "limosa-clients",
            "limosa-host",
            "limosa-lab",
            "limosa-carrier",
            "limosa-sim",
            "limosa-vmm",
            "limosa-os",
            "limosa-engine",
            "limosa-pages",
            "limosa-micro",
            "limosa-micro-abi",
        ],
        tests_use: &[],
    },
    Row {
        package: "limosa-micro-abi",
        uses: &[],
        tests_use: &[],
    },
    Row {
        package: "limosa-micro",
        uses: &[],
        tests_use: &["limosa-micro-abi"],
    },
    Row {
        package: "limosa-micro-logic",
        uses: &["limosa-micro-abi"],
        tests_use: &[],
    },
    Row {
        package: "limosa-micro-programs",
        uses: &["limosa-micro-abi", "limosa-micro-logic"],
        tests_use: &[],
    },
    Row {
        package: "xtask",
        uses: &[],
        tests_use: &[],
    },
];

/// Tests of the whole: they stand above everything, and nothing may use them.
const ABOVE_ALL: &str = "limosa-e2e";

pub fn check(packages: &[Package], findings: &mut Vec<Finding>) {
    let is_ours = |name: &str| packages.iter().any(|package| package.name == name);
    for package in packages.iter().filter(|package| package.name != ABOVE_ALL) {
        let manifest = format!("{}/Cargo.toml", package.directory);
        let Some(row) = ALLOWED.iter().find(|row| row.package == package.name) else {
            let message = format!("{} has no row in xtask/src/tidy/edges.rs", package.name);
            findings.push(Finding::new(&manifest, 0, "edge", message));
            continue;
        };
        for dependency in &package.dependencies {
            let name = dependency.name.as_str();
            let allowed = row.uses.contains(&name)
                || (dependency.kind == Kind::Development && row.tests_use.contains(&name));
            if is_ours(name) && !allowed {
                let message = format!("{} must not use {name}", package.name);
                findings.push(Finding::new(&manifest, 0, "edge", message));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::Dependency;

    #[test]
    fn an_edge_that_is_not_in_the_table_is_found() {
        let package = |name: &str, uses: &[(&str, Kind)]| Package {
            name: name.to_owned(),
            directory: "d".to_owned(),
            dependencies: uses
                .iter()
                .map(|(name, kind)| Dependency {
                    name: (*name).to_owned(),
                    kind: *kind,
                    uses_default_features: true,
                })
                .collect(),
            ..Package::default()
        };
        let check = |user: Package, expect: &str| {
            let others = ["limosa-engine", "limosa-os", "limosa-micro", "limosa-host"];
            let mut packages: Vec<_> = others.iter().map(|name| package(name, &[])).collect();
            packages.push(user);
            let mut findings = Vec::new();
            check(&packages, &mut findings);
            let found: Vec<_> = findings
                .iter()
                .map(|finding| finding.message.as_str())
                .collect();
            assert_eq!(found.join("; "), expect);
        };
        check(
            package(
                "limosa-vmm",
                &[("limosa-os", Kind::Normal), ("libc", Kind::Normal)],
            ),
            "",
        );
        check(
            package("limosa-vmm", &[("limosa-micro", Kind::Development)]),
            "",
        );
        check(
            package(
                "limosa-vmm",
                &[("limosa-micro", Kind::Normal), ("limosa-host", Kind::Build)],
            ),
            "limosa-vmm must not use limosa-micro; limosa-vmm must not use limosa-host",
        );
        check(
            package("limosa-sim", &[("limosa-os", Kind::Development)]),
            "limosa-sim must not use limosa-os",
        );
        check(
            package("limosa-new", &[]),
            "limosa-new has no row in xtask/src/tidy/edges.rs",
        );
        check(package(ABOVE_ALL, &[("limosa-host", Kind::Normal)]), "");
    }
}
