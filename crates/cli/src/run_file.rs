//! A virtual machine in a TOML file: what could be given as options, by their names.
//!
//! ```toml
//! name = "web"
//! kernel = "vmlinuz"
//! initrd = "initrd.img"
//! cmdline = "console=ttyS0 root=/dev/vda"
//! memory = "1G"
//! vcpus = 2
//! disk = ["web.raw", "tools.raw,ro"]
//! net = ["tap0,mac=52:54:00:12:34:56"]
//! ```
//!
//! The file is read as if its options had been typed: what an option takes, and what it says to what it
//! does not take, is the same.

use crate::arguments::{Disk, Run};
use anyhow::{Context, Result, bail};
use clap::{Args, Command, FromArgMatches};
use std::fs;
use std::path::Path;
use toml::{Table, Value};

/// Largest file that is read.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// Reads what machine a file describes. Its paths are relative to it.
pub(crate) fn read(path: &Path) -> Result<Run> {
    let cannot = || format!("cannot read {}", path.display());
    let file = fs::metadata(path).with_context(cannot)?;
    if !file.is_file() || file.len() > FILE_BYTES_MAX {
        bail!("{} is no description of a virtual machine", path.display());
    }
    let text = fs::read_to_string(path).with_context(cannot)?;
    let mut run = parse(&text).with_context(|| format!("in {}", path.display()))?;
    let place = path.parent().unwrap_or(Path::new(""));
    for file in [&mut run.kernel, &mut run.initrd].into_iter().flatten() {
        *file = place.join(&*file);
    }
    for Disk(disk) in &mut run.disk {
        disk.path = place.join(&disk.path).display().to_string();
    }
    if let Some(micro) = run.micro.as_mut().filter(|micro| micro.contains('/')) {
        *micro = place.join(&*micro).display().to_string();
    }
    Ok(run)
}

fn parse(text: &str) -> Result<Run> {
    let table: Table = text.parse()?;
    let mut words = vec!["run".to_owned()];
    for (key, value) in &table {
        let values = match value {
            Value::Array(values) => values.as_slice(),
            value => std::slice::from_ref(value),
        };
        for value in values {
            words.extend(word(key, value)?);
        }
    }
    let command = Run::augment_args(Command::new("run"));
    let typed = command.try_get_matches_from(words);
    let run = typed.and_then(|matches| Run::from_arg_matches(&matches));
    // Without the advice to ask for help, which would be about the command.
    run.map_err(|error| {
        let text = error.to_string();
        let first = text.split("\n\n").next().unwrap_or_default();
        anyhow::anyhow!("{}", first.trim_start_matches("error: ").trim())
    })
}

/// The option that a key and its value stand for.
fn word(key: &str, value: &Value) -> Result<Option<String>> {
    if key == "config" {
        bail!("a description does not name another one");
    }
    let value = match value {
        Value::Boolean(true) => return Ok(Some(format!("--{key}"))),
        Value::Boolean(false) => return Ok(None),
        Value::String(text) => text.clone(),
        Value::Integer(number) => number.to_string(),
        _ => bail!("'{key}' is a text, a number, true or false, or a list of these"),
    };
    Ok(Some(match key {
        "name" => value,
        _ => format!("--{key}={value}"),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expect: &str) {
        let shown = match parse(text) {
            Ok(run) => format!(
                "{:?} {:?} {} {} {} {:?}",
                run.name,
                run.kernel,
                run.memory.bytes(),
                run.vcpus,
                run.huge_pages,
                run.disk.len()
            ),
            Err(error) => format!("{error:#}"),
        };
        assert!(shown.starts_with(expect), "{shown}");
    }

    #[test]
    fn a_file_says_what_options_say() {
        check(
            "name = 'web'\nkernel = 'k'\nmemory = '1G'\nvcpus = 2\nhuge-pages = true\ndisk = ['a', 'b,ro']",
            "Some(\"web\") Some(\"k\") 1073741824 2 true 2",
        );
        check(
            "name = 'web'\nmicro = 'idle'\nhuge-pages = false",
            "Some(\"web\") None 268435456 1 false 0",
        );
        check(
            "kernel = 'k'",
            "the following required arguments were not provided",
        );
        check(
            "name = 'web'",
            "the following required arguments were not provided",
        );
        check(
            "name = 'web'\nkernel = 'k'\nmemory = 'big'",
            "invalid value 'big' for '--memory <SIZE>'",
        );
        check(
            "name = 'web'\nkernel = 'k'\ndiks = 'a'",
            "unexpected argument '--diks' found",
        );
        check("name = 'web'\nkernel = 1.5", "'kernel' is a text");
        check(
            "name = 'web'\nconfig = 'x'",
            "a description does not name another one",
        );
        check("name", "TOML parse error");
    }
}
