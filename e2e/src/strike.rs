//! Whom a test kills in the middle of a migration, and what is to be found afterwards.

use crate::daemon::Daemon;
use crate::hold::Hold;
use crate::link::Link;
use crate::pair::{Pair, VM, assert_gone, begin_to, drain, end, move_so, until_stage};
use crate::points::Manner;
use crate::{guest, process, wait};
use limosa_engine::policy::Mode;
use limosa_engine::source::Stage;
use limosa_host::api::{Report, ResolveWord, VmInfo, VmState};
use std::fmt;

/// Whom to kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Victim {
    /// The daemon at the target; it is started again.
    TargetDaemon,
    /// The VM process at the target.
    TargetVm,
    /// The daemon at the source; it is started again.
    SourceDaemon,
    /// The VM process at the source.
    SourceVm,
    /// Both daemons; both are started again.
    BothDaemons,
    /// VM process and daemon at the source, and with them the guest's memory.
    SourceHost,
}

impl Victim {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::TargetDaemon,
        Self::TargetVm,
        Self::SourceDaemon,
        Self::SourceVm,
        Self::BothDaemons,
        Self::SourceHost,
    ];
}

impl fmt::Display for Victim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TargetDaemon => "target daemon",
            Self::TargetVm => "target VM",
            Self::SourceDaemon => "source daemon",
            Self::SourceVm => "source VM",
            Self::BothDaemons => "both daemons",
            Self::SourceHost => "source daemon and VM",
        })
    }
}

/// A migration from `a` to `b` that has come to where something is to happen to it.
#[derive(Debug)]
pub struct Held {
    /// The hosts; the guest begins at `a`.
    pub pair: Pair,
    /// The way from `a` to `b`, if it is one that can be cut.
    pub link: Option<Link>,
    /// What it waits for; `None` at [`SERVING`].
    pub hold: Option<Hold>,
    /// Its id.
    pub id: String,
    /// How it is carried out.
    pub manner: Manner,
}

/// How the hosts are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Direct,
    Link,
    Encrypted,
}

/// In place of a point: the guest runs at the target on demand, and nothing else happens.
pub const SERVING: &str = "serving";

/// Points that a guest on demand comes to only when it is drained.
const BEHIND_DRAIN: [&str; 4] = [
    "target.disarm",
    "target.complete",
    "source.hash",
    "source.release",
];

/// Points of a source that has lost its connection to a guest that misses pages.
pub const COMING_BACK: [&str; 5] = [
    "source.ask-outcome",
    "source.reconnect",
    "source.reattach",
    "target.reconcile",
    "target.reattached",
];

impl Held {
    /// A migration that is held at `point`.
    ///
    /// # Panics
    /// If it does not come there.
    #[track_caller]
    pub fn at(point: &str, manner: Manner) -> Self {
        Self::begin(point, manner, Way::Direct)
    }

    /// The same, over a link; for [`COMING_BACK`] it has been cut and mended by then.
    ///
    /// # Panics
    /// If it does not come there.
    #[track_caller]
    pub fn at_over_link(point: &str, manner: Manner) -> Self {
        Self::begin(point, manner, Way::Link)
    }

    /// The same, with every connection encrypted.
    ///
    /// # Panics
    /// If it does not come there.
    #[track_caller]
    pub fn at_encrypted(point: &str, manner: Manner) -> Self {
        Self::begin(point, manner, Way::Encrypted)
    }

    #[track_caller]
    fn begin(point: &str, manner: Manner, way: Way) -> Self {
        let hold = (point != SERVING).then(|| Hold::new(point));
        let pair = match (way, &hold) {
            (Way::Encrypted, hold) => Pair::start_encrypted(hold.as_ref()),
            (_, Some(hold)) => Pair::start_held(hold),
            (_, None) => Pair::start(),
        };
        pair.boot(manner.spec());
        let link = (way == Way::Link).then(|| Link::to(pair.b.peer_address()));
        let address = link
            .as_ref()
            .map_or_else(|| pair.b.peer_address().to_owned(), Link::address);
        let id = begin_to(&pair.a, &address, manner);
        if COMING_BACK.contains(&point) {
            until_stage(&pair.a, &id, &[Stage::Serving]);
            guest::assert_works(&pair.b, VM);
            let link = link.as_ref().expect("a connection is lost on a link only");
            link.cut();
            link.mend();
        }
        if manner == Manner::Of(Mode::Demand) && BEHIND_DRAIN.contains(&point) {
            until_stage(&pair.a, &id, &[Stage::Serving]);
            drain(&pair.a, &id);
        }
        match &hold {
            Some(hold) => hold.wait_until_held(),
            None => {
                until_stage(&pair.a, &id, &[Stage::Serving]);
                guest::assert_works(&pair.b, VM);
            }
        }
        Self {
            pair,
            link,
            hold,
            id,
            manner,
        }
    }

    /// Lets it go on.
    pub fn release(&self) {
        if let Some(hold) = &self.hold {
            hold.release();
        }
    }

    /// Waits for its end at the source.
    ///
    /// # Panics
    /// If it does not end.
    #[track_caller]
    pub fn end(&self) -> Report {
        end(&self.pair.a, &self.id)
    }

    /// The link.
    ///
    /// # Panics
    /// If there is none.
    pub fn link(&self) -> &Link {
        self.link.as_ref().expect("a case with a link")
    }

    /// The source says that it does not know who has the guest, and lets nobody end it.
    ///
    /// # Panics
    /// If it is otherwise.
    #[track_caller]
    pub fn assert_in_doubt(&self) {
        let source = &self.pair.a;
        let info = until_stage(source, &self.id, &[Stage::Unresolved]);
        let said = wait::until("it says why", || {
            source.client().migration(&self.id).ok()?.unresolved
        });
        assert!(!said.is_empty() && !said.contains('\n'), "{said:?}");
        assert_eq!(info.report.outcome, None, "{info:?}");
        let vm = source.client().vm(VM).expect("it is listed");
        assert_eq!(vm.state, VmState::Unresolved, "{vm:?}");
        source
            .client()
            .abort(&self.id)
            .expect_err("the target decides");
    }

    /// The guest runs at `b`, and its source has not said that it holds nothing any more.
    ///
    /// # Panics
    /// If it is otherwise.
    #[track_caller]
    pub fn assert_has_arrived(&self) {
        let vm = wait::until("the guest runs at the target", || {
            let vm = self.pair.b.client().vm(VM).ok()?;
            (vm.state == VmState::Running).then_some(vm)
        });
        assert!(vm.phase.starts_with("arrived"), "{vm:?}");
    }

    /// The guest runs at `b` and nowhere else, and the way back works.
    ///
    /// # Panics
    /// If it is otherwise.
    #[track_caller]
    pub fn assert_has_moved(&self) {
        let pair = &self.pair;
        assert_gone(VM, &pair.a);
        guest::assert_works(&pair.b, VM);
        guest::assert_whole(&pair.b, VM);
        let turns = pair.beats.assert_one_at_a_time();
        assert_eq!(turns.len(), 2, "{turns:#?}");
        move_so(&pair.b, &pair.a, self.manner);
        pair.beats.assert_one_at_a_time();
    }

    /// The guest died after it had moved with all its pages: the target says so, and the source never
    /// brings it back.
    ///
    /// # Panics
    /// If it is otherwise.
    #[track_caller]
    pub fn assert_is_dead_at_target(&self) {
        assert_gone(VM, &self.pair.a);
        remove_ended(&self.pair.b);
        let turns = self.pair.beats.turns();
        assert!(turns.len() <= 2, "{turns:#?}");
        self.assert_can_begin_anew();
    }

    /// The guest ended at the target before its pages were there: both say so, and neither keeps
    /// anything of it.
    ///
    /// # Panics
    /// If it is otherwise.
    #[track_caller]
    pub fn assert_is_lost(&self) {
        // The target first: a source that is told to forget it tells nobody any more.
        remove_ended(&self.pair.b);
        remove_ended(&self.pair.a);
        let turns = self.pair.beats.turns();
        assert!(turns.len() <= 2, "{turns:#?}");
        self.assert_can_begin_anew();
    }

    /// The source has heard from the target what became of the guest, says it in these words, and
    /// forgets it.
    ///
    /// # Panics
    /// If it is otherwise.
    #[track_caller]
    pub fn until_told(&self, words: &str) {
        let how = wait::until("the source says what became of the guest", || {
            let vm = self.pair.a.client().vm(VM).ok()?;
            vm.ended.filter(|how| how.contains(words))
        });
        assert!(how.contains(self.pair.b.peer_address()), "{how}");
        remove_ended(&self.pair.a);
    }

    /// The source's host is lost with the guest's memory: the guest stands at the target, which tells
    /// what it misses and gives it up when it is told to.
    ///
    /// # Panics
    /// If it is otherwise.
    #[track_caller]
    pub fn assert_stands_until_given_up(&self) {
        let target = &self.pair.b;
        let vm = wait::until("the target lists what the guest misses", || {
            let vm = target.client().vm(VM).ok()?;
            (vm.missing_pages > 0 && vm.residual_dependency.is_some()).then_some(vm)
        });
        assert_ne!(vm.state, VmState::Ended, "{vm:?}");
        let migration = target
            .client()
            .migrate(VM, &self.manner.body("127.0.0.1:1"));
        migration.expect_err("what is not whole cannot move on");
        target
            .client()
            .resolve(&self.id, ResolveWord::RunsHere)
            .expect_err("it can never be whole");
        target
            .client()
            .resolve(&self.id, ResolveWord::Gone)
            .expect("an operator's word");
        remove_ended(target);
    }

    /// A guest of the same name can be started and moved: nothing of the old one is in its way.
    ///
    /// # Panics
    /// If it is otherwise.
    #[track_caller]
    pub fn assert_can_begin_anew(&self) {
        let pair = &self.pair;
        assert_gone(VM, &pair.a);
        assert_gone(VM, &pair.b);
        pair.beats.clear();
        pair.boot(self.manner.spec());
        move_so(&pair.a, &pair.b, self.manner);
        pair.beats.assert_one_at_a_time();
    }
}

/// The guest was lost, and the report says why in one line.
///
/// # Panics
/// If it is otherwise.
#[track_caller]
pub fn assert_lost(report: &Report) {
    assert_eq!(report.outcome.as_deref(), Some("guest-lost"), "{report:?}");
    let reason = report.reason.as_deref().expect("a loss has a reason");
    assert!(!reason.is_empty() && !reason.contains('\n'), "{reason:?}");
}

/// The guest is listed as ended, and how; the operator takes note and removes it.
///
/// # Panics
/// If it is otherwise.
#[track_caller]
pub fn remove_ended(daemon: &Daemon) -> VmInfo {
    let vm = wait::until("the guest is listed as ended", || {
        let vm = daemon.client().vm(VM).ok()?;
        (vm.state == VmState::Ended && vm.pid == 0).then_some(vm)
    });
    assert!(
        vm.ended.as_ref().is_some_and(|how| !how.is_empty()),
        "{vm:?}"
    );
    daemon
        .client()
        .stop(VM, false)
        .expect("an ended VM can be removed");
    vm
}

/// Kills the daemon and, in the next instant, the VM process: in the other order the daemon might live to
/// see it and to tidy up.
///
/// # Panics
/// If there is none.
#[track_caller]
pub fn kill_host(daemon: &mut Daemon) {
    let pid = daemon.client().vm(VM).expect("it is listed").pid;
    assert_ne!(pid, 0, "a VM that runs");
    daemon.kill();
    process::kill(pid);
}

/// Kills the VM process of the guest.
///
/// # Panics
/// If there is none.
#[track_caller]
pub fn kill_vm(daemon: &Daemon) {
    let vm = daemon.client().vm(VM).expect("it is listed");
    assert_ne!(vm.pid, 0, "{vm:?}");
    process::kill(vm.pid);
}
