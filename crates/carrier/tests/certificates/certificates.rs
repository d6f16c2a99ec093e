//! Authorities and hosts for tests, good and bad ones.

use limosa_carrier::{CA_CERTIFICATE, Credentials, CredentialsError, HOST_CERTIFICATE, HOST_KEY};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Vouches for hosts.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
}

/// Days from which and to which a certificate is valid, from today.
pub const VALID: (i64, i64) = (-1, 30);
pub const EXPIRED: (i64, i64) = (-30, -3);
pub const LATER: (i64, i64) = (2, 30);

impl Authority {
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().pem();
        Self {
            issuer: Issuer::new(params, key),
            certificate,
        }
    }

    /// Writes what a host needs that has these names.
    pub fn write(&self, directory: &Path, names: &[&str], (from, to): (i64, i64)) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.not_before = day(from).into();
        params.not_after = day(to).into();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        fs::write(directory.join(CA_CERTIFICATE), &self.certificate).unwrap();
        fs::write(directory.join(HOST_CERTIFICATE), certificate).unwrap();
        let path = directory.join(HOST_KEY);
        fs::write(&path, key.serialize_pem()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    }

    /// Credentials of a host that has these names.
    pub fn host(&self, names: &[&str], validity: (i64, i64)) -> Arc<Credentials> {
        let directory = tempfile::tempdir().unwrap();
        self.write(directory.path(), names, validity);
        Arc::new(load(directory.path()).unwrap())
    }
}

pub fn load(directory: &Path) -> Result<Credentials, CredentialsError> {
    Credentials::load(directory)
}

fn day(number: i64) -> SystemTime {
    let away = Duration::from_secs(number.unsigned_abs() * 86_400);
    if number < 0 {
        SystemTime::now() - away
    } else {
        SystemTime::now() + away
    }
}
