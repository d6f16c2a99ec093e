//! A console (virtio 1.2, section 5.3): one port, `hvc0` to Linux, beside the serial line of the board.
//!
//! What the guest prints goes where all consoles of guests go ([`crate::console`]). What is typed waits here
//! until the guest has a buffer for it, and moves with the device if it has none before it is moved.
//!
//! Deliberately absent: several ports, sizes, printing before there is a driver.

use super::device::{Device, Ring, Served};
use super::places::Places;
use crate::console::{Console, LOG_LINE_BYTES_MAX};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::io::Write;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_queue::Error as QueueError;

/// The queue of buffers for what is typed; the other one has what is printed.
const RECEIVE: usize = 0;
const QUEUE_SIZE: u16 = 64;
const PIECES_MAX: usize = QUEUE_SIZE as usize;
/// Most bytes that may be printed at once; Linux prints a page at most.
const PRINTED_BYTES_MAX: u64 = 1 << 20;
/// What of it is shown at once.
const PART_BYTES: usize = 4096;
/// What may wait for the guest to read it.
const TYPED_BYTES_MAX: usize = 4096;

/// The console's port.
#[derive(Debug)]
pub(super) struct Port {
    console: Console,
    typed: VecDeque<u8>,
}

/// What of it moves.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    typed: Vec<u8>,
    /// What the guest has begun to print as a line.
    line: Vec<u8>,
}

impl Port {
    pub(super) const fn new(console: Console) -> Self {
        Self {
            console,
            typed: VecDeque::new(),
        }
    }

    /// Hands what was typed to the guest, as much as its next buffer holds.
    fn hand_over(&mut self, ring: &mut Ring<'_>) -> Result<Served, QueueError> {
        if self.typed.is_empty() {
            return Ok(Served::NoInput);
        }
        let Some(chain) = ring.next()? else {
            return Ok(Served::RingEmpty);
        };
        let head = chain.head_index();
        let [_, mut into] = Places::of(chain, ring.memory, PIECES_MAX)?;
        let room = usize::try_from(into.bytes()).unwrap_or(usize::MAX);
        let count = room.min(self.typed.len());
        let bytes: Vec<u8> = self.typed.drain(..count).collect();
        let written = into.write(ring.memory, &bytes);
        written.map_err(|_| QueueError::InvalidChain)?;
        ring.finish(head, count)?;
        Ok(Served::Request)
    }

    /// Shows what the guest has printed.
    fn print(&mut self, ring: &mut Ring<'_>) -> Result<Served, QueueError> {
        let Some(chain) = ring.next()? else {
            return Ok(Served::RingEmpty);
        };
        let head = chain.head_index();
        let [mut from, _] = Places::of(chain, ring.memory, PIECES_MAX)?;
        if from.bytes() > PRINTED_BYTES_MAX {
            return Err(QueueError::InvalidChain);
        }
        let mut part = [0; PART_BYTES];
        while from.bytes() > 0 {
            let len = usize::try_from(from.bytes()).map_or(PART_BYTES, |left| left.min(PART_BYTES));
            let read = from.read(ring.memory, &mut part[..len]);
            read.map_err(|_| QueueError::InvalidChain)?;
            self.console
                .write_all(&part[..len])
                .expect("a console takes all");
        }
        ring.finish(head, 0)?;
        Ok(Served::Request)
    }
}

impl Device for Port {
    fn id(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE; 2]
    }

    /// `struct virtio_console_config`, all of which belongs to features that are not offered.
    fn configuration(&self) -> Vec<u8> {
        vec![0; 12]
    }

    fn reset(&mut self) {
        self.typed.clear();
    }

    fn serve(&mut self, queue: usize, ring: &mut Ring<'_>) -> Result<Served, QueueError> {
        match queue {
            RECEIVE => self.hand_over(ring),
            _ => self.print(ring),
        }
    }

    fn type_in(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(TYPED_BYTES_MAX - self.typed.len());
        self.typed.extend(&bytes[..count]);
        count
    }

    fn save(&self) -> Vec<u8> {
        let Self { console, typed } = self;
        let saved = Saved {
            typed: typed.iter().copied().collect(),
            line: console.line.clone(),
        };
        postcard::to_extend(&saved, Vec::new()).expect("a state can always be written")
    }

    fn load(&mut self, bytes: &[u8]) -> Result<(), String> {
        match postcard::take_from_bytes::<Saved>(bytes) {
            Ok((saved, []))
                if saved.typed.len() <= TYPED_BYTES_MAX
                    && saved.line.len() < LOG_LINE_BYTES_MAX =>
            {
                self.console.line = saved.line;
                self.typed = saved.typed.into();
                Ok(())
            }
            _ => Err("it is no console's".to_owned()),
        }
    }
}
