//! Unsafe code only where the kernel is called, and in guests, which have no kernel below them.
//!
//! Every other package either forbids it in its root files or inherits the lints of the workspace,
//! which deny it, and then nowhere allows it again.

use super::Finding;
use crate::rust_source::{RustSource, matches_at};
use crate::tree::Tree;
use crate::workspace::Package;

const MAY: [&str; 3] = ["limosa-os", "limosa-micro-logic", "limosa-micro-programs"];

pub fn check(tree: &Tree, packages: &[Package], findings: &mut Vec<Finding>) {
    let denied = tree.text("Cargo.toml").is_some_and(is_denied_by_workspace);
    for package in packages
        .iter()
        .filter(|package| !MAY.contains(&package.name.as_str()))
    {
        let manifest = format!("{}/Cargo.toml", package.directory);
        let inherits = denied && tree.text(&manifest).is_some_and(inherits_lints);
        let forbids = |root: &String| tree.text(root).is_some_and(|text| says(text, "forbid"));
        if !inherits && !package.roots.iter().all(forbids) {
            let message = "must inherit the workspace's lints, or forbid unsafe_code in its roots";
            findings.push(Finding::new(&manifest, 0, "unsafe", message));
        }
        let within = format!("{}/", package.directory);
        for (path, text) in tree
            .rust_files()
            .filter(|(path, _)| path.starts_with(&within))
        {
            if says(text, "allow") || says(text, "expect") {
                let message = "allows unsafe_code: what needs it belongs into crates/os";
                findings.push(Finding::new(path, 0, "unsafe", message));
            }
        }
    }
}

/// Whether `level(… unsafe_code …)` stands in the code.
fn says(text: &str, level: &str) -> bool {
    let source = RustSource::new(text);
    let tokens = source.tokens();
    (0..tokens.len())
        .filter(|&at| matches_at(&tokens, at, &[level, "("]))
        .any(|at| {
            tokens[at..]
                .iter()
                .take_while(|token| token.text != ")")
                .any(|token| token.text == "unsafe_code")
        })
}

fn is_denied_by_workspace(manifest: &str) -> bool {
    let value = section_value(manifest, "[workspace.lints.rust]", "unsafe_code");
    value.is_some_and(|value| value == "\"deny\"" || value == "\"forbid\"")
}

fn inherits_lints(manifest: &str) -> bool {
    section_value(manifest, "[lints]", "workspace") == Some("true")
}

/// The value of `key = value` in a section of a manifest.
fn section_value<'a>(manifest: &'a str, section: &str, key: &str) -> Option<&'a str> {
    manifest
        .lines()
        .map(str::trim)
        .skip_while(|line| *line != section)
        .skip(1)
        .take_while(|line| !line.starts_with('['))
        .filter_map(|line| line.split_once('='))
        .find(|(name, _)| name.trim() == key)
        .map(|(_, value)| value.trim())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::found;

    #[test]
    fn a_package_that_may_use_unsafe_code_is_found() {
        let check = |name: &str, lints: &str, code: &str, expect: &str| {
            let texts = [
                (
                    "Cargo.toml",
                    "[workspace.lints.rust]\nunsafe_code = \"deny\"\n",
                ),
                ("c/Cargo.toml", lints),
                ("c/src/lib.rs", code),
            ];
            let package = Package {
                name: name.to_owned(),
                directory: "c".to_owned(),
                roots: vec!["c/src/lib.rs".to_owned()],
                ..Package::default()
            };
            let found = found(&texts, |tree, all| {
                check(tree, std::slice::from_ref(&package), all)
            });
            assert_eq!(found, expect);
        };
        let inherit = "[lints]\nworkspace = true\n\n[dependencies]\n";
        let missing = "c/Cargo.toml: [unsafe] must inherit the workspace's lints, or forbid unsafe_code in its roots";
        let allows =
            "c/src/lib.rs: [unsafe] allows unsafe_code: what needs it belongs into crates/os";
        check("limosa-vmm", inherit, "//! V.", "");
        check(
            "limosa-vmm",
            "[lints]\n[x]\nworkspace = true\n",
            "//! V.",
            missing,
        );
        check("limosa-vmm", "", "#![forbid(unsafe_code)]", "");
        check("limosa-vmm", "", "// #![forbid(unsafe_code)]", missing);
        check(
            "limosa-vmm",
            inherit,
            "#[allow(dead_code, unsafe_code)]\nfn f() {}",
            allows,
        );
        check("limosa-os", "", "#![allow(unsafe_code)]", "");
    }
}
