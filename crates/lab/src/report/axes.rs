//! Which properties of the cells differ: those name rows, the others are said once.

use crate::plan::{Cell, counted};
use limosa_pages::ByteCount;
use std::collections::HashSet;

type Axis = (&'static str, fn(&Cell) -> String);

/// From the outer to the inner grouping. The technique is no axis: it stands in every row.
const AXES: [Axis; 15] = [
    ("row", |cell| cell.row.clone().unwrap_or_default()),
    ("workload", |cell| cell.workload.clone()),
    ("link", Cell::link_text),
    ("memory", |cell| {
        ByteCount::new(cell.memory_bytes).to_string()
    }),
    ("vCPUs", |cell| cell.vcpus.to_string()),
    ("streams", |cell| cell.streams.to_string()),
    ("compress", |cell| cell.compress.name().to_owned()),
    ("pages", |cell| cell.pages.name().to_owned()),
    ("tracker", |cell| cell.dirty_tracker.name().to_owned()),
    ("push order", |cell| cell.push_order.name().to_owned()),
    ("throttle", |cell| cell.throttle.name().to_owned()),
    ("defer", |cell| cell.defer.name().to_owned()),
    ("TLS", |cell| if cell.tls { "on" } else { "off" }.to_owned()),
    ("deadline", Cell::deadline_text),
    ("rounds at most", |cell| cell.rounds_max.to_string()),
];

/// The axes along which an experiment differs.
#[derive(Clone, Debug)]
pub(super) struct Axes {
    differing: Vec<Axis>,
    /// What is the same everywhere, in words.
    pub same: String,
}

impl Axes {
    /// Those of these cells.
    pub(super) fn of(cells: &[Cell]) -> Self {
        let differs = |(_, value): &Axis| cells.iter().map(value).collect::<HashSet<_>>().len() > 1;
        let (differing, same): (Vec<Axis>, Vec<Axis>) = AXES.into_iter().partition(differs);
        let same = same.iter().filter_map(|(name, value)| {
            let value = value(cells.first()?);
            // A row may have no name.
            (!value.is_empty()).then(|| format!("{name} {value}"))
        });
        Self {
            same: same.collect::<Vec<_>>().join(", "),
            differing,
        }
    }

    /// Names of those that differ.
    pub(super) fn names(&self) -> impl Iterator<Item = &'static str> {
        self.differing.iter().map(|(name, _)| *name)
    }

    /// A cell's values along them.
    pub(super) fn values(&self, cell: &Cell) -> impl Iterator<Item = String> {
        self.differing.iter().map(|(_, value)| value(cell))
    }

    /// What tells a row from the others of its workload and link.
    pub(super) fn label(&self, cell: &Cell) -> String {
        let inner = |(name, _): &&Axis| !matches!(*name, "row" | "workload" | "link");
        let values = self
            .differing
            .iter()
            .filter(inner)
            .map(|(name, value)| match *name {
                "vCPUs" => counted(cell.vcpus, "vCPU"),
                "streams" => cell.streams_text(),
                name @ ("compress" | "throttle" | "defer" | "TLS" | "deadline"
                | "rounds at most") => {
                    format!("{name} {}", value(cell))
                }
                "pages" => format!("{} pages", cell.pages),
                _ => value(cell),
            });
        let parts: Vec<String> = std::iter::once(cell.way()).chain(values).collect();
        parts.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Plan;

    #[test]
    fn what_differs_names_rows_and_what_does_not_is_said_once() {
        let text = "question = 'q'\n[workloads.i]\nguest = 'idle'\n[[matrix]]\n\
                    techniques = ['auto', 'pre-copy']\nworkloads = ['i']\nmemory = ['64M']\n\
                    links = ['1M', 'unlimited']\nstreams = [1, 2]";
        let cells = Plan::parse(text).unwrap().cells;
        let axes = Axes::of(&cells);
        assert_eq!(
            axes.same,
            "workload i, memory 64.0 MiB, vCPUs 1, compress auto, pages host, tracker bitmap, push order bubbling, \
             throttle off, defer auto, TLS off, deadline none, rounds at most 30"
        );
        assert_eq!(axes.names().collect::<Vec<_>>(), ["link", "streams"]);
        assert_eq!(
            axes.values(&cells[0]).collect::<Vec<_>>(),
            ["1.00 MiB/s", "1"]
        );
        assert_eq!(axes.label(&cells[3]), "pre-copy, 2 streams");
    }
}
