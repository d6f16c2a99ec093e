//! Pages of disks onto a push stream: read into a buffer, which tells what they are and is sent.

use super::{Batch, CODED_BYTES_MAX, Count, PushStream, SendError};
use crate::coding;
use crate::disks::{self, Content};
use limosa_engine::source::{Piece, SentPiece};
use limosa_engine::wire::PushHeader;
use limosa_pages::{PageCount, PageRange, PageSet};
use std::time::Instant;

impl PushStream {
    /// Sends the pages of `set` within a piece of a disk.
    pub(super) fn send_disk_piece(
        &mut self,
        piece: Piece,
        set: &PageSet,
        skip_holes: bool,
    ) -> Result<SentPiece, SendError> {
        let runs = self.runs(piece.range, set, skip_holes);
        let runs = runs.map_err(SendError::Disk)?;
        let mut sent = SentPiece {
            resent: self.mark(&runs),
            ..SentPiece::default()
        };
        let mut batch = Batch::default();
        for run in runs {
            self.add_disk_run(run, &mut batch, &mut sent)?;
        }
        self.flush(&mut batch, &mut sent)?;
        Ok(sent)
    }

    /// Adds missing pages of one disk. Those that were never written are told, but do not count as sent.
    pub(super) fn add_disk_part(
        &mut self,
        part: PageRange,
        batch: &mut Batch,
        sent: &mut SentPiece,
    ) -> Result<(), SendError> {
        let runs = self.shared.disks.runs_in(part);
        let runs = runs.map_err(SendError::Disk)?;
        let mut next = part.first;
        let end = PageRange::new(part.end(), PageCount::ZERO);
        for run in runs.into_iter().chain([end]) {
            let hole = PageRange::new(next, PageCount::new(run.first.get() - next.get()));
            if hole.count > PageCount::ZERO {
                let header = PushHeader::Zeros(hole).encode();
                self.coder.out.extend_from_slice(&header);
            }
            self.add_disk_run(run, batch, sent)?;
            next = run.end();
        }
        Ok(())
    }

    /// Adds pages of one disk as they are now.
    fn add_disk_run(
        &mut self,
        run: PageRange,
        batch: &mut Batch,
        sent: &mut SentPiece,
    ) -> Result<(), SendError> {
        let mut buffer = self.disk_buffer.take().unwrap_or_else(disks::buffer);
        for part in disks::parts(run) {
            let content = self.shared.disks.read(part, &mut buffer);
            let content = content.map_err(SendError::Disk)?;
            for header in content.headers() {
                match header {
                    PushHeader::Pages(range) => self.put_content(range, content, sent),
                    _ => self.coder.out.extend_from_slice(&header.encode()),
                }
                sent.count(header);
                batch.pages += header.range().map_or(0, |range| range.count.get());
                if self.coder.out.len() >= CODED_BYTES_MAX {
                    self.flush(batch, sent)?;
                }
            }
        }
        self.disk_buffer = Some(buffer);
        Ok(())
    }

    /// Adds some of these pages as they are, or coded.
    fn put_content(&mut self, range: PageRange, content: Content<'_>, sent: &mut SentPiece) {
        let shared = &self.shared;
        let mut rest = range;
        while rest.count > PageCount::ZERO {
            let coded = self.coder.wanted(&shared.coding, rest);
            if coded == PageCount::ZERO {
                self.coder
                    .out
                    .extend_from_slice(&PushHeader::Pages(rest).encode());
                self.coder.out.extend_from_slice(content.of(rest));
                break;
            }
            let front = PageRange::new(rest.first, coded);
            let outcome = self.coder.encode_content(
                &shared.coding,
                content.of(front),
                front,
                false,
                Instant::now(),
            );
            sent.lz4.add(outcome.lz4);
            sent.zstd.add(outcome.zstd);
            rest = coding::after(rest, coded);
        }
    }
}
