//! The life of a program on one vCPU: prepare, work step by step, sweep when told, finish.

use core::fmt;

use limosa_micro_abi::port::{EXIT_ERRORS_SEEN, EXIT_OK};
use limosa_micro_abi::{BootInfo, Command, CommandKind, State};
use limosa_micro_logic::arguments::{BadArgument, LifeArguments};
use limosa_micro_logic::layout::TooSmall;
use limosa_micro_logic::stall;

use crate::command_board;
use crate::console::refuse;
use crate::port;
use crate::vcpu::Vcpu;

/// Something that a micro guest does.
pub trait Program: Sized {
    /// Reads the arguments and fills memory; looks at the clock all the while.
    ///
    /// # Errors
    /// If what the arguments ask cannot be done.
    fn prepare<'a>(
        vcpu: &mut Vcpu,
        boot: &'a BootInfo,
        arguments: &'a str,
    ) -> Result<Self, Refusal<'a>>;

    /// Does one operation if one is due, and says whether it did.
    fn step(&mut self, vcpu: &mut Vcpu, now: u64) -> bool;

    /// Nothing was due at `now`: rests until the next beat, or as long as the program knows better.
    fn rest(&mut self, vcpu: &mut Vcpu, now: u64) {
        vcpu.rest(now);
    }

    /// Checks all memory of this vCPU once, noting what is wrong; looks at the clock all the
    /// while.
    fn sweep(&mut self, vcpu: &mut Vcpu) -> Swept;
}

/// What a sweep did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Swept {
    pages: u64,
    errors: u64,
}

/// Whether a check found everything as it has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sound {
    /// It did.
    Yes,
    /// It did not, and the report says so.
    No,
}

impl Swept {
    /// Counts one check of so many pages.
    #[inline]
    pub fn count(&mut self, pages: u64, sound: Sound) {
        self.pages += pages;
        self.errors += u64::from(sound == Sound::No);
    }
}

/// Why a program cannot run.
#[derive(Clone, Copy, Debug)]
pub enum Refusal<'a> {
    /// An argument cannot be used.
    Argument(BadArgument<'a>),
    /// The guest has too little memory.
    Memory(TooSmall),
    /// There is less to share than there are vCPUs.
    Vcpus,
    /// The machine is not one on which it can run: why.
    Needs(&'static str),
}

impl fmt::Display for Refusal<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Argument(argument) => argument.fmt(f),
            Self::Memory(memory) => memory.fmt(f),
            Self::Vcpus => f.write_str("bad argument 'ws': less than one unit for each vCPU"),
            Self::Needs(what) => f.write_str(what),
        }
    }
}

impl<'a> From<BadArgument<'a>> for Refusal<'a> {
    fn from(argument: BadArgument<'a>) -> Self {
        Self::Argument(argument)
    }
}

impl From<TooSmall> for Refusal<'_> {
    fn from(memory: TooSmall) -> Self {
        Self::Memory(memory)
    }
}

/// Runs a program to its end.
pub(crate) fn run<P: Program>(mut vcpu: Vcpu, boot: &BootInfo) -> ! {
    let arguments = boot.arguments().unwrap_or_else(|| {
        refuse(format_args!("bad argument: the text is not UTF-8"));
    });
    match LifeArguments::parse(arguments) {
        Ok(life) => vcpu.heed(life),
        Err(argument) => refuse(format_args!("{argument}")),
    }
    vcpu.publish();
    let mut program = P::prepare(&mut vcpu, boot, arguments).unwrap_or_else(|refusal| {
        // Every vCPU comes to the same result; one of them says it.
        vcpu.set_state(State::Failed);
        if vcpu.index != 0 {
            sleep_for_ever();
        }
        refuse(format_args!("{refusal}"))
    });
    vcpu.set_state(State::Ready);
    loop {
        let now = vcpu.look();
        if let Some(command) = vcpu.listener.next() {
            obey(&mut program, &mut vcpu, command);
        }
        if !program.step(&mut vcpu, now) {
            program.rest(&mut vcpu, now);
        }
    }
}

#[cold]
fn obey<P: Program>(program: &mut P, vcpu: &mut Vcpu, command: Command) {
    match command.kind {
        CommandKind::None => {}
        CommandKind::Sweep => {
            let swept = program.sweep(vcpu);
            vcpu.report.sweep_pages = swept.pages;
            vcpu.report.sweep_errors = swept.errors;
            vcpu.report.sweep_id = u64::from(command.sequence);
        }
        CommandKind::ClearStalls => stall::clear(&mut vcpu.report),
        CommandKind::Finish => finish(vcpu, command),
    }
    vcpu.report.command_done = u64::from(command.sequence);
    vcpu.publish();
}

/// The first vCPU ends the machine when all the others have come to rest.
fn finish(vcpu: &mut Vcpu, command: Command) -> ! {
    vcpu.report.command_done = u64::from(command.sequence);
    vcpu.set_state(State::Done);
    command_board::finish(vcpu.report.errors);
    if vcpu.index != 0 {
        sleep_for_ever();
    }
    while command_board::finished() < vcpu.count {
        let now = vcpu.look();
        vcpu.rest(now);
    }
    port::exit(if command_board::errors_seen() {
        EXIT_ERRORS_SEEN
    } else {
        EXIT_OK
    })
}

fn sleep_for_ever() -> ! {
    loop {
        port::wait(1_000_000);
    }
}
