//! What Cargo knows about the packages: their dependencies, targets and lints.
//!
//! Taken from `cargo metadata`, in which inherited workspace settings are already resolved; the
//! guest programs are a workspace of their own and are asked for separately.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// The manifest of the guest programs' own workspace.
pub const GUEST_PROGRAMS: &str = "guest/programs/Cargo.toml";

/// One package of the project.
#[derive(Clone, Debug, Default)]
pub struct Package {
    /// Its name, `limosa-pages` for example.
    pub name: String,
    /// Its directory, from the root of the project.
    pub directory: String,
    /// The root files of its targets, from the root of the project.
    pub roots: Vec<String>,
    /// Whether it has features that are on by default.
    pub has_default_features: bool,
    /// What it depends on.
    pub dependencies: Vec<Dependency>,
}

/// One dependency of a package.
#[derive(Clone, Debug, Default)]
pub struct Dependency {
    /// Name of the package that is used.
    pub name: String,
    /// Normal, build or development.
    pub kind: Kind,
    /// Whether the default features of the used package are asked for.
    pub uses_default_features: bool,
}

/// When a dependency is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// By the package itself.
    #[default]
    Normal,
    /// By its build script.
    Build,
    /// By its tests.
    Development,
}

/// All packages: those of the workspace, then those of the guest programs.
pub fn packages(root: &Path) -> Result<Vec<Package>> {
    let mut packages = read(root, "Cargo.toml")?;
    if root.join(GUEST_PROGRAMS).exists() {
        packages.extend(read(root, GUEST_PROGRAMS)?);
    }
    Ok(packages)
}

/// The directory where Cargo builds.
pub fn target_directory(root: &Path) -> Result<std::path::PathBuf> {
    let metadata = metadata(root, "Cargo.toml")?;
    let directory = metadata["target_directory"]
        .as_str()
        .context("no target_directory")?;
    Ok(directory.into())
}

fn read(root: &Path, manifest: &str) -> Result<Vec<Package>> {
    let metadata = metadata(root, manifest)?;
    let list = metadata["packages"]
        .as_array()
        .context("cargo metadata lists no packages")?;
    list.iter()
        .map(|package| from_json(root, package))
        .collect()
}

fn metadata(root: &Path, manifest: &str) -> Result<Value> {
    let output = Command::new(cargo())
        .args([
            "metadata",
            "--no-deps",
            "--format-version",
            "1",
            "--manifest-path",
            manifest,
        ])
        .current_dir(root)
        .output()
        .context("cargo metadata could not be started")?;
    ensure!(
        output.status.success(),
        "cargo metadata of {manifest}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    serde_json::from_slice(&output.stdout).context("cargo metadata is no JSON")
}

/// The Cargo that started us, or the one in the path.
pub fn cargo() -> std::ffi::OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

fn from_json(root: &Path, package: &Value) -> Result<Package> {
    let text = |value: &Value| {
        value
            .as_str()
            .map(str::to_owned)
            .context("a text is missing")
    };
    let within = |path: &str| -> Result<String> {
        let path = Path::new(path)
            .strip_prefix(root)
            .context("a file outside of the project")?;
        Ok(path.to_string_lossy().into_owned())
    };
    let manifest = within(&text(&package["manifest_path"])?)?;
    let targets = package["targets"]
        .as_array()
        .context("a package without targets")?;
    let dependencies = package["dependencies"]
        .as_array()
        .context("no list of dependencies")?;
    let defaults = package["features"]["default"].as_array();
    Ok(Package {
        name: text(&package["name"])?,
        directory: manifest
            .trim_end_matches("Cargo.toml")
            .trim_end_matches('/')
            .to_owned(),
        roots: targets
            .iter()
            .map(|target| within(&text(&target["src_path"])?))
            .collect::<Result<_>>()?,
        has_default_features: defaults.is_some_and(|features| !features.is_empty()),
        dependencies: dependencies.iter().map(dependency).collect::<Result<_>>()?,
    })
}

fn dependency(value: &Value) -> Result<Dependency> {
    Ok(Dependency {
        name: value["name"]
            .as_str()
            .context("a dependency without name")?
            .to_owned(),
        kind: match value["kind"].as_str() {
            Some("dev") => Kind::Development,
            Some("build") => Kind::Build,
            _ => Kind::Normal,
        },
        uses_default_features: value["uses_default_features"].as_bool().unwrap_or(true),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_is_read_from_metadata() {
        let json = serde_json::json!({
            "name": "limosa-os",
            "manifest_path": "/p/crates/os/Cargo.toml",
            "features": { "default": ["x"] },
            "targets": [{ "src_path": "/p/crates/os/src/lib.rs" }],
            "dependencies": [
                { "name": "libc", "kind": null, "uses_default_features": false },
                { "name": "proptest", "kind": "dev", "uses_default_features": true },
            ],
        });
        let package = from_json(Path::new("/p"), &json).unwrap();
        assert_eq!(package.directory, "crates/os");
        assert_eq!(package.roots, ["crates/os/src/lib.rs"]);
        assert!(package.has_default_features);
        assert_eq!(package.dependencies[0].kind, Kind::Normal);
        assert!(!package.dependencies[0].uses_default_features);
        assert_eq!(package.dependencies[1].kind, Kind::Development);
    }
}
