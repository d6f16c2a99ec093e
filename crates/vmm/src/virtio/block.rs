//! A disk (virtio 1.2, section 5.2).
//!
//! A request is carried out before the next one is looked at, through a buffer of its own: what the
//! guest reads reaches its memory by the view that notes writes. So none is in flight while the guest
//! rests, and none is done twice.
//!
//! While the guest rests its disk is flushed; a guest that leaves gives up its lock, for whoever runs it
//! next.

use super::DeviceError;
use super::device::{Device, Ring, Served};
use limosa_os::disk::{Disk, DiskBuffer, SECTOR_BYTES};
use std::io::{self, Read, Write};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::Error as QueueError;
use vm_memory::bitmap::BitmapSlice;

const QUEUE_SIZE: u16 = 128;
/// Most pieces of memory in a request: all of the queue but what frames it.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Most bytes in a piece, so that no request takes long: a pause waits for it.
const SEGMENT_BYTES_MAX: u32 = 64 << 10;
const REQUEST_BYTES_MAX: u64 = SEGMENTS_MAX as u64 * SEGMENT_BYTES_MAX as u64;
/// What is read or written by one call.
const BUFFER_BYTES: usize = 256 << 10;
/// Most sectors in one discarded range, and most such ranges in a request.
const DISCARDED_SECTORS_MAX: u32 = 1 << 18;
const DISCARDED_RANGES_MAX: u32 = 16;
/// The same for zeroed ones, which may have to be written.
const ZEROED_SECTORS_MAX: u32 = 8 << 11;
const ZEROED_RANGES_MAX: u32 = 1;
/// Of a range to be zeroed: its room may be given back.
const UNMAP: u32 = 1;

/// A disk as the guest has it.
#[derive(Debug)]
pub(super) struct Block {
    disk: Disk,
    /// What it tells of itself, and where it lies.
    serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
    path: String,
    buffer: DiskBuffer,
}

/// Why a request is not done.
#[derive(Debug)]
enum Failure {
    Unsupported,
    Io(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

type Reader<'a, B> = virtio_queue::Reader<'a, B>;
type Writer<'a, B> = virtio_queue::Writer<'a, B>;

impl Block {
    /// The disk that is at `path`.
    pub(super) fn new(disk: Disk, path: &str) -> Self {
        let mut serial = [0; VIRTIO_BLK_ID_BYTES as usize];
        let name = path.rsplit('/').next().unwrap_or_default();
        for (place, byte) in serial.iter_mut().zip(name.bytes()) {
            *place = byte;
        }
        Self {
            disk,
            serial,
            path: path.to_owned(),
            buffer: DiskBuffer::new(BUFFER_BYTES),
        }
    }

    fn carry_out<B: BitmapSlice>(
        &mut self,
        from: &mut Reader<'_, B>,
        into: &mut Writer<'_, B>,
    ) -> Result<(), Failure> {
        let mut header = [0; 16];
        from.read_exact(&mut header)?;
        let [kind, _, low, high] = words(header);
        let sector = u64::from(high) << 32 | u64::from(low);
        match kind {
            VIRTIO_BLK_T_IN => {
                let offset = self.place(sector, into.available_bytes())?;
                Ok(self.read(offset, into)?)
            }
            VIRTIO_BLK_T_FLUSH => Ok(self.disk.flush()?),
            VIRTIO_BLK_T_GET_ID => {
                let len = into.available_bytes().min(self.serial.len());
                Ok(into.write_all(&self.serial[..len])?)
            }
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES
                if self.disk.is_read_only() =>
            {
                Err(io::Error::from(io::ErrorKind::ReadOnlyFilesystem).into())
            }
            VIRTIO_BLK_T_OUT => {
                let offset = self.place(sector, from.available_bytes())?;
                Ok(self.write(offset, from)?)
            }
            VIRTIO_BLK_T_DISCARD => {
                let limits = (DISCARDED_RANGES_MAX, DISCARDED_SECTORS_MAX);
                self.each_range(from, limits, Self::discard)
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let limits = (ZEROED_RANGES_MAX, ZEROED_SECTORS_MAX);
                self.each_range(from, limits, Self::zero)
            }
            _ => Err(Failure::Unsupported),
        }
    }

    /// The same of what is read or written at once.
    fn place(&self, sector: u64, bytes: usize) -> Result<u64, Failure> {
        let bytes = bytes as u64;
        if bytes > REQUEST_BYTES_MAX {
            return Err(Failure::Unsupported);
        }
        Ok(self.within(sector, bytes)?)
    }

    /// Where these bytes begin on the disk, if they are on it.
    fn within(&self, sector: u64, bytes: u64) -> io::Result<u64> {
        let offset = sector.checked_mul(SECTOR_BYTES);
        let end = offset.and_then(|offset| offset.checked_add(bytes));
        match (offset, end) {
            (Some(offset), Some(end))
                if end <= self.disk.bytes() && bytes.is_multiple_of(SECTOR_BYTES) =>
            {
                Ok(offset)
            }
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{bytes} bytes from sector {sector} are not on the disk"),
            )),
        }
    }

    fn read<B: BitmapSlice>(
        &mut self,
        mut offset: u64,
        into: &mut Writer<'_, B>,
    ) -> io::Result<()> {
        loop {
            let len = into.available_bytes().min(BUFFER_BYTES);
            if len == 0 {
                return Ok(());
            }
            let bytes = &mut self.buffer.bytes_mut()[..len];
            self.disk.read_at(bytes, offset)?;
            into.write_all(bytes)?;
            offset += len as u64;
        }
    }

    fn write<B: BitmapSlice>(
        &mut self,
        mut offset: u64,
        from: &mut Reader<'_, B>,
    ) -> io::Result<()> {
        loop {
            let len = from.available_bytes().min(BUFFER_BYTES);
            if len == 0 {
                return Ok(());
            }
            let bytes = &mut self.buffer.bytes_mut()[..len];
            from.read_exact(bytes)?;
            self.disk.write_at(bytes, offset)?;
            offset += len as u64;
        }
    }

    /// Does something with each range that a request names: sector, number of sectors, flags.
    fn each_range<B: BitmapSlice>(
        &mut self,
        from: &mut Reader<'_, B>,
        (ranges_max, sectors_max): (u32, u32),
        mut act: impl FnMut(&mut Self, u64, u64, u32) -> io::Result<()>,
    ) -> Result<(), Failure> {
        for _ in 0..ranges_max {
            if from.available_bytes() == 0 {
                return Ok(());
            }
            let mut range = [0; 16];
            from.read_exact(&mut range)?;
            let [low, high, sectors, flags] = words(range);
            if sectors > sectors_max || flags & !UNMAP != 0 {
                return Err(Failure::Unsupported);
            }
            let bytes = u64::from(sectors) * SECTOR_BYTES;
            let offset = self.within(u64::from(high) << 32 | u64::from(low), bytes)?;
            if bytes > 0 {
                act(self, offset, bytes, flags)?;
            }
        }
        match from.available_bytes() {
            0 => Ok(()),
            _ => Err(Failure::Unsupported),
        }
    }

    /// Gives a range's room back. That is a wish: what was there may as well stay.
    fn discard(&mut self, offset: u64, bytes: u64, _flags: u32) -> io::Result<()> {
        match self.disk.punch(offset, bytes) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            other => other,
        }
    }

    /// Makes a range zeroes, by the fastest way that its file system has.
    fn zero(&mut self, offset: u64, bytes: u64, flags: u32) -> io::Result<()> {
        let fast = if flags & UNMAP != 0 {
            self.disk.punch(offset, bytes)
        } else {
            self.disk.zero(offset, bytes)
        };
        match fast {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
            other => return other,
        }
        let buffer = self.buffer.bytes_mut();
        buffer.fill(0);
        for done in (0..bytes).step_by(BUFFER_BYTES) {
            let len = usize::try_from(bytes - done).unwrap_or(BUFFER_BYTES);
            self.disk
                .write_at(&buffer[..len.min(BUFFER_BYTES)], offset + done)?;
        }
        Ok(())
    }

    fn cannot(&self, source: io::Error) -> DeviceError {
        DeviceError::Disk {
            path: self.path.clone(),
            source,
        }
    }
}

impl Device for Block {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let always =
            1 << VIRTIO_BLK_F_SIZE_MAX | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_FLUSH;
        if self.disk.is_read_only() {
            always | 1 << VIRTIO_BLK_F_RO
        } else {
            always | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    /// `struct virtio_blk_config`.
    fn configuration(&self) -> Vec<u8> {
        let mut bytes = vec![0; 60];
        let mut put = |at: usize, word: u32| bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
        put(8, SEGMENT_BYTES_MAX);
        put(12, SEGMENTS_MAX);
        // Discarded: sectors, ranges, alignment in sectors.
        put(36, DISCARDED_SECTORS_MAX);
        put(40, DISCARDED_RANGES_MAX);
        put(44, 8);
        // Zeroed: sectors, ranges, whether room is given back.
        put(48, ZEROED_SECTORS_MAX);
        put(52, ZEROED_RANGES_MAX);
        bytes[56] = 1;
        let sectors = self.disk.bytes() / SECTOR_BYTES;
        bytes[..8].copy_from_slice(&sectors.to_le_bytes());
        bytes
    }

    fn serve(&mut self, _queue: usize, ring: &mut Ring<'_>) -> Result<Served, QueueError> {
        let Some(chain) = ring.next()? else {
            return Ok(Served::RingEmpty);
        };
        let head = chain.head_index();
        let mut from = chain.clone().reader(ring.memory)?;
        let mut into = chain.writer(ring.memory)?;
        let Some(data_bytes) = into.available_bytes().checked_sub(1) else {
            // There is no place for an answer.
            ring.finish(head, 0)?;
            return Ok(Served::Request);
        };
        let mut answer = into.split_at(data_bytes)?;
        let status = match self.carry_out(&mut from, &mut into) {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(Failure::Unsupported) => VIRTIO_BLK_S_UNSUPP,
            Err(Failure::Io(error)) => {
                tracing::warn!(%error, disk = self.path, "a request of the guest failed");
                VIRTIO_BLK_S_IOERR
            }
        };
        let status = u8::try_from(status).expect("below three");
        answer
            .write_all(&[status])
            .map_err(|_| QueueError::InvalidChain)?;
        ring.finish(head, into.bytes_written() + 1)?;
        Ok(Served::Request)
    }

    fn claim(&mut self) -> Result<(), DeviceError> {
        self.disk.lock().map_err(|error| match error.kind() {
            io::ErrorKind::ResourceBusy => DeviceError::DiskBusy {
                path: self.path.clone(),
            },
            _ => self.cannot(error),
        })
    }

    fn release(&mut self) -> Result<(), DeviceError> {
        self.disk.unlock().map_err(|error| self.cannot(error))
    }

    fn rest(&mut self) -> Result<(), DeviceError> {
        if self.disk.is_read_only() {
            return Ok(());
        }
        self.disk.flush().map_err(|error| self.cannot(error))
    }

    fn save(&self) -> Vec<u8> {
        // The disk is the same one at both ends, and the buffer is empty between requests.
        let Self {
            disk: _,
            serial: _,
            path: _,
            buffer: _,
        } = self;
        Vec::new()
    }

    fn load(&mut self, bytes: &[u8]) -> Result<(), String> {
        match bytes {
            [] => Ok(()),
            _ => Err("a disk has no state of its own".to_owned()),
        }
    }
}

fn words(bytes: [u8; 16]) -> [u32; 4] {
    [0, 4, 8, 12]
        .map(|at| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]))
}
