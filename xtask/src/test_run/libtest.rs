//! Reads what `cargo test … -- --show-output` prints, for documentation tests, guest programs, and
//! where nextest is not installed.
//!
//! The output of each test that passed follows after all of them have run, under
//! `---- name stdout ----`; it is left out, but for the lines that say that the test skipped.

use super::{Counts, Reader, says_skipped};

/// What has been read so far.
#[derive(Default)]
pub struct Libtest {
    /// Whether the section `successes:` is being read.
    in_successes: bool,
    /// Whether the test whose output is being read has said that it skipped.
    has_said: bool,
    counts: Counts,
    self_skipped: u64,
}

impl Reader for Libtest {
    fn line(&mut self, line: &str) -> bool {
        if let Some(result) = line.strip_prefix("test result: ") {
            self.in_successes = false;
            self.counts += read_result(result);
            return true;
        }
        match line {
            "successes:" => self.in_successes = true,
            "failures:" => self.in_successes = false,
            _ if line.starts_with("---- ") => self.has_said = false,
            _ if self.in_successes && says_skipped(line) && !self.has_said => {
                self.has_said = true;
                self.self_skipped += 1;
                return true;
            }
            _ => {}
        }
        !self.in_successes
    }

    fn counts(&self) -> Counts {
        Counts {
            passed: self.counts.passed.saturating_sub(self.self_skipped),
            skipped: self.counts.skipped + self.self_skipped,
            ..self.counts
        }
    }
}

/// The numbers in `FAILED. 3 passed; 1 failed; 1 ignored; 0 measured; …`.
fn read_result(result: &str) -> Counts {
    let number = |what: &str| {
        result
            .split(['.', ';'])
            .filter_map(|part| part.trim().split_once(' '))
            .find(|(_, word)| *word == what)
            .and_then(|(number, _)| number.parse().ok())
            .unwrap_or(0)
    };
    Counts {
        passed: number("passed"),
        failed: number("failed"),
        skipped: number("ignored"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: &str = "\
running 5 tests
test b ... ok
test c ... FAILED

successes:

---- b stdout ----
noise
skipped: no /dev/kvm
skipped: twice counts once

---- d stdout ----
skipped: no /dev/kvm


successes:
    b
    d

failures:

---- c stdout ----
skipped: said before it failed

failures:
    c

test result: FAILED. 3 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.14s

running 1 test
test src/lib.rs - f (line 1) ... ok

test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.15s
";

    #[test]
    fn results_are_summed_and_tests_that_say_so_count_as_skipped() {
        let mut reader = Libtest::default();
        let shown: Vec<_> = RUN.lines().filter(|line| reader.line(line)).collect();
        assert_eq!(
            reader.counts(),
            Counts {
                passed: 2,
                failed: 1,
                skipped: 3
            }
        );
        assert!(shown.contains(&"skipped: said before it failed"));
        assert!(!shown.contains(&"noise"));
    }
}
