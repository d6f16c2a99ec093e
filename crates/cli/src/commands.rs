//! The commands: each asks the daemon, or does its work itself, and prints.

mod machines;
mod migrations;
mod preflight;

#[cfg(test)]
pub(crate) use migrations::tests;

use crate::arguments::{Arguments, Command, Host, Replay};
use crate::follow::Follower;
use crate::output::{Output, count, print};
use crate::{cert, console, demo, lab};
use anyhow::{Context, Result};
use clap::CommandFactory;
use limosa_host::client::Client;
use limosa_host::{daemon, state_dir};
use serde::Serialize;
use std::path::PathBuf;

/// Does what was asked for.
pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let place = Place {
        state_dir: arguments.state_dir,
        host_socket: arguments.host_socket,
    };
    let json_first = arguments.json;
    let output = |json: bool| Output {
        json: json || json_first,
    };
    match arguments.command {
        Command::Host(host) => serve(&host, &place),
        Command::Run(run) => machines::run(&place.client()?, &run, output(run.format.json)),
        Command::List(format) => machines::list(&place.client()?, output(format.json)),
        Command::Inspect(named) => {
            machines::inspect(&place.client()?, &named.vm, output(named.format.json))
        }
        Command::Console { vm, line } => console::show(&place.client()?.vm(&vm)?, line),
        Command::Stop(stop) => machines::stop(&place.client()?, &stop, output(stop.format.json)),
        Command::Migrate(migrate) => {
            let follower = Follower::new(place.client()?, output(migrate.format.json))?;
            migrations::migrate(&follower, &migrate)
        }
        Command::Status(status) => {
            let follower = Follower::new(place.client()?, output(status.format.json))?;
            migrations::status(&follower, &status)
        }
        Command::Set(set) => migrations::set(&place.client()?, &set, output(set.format.json)),
        Command::Drain(drain) => {
            let follower = Follower::new(place.client()?, output(drain.format.json))?;
            migrations::drain(&follower, &drain.which)
        }
        Command::Resolve(resolve) => {
            migrations::resolve(&place.client()?, &resolve, output(resolve.format.json))
        }
        Command::Abort(which) => {
            migrations::abort(&place.client()?, &which.which, output(which.format.json))
        }
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Lab(arguments) => lab::run(&arguments, output),
        Command::Cert(arguments) => cert::run(&arguments, output),
        Command::Replay(arguments) => replay(&arguments, output(arguments.format.json)),
        Command::Openapi => print(&serde_json::to_string_pretty(&limosa_host::openapi())?),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "limosa", &mut script);
            print(&String::from_utf8(script)?)
        }
        Command::Vm(vm) => limosa_host::serve_vm(&limosa_host::ServeOptions {
            socket: vm.socket,
            host_tag: vm.host_tag,
            ledger: vm.ledger,
            daemon: vm.daemon,
        }),
    }
}

/// Where the daemon is, as far as it was said.
struct Place {
    state_dir: Option<PathBuf>,
    host_socket: Option<PathBuf>,
}

impl Place {
    fn state_dir(&self) -> Result<PathBuf> {
        self.state_dir
            .clone()
            .map_or_else(state_dir::default_state_dir, Ok)
    }

    fn client(&self) -> Result<Client> {
        let socket = match &self.host_socket {
            Some(socket) => socket.clone(),
            None => state_dir::host_socket(&self.state_dir()?),
        };
        Ok(Client::new(socket))
    }
}

fn serve(host: &Host, place: &Place) -> Result<()> {
    daemon::serve(&daemon::Options {
        state_dir: place.state_dir()?,
        listen: host.listen,
        tls: host.tls.clone(),
        insecure: host.insecure,
        lent: daemon::Lent {
            disks: host.lend_disk.clone(),
            taps: host.lend_tap.clone(),
        },
    })
}

/// What a replay found.
#[derive(Serialize)]
struct Replayed {
    /// Steps that gave the same actions.
    steps: usize,
}

fn replay(arguments: &Replay, output: Output) -> Result<()> {
    let journal = &arguments.journal;
    let steps = limosa_host::replay_journal(journal)
        .with_context(|| format!("{} does not replay", journal.display()))?;
    output.answer(&Replayed { steps }, |replayed| {
        format!(
            "all {} steps give the same actions",
            count(replayed.steps as u64)
        )
    })
}
