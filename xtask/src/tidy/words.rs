//! What no text of the project may contain: paths of one machine, talk about how the project was
//! made, and notes to oneself.
//!
//! This file is the one exception, since it has to name what it looks for.

use super::Finding;
use crate::tree::Tree;

const THIS_FILE: &str = "xtask/src/tidy/words.rs";

/// Directories of one machine. They count only where a path starts, not in the middle of one.
const MACHINE_PATHS: [&str; 4] = ["/work/", "/root/", "/home/", "/workspace/"];

/// Talk about the making. Looked for in lower case, as whole words.
const MAKING: [&str; 14] = [
    "issues show",
    "issue tracker",
    "issue #",
    "coding session",
    "chat session",
    "coding agent",
    "ai agent",
    "sub-agent",
    "subagent",
    "language model",
    "llm",
    "chatbot",
    "the brief says",
    "as requested by the user",
];

/// Notes to oneself: either it is done, or it is said in a document.
const NOTES: [&str; 4] = ["TODO", "FIXME", "XXX", "HACK"];

pub fn check(tree: &Tree, findings: &mut Vec<Finding>) {
    let read = |path: &str| path != THIS_FILE && !path.ends_with("Cargo.lock");
    for (path, text) in tree.files().filter(|(path, _)| read(path)) {
        for (index, line) in text.lines().enumerate() {
            check_line(path, index + 1, line, findings);
        }
    }
}

fn check_line(path: &str, number: usize, line: &str, findings: &mut Vec<Finding>) {
    for place in MACHINE_PATHS {
        if starts(line, place, |before| {
            before.is_alphanumeric() || "._-/}*>".contains(before)
        }) {
            let message = format!("'{place}' is a path of one machine");
            findings.push(Finding::new(path, number, "machine-path", message));
        }
    }
    let lower = line.to_lowercase();
    for word in MAKING.into_iter().filter(|word| is_whole(&lower, word)) {
        let message = format!("'{word}' is about how the project is made");
        findings.push(Finding::new(path, number, "making", message));
    }
    if has_issue_number(&lower) {
        let message = "a number of an issue is about how the project is made";
        findings.push(Finding::new(path, number, "making", message));
    }
    for note in NOTES.into_iter().filter(|note| is_whole(line, note)) {
        let message = format!("{note}: do it, or say in a document what is missing");
        findings.push(Finding::new(path, number, "note", message));
    }
}

/// Whether `part` occurs where the character before it does not go on into it.
fn starts(line: &str, part: &str, goes_on: impl Fn(char) -> bool) -> bool {
    line.match_indices(part)
        .any(|(at, _)| !line[..at].chars().next_back().is_some_and(&goes_on))
}

/// Whether `part` occurs with no letter or digit directly before or after it.
fn is_whole(line: &str, part: &str) -> bool {
    let is_word = |letter: char| letter.is_alphanumeric() || letter == '_';
    line.match_indices(part).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + part.len()..].chars().next();
        let goes_on = part.ends_with(is_word) && after.is_some_and(is_word);
        !goes_on && !before.is_some_and(is_word)
    })
}

/// Whether the line, in lower case, has `issue` followed by a number.
fn has_issue_number(lower: &str) -> bool {
    lower.match_indices("issue ").any(|(at, word)| {
        let digits = lower[at + word.len()..]
            .chars()
            .take_while(char::is_ascii_digit)
            .count();
        // Years and the like are no numbers of issues.
        (1..=3).contains(&digits)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::found;

    #[test]
    fn forbidden_words_are_found_and_look_alikes_are_not() {
        let check = |text: &str, expect: &str| {
            let found = found(&[("docs/a.md", text)], check);
            let rules: Vec<&str> = found
                .lines()
                .filter_map(|line| line.split(['[', ']']).nth(1))
                .collect();
            assert_eq!(rules.join(" "), expect, "{text}");
        };
        check("see /work/x", "machine-path");
        check("`/root/.cargo` and (/home/me)", "machine-path machine-path");
        check("the frame/work/flow and https://host/home/x", "");
        check("See Issue #12.", "making");
        check("point 5 of issue 2", "making");
        check("the issue 2024 of the journal; the issues of 2 VMs", "");
        check("written by a coding agent", "making");
        check("a session of HTTP, an agent of the guest", "");
        check("// TODO: later", "note");
        check("TODOS of nobody, xxx, xxh3", "");
        check("FIXME", "note");
    }

    #[test]
    fn only_this_file_and_lock_files_are_left_out() {
        let check = |path: &str, finds: bool| {
            assert_eq!(!found(&[(path, "TODO")], check).is_empty(), finds, "{path}");
        };
        check("a.toml", true);
        check("xtask/src/main.rs", true);
        check(THIS_FILE, false);
        check("guest/programs/Cargo.lock", false);
    }
}
