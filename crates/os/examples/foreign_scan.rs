//! Who should look for written pages: the process that has the memory, asked over a socket, or the one that
//! wants to know, in the other's page tables?
//!
//! ```sh
//! cargo run --release -p limosa-os --example foreign_scan 4096 15     # MiB of memory, repeats
//! ```
//!
//! A child has the memory, all of it touched, and tracks writes by write protection. It is asked for a harvest
//! as a VM process is, and its pagemap is scanned from here, in turn; with nothing written, with 1,000
//! scattered pages, and while a thread of it writes without pause. Median microseconds.

use limosa_os::dirty::TrackerKind;
use limosa_os::dirty::scan::{self, Which};
use limosa_os::kvm::{Kvm, Region};
use limosa_os::{PageKind, SharedBitmap, SharedMemory};
use limosa_pages::{ByteCount, Gpa, PAGE_SIZE, PageCount, PageRange, Pfn};
use std::env;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::ops::Range;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let mut words = env::args().skip(1);
    let (first, second) = (words.next(), words.next());
    if first.as_deref() == Some("child") {
        return child(second.ok_or("a size")?.parse()?);
    }
    let mebibytes: u64 = first.map_or(Ok(4096), |word| word.parse())?;
    let repeats: usize = second.map_or(Ok(15), |word| word.parse())?;
    let mut process = Process::start(mebibytes)?;
    println!("{mebibytes} MiB, {repeats} runs, median µs: asked for, scanned from here");
    for (what, before) in [
        ("nothing written", "dirty 0"),
        ("1,000 scattered pages", "dirty 1000"),
        ("while a thread writes", "write"),
    ] {
        process.ask(before)?;
        let (mut asked, mut scanned) = (Vec::new(), Vec::new());
        for _ in 0..repeats {
            process.ask(before)?;
            asked.push(timed(|| process.ask("harvest"))?);
            process.ask(before)?;
            scanned.push(timed(|| process.scan())?);
        }
        println!("{what:24} {:8} {:8}", median(asked), median(scanned));
    }
    Ok(())
}

fn timed(act: impl FnOnce() -> Result<(), Failure>) -> Result<Duration, Failure> {
    let began = Instant::now();
    act()?;
    Ok(began.elapsed())
}

fn median(mut times: Vec<Duration>) -> u128 {
    times.sort_unstable();
    times[times.len() / 2].as_micros()
}

/// The child, and what is needed to look into it.
struct Process {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    pagemap: File,
    addresses: Range<u64>,
    found: Vec<PageRange>,
}

impl Process {
    fn start(mebibytes: u64) -> Result<Self, Failure> {
        let mut child = Command::new(env::current_exe()?)
            .args(["child", &mebibytes.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let to = child.stdin.take().ok_or("a pipe")?;
        let mut from = BufReader::new(child.stdout.take().ok_or("a pipe")?);
        from.read_line(&mut String::new())?;
        let maps = fs::read_to_string(format!("/proc/{}/maps", child.id()))?;
        let line = maps.lines().find(|line| line.contains("guest-memory"));
        let range = line.and_then(|line| line.split(' ').next()?.split_once('-'));
        let (start, end) = range.ok_or("the child has no memory")?;
        let addresses = u64::from_str_radix(start, 16)?..u64::from_str_radix(end, 16)?;
        let pagemap = File::open(format!("/proc/{}/pagemap", child.id()))?;
        Ok(Self {
            child,
            to,
            from,
            pagemap,
            addresses,
            found: Vec::new(),
        })
    }

    fn ask(&mut self, what: &str) -> Result<(), Failure> {
        writeln!(self.to, "{what}")?;
        let mut answer = String::new();
        self.from.read_line(&mut answer)?;
        (answer.trim() == "done")
            .then_some(())
            .ok_or_else(|| answer.into())
    }

    fn scan(&mut self) -> Result<(), Failure> {
        let (found, addresses) = (&mut self.found, self.addresses.clone());
        found.clear();
        scan::protect(&self.pagemap, addresses, Which::Written, |run| {
            found.push(run)
        })?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            eprintln!("the child does not end: {error}");
        }
    }
}

/// Has the memory, and does what it is told.
fn child(mebibytes: u64) -> Result<(), Failure> {
    let memory = SharedMemory::create(ByteCount::new(mebibytes << 20), PageKind::Small)?;
    let memory = Arc::new(memory);
    let pages = memory.page_count();
    for page in 0..pages.get() {
        memory.write_at(page * PAGE_SIZE, &[1])?;
    }
    let mut vm = Kvm::open()?.create_vm(TrackerKind::WriteProtect)?;
    let all = PageRange::new(Pfn::new(0), pages);
    let region = Region {
        start: Gpa::new(0),
        pages: all,
    };
    vm.set_memory(Arc::clone(&memory), &[region])?;
    vm.start_tracking()?;
    let bitmap = SharedBitmap::create(pages)?;
    let writes = Arc::new(AtomicBool::new(false));
    {
        let (memory, writes) = (Arc::clone(&memory), Arc::clone(&writes));
        thread::spawn(move || write(&memory, &writes));
    }
    println!("ready");
    for line in io::stdin().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["harvest"] => vm.read_dirty_pages(&bitmap)?,
            ["dirty", count] => {
                let count: u64 = count.parse()?;
                vm.read_dirty_pages(&bitmap)?;
                vm.clear_dirty_pages(&bitmap, all, &[])?;
                for page in 0..count {
                    let offset = page * (pages.get() / count) * PAGE_SIZE;
                    memory.write_at(offset, &[2])?;
                }
            }
            ["write"] => {
                writes.store(true, Ordering::SeqCst);
                vm.clear_dirty_pages(&bitmap, all, &[])?;
                thread::sleep(Duration::from_millis(20));
            }
            _ => return Err(line.into()),
        }
        println!("done");
    }
    Ok(())
}

/// Writes pages all over the memory, once it is told to.
fn write(memory: &SharedMemory, writes: &AtomicBool) {
    let pages = memory.page_count().get();
    let mut page = PageCount::ZERO.get();
    loop {
        if !writes.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(1));
            continue;
        }
        page = (page + 40_503) % pages;
        if memory.write_at(page * PAGE_SIZE, &[3]).is_err() {
            return;
        }
    }
}
