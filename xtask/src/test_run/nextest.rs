//! Reads what `cargo nextest run --success-output=immediate` prints.
//!
//! A line with the status of a test is followed by the indented output of that test. The output of
//! a test that passed is left out, but for the line that says that it skipped.

use super::{Counts, Reader, says_skipped};

/// What has been read so far.
#[derive(Default)]
pub struct Nextest {
    /// Inside the output of a test that passed, and whether that has said that it skipped.
    passed_test: Option<bool>,
    self_skipped: u64,
    /// Run, passed and left out, from the summary.
    summary: Option<(u64, u64, u64)>,
}

impl Reader for Nextest {
    fn line(&mut self, line: &str) -> bool {
        if let Some(summary) = line.trim_start().strip_prefix("Summary [") {
            self.passed_test = None;
            self.summary = read_summary(summary);
            return true;
        }
        if let Some(status) = status_of(line) {
            let passed = matches!(status, "PASS" | "LEAK" | "FLAKY");
            // After the summary the failed tests are named once more.
            self.passed_test = (passed && self.summary.is_none()).then_some(false);
            return true;
        }
        match &mut self.passed_test {
            None => true,
            Some(said) => {
                let skips = says_skipped(line) && !*said;
                if skips {
                    *said = true;
                    self.self_skipped += 1;
                }
                skips
            }
        }
    }

    fn counts(&self) -> Counts {
        let (run, passed, left_out) = self.summary.unwrap_or_default();
        Counts {
            passed: passed.saturating_sub(self.self_skipped),
            failed: run.saturating_sub(passed),
            skipped: left_out + self.self_skipped,
        }
    }
}

/// The status in `        PASS [   0.005s] (1/4) package test`.
fn status_of(line: &str) -> Option<&str> {
    let (before, after) = line.split_once(" [")?;
    let status = before.split_whitespace().next()?;
    let is_status = status
        .chars()
        .all(|letter| letter.is_ascii_uppercase() || letter == '-');
    let timed = after
        .trim_start_matches([' ', '>'])
        .starts_with(|c: char| c.is_ascii_digit());
    (is_status && timed && before.starts_with(' ') && after.contains("s]")).then_some(status)
}

/// The numbers in `   0.153s] 4 tests run: 3 passed (1 slow), 1 failed, 1 skipped`.
fn read_summary(summary: &str) -> Option<(u64, u64, u64)> {
    let (_, rest) = summary.split_once(']')?;
    let (run, ends) = rest.split_once(':')?;
    // `8/10 tests run` if the run was cancelled: what has run counts.
    let run = run.trim().split(['/', ' ']).next()?.parse().ok()?;
    let number = |what: &str| {
        ends.split([',', '(', ')'])
            .filter_map(|part| part.trim().split_once(' '))
            .find(|(_, word)| *word == what)
            .and_then(|(number, _)| number.parse().ok())
            .unwrap_or(0)
    };
    Some((run, number("passed"), number("skipped")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: &str = "\
    Starting 4 tests across 1 binary (1 test skipped)
        PASS [   0.005s] (1/4) nx b
  stdout ───

    running 1 test
    noise
    skipped: no /dev/kvm
    skipped: twice counts once
    test b ... ok

        SLOW [> 60.000s] (2/4) nx a
        PASS [  61.006s] (2/4) nx a
  stdout ───

    skippedness

        FAIL [   0.146s] (4/4) nx c
  stdout ───

    skipped: said before it failed

────────────
     Summary [   0.153s] 4 tests run: 3 passed (1 slow, 1 leaky), 1 failed, 1 skipped
        FAIL [   0.146s] (4/4) nx c
error: test run failed
";

    #[test]
    fn tests_that_say_so_count_as_skipped() {
        let mut reader = Nextest::default();
        let shown: Vec<_> = RUN.lines().filter(|line| reader.line(line)).collect();
        assert_eq!(
            reader.counts(),
            Counts {
                passed: 2,
                failed: 1,
                skipped: 2
            }
        );
        assert!(shown.contains(&"    skipped: no /dev/kvm"));
        assert!(shown.contains(&"    skipped: said before it failed"));
        assert!(!shown.contains(&"    noise"));
    }

    #[test]
    fn every_way_to_fail_counts() {
        let check = |summary: &str, expect: (u64, u64, u64)| {
            assert_eq!(read_summary(summary), Some(expect), "{summary}");
        };
        check("   1.1s] 1 test run: 1 passed, 0 skipped", (1, 1, 0));
        check(
            "   1.1s] 9 tests run: 6 passed, 1 failed, 1 timed out, 1 exec failed, 3 skipped",
            (9, 6, 3),
        );
        check(
            "   1.1s] 8/10 tests run: 7 passed (2 slow), 1 failed, 0 skipped",
            (8, 7, 0),
        );
    }

    #[test]
    fn without_a_summary_nothing_has_run() {
        let mut reader = Nextest::default();
        assert!(reader.line("error: could not compile"));
        assert_eq!(reader.counts(), Counts::default());
    }
}
