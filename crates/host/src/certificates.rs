//! Makes what hosts show to each other: an authority, and certificates that it signs.
//!
//! ```text
//!  limosa cert ca    DIR/ca.pem  DIR/ca.key       once; the key stays where it was made
//!  limosa cert host  DIR/ca.pem  DIR/host.pem  DIR/host.key       for each host
//! ```
//!
//! Nothing is ever overwritten: a key that is gone cannot be had again. Whoever has an authority of
//! their own needs none of this; a host takes any certificates in PEM form.

use anyhow::{Context, Result, bail};
use limosa_carrier::{CA_CERTIFICATE, Credentials, HOST_CERTIFICATE, HOST_KEY};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// File with the private key of the authority.
pub const CA_KEY: &str = "ca.key";
/// How long an authority is good for when nothing is said: ten years.
pub const CA_DAYS: u32 = 3650;
/// How long a host is good for when nothing is said: a year, and a day to notice.
pub const HOST_DAYS: u32 = 366;
/// A century: beyond it no clock is meant.
pub const DAYS_MAX: u32 = 36_500;
/// Names in one certificate.
const NAMES_MAX: usize = 100;
/// Certificates begin this long ago, since clocks of hosts differ.
const BEGINS_BEFORE: Duration = Duration::from_secs(86_400);
const DAY: Duration = Duration::from_secs(86_400);

/// Makes an authority in `directory`. Returns the files.
///
/// # Errors
/// One line: there is one already, or the place cannot be written.
pub fn make_authority(directory: &Path, days: u32) -> Result<Vec<PathBuf>> {
    let [certificate, private] = [CA_CERTIFICATE, CA_KEY].map(|file| directory.join(file));
    check_absent(&[&certificate, &private])?;
    let key = KeyPair::generate().context("cannot make a key")?;
    let mut params = authority(&key);
    (params.not_before, params.not_after) = validity(days);
    let signed = params.self_signed(&key).context("cannot sign")?;
    make_directory(directory)?;
    write_new(&private, &key.serialize_pem(), 0o600)?;
    write_new(&certificate, &signed.pem(), 0o644)?;
    Ok(vec![certificate, private])
}

/// Makes the certificate and the key of a host that is reached by `names`, signed by the authority in
/// `authority_directory`. Returns the files in `directory`.
///
/// # Errors
/// One line: a name is none, there is a certificate already, no authority is there, or the place cannot
/// be written.
pub fn make_host(
    authority_directory: &Path,
    directory: &Path,
    names: &[String],
    days: u32,
) -> Result<Vec<PathBuf>> {
    check_names(names)?;
    let [ca, certificate, private] =
        [CA_CERTIFICATE, HOST_CERTIFICATE, HOST_KEY].map(|file| directory.join(file));
    let authority_certificate = read_authority(&authority_directory.join(CA_CERTIFICATE))?;
    let authority_key = read_authority(&authority_directory.join(CA_KEY))?;
    let is_same = authority_directory.canonicalize().ok() == directory.canonicalize().ok()
        && directory.exists();
    check_absent(&[&certificate, &private])?;
    if !is_same && fs::read_to_string(&ca).is_ok_and(|found| found != authority_certificate) {
        bail!(
            "{} is of another authority: give --out another directory, or remove it",
            ca.display()
        );
    }
    let authority_key = KeyPair::from_pem(&authority_key).with_context(|| {
        let path = authority_directory.join(CA_KEY);
        format!("{} has no key that can be used", path.display())
    })?;
    let issuer = Issuer::new(authority(&authority_key), authority_key);
    let key = KeyPair::generate().context("cannot make a key")?;
    let signed = host(names, days)?
        .signed_by(&key, &issuer)
        .context("cannot sign")?;
    make_directory(directory)?;
    write_new(&private, &key.serialize_pem(), 0o600)?;
    write_new(&certificate, &signed.pem(), 0o644)?;
    if !ca.exists() {
        write_new(&ca, &authority_certificate, 0o644)?;
    }
    // An authority that was not made here has another name in its certificate.
    if let Err(error) = Credentials::load(directory) {
        for path in [&certificate, &private] {
            fs::remove_file(path).context("cannot remove a certificate that is of no use")?;
        }
        return Err(error).context(
            "this certificate would not be believed: was the authority made by 'limosa cert ca'?",
        );
    }
    Ok(vec![ca, certificate, private])
}

/// The authority of this key. Its name follows from the key, so that two are told apart, and so that
/// it can be made again without taking its certificate apart.
fn authority(key: &KeyPair) -> CertificateParams {
    let mut params = CertificateParams::default();
    let mut name = "limosa CA ".to_owned();
    for byte in &params.key_identifier(key)[..4] {
        write!(name, "{byte:02x}").expect("a string takes any text");
    }
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn host(names: &[String], days: u32) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(names).context("a name cannot be in a certificate")?;
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, names[0].clone());
    (params.not_before, params.not_after) = validity(days);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // It dials and is dialled.
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn validity<Time: From<SystemTime>>(days: u32) -> (Time, Time) {
    let now = SystemTime::now();
    let begins = now.checked_sub(BEGINS_BEFORE).unwrap_or(now);
    (begins.into(), (now + DAY * days).into())
}

/// Names as they stand in `HOST:PORT`, without the port.
fn check_names(names: &[String]) -> Result<()> {
    if names.is_empty() || names.len() > NAMES_MAX {
        bail!("a host has 1 to {NAMES_MAX} names, not {}", names.len());
    }
    for name in names {
        let is_label = |label: &str| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        let is_name = name.len() <= 253 && name.split('.').all(is_label);
        // What looks like an address and is none would be a name that nobody can resolve.
        let is_number = name
            .bytes()
            .all(|byte| byte.is_ascii_digit() || byte == b'.');
        if name.parse::<IpAddr>().is_err() && (!is_name || is_number) {
            bail!(
                "{name:?} is neither a DNS name nor an IP address: give what stands before the port \
                 in 'limosa migrate VM --to HOST:PORT'"
            );
        }
    }
    Ok(())
}

fn check_absent(paths: &[&Path]) -> Result<()> {
    for path in paths {
        if path.symlink_metadata().is_ok() {
            bail!(
                "{} is there already and is not overwritten: remove it, or give another directory",
                path.display()
            );
        }
    }
    Ok(())
}

fn read_authority(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => anyhow::anyhow!(
            "{} is not there: 'limosa cert ca --dir DIR' makes an authority, --ca DIR names its \
             directory",
            path.display()
        ),
        _ => anyhow::Error::new(error).context(format!("cannot read {}", path.display())),
    })
}

fn make_directory(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot make the directory {}", directory.display()))
}

fn write_new(path: &Path, content: &str, mode: u32) -> Result<()> {
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| file.write_all(content.as_bytes()));
    written.with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn names(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn a_host_is_believed_by_its_authority_and_keys_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let (ca, a) = (dir.path().join("ca"), dir.path().join("hosts/a"));
        make_authority(&ca, CA_DAYS).unwrap();
        let made = make_host(&ca, &a, &names("a.example 192.0.2.1 ::1 a"), HOST_DAYS).unwrap();
        let files: Vec<_> = made.iter().filter_map(|path| path.file_name()).collect();
        assert_eq!(files, ["ca.pem", "host.pem", "host.key"]);
        Credentials::load(&a).unwrap();
        for key in [ca.join(CA_KEY), a.join(HOST_KEY)] {
            let mode = fs::metadata(&key).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        assert!(
            !a.join(CA_KEY).exists(),
            "the authority's key stays where it is"
        );
        // Into the authority's own directory, too.
        make_host(&ca, &ca, &names("b"), 1).unwrap();
        Credentials::load(&ca).unwrap();
    }

    #[test]
    fn nothing_is_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let (ca, a) = (dir.path().join("ca"), dir.path().join("a"));
        make_authority(&ca, 1).unwrap();
        make_host(&ca, &a, &names("a"), 1).unwrap();
        let before: Vec<_> = [ca.join(CA_KEY), a.join(HOST_KEY)]
            .map(|path| fs::read(path).unwrap())
            .into();
        for error in [
            make_authority(&ca, 1).unwrap_err(),
            make_host(&ca, &a, &names("a"), 1).unwrap_err(),
        ] {
            let text = error.to_string();
            assert!(text.contains("is not overwritten: remove it"), "{text}");
        }
        let after: Vec<_> = [ca.join(CA_KEY), a.join(HOST_KEY)]
            .map(|path| fs::read(path).unwrap())
            .into();
        assert!(before == after);
        let other = dir.path().join("other");
        make_authority(&other, 1).unwrap();
        fs::remove_file(a.join(HOST_CERTIFICATE)).unwrap();
        fs::remove_file(a.join(HOST_KEY)).unwrap();
        let error = make_host(&other, &a, &names("a"), 1).unwrap_err();
        assert!(error.to_string().contains("another authority"), "{error}");
    }

    #[test]
    fn what_is_no_authority_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let (ca, other, a) = (
            dir.path().join("ca"),
            dir.path().join("other"),
            dir.path().join("a"),
        );
        let error = make_host(&ca, &a, &names("a"), 1).unwrap_err();
        assert!(error.to_string().contains("limosa cert ca"), "{error}");
        make_authority(&ca, 1).unwrap();
        make_authority(&other, 1).unwrap();
        fs::copy(other.join(CA_KEY), ca.join(CA_KEY)).unwrap();
        let error = make_host(&ca, &a, &names("a"), 1).unwrap_err();
        assert!(error.to_string().contains("not be believed"), "{error}");
        assert!(!a.join(HOST_KEY).exists(), "nothing of no use is left");
        fs::write(ca.join(CA_KEY), "no key").unwrap();
        let error = make_host(&ca, &a, &names("a"), 1).unwrap_err();
        assert!(error.to_string().contains("has no key"), "{error}");
    }

    #[test]
    fn names_are_what_stands_before_a_port() {
        let check = |name: &str, is_sound: bool| {
            assert_eq!(check_names(&names(name)).is_ok(), is_sound, "{name:?}");
        };
        for name in ["a", "a-1.example.com", "192.0.2.1", "::1", "2001:db8::7"] {
            check(name, true);
        }
        for name in [
            "",
            "a:7070",
            "-a",
            "a..b",
            "1.2.3",
            "999.1.1.1",
            "[::1]",
            "a/b",
            "*",
        ] {
            check(name, false);
        }
        assert!(check_names(&[]).is_err());
    }
}
