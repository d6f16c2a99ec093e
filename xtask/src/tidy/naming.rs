//! Each Rust file says what it is for, and no module has a name that says nothing.

use super::Finding;
use crate::rust_source::RustSource;
use crate::tree::Tree;

/// Names under which anything could be put, and in the end is.
const EMPTY_NAMES: [&str; 7] = [
    "common", "util", "utils", "helper", "helpers", "manager", "misc",
];

pub fn check(tree: &Tree, findings: &mut Vec<Finding>) {
    for (path, text) in tree.rust_files() {
        if !text.trim_start().starts_with("//!") {
            let message = "must open with //!: what it is for, the idea, invariants, absences";
            findings.push(Finding::new(path, 1, "file-doc", message));
        }
        if path.ends_with("/mod.rs") {
            findings.push(Finding::new(
                path,
                0,
                "mod-rs",
                "must be NAME.rs beside NAME/",
            ));
        }
        for part in path
            .trim_end_matches(".rs")
            .split('/')
            .filter(|part| says_nothing(part))
        {
            findings.push(Finding::new(
                path,
                0,
                "module-name",
                format!("'{part}' says nothing"),
            ));
        }
        for module in RustSource::new(text).modules() {
            if module.inline && says_nothing(&module.name) {
                let message = format!("'{}' says nothing", module.name);
                findings.push(Finding::new(path, module.line, "module-name", message));
            }
        }
    }
}

/// Whether the name, or a word of it, is one of the empty ones.
fn says_nothing(name: &str) -> bool {
    name.split(['_', '-'])
        .any(|word| EMPTY_NAMES.contains(&word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::found;

    #[test]
    fn empty_names_and_missing_introductions_are_found() {
        let check = |path: &str, text: &str, expect: &str| {
            assert_eq!(found(&[(path, text)], check), expect);
        };
        check("src/set.rs", "//! A set.\nmod utility;\n", "");
        check(
            "src/set.rs",
            "/// A set.\n",
            "src/set.rs:1: [file-doc] must open with //!: what it is for, the idea, invariants, absences",
        );
        check(
            "src/a/mod.rs",
            "//! A.\n",
            "src/a/mod.rs: [mod-rs] must be NAME.rs beside NAME/",
        );
        check(
            "src/util/a.rs",
            "//! A.\n",
            "src/util/a.rs: [module-name] 'util' says nothing",
        );
        check(
            "src/page_helpers.rs",
            "//! A.\n",
            "src/page_helpers.rs: [module-name] 'page_helpers' says nothing",
        );
        check(
            "a.rs",
            "//! A.\nmod misc { }\n",
            "a.rs:2: [module-name] 'misc' says nothing",
        );
    }
}
