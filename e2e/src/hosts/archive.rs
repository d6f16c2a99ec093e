//! Archives in the form in which kernels take their initial file system (`newc` of cpio), written
//! without being root.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const DIRECTORY: u32 = 0o040_755;
const LINK: u32 = 0o120_777;
const FILE: u32 = 0o100_000;
const DEVICE: u32 = 0o020_600;

/// An archive that is being written.
pub(super) struct Archive<W: Write> {
    to: W,
    entries: u32,
    bytes: usize,
    directories: Vec<String>,
}

impl<W: Write> Archive<W> {
    pub(super) const fn new(to: W) -> Self {
        Self {
            to,
            entries: 0,
            bytes: 0,
            directories: Vec::new(),
        }
    }

    /// A directory, and those above it.
    pub(super) fn directory(&mut self, name: &str) -> io::Result<()> {
        if name.is_empty() || self.directories.iter().any(|known| known == name) {
            return Ok(());
        }
        self.above(name)?;
        self.directories.push(name.to_owned());
        self.entry(name, DIRECTORY, &[], (0, 0))
    }

    pub(super) fn link(&mut self, name: &str, target: &str) -> io::Result<()> {
        self.above(name)?;
        self.entry(name, LINK, target.as_bytes(), (0, 0))
    }

    pub(super) fn device(&mut self, name: &str, major: u32, minor: u32) -> io::Result<()> {
        self.above(name)?;
        self.entry(name, DEVICE, &[], (major, minor))
    }

    /// A file with this content; `mode` has its permissions.
    pub(super) fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let name = name.trim_start_matches('/');
        self.above(name)?;
        self.entry(name, FILE | mode, content, (0, 0))
    }

    /// A copy of a file with its permissions.
    pub(super) fn copy(&mut self, from: &Path, name: &str) -> io::Result<()> {
        let mode = fs::metadata(from)?.permissions().mode() & 0o777;
        self.file(name, mode, &fs::read(from)?)
    }

    /// A copy of everything below a directory, links as they are.
    pub(super) fn tree(&mut self, from: &Path, below: &str) -> io::Result<()> {
        self.directory(below)?;
        let mut entries: Vec<_> = fs::read_dir(from)?.collect::<io::Result<_>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let (path, name) = (entry.path(), entry.file_name());
            let name = format!("{below}/{}", name.to_string_lossy());
            let kind = entry.file_type()?;
            if kind.is_symlink() {
                self.link(&name, &fs::read_link(&path)?.to_string_lossy())?;
            } else if kind.is_dir() {
                self.tree(&path, &name)?;
            } else {
                self.copy(&path, &name)?;
            }
        }
        Ok(())
    }

    /// Ends the archive at a multiple of 512 bytes, so that another one can follow.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[], (0, 0))?;
        self.pad(512)?;
        Ok(self.to)
    }

    fn above(&mut self, name: &str) -> io::Result<()> {
        match name.rsplit_once('/') {
            Some((above, _)) => self.directory(above),
            None => Ok(()),
        }
    }

    fn entry(
        &mut self,
        name: &str,
        mode: u32,
        content: &[u8],
        device: (u32, u32),
    ) -> io::Result<()> {
        self.entries += 1;
        let too_large = |_| io::ErrorKind::FileTooLarge;
        let size = u32::try_from(content.len()).map_err(too_large)?;
        let name_size = u32::try_from(name.len() + 1).map_err(too_large)?;
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            device.0,
            device.1,
            name_size,
            0,
        ];
        let head: String = fields.iter().map(|field| format!("{field:08X}")).collect();
        self.put(format!("070701{head}{name}\0").as_bytes())?;
        self.pad(4)?;
        self.put(content)?;
        self.pad(4)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.bytes += bytes.len();
        self.to.write_all(bytes)
    }

    fn pad(&mut self, unit: usize) -> io::Result<()> {
        let missing = self.bytes.next_multiple_of(unit) - self.bytes;
        self.put(&vec![0; missing])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_where_a_reader_looks_for_them() {
        let mut archive = Archive::new(Vec::new());
        archive
            .file("a/b/c", 0o644, b"content")
            .expect("memory takes it");
        archive.link("a/l", "b/c").expect("memory takes it");
        let bytes = archive.finish().expect("memory takes it");
        assert!(bytes.len().is_multiple_of(512));
        let (mut at, mut seen) = (0, Vec::new());
        loop {
            let field = |index: usize| {
                let start = at + 6 + index * 8;
                let text = std::str::from_utf8(&bytes[start..start + 8]).expect("digits");
                usize::from_str_radix(text, 16).expect("digits")
            };
            assert_eq!(&bytes[at..at + 6], b"070701");
            let (mode, size, name_size) = (field(1), field(6), field(11));
            let name = &bytes[at + 110..at + 109 + name_size];
            let content = (at + 110 + name_size).next_multiple_of(4);
            let name = String::from_utf8_lossy(name).into_owned();
            if name == "TRAILER!!!" {
                break;
            }
            let text = String::from_utf8_lossy(&bytes[content..content + size]).into_owned();
            seen.push(format!("{name} {mode:o} {text}"));
            at = (content + size).next_multiple_of(4);
        }
        let expect = [
            "a 40755 ",
            "a/b 40755 ",
            "a/b/c 100644 content",
            "a/l 120777 b/c",
        ];
        assert_eq!(seen, expect);
    }
}
