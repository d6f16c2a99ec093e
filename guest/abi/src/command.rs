//! Commands that the monitor gives in answer to a heartbeat.
//!
//! A word holds a kind and a sequence number. The monitor repeats the current word in every
//! answer; the guest acts once on each sequence number that differs from the last one it saw,
//! and then shows that number in [`Report::command_done`](crate::Report::command_done).

/// What the guest shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommandKind {
    /// Nothing.
    None,
    /// Check all memory that the guest owns once.
    Sweep,
    /// Forget the longest stalls.
    ClearStalls,
    /// Stop working and leave by the exit port.
    Finish,
}

/// A command with its sequence number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// What to do.
    pub kind: CommandKind,
    /// Which command this is; 24 bits, the rest is cut off.
    pub sequence: u32,
}

/// Sequence numbers are counted modulo this plus one.
pub const SEQUENCE_MASK: u32 = 0x00ff_ffff;

impl Command {
    /// No command.
    pub const NONE: Self = Self {
        kind: CommandKind::None,
        sequence: 0,
    };

    /// The word that answers a heartbeat.
    #[must_use]
    pub const fn to_word(self) -> u32 {
        let kind = match self.kind {
            CommandKind::None => 0,
            CommandKind::Sweep => 1,
            CommandKind::ClearStalls => 2,
            CommandKind::Finish => 3,
        };
        kind | (self.sequence & SEQUENCE_MASK) << 8
    }

    /// The command of a word; a kind that is not known counts as none, so that a newer monitor
    /// does not break an older guest.
    #[must_use]
    pub const fn from_word(word: u32) -> Self {
        let kind = match word & 0xff {
            1 => CommandKind::Sweep,
            2 => CommandKind::ClearStalls,
            3 => CommandKind::Finish,
            _ => CommandKind::None,
        };
        Self {
            kind,
            sequence: word >> 8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_round_trip() {
        for kind in [
            CommandKind::None,
            CommandKind::Sweep,
            CommandKind::ClearStalls,
            CommandKind::Finish,
        ] {
            for sequence in [0, 1, 77, SEQUENCE_MASK] {
                let command = Command { kind, sequence };
                assert_eq!(Command::from_word(command.to_word()), command);
            }
        }
        assert_eq!(Command::from_word(0x0000_05ff).kind, CommandKind::None);
    }
}
