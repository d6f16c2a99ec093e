//! Hosts that believe each other, and hosts that have reasons not to.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "certificates/certificates.rs"]
mod certificates;
#[path = "thread_guest/guest.rs"]
#[allow(dead_code, reason = "other tests need it")]
mod thread_guest;

use certificates::{Authority, EXPIRED, LATER, VALID, load};
use limosa_carrier::{
    CA_CERTIFICATE, Compression, Credentials, Demanded, Guest, HOST_CERTIFICATE, HOST_KEY,
    Listener, MigrateRequest, Migration, PushOrder, draw_id,
};
use limosa_engine::handover::{MigrationId, Phase, Resolution};
use limosa_engine::policy::{Limits, Mode};
use limosa_engine::report::{MigrationReport, Outcome};
use limosa_engine::source::Stage;
use limosa_engine::wire::{ControlFrame, Preamble, Role};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme, StreamOwned};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use thread_guest::{ThreadGuest, ThreadHost};

const PATIENCE: Duration = Duration::from_secs(60);

fn listen(credentials: Option<&Arc<Credentials>>) -> (Arc<ThreadHost>, Listener) {
    let host = Arc::new(ThreadHost::default());
    let address = "127.0.0.1:0".parse().unwrap();
    let listener = Listener::bind(address, host.clone(), credentials.cloned()).unwrap();
    (host, listener)
}

fn migrate(
    guest: &Arc<ThreadGuest>,
    peer: String,
    mode: Mode,
    compression: Compression,
    credentials: Option<&Arc<Credentials>>,
) -> MigrationReport {
    let request = MigrateRequest {
        id: draw_id().unwrap(),
        peer,
        mode,
        limits: Limits {
            downtime_max: Duration::from_millis(20),
            ..Limits::default()
        },
        streams: 2,
        verify: true,
        copy_disks: false,
        link: None,
        compression,
        push_order: PushOrder::default(),
        demanded: Demanded::default(),
        credentials: credentials.cloned(),
    };
    let source: Arc<dyn Guest> = guest.clone();
    let migration = Migration::start(source, request, None, Box::new(|_| {})).unwrap();
    assert_eq!(migration.is_encrypted(), credentials.is_some());
    let end = Instant::now() + PATIENCE;
    while mode == Mode::Demand && migration.status().stage != Stage::Serving {
        assert!(Instant::now() < end, "the guest runs at the target");
        std::thread::sleep(Duration::from_millis(1));
    }
    if mode == Mode::Demand {
        migration.set_mode(Mode::PostCopy).unwrap();
    }
    migration.wait(PATIENCE).expect("a migration ends")
}

#[test]
fn every_mode_moves_a_busy_guest_whole() {
    let authority = Authority::new("test");
    let source = authority.host(&["source.example"], VALID);
    let target = authority.host(&["localhost", "127.0.0.1"], VALID);
    for (mode, compression) in Mode::ALL
        .into_iter()
        .flat_map(|mode| [Compression::Off, Compression::On].map(|compression| (mode, compression)))
    {
        let (host, listener) = listen(Some(&target));
        let guest = ThreadGuest::new(8192, 3000, true);
        let peer = listener.local_addr().to_string();
        let report = migrate(&guest, peer, mode, compression, Some(&source));
        assert_eq!(report.outcome, Some(Outcome::Completed), "{mode}");
        assert_eq!(report.digest_equal, Some(true), "{mode}");
        let arrived = host.guests.lock().unwrap()[0].1.clone();
        assert_eq!(arrived.sweep(), 0, "{mode}");
        assert_eq!(arrived.errors.load(Ordering::SeqCst), 0, "{mode}");
    }
}

type Maybe<'a> = Option<&'a Arc<Credentials>>;

/// A migration between such hosts fails for this reason, and was not even begun at the target.
fn check_refusal(source: Maybe<'_>, target: Maybe<'_>, expect: &str) {
    let (host, listener) = listen(target);
    let guest = ThreadGuest::new(1024, 500, true);
    let peer = listener.local_addr().to_string();
    let report = migrate(&guest, peer, Mode::PreCopy, Compression::Off, source);
    match &report.outcome {
        Some(Outcome::Failed { reason }) => assert!(reason.contains(expect), "{reason}"),
        other => panic!("expected {expect:?}, got {other:?}"),
    }
    assert!(guest.runs());
    assert_eq!(guest.phase(), Phase::Running);
    assert!(host.guests.lock().unwrap().is_empty(), "nothing was begun");
}

#[test]
fn a_target_that_is_not_believed_is_told_and_the_guest_runs_on() {
    let (authority, stranger) = (Authority::new("test"), Authority::new("stranger"));
    let source = authority.host(&["a"], VALID);
    let check = |authority: &Authority, names: &[&str], validity, expect: &str| {
        let target = authority.host(names, validity);
        check_refusal(Some(&source), Some(&target), expect);
    };
    let elsewhere = ["b.example", "192.0.2.1"];
    let expect = "it is not for 127.0.0.1, but for b.example, 192.0.2.1";
    check(&authority, &elsewhere, VALID, expect);
    let expect = "signed by another authority than the one in ca.pem";
    check(&stranger, &["127.0.0.1"], VALID, expect);
    let expect = "the certificate of the other side is refused: it expired 3 days ago";
    check(&authority, &["127.0.0.1"], EXPIRED, expect);
    check(&authority, &["127.0.0.1"], LATER, "it is not valid yet");
    let expect = "the other side does not speak TLS: start it with --tls";
    check_refusal(Some(&source), None, expect);
    let expect = "speaks TLS only: start this host with --tls";
    check_refusal(None, Some(&source), expect);
}

#[test]
fn a_source_that_is_not_believed_is_told_and_the_guest_runs_on() {
    let (authority, stranger) = (Authority::new("test"), Authority::new("stranger"));
    let target = authority.host(&["127.0.0.1"], VALID);
    let source = authority.host(&["a"], EXPIRED);
    let expect = "the other side refused the certificate of this host: it has expired";
    check_refusal(Some(&source), Some(&target), expect);
    // It believes the target, but not the other way round.
    let (directory, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    authority.write(other.path(), &["a"], VALID);
    stranger.write(directory.path(), &["a"], VALID);
    let both = [directory.path(), other.path()]
        .map(|path| fs::read_to_string(path.join(CA_CERTIFICATE)).unwrap());
    fs::write(directory.path().join(CA_CERTIFICATE), both.concat()).unwrap();
    let source = Arc::new(load(directory.path()).unwrap());
    let expect = "refused the certificate of this host: it was signed by another authority";
    check_refusal(Some(&source), Some(&target), expect);
}

/// Believes everything, which only a peer that is up to something would.
#[derive(Debug)]
struct Gullible;

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

type Stranger = StreamOwned<rustls::ClientConnection, TcpStream>;

/// Speaks TLS as others do, with the certificate in `directory` or none.
fn stranger(listener: &Listener, directory: Option<&Path>) -> Stranger {
    let builder = ClientConfig::builder()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible));
    let config = match directory {
        None => builder.with_no_client_auth(),
        Some(directory) => {
            let certificate = CertificateDer::from_pem_file(directory.join(HOST_CERTIFICATE));
            let key = PrivateKeyDer::from_pem_file(directory.join(HOST_KEY));
            builder
                .with_client_auth_cert(vec![certificate.unwrap()], key.unwrap())
                .unwrap()
        }
    };
    let name = "localhost".try_into().unwrap();
    let session = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let socket = TcpStream::connect(listener.local_addr()).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    StreamOwned::new(session, socket)
}

fn resolve(stream: &mut Stranger) -> std::io::Result<Vec<u8>> {
    let preamble = Preamble {
        migration: MigrationId(7),
        role: Role::Resolve,
        generation: 0,
    };
    stream.write_all(&preamble.encode())?;
    stream.write_all(&ControlFrame::Resolve.encode())?;
    answer(stream)
}

fn answer(stream: &mut Stranger) -> std::io::Result<Vec<u8>> {
    let mut length = [0; 4];
    stream.read_exact(&mut length)?;
    let mut body = vec![0; u32::from_le_bytes(length) as usize];
    stream.read_exact(&mut body)?;
    Ok(body)
}

#[test]
fn only_who_shows_a_good_certificate_is_heard() {
    let (authority, other) = (Authority::new("test"), Authority::new("other"));
    let (_host, listener) = listen(Some(&authority.host(&["127.0.0.1"], VALID)));
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let check = |is_heard: bool, of: Option<&Path>, what: &str| {
        let heard = resolve(&mut stranger(&listener, of));
        assert_eq!(heard.is_ok(), is_heard, "{what}: {heard:?}");
    };
    check(false, None, "no certificate");
    other.write(directory, &["a"], VALID);
    check(false, Some(directory), "another authority");
    authority.write(directory, &["a"], EXPIRED);
    check(false, Some(directory), "expired");
    authority.write(directory, &["a"], VALID);
    check(true, Some(directory), "good");
    let barred = ControlFrame::Resolved(Resolution::Barred).encode();
    let heard = resolve(&mut stranger(&listener, Some(directory))).unwrap();
    assert_eq!(heard, barred[4..]);
}

#[test]
fn garbage_after_the_handshake_is_refused_in_words() {
    let authority = Authority::new("test");
    let (_host, listener) = listen(Some(&authority.host(&["127.0.0.1"], VALID)));
    let directory = tempfile::tempdir().unwrap();
    authority.write(directory.path(), &["a"], VALID);
    let mut stream = stranger(&listener, Some(directory.path()));
    stream.write_all(&[b'x'; 32]).unwrap();
    let said = answer(&mut stream).unwrap();
    let frame = ControlFrame::decode(&said).unwrap();
    assert!(matches!(frame, ControlFrame::Refuse { .. }), "{frame:?}");
    // So is half a preamble, once it is clear that no more of it comes.
    let mut stream = stranger(&listener, Some(directory.path()));
    stream.write_all(b"LIMOSA").unwrap();
    stream.conn.send_close_notify();
    stream.flush().unwrap();
    let frame = ControlFrame::decode(&answer(&mut stream).unwrap()).unwrap();
    assert!(matches!(frame, ControlFrame::Refuse { .. }), "{frame:?}");
    // The listener serves others as before.
    let mut stream = stranger(&listener, Some(directory.path()));
    resolve(&mut stream).unwrap();
}

#[test]
fn files_that_do_not_go_together_are_named() {
    let (authority, other) = (Authority::new("test"), Authority::new("other"));
    let check = |spoil: &dyn Fn(&Path), expect: &str| {
        let directory = tempfile::tempdir().unwrap();
        authority.write(directory.path(), &["a"], VALID);
        spoil(directory.path());
        let error = load(directory.path()).unwrap_err().to_string();
        let error = error.replace(&directory.path().display().to_string(), "DIR");
        assert_eq!(error, expect);
    };
    let write = |path: std::path::PathBuf, text: &str| fs::write(path, text).unwrap();
    check(
        &|dir| fs::remove_file(dir.join(HOST_KEY)).unwrap(),
        "cannot read DIR/host.key",
    );
    check(
        &|dir| write(dir.join(HOST_KEY), "secret"),
        "DIR/host.key has no private key in PEM form",
    );
    check(
        &|dir| {
            write(
                dir.join(HOST_KEY),
                "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
            );
        },
        "DIR/host.key is broken: unexpected error: failed to parse private key as RSA, ECDSA, or EdDSA",
    );
    check(
        &|dir| write(dir.join(CA_CERTIFICATE), ""),
        "DIR/ca.pem has no certificate in PEM form",
    );
    check(
        &|dir| write(dir.join(HOST_CERTIFICATE), &"x".repeat(2 << 20)),
        "DIR/host.pem is far too long for certificates in PEM form",
    );
    check(
        &|dir| {
            let open = fs::Permissions::from_mode(0o604);
            fs::set_permissions(dir.join(HOST_KEY), open).unwrap();
        },
        "DIR/host.key can be read by every user: 'chmod 600 DIR/host.key'",
    );
    let swap = |dir: &Path, file: &str, from: &Authority| {
        let elsewhere = tempfile::tempdir().unwrap();
        from.write(elsewhere.path(), &["a"], VALID);
        fs::copy(elsewhere.path().join(file), dir.join(file)).unwrap();
    };
    check(
        &|dir| swap(dir, HOST_KEY, &authority),
        "DIR/host.key does not belong to DIR/host.pem",
    );
    check(
        &|dir| swap(dir, CA_CERTIFICATE, &other),
        "DIR/ca.pem does not vouch for DIR/host.pem: it was signed by another authority than the \
         one in ca.pem",
    );
}
