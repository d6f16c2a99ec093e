//! A kernel out of its package: the image, and modules in the order in which they can be loaded.

use super::packages::succeed;
use super::{HostError, failed};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// An unpacked kernel.
pub(super) struct Kernel {
    pub(super) image: PathBuf,
    modules: BTreeMap<String, PathBuf>,
    built_in: BTreeSet<String>,
}

/// A module, as it is loaded.
pub(super) struct Module {
    pub(super) name: String,
    pub(super) content: Vec<u8>,
}

impl Kernel {
    /// Looks at what was unpacked there.
    pub(super) fn open(root: &Path) -> Result<Self, HostError> {
        let boot = only(&root.join("boot"), "vmlinuz-")?;
        let modules = only(&root.join("lib/modules"), "")?;
        let list = fs::read_to_string(modules.join("modules.builtin"));
        let list = list.map_err(failed("read the list of built-in modules"))?;
        let mut found = BTreeMap::new();
        collect(&modules.join("kernel"), &mut found)?;
        Ok(Self {
            image: boot,
            modules: found,
            built_in: list.lines().map(|line| name_of(Path::new(line))).collect(),
        })
    }

    /// These modules and what they need, each after what it needs. What is built in is left out.
    pub(super) fn load_order(&self, wanted: &[&str]) -> Result<Vec<Module>, HostError> {
        let (mut order, mut seen) = (Vec::new(), BTreeSet::new());
        for name in wanted {
            self.visit(name, true, &mut order, &mut seen)?;
        }
        Ok(order)
    }

    fn visit(
        &self,
        name: &str,
        is_needed: bool,
        order: &mut Vec<Module>,
        seen: &mut BTreeSet<String>,
    ) -> Result<(), HostError> {
        let name = name.replace('-', "_");
        if self.built_in.contains(&name) || !seen.insert(name.clone()) {
            return Ok(());
        }
        let Some(path) = self.modules.get(&name) else {
            let missing = format!("{} has no module {name}", self.image.display());
            return if is_needed {
                Err(HostError(missing))
            } else {
                Ok(())
            };
        };
        let content = read(path)?;
        for (other, is_needed) in needs(&content) {
            self.visit(&other, is_needed, order, seen)?;
        }
        order.push(Module { name, content });
        Ok(())
    }
}

/// What a module says that it needs, and what should come before it if it is there.
fn needs(module: &[u8]) -> Vec<(String, bool)> {
    let mut needs = Vec::new();
    for text in module.split(|&byte| byte == 0) {
        let Ok(text) = std::str::from_utf8(text) else {
            continue;
        };
        let list = match (
            text.strip_prefix("depends="),
            text.strip_prefix("softdep=pre: "),
        ) {
            (Some(list), _) => Some((list, true)),
            (None, Some(list)) => Some((list, false)),
            (None, None) => None,
        };
        let Some((list, is_needed)) = list else {
            continue;
        };
        let names = list.split([' ', ',']).take_while(|name| *name != "post:");
        let names = names.filter(|name| !name.is_empty());
        needs.extend(names.map(|name| (name.to_owned(), is_needed)));
    }
    needs
}

/// A module's name, of which the file's is a form.
fn name_of(path: &Path) -> String {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let name = file.split('.').next().unwrap_or_default();
    name.replace('-', "_")
}

fn collect(directory: &Path, found: &mut BTreeMap<String, PathBuf>) -> Result<(), HostError> {
    let list = || format!("list {}", directory.display());
    for entry in fs::read_dir(directory).map_err(failed(list()))? {
        let path = entry.map_err(failed(list()))?.path();
        if path.is_dir() {
            collect(&path, found)?;
        } else {
            found.insert(name_of(&path), path);
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>, HostError> {
    if path.extension().is_some_and(|extension| extension == "xz") {
        let plain = path.with_extension("");
        if !plain.exists() {
            succeed(Command::new("xz").args(["-d", "-k"]).arg(path))?;
        }
        return read(&plain);
    }
    fs::read(path).map_err(failed(format!("read {}", path.display())))
}

/// The one entry of a directory whose name begins so.
fn only(directory: &Path, beginning: &str) -> Result<PathBuf, HostError> {
    let entries =
        fs::read_dir(directory).map_err(failed(format!("list {}", directory.display())))?;
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let is_right = |path: &PathBuf| name_begins(path, beginning);
    let found = paths.filter(is_right).max();
    found.ok_or_else(|| HostError(format!("{} is empty", directory.display())))
}

fn name_begins(path: &Path, beginning: &str) -> bool {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().starts_with(beginning)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_module_needs_is_read_from_it() {
        let module = b"\x7fELF\0license=GPL\0depends=net_failover,virtio\0\xff\xff\0softdep=pre: crc32c post: late\0";
        let expect = [("net_failover", true), ("virtio", true), ("crc32c", false)];
        let expect = expect.map(|(name, is_needed)| (name.to_owned(), is_needed));
        assert_eq!(needs(module), expect);
        assert_eq!(needs(b"depends=\0"), []);
        assert_eq!(
            name_of(Path::new("kernel/drivers/virtio-rng.ko.xz")),
            "virtio_rng"
        );
    }
}
