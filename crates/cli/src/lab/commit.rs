//! From which commit this program was built, for results that are looked at later.
//!
//! Whoever builds a release says it by `LIMOSA_COMMIT`. A program that was built in a checkout lies
//! in its target directory, and git is asked there; `-dirty` marks changes that no commit holds.
//! Anything else is `unknown`: an answer that may be wrong is worse than none.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Characters of a commit's name: enough to be unique for good.
const ABBREVIATION: &str = "--abbrev=12";

/// The commit, or `unknown`.
pub(crate) fn of_this_program() -> String {
    let built = option_env!("LIMOSA_COMMIT").map(str::to_owned);
    let here = || checkout(&std::env::current_exe().ok()?);
    built
        .or_else(|| ask(&here()?))
        .unwrap_or_else(|| "unknown".to_owned())
}

/// The checkout in whose target directory the program lies.
fn checkout(program: &Path) -> Option<PathBuf> {
    let mut places = program.ancestors();
    let target = places.find(|place| place.ends_with("target"))?;
    let root = target.parent()?;
    let is_ours = root.join("crates/cli/Cargo.toml").is_file();
    is_ours.then(|| root.to_owned())
}

fn ask(checkout: &Path) -> Option<String> {
    let answer = Command::new("git")
        .arg("-C")
        .arg(checkout)
        .args([
            "describe",
            "--always",
            "--dirty",
            "--exclude=*",
            ABBREVIATION,
        ])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let commit = String::from_utf8(answer.stdout).ok()?.trim().to_owned();
    (answer.status.success() && !commit.is_empty()).then_some(commit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_program_in_the_target_directory_of_a_checkout_has_one() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let check = |program: &Path, expect: Option<&Path>| {
            assert_eq!(checkout(program).as_deref(), expect);
        };
        check(&root.join("target/release/limosa"), Some(&root));
        check(&root.join("limosa"), None);
        check(Path::new("/usr/bin/limosa"), None);
        check(Path::new("/elsewhere/target/debug/limosa"), None);
    }
}
