//! What was run, on what, and what went wrong: the text around the figures.

use super::page::Page;
use crate::clients::Clients;
use crate::machine::or_unknown;
use crate::plan::Plan;
use crate::store::{Results, Start};
use crate::summary::{self, CellSummary};

/// How much of the plan stands behind the figures, and everything that is wrong.
pub(super) fn verdict(page: &mut Page, results: &Results, cells: &[CellSummary]) {
    let planned = results.plan.runs();
    let measured: usize = cells.iter().map(|cell| cell.measured).sum();
    let completed: usize = cells.iter().map(|cell| cell.completed).sum();
    let errors: u64 = cells.iter().map(|cell| cell.integrity_errors).sum();
    page.element(
        "p",
        &format!(
            "{measured} of {planned} runs measured, {completed} of these moves completed, {errors} \
             integrity errors."
        ),
    );
    let problems = summary::problems(results);
    let unfinished = summary::unfinished(results);
    list(page, "Problems", &problems);
    list(
        page,
        "Moves that did not complete, and runs without a measurement",
        &unfinished,
    );
}

/// Setup, machine, programs and the plan itself.
pub(super) fn how(page: &mut Page, results: &Results) {
    let plan = &results.plan;
    page.element("p", &measurement(plan, results.are_simulated()));
    page.open("dl", "");
    for (name, workload) in &plan.workloads {
        page.element("dt", &format!("workload {name}"));
        let arguments = workload.arguments(plan.seed);
        let guest = format!("guest {} {arguments}", workload.guest.name());
        let clients = workload.clients.as_ref().map(Clients::explain);
        let clients = clients.map_or_else(String::new, |clients| format!("; {clients}"));
        page.element("dd", &format!("{}{clients}", guest.trim_end()));
    }
    page.close("dl");
    if !are_alike(&results.starts) {
        page.classed(
            "p",
            "warning",
            "The runs were not all made by the same program on the same machine: compare with care.",
        );
    }
    for (number, start) in (1..).zip(&results.starts) {
        describe(page, number, start);
    }
    page.element("h3", "Plan");
    page.element("pre", &results.plan_text);
}

fn measurement(plan: &Plan, simulated: bool) -> String {
    let order = format!(
        "{} cells, {} runs of each, in an order mixed by the seed {} with all cells once in each \
         repeat. Downtime to aim at: {} ms. Digests {}.",
        plan.cells.len(),
        plan.repeats,
        plan.seed,
        plan.downtime_max.get(),
        if plan.verify {
            "compared"
        } else {
            "not compared"
        },
    );
    let run = if simulated {
        "Each run is one move of the simulator."
    } else {
        "Each run: two daemons and a guest are started on this machine, the guest touches its \
         memory, works for a second, moves once from host a to host b over the loopback, is watched \
         for another second and checks all of its memory."
    };
    let peer = if plan.has_qemu() {
        " A run of QEMU is the same with two QEMUs in place of the daemons; the second of them waits \
         before the move begins."
    } else {
        ""
    };
    let clients = if plan.served_links().next().is_some() && !simulated {
        " A guest with clients has its hosts and its clients in network namespaces, joined by bridges, and is moved \
         over a link of its own, which the kernel limits; it is filled with its keys, and the clients work from a \
         second before the move to a second after its end."
    } else {
        ""
    };
    format!("{order} {run}{peer}{clients}")
}

fn are_alike(starts: &[Start]) -> bool {
    let who = |start: &Start| {
        let machine = start.machine.clone();
        let version = (start.version.clone(), start.commit.clone());
        (
            version,
            machine.kernel,
            machine.cpu,
            machine.cpus,
            machine.memory_bytes,
        )
    };
    starts.windows(2).all(|pair| who(&pair[0]) == who(&pair[1]))
}

fn describe(page: &mut Page, number: usize, start: &Start) {
    let machine = &start.machine;
    page.element("h3", &format!("Start {number}, {}", start.begun));
    page.open("dl", "");
    let facts = [
        ("command", start.command.clone()),
        (
            "program",
            format!("limosa {}, commit {}", start.version, start.commit),
        ),
        ("machine", machine.hardware()),
        (
            "kernel",
            format!(
                "{}, load {:.2} at the start",
                or_unknown(&machine.kernel),
                machine.load
            ),
        ),
    ];
    for (name, value) in facts {
        page.element("dt", name);
        page.element("dd", &value);
    }
    page.close("dl");
}

fn list(page: &mut Page, title: &str, lines: &[String]) {
    if lines.is_empty() {
        return;
    }
    page.open("div", "warning");
    page.element("p", title);
    page.open("ul", "");
    for line in lines {
        page.element("li", line);
    }
    page.close("ul");
    page.close("div");
}
