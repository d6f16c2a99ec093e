//! Migrations away whose VM process died with the daemon: the guest's memory is gone, and the target
//! has to be told.

use super::Host;
use crate::departures::Departure;
use crate::state_dir::VmName;
use limosa_carrier::{Credentials, tell_memory_lost};
use limosa_engine::handover::{MigrationId, Resolution};
use limosa_engine::source::RESOLVE_BACKOFF;
use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use std::thread;

impl Host {
    /// Goes through the departures that an earlier daemon left, once all VM processes that are still
    /// there have been found. Those of `silent` are there and do not answer.
    ///
    /// # Errors
    /// The notes cannot be read.
    pub(super) fn take_up_departures(&self, silent: &BTreeSet<VmName>) -> std::io::Result<()> {
        for (id, mut departure) in self.departures.all()? {
            let is_taken_up = self.migrations_lock().running(id).is_ok();
            let Ok(name) = VmName::new(&departure.vm) else {
                self.departures.forget(id);
                continue;
            };
            if is_taken_up || silent.contains(&name) {
                continue;
            }
            if !departure.is_bereft && self.registry().get(&name).is_ok() {
                // It came to no commit, or was over: the guest runs here.
                self.departures.forget(id);
                continue;
            }
            departure.is_bereft = true;
            self.departures.note(id, &departure)?;
            self.tell_of_loss(name, id, departure);
        }
        Ok(())
    }

    /// The operator does not want to know any more what became of the guests that had this name.
    pub(super) fn give_up_asking(&self, name: &VmName) {
        for (id, departure) in self.departures.all().unwrap_or_default() {
            if departure.is_bereft && departure.vm == name.as_str() {
                self.departures.forget(id);
            }
        }
    }

    /// Lists the guest as ended and has the target told, for as long as it takes.
    fn tell_of_loss(&self, name: VmName, id: MigrationId, departure: Departure) {
        let to = departure.to;
        let asking = format!(
            "its process ended while it was leaving for {to}, which has not said yet what became of \
             it; 'limosa stop {name}' gives up asking"
        );
        tracing::warn!(migration_id = %id, vm = %name, to, "a guest that was leaving is not here any more");
        self.registry()
            .list_ended(&name, departure.shape, asking.clone());
        let (host, credentials) = (self.me.clone(), self.credentials.clone());
        let tell = move || {
            let Some(resolution) = tell_until_known(&host, credentials, id, &to) else {
                return;
            };
            let Some(host) = host.upgrade() else { return };
            host.departures.forget(id);
            tracing::info!(migration_id = %id, vm = %name, ?resolution, "what became of a guest that was leaving");
            let became = match resolution {
                Resolution::Runs => None,
                Resolution::Needs | Resolution::Gone => Some(format!(
                    "its process ended before all its pages were at {to}: the guest is lost"
                )),
                Resolution::Barred => Some(format!(
                    "its process ended while it was leaving for {to}, where it never ran"
                )),
            };
            host.registry().end_otherwise(&name, &asking, became);
        };
        if let Err(error) = thread::Builder::new().name("bereft".to_owned()).spawn(tell) {
            tracing::error!(migration_id = %id, %error, "no thread to tell the target of a loss");
        }
    }
}

/// Tells the target until it says that nothing is open any more. `None` if nobody wants to know
/// it.
fn tell_until_known(
    host: &Weak<Host>,
    credentials: Option<Arc<Credentials>>,
    id: MigrationId,
    to: &str,
) -> Option<Resolution> {
    let reason = "its process at the source has ended, and the missing pages are lost with it";
    let (mut backoff, longest) = RESOLVE_BACKOFF;
    loop {
        host.upgrade()?.departures.look_up(id)?;
        match tell_memory_lost(to, credentials.clone(), id, reason) {
            Ok(Resolution::Needs) => {}
            Ok(resolution) => return Some(resolution),
            Err(reason) if backoff < longest => {
                tracing::info!(migration_id = %id, reason, "the target has not said yet what became of the guest");
            }
            Err(_) => {}
        }
        thread::sleep(backoff);
        backoff = (backoff * 2).min(longest);
    }
}
