//! Builds the guest programs and hands their images to the library.
//!
//! They need their own profile and their own way of linking, so this is a cargo of its own: with
//! its own target directory (the outer cargo holds the lock of its own), without the flags and
//! profile variables of the outer build, and with the lock file of the guests, which names what one of
//! them needs from elsewhere.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};
use std::{fs, io};

const PROGRAMS: [&str; 5] = ["writer", "idle", "compute", "kv", "pvh"];
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(lines) => {
            for line in lines.lines() {
                println!("cargo::error={line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    if env::var("TARGET").as_deref() != Ok(TARGET) {
        return Err(format!("micro guests can only be built for {TARGET}"));
    }
    let crate_directory = directory("CARGO_MANIFEST_DIR")?;
    let repository = crate_directory
        .ancestors()
        .nth(2)
        .ok_or("this crate lies in crates/ of its repository")?;
    watch(repository);
    let out = directory("OUT_DIR")?;
    let output = cargo(repository, &out)
        .output()
        .map_err(|error| format!("cannot run cargo for the guest programs: {error}"))?;
    check(&output)?;
    for program in PROGRAMS {
        let image = out.join("guest").join(TARGET).join("release").join(program);
        copy(&image, &out.join(program))
            .map_err(|error| format!("cannot take {}: {error}", image.display()))?;
    }
    Ok(())
}

fn directory(variable: &str) -> Result<PathBuf, String> {
    env::var_os(variable)
        .map(PathBuf::from)
        .ok_or_else(|| format!("cargo sets {variable}"))
}

/// Everything that the images follow from.
fn watch(repository: &Path) {
    let guest = repository.join("guest");
    println!("cargo::rerun-if-changed=build.rs");
    for path in [
        "abi/Cargo.toml",
        "abi/src",
        "programs/Cargo.toml",
        "programs/Cargo.lock",
        "programs/build.rs",
        "programs/link.ld",
        "programs/pvh.ld",
        "programs/src",
        "programs/logic/Cargo.toml",
        "programs/logic/src",
    ] {
        println!("cargo::rerun-if-changed={}", guest.join(path).display());
    }
    // The guest crate that both sides share takes its edition and version from here.
    let workspace = repository.join("Cargo.toml");
    println!("cargo::rerun-if-changed={}", workspace.display());
}

fn cargo(repository: &Path, out: &Path) -> Command {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .args(["build", "--release", "--locked", "--bins"])
        .args(["--target", TARGET])
        .arg("--target-dir")
        .arg(out.join("guest"))
        .current_dir(repository.join("guest").join("programs"));
    for (variable, _) in env::vars_os() {
        if is_of_the_outer_build(&variable) {
            command.env_remove(variable);
        }
    }
    // Set, it also keeps flags of configuration files out. An image shall not depend on where the
    // repository lies.
    let remap = format!("--remap-path-prefix={}=limosa", repository.display());
    command.env("CARGO_ENCODED_RUSTFLAGS", remap);
    command
}

/// Whether a variable says how the outer build is done. What says how to reach a registry, and
/// where cargo keeps its files, is left alone.
fn is_of_the_outer_build(variable: &OsStr) -> bool {
    const KEPT: [&str; 6] = [
        "CARGO_HOME",
        "CARGO_HTTP_",
        "CARGO_NET_",
        "CARGO_REGISTR",
        "CARGO_SOURCE_",
        "CARGO_TERM_",
    ];
    const CLEARED: [&str; 5] = [
        "RUSTFLAGS",
        "RUSTC_WRAPPER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTC_BOOTSTRAP",
        "CARGO",
    ];
    let Some(name) = variable.to_str() else {
        return false;
    };
    CLEARED.contains(&name)
        || name.starts_with("CARGO_") && !KEPT.iter().any(|kept| name.starts_with(kept))
}

fn check(output: &Output) -> Result<(), String> {
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("the guest programs do not build:\n{said}"))
}

/// Copies only what is different, so that the library is not built again for nothing.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let image = fs::read(from)?;
    if fs::read(to).is_ok_and(|old| old == image) {
        return Ok(());
    }
    fs::write(to, image)
}
