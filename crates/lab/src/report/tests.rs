//! What must and must not stand in a report.

use super::*;
use crate::{rows, sample};

#[test]
fn a_report_needs_nothing_else_and_says_what_it_is() {
    let page = html(&sample::results()).unwrap();
    for absent in ["http", "<script", "<link", "src=", "@import", "url("] {
        assert!(!page.contains(absent), "{absent}\n{page}");
    }
    for present in [
        "<h1>Is &lt;pre-copy&gt; worth it, &amp; when?</h1>",
        "3 of 4 runs measured, 2 of these moves completed, 0 integrity errors.",
        "failed: the target &lt;refused&gt;, &quot;no memory&quot;",
        "not measured: a daemon does not answer",
        "<dd>limosa lab run &lt;plan.toml&gt; --out results</dd>",
        "<dd>limosa 0.1.0, commit unknown</dd>",
        "Some &lt;CPU&gt; @ 2.60GHz, 2 processors, 24.0 GiB of memory, kvm_intel",
        "<td>4.00 ms <small>[3.00 ms – 5.00 ms]</small>",
        "<td>1.50 ms</td>\n<td>2.25 ms</td>\n<td>2.50 ms</td>\n<td>3</td>\n<td>100 µs</td>\n<td>300 µs</td>",
        "# &lt;b&gt;&quot;Quoted&quot; &amp; &#39;so&#39;&lt;/b&gt;",
        "<figcaption>Guest gap",
        "<figcaption>The guest&#39;s speed over time",
        "<figcaption>Total",
        "<figcaption>Downtime by parts",
        "<figcaption>Pages of each round",
        "<figcaption>How long faults waited",
    ] {
        assert!(page.contains(present), "{present}\n{page}");
    }
    assert_eq!(page.matches("<svg").count(), 7);
    assert_eq!(page.matches("</svg>").count(), 7);
    assert!(!page.contains("Simulated"));
}

#[test]
fn the_switch_is_seen_in_the_guests_speed() {
    let chart = |results: &Results, caption: &str| {
        let page = html(results).unwrap();
        let (_, rest) = page.split_once(&format!("<figcaption>{caption}"))?;
        Some(rest.split_once("</figure>")?.0.to_owned())
    };
    let (through, at_switch) = (
        "The guest&#39;s speed over time",
        "The same around the switch",
    );
    let mut results = sample::results();
    let check = |caption: &str, points: usize, dip: usize| {
        let drawn = chart(&results, caption).unwrap();
        let lines = drawn.split("points=\"").skip(1);
        let lines = lines.map(|line| line.split('"').next().unwrap());
        // The line with most points: one for each slot of which the speed is known, counted downwards.
        let line = lines.max_by_key(|line| line.len()).unwrap();
        let heights = line.split_whitespace().map(|point| {
            let (_, height) = point.split_once(',').unwrap();
            height.parse().unwrap()
        });
        let heights: Vec<i32> = heights.collect();
        let lowest = heights.iter().max().unwrap();
        let dips: Vec<usize> = (0..heights.len())
            .filter(|slot| heights[*slot] == *lowest)
            .collect();
        assert_eq!((heights.len(), dips), (points, vec![dip]), "{line}");
        assert!(drawn.contains("opacity=\"0.15\""), "shaded: {drawn}");
    };
    check(through, 209, 107);
    check(at_switch, 101, 50);

    let records = results.runs.iter_mut();
    for record in records.filter_map(|run| run.record.as_mut()) {
        record.guest_speed = None;
        record.guest_speed_at_switch = None;
    }
    assert_eq!(chart(&results, through), None);
    assert_eq!(chart(&results, at_switch), None);
}

#[test]
fn what_clients_saw_stands_beside_what_guest_and_hosts_saw() {
    let page = html(&sample::served()).unwrap();
    for present in [
        "<h2>What clients saw</h2>",
        "<td>7.25 ms</td>\n<td>4.00 ms <small>[3.00 ms – 5.00 ms]</small>\n</td>\n<td>2.50 ms</td>\n<td>9.50 ms</td>",
        "<td>20,000</td>\n<td>15,000</td>\n<td>19,000</td>\n<td>75.0 %</td>\n<td>0</td>\n<td>0</td>",
        "<figcaption>Client gap",
        "<figcaption>Requests a second over time",
        "<figcaption>The longest wait of requests",
    ] {
        assert!(page.contains(present), "{present}\n{page}");
    }
    assert_eq!(page.matches("<svg").count(), 10);
    let without = html(&sample::results()).unwrap();
    assert!(!without.contains("clients"), "{without}");
}

#[test]
fn what_was_simulated_says_so_before_anything_else() {
    let mut results = sample::results();
    results.starts = vec![sample::start(true)];
    let page = html(&results).unwrap();
    let said = page.find("<strong>Simulated.</strong>").unwrap();
    assert!(said < page.find("runs measured").unwrap());
    assert!(!page.contains("two daemons"));
}

#[test]
fn a_change_of_the_program_between_starts_is_told() {
    let mut results = sample::results();
    let mut second = sample::start(false);
    results.starts.push(second.clone());
    let warning = "not all made by the same program";
    assert!(!html(&results).unwrap().contains(warning));
    second.commit = "0123456789ab".to_owned();
    results.starts.push(second);
    assert!(html(&results).unwrap().contains(warning));
}

#[test]
fn a_report_of_nothing_is_a_report() {
    let mut results = sample::results();
    results.runs.clear();
    let page = html(&results).unwrap();
    assert!(page.contains("0 of 4 runs measured"));
    assert_eq!(page.matches("<svg").count(), 0);
}

#[test]
fn a_comparison_has_a_table_for_each_row() {
    let page = html(&rows::tests::results()).unwrap();
    for present in [
        "<h2>Limosa and QEMU</h2>",
        "<p>QEMU 10.0.2.</p>",
        "<h3>busy, both: pre-copy, 2 streams</h3>",
        "3 of 3 moves of limosa, 7 of 9 of QEMU.",
        "<td class=\"text\">QEMU auto-converge \u{2264} 30 ms</td>\n<td>1 of 3</td>",
        "<td class=\"text\">best of QEMU</td>\n<td></td>\n<td>multifd \u{2264} 30 ms</td>",
        "<td class=\"text\">limosa / best of QEMU</td>\n<td></td>\n<td>0.50</td>",
        "cancelled: no reason was given",
    ] {
        assert!(page.contains(present), "{present}\n{page}");
    }
    assert!(!html(&sample::results()).unwrap().contains("QEMU"));
}
