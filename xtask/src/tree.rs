//! The files of the project, as text by their path.
//!
//! What git would put into a commit is the tree: tracked files and new ones that are not ignored.
//! Checks get the tree as a value, so that their tests can make one up.
//!
//! Absent on purpose: files that are no UTF-8 (there should be none but golden data), and
//! everything that git ignores.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The text of each file by its path from the root of the project, with `/` between the parts.
#[derive(Default)]
pub struct Tree {
    files: BTreeMap<String, String>,
}

impl Tree {
    /// Reads the tree below `root`.
    pub fn read(root: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        for path in listed(root)? {
            // A file may be listed and deleted, or be binary: neither is for these checks.
            let Ok(bytes) = std::fs::read(root.join(&path)) else {
                continue;
            };
            if let Ok(text) = String::from_utf8(bytes) {
                files.insert(path, text);
            }
        }
        Ok(Self { files })
    }

    /// A tree that was made up.
    #[cfg(test)]
    pub fn from_texts(texts: &[(&str, &str)]) -> Self {
        let own = |(path, text): &(&str, &str)| ((*path).to_owned(), (*text).to_owned());
        Self {
            files: texts.iter().map(own).collect(),
        }
    }

    /// The text of one file.
    pub fn text(&self, path: &str) -> Option<&str> {
        self.files.get(path).map(String::as_str)
    }

    /// Whether there is such a file.
    pub fn has(&self, path: &str) -> bool {
        self.files.contains_key(path)
    }

    /// All files in the order of their paths.
    pub fn files(&self) -> impl Iterator<Item = (&str, &str)> {
        self.files
            .iter()
            .map(|(path, text)| (path.as_str(), text.as_str()))
    }

    /// The Rust files.
    pub fn rust_files(&self) -> impl Iterator<Item = (&str, &str)> {
        self.files().filter(|(path, _)| path.ends_with(".rs"))
    }

    /// The Markdown files.
    pub fn documents(&self) -> impl Iterator<Item = (&str, &str)> {
        self.files().filter(|(path, _)| path.ends_with(".md"))
    }
}

/// The path that `relative` means in a file at `from`, without `.` and `..`; none if it leaves the
/// tree.
pub fn resolve(from: &str, relative: &str) -> Option<String> {
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for part in relative.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            name => parts.push(name),
        }
    }
    Some(parts.join("/"))
}

fn listed(root: &Path) -> Result<Vec<String>> {
    // The clone may belong to another user than the one who runs this, root for example; reading
    // its list of files is harmless, so git's refusal is lifted for this one command.
    let output = Command::new("git")
        .args(["-c", "safe.directory=*", "ls-files", "-z"])
        .args(["--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()
        .context("git could not be started")?;
    ensure!(
        output.status.success(),
        "git could not list the files: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let paths = String::from_utf8(output.stdout).context("a file has a name that is no UTF-8")?;
    Ok(paths
        .split('\0')
        .filter(|path| !path.is_empty())
        .map(str::to_owned)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_paths_are_resolved_from_the_file() {
        let check = |from: &str, relative: &str, expect: Option<&str>| {
            assert_eq!(
                resolve(from, relative).as_deref(),
                expect,
                "{relative} from {from}"
            );
        };
        check("README.md", "docs/a.md", Some("docs/a.md"));
        check("docs/a.md", "./b.md", Some("docs/b.md"));
        check("docs/a.md", "../README.md", Some("README.md"));
        check("README.md", "../x.md", None);
    }
}
