//! Departures: migrations away that are not over, remembered beyond the life of daemon and VM
//! process.
//!
//! Who may run the guest is recorded in its VM process. If that is killed together with the daemon,
//! the target may run a guest that misses pages which are nowhere any more, and nobody would tell it;
//! and of a guest that had not moved yet, nobody would say that it has ended. So each migration is
//! noted in a file of its own before it begins, and the file goes when it is over. A restarted daemon
//! also finds there by which technique to go on.
//!
//! No `fsync`: a crash of the whole host may take the note along, and leaves a target that waits for
//! a source until its operator decides.

use crate::machine::Shape;
use crate::notes::Notes;
use crate::state_dir::VmName;
use limosa_carrier::{Compression, Credentials, Demanded, MigrateRequest, PushOrder, RATE_MIN};
use limosa_engine::handover::MigrationId;
use limosa_engine::policy::{Limits, Mode};
use limosa_pages::BytesPerSecond;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// A migration away, as far as it matters when all else about it is gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Departure {
    /// Name of the virtual machine.
    pub vm: String,
    /// What it is.
    pub shape: Shape,
    /// The target daemon's peer address.
    pub to: String,
    /// The technique.
    pub mode: Mode,
    /// What is allowed.
    pub limits: Limits,
    /// Rate of an emulated link, in bytes a second.
    pub link: Option<BytesPerSecond>,
    /// The guest's disks go along.
    #[serde(default)]
    pub copy_disks: bool,
    /// The VM process is gone and with it the guest's memory: the target has to be told.
    pub is_bereft: bool,
}

impl Departure {
    /// Of a virtual machine that `request` moves away.
    pub fn new(vm: &VmName, shape: Shape, request: &MigrateRequest) -> Self {
        Self {
            vm: vm.to_string(),
            shape,
            to: request.peer.clone(),
            mode: request.mode,
            limits: request.limits,
            link: request.link,
            copy_disks: request.copy_disks,
            is_bereft: false,
        }
    }

    /// What a restarted daemon asks for to take it up again.
    pub fn request(
        &self,
        id: MigrationId,
        credentials: Option<Arc<Credentials>>,
    ) -> MigrateRequest {
        let possible = |rate: &BytesPerSecond| *rate >= RATE_MIN;
        let mut limits = self.limits;
        limits.bandwidth_max = limits.bandwidth_max.filter(possible);
        MigrateRequest {
            id,
            peer: self.to.clone(),
            mode: self.mode,
            limits,
            streams: limits.streams.connections(),
            verify: false,
            copy_disks: self.copy_disks,
            link: self.link.filter(possible),
            compression: Compression::Auto,
            push_order: PushOrder::default(),
            demanded: Demanded::default(),
            credentials,
        }
    }
}

/// The notes of one host.
#[derive(Debug)]
pub struct Departures(Notes<Departure>);

impl Departures {
    /// In the directory `dir`, which is there.
    pub fn new(dir: PathBuf) -> Self {
        Self(Notes::new(dir, "a departure"))
    }

    /// Notes a departure, or what has changed about it.
    ///
    /// # Errors
    /// The file cannot be written; what was noted before stays.
    pub fn note(&self, id: MigrationId, departure: &Departure) -> io::Result<()> {
        self.0.write(id, departure)
    }

    /// What is noted of an attempt.
    pub fn look_up(&self, id: MigrationId) -> Option<Departure> {
        self.0.look_up(id)
    }

    /// The attempt is over.
    pub fn forget(&self, id: MigrationId) {
        self.0.forget(id);
    }

    /// All that are noted.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn all(&self) -> io::Result<Vec<(MigrationId, Departure)>> {
        let ids = self.0.ids()?.into_iter();
        Ok(ids.filter_map(|id| Some((id, self.look_up(id)?))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn departure() -> Departure {
        Departure {
            vm: "web".to_owned(),
            shape: Shape {
                memory_bytes: 1 << 30,
                vcpus: 2,
                huge_pages: false,
                dirty_tracker: limosa_os::dirty::TrackerKind::Ring,
                cpu: limosa_vmm::cpu::CpuModel::V3,
            },
            to: "127.0.0.1:1".to_owned(),
            mode: Mode::Demand,
            limits: Limits::default(),
            link: None,
            copy_disks: true,
            is_bereft: false,
        }
    }

    #[test]
    fn what_is_noted_is_found_until_it_is_over() {
        let dir = tempfile::tempdir().unwrap();
        let departures = Departures::new(dir.path().to_owned());
        let [one, two] = [1, 2].map(MigrationId);
        departures.note(two, &departure()).unwrap();
        departures.note(one, &departure()).unwrap();
        let drained = Departure {
            mode: Mode::PostCopy,
            ..departure()
        };
        departures.note(one, &drained).unwrap();
        // Neither of them is a note.
        fs::write(dir.path().join("notes.json"), "{}").unwrap();
        fs::write(dir.path().join(format!("{}.json", MigrationId(3))), "{}").unwrap();
        let expect = [(one, drained), (two, departure())];
        assert_eq!(departures.all().unwrap(), expect);
        departures.forget(one);
        departures.forget(one);
        assert_eq!(departures.look_up(one), None);
        assert_eq!(departures.look_up(two), Some(departure()));
    }

    #[test]
    fn a_note_asks_for_nothing_that_an_operator_could_not() {
        let rate = Some(BytesPerSecond::new(1));
        let damaged = Departure {
            limits: Limits {
                bandwidth_max: rate,
                ..Limits::default()
            },
            link: rate,
            ..departure()
        };
        let request = damaged.request(MigrationId(1), None);
        assert_eq!(request.link, None);
        assert_eq!(request.limits.bandwidth_max, None);
    }
}
