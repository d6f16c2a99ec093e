//! A source of random numbers (virtio 1.2, section 5.4). Nothing of it moves: every host has its own.

use super::device::{Device, Ring, Served};
use std::fs::File;
use std::io::{self, Read, Write};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::Error as QueueError;

/// Most bytes for one request; a driver asks again for more.
const BYTES_MAX: usize = 4096;

/// The host's random numbers.
#[derive(Debug)]
pub(super) struct Entropy {
    source: File,
}

impl Entropy {
    pub(super) fn new() -> io::Result<Self> {
        let source = File::open("/dev/urandom")?;
        Ok(Self { source })
    }
}

impl Device for Entropy {
    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }

    fn configuration(&self) -> Vec<u8> {
        Vec::new()
    }

    fn serve(&mut self, _queue: usize, ring: &mut Ring<'_>) -> Result<Served, QueueError> {
        let Some(chain) = ring.next()? else {
            return Ok(Served::RingEmpty);
        };
        let head = chain.head_index();
        let mut place = chain.writer(ring.memory)?;
        let mut bytes = [0; BYTES_MAX];
        let wanted = place.available_bytes().min(BYTES_MAX);
        let filled = self.source.read_exact(&mut bytes[..wanted]);
        let written = filled.and_then(|()| place.write_all(&bytes[..wanted]));
        if let Err(error) = written {
            tracing::warn!(%error, "the guest gets no random numbers");
        }
        ring.finish(head, place.bytes_written())?;
        Ok(Served::Request)
    }

    fn save(&self) -> Vec<u8> {
        let Self { source: _ } = self;
        Vec::new()
    }

    fn load(&mut self, bytes: &[u8]) -> Result<(), String> {
        match bytes {
            [] => Ok(()),
            _ => Err("random numbers have no state".to_owned()),
        }
    }
}
