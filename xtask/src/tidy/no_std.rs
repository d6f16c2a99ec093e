//! The crates that decide know no operating system.
//!
//! A build for the host does not prove that a dependency is `no_std`; what betrays it is nearly
//! always a default feature that brings in `std`, so none may be on unseen.

use super::Finding;
use crate::rust_source::{RustSource, matches_at};
use crate::tree::Tree;
use crate::workspace::{Kind, Package};

const NO_STD: [&str; 3] = ["limosa-pages", "limosa-engine", "limosa-micro-abi"];

pub fn check(tree: &Tree, packages: &[Package], findings: &mut Vec<Finding>) {
    for name in NO_STD {
        let Some(package) = packages.iter().find(|package| package.name == name) else {
            findings.push(Finding::new(
                "Cargo.toml",
                0,
                "no-std",
                format!("{name} is missing"),
            ));
            continue;
        };
        let root = format!("{}/src/lib.rs", package.directory);
        if !tree.text(&root).is_some_and(is_no_std) {
            findings.push(Finding::new(&root, 0, "no-std", "must say #![no_std]"));
        }
        let manifest = format!("{}/Cargo.toml", package.directory);
        for dependency in &package.dependencies {
            // Tests run on the host; a crate of ours without default features has none to refuse.
            let plain = packages.iter().any(|other| {
                other.name == dependency.name
                    && NO_STD.contains(&other.name.as_str())
                    && !other.has_default_features
            });
            let skipped = dependency.kind != Kind::Normal || plain;
            if dependency.uses_default_features && !skipped {
                let message = format!("{} must have default-features = false", dependency.name);
                findings.push(Finding::new(&manifest, 0, "no-std", message));
            }
        }
    }
}

/// `#![no_std]`, or the same for all but the tests.
fn is_no_std(text: &str) -> bool {
    let source = RustSource::new(text);
    let tokens = source.tokens();
    let plain = ["#", "!", "[", "no_std", "]"];
    let but_tests = [
        "#", "!", "[", "cfg_attr", "(", "not", "(", "test", ")", ",", "no_std", ")", "]",
    ];
    (0..tokens.len())
        .any(|at| matches_at(&tokens, at, &plain) || matches_at(&tokens, at, &but_tests))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::found;
    use crate::workspace::Dependency;

    fn packages(serde_kind: Kind) -> Vec<Package> {
        let dependency = |name: &str, kind: Kind| Dependency {
            name: name.to_owned(),
            kind,
            uses_default_features: true,
        };
        let package = |name: &str| Package {
            name: name.to_owned(),
            directory: name.to_owned(),
            ..Package::default()
        };
        let mut packages: Vec<_> = NO_STD.iter().map(|name| package(name)).collect();
        packages[1].dependencies = vec![
            dependency("limosa-pages", Kind::Normal),
            dependency("serde", serde_kind),
        ];
        packages
    }

    fn texts(engine: &str) -> [(&str, &str); 3] {
        [
            ("limosa-pages/src/lib.rs", "#![cfg_attr(not(test), no_std)]"),
            ("limosa-engine/src/lib.rs", engine),
            ("limosa-micro-abi/src/lib.rs", "#![no_std]"),
        ]
    }

    #[test]
    fn default_features_and_a_missing_attribute_are_found() {
        let check = |engine: &str, kind: Kind, expect: &str| {
            let packages = packages(kind);
            let found = found(&texts(engine), |tree, findings| {
                check(tree, &packages, findings)
            });
            assert_eq!(found, expect);
        };
        check("#![no_std]", Kind::Development, "");
        check(
            "#![no_std]",
            Kind::Normal,
            "limosa-engine/Cargo.toml: [no-std] serde must have default-features = false",
        );
        check(
            "// #![no_std]",
            Kind::Development,
            "limosa-engine/src/lib.rs: [no-std] must say #![no_std]",
        );
    }

    #[test]
    fn a_default_feature_of_our_own_is_found_too() {
        let mut packages = packages(Kind::Development);
        packages[0].has_default_features = true;
        let found = found(&texts("#![no_std]"), |tree, findings| {
            check(tree, &packages, findings)
        });
        assert_eq!(
            found,
            "limosa-engine/Cargo.toml: [no-std] limosa-pages must have default-features = false"
        );
    }
}
