//! The document of the protocol carries a hash of the code that writes the protocol.
//!
//! When the code changes the hash no longer fits, and somebody has to look at the document before
//! `cargo xtask tidy --bless` writes the new one. The hash is no protection against ill will, so
//! a fast one will do.

use xxhash_rust::xxh3::Xxh3;

use super::Finding;
use crate::tree::Tree;

/// The document that is kept in step.
pub const DOCUMENT: &str = "docs/protocol.md";
const CODE: &str = "crates/engine/src/wire.rs";
const CODE_BELOW: &str = "crates/engine/src/wire/";
const OPEN: &str = "<!-- wire hash: ";
const CLOSE: &str = " -->";

pub fn check(tree: &Tree, findings: &mut Vec<Finding>) {
    let Some(hash) = hash(tree) else {
        findings.push(Finding::new(
            CODE,
            0,
            "wire-hash",
            "the wire format is missing",
        ));
        return;
    };
    // That the document is missing is found elsewhere.
    let Some(document) = tree.text(DOCUMENT) else {
        return;
    };
    match document_hash(document) {
        Some(written) if written == hash => {}
        Some(_) => {
            let message =
                format!("{CODE} has changed: bring this up to date, then tidy --bless ({hash})");
            findings.push(Finding::new(DOCUMENT, 0, "wire-hash", message));
        }
        None => {
            let message = format!("must contain the line '{OPEN}{hash}{CLOSE}'");
            findings.push(Finding::new(DOCUMENT, 0, "wire-hash", message));
        }
    }
}

/// The hash of the files of the wire format with their names; none without `wire.rs`.
pub fn hash(tree: &Tree) -> Option<String> {
    tree.text(CODE)?;
    let mut hasher = Xxh3::new();
    let is_wire = |path: &str| path == CODE || path.starts_with(CODE_BELOW);
    for (path, text) in tree.rust_files().filter(|(path, _)| is_wire(path)) {
        // Lengths first, so that a line that moves from one file to the next changes the hash.
        for part in [path, text] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
    }
    Some(format!("{:032x}", hasher.digest128()))
}

/// The document with this hash in its line; none if it has no such line.
pub fn with_hash(document: &str, hash: &str) -> Option<String> {
    let written = document_hash(document)?;
    let line = format!("{OPEN}{written}{CLOSE}");
    Some(document.replacen(&line, &format!("{OPEN}{hash}{CLOSE}"), 1))
}

fn document_hash(document: &str) -> Option<&str> {
    document
        .lines()
        .find_map(|line| line.trim().strip_prefix(OPEN)?.strip_suffix(CLOSE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::found;

    #[test]
    fn a_change_of_the_code_needs_the_document() {
        let below = "crates/engine/src/wire/frame.rs";
        let rule = |document: &str, code: &str, frame: &str| {
            let texts = [(DOCUMENT, document), (CODE, code), (below, frame)];
            found(&texts, check)
                .split(['[', ']'])
                .nth(1)
                .map(str::to_owned)
        };
        let tree = Tree::from_texts(&[(CODE, "one"), (below, "two")]);
        let blessed = with_hash("# P\n<!-- wire hash: 0 -->\n", &hash(&tree).unwrap()).unwrap();
        assert_eq!(rule(&blessed, "one", "two"), None);
        assert_eq!(rule(&blessed, "one!", "two").as_deref(), Some("wire-hash"));
        assert_eq!(rule(&blessed, "one", "two!").as_deref(), Some("wire-hash"));
        assert_eq!(rule("# P\n", "one", "two").as_deref(), Some("wire-hash"));
        assert_eq!(with_hash("# P\n", "1"), None);
    }

    #[test]
    fn a_wire_format_that_moved_away_is_found() {
        let expect = format!("{CODE}: [wire-hash] the wire format is missing");
        assert_eq!(found(&[(DOCUMENT, "x")], check), expect);
    }
}
