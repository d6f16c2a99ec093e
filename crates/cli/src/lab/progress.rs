//! How far an experiment is: a line that is replaced on a terminal, a line for each run elsewhere.

use crate::output::time;
use limosa_lab::plan::{Cell, Plan};
use limosa_lab::store::RunResult;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// Tells it on standard error.
#[derive(Debug)]
pub(crate) struct Progress {
    is_terminal: bool,
    planned: usize,
    missing: usize,
    made: usize,
    begun: Instant,
}

impl Progress {
    /// Says what there is to do.
    pub(crate) fn begin(plan: &Plan, missing: usize) -> Self {
        let this = Self {
            is_terminal: io::stderr().is_terminal(),
            planned: plan.runs(),
            missing,
            made: 0,
            begun: Instant::now(),
        };
        let (cells, repeats, done) = (plan.cells.len(), plan.repeats, this.done());
        this.print(&format!(
            "{}\ncells: {cells}, runs of each: {repeats}; {missing} runs to make, {done} are there\n",
            plan.question
        ));
        this
    }

    /// Runs that have a result.
    pub(crate) const fn done(&self) -> usize {
        self.planned - self.missing + self.made
    }

    /// A run begins; what stands before its own progress.
    pub(crate) fn starting(&self, cell: &Cell) -> String {
        let title = match left(self.made, self.missing, self.begun.elapsed()) {
            Some(left) => format!("[{}/{}, {left} left]", self.done() + 1, self.planned),
            None => format!("[{}/{}]", self.done() + 1, self.planned),
        };
        if self.is_terminal {
            self.print(&format!("\r{title} starting: {cell}\x1b[K"));
        }
        title
    }

    /// A run has ended.
    pub(crate) fn ended(&mut self, result: &RunResult) {
        self.made += 1;
        if self.is_terminal {
            return;
        }
        let left = left(self.made, self.missing, self.begun.elapsed());
        let left = left.map_or_else(String::new, |left| format!(", {left} left"));
        let (done, planned) = (self.done(), self.planned);
        self.print(&format!("{done}/{planned}  {}{left}\n", line(result)));
    }

    fn print(&self, text: &str) {
        let mut stream = io::stderr();
        let printed = stream
            .write_all(text.as_bytes())
            .and_then(|()| stream.flush());
        if let Err(error) = printed {
            tracing::debug!(%error, "progress could not be printed");
        }
    }
}

impl Drop for Progress {
    /// Whatever is said next begins on an empty line.
    fn drop(&mut self) {
        if self.is_terminal {
            self.print("\r\x1b[K");
        }
    }
}

/// The time that the runs that are still missing will take, if they take as long as those that were
/// made; nobody knows before the first one, and at the end there is nothing to tell.
fn left(made: usize, missing: usize, passed: Duration) -> Option<String> {
    let rest = missing.checked_sub(made).filter(|rest| *rest > 0)?;
    if made == 0 {
        return None;
    }
    let each = passed.as_secs_f64() * 1000.0 / made as f64;
    Some(time(each * rest as f64))
}

fn line(result: &RunResult) -> String {
    let cell = &result.cell;
    let Some(record) = &result.record else {
        let failure = result.failure.as_deref().unwrap_or("nobody knows why");
        return format!("{cell}: not measured: {failure}");
    };
    let gap = record.guest_gap_ms.map_or_else(|| "-".to_owned(), time);
    let (outcome, total) = (&record.outcome, time(record.total_ms));
    let clients = record.clients.as_ref().and_then(|seen| seen.gap_ms);
    let clients = clients.map_or_else(String::new, |gap| format!(", client gap {}", time(gap)));
    let wrong = record.clients_problem();
    let wrong = wrong.map_or_else(String::new, |problem| format!(": {problem}"));
    format!("{cell}: {outcome}, guest gap {gap}{clients}, total {total}{wrong}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_is_that_of_the_runs_made() {
        let check = |made: usize, missing: usize, expect: Option<&str>| {
            let left = left(made, missing, Duration::from_secs(30));
            assert_eq!(left.as_deref(), expect);
        };
        check(0, 10, None);
        check(1, 10, Some("4 min 30 s"));
        check(5, 10, Some("30.0 s"));
        check(10, 10, None);
    }
}
