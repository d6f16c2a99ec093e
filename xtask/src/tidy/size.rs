//! No file above 800 lines without its tests, no function above 70.
//!
//! A long function passes only with its reason in a comment just above it or in its first lines:
//! `// tidy: long-function because …`.

use super::Finding;
use crate::rust_source::{Function, RustSource};
use crate::tree::Tree;

/// Above this a file hides more than one decision (CONVENTIONS.md, Modules).
const FILE_LINES_MAX: usize = 800;
/// What fits on a screen (CONVENTIONS.md, Modules).
const FUNCTION_LINES_MAX: usize = 70;
const EXCUSE: &str = "tidy: long-function because ";

pub fn check(tree: &Tree, findings: &mut Vec<Finding>) {
    for (path, text) in tree.rust_files() {
        let source = RustSource::new(text);
        let lines = source.lines_without_tests();
        if lines > FILE_LINES_MAX && !is_test_file(path) {
            let message = format!("{lines} lines without tests, at most {FILE_LINES_MAX}");
            findings.push(Finding::new(path, 0, "file-size", message));
        }
        for function in source.functions() {
            let lines = function.last_line - function.first_line + 1;
            if lines > FUNCTION_LINES_MAX && !is_excused(&source, &function) {
                let name = &function.name;
                let message = format!("fn {name} has {lines} lines, at most {FUNCTION_LINES_MAX}");
                findings.push(Finding::new(
                    path,
                    function.first_line,
                    "function-size",
                    message,
                ));
            }
        }
    }
}

/// Whether the whole file is tests.
fn is_test_file(path: &str) -> bool {
    path.starts_with("tests/") || path.contains("/tests/") || path.ends_with("/tests.rs")
}

/// Whether a comment with a reason stands in the comments and attributes above the function or
/// before its third line.
fn is_excused(source: &RustSource<'_>, function: &Function) -> bool {
    let lines: Vec<&str> = source.text.lines().collect();
    let comments: Vec<&str> = source.comments.lines().collect();
    let above = lines[..function.first_line - 1]
        .iter()
        .rev()
        .take_while(|line| line.trim_start().starts_with(['/', '#']))
        .count();
    let first = function.first_line - 1 - above;
    comments[first..function.first_line + 2]
        .iter()
        .any(|comment| {
            comment
                .split_once(EXCUSE)
                .is_some_and(|(_, reason)| !reason.trim().is_empty())
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::found;

    fn function(above: &str, lines: usize) -> String {
        format!("{above}fn f() {{\n{}}}\n", "    x();\n".repeat(lines - 2))
    }

    #[test]
    fn long_functions_are_found_unless_excused() {
        let check = |text: &str, expect: &str| {
            assert_eq!(found(&[("a.rs", text)], check), expect);
        };
        let bad = "a.rs:1: [function-size] fn f has 71 lines, at most 70";
        check(&function("", 70), "");
        check(&function("", 71), bad);
        check(
            &function("// tidy: long-function because one table\n", 71),
            "",
        );
        check(
            &function("// tidy: long-function because one table\n#[inline]\n", 71),
            "",
        );
        check(
            &function("// tidy: long-function because \n", 71),
            &bad.replace(":1:", ":2:"),
        );
    }

    #[test]
    fn long_files_are_found_without_their_tests() {
        let check = |path: &str, text: &str, expect: &str| {
            assert_eq!(found(&[(path, text)], check), expect);
        };
        let tests = "#[cfg(test)]\nmod tests {\n    // more\n}\n";
        check("a.rs", &format!("{}{tests}", "//\n".repeat(800)), "");
        check(
            "a.rs",
            &"//\n".repeat(801),
            "a.rs: [file-size] 801 lines without tests, at most 800",
        );
        check("a/tests/b.rs", &"//\n".repeat(801), "");
    }
}
