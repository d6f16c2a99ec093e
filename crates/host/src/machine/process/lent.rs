//! What a guest that arrives may use of this host. Its source names disks and network interfaces, and a
//! source is not to be trusted with all that this host has: nothing is lent that its operator has not named.

use limosa_vmm::config::VmConfig;
use std::fs;
use std::path::{Path, PathBuf};

/// What the operator lends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lent {
    /// Disks, and directories below which all are.
    pub disks: Vec<PathBuf>,
    /// Names of tap devices; one that ends with `*` stands for all that begin so.
    pub taps: Vec<String>,
}

impl Lent {
    /// Takes what is not lent out of what an arriving machine asks for. What that was, and how to permit it.
    pub fn keep_lent(&self, config: &mut VmConfig) -> Vec<String> {
        let mut refused = Vec::new();
        config.disks.retain(|disk| {
            let is_lent = self.has_disk(Path::new(&disk.path));
            if !is_lent {
                refused.push(format!(
                    "disk {} is not lent to guests that arrive: start the daemon with --lend-disk {0}, or a directory above it",
                    disk.path
                ));
            }
            is_lent
        });
        config.networks.retain(|network| {
            let is_lent = self.has_tap(&network.tap);
            if !is_lent {
                refused.push(format!(
                    "network interface {} is not lent to guests that arrive: start the daemon with --lend-tap {0}",
                    network.tap
                ));
            }
            is_lent
        });
        refused
    }

    /// By where the path really leads. One that leads nowhere is a matter for whoever opens it, but only
    /// within what is lent: nobody learns what is elsewhere.
    fn has_disk(&self, path: &Path) -> bool {
        let Some(disk) = place(path) else {
            return false;
        };
        let mut lent = self.disks.iter().filter_map(|lent| place(lent));
        lent.any(|lent| disk.starts_with(lent))
    }

    fn has_tap(&self, tap: &str) -> bool {
        self.taps.iter().any(|lent| match lent.strip_suffix('*') {
            Some(beginning) => tap.starts_with(beginning),
            None => tap == lent,
        })
    }
}

/// Where a path leads, or would if there were something.
fn place(path: &Path) -> Option<PathBuf> {
    if let Ok(real) = fs::canonicalize(path) {
        return Some(real);
    }
    let parent = fs::canonicalize(path.parent()?).ok()?;
    Some(parent.join(path.file_name()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn only_what_was_named_is_lent() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        fs::create_dir(at("lent")).unwrap();
        for file in ["lent/a.raw", "own.raw", "lent.raw"] {
            fs::write(at(file), b"").unwrap();
        }
        symlink(at("own.raw"), at("lent/link.raw")).unwrap();
        let lent = Lent {
            disks: vec![at("lent"), at("later.raw")],
            taps: vec!["web0".to_owned(), "tap*".to_owned()],
        };
        for (name, expect) in [
            ("lent/a.raw", true),
            ("lent/../lent/a.raw", true),
            ("lent/../own.raw", false),
            ("lent/link.raw", false),
            ("lent/missing.raw", true),
            ("missing.raw", false),
            ("lent/missing/../../own.raw", false),
            ("lent.raw", false),
            ("later.raw", true),
            ("later.raw2", false),
        ] {
            assert_eq!(lent.has_disk(&at(name)), expect, "{name}");
        }
        for (tap, expect) in [
            ("web0", true),
            ("web01", false),
            ("tap7", true),
            ("br0", false),
        ] {
            assert_eq!(lent.has_tap(tap), expect, "{tap}");
        }
        assert!(!Lent::default().has_disk(&at("own.raw")));
    }
}
