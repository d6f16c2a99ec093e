//! The binary under test: `limosa`, built with the profile of the tests and beside them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The path of `limosa`. The first call of a process builds it; `LIMOSA_E2E_BINARY` names one that
/// is there already.
///
/// # Panics
/// If it cannot be built.
pub fn limosa() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| match std::env::var_os("LIMOSA_E2E_BINARY") {
        Some(path) => path.into(),
        None => build(),
    })
}

/// Cargo builds binaries for the tests of their own package only; so the build is asked for here.
/// Its lock on the target directory is free while tests run.
fn build() -> PathBuf {
    // <target>/<profile>/deps/<test>
    let test = std::env::current_exe().expect("the test's own file");
    let profile_dir = test
        .ancestors()
        .nth(2)
        .expect("a test lies in deps")
        .to_owned();
    let target = profile_dir.parent().expect("profiles lie in a target");
    let profile = match profile_dir.file_name().and_then(|name| name.to_str()) {
        Some("debug") => "dev",
        Some(name) => name,
        None => panic!("{} is no directory of a profile", profile_dir.display()),
    };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--quiet", "-p", "limosa-cli", "--profile", profile])
        .arg("--target-dir")
        .arg(target)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
        .status()
        .expect("cargo can be started");
    assert!(status.success(), "the binary cannot be built");
    profile_dir.join("limosa")
}
