//! The real thing: a guest under KVM, moved between two daemons on the loopback of this machine, or, if it has
//! clients, between network namespaces: then the link is the kernel's and not emulated by the daemons.
//!
//! For each move: free memory is made to be at hand ([`warm`]), a second in which nothing happens, the guest forgets its longest stalls, the move,
//! another second, then the stalls are read and the guest checks all of its memory. The sweep comes
//! last because it keeps the guest from its work.
//!
//! A guest that runs before its pages are there waits for some of them, and one whose memory is
//! being hashed for the processors, so that the stall of the switch may soon not be among the last or
//! the longest ones any more: the stalls are read as soon as the guest runs at the target, too.

use crate::bed::clients::Clients;
use crate::bed::growth::{Growth, Resources};
use crate::bed::host_pages::HostPages;
use crate::bed::hosts::{Host, Hosts, NAMES, VM};
use crate::bed::interrupt::{Interrupt, Interrupted};
use crate::bed::observation::{Counted, MARGIN, Moments, earlier, observe};
use crate::bed::observer::{self, Observer};
use crate::bed::processors::Processors;
use crate::bed::progress::Progress;
use crate::bed::stalls::{Stall, StallGroup};
use crate::bed::warm::warm;
use anyhow::{Context, bail};
use limosa_clients::{Lan, lan};
use limosa_engine::Timestamp;
use limosa_engine::policy::Mode;
use limosa_engine::source::Stage;
use limosa_host::api::{
    CommandKind, CpuModel, ErrorKind, GuestReport, LimitsPatch, MigrateBody, NetworkSpec, Report,
    VmSpec, VmState,
};
use limosa_lab::backing::Backing;
use limosa_lab::record::{Checked, MoveRecord, Observed, Setup};
use std::time::{Duration, Instant};

/// A guest's own work never takes longer than at this many bytes a second, whatever else the
/// machine does: filling its memory and sweeping it.
const GUEST_BYTES_PER_SECOND_MIN: u64 = 50 << 20;
/// What any waiting allows on top of the time that bytes take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often a move may send all of the guest's memory before it is given up.
const MEMORY_SENT_MAX: u64 = 40;
/// The moves after which everything that daemons make only once has been made.
const MOVES_UNTIL_WARM: u32 = 2;
/// Idle threads of the daemons' pools end after ten seconds.
const SETTLE: Duration = Duration::from_secs(11);
/// Beats take a moment to arrive.
const ARRIVAL: Duration = Duration::from_millis(50);
/// For how long a guest that is moved by pure demand paging lives on faults alone.
const ON_DEMAND: Duration = Duration::from_secs(1);
/// Between two looks at a guest that carries out a command.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// The two hosts and the guest, somewhere on them.
#[derive(Debug)]
pub(crate) struct Loopback {
    /// Ended before their guest.
    clients: Option<Clients>,
    hosts: Hosts,
    /// Put back after the daemons and the guest have ended.
    _host_pages: HostPages,
    observer: Observer,
    interrupt: Interrupt,
    setup: Setup,
    /// The host that runs the guest.
    at: usize,
    made: u32,
    idle: Resources,
    first: Option<Resources>,
    anonymous_bytes_max: u64,
    /// Taken down when nobody is in it any more.
    lan: Option<Lan>,
}

impl Loopback {
    /// Starts the daemons and the guest, and waits until it works.
    pub(crate) fn start(setup: &Setup, interrupt: &Interrupt) -> anyhow::Result<Self> {
        let serves = setup.clients.is_some();
        let lan = serves.then(|| Lan::make("lab", setup.link)).transpose()?;
        let observer = match &lan {
            Some(lan) => Observer::on_both(VM, lan)?,
            None => Observer::start(VM)?,
        };
        // Before the daemons, which look at it once.
        let host_pages = HostPages::set(setup.pages)?;
        let hosts = Hosts::start(setup.tls, lan.as_ref(), interrupt)?;
        let idle = hosts.resources()?;
        let mut this = Self {
            clients: None,
            hosts,
            _host_pages: host_pages,
            observer,
            interrupt: interrupt.clone(),
            setup: setup.clone(),
            at: 0,
            made: 0,
            idle,
            first: None,
            anonymous_bytes_max: 0,
            lan,
        };
        this.run_guest().inspect_err(|error| this.explain(error))?;
        let clients = this.start_clients();
        this.clients = clients.inspect_err(|error| this.explain(error))?;
        Ok(this)
    }

    /// The guest's speed over a second.
    pub(crate) fn speed(&self) -> anyhow::Result<f64> {
        let begun = observer::now();
        self.interrupt.sleep(MARGIN + ARRIVAL)?;
        let beats = self.observer.since(begun);
        let rate = beats.rate(begun, begun.after(MARGIN));
        rate.context("no heartbeat of the guest arrives")
    }

    /// Moves the guest to the other host, then has all of its memory checked.
    pub(crate) fn make_move(
        &mut self,
        number: u32,
        mode: Mode,
        title: &str,
    ) -> anyhow::Result<MoveRecord> {
        let made = self.measure(number, mode, title);
        made.inspect_err(|error| self.explain(error))
    }

    /// Compares what the daemons hold with what they held.
    pub(crate) fn growth(&self) -> anyhow::Result<Growth> {
        let growth = self.grown()?;
        if growth.problems().is_empty() {
            return Ok(growth);
        }
        // Nothing is asked meanwhile: a question would keep the pools' threads from ending.
        self.interrupt.sleep(SETTLE)?;
        self.grown()
    }

    fn grown(&self) -> anyhow::Result<Growth> {
        let last = self.hosts.resources()?;
        Ok(Growth {
            idle: self.idle,
            first: self.first.unwrap_or(last),
            last,
            moves: self.made.saturating_sub(MOVES_UNTIL_WARM),
            anonymous_bytes_max: self.anonymous_bytes_max.max(last.anonymous_bytes),
        })
    }

    fn host(&self) -> &Host {
        &self.hosts.hosts[self.at]
    }

    /// Shows the logs, unless somebody just wants to end.
    fn explain(&self, error: &anyhow::Error) {
        if !error.is::<Interrupted>() {
            eprint!("{}", self.hosts.log_tails());
        }
    }

    fn run_guest(&self) -> anyhow::Result<()> {
        let spec = VmSpec {
            name: VM.to_owned(),
            micro: Some(self.setup.guest.clone()),
            linux: None,
            args: match &self.lan {
                Some(_) => format!("ip={} {}", lan::GUEST, self.setup.arguments),
                None => self.setup.arguments.clone(),
            },
            memory_bytes: self.setup.memory_bytes,
            vcpus: self.setup.vcpus,
            huge_pages: self.setup.pages == Backing::Reserved,
            dirty_tracker: self.setup.dirty_tracker,
            cpu: CpuModel::Host,
            networks: self.lan.iter().map(|_| tap()).collect(),
            observer: Some(self.observer.address().to_string()),
        };
        self.host().client.run(&spec)?;
        let give_up = Instant::now() + self.patience(1);
        loop {
            let report = self.host().client.guest(VM);
            if let Ok(report) = &report
                && report.vcpus.len() == usize::from(self.setup.vcpus)
                && report.vcpus.iter().all(|vcpu| vcpu.state == "ready")
            {
                return Ok(());
            }
            let vm = self.host().client.vm(VM)?;
            if vm.state == VmState::Ended {
                let ended = vm.ended.unwrap_or_default();
                bail!("the guest ended before it was ready: {ended}");
            }
            if Instant::now() > give_up {
                bail!("the guest is not ready after {:?}", self.patience(1));
            }
            self.interrupt.sleep(Duration::from_millis(20))?;
        }
    }

    /// Fills the guest, if it has clients.
    fn start_clients(&self) -> anyhow::Result<Option<Clients>> {
        let (Some(lan), Some(settings)) = (&self.lan, &self.setup.clients) else {
            return Ok(None);
        };
        // A stop is as long as the whole memory takes, at most, and a packet of it is sent again within as long a time.
        let answer_max = self.patience(2);
        Clients::start(lan, settings, self.setup.seed, answer_max, &self.interrupt).map(Some)
    }

    /// Time to pass the guest's memory so many times.
    fn patience(&self, times: u64) -> Duration {
        let slowest = self
            .setup
            .link
            .unwrap_or(u64::MAX)
            .min(GUEST_BYTES_PER_SECOND_MIN);
        let seconds = (times * self.setup.memory_bytes).div_ceil(slowest.max(1));
        PATIENCE + Duration::from_secs(seconds)
    }

    fn measure(&mut self, number: u32, mode: Mode, title: &str) -> anyhow::Result<MoveRecord> {
        let (from, to) = (self.at, 1 - self.at);
        warm(self.setup.memory_bytes);
        let working = self.clients.as_mut().map(Clients::work).transpose()?;
        self.interrupt.sleep(MARGIN + ARRIVAL)?;
        let before = self.command(CommandKind::ClearStalls, PATIENCE)?;
        let processors = Processors::now(self.hosts.directory());
        let begun = observer::now();
        let (report, mut stalls) = self.migrate(to, mode, title)?;
        let ended = begun.after(Duration::from_secs_f64(report.eviction_ms / 1000.0));
        if report.outcome.as_deref() == Some("completed") {
            self.at = to;
        }
        self.made = number;
        // Read again: on a busy machine the guest's tables are full of later stalls in a second.
        stalls.extend(self.stalls_at(self.at)?);
        self.wait_for(ended.after(MARGIN + ARRIVAL))?;
        let guest = self.host().client.guest(VM)?;
        let counted = counted(&guest, observer::now().since(begun));
        stalls.extend(stalls_of(&guest));
        let moments = moments((begun, ended), &report);
        // Clients would keep the guest from its sweep.
        let clients = self.clients.as_mut().zip(working);
        let clients = clients.map(|(clients, working)| clients.rest(working, &moments));
        let mut observed = self.observed(&moments, &stalls, &counted);
        if clients.is_some() {
            // One that waits for packets may have been away unawares.
            observed.guest_gap_ms = observed.guest_gap_ms.filter(|gap| *gap > 0.0);
        }
        observed.others_cpu_share =
            processors.and_then(|before| before.others_until_now(self.hosts.directory()));
        let checked = self.check(&before)?;
        self.note_resources()?;
        let way = (NAMES[from], NAMES[to]);
        Ok(MoveRecord {
            clients,
            ..MoveRecord::new(number, way, mode, report, observed, checked)
        })
    }

    /// Makes the move; its report, and the stalls that the guest had recorded when it had just been
    /// seen running at the target.
    fn migrate(&self, to: usize, mode: Mode, title: &str) -> anyhow::Result<(Report, Vec<Stall>)> {
        let mut body = MigrateBody::new(self.hosts.hosts[to].peer_address.clone(), mode);
        body.downtime_max_ms = Some(self.setup.downtime_max_ms);
        body.streams = self.setup.streams;
        body.compress = self.setup.compress;
        body.throttle = self.setup.throttle;
        body.defer = self.setup.defer;
        body.push_order = self.setup.push_order;
        body.verify = self.setup.verify;
        // A link of the kernel's needs none that is emulated.
        body.link = self.setup.link.filter(|_| self.lan.is_none());
        body.insecure = self.lan.is_some() && !self.setup.tls;
        body.deadline_ms = self.setup.deadline_ms.map(|deadline| deadline as f64);
        body.rounds_max = self.setup.rounds_max;
        let client = &self.host().client;
        let id = client.migrate(VM, &body)?;
        let patience = self.patience(MEMORY_SENT_MAX);
        let give_up = Instant::now() + patience;
        let mut progress = Progress::new(title);
        let mut stalls = None;
        // A question is work for the daemon that is being measured: ask seldom if nobody watches,
        // and no guest has to be seen soon whose stalls push each other out of its tables.
        let step = Duration::from_millis(
            match (
                mode.copies_live() || mode.needs_faults(),
                progress.is_visible(),
            ) {
                (true, _) => 50,
                (false, true) => 100,
                (false, false) => 500,
            },
        );
        loop {
            self.interrupt.check()?;
            let info = client.wait(&id, step)?;
            if info.stage == Stage::Finished {
                return Ok((info.report, stalls.unwrap_or_default()));
            }
            progress.show(&info);
            let runs_there = matches!(info.stage, Stage::Serving | Stage::Releasing);
            if runs_there && stalls.is_none() {
                stalls = Some(self.stalls_at(to)?);
                if mode == Mode::Demand {
                    self.interrupt.sleep(ON_DEMAND)?;
                    self.drain(&id)?;
                }
            }
            if Instant::now() > give_up {
                let stage = info.stage;
                bail!("the move is not over after {patience:?}; its stage is {stage:?}");
            }
        }
    }

    /// Has the pages pushed that the guest still misses.
    fn drain(&self, id: &str) -> anyhow::Result<()> {
        let patch = LimitsPatch {
            mode: Some(Mode::PostCopy),
            ..LimitsPatch::default()
        };
        match self.host().client.set(id, &patch) {
            // It touched all of them within its time.
            Err(error) if error.kind() == Some(ErrorKind::Conflict) => Ok(()),
            set => Ok(set.map(drop)?),
        }
    }

    fn wait_for(&self, moment: Timestamp) -> Result<(), Interrupted> {
        self.interrupt.sleep(moment.since(observer::now()))
    }

    /// The stalls that the guest's tables hold now, from the host where it runs.
    fn stalls_at(&self, host: usize) -> anyhow::Result<Vec<Stall>> {
        let guest = self.hosts.hosts[host].client.guest(VM)?;
        Ok(stalls_of(&guest).collect())
    }

    fn observed(&self, moments: &Moments, stalls: &[Stall], counted: &Counted) -> Observed {
        let beats = self
            .observer
            .since(earlier(moments.begun, MARGIN + ARRIVAL));
        observe(moments, &beats, stalls, counted)
    }

    /// Has the guest sweep its memory, and counts the errors since `before`.
    fn check(&self, before: &GuestReport) -> anyhow::Result<Checked> {
        let swept = self.command(CommandKind::Sweep, self.patience(1))?;
        let errors = |report: &GuestReport| -> u64 {
            let vcpus = report.vcpus.iter();
            vcpus.map(|vcpu| vcpu.errors + vcpu.tsc_backwards).sum()
        };
        Ok(Checked {
            errors: errors(&swept).saturating_sub(errors(before)),
            swept_pages: Some(swept.vcpus.iter().map(|vcpu| vcpu.sweep_pages).sum()),
        })
    }

    /// Gives the guest a command and waits until every vCPU has carried it out.
    fn command(&self, kind: CommandKind, patience: Duration) -> anyhow::Result<GuestReport> {
        let client = &self.host().client;
        let before = client.guest(VM)?;
        client.command(VM, kind)?;
        let give_up = Instant::now() + patience;
        loop {
            let report = client.guest(VM)?;
            let pairs = report.vcpus.iter().zip(&before.vcpus);
            let is_done = report.vcpus.len() == before.vcpus.len()
                && pairs
                    .clone()
                    .all(|(now, then)| now.command_done != then.command_done);
            if is_done {
                return Ok(report);
            }
            if Instant::now() > give_up {
                bail!("the guest did not carry out {kind:?} within {patience:?}");
            }
            self.interrupt.sleep(LOOK_EVERY)?;
        }
    }

    fn note_resources(&mut self) -> anyhow::Result<()> {
        let now = self.hosts.resources()?;
        self.anonymous_bytes_max = self.anonymous_bytes_max.max(now.anonymous_bytes);
        if self.made >= MOVES_UNTIL_WARM && self.first.is_none() {
            self.first = Some(now);
        }
        Ok(())
    }
}

/// When all of it was.
fn moments((begun, ended): (Timestamp, Timestamp), report: &Report) -> Moments {
    let switch = report.switch_ns.map(|switch| {
        let moment = Timestamp::from_nanos;
        (moment(switch.stopped), moment(switch.running))
    });
    Moments {
        begun,
        ended,
        switch,
    }
}

/// The network of a guest with clients.
fn tap() -> NetworkSpec {
    NetworkSpec {
        tap: lan::TAP.to_owned(),
        mac: None,
    }
}

/// The stalls that stand in the tables of all vCPUs.
fn stalls_of(guest: &GuestReport) -> impl Iterator<Item = Stall> + '_ {
    let vcpus = guest.vcpus.iter();
    let stalls = vcpus.flat_map(|vcpu| vcpu.stalls.iter().chain(&vcpu.long_stalls));
    stalls.map(|stall| Stall {
        start_tsc: stall.start_tsc,
        length_tsc: stall.length_tsc,
    })
}

/// All stalls of all vCPUs since they were told to forget them, so long ago.
fn counted(guest: &GuestReport, since: Duration) -> Counted {
    let groups = guest.vcpus.iter().flat_map(|vcpu| &vcpu.stall_groups);
    let own = |group: &limosa_host::api::StallGroup| StallGroup {
        count: group.count,
        ticks: group.ticks,
    };
    Counted {
        groups: groups.map(own).collect(),
        watched: since * u32::try_from(guest.vcpus.len()).unwrap_or(u32::MAX),
    }
}
