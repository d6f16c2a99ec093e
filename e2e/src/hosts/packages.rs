//! The Debian packages of the hosts and guests: fetched with all that they need, unpacked beside each
//! other, and programs taken out of them with their libraries.

use super::{HostError, SERIES, failed};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What hosts and guests are made of.
const PACKAGES: [&str; 14] = [
    "qemu-system-x86",
    "busybox-static",
    "bash",
    "socat",
    "iproute2",
    "iputils-ping",
    "redis-server",
    "redis-tools",
    "memcached",
    "sqlite3",
    "stress-ng",
    "fio",
    "iperf3",
    "e2fsprogs",
];
/// For tar: programs and libraries are below `usr`, as Debian has them today. Not for what links lead to.
const BELOW_USR: &str = r"s,^\./\(bin\|sbin\|lib\|lib64\)\(/\|$\),./usr/\1\2,S";
pub(super) const TRIPLET: &str = "x86_64-linux-gnu";
/// Of no use here, and large.
const UNUSED: [&str; 9] = [
    "linux-image",
    "perl",
    "libperl",
    "python3",
    "libpython3",
    "iso-codes",
    "adduser",
    "debconf",
    "libgstreamer",
];

/// Packages, unpacked.
pub(super) struct Packages {
    root: PathBuf,
    /// Where each kernel was unpacked.
    pub(super) kernels: Vec<(&'static str, PathBuf)>,
}

/// Runs a program that has to succeed; what it printed.
pub(super) fn succeed(command: &mut Command) -> Result<String, HostError> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output();
    let output = output.map_err(failed(format!("run {name}")))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    // What went wrong, and not what it had begun.
    let said = errors.lines().last().or_else(|| text.lines().last());
    let said = said.unwrap_or_default();
    Err(HostError(format!(
        "{name} ended with {}: {said}",
        output.status
    )))
}

impl Packages {
    /// Those that were unpacked there, without the kernels.
    pub(super) fn unpacked(cache: &Path) -> Self {
        Self {
            root: cache.join("packages"),
            kernels: Vec::new(),
        }
    }

    /// Fetches and unpacks all of them below `cache`.
    pub(super) fn fetch(cache: &Path) -> Result<Self, HostError> {
        let debs = cache.join("debs");
        fs::create_dir_all(debs.join("partial")).map_err(failed("make a directory"))?;
        let nothing = cache.join("nothing-installed");
        fs::write(&nothing, "").map_err(failed("write"))?;
        // A fresh machine has no lists of packages.
        if newest_kernels().is_err() {
            succeed(Command::new("apt-get").args(["-q", "update"]))?;
        }
        // Told that nothing is installed, apt fetches all that is needed.
        let option = |name: &str, path: &Path| format!("{name}={}", path.display());
        let mut apt = Command::new("apt-get");
        apt.args(["-y", "-q", "--no-install-recommends", "--download-only"])
            .args(["-o", "APT::Sandbox::User=root", "-o", "Debug::NoLocking=1"])
            .args(["-o", &option("Dir::State::status", &nothing)])
            .args(["-o", &option("Dir::Cache::archives", &debs)])
            .arg("install")
            .args(PACKAGES);
        succeed(&mut apt)?;
        let mut packages = Self::unpacked(cache);
        for (series, package) in newest_kernels()? {
            let mut apt = Command::new("apt-get");
            apt.args(["-q", "-o", "APT::Sandbox::User=root", "download", &package]);
            succeed(apt.current_dir(&debs))?;
            let place = cache.join("kernels").join(series);
            fs::create_dir_all(&place).map_err(failed("make a directory"))?;
            let deb = find(&debs, |name| name.starts_with(&format!("{package}_")))?;
            succeed(Command::new("dpkg-deb").arg("-x").arg(deb).arg(&place))?;
            packages.kernels.push((series, place));
        }
        packages.unpack(&debs)?;
        Ok(packages)
    }

    fn unpack(&self, debs: &Path) -> Result<(), HostError> {
        // As Debian has it: programs and libraries are below /usr, and links lead there.
        for name in ["bin", "sbin", "lib", "lib64"] {
            let real = self.root.join("usr").join(name);
            fs::create_dir_all(&real).map_err(failed("make a directory"))?;
            let link = self.root.join(name);
            if !link.exists() {
                symlink(Path::new("usr").join(name), link).map_err(failed("make a link"))?;
            }
        }
        for entry in fs::read_dir(debs).map_err(failed("list packages"))? {
            let deb = entry.map_err(failed("list packages"))?.path();
            let name = deb
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if !name.ends_with(".deb") || UNUSED.iter().any(|unused| name.starts_with(unused)) {
                continue;
            }
            // By tar, which puts everything below usr, and not by dpkg-deb alone: that would follow a link
            // that one package has where another has a directory, and it may lead out of here.
            let mut read = Command::new("dpkg-deb");
            read.arg("--fsys-tarfile").arg(&deb).stdout(Stdio::piped());
            let mut read = read.spawn().map_err(failed("run dpkg-deb"))?;
            let from = read.stdout.take().expect("it was asked for");
            let status = Command::new("tar")
                .args(["-x", "--no-same-owner", "--transform", BELOW_USR, "-C"])
                .arg(&self.root)
                .args(["--exclude=./usr/share/doc", "--exclude=./usr/share/man"])
                .arg("--exclude=./usr/share/locale")
                .stdin(from)
                .status()
                .map_err(failed("run tar"))?;
            let read = read.wait().map_err(failed("wait for dpkg-deb"))?;
            if !(status.success() && read.success()) {
                return Err(HostError(format!("cannot unpack {name}")));
            }
        }
        // The package of the loader has an absolute link, which would lead to this machine's.
        let loader = self.loader();
        let leads_away = fs::read_link(&loader).is_ok_and(|target| target.is_absolute());
        if leads_away {
            let target = format!("../lib/{TRIPLET}/ld-linux-x86-64.so.2");
            fs::remove_file(&loader)
                .and_then(|()| symlink(target, &loader))
                .map_err(failed("mend the loader's link"))?;
        }
        Ok(())
    }

    /// What loads dynamic programs.
    pub(super) fn loader(&self) -> PathBuf {
        self.root.join("usr/lib64/ld-linux-x86-64.so.2")
    }

    /// A path below `/usr` of the packages.
    pub(super) fn usr(&self, path: &str) -> PathBuf {
        self.root.join("usr").join(path)
    }

    /// What QEMU loads when it starts.
    pub(super) fn qemu_modules(&self) -> PathBuf {
        self.usr("lib").join(TRIPLET).join("qemu")
    }

    pub(super) fn library_path(&self) -> String {
        let directories = [
            format!("lib/{TRIPLET}"),
            format!("lib/{TRIPLET}/pulseaudio"),
            format!("lib/{TRIPLET}/ceph"),
            "lib".to_owned(),
        ];
        directories
            .map(|directory| self.usr(&directory).display().to_string())
            .join(":")
    }

    pub(super) fn program(&self, name: &str) -> Result<PathBuf, HostError> {
        let places = ["bin", "sbin"].map(|directory| self.usr(directory).join(name));
        let found = places.into_iter().find(|place| place.exists());
        found.ok_or_else(|| HostError(format!("the packages have no program {name}")))
    }

    /// Copies programs with their libraries and the loader into a directory that is to be `/usr`.
    pub(super) fn install(&self, programs: &[&str], usr: &Path) -> Result<(), HostError> {
        let libraries = usr.join("lib").join(TRIPLET);
        for directory in [
            usr.join("bin"),
            usr.join("sbin"),
            usr.join("lib64"),
            libraries.clone(),
        ] {
            fs::create_dir_all(directory).map_err(failed("make a directory"))?;
        }
        let copy = |from: &Path, to: PathBuf| {
            assert!(
                to.starts_with(usr),
                "nothing is written outside of the stage"
            );
            fs::copy(from, to)
                .map(drop)
                .map_err(failed(format!("copy {}", from.display())))
        };
        copy(&self.loader(), usr.join("lib64/ld-linux-x86-64.so.2"))?;
        for name in programs {
            let program = self.program(name)?;
            copy(&program, usr.join("bin").join(name))?;
            for (library, path) in self.libraries(&program)? {
                copy(&path, libraries.join(library))?;
            }
        }
        Ok(())
    }

    /// The shared libraries that a program needs, by name. None for a static one.
    fn libraries(&self, program: &Path) -> Result<BTreeMap<String, PathBuf>, HostError> {
        let mut list = Command::new(self.loader());
        list.args(["--library-path", &self.library_path(), "--list"])
            .arg(program);
        let output = list.output().map_err(failed("list libraries"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        // What a library lacks is no line of the list, but an error. The status of a static program tells nothing.
        let mut lines = text.lines().chain(errors.lines());
        let lacks = |line: &&str| line.contains("not found") || line.contains("cannot open");
        if let Some(line) = lines.find(lacks) {
            return Err(HostError(format!("{}: {}", program.display(), line.trim())));
        }
        Ok(text.lines().filter_map(library_of).collect())
    }
}

/// Name and place of the library in a line of the loader's list. The loader lists itself by its path on
/// this machine: that is no name, and joined to a directory it would lead out of it.
fn library_of(line: &str) -> Option<(String, PathBuf)> {
    let (name, rest) = line.trim().split_once(" => ")?;
    let path = rest.split_once(" (")?.0;
    (!name.contains('/')).then(|| (name.to_owned(), PathBuf::from(path)))
}

/// The newest package of each series that apt knows.
fn newest_kernels() -> Result<Vec<(&'static str, String)>, HostError> {
    let mut search = Command::new("apt-cache");
    search.args([
        "search",
        "--names-only",
        "^linux-image-[0-9].*-cloud-amd64$",
    ]);
    let list = succeed(&mut search)?;
    let names: Vec<&str> = list
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    SERIES
        .into_iter()
        .map(|series| {
            let newest = newest(&names, series);
            let missing = || {
                HostError(format!(
                    "apt knows no cloud kernel {series}: run 'apt-get update'"
                ))
            };
            Ok((series, newest.ok_or_else(missing)?.to_owned()))
        })
        .collect()
}

fn newest<'a>(names: &[&'a str], series: &str) -> Option<&'a str> {
    let version = |name: &str| -> Vec<u32> {
        let numbers = name.split(|letter: char| !letter.is_ascii_digit());
        numbers.filter_map(|number| number.parse().ok()).collect()
    };
    let of_series = |name: &&&str| {
        let rest = name
            .strip_prefix("linux-image-")
            .and_then(|rest| rest.strip_prefix(series));
        // Not a package that only names another one.
        rest.is_some_and(|rest| rest.starts_with('.'))
    };
    names
        .iter()
        .filter(of_series)
        .max_by_key(|name| version(name))
        .copied()
}

/// The newest file in a directory whose name is right.
fn find(directory: &Path, is_right: impl Fn(&str) -> bool) -> Result<PathBuf, HostError> {
    let entries = fs::read_dir(directory).map_err(failed("list packages"))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let found = names.filter(|name| is_right(name)).max();
    let missing = || HostError(format!("{} lacks a package", directory.display()));
    Ok(directory.join(found.ok_or_else(missing)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_has_a_name_and_no_path() {
        let check = |line: &str, expect: Option<(&str, &str)>| {
            let found = library_of(line);
            let found = found
                .as_ref()
                .map(|(name, path)| (name.as_str(), path.to_str().unwrap_or("")));
            assert_eq!(found, expect);
        };
        let libm = "\tlibm.so.6 => /cache/usr/lib/libm.so.6 (0x00007f5ae2c1b000)";
        check(libm, Some(("libm.so.6", "/cache/usr/lib/libm.so.6")));
        check("\tlinux-vdso.so.1 (0x00007ffd4a5f2000)", None);
        check(
            "\t/lib64/ld-linux-x86-64.so.2 => /cache/ld.so (0x00007f5ae2d05000)",
            None,
        );
        check("\tstatically linked", None);
    }

    #[test]
    fn the_newest_kernel_of_a_series_is_found() {
        let names = [
            "linux-image-6.1-cloud-amd64",
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-56-cloud-amd64",
            "linux-image-6.12.9+bpo-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64",
        ];
        assert_eq!(newest(&names, "6.1"), Some(names[2]));
        assert_eq!(newest(&names, "6.12"), Some(names[4]));
        assert_eq!(newest(&names, "5.10"), None);
    }
}
