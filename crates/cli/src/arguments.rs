//! What can be typed: commands, options, examples.

mod devices;

use crate::{cert, console, demo, lab};
use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
pub(crate) use devices::{Disk, Net};
use limosa_engine::policy::Mode;
use limosa_engine::streams::Streams;
use limosa_host::api::{Compression, CpuModel, Deferral, PushOrder, Throttling, TrackerKind};
use limosa_lab::values::{Milliseconds, OrNone, Rate, Size, compression, mode};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Moves running virtual machines between hosts without stopping them.
#[derive(Debug, Parser)]
#[command(name = "limosa", bin_name = "limosa", version, propagate_version = true, after_help = EXAMPLES, max_term_width = 100)]
pub(crate) struct Arguments {
    /// Directory of the daemon's state [default: $LIMOSA_STATE_DIR, /run/limosa for root, else
    /// $XDG_RUNTIME_DIR/limosa]
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        help_heading = "Global options"
    )]
    pub state_dir: Option<PathBuf>,
    /// Socket of the daemon to talk to [default: host.sock in the state directory]
    #[arg(
        long,
        global = true,
        value_name = "SOCKET",
        help_heading = "Global options"
    )]
    pub host_socket: Option<PathBuf>,
    /// Answer with JSON (may stand behind the command, too)
    #[arg(long, id = "json_first", help_heading = "Global options")]
    pub json: bool,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  limosa demo                                       the main job, with nothing set up before
  limosa host &                                     the daemon of this host
  limosa run web --micro writer --memory 1G         a virtual machine
  limosa migrate web --to 192.0.2.7:7070            to another host";

/// Whether to answer with JSON.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Format {
    /// Answer with JSON
    #[arg(long, help_heading = "Global options")]
    pub json: bool,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the daemon of this host
    Host(Host),
    /// Make a virtual machine and start it
    Run(Run),
    /// List the virtual machines of this host
    #[command(
        visible_alias = "ls",
        after_help = "Examples:\n  limosa list\n  limosa list --json"
    )]
    List(Format),
    /// Show every part of the state that moves with a virtual machine
    #[command(after_help = "Examples:\n  limosa inspect web\n  limosa inspect web --json")]
    Inspect(Named),
    /// Show the console of a virtual machine with a kernel, and type there; Ctrl-] leaves
    #[command(
        after_help = "Examples:\n  limosa console debian\n  limosa console debian --line hvc0"
    )]
    Console {
        /// Name of the virtual machine
        vm: String,
        /// Which of its lines, by the name that Linux has for it
        #[arg(long, default_value = "ttyS0")]
        line: console::Line,
    },
    /// Move a running virtual machine to another host
    Migrate(Migrate),
    /// Show migrations, or one of them
    Status(Status),
    /// Change the mode or the limits of a running migration
    Set(Set),
    /// Send the pages that a moved guest still misses, and follow that to its end
    Drain(Drain),
    /// End a migration; the guest runs on here
    #[command(after_help = "Examples:\n  limosa abort web\n  limosa abort 3f2a")]
    Abort(Selected),
    /// Decide how a migration ended when the other host cannot be asked any more
    Resolve(Resolve),
    /// End a virtual machine, or remove one that has ended
    Stop(Stop),
    /// Move a virtual machine there and back on this machine, and measure it
    Demo(Box<demo::Arguments>),
    /// Run experiments that are described by a plan, and report on them
    Lab(lab::Arguments),
    /// Make the certificates with which hosts believe each other
    Cert(cert::Arguments),
    /// Replay the journal of a migration and check that the engine decides the same
    Replay(Replay),
    /// Print the description of the daemon's control interface
    #[command(after_help = "Example:\n  limosa openapi > openapi.json")]
    Openapi,
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  limosa completions bash > /etc/bash_completion.d/limosa")]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// The process of one virtual machine; started by the daemon
    #[command(hide = true)]
    Vm(Vm),
}

/// Run the daemon of this host
///
/// Virtual machines are processes of their own: they run on when the daemon stops or dies, and the
/// next one finds them again. It answers commands on host.sock in its state directory.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  limosa host
  limosa host --state-dir /tmp/a --listen 127.0.0.1:7071
  limosa host --listen 192.0.2.7:7070 --tls /etc/limosa/tls
  limosa host --listen 192.0.2.7:7070 --insecure
  limosa host --listen 192.0.2.7:7070 --tls /etc/limosa --lend-disk /srv/images --lend-tap 'tap*'

'limosa cert' makes what --tls needs; docs/encryption.md has more.")]
pub(crate) struct Host {
    /// Address for other hosts; port 0 takes any that is free
    #[arg(long, value_name = "IP:PORT", default_value = limosa_host::daemon::LISTEN)]
    pub listen: SocketAddr,
    /// Directory with ca.pem, host.pem and host.key: every connection to other hosts is mutual TLS
    #[arg(long, value_name = "DIR")]
    pub tls: Option<PathBuf>,
    /// Listen beyond this machine although nothing is encrypted
    #[arg(long, conflicts_with = "tls")]
    pub insecure: bool,
    /// Disk, or directory of disks, that guests from other hosts may use here; may be repeated
    #[arg(long, value_name = "PATH")]
    pub lend_disk: Vec<PathBuf>,
    /// Tap device that guests from other hosts may use here, 'tap*' for all that begin so; may be repeated
    #[arg(long, value_name = "TAP")]
    pub lend_tap: Vec<String>,
}

/// Make a virtual machine and start it
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  limosa run web --micro writer --args 'ws=64M rate=50000' --memory 1G --vcpus 2
  limosa run calm --micro idle --memory 256M
  limosa run mine --micro ./my-guest.elf --memory 64M
  limosa run store --micro kv --net tap0 --args 'ip=10.0.0.2/24' --memory 256M
  limosa run debian --kernel vmlinuz --initrd initrd.img --cmdline console=ttyS0 --memory 1G
  limosa run web --kernel vmlinuz --disk web.raw --disk tools.raw,ro --net tap0 \
      --cmdline 'console=ttyS0 root=/dev/vda'
  limosa run --config web.toml

The programs and their arguments are described in docs/micro-guests.md, guests with a kernel in
docs/linux-guests.md.")]
#[command(group(clap::ArgGroup::new("program").required(true).args(["micro", "kernel", "config"])))]
pub(crate) struct Run {
    /// Name of the virtual machine: letters, digits, '-', '_', '.'
    #[arg(required_unless_present = "config")]
    pub name: Option<String>,
    /// TOML file with all of this: 'name', and each option by its name; paths are relative to the file
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "name", "initrd", "cmdline", "disk", "net", "args", "memory", "vcpus", "huge_pages",
        "dirty_tracker", "cpu", "observer",
    ])]
    pub config: Option<PathBuf>,
    /// Program of a guest without a kernel: writer, idle, compute, kv, or an ELF file
    #[arg(long, value_name = "PROGRAM|FILE")]
    pub micro: Option<String>,
    /// Stock Linux kernel to boot: a bzImage, as distributions have in /boot/vmlinuz, or an ELF file with
    /// a PVH entry
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial file system of the kernel
    #[arg(long, value_name = "FILE", conflicts_with = "micro")]
    pub initrd: Option<PathBuf>,
    /// Command line of the kernel
    #[arg(
        long,
        value_name = "TEXT",
        conflicts_with = "micro",
        default_value = "console=ttyS0"
    )]
    pub cmdline: String,
    /// Disk of the kernel's guest, a raw file or a block device; repeat it for several
    #[arg(long, value_name = "PATH[,ro]", conflicts_with = "micro")]
    pub disk: Vec<Disk>,
    /// Network interface of the guest, behind a tap device of this host; repeat it for several
    #[arg(long, value_name = "TAP[,mac=ADDRESS]")]
    pub net: Vec<Net>,
    /// Arguments of the program: key=value key=value
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        conflicts_with = "kernel"
    )]
    pub args: String,
    /// Memory of the guest
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    pub memory: Size,
    /// Number of vCPUs, 1 to 8, of a guest with a kernel to 16
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub vcpus: u8,
    /// Back the memory with 2 MiB pages, which the host must have reserved
    #[arg(long)]
    pub huge_pages: bool,
    /// Who notices which pages it writes: bitmap or ring of KVM, or write-protect of the page tables
    #[arg(long, value_name = "TRACKER", default_value = "bitmap")]
    pub dirty_tracker: TrackerKind,
    /// What processor the guest sees: host (all that this host offers), or a level that unlike hosts
    /// share: x86-64-v2, x86-64-v3, x86-64-v4
    #[arg(long, value_name = "MODEL", default_value_t = CpuModel::Host)]
    pub cpu: CpuModel,
    /// Send a datagram at each heartbeat of the guest to this address of the loopback
    #[arg(long, value_name = "IP:PORT")]
    pub observer: Option<SocketAddr>,
    #[command(flatten)]
    pub format: Format,
}

/// A virtual machine of this host.
#[derive(Debug, Args)]
pub(crate) struct Named {
    /// Name of the virtual machine
    pub vm: String,
    #[command(flatten)]
    pub format: Format,
}

/// A migration away from this host.
#[derive(Debug, Args)]
pub(crate) struct Selected {
    /// Name of the virtual machine, or (the beginning of) the id of the migration
    #[arg(value_name = "VM|ID")]
    pub which: String,
    #[command(flatten)]
    pub format: Format,
}

/// Move a running virtual machine to another host
///
/// Shows progress until it is over. Ctrl-C aborts the migration and the guest runs on here; a
/// second Ctrl-C leaves the migration alone and returns. Ends with status 0 only if the guest runs
/// at the target. With --mode demand that is all: the guest's pages stay here until it needs them,
/// or until 'limosa drain' sends them.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  limosa migrate web --to 127.0.0.1:7071
  limosa migrate web --to 127.0.0.1:7071 --dry-run
  limosa migrate web --to 127.0.0.1:7071 --mode stop-and-copy
  limosa migrate web --to 127.0.0.1:7071 --mode demand && limosa drain web
  limosa migrate web --to 192.0.2.7:7070 --downtime-max 10ms --bandwidth-max 500M
  limosa migrate web --to 192.0.2.7:7070 --mode pre-copy --throttle auto
  limosa migrate web --to 192.0.2.7:7070 --copy-disks
  limosa migrate web --to 127.0.0.1:7071 --detach && limosa status web --follow

The modes are explained in docs/techniques.md.")]
pub(crate) struct Migrate {
    /// Name of the virtual machine
    pub vm: String,
    /// The target: where its daemon listens for hosts; with --tls its certificate has to be for HOST
    #[arg(long, value_name = "HOST:PORT")]
    pub to: String,
    /// The technique: auto, pre-copy, hybrid, post-copy, demand or stop-and-copy
    ///
    /// auto: pre-copy, which becomes hybrid as soon as further rounds do not pay;
    /// pre-copy: copy while the guest runs here, again what it wrote, pause for the rest;
    /// hybrid: copy everything once, then run there and send what was written since;
    /// post-copy: run there at once, pages follow, those that are needed first;
    /// demand: run there at once, each page follows when it is needed and not before;
    /// stop-and-copy: pause, copy everything, run there.
    #[arg(long, value_name = "MODE", default_value_t = Mode::default(), value_parser = mode)]
    pub mode: Mode,
    /// Downtime to aim at [default: 5ms]
    #[arg(long, value_name = "TIME")]
    pub downtime_max: Option<Milliseconds>,
    /// Bytes a second on the wire, all streams together
    #[arg(long, value_name = "RATE")]
    pub bandwidth_max: Option<Rate>,
    /// Time after which it should be over; then the guest is paused earlier
    #[arg(long, value_name = "TIME")]
    pub deadline: Option<Milliseconds>,
    /// Rounds while the guest runs [default: 30]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds_max: Option<u32>,
    /// Code pages to take fewer bytes: auto (where that is quicker), on (whatever shrinks), off, or all in
    /// one way: lz4, zstd, delta (as differences to what was sent before)
    #[arg(long, value_name = "auto|on|off|lz4|zstd|delta", default_value = "auto", value_parser = compression)]
    pub compress: Compression,
    /// Slow the guest's writers down if rounds do not shrink: auto or off
    ///
    /// With auto, a guest that dirties pages as fast as they are sent is let write only half as fast
    /// as the link carries, until it is paused. Where the dirty tracker is ring, only vCPUs that write
    /// more than their quota are held back; elsewhere all alike. No single wait is longer than about
    /// a millisecond.
    #[arg(long, value_name = "off|auto", default_value_t = Throttling::Off)]
    pub throttle: Throttling,
    /// Leave hot pages out of rounds that go out while the guest runs: auto or off
    ///
    /// With auto, pages that the guest dirties round after round are sent once, with the pause, as long
    /// as they fit half of the downtime that is allowed.
    #[arg(long, value_name = "auto|off", default_value_t = Deferral::Auto)]
    pub defer: Deferral,
    /// In which order missing pages are pushed: address, bubbling (outwards from the pages that were
    /// asked for last), hottest (what was written most often in the rounds before), recorded (what the
    /// guest had to ask for in earlier moves)
    #[arg(long, value_name = "ORDER", default_value = "bubbling")]
    pub push_order: PushOrder,
    /// Push streams: 1 to 16, or auto for as many as pay
    ///
    /// With auto, two at first; another one is tried, or one less, while pages go out, and kept if
    /// more is delivered by it. 'limosa set' changes the number in flight.
    #[arg(long, value_name = "auto|N", default_value_t = Streams::AUTO)]
    pub streams: Streams,
    /// Hash memory and state on both sides at the switch and compare, and disks that are copied
    #[arg(long)]
    pub verify: bool,
    /// Copy the guest's disks along, which the target does not have
    ///
    /// It makes them anew at the same paths, below what it lends with --lend-disk, and refuses where there is
    /// something already. They are sent as memory is, by each technique: what the guest writes meanwhile is sent
    /// again, and what is missing when it runs there comes when it is needed. What is here stays, and is not
    /// used any more.
    #[arg(long)]
    pub copy_disks: bool,
    /// Behave as over a link of this rate
    #[arg(long, value_name = "RATE")]
    pub link: Option<Rate>,
    /// Move nothing: ask the target whether it would take the guest, and estimate each technique
    ///
    /// The guest's writes are followed for a second, and the way is measured with bytes of no meaning.
    #[arg(long, conflicts_with = "detach")]
    pub dry_run: bool,
    /// Start it and return at once with its id
    #[arg(long)]
    pub detach: bool,
    /// First have the guest give up what memory it has free, by its balloon, for as long as it is moved; takes
    /// up to 20 s
    #[arg(long)]
    pub balloon: bool,
    /// Allow a target on another machine although this daemon runs without --tls
    #[arg(long)]
    pub insecure: bool,
    #[command(flatten)]
    pub format: Format,
}

/// Show migrations, or one of them
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  limosa status
  limosa status web
  limosa status web --follow
  limosa status 3f2a --json")]
pub(crate) struct Status {
    /// Name of the virtual machine, or (the beginning of) the id of the migration
    #[arg(value_name = "VM|ID")]
    pub which: Option<String>,
    /// Show progress until it is over; status 0 only if it completes
    #[arg(long, requires = "which")]
    pub follow: bool,
    #[command(flatten)]
    pub format: Format,
}

/// Change the mode or the limits of a running migration
///
/// The next decision uses them. Once the guest runs at the target only the modes demand and
/// post-copy are left: the one leaves its pages here until they are needed, the other sends them.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  limosa set web --downtime-max 20ms
  limosa set web --bandwidth-max none --deadline 30s
  limosa set web --mode hybrid
  limosa set web --throttle auto
  limosa set web --streams 4
  limosa set web --balloon 512M")]
#[command(group(clap::ArgGroup::new("changes").required(true).multiple(true)
    .args(["mode", "downtime_max", "bandwidth_max", "deadline", "rounds_max", "compress", "throttle", "defer", "streams", "balloon"])))]
pub(crate) struct Set {
    /// Name of the virtual machine, or (the beginning of) the id of the migration
    #[arg(value_name = "VM|ID")]
    pub which: String,
    /// The technique from now on: auto, pre-copy, hybrid, post-copy, demand or stop-and-copy
    #[arg(long, value_name = "MODE", value_parser = mode)]
    pub mode: Option<Mode>,
    /// Downtime to aim at
    #[arg(long, value_name = "TIME")]
    pub downtime_max: Option<Milliseconds>,
    /// Bytes a second on the wire, all streams together
    #[arg(long, value_name = "RATE|none")]
    pub bandwidth_max: Option<OrNone<Rate>>,
    /// Time since its start after which it should be over
    #[arg(long, value_name = "TIME|none")]
    pub deadline: Option<OrNone<Milliseconds>>,
    /// Rounds while the guest runs
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds_max: Option<u32>,
    /// Code pages to take fewer bytes: where that is quicker, whatever shrinks, not at all, or in one way alone
    #[arg(long, value_name = "auto|on|off|lz4|zstd|delta", value_parser = compression)]
    pub compress: Option<Compression>,
    /// Slow the guest's writers down if rounds do not shrink; off lets them go
    #[arg(long, value_name = "off|auto")]
    pub throttle: Option<Throttling>,
    /// Push streams in use: a number up to those that are open (8, or what migrate asked for), or auto
    #[arg(long, value_name = "auto|N")]
    pub streams: Option<Streams>,
    /// Leave hot pages out of rounds that go out while the guest runs; off has the next one send them
    #[arg(long, value_name = "auto|off")]
    pub defer: Option<Deferral>,
    /// Memory that the guest is to give up by its balloon, 0 for none; a setting of the VM, which needs no
    /// migration and may not be in one
    #[arg(long, value_name = "SIZE", conflicts_with_all = ["mode", "downtime_max", "bandwidth_max",
        "deadline", "rounds_max", "compress", "throttle", "defer", "streams"])]
    pub balloon: Option<Size>,
    #[command(flatten)]
    pub format: Format,
}

/// Send the pages that a moved guest still misses, and follow that to its end
///
/// For a guest that runs at the target with residual dependency on this host, as --mode demand
/// leaves it: its mode becomes post-copy, and when all pages are there this host holds nothing of it
/// any more. Ctrl-C only ends the showing.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  limosa drain web\n  limosa drain 3f2a --json")]
pub(crate) struct Drain {
    /// Name of the virtual machine, or (the beginning of) the id of the migration
    #[arg(value_name = "VM|ID")]
    pub which: String,
    #[command(flatten)]
    pub format: Format,
}

/// Decide how a migration ended when the other host cannot be asked any more
///
/// A migration that lost its target after the commit is unresolved: this host asks again and again,
/// and as soon as the target answers the matter heals by itself. Only if it never will, somebody has
/// to say what is the case. limosa cannot check it: you answer for it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  limosa resolve web --runs-here
  limosa resolve web --gone

At the source, for a migration that is unresolved:
  --runs-here  You answer for it that the target has not run the guest and never will: its daemon
               and the guest's process there are dead, or the machine is switched off and will not
               come back with them. If you are wrong the guest runs twice. Refused if it is known
               that the guest has run at the target.
  --gone       You answer for it that the guest runs at the target with all its pages, or is lost.
               What is left of it here is ended. If you are wrong the guest is lost.

At the target, for a guest that runs there and misses pages:
  --gone       You answer for it that its source will never come back. The guest is given up and its
               process ended, since without those pages it cannot go on. Refused while its source
               is connected: 'limosa stop' ends the guest then, and tells the source.
  --runs-here  Is refused: it runs there, but not without the pages that its source has.")]
#[command(group(clap::ArgGroup::new("word").required(true).args(["runs_here", "gone"])))]
pub(crate) struct Resolve {
    /// Name of the virtual machine, or (the beginning of) the id of the migration
    #[arg(value_name = "VM|ID")]
    pub which: String,
    /// The target has not run the guest and never will: it goes on here
    #[arg(long)]
    pub runs_here: bool,
    /// Nothing is to be kept here; at the target: the source will never come back
    #[arg(long)]
    pub gone: bool,
    #[command(flatten)]
    pub format: Format,
}

/// End a virtual machine, or remove one that has ended
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  limosa stop web\n  limosa stop --force web")]
pub(crate) struct Stop {
    /// Name of the virtual machine
    pub vm: String,
    /// Abort its migration first, and kill its process if it does not end by itself
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub format: Format,
}

/// Replay the journal of a migration and check that the engine decides the same
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  limosa replay /run/limosa/journals/000000-web.journal

A daemon keeps the journals of its last migrations in its state directory.")]
pub(crate) struct Replay {
    /// The journal
    pub journal: PathBuf,
    #[command(flatten)]
    pub format: Format,
}

/// The process of one virtual machine.
#[derive(Debug, Args)]
pub(crate) struct Vm {
    /// Where it listens for its daemon
    #[arg(long)]
    pub socket: PathBuf,
    /// What its heartbeats say about where it is
    #[arg(long, default_value = "")]
    pub host_tag: String,
    /// The file in which it notes that a guest that arrived runs here
    #[arg(long)]
    pub ledger: Option<PathBuf>,
    /// The process that starts it and gives it a machine
    #[arg(long)]
    pub daemon: Option<u32>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_commands_are_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn every_command_has_a_description_and_an_example() {
        for command in Arguments::command().get_subcommands() {
            let name = command.get_name();
            assert!(command.get_about().is_some(), "{name} has no description");
            if !command.is_hide_set() {
                let help = command
                    .get_after_help()
                    .map(ToString::to_string)
                    .unwrap_or_default();
                assert!(
                    help.contains(&format!("limosa {name}")),
                    "{name} has no example"
                );
            }
        }
    }

    #[test]
    fn usage_errors_say_what_is_expected() {
        let check = |line: &str, expect: &str| {
            let error = Arguments::try_parse_from(line.split(' ')).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
            let text = error.to_string();
            assert!(text.contains(expect), "{line}: {text}");
        };
        check(
            "limosa run web --micro idle --memory 4X",
            "like 512M or 1.5G",
        );
        check(
            "limosa run web --micro idle --vcpus 17",
            "17 is not in 1..=16",
        );
        check(
            "limosa migrate web --to a:1 --mode fast",
            "known modes are stop-and-copy, demand, post-copy, pre-copy, hybrid, auto",
        );
        check(
            "limosa migrate web --to a:1 --downtime-max 5",
            "like 5ms or 1.5s",
        );
        check("limosa migrate web", "--to <HOST:PORT>");
        check("limosa set web", "--downtime-max");
        check("limosa resolve web", "--runs-here");
        check(
            "limosa resolve web --runs-here --gone",
            "cannot be used with",
        );
        check("limosa status --follow", "<VM|ID>");
    }

    #[test]
    fn every_mode_is_explained() {
        let mut arguments = Arguments::command();
        for name in ["migrate", "set"] {
            let command = arguments.find_subcommand_mut(name).unwrap();
            let help = command.render_long_help().to_string();
            for mode in Mode::ALL {
                assert!(help.contains(mode.name()), "{name} --help: {mode}");
            }
        }
        let parsed = Arguments::try_parse_from(["limosa", "migrate", "web", "--to", "b:1"]);
        let Command::Migrate(migrate) = parsed.unwrap().command else {
            panic!()
        };
        assert_eq!(migrate.mode, Mode::Auto);
    }

    #[test]
    fn json_may_stand_before_and_behind_the_command() {
        let parse = |line: &str| Arguments::try_parse_from(line.split(' ')).unwrap();
        assert!(parse("limosa --json list").json);
        let Command::List(format) = parse("limosa list --json").command else {
            panic!()
        };
        assert!(format.json);
        parse("limosa demo --json file.json");
    }
}
