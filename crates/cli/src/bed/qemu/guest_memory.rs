//! The guest's memory seen from outside: its report is read and its command word written through the
//! address space of the QEMU that runs it, which does not notice.
//!
//! QEMU keeps its memory as it usually does, so there is no file of it that could be mapped. What is
//! written here is seen by no dirty log: a command is given only while no move is under way.

use anyhow::{Context, ensure};
use limosa_micro_abi::{Command, Report, memory_map};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

/// The memory of the guest of one QEMU.
#[derive(Debug)]
pub(crate) struct GuestMemory {
    file: File,
    /// Where the byte at the guest's address 0 is in that process.
    start: u64,
}

impl GuestMemory {
    /// Of the process `pid`, whose guest's memory begins at `start` there.
    pub(crate) fn open(pid: u32, start: u64) -> anyhow::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .context("QEMU's memory cannot be opened")?;
        Ok(Self { file, start })
    }

    /// Another way to the same memory, for another thread.
    pub(crate) fn try_clone(&self) -> anyhow::Result<Self> {
        let file = self.file.try_clone().context("a file cannot be shared")?;
        Ok(Self { file, ..*self })
    }

    /// What the guest says about itself; `None` if it has not begun or its page is not there.
    pub(crate) fn report(&self) -> Option<Report> {
        let mut bytes = [0; size_of::<Report>()];
        let address = self.start + memory_map::report_address(0);
        self.file.read_exact_at(&mut bytes, address).ok()?;
        Report::parse(&bytes)
    }

    /// Puts a command where the guest looks for it.
    pub(crate) fn command(&self, command: Command) -> anyhow::Result<()> {
        let word = command.to_word().to_le_bytes();
        let address = self.start + memory_map::COMMAND_WORD;
        let written = self.file.write_at(&word, address);
        let written = written.context("QEMU's memory cannot be written")?;
        ensure!(written == word.len(), "QEMU's memory was written in part");
        Ok(())
    }

    /// Changes a byte behind the guest's back.
    #[cfg(test)]
    pub(crate) fn spoil(&self, address: u64) {
        let mut byte = [0];
        self.file
            .read_exact_at(&mut byte, self.start + address)
            .unwrap();
        byte[0] ^= 1;
        self.file.write_all_at(&byte, self.start + address).unwrap();
    }
}

/// The address in an answer of the monitor command `gpa2hva`.
pub(crate) fn host_address(answer: &str) -> Option<u64> {
    let (_, address) = answer.trim().rsplit_once(" is 0x")?;
    u64::from_str_radix(address, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_from_what_the_monitor_says() {
        let check = |answer: &str, expect| assert_eq!(host_address(answer), expect, "{answer}");
        check(
            "Host virtual address for 0x0 (microvm.ram) is 0x7f6337a00000\r\n",
            Some(0x7f63_37a0_0000),
        );
        check("No memory is mapped at address 0xc0000000\r\n", None);
        check("", None);
    }
}
