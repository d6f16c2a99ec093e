//! What can be asked of the demo.

use anyhow::bail;
use clap::Args;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use limosa_engine::policy::Mode;
use limosa_engine::streams::Streams;
use limosa_host::api::{Compression, Deferral, PushOrder, Throttling, TrackerKind};
use limosa_lab::backing::Backing;
use limosa_lab::record::Setup;
use limosa_lab::values::{Milliseconds, PageRate, Rate, Size, compression, mode};
use limosa_lab::workload::{Content, GuestProgram, Pattern, Rest, Workload};
use std::path::PathBuf;

/// Move a running virtual machine there and back between two hosts, and measure what it notices.
///
/// Everything is made for the occasion and removed afterwards: two daemons on the loopback, a
/// virtual machine with a guest that checks its own memory. Ends with status 0 only if every move
/// was completed and not a byte of the guest changed.
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// Memory of the guest
    #[arg(long, value_name = "SIZE", default_value = "1G")]
    pub memory: Size,
    /// vCPUs of the guest, 1 to 8
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub vcpus: u8,
    /// Back the guest's memory with 2 MiB pages, which this machine must have reserved
    #[arg(long)]
    pub huge_pages: bool,
    /// Who notices which pages the guest writes: bitmap or ring of KVM, or write-protect
    #[arg(long, value_name = "TRACKER", default_value = "bitmap")]
    pub dirty_tracker: TrackerKind,
    /// The guest program
    #[arg(long, default_value = "writer", value_parser = guest_programs())]
    pub guest: GuestProgram,
    /// Memory that the guest rewrites (writer) or reads (compute)
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    pub working_set: Size,
    /// More memory that the writer fills once at its start
    #[arg(long, value_name = "SIZE", default_value = "0")]
    pub touch: Size,
    /// Pages that the guest writes a second, or max
    #[arg(long, value_name = "PAGES|max", default_value = "50000")]
    pub rate: PageRate,
    /// The order in which the writer takes its pages
    #[arg(long, default_value = "uniform", value_parser = patterns())]
    pub pattern: Pattern,
    /// What fills the writer's pages
    #[arg(long, default_value = "noise", value_parser = contents())]
    pub content: Content,
    /// Behave as over a link of so many bytes a second
    #[arg(long, value_name = "RATE")]
    pub link: Option<Rate>,
    /// Techniques to use in turn
    #[arg(long, value_name = "MODE,…", value_delimiter = ',', value_parser = mode,
          default_values = Mode::ALL.map(Mode::name))]
    pub modes: Vec<Mode>,
    /// How often there and back by each mode
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub repeat: u32,
    /// Make so many moves, with the modes mixed by --seed
    #[arg(long, value_name = "N", conflicts_with = "repeat", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub moves: Option<u32>,
    /// Seed of the guest's choices, of --moves and of the simulator
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Code pages to take fewer bytes: auto (where that is quicker), on (whatever shrinks), off, or all in
    /// one way: lz4, zstd, delta (as differences to what was sent before)
    #[arg(long, value_name = "auto|on|off|lz4|zstd|delta", default_value = "auto", value_parser = compression)]
    pub compress: Compression,
    /// Slow the guest's writers down if rounds do not shrink: auto or off
    #[arg(long, value_name = "off|auto", default_value_t = Throttling::Off)]
    pub throttle: Throttling,
    /// Leave hot pages out of rounds that go out while the guest runs: auto or off
    #[arg(long, value_name = "auto|off", default_value_t = Deferral::Auto)]
    pub defer: Deferral,
    /// In which order missing pages are pushed: address, bubbling, hottest, recorded
    #[arg(long, value_name = "ORDER", default_value = "bubbling")]
    pub push_order: PushOrder,
    /// Encrypt every connection, with certificates that are made for the occasion
    #[arg(long)]
    pub tls: bool,
    /// Push streams: 1 to 16, or auto for as many as pay [default: auto]
    #[arg(long, value_name = "auto|N")]
    pub streams: Option<Streams>,
    /// Downtime that pre-copy aims at
    #[arg(long, value_name = "TIME", default_value = "5ms")]
    pub downtime_max: Milliseconds,
    /// Compare hashes of memory and state at the switch (this is the default)
    #[arg(long, overrides_with = "no_verify")]
    pub verify: bool,
    /// Do not compare hashes: the hosts have less to do right after the switch
    #[arg(long, overrides_with = "verify")]
    pub no_verify: bool,
    /// Go on after a move that failed, as long as the guest lives
    #[arg(long)]
    pub keep_going: bool,
    /// Use the simulator even if there is /dev/kvm
    #[arg(long)]
    pub simulate: bool,
    /// Write all measurements to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  limosa demo
  limosa demo --modes pre-copy --repeat 5 --json moves.json
  limosa demo --memory 4G --working-set 256M --touch 768M
  limosa demo --rate max --link 500M --modes pre-copy,hybrid,auto
  limosa demo --content text --rate 40000 --link 125M --modes pre-copy --compress auto
  limosa demo --rate max --link 125M --modes pre-copy --dirty-tracker ring --throttle auto
  limosa demo --modes pre-copy --repeat 5 --tls
  limosa demo --vcpus 2 --moves 200 --seed 7

The columns of the table and the names in the file are explained in docs/demo.md.";

impl Arguments {
    /// Whether digests are compared.
    pub(crate) const fn verifies(&self) -> bool {
        !self.no_verify
    }

    /// What the guest does.
    ///
    /// # Errors
    /// It was given what its program does not have.
    pub(crate) fn workload(&self) -> anyhow::Result<Workload> {
        let is_writer = self.guest == GuestProgram::Writer;
        if !is_writer && self.touch.bytes() > 0 {
            bail!("--touch needs --guest writer");
        }
        if !is_writer && self.content != Content::Noise {
            bail!("--content needs --guest writer");
        }
        Ok(Workload {
            rest: Rest::Wait,
            guest: self.guest,
            working_set: self.working_set,
            touch: self.touch,
            rate: self.rate,
            pattern: self.pattern,
            content: self.content,
            clients: None,
        })
    }

    /// The same as it stands in the file.
    ///
    /// # Errors
    /// As [`Arguments::workload`].
    pub(crate) fn setup(&self) -> anyhow::Result<Setup> {
        Ok(Setup {
            guest: self.guest.name().to_owned(),
            arguments: self.workload()?.arguments(self.seed),
            memory_bytes: self.memory.bytes(),
            vcpus: self.vcpus,
            pages: if self.huge_pages {
                Backing::Reserved
            } else {
                Backing::Host
            },
            dirty_tracker: self.dirty_tracker,
            link: self.link.map(Rate::get),
            streams: self.streams,
            compress: self.compress,
            throttle: self.throttle,
            defer: self.defer,
            push_order: self.push_order,
            tls: self.tls,
            deadline_ms: None,
            rounds_max: None,
            downtime_max_ms: self.downtime_max.get(),
            verify: self.verifies(),
            seed: self.seed,
            clients: None,
        })
    }
}

fn guest_programs() -> impl TypedValueParser<Value = GuestProgram> {
    // One that serves would need clients and a network, which takes more than a demo asks for.
    let known = GuestProgram::ALL.into_iter().filter(|one| !one.serves());
    let known = known.map(|one| PossibleValue::new(one.name()).help(one.explain()));
    PossibleValuesParser::new(known).try_map(|name| name.parse::<GuestProgram>())
}

fn contents() -> impl TypedValueParser<Value = Content> {
    let known = Content::ALL.map(|one| PossibleValue::new(one.name()).help(one.explain()));
    PossibleValuesParser::new(known).try_map(|name| name.parse::<Content>())
}

fn patterns() -> impl TypedValueParser<Value = Pattern> {
    let known = Pattern::ALL.map(|one| {
        let value = PossibleValue::new(one.name()).help(one.explain());
        match one {
            Pattern::Sequential => value.alias("seq"),
            _ => value,
        }
    });
    PossibleValuesParser::new(known).try_map(|name| name.parse::<Pattern>())
}
