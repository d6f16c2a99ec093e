//! A disk (virtio 1.2, section 5.2).
//!
//! What the guest reads, writes and flushes is begun as it comes, as much as its queue holds, and answered
//! as it is completed, in whatever order that is; all else is carried out at once. Data goes through
//! buffers of the device: what the guest reads reaches its memory when it is there, by the view that
//! notes writes. A flush is begun after all that was answered before it, so that these are safe when it
//! is answered; what is under way beside it need not be.
//!
//! A guest that arrived before all of a copied disk did waits here for the pages that a request is about, with all
//! that it asks of this disk.
//!
//! While the guest rests nothing is under way, so none is lost and none is done twice, and its disk is
//! flushed; a guest that leaves gives up its lock, for whoever runs it next.

use super::DeviceError;
use super::device::{Device, Input, Ring, Served};
use super::places::Places;
use crate::allowance::Allowance;
use limosa_os::dirty::disks::DiskNotes;
use limosa_os::disk::missing::MissingPages;
use limosa_os::disk::{Action, Completed, Disk, DiskBuffer, DiskQueue, SECTOR_BYTES, Way};
use limosa_os::memory::GuestView;
use std::io;
use std::thread;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::Error as QueueError;
use vm_memory::{Bytes, GuestAddress};

const QUEUE_SIZE: u16 = 128;
/// Most pieces of memory in a request: all of the queue but what frames it.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Most pieces of memory of a request, with what frames it.
const PIECES_MAX: usize = QUEUE_SIZE as usize;
/// Most bytes in a piece, so that no request takes long: a pause waits for it.
const SEGMENT_BYTES_MAX: u32 = 64 << 10;
const REQUEST_BYTES_MAX: u64 = SEGMENTS_MAX as u64 * SEGMENT_BYTES_MAX as u64;
/// What is read or written at once for a request; longer ones go part by part.
const BUFFER_BYTES: usize = 256 << 10;
/// Buffers that are kept for requests to come: more than that are needed by bursts only.
const SPARE_BUFFERS_MAX: usize = 16;
/// How soon the kernel is asked again to take requests that it had no room for.
const ASK_AGAIN: Duration = Duration::from_millis(10);
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
    queue: DiskQueue,
    /// What is under way, by its place in the queue.
    requests: Vec<Option<Request>>,
    spare_buffers: Vec<DiskBuffer>,
    /// Where writes are noted, for whoever copies the disk; and what of it has not come yet.
    notes: DiskNotes,
    missing: MissingPages,
    /// The kernel has not taken what was begun: when it is asked again.
    again_at: Option<Instant>,
    /// What it tells of itself, and where it lies.
    serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
    path: String,
    /// For requests that failed, of which the guest may make as many as it likes.
    allowance: Allowance,
}

/// A request that is under way.
#[derive(Debug)]
struct Request {
    reply: Reply,
    /// What is done now, for so many bytes.
    action: Action,
    len: usize,
    /// Where the data is that has not been read or written, and after this action.
    data: Places,
}

/// How a request is answered.
#[derive(Clone, Copy, Debug)]
struct Reply {
    head: u16,
    status: GuestAddress,
    /// What was written into the guest's memory before its status.
    written: usize,
}

/// What became of a request when it was looked at.
enum Begun {
    /// It is done, and so many bytes were written.
    Done(usize),
    UnderWay(Action, Places),
}

impl Request {
    /// What was done is over: takes what was read to the guest. True if there is more to do.
    fn take(&mut self, buffer: &mut DiskBuffer, memory: &GuestView) -> io::Result<bool> {
        let next = |offset| offset + self.len as u64;
        self.action = match self.action {
            Action::Read(offset) => {
                self.data.write(memory, &buffer.bytes_mut()[..self.len])?;
                self.reply.written += self.len;
                Action::Read(next(offset))
            }
            Action::Write(offset) => Action::Write(next(offset)),
            Action::Flush => Action::Flush,
        };
        Ok(self.data.bytes() > 0)
    }
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

impl Block {
    /// The disk that is at `path`.
    pub(super) fn new(
        disk: Disk,
        path: &str,
        way: Way,
        notes: DiskNotes,
        missing: MissingPages,
    ) -> Self {
        let mut serial = [0; VIRTIO_BLK_ID_BYTES as usize];
        let name = path.rsplit('/').next().unwrap_or_default();
        for (place, byte) in serial.iter_mut().zip(name.bytes()) {
            *place = byte;
        }
        let queue = DiskQueue::new(disk, QUEUE_SIZE, way);
        if let Some(why) = queue.why_one_by_one() {
            tracing::info!(disk = path, %why, "requests are carried out one by one");
        }
        Self {
            queue,
            requests: (0..QUEUE_SIZE).map(|_| None).collect(),
            spare_buffers: Vec::new(),
            notes,
            missing,
            again_at: None,
            serial,
            path: path.to_owned(),
            allowance: Allowance::new(),
        }
    }

    const fn disk(&self) -> &Disk {
        self.queue.disk()
    }

    /// Looks what a request is, and does it if that does not take the disk's time.
    fn look(
        &self,
        memory: &GuestView,
        mut from: Places,
        mut into: Places,
    ) -> Result<Begun, Failure> {
        let mut header = [0; 16];
        from.read(memory, &mut header)?;
        let [kind, _, low, high] = words(header);
        let sector = u64::from(high) << 32 | u64::from(low);
        match kind {
            VIRTIO_BLK_T_IN => {
                let offset = self.place(sector, into.bytes())?;
                Ok(Begun::UnderWay(Action::Read(offset), into))
            }
            VIRTIO_BLK_T_FLUSH => Ok(Begun::UnderWay(Action::Flush, Places::default())),
            VIRTIO_BLK_T_GET_ID => {
                let len = usize::try_from(into.bytes()).unwrap_or(usize::MAX);
                let len = len.min(self.serial.len());
                into.write(memory, &self.serial[..len])?;
                Ok(Begun::Done(len))
            }
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES
                if self.disk().is_read_only() =>
            {
                Err(io::Error::from(io::ErrorKind::ReadOnlyFilesystem).into())
            }
            VIRTIO_BLK_T_OUT => {
                let offset = self.place(sector, from.bytes())?;
                Ok(Begun::UnderWay(Action::Write(offset), from))
            }
            VIRTIO_BLK_T_DISCARD => {
                let limits = (DISCARDED_RANGES_MAX, DISCARDED_SECTORS_MAX);
                self.each_range(memory, from, limits, Self::discard)?;
                Ok(Begun::Done(0))
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let limits = (ZEROED_RANGES_MAX, ZEROED_SECTORS_MAX);
                self.each_range(memory, from, limits, Self::zero)?;
                Ok(Begun::Done(0))
            }
            _ => Err(Failure::Unsupported),
        }
    }

    /// The same of what is read or written at once.
    fn place(&self, sector: u64, bytes: u64) -> Result<u64, Failure> {
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
                if end <= self.disk().bytes() && bytes.is_multiple_of(SECTOR_BYTES) =>
            {
                Ok(offset)
            }
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{bytes} bytes from sector {sector} are not on the disk"),
            )),
        }
    }

    /// Begins what a request needs next, with a buffer that is free.
    fn begin(
        &mut self,
        place: usize,
        mut request: Request,
        mut buffer: DiskBuffer,
        memory: &GuestView,
    ) -> io::Result<()> {
        let left = usize::try_from(request.data.bytes()).unwrap_or(usize::MAX);
        request.len = left.min(BUFFER_BYTES);
        if let Action::Read(offset) | Action::Write(offset) = request.action
            && self.missing.lacks(offset, request.len as u64)
        {
            // What was begun before goes on meanwhile.
            self.submit();
            self.missing.wait_for(offset, request.len as u64);
        }
        if let Action::Write(_) = request.action {
            let bytes = &mut buffer.bytes_mut()[..request.len];
            request.data.read(memory, bytes)?;
        }
        self.queue.begin(place, request.action, buffer, request.len);
        self.requests[place] = Some(request);
        Ok(())
    }

    /// Has the kernel see what was begun.
    fn submit(&mut self) {
        let Err(error) = self.queue.submit() else {
            self.again_at = None;
            return;
        };
        if self.again_at.is_none() {
            tracing::warn!(%error, disk = self.path, "the kernel takes no requests at the moment");
        }
        self.again_at = Some(Instant::now() + ASK_AGAIN);
    }

    /// Answers a request, or begins one.
    fn step(&mut self, ring: &mut Ring<'_>) -> Result<Served, QueueError> {
        if self.answer_one(ring)? == Served::Request {
            return Ok(Served::Request);
        }
        let Some(place) = self.queue.free_place() else {
            return Ok(Served::NoInput);
        };
        let Some(chain) = ring.next()? else {
            return Ok(Served::RingEmpty);
        };
        let head = chain.head_index();
        let [from, mut into] = Places::of(chain, ring.memory, PIECES_MAX)?;
        let Some(status) = into.take_last() else {
            // There is no place for an answer.
            ring.finish(head, 0)?;
            return Ok(Served::Request);
        };
        let mut reply = Reply {
            head,
            status,
            written: 0,
        };
        let result = match self.look(ring.memory, from, into) {
            Ok(Begun::UnderWay(action, data)) => {
                let buffer = self.spare_buffers.pop();
                let buffer = buffer.unwrap_or_else(|| DiskBuffer::new(BUFFER_BYTES));
                let request = Request {
                    reply,
                    action,
                    len: 0,
                    data,
                };
                match self.begin(place, request, buffer, ring.memory) {
                    Ok(()) => return Ok(Served::Begun),
                    Err(error) => Err(error.into()),
                }
            }
            Ok(Begun::Done(written)) => {
                reply.written = written;
                Ok(())
            }
            Err(failure) => Err(failure),
        };
        self.answer(reply, result, ring)?;
        Ok(Served::Request)
    }

    /// Has the kernel see what was begun, all at once, when nothing more is done for now.
    fn submit_before_wait(&mut self, served: &Result<Served, QueueError>) {
        if !matches!(served, Ok(Served::Request | Served::Begun)) {
            self.submit();
        }
    }

    /// What is over next. If it wrote, whether that went well or not, it is noted before anybody hears of it.
    fn next_completed(&mut self) -> Option<Completed> {
        let completed = self.queue.completed()?;
        if let Some(Request {
            action: Action::Write(offset),
            len,
            ..
        }) = &self.requests[completed.place]
        {
            self.notes.note(*offset, *len as u64);
        }
        Some(completed)
    }

    /// Answers one request that is over, if there is one.
    fn answer_one(&mut self, ring: &mut Ring<'_>) -> Result<Served, QueueError> {
        while let Some(completed) = self.next_completed() {
            let Completed {
                place,
                mut buffer,
                result,
            } = completed;
            let mut request = self.requests[place].take().expect("it was begun");
            let taken = result.and_then(|()| request.take(&mut buffer, ring.memory));
            let reply = request.reply;
            let result = match taken {
                Ok(true) => match self.begin(place, request, buffer, ring.memory) {
                    Ok(()) => continue,
                    Err(error) => Err(error.into()),
                },
                over => {
                    self.spare(buffer);
                    over.map(drop).map_err(Failure::from)
                }
            };
            self.answer(reply, result, ring)?;
            return Ok(Served::Request);
        }
        Ok(Served::NoInput)
    }

    /// Answers a request.
    fn answer(
        &mut self,
        reply: Reply,
        result: Result<(), Failure>,
        ring: &mut Ring<'_>,
    ) -> Result<(), QueueError> {
        let status = match result {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(Failure::Unsupported) => VIRTIO_BLK_S_UNSUPP,
            Err(Failure::Io(error)) => {
                if self.allowance.spend(0).is_some() {
                    tracing::warn!(%error, disk = self.path, "a request of the guest failed");
                }
                VIRTIO_BLK_S_IOERR
            }
        };
        let status = u8::try_from(status).expect("below three");
        let placed = ring.memory.write_obj(status, reply.status);
        placed.map_err(QueueError::GuestMemory)?;
        ring.finish(reply.head, reply.written + 1)
    }

    /// Keeps a buffer for later.
    fn spare(&mut self, buffer: DiskBuffer) {
        if self.spare_buffers.len() < SPARE_BUFFERS_MAX {
            self.spare_buffers.push(buffer);
        }
    }

    /// Changes each range that a request names: sector, number of sectors, flags.
    fn each_range(
        &self,
        memory: &GuestView,
        mut from: Places,
        (ranges_max, sectors_max): (u32, u32),
        act: impl Fn(&Self, u64, u64, u32) -> io::Result<()>,
    ) -> Result<(), Failure> {
        for _ in 0..ranges_max {
            if from.bytes() == 0 {
                return Ok(());
            }
            let mut range = [0; 16];
            from.read(memory, &mut range)?;
            let [low, high, sectors, flags] = words(range);
            if sectors > sectors_max || flags & !UNMAP != 0 {
                return Err(Failure::Unsupported);
            }
            let bytes = u64::from(sectors) * SECTOR_BYTES;
            let offset = self.within(u64::from(high) << 32 | u64::from(low), bytes)?;
            if bytes > 0 {
                self.missing.wait_for(offset, bytes);
                let done = act(self, offset, bytes, flags);
                self.notes.note(offset, bytes);
                done?;
            }
        }
        match from.bytes() {
            0 => Ok(()),
            _ => Err(Failure::Unsupported),
        }
    }

    /// Gives a range's room back. That is a wish: what was there may as well stay.
    fn discard(&self, offset: u64, bytes: u64, _flags: u32) -> io::Result<()> {
        match self.disk().punch(offset, bytes) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            other => other,
        }
    }

    /// Makes a range zeroes, by the fastest way that its file system has.
    fn zero(&self, offset: u64, bytes: u64, flags: u32) -> io::Result<()> {
        let fast = if flags & UNMAP != 0 {
            self.disk().punch(offset, bytes)
        } else {
            self.disk().zero(offset, bytes)
        };
        match fast {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                self.disk().write_zeroes(offset, bytes)
            }
            other => other,
        }
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
        if self.disk().is_read_only() {
            always | 1 << VIRTIO_BLK_F_RO
        } else {
            always | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    /// The driver takes its memory back when this returns, and may write anew what is being written. So
    /// it waits for the disk; what was read is not wanted any more.
    fn reset(&mut self) {
        while self.queue.under_way() > 0 {
            if let Err(error) = self.queue.wait() {
                tracing::warn!(%error, disk = self.path, "the kernel does not say what is done");
                thread::sleep(ASK_AGAIN);
            }
            while let Some(completed) = self.next_completed() {
                self.requests[completed.place] = None;
                self.spare(completed.buffer);
            }
        }
        self.again_at = None;
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
        let sectors = self.disk().bytes() / SECTOR_BYTES;
        bytes[..8].copy_from_slice(&sectors.to_le_bytes());
        bytes
    }

    fn serve(&mut self, _queue: usize, ring: &mut Ring<'_>) -> Result<Served, QueueError> {
        let served = self.step(ring);
        self.submit_before_wait(&served);
        served
    }

    fn under_way(&self) -> usize {
        self.queue.under_way()
    }

    fn finish(&mut self, _queue: usize, ring: &mut Ring<'_>) -> Result<Served, QueueError> {
        let served = self.answer_one(ring);
        self.submit_before_wait(&served);
        served
    }

    fn input(&self) -> Option<Input> {
        let descriptor = self.queue.descriptor()?;
        Some(descriptor)
    }

    fn due(&self) -> Option<Instant> {
        self.again_at
    }

    fn tick(&mut self) {
        self.submit();
    }

    fn claim(&mut self) -> Result<(), DeviceError> {
        self.disk().lock().map_err(|error| match error.kind() {
            io::ErrorKind::ResourceBusy => DeviceError::DiskBusy {
                path: self.path.clone(),
            },
            _ => self.cannot(error),
        })
    }

    fn release(&mut self) -> Result<(), DeviceError> {
        self.disk().unlock().map_err(|error| self.cannot(error))
    }

    fn rest(&mut self) -> Result<(), DeviceError> {
        if self.disk().is_read_only() {
            return Ok(());
        }
        self.disk().flush().map_err(|error| self.cannot(error))
    }

    fn save(&self) -> Vec<u8> {
        let Self {
            // The disk is the same one at both ends, or was copied; and nothing is under way.
            queue,
            requests: _,
            spare_buffers: _,
            notes: _,
            missing: _,
            again_at: _,
            serial: _,
            path: _,
            allowance: _,
        } = self;
        assert!(queue.under_way() == 0, "a disk is saved at rest");
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
