//! A citation leads to the list of references: `[Clark05 §3.2]` needs an entry `[Clark05]`.
//!
//! A key is a name with the two digits of a year (`Clark05`, `Hines09b`) or capitals (`KVM-API`,
//! `UFFD`). Whatever carries a `§` is a citation as well. In Rust only comments are read; a bracket
//! that is followed by `(` or `:` or that holds back quotes is a link, not a citation.

use std::collections::BTreeMap;

use super::Finding;
use crate::rust_source::RustSource;
use crate::tree::Tree;

const LIST: &str = "docs/references.md";

pub fn check(tree: &Tree, findings: &mut Vec<Finding>) {
    let mut known = BTreeMap::new();
    for (line, key) in tree.text(LIST).map(entries).unwrap_or_default() {
        if known.insert(key, line).is_some() {
            let message = format!("[{key}] stands here twice");
            findings.push(Finding::new(LIST, line, "citation", message));
        }
    }
    let mut check = |path: &str, text: &str| {
        for (line, key) in citations(text).filter(|(_, key)| !known.contains_key(key)) {
            let message = format!("[{key}] is not in {LIST}");
            findings.push(Finding::new(path, line, "citation", message));
        }
    };
    for (path, text) in tree.rust_files() {
        check(path, &RustSource::new(text).comments);
    }
    for (path, text) in tree.documents() {
        check(path, text);
    }
}

/// The keys of the list, with their lines: `- **[Key]** …`.
fn entries(list: &str) -> Vec<(usize, &str)> {
    list.lines()
        .enumerate()
        .filter_map(|(index, line)| {
            let (key, _) = line.strip_prefix("- **[")?.split_once("]**")?;
            Some((index + 1, key))
        })
        .collect()
}

/// Every citation with its line.
fn citations(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().flat_map(|(index, line)| {
        line.match_indices('[').filter_map(move |(at, _)| {
            let rest = &line[at + 1..];
            let inner = &rest[..rest.find(']')?];
            let after = rest[inner.len() + 1..].chars().next();
            let is_link = matches!(after, Some('(' | ':' | '[')) || inner.contains('`');
            let key = inner.split([' ', ',', '§']).next()?;
            (!is_link && (is_key(key) || inner.contains('§'))).then_some((index + 1, key))
        })
    })
}

fn is_key(word: &str) -> bool {
    is_name_and_year(word) || is_capitals(word)
}

fn is_name_and_year(word: &str) -> bool {
    let stem = word.trim_end_matches(|letter: char| letter.is_ascii_lowercase());
    let name = stem.trim_end_matches(|digit: char| digit.is_ascii_digit());
    word.len() - stem.len() <= 1
        && stem.len() - name.len() == 2
        && name.len() >= 2
        && name.starts_with(|first: char| first.is_ascii_uppercase())
        && name.chars().all(|letter| letter.is_ascii_alphabetic())
        && name.ends_with(|last: char| last.is_ascii_lowercase())
}

fn is_capitals(word: &str) -> bool {
    word.len() >= 3
        && word.starts_with(|first: char| first.is_ascii_uppercase())
        && word
            .chars()
            .all(|letter| letter.is_ascii_uppercase() || letter == '-')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::found;

    #[test]
    fn citations_without_an_entry_are_found() {
        let list = "# R\n- **[Clark05]** C. Clark.\n- **[KVM-API]** The kernel.\n";
        let check = |path: &str, text: &str, expect: &str| {
            let found = found(&[(LIST, list), (path, text)], check);
            let keys: Vec<_> = found
                .lines()
                .filter_map(|line| line.split("] [").nth(1)?.split(']').next())
                .collect();
            assert_eq!(keys.join(" "), expect, "{text}");
        };
        check(
            "a.rs",
            "// [Clark05 §3.2] rounds end\n//! as in [KVM-API].",
            "",
        );
        check("a.rs", "// [Clark06] and [KVM-ABI §4.1]", "Clark06 KVM-ABI");
        check(
            "a.rs",
            "/// See [`Clark06`], [Pfn], [Foo12](x), [UFFD]: and [a §1]",
            "a",
        );
        check(
            "a.rs",
            "let a = [Clark06]; f(\"[Clark06]\"); let c = [MAX];",
            "",
        );
        check("docs/a.md", "as in [Hines09a, Clark05]", "Hines09a");
        check("docs/a.md", "[x] [1] [2005] [v0.1] [Unreleased]", "");
    }

    #[test]
    fn a_key_that_stands_twice_is_found() {
        let list = "- **[Clark05]** One.\n- **[Clark05]** Two.\n";
        let expect = "docs/references.md:2: [citation] [Clark05] stands here twice";
        assert_eq!(found(&[(LIST, list)], check), expect);
    }
}
