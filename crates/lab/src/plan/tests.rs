//! Plans that are read, and what is said of those that cannot be.

use super::*;

const GOOD: &str = r#"
question = " What does it cost? "
seed = 7
repeats = 2
downtime_max = "10ms"

[workloads.calm]
guest = "idle"

[workloads.busy]
guest = "writer"
working_set = "64M"
touch = "16M"
rate = "max"
pattern = "zipf"

[[matrix]]
techniques = ["pre-copy", "auto"]
workloads = ["busy", "calm"]
memory = ["256M"]
links = ["unlimited", "125M"]

[[matrix]]
techniques = ["stop-and-copy"]
workloads = ["calm"]
memory = [1073741824]
vcpus = [2]
streams = [1, 4]
"#;

#[test]
fn a_plan_is_a_cross_product_in_the_order_of_its_lists() {
    let plan = Plan::parse(GOOD).unwrap();
    assert_eq!(plan.question, "What does it cost?");
    assert_eq!((plan.seed, plan.repeats, plan.verify), (7, 2, true));
    assert_eq!((plan.bed, plan.runs()), (BedKind::Real, 20));
    assert_eq!(plan.simulator_problem(), None);
    let busy = &plan.workloads["busy"];
    assert_eq!(
        busy.arguments(1),
        "ws=67108864 rate=max pattern=zipf seed=1 touch=16777216"
    );
    let cells: Vec<String> = plan.cells.iter().map(Cell::to_string).collect();
    assert_eq!(
        cells,
        [
            "pre-copy of busy with 256 MiB and 1 vCPU, link unlimited, 2 streams",
            "auto of busy with 256 MiB and 1 vCPU, link unlimited, 2 streams",
            "pre-copy of busy with 256 MiB and 1 vCPU, link 125 MiB/s, 2 streams",
            "auto of busy with 256 MiB and 1 vCPU, link 125 MiB/s, 2 streams",
            "pre-copy of calm with 256 MiB and 1 vCPU, link unlimited, 2 streams",
            "auto of calm with 256 MiB and 1 vCPU, link unlimited, 2 streams",
            "pre-copy of calm with 256 MiB and 1 vCPU, link 125 MiB/s, 2 streams",
            "auto of calm with 256 MiB and 1 vCPU, link 125 MiB/s, 2 streams",
            "stop-and-copy of calm with 1.00 GiB and 2 vCPUs, link unlimited, 1 stream",
            "stop-and-copy of calm with 1.00 GiB and 2 vCPUs, link unlimited, 4 streams",
        ]
    );
}

/// The good plan with one text in place of another.
fn check(from: &str, to: &str, expect: &str) {
    assert!(GOOD.contains(from), "{from}");
    let said = match Plan::parse(&GOOD.replacen(from, to, 1)) {
        Ok(_) => "fine".to_owned(),
        Err(error) => error.to_string(),
    };
    assert_eq!(said, expect, "{from} -> {to}");
    assert!(!said.contains('\n'), "{said}");
}

#[test]
fn a_key_or_word_that_is_unknown_is_told_with_its_line_and_the_known_ones() {
    check(
        "seed = 7",
        "sead = 7",
        "line 3: unknown field `sead`, expected one of `question`, `bed`, `seed`, `repeats`, \
         `downtime_max`, `verify`, `workloads`, `matrix`",
    );
    check(
        "links =",
        "link =",
        "line 21: unknown field `link`, expected one of `vmm`, `row`, `techniques`, \
         `variants`, `downtime_limits`, `cancel_after`, `workloads`, `memory`, `vcpus`, `links`, \
         `streams`, `compress`, `pages`, \
         `dirty_trackers`, `push_orders`, `throttles`, `defers`, `tls`, `deadlines`, `rounds`",
    );
    check(
        "touch =",
        "tuch =",
        "line 13: unknown field `tuch`, expected one of `guest`, `working_set`, `touch`, `rate`, \
         `pattern`, `content`, `rest`, `keys`, `value_size`, `sets`, `clients`, `period`",
    );
    check(
        "\"pre-copy\"",
        "\"precopy\"",
        "line 18: unknown variant `precopy`, expected one of `stop-and-copy`, `demand`, \
         `post-copy`, `pre-copy`, `hybrid`, `auto`",
    );
    check(
        "seed = 7",
        "bed = \"soft\"",
        "line 3: unknown variant `soft`, expected `real` or `simulated`",
    );
}

#[test]
fn a_value_that_is_not_of_its_form_is_told_with_the_forms() {
    check(
        "\"125M\"",
        "\"1Gbit\"",
        "line 21: '1Gbit': expected bytes a second, or a number with K, M, G or T (powers of 1024), \
         like 500M or 1.2G/s; or unlimited",
    );
    check(
        "\"256M\"",
        "\"256X\"",
        "line 20: '256X': expected bytes, or a number with K, M, G or T (powers of 1024), like 512M \
         or 1.5G",
    );
    check(
        "\"max\"",
        "-5",
        "line 14: '-5': expected pages a second, like 50000, or max",
    );
    check(
        "\"10ms\"",
        "10",
        "line 5: '10': expected a number with us, ms, s, m or h, like 5ms or 1.5s",
    );
    check(
        "\"zipf\"",
        "\"random\"",
        "line 15: 'random': expected a pattern: sequential, uniform, zipf, phases",
    );
    check(
        "guest = \"idle\"",
        "guest = \"linux\"",
        "line 8: 'linux': expected a guest: writer, idle, compute, kv",
    );
    check(
        "question = \" What does it cost? \"\n",
        "",
        "line 1: missing field `question`",
    );
    check(
        "repeats = 2",
        "repeats = \"two\"",
        "line 4: invalid type: string \"two\", expected u32",
    );
    check(
        "streams = [1, 4]",
        "streams = [0]",
        "line 28: invalid value: integer `0`, expected \"auto\" or a number of streams from 1 to 16",
    );
    check(
        "streams = [1, 4]",
        "streams = [\"many\"]",
        "line 28: invalid value: string \"many\", expected \"auto\" or a number of streams from 1 to 16",
    );
}

#[test]
fn streams_are_counted_or_left_to_the_law() {
    let text = GOOD.replace("streams = [1, 4]", "streams = [4, \"auto\"]");
    let cells = Plan::parse(&text).unwrap().cells;
    let told: Vec<String> = cells[8..].iter().map(Cell::to_string).collect();
    let of = "stop-and-copy of calm with 1.00 GiB and 2 vCPUs, link unlimited";
    assert_eq!(
        told,
        [format!("{of}, 4 streams"), format!("{of}, streams auto")]
    );
    // As results of older runs have it, and as they are written now.
    for cell in &cells[8..] {
        let text = serde_json::to_string(cell).unwrap();
        assert_eq!(serde_json::from_str::<Cell>(&text).unwrap(), *cell);
    }
    let text = serde_json::to_string(&cells[8]).unwrap();
    assert!(text.contains("\"streams\":4"), "{text}");
}

#[test]
fn parts_that_do_not_go_together_are_told() {
    check(
        " What does it cost? ",
        " ",
        "question is empty: say what the experiment shall answer",
    );
    check(
        "repeats = 2",
        "repeats = 0",
        "repeats is 0: at least one run of each cell is needed",
    );
    check(
        "repeats = 2",
        "repeats = 5000",
        "10 cells with 5000 repeats are 50000 runs, at most 20000: shorten a list",
    );
    check(
        "[\"busy\", \"calm\"]",
        "[\"bussy\"]",
        "matrix 1: there is no workload 'bussy'; known are busy, calm",
    );
    check(
        "[\"pre-copy\", \"auto\"]",
        "[]",
        "matrix 1: techniques is empty",
    );
    check(
        "vcpus = [2]",
        "vcpus = [9]",
        "matrix 2: vcpus has 9: a guest has 1 to 8",
    );
    check(
        "memory = [\"256M\"]",
        "memory = [\"64M\"]",
        "matrix 1: the workload 'busy' touches 80.0 MiB, which does not fit into a memory of 64.0 MiB",
    );
    check(
        "streams = [1, 4]",
        "streams = [4, 4]",
        "matrix 2: stop-and-copy of calm with 1.00 GiB and 2 vCPUs, link unlimited, 4 streams stands \
         there twice",
    );
    check(
        "guest = \"idle\"",
        "guest = \"idle\"\nrate = 5",
        "workload 'calm': the guest idle has no rate; it takes rest",
    );
    check(
        "guest = \"writer\"",
        "guest = \"compute\"",
        "workload 'busy': the guest compute has no touch; it takes working_set, rate, rest",
    );
    check(
        "[workloads.calm]",
        "[workloads.\"so calm\"]",
        "the workload's name 'so calm' has more than letters, digits, '-' and '_'",
    );
}

#[test]
fn a_cell_names_its_pages_unless_they_are_the_hosts() {
    let pages = "[\"host\", \"small\", \"transparent\", \"reserved\"]";
    let text = GOOD.replace("streams = [1, 4]", &format!("pages = {pages}"));
    let plan = Plan::parse(&text).unwrap();
    let last = plan.cells.iter().rev().take(4).rev().map(Cell::to_string);
    let cell = "stop-and-copy of calm with 1.00 GiB and 2 vCPUs, link unlimited, 2 streams";
    let expect = [
        "",
        ", small pages",
        ", transparent pages",
        ", reserved pages",
    ];
    let expect = expect.map(|pages| format!("{cell}{pages}"));
    assert_eq!(last.collect::<Vec<_>>(), expect);
    assert_eq!(plan.simulator_problem(), None);
    check(
        "vcpus = [2]",
        "pages = [\"huge\"]",
        "line 27: unknown variant `huge`, expected one of `host`, `small`, `transparent`, `reserved`",
    );
}

#[test]
fn a_cell_names_its_deadline_and_its_rounds() {
    let limits = "deadlines = [\"none\", \"2s\"]\nrounds = [30, 1]";
    let text = GOOD.replace("streams = [1, 4]", limits);
    let plan = Plan::parse(&text).unwrap();
    let last = plan.cells.iter().rev().take(4).rev().map(Cell::to_string);
    let cell = "stop-and-copy of calm with 1.00 GiB and 2 vCPUs, link unlimited, 2 streams";
    let (deadline, rounds) = (", deadline 2000 ms", ", rounds at most 1");
    let expect = ["", deadline, rounds, &format!("{deadline}{rounds}")];
    let expect = expect.map(|limits| format!("{cell}{limits}"));
    assert_eq!(last.collect::<Vec<_>>(), expect);
    assert_eq!(plan.simulator_problem(), None);
    check(
        "vcpus = [2]",
        "deadlines = [\"500us\"]",
        "matrix 2: deadlines has 0.5 ms: a deadline is whole milliseconds, 1 or more, or none",
    );
    check(
        "vcpus = [2]",
        "rounds = [0]",
        "matrix 2: rounds has 0: give 1 or more, or use stop-and-copy or post-copy",
    );
}

#[test]
fn the_simulator_says_what_it_cannot_do() {
    let text = GOOD.replace("\"idle\"", "\"compute\"\nworking_set = \"1M\"");
    assert_eq!(
        Plan::parse(&text).unwrap().simulator_problem().as_deref(),
        Some(
            "the simulator has no model of the compute guest, which the workload 'calm' uses: \
             use writer or idle, or leave it out by --without calm"
        )
    );
}

#[test]
fn the_simulator_codes_nothing() {
    let text = GOOD.replace("streams = [1, 4]", "compress = ['on', 'off']");
    let plan = Plan::parse(&text).unwrap();
    let cells: Vec<String> = plan.cells.iter().map(Cell::to_string).collect();
    assert!(cells[8].ends_with(", 2 streams, compress on"), "{cells:?}");
    assert!(plan.simulator_problem().unwrap().contains("compress"));
}

#[test]
fn the_simulator_encrypts_nothing() {
    let text = GOOD.replace("streams = [1, 4]", "tls = [false, true]");
    let plan = Plan::parse(&text).unwrap();
    let cells: Vec<String> = plan.cells.iter().map(Cell::to_string).collect();
    assert!(cells[8].ends_with(", 2 streams"), "{cells:?}");
    assert!(cells[9].ends_with(", 2 streams, TLS"), "{cells:?}");
    assert!(plan.simulator_problem().unwrap().contains("tls"));
}

const PEER: &str = r#"
question = "Which?"
[workloads.busy]
guest = "writer"
working_set = "64M"
rest = "spin"
[[matrix]]
row = "one"
techniques = ["auto"]
workloads = ["busy"]
memory = ["256M"]
[[matrix]]
vmm = "qemu"
row = "one"
variants = ["multifd", "post-copy"]
downtime_limits = ["300ms", "30ms"]
cancel_after = "12s"
workloads = ["busy"]
memory = ["256M"]
"#;

#[test]
fn qemu_has_cells_of_its_own() {
    let plan = Plan::parse(PEER).unwrap();
    let cells: Vec<String> = plan.cells.iter().map(Cell::to_string).collect();
    let of = "of busy with 256 MiB and 1 vCPU, link unlimited";
    assert_eq!(
        cells,
        [
            format!("auto {of}, 2 streams (one)"),
            format!("QEMU multifd \u{2264} 300 ms {of}, 4 streams (one)"),
            format!("QEMU post-copy \u{2264} 300 ms {of}, 1 stream (one)"),
            format!("QEMU multifd \u{2264} 30 ms {of}, 4 streams (one)"),
            format!("QEMU post-copy \u{2264} 30 ms {of}, 1 stream (one)"),
        ]
    );
    assert!(plan.has_qemu());
    assert_eq!(plan.cells[1].qemu.unwrap().cancel_after_ms, 12_000);
    assert_eq!(plan.cells[2].technique, Mode::PostCopy);
    assert!(plan.workloads["busy"].arguments(1).ends_with(" rest=spin"));
    assert!(plan.simulator_problem().unwrap().contains("QEMU"));
    for cell in &plan.cells {
        let json = serde_json::to_string(cell).unwrap();
        assert_eq!(serde_json::from_str::<Cell>(&json).unwrap(), *cell);
    }
}

#[test]
fn a_cell_of_limosa_reads_as_it_did_before_there_was_a_peer() {
    let plan = Plan::parse(GOOD).unwrap();
    let json = serde_json::to_value(&plan.cells[0]).unwrap();
    assert!(json.get("qemu").is_none() && json.get("row").is_none());
    assert!(!plan.has_qemu());
}

#[test]
fn keys_of_the_other_vmm_are_told() {
    let check = |from: &str, to: &str, expect: &str| {
        assert!(PEER.contains(from), "{from}");
        let said = Plan::parse(&PEER.replacen(from, to, 1)).unwrap_err();
        assert_eq!(said.to_string(), expect, "{from} -> {to}");
    };
    check(
        "vmm = \"qemu\"\n",
        "",
        "matrix 2: variants is for a matrix with vmm = \"qemu\"",
    );
    check(
        "techniques = [\"auto\"]\n",
        "",
        "matrix 1: techniques is missing",
    );
    check(
        "variants = [",
        "streams = [2]\nvariants = [",
        "matrix 2: streams is limosa's: QEMU has variants",
    );
    check(
        "variants = [",
        "rounds = [1]\nvariants = [",
        "matrix 2: deadlines and rounds are limosa's: QEMU has cancel_after",
    );
    check(
        "variants = [",
        "pages = [\"small\"]\nvariants = [",
        "matrix 2: pages, dirty_trackers, push_orders, throttles and defers are limosa's: QEMU has variants",
    );
    check(
        "variants = [",
        "vcpus = [2]\nvariants = [",
        "matrix 2: a guest of QEMU has one vCPU",
    );
    check(
        "[\"multifd\", \"post-copy\"]",
        "[]",
        "matrix 2: variants is empty",
    );
    check(
        "\"30ms\"",
        "\"500us\"",
        "matrix 2: downtime_limits has 0.5 ms: QEMU takes whole milliseconds, 1 to 2000000",
    );
    check(
        "row = \"one\"",
        "row = \" \"",
        "matrix 1: row is a name of 1 to 60 characters",
    );
    check(
        "vmm = \"qemu\"",
        "vmm = \"xen\"",
        "line 13: unknown variant `xen`, expected `limosa` or `qemu`",
    );
    check(
        "rest = \"spin\"",
        "rest = \"sleep\"",
        "line 6: 'sleep': expected a way to rest: wait, spin",
    );
}

const SERVING: &str = "question = 'q'
[workloads.store]
guest = 'kv'
keys = 2000
value_size = '512'
[[matrix]]
techniques = ['auto']
workloads = ['store']
memory = ['64M']
vcpus = [1]
links = ['125M', 'unlimited']
";

/// The plan of a guest with clients, with one text in place of another.
fn check_serving(from: &str, to: &str, expect: &str) {
    assert!(SERVING.contains(from), "{from}");
    let said = match Plan::parse(&SERVING.replacen(from, to, 1)) {
        Ok(_) => "fine".to_owned(),
        Err(error) => error.to_string(),
    };
    assert_eq!(said, expect, "{from} -> {to}");
}

#[test]
fn a_guest_with_clients_has_settings_of_its_own() {
    let plan = Plan::parse(SERVING).unwrap();
    let store = &plan.workloads["store"];
    assert_eq!(store.arguments(1), "");
    assert_eq!(
        store.clients.unwrap().explain(),
        "2000 keys with values of 512 B; 4 connections ask as soon as they are answered, one asks every 1 ms; of 100 \
         requests 30 set, 10 count and 60 get a value"
    );
    assert_eq!(
        plan.used().map(|(name, _)| name).collect::<Vec<_>>(),
        ["store"]
    );
    let links: Vec<_> = plan.served_links().collect();
    assert_eq!(links, [Some(125 << 20), None]);
    assert_eq!(
        plan.simulator_problem().unwrap(),
        "the simulator has no model of the kv guest, which the workload 'store' uses: use writer or idle, or leave it \
         out by --without store"
    );
}

#[test]
fn settings_of_clients_that_cannot_be_are_told_with_what_can() {
    let check = check_serving;
    check(
        "keys = 2000",
        "keys = 3",
        "workload 'store': keys is 3: each of 5 connections has one at least, and all have at most 4000000",
    );
    check(
        "'512'",
        "8",
        "workload 'store': value_size is 8 B: a value has 16 B to 1.00 MiB",
    );
    check(
        "keys = 2000",
        "clients = 0",
        "workload 'store': clients is 0: give 1 to 100",
    );
    check(
        "keys = 2000",
        "period = '1s'",
        "workload 'store': period is 1000 ms: give 0.2 to 100 ms",
    );
    check(
        "keys = 2000",
        "sets = 91",
        "workload 'store': sets is 91: give 0 to 90 of a hundred requests",
    );
    check(
        "keys = 2000",
        "rate = 5",
        "workload 'store': the guest kv has no rate; it takes keys, value_size, sets, clients, period, rest",
    );
    check(
        "keys = 2000",
        "keys = 200000",
        "matrix 1: the workload 'store' touches 184 MiB, which does not fit into a memory of 64.0 MiB",
    );
    check(
        "vcpus = [1]",
        "vcpus = [1, 2]",
        "matrix 1: vcpus has 2: the guest kv of the workload 'store' has 1",
    );
    check(
        "techniques = ['auto']",
        "vmm = 'qemu'\nvariants = ['plain']",
        "matrix 1: the workload 'store' has clients, who reach no guest of QEMU: leave it out of workloads",
    );
}
