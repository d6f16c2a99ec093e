//! The rules of CONVENTIONS.md that a machine can check.
//!
//! Each check is a function of a tree of texts (and of what Cargo knows) that adds findings. None
//! stops the others, so that one run names everything.
//!
//! Absent on purpose: fixing. Only the hash of the wire format is rewritten, and only when asked,
//! since a person has to say that the document was brought up to date.

use std::fmt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::tree::Tree;
use crate::workspace::{self, Package};

mod citations;
mod edges;
mod naming;
mod no_std;
mod presence;
mod reachability;
mod size;
mod unsafety;
mod wire_hash;
mod words;

/// One place where a rule is broken.
#[derive(Debug, PartialEq, Eq)]
pub struct Finding {
    /// The file.
    pub path: String,
    /// The line, counted from 1; 0 for the whole file.
    pub line: usize,
    /// The short name of the rule.
    pub rule: &'static str,
    /// What is wrong and, where it is not plain, what to do.
    pub message: String,
}

impl Finding {
    fn new(path: &str, line: usize, rule: &'static str, message: impl Into<String>) -> Self {
        Self {
            path: path.to_owned(),
            line,
            rule,
            message: message.into(),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(formatter, "{}: [{}] {}", self.path, self.rule, self.message),
            line => write!(
                formatter,
                "{}:{line}: [{}] {}",
                self.path, self.rule, self.message
            ),
        }
    }
}

/// Runs every check on the project at `root`.
pub fn run(root: &Path) -> Result<Vec<Finding>> {
    let tree = Tree::read(root)?;
    let packages = workspace::packages(root)?;
    Ok(check(&tree, &packages))
}

/// Writes the present hash of the wire format into the protocol document.
pub fn bless(root: &Path) -> Result<()> {
    let tree = Tree::read(root)?;
    let document = tree
        .text(wire_hash::DOCUMENT)
        .with_context(|| format!("{} is missing", wire_hash::DOCUMENT))?;
    let hash = wire_hash::hash(&tree).context("there is no wire format to hash")?;
    let blessed = wire_hash::with_hash(document, &hash);
    ensure!(
        blessed.is_some(),
        "{} has no line '<!-- wire hash: HEX -->' to rewrite",
        wire_hash::DOCUMENT
    );
    if let Some(text) = blessed {
        std::fs::write(root.join(wire_hash::DOCUMENT), text)?;
    }
    Ok(())
}

fn check(tree: &Tree, packages: &[Package]) -> Vec<Finding> {
    let mut findings = Vec::new();
    presence::check(tree, &mut findings);
    size::check(tree, &mut findings);
    naming::check(tree, &mut findings);
    words::check(tree, &mut findings);
    citations::check(tree, &mut findings);
    wire_hash::check(tree, &mut findings);
    reachability::check(tree, packages, &mut findings);
    no_std::check(tree, packages, &mut findings);
    unsafety::check(tree, packages, &mut findings);
    edges::check(packages, &mut findings);
    findings.sort_by(|one, other| (&one.path, one.line).cmp(&(&other.path, other.line)));
    findings
}

/// What a check finds in a made-up tree, one finding a line, for comparison with golden text.
#[cfg(test)]
fn found(texts: &[(&str, &str)], check: impl Fn(&Tree, &mut Vec<Finding>)) -> String {
    let mut findings = Vec::new();
    check(&Tree::from_texts(texts), &mut findings);
    findings
        .iter()
        .map(Finding::to_string)
        .collect::<Vec<_>>()
        .join("\n")
}
