//! The files that a reader or a checker looks for by name.

use super::Finding;
use crate::tree::Tree;

/// What has to be there, and for whom.
const REQUIRED: [(&str, &str); 11] = [
    ("README.md", "who comes for the first time"),
    ("ARCHITECTURE.md", "who changes the code"),
    ("CONVENTIONS.md", "who changes the code"),
    ("CHANGELOG.md", "who updates"),
    ("LICENSE-APACHE", "who uses the code elsewhere"),
    ("LICENSE-MIT", "who uses the code elsewhere"),
    ("docs/protocol.md", "who writes a peer"),
    ("docs/micro-guests.md", "who writes a guest program"),
    ("docs/techniques.md", "who operates or learns"),
    ("docs/references.md", "who follows a citation"),
    (".ci/run", "the machine that checks every change"),
];

/// The one command that checks everything: what people read and what the machine runs is the same.
const COMMAND: &str = "cargo xtask ci";

pub fn check(tree: &Tree, findings: &mut Vec<Finding>) {
    for (path, reader) in REQUIRED {
        if !tree.has(path) {
            findings.push(Finding::new(
                path,
                0,
                "missing",
                format!("is there for {reader}"),
            ));
        }
    }
    for path in ["README.md", ".ci/run"] {
        if tree.text(path).is_some_and(|text| !text.contains(COMMAND)) {
            let message = format!("must name the test command, '{COMMAND}'");
            findings.push(Finding::new(path, 0, "test-command", message));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::found;

    #[test]
    fn a_missing_file_and_a_missing_command_are_found() {
        let mut texts: Vec<_> = REQUIRED.iter().map(|(path, _)| (*path, COMMAND)).collect();
        assert_eq!(found(&texts, check), "");
        texts[0].1 = "cargo test";
        texts.remove(2);
        assert_eq!(
            found(&texts, check),
            "CONVENTIONS.md: [missing] is there for who changes the code\n\
             README.md: [test-command] must name the test command, 'cargo xtask ci'"
        );
    }
}
