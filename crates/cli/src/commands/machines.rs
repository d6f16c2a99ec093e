//! Commands about virtual machines: run, list, inspect, stop.

use crate::arguments::{Disk, Net, Run, Stop};
use crate::output::{Align, Output, count, table};
use crate::run_file;
use anyhow::{Context, Result};
use limosa_host::api::{BalloonInfo, DiskSpec, LinuxSpec, SectionInfo, VmInfo, VmSpec, VmState};
use limosa_host::client::Client;
use limosa_pages::ByteCount;
use serde::Serialize;
use std::path::Path;

/// Makes a virtual machine and starts it.
pub(super) fn run(client: &Client, run: &Run, output: Output) -> Result<()> {
    let from_file = run.config.as_deref().map(run_file::read).transpose()?;
    let run = from_file.as_ref().unwrap_or(run);
    let linux = run.kernel.as_ref().map(|kernel| LinuxSpec {
        kernel: absolute(kernel),
        initrd: run.initrd.as_deref().map(absolute),
        cmdline: run.cmdline.clone(),
        disks: run.disk.iter().map(|Disk(disk)| here(disk)).collect(),
    });
    let spec = VmSpec {
        name: run.name.clone().context("a name has to be given")?,
        micro: run.micro.as_deref().map(program),
        linux,
        args: run.args.clone(),
        memory_bytes: run.memory.bytes(),
        vcpus: run.vcpus,
        huge_pages: run.huge_pages,
        dirty_tracker: run.dirty_tracker,
        cpu: run.cpu,
        networks: run.net.iter().map(|Net(net)| net.clone()).collect(),
        observer: run.observer.map(|address| address.to_string()),
    };
    let vm = client.run(&spec)?;
    output.answer(&vm, |vm| {
        format!(
            "{} runs: {} of memory, {}, process {}",
            vm.name,
            ByteCount::new(vm.memory_bytes),
            vcpus(vm.vcpus),
            vm.pid
        )
    })
}

/// The daemon has another working directory.
fn absolute(path: &Path) -> String {
    let absolute = std::path::absolute(path);
    absolute.as_deref().unwrap_or(path).display().to_string()
}

fn here(disk: &DiskSpec) -> DiskSpec {
    DiskSpec {
        path: absolute(Path::new(&disk.path)),
        ..disk.clone()
    }
}

/// A path becomes absolute, since the daemon has another working directory; a name stays.
fn program(micro: &str) -> String {
    let path = Path::new(micro);
    let is_path = micro.contains('/') || path.is_file();
    match std::fs::canonicalize(path) {
        Ok(absolute) if is_path => absolute.display().to_string(),
        _ => micro.to_owned(),
    }
}

fn vcpus(number: u8) -> String {
    match number {
        1 => "1 vCPU".to_owned(),
        more => format!("{more} vCPUs"),
    }
}

/// Lists the virtual machines.
pub(super) fn list(client: &Client, output: Output) -> Result<()> {
    let vms = client.vms()?;
    output.answer(&vms, |vms| {
        if vms.is_empty() {
            return "no VMs on this host: 'limosa run' makes one".to_owned();
        }
        let head = [
            ("NAME", Align::Left),
            ("STATE", Align::Left),
            ("MEMORY", Align::Right),
            ("VCPUS", Align::Right),
            ("PID", Align::Right),
            ("WORK", Align::Right),
            ("ERRORS", Align::Right),
            ("NOTE", Align::Left),
        ];
        table(head, &vms.iter().map(row).collect::<Vec<_>>())
    })
}

fn row(vm: &VmInfo) -> [String; 8] {
    let dash = || "-".to_owned();
    [
        vm.name.clone(),
        state(vm.state).to_owned(),
        ByteCount::new(vm.memory_bytes).to_string(),
        vm.vcpus.to_string(),
        if vm.pid == 0 {
            dash()
        } else {
            vm.pid.to_string()
        },
        vm.work.map_or_else(dash, count),
        vm.errors.map_or_else(dash, count),
        note(vm),
    ]
}

const fn state(state: VmState) -> &'static str {
    match state {
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Migrating => "migrating",
        VmState::Arriving => "arriving",
        VmState::Unresolved => "unresolved",
        VmState::Silent => "silent",
        VmState::Ended => "ended",
    }
}

/// What an operator should know about it, if anything.
fn note(vm: &VmInfo) -> String {
    if let Some(residue) = &vm.residual_dependency {
        return residue.clone();
    }
    match vm.state {
        VmState::Running | VmState::Paused => match &vm.migration {
            Some(id) => format!("arrived, not yet confirmed by its source ({})", short(id)),
            None => String::new(),
        },
        // The phase says more than that it is migrating once the guest runs at the target.
        VmState::Migrating if vm.phase != "migrating" => vm.phase.clone(),
        VmState::Migrating | VmState::Arriving => {
            vm.migration.as_deref().map_or("", short).to_owned()
        }
        VmState::Unresolved | VmState::Silent => vm.phase.clone(),
        VmState::Ended => vm.ended.clone().unwrap_or_default(),
    }
}

/// The beginning of an id: enough to tell it from the others of a host.
pub(super) fn short(id: &str) -> &str {
    id.get(..8).unwrap_or(id)
}

/// What `inspect` answers.
#[derive(Serialize)]
struct Inspection {
    vm: VmInfo,
    sections: Vec<SectionInfo>,
    /// Sum over the sections.
    state_bytes: u64,
}

/// Shows the parts of a state.
pub(super) fn inspect(client: &Client, name: &str, output: Output) -> Result<()> {
    let vm = client.vm(name)?;
    let sections = client.inspect(name)?;
    let state_bytes = sections.iter().map(|section| section.bytes).sum();
    output.answer(
        &Inspection {
            vm,
            sections,
            state_bytes,
        },
        |inspection| {
            let head = [
                ("STATE", Align::Left),
                ("INSTANCE", Align::Right),
                ("VERSION", Align::Right),
                ("BYTES", Align::Right),
            ];
            let mut rows: Vec<[String; 4]> = inspection
                .sections
                .iter()
                .map(|section| {
                    let numbers = [u64::from(section.instance), u64::from(section.version)];
                    let [instance, version] = numbers.map(|number| number.to_string());
                    [
                        section.name.clone(),
                        instance,
                        version,
                        count(section.bytes),
                    ]
                })
                .collect();
            rows.push([
                "total".to_owned(),
                String::new(),
                String::new(),
                count(inspection.state_bytes),
            ]);
            let memory = ByteCount::new(inspection.vm.memory_bytes);
            let given_up = inspection.vm.balloon.as_ref();
            let given_up = given_up.map_or_else(String::new, |info| format!("\n{}", balloon(info)));
            format!(
                "{}\nmemory  {memory} of {}{given_up}\nprocessor  {}\ndirty tracker  {}: {}",
                table(head, &rows),
                inspection.vm.name,
                inspection.vm.cpu,
                inspection.vm.dirty_tracker,
                inspection.vm.dirty_tracker_means
            )
        },
    )
}

/// What a guest has given up of its memory, in a line.
pub(super) fn balloon(info: &BalloonInfo) -> String {
    if !info.has_driver {
        return "balloon  the guest has no driver for it".to_owned();
    }
    let bytes = |count: u64| ByteCount::new(count).to_string();
    let (held, target) = (bytes(info.held_bytes), bytes(info.target_bytes));
    let guest = match (info.guest_free_bytes, info.guest_total_bytes) {
        (Some(free), Some(total)) => {
            format!("; the guest has {} free of {}", bytes(free), bytes(total))
        }
        _ => String::new(),
    };
    let reclaimed = bytes(info.reclaimed_bytes);
    format!("balloon  {held} of {target}; {reclaimed} given back to this host so far{guest}")
}

/// An answer about a virtual machine that is gone.
#[derive(Serialize)]
struct Stopped<'a> {
    vm: &'a str,
    stopped: bool,
}

/// Ends a virtual machine.
pub(super) fn stop(client: &Client, stop: &Stop, output: Output) -> Result<()> {
    client.stop(&stop.vm, stop.force)?;
    output.answer(
        &Stopped {
            vm: &stop.vm,
            stopped: true,
        },
        |stopped| format!("{} is stopped", stopped.vm),
    )
}
