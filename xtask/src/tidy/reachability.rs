//! Dead files: Rust files that no `mod` reaches, documents that no other document leads to, and
//! links that lead nowhere.

use std::collections::BTreeSet;

use super::Finding;
use crate::rust_source::RustSource;
use crate::tree::{Tree, resolve};
use crate::workspace::Package;

/// Where a reader starts.
const DOORS: [&str; 2] = ["README.md", "ARCHITECTURE.md"];
/// Read by their well-known names, so nobody needs to link them.
const KNOWN: [&str; 2] = ["CHANGELOG.md", "CONVENTIONS.md"];

pub fn check(tree: &Tree, packages: &[Package], findings: &mut Vec<Finding>) {
    let mut live = BTreeSet::new();
    for root in packages.iter().flat_map(|package| &package.roots) {
        follow_modules(tree, root, true, &mut live);
    }
    for (path, _) in tree.rust_files().filter(|(path, _)| !live.contains(*path)) {
        findings.push(Finding::new(
            path,
            0,
            "dead-file",
            "no mod declaration reaches it",
        ));
    }
    check_documents(tree, findings);
}

/// Marks a file and all that its `mod` declarations name.
fn follow_modules(tree: &Tree, path: &str, is_root: bool, live: &mut BTreeSet<String>) {
    let Some(text) = tree.text(path) else { return };
    if !live.insert(path.to_owned()) {
        return;
    }
    let directory = path.rsplit_once('/').map_or("", |(directory, _)| directory);
    let own = if is_root {
        directory
    } else {
        path.trim_end_matches(".rs")
    };
    for module in RustSource::new(text)
        .modules()
        .iter()
        .filter(|module| !module.inline)
    {
        // A plain `#[path]` starts at the file's directory, everything else below the module.
        let start = match &module.path {
            Some(_) if module.within.is_empty() => directory,
            _ => own,
        };
        let mut place = start.to_owned();
        for name in &module.within {
            place.push('/');
            place.push_str(name);
        }
        let file = match &module.path {
            Some(value) => resolve(&format!("{place}/x"), value),
            None => Some(format!("{place}/{}.rs", module.name)),
        };
        if let Some(file) = file {
            follow_modules(tree, file.trim_start_matches('/'), false, live);
        }
    }
}

fn check_documents(tree: &Tree, findings: &mut Vec<Finding>) {
    let mut reached: BTreeSet<String> = BTreeSet::new();
    let mut open: Vec<String> = DOORS.iter().map(|door| (*door).to_owned()).collect();
    while let Some(path) = open.pop() {
        if let Some(text) = tree.text(&path)
            && reached.insert(path.clone())
        {
            open.extend(
                links(text)
                    .into_iter()
                    .filter_map(|(_, link)| resolve(&path, link)),
            );
        }
    }
    for (path, text) in tree.documents() {
        if !reached.contains(path) && !KNOWN.contains(&path) {
            let message = "no link leads to it from README.md or ARCHITECTURE.md";
            findings.push(Finding::new(path, 0, "dead-file", message));
        }
        for (line, link) in links(text) {
            let goal = resolve(path, link);
            if !goal.is_some_and(|goal| leads_somewhere(tree, &goal)) {
                let message = format!("the link to '{link}' leads nowhere");
                findings.push(Finding::new(path, line, "dead-link", message));
            }
        }
    }
}

/// Whether there is such a file, or a directory with files in it.
fn leads_somewhere(tree: &Tree, goal: &str) -> bool {
    let within = format!("{goal}/");
    tree.has(goal) || tree.files().any(|(path, _)| path.starts_with(&within))
}

/// The relative links `[…](path)` of a document outside of code blocks, with their lines and
/// without what follows a `#`.
fn links(text: &str) -> Vec<(usize, &str)> {
    let mut links = Vec::new();
    let mut in_block = false;
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
        }
        if in_block {
            continue;
        }
        for (at, _) in line.match_indices("](") {
            let rest = &line[at + 2..];
            let link = rest.split([')', '#', ' ']).next().unwrap_or_default();
            let elsewhere = link.contains("://") || link.starts_with("mailto:");
            if !link.is_empty() && !elsewhere {
                links.push((index + 1, link));
            }
        }
    }
    links
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::found;

    fn check_modules(texts: &[(&str, &str)], roots: &[&str], expect: &str) {
        let package = Package {
            roots: roots.iter().map(|root| (*root).to_owned()).collect(),
            ..Package::default()
        };
        let found = found(texts, |tree, all| {
            check(tree, std::slice::from_ref(&package), all)
        });
        let dead: Vec<_> = found
            .lines()
            .filter_map(|line| line.split(':').next())
            .collect();
        assert_eq!(dead.join(" "), expect);
    }

    #[test]
    fn rust_files_that_nothing_declares_are_found() {
        let texts = [
            ("c/build.rs", ""),
            (
                "c/src/lib.rs",
                "mod a;\nmod i { mod j; }\n#[path = \"odd/p.rs\"] mod o;\n// mod dead;",
            ),
            ("c/src/a.rs", "mod b;"),
            ("c/src/a/b.rs", ""),
            ("c/src/a/dead.rs", ""),
            ("c/src/i/j.rs", ""),
            ("c/src/odd/p.rs", ""),
            ("c/src/dead.rs", ""),
            ("c/tests/t.rs", "mod u;"),
            ("c/tests/u.rs", ""),
        ];
        let roots = ["c/src/lib.rs", "c/tests/t.rs", "c/build.rs"];
        check_modules(&texts, &roots, "c/src/a/dead.rs c/src/dead.rs");
        check_modules(&texts[..2], &["c/src/lib.rs"], "c/build.rs");
        check_modules(&[("build.rs", "mod x;"), ("x.rs", "")], &["build.rs"], "");
    }

    #[test]
    fn documents_without_a_way_to_them_and_dead_links_are_found() {
        let texts = [
            (
                "README.md",
                "[a](docs/a.md#top) [w](https://x/y) [d](docs)\n```\n[x](no.md)\n```\n",
            ),
            ("docs/a.md", "[up](../README.md) [b](b.md) [here](#there)"),
            ("docs/b.md", "\n[gone](gone.md)"),
            ("docs/c.md", "[c](d.md)"),
            ("docs/d.md", "[d](c.md)"),
            ("CHANGELOG.md", ""),
        ];
        assert_eq!(
            found(&texts, |tree, all| check(tree, &[], all)),
            "docs/b.md:2: [dead-link] the link to 'gone.md' leads nowhere\n\
             docs/c.md: [dead-file] no link leads to it from README.md or ARCHITECTURE.md\n\
             docs/d.md: [dead-file] no link leads to it from README.md or ARCHITECTURE.md"
        );
    }
}
