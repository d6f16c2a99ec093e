//! What a host shows to others to be believed, and whom it believes: certificates and a key, read once.
//!
//! A directory has three files in PEM form: `ca.pem`, the authority (or several) that vouches for all
//! hosts; `host.pem`, the certificate of this one, with whatever links it to the authority behind it;
//! `host.key`, its private key. Every connection is mutual TLS 1.3: either side shows a certificate,
//! and whoever dials also checks that it is for the name or address that the operator gave.
//!
//! Deliberately absent: reading the files again, lists of revoked certificates, tickets to resume an
//! earlier connection, TLS 1.2.

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{CertificateError, ClientConfig, RootCertStore, ServerConfig};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// File with the certificate of the authority.
pub const CA_CERTIFICATE: &str = "ca.pem";
/// File with the certificate of a host.
pub const HOST_CERTIFICATE: &str = "host.pem";
/// File with the private key of a host.
pub const HOST_KEY: &str = "host.key";
/// Longest file that is read: hundreds of certificates.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Why the credentials of a directory are of no use.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file is something else than certificates or a key.
    #[error("{} is far too long for {what} in PEM form", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// What should be in it.
        what: &'static str,
    },
    /// Nothing usable is in a file.
    #[error("{} has no {what} in PEM form", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// What should be in it.
        what: &'static str,
    },
    /// What is in a file is broken.
    #[error("{} is broken: {reason}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// In words.
        reason: String,
    },
    /// Others could take the key.
    #[error("{0} can be read by every user: 'chmod 600 {0}'", path.display())]
    Open {
        /// The file.
        path: PathBuf,
    },
    /// Key and certificate are of two hosts.
    #[error("{} does not belong to {}", key.display(), certificate.display())]
    Mismatch {
        /// The key's file.
        key: PathBuf,
        /// The certificate's file.
        certificate: PathBuf,
    },
    /// Nobody who trusts the authority would trust this host.
    #[error(
        "{} does not vouch for {}: {reason}", ca.display(), certificate.display()
    )]
    Unsigned {
        /// The authority's file.
        ca: PathBuf,
        /// The certificate's file.
        certificate: PathBuf,
        /// In words.
        reason: String,
    },
}

/// Both sides' part in every handshake of a daemon.
pub struct Credentials {
    pub(crate) client: Arc<ClientConfig>,
    pub(crate) server: Arc<ServerConfig>,
}

/// Says nothing of what is in it.
impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

impl Credentials {
    /// Reads the three files in `directory`. A certificate that has expired is only warned of: the
    /// daemon has more to do than to migrate.
    ///
    /// # Errors
    /// One line: which file is missing or broken, or does not belong to the others.
    pub fn load(directory: &Path) -> Result<Self, CredentialsError> {
        let [ca, certificate, key] =
            [CA_CERTIFICATE, HOST_CERTIFICATE, HOST_KEY].map(|file| directory.join(file));
        let provider = Arc::new(aws_lc_rs::default_provider());
        let roots = Arc::new(read_roots(&ca)?);
        let chain = read_certificates(&certificate)?;
        let private = read_key(&key)?;
        let client_verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
                .build()
                .map_err(|error| broken(&ca, &error.to_string()))?;
        let unusable = |error| match error {
            rustls::Error::InconsistentKeys(_) => CredentialsError::Mismatch {
                key: key.clone(),
                certificate: certificate.clone(),
            },
            rustls::Error::InvalidCertificate(reason) => broken(&certificate, &describe(&reason)),
            error => broken(&key, &error.to_string()),
        };
        let (own, between) = chain.split_first().expect("read_certificates found one");
        if let Err(error) = client_verifier.verify_client_cert(own, between, UnixTime::now()) {
            check_own(error, &ca, &certificate)?;
        }
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])
            .expect("the provider knows TLS 1.3")
            .with_client_cert_verifier(client_verifier)
            .with_single_cert(chain.clone(), private.clone_key())
            .map_err(&unusable)?;
        server.enable_secret_extraction = true;
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        let mut client = client_builder(&provider, &roots, &ca)?
            .with_client_auth_cert(chain, private)
            .map_err(&unusable)?;
        client.enable_secret_extraction = true;
        client.resumption = Resumption::disabled();
        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
        })
    }
}

type ClientBuilder = rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>;

fn client_builder(
    provider: &Arc<CryptoProvider>,
    roots: &Arc<RootCertStore>,
    ca: &Path,
) -> Result<ClientBuilder, CredentialsError> {
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(provider))
            .build()
            .map_err(|error| broken(ca, &error.to_string()))?;
    Ok(ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&TLS13])
        .expect("the provider knows TLS 1.3")
        .with_webpki_verifier(verifier))
}

/// What is wrong with this host's own certificate: better said at the start than by every peer.
fn check_own(error: rustls::Error, ca: &Path, certificate: &Path) -> Result<(), CredentialsError> {
    use CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext};
    let reason = match error {
        rustls::Error::InvalidCertificate(reason) => reason,
        error => return Err(broken(certificate, &error.to_string())),
    };
    let words = describe(&reason);
    match reason {
        Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. } => {
            tracing::warn!(
                certificate = %certificate.display(),
                reason = words,
                "other hosts will refuse this one"
            );
            Ok(())
        }
        CertificateError::BadEncoding => Err(broken(certificate, &words)),
        _ => Err(CredentialsError::Unsigned {
            ca: ca.to_owned(),
            certificate: certificate.to_owned(),
            reason: words,
        }),
    }
}

/// What is wrong with a certificate, as the end of a sentence that begins with it.
pub(crate) fn describe(error: &CertificateError) -> String {
    use CertificateError as E;
    match error {
        E::Expired => "it has expired".to_owned(),
        E::ExpiredContext { time, not_after } => {
            let days = time.as_secs().saturating_sub(not_after.as_secs()) / 86_400;
            match days {
                0 => "it has expired today".to_owned(),
                1 => "it expired a day ago".to_owned(),
                days => format!("it expired {days} days ago"),
            }
        }
        E::NotValidYet | E::NotValidYetContext { .. } => {
            "it is not valid yet: compare the clocks of the two hosts".to_owned()
        }
        E::UnknownIssuer | E::BadSignature => {
            "it was signed by another authority than the one in ca.pem".to_owned()
        }
        E::NotValidForName => "it is for another name".to_owned(),
        E::NotValidForNameContext {
            expected,
            presented,
        } => {
            let presented: Vec<&str> = presented.iter().map(|name| plain_name(name)).collect();
            format!(
                "it is not for {}, but for {}",
                expected.to_str(),
                presented.join(", ")
            )
        }
        E::InvalidPurpose | E::InvalidPurposeContext { .. } => {
            "it may not be used by both sides of a connection: limosa needs serverAuth and clientAuth"
                .to_owned()
        }
        other => format!("it is not acceptable ({other})"),
    }
}

/// `DnsName("b.example")` and `IpAddress(192.0.2.1)` without what is around the name.
fn plain_name(presented: &str) -> &str {
    let inside = presented
        .split_once('(')
        .map_or(presented, |(_, inside)| inside);
    inside.trim_end_matches(')').trim_matches('"')
}

fn broken(path: &Path, reason: &str) -> CredentialsError {
    CredentialsError::Broken {
        path: path.to_owned(),
        reason: reason.to_owned(),
    }
}

fn read(path: &Path, what: &'static str) -> Result<Vec<u8>, CredentialsError> {
    let failed = |source| CredentialsError::Read {
        path: path.to_owned(),
        source,
    };
    if fs::metadata(path).map_err(failed)?.len() > FILE_BYTES_MAX {
        return Err(CredentialsError::TooLong {
            path: path.to_owned(),
            what,
        });
    }
    fs::read(path).map_err(failed)
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    let bytes = read(path, "certificates")?;
    let certificates: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(&bytes).collect();
    let certificates = certificates.map_err(|error| broken(path, &error.to_string()))?;
    if certificates.is_empty() {
        return Err(CredentialsError::Empty {
            path: path.to_owned(),
            what: "certificate",
        });
    }
    Ok(certificates)
}

fn read_roots(path: &Path) -> Result<RootCertStore, CredentialsError> {
    let mut roots = RootCertStore::empty();
    for certificate in read_certificates(path)? {
        roots
            .add(certificate)
            .map_err(|error| broken(path, &error.to_string()))?;
    }
    Ok(roots)
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, CredentialsError> {
    let bytes = read(path, "a private key")?;
    let mode = fs::metadata(path).map_or(0, |found| found.mode());
    if mode & 0o007 != 0 {
        return Err(CredentialsError::Open {
            path: path.to_owned(),
        });
    }
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| match error {
        pem::Error::NoItemsFound => CredentialsError::Empty {
            path: path.to_owned(),
            what: "private key",
        },
        error => broken(path, &error.to_string()),
    })
}
