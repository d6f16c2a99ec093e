//! The life of a daemon: take the state directory, find what an earlier one left, serve, wind down.
//!
//! A stop never takes a virtual machine along and never leaves a migration half done: those that
//! can still be aborted are, the others are waited for. A second signal ends at once; what is then
//! unresolved heals when a daemon is started here again.

use crate::arrivals::Arrivals;
use crate::host::Host;
use crate::http;
use crate::ledger::Ledger;
use crate::machine::process::Processes;
pub use crate::machine::process::lent::Lent;
use crate::state_dir::StateDir;
use anyhow::{Context, Result, bail};
use limosa_carrier::{Credentials, Listener};
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Where other hosts reach a daemon when nothing is said.
pub const LISTEN: &str = "127.0.0.1:7070";
/// Requests that are worked on at once; long polls are among them.
const REQUESTS_MAX: usize = 64;
/// How often the daemon looks after what nobody asks about.
const LOOK_AROUND_EVERY: Duration = Duration::from_millis(500);
/// How long a stop waits for migrations: an abort takes milliseconds, a handover seconds.
const WIND_DOWN_MAX: Duration = Duration::from_secs(20);

/// What a daemon is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its state directory.
    pub state_dir: PathBuf,
    /// Where other hosts reach it.
    pub listen: SocketAddr,
    /// Directory of the certificates and the key with which every connection is encrypted.
    pub tls: Option<PathBuf>,
    /// Listen beyond the loopback although nothing is encrypted.
    pub insecure: bool,
    /// What guests that arrive may use of this host.
    pub lent: Lent,
}

/// Runs a daemon until it is told to stop.
///
/// # Errors
/// One line: another daemon is there, an address is taken or not allowed, a certificate is broken.
pub fn serve(options: &Options) -> Result<()> {
    // What one guest needed is not kept for the next.
    limosa_os::process::return_freed_blocks();
    tell_what_is_not_there(&options.lent);
    let credentials = credentials(options)?;
    let state = StateDir::open(&options.state_dir)?;
    let socket = state.host_socket();
    let ledger = Ledger::open(&state.ledger())?;
    let processes = Processes::new(state.root(), options.lent.clone());
    let root = state.root().display().to_string();
    let host = Host::new(state, Box::new(processes), ledger, credentials.clone());
    host.adopt_all()?;
    let arrivals = Arc::new(Arrivals(Arc::clone(&host)));
    let peers = Listener::bind(options.listen, arrivals, credentials).with_context(|| {
        format!(
            "cannot listen on {} for other hosts (--listen gives another address)",
            options.listen
        )
    })?;
    let address = peers.local_addr();
    host.listens(peers);

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(REQUESTS_MAX)
        .thread_keep_alive(Duration::from_secs(1))
        .build()
        .context("cannot start the runtime of the control interface")?;
    let is_over = Arc::new(AtomicBool::new(false));
    let watcher = look_around(&host, &is_over)?;
    let served = runtime.block_on(async {
        let control = listen_privately(&socket)?;
        let signals = Signals::catch()?;
        let vms = host.vms().len();
        let hosts = if options.tls.is_some() {
            "hosts with certificates"
        } else {
            "hosts"
        };
        eprintln!(
            "limosa host {} listens for {hosts} on {address} and for commands on {} ({vms} VMs)",
            env!("CARGO_PKG_VERSION"),
            socket.display()
        );
        let router = http::router(Arc::clone(&host));
        tokio::select! {
            served = axum::serve(control, router) => served.context("the control interface broke"),
            stopped = stop(&host, signals) => stopped,
        }
    });
    is_over.store(true, Ordering::SeqCst);
    if watcher.join().is_err() {
        tracing::error!("the thread that looks around has failed");
    }
    if let Err(error) = fs::remove_file(&socket) {
        tracing::debug!(%error, "the control socket was gone");
    }
    runtime.shutdown_background();
    let vms = host.registry().alive_count();
    if vms > 0 {
        let run_on = if vms == 1 {
            "1 VM runs on".to_owned()
        } else {
            format!("{vms} VMs run on")
        };
        eprintln!("{run_on} without a daemon: 'limosa host --state-dir {root}' finds them again");
    }
    served
}

/// What is lent may come later, and may be a slip of the pen.
fn tell_what_is_not_there(lent: &Lent) {
    for disk in lent.disks.iter().filter(|disk| !disk.exists()) {
        eprintln!(
            "{} is lent and not there: nothing arrives with it until it is",
            disk.display()
        );
    }
}

/// How other hosts are met: on a network with certificates, or at the operator's word.
fn credentials(options: &Options) -> Result<Option<Arc<Credentials>>> {
    let is_safe = options.listen.ip().is_loopback() || options.tls.is_some();
    if !is_safe && !options.insecure {
        bail!(
            "{} can be reached from other machines and connections would not be encrypted: give \
             --tls DIR ('limosa cert' makes what is in it), or use --insecure if the network is \
             trusted",
            options.listen
        );
    }
    let credentials = options.tls.as_deref().map(Credentials::load);
    Ok(credentials.transpose()?.map(Arc::new))
}

/// What tells a daemon to end.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// From now on they do not end the program.
    fn catch() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for one.
    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Waits for a signal, then ends what can be ended; a second signal cuts it short. Questions are answered
/// meanwhile.
async fn stop(host: &Arc<Host>, mut signals: Signals) -> Result<()> {
    signals.next().await;
    tracing::info!("asked to stop");
    let under_way = host.under_way();
    if under_way > 0 {
        eprintln!(
            "asked to stop, with migrations under way ({under_way}): they are aborted where that is \
             possible, the others are waited for, at most {} s; a second signal ends at once",
            WIND_DOWN_MAX.as_secs()
        );
    }
    let worker = Arc::clone(host);
    let ending = tokio::task::spawn_blocking(move || worker.wind_down(WIND_DOWN_MAX));
    let left = tokio::select! {
        left = ending => left.context("winding down failed")?,
        () = signals.next() => 1,
    };
    if left > 0 {
        eprintln!(
            "migrations were under way: they are resolved when a daemon is started here again, and \
             guests that miss pages stand still until then"
        );
    }
    Ok(())
}

/// A listener that nobody else may connect to. The lock on the state directory is ours, so a socket
/// that is there is a dead daemon's.
fn listen_privately(socket: &std::path::Path) -> Result<UnixListener> {
    match fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot replace {}", socket.display()));
        }
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(socket)
        .with_context(|| format!("cannot listen on {}", socket.display()))?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

fn look_around(host: &Arc<Host>, is_over: &Arc<AtomicBool>) -> Result<thread::JoinHandle<()>> {
    let (host, is_over) = (Arc::clone(host), Arc::clone(is_over));
    thread::Builder::new()
        .name("look-around".to_owned())
        .spawn(move || {
            while !is_over.load(Ordering::SeqCst) {
                host.look_around();
                thread::sleep(LOOK_AROUND_EVERY);
            }
        })
        .context("no thread to look around")
}
