//! Two ends of a connection on the loopback, plain and encrypted, that do what they should and what
//! they should not. Who is believed is tested from outside, in `tests/encrypted.rs`.

use super::handshake::HandshakeError;
use super::*;
use crate::credentials::Credentials;
use limosa_os::PageKind;
use limosa_pages::{ByteCount, PAGE_SIZE, PageCount, Pfn};
use std::net::TcpListener;
use std::thread;

#[path = "../../tests/certificates/certificates.rs"]
#[allow(dead_code, reason = "other tests need it")]
mod certificates;
use certificates::{Authority, EXPIRED, VALID};

const LIMIT: Duration = Duration::from_secs(5);

fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

fn localhost() -> rustls::pki_types::ServerName<'static> {
    "127.0.0.1".try_into().unwrap()
}

type Ends = (
    Result<Channel, HandshakeError>,
    Result<Channel, HandshakeError>,
);

fn shake(source: &Credentials, target: &Credentials) -> Ends {
    let (near, far) = sockets();
    thread::scope(|scope| {
        let target = scope.spawn(|| handshake::accept(far, target, LIMIT));
        let source = handshake::connect(near, localhost(), source, LIMIT);
        (source, target.join().unwrap().map_err(|(error, _)| error))
    })
}

/// Both ends of an encrypted connection.
fn encrypted() -> (Channel, Channel) {
    let authority = Authority::new("test");
    let host = authority.host(&["127.0.0.1"], VALID);
    let (source, target) = shake(&host, &host);
    (source.unwrap(), target.unwrap())
}

fn plain() -> (Channel, Channel) {
    let (near, far) = sockets();
    (Channel::plain(near), Channel::plain(far))
}

/// Bytes that tell their place.
fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| (at.wrapping_mul(2_654_435_761) >> 7) as u8)
        .collect()
}

/// Writes in pieces of all sizes, and reads it back in others.
fn exchange(mut writer: Writer, mut reader: Reader) {
    let bytes = pattern(9 << 20);
    let expect = bytes.clone();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut rest = &bytes[..];
            for size in [1, 5, 4096, 16_383, 16_384, 16_385, 100_000, 3 << 20]
                .into_iter()
                .cycle()
            {
                let (now, later) = rest.split_at(size.min(rest.len()));
                writer.write_all(now).unwrap();
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
        });
        let mut read = 0;
        for size in [3, 16, 70_000, 16_384].into_iter().cycle() {
            let mut into = vec![0; size.min(expect.len() - read)];
            reader.read_exact(&mut into).unwrap();
            assert!(into == expect[read..read + into.len()], "at {read}");
            read += into.len();
            if read == expect.len() {
                break;
            }
        }
    });
}

#[test]
fn halves_work_in_threads_of_their_own() {
    for (near, far) in [plain(), encrypted()] {
        thread::scope(|scope| {
            scope.spawn(|| exchange(near.writer, far.reader));
            exchange(far.writer, near.reader);
        });
    }
}

#[test]
fn pages_go_from_memory_to_memory() {
    const PAGES: u64 = 5000;
    let memory =
        || SharedMemory::create(ByteCount::new(PAGES * PAGE_SIZE), PageKind::Small).unwrap();
    let source = memory();
    let content = pattern((PAGES * PAGE_SIZE) as usize);
    source.write_at(0, &content).unwrap();
    let part = |first, count| {
        let range = PageRange::new(Pfn::new(first), PageCount::new(count));
        (7u64.to_le_bytes(), Some(range))
    };
    for (mut near, mut far) in [plain(), encrypted()] {
        let target = memory();
        let parts: Vec<_> = (0..PAGES / 50)
            .map(|index| part(index * 50, 50))
            .chain([part(0, 1), (7u64.to_le_bytes(), None)])
            .collect();
        thread::scope(|scope| {
            scope.spawn(|| near.writer.send_parts(&source, &parts).unwrap());
            for (_, pages) in &parts {
                let mut header = [0; 8];
                far.reader.read_exact(&mut header).unwrap();
                assert_eq!(u64::from_le_bytes(header), 7);
                if let Some(range) = pages {
                    let length = range.bytes().get() as usize;
                    let offset = range.first.file_offset();
                    far.reader.receive(&target, offset, length).unwrap();
                }
            }
        });
        let mut arrived = vec![0; content.len()];
        target.read_at(0, &mut arrived).unwrap();
        assert!(arrived == content);
        let beyond = part(PAGES - 1, 2);
        assert!(near.writer.send_parts(&source, &[beyond]).is_err());
    }
}

#[test]
fn keys_are_replaced_before_they_have_sealed_too_much() {
    let (mut near, mut far) = encrypted();
    near.writer
        .sealer
        .as_mut()
        .unwrap()
        .limit_records_per_key(3);
    exchange(near.writer, far.reader);
    far.writer.write_all(b"x").unwrap();
    near.reader.read_exact(&mut [0]).unwrap();
}

#[test]
fn a_key_that_the_other_side_asks_for_is_given_at_once() {
    let (mut near, mut far) = encrypted();
    for _ in 0..5 {
        near.writer.write_all(b"y").unwrap();
    }
    let sealed = |writer: &Writer| writer.sealer.as_ref().unwrap().records_of_key();
    assert_eq!(sealed(&near.writer), 5);
    far.writer.sealer.as_mut().unwrap().ask_for_key_update();
    far.writer.write_all(b"x").unwrap();
    near.reader.read_exact(&mut [0]).unwrap();
    near.writer.write_all(b"z").unwrap();
    assert_eq!(sealed(&near.writer), 1);
    let mut said = [0; 6];
    far.reader.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"yyyyyz");
    exchange(near.writer, far.reader);
    exchange(far.writer, near.reader);
}

/// Without the target's greeting the source would take this connection for a good one.
#[test]
fn a_source_knows_that_it_is_not_believed_before_it_says_anything() {
    let authority = Authority::new("test");
    let target = authority.host(&["127.0.0.1"], VALID);
    let (source, target) = shake(&authority.host(&["a"], EXPIRED), &target);
    let (source, target) = (source.unwrap_err(), target.unwrap_err());
    let source = source.to_string();
    assert!(
        source.contains("refused the certificate of this host: it has expired"),
        "{source}"
    );
    let target = target.to_string();
    assert!(target.contains("it expired 3 days ago"), "{target}");
}

#[test]
fn a_connection_is_closed_from_another_thread() {
    for (near, far) in [plain(), encrypted()] {
        let handle = near.handle();
        let mut reader = near.reader;
        let waits = thread::spawn(move || reader.read_exact(&mut [0; 10]));
        let mut writer = near.writer;
        let sends = thread::spawn(move || {
            // Nobody reads: it stands until the connection is closed.
            let bytes = vec![1; 64 << 20];
            writer.write_all(&bytes)
        });
        thread::sleep(Duration::from_millis(20));
        handle.close();
        assert!(waits.join().unwrap().is_err());
        assert!(sends.join().unwrap().is_err());
        drop(far);
    }
}

#[test]
fn what_is_cut_off_is_an_error_and_no_end() {
    let check = |sent: usize| {
        let (mut near, mut far) = encrypted();
        near.writer.write_all(&pattern(40_000)).unwrap();
        near.handle().0.shutdown(Shutdown::Write).unwrap();
        far.reader.read_exact(&mut vec![0; sent]).unwrap();
        let mut rest = Vec::new();
        let error = far.reader.read_to_end(&mut rest).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(rest.len(), 40_000 - sent);
    };
    check(0);
    check(39_999);
    check(40_000);
}

#[test]
fn what_was_not_sealed_is_not_opened() {
    let check = |bytes: &[u8], expect: &str| {
        let (near, mut far) = encrypted();
        (&*near.handle().0).write_all(bytes).unwrap();
        near.handle().0.shutdown(Shutdown::Write).unwrap();
        let error = far.reader.read(&mut [0; 10]).unwrap_err();
        let text = crate::connection::in_words(&error);
        assert!(text.contains(expect), "{text}");
    };
    check(b"LIMOSA\r\n", "not encrypted");
    check(&[23, 3, 3, 0, 20], "the other side closed it");
    check(&[23, 3, 3, 0xff, 0xff], "no possible length");
    let mut forged = vec![23, 3, 3, 0, 40];
    forged.extend_from_slice(&[0; 40]);
    check(&forged, "damaged");
    check(&[23, 3, 3, 0, 3, 1, 2, 3], "damaged");
}

#[test]
fn a_peer_that_does_not_speak_tls_is_told_from_one_that_does() {
    let host = Authority::new("test").host(&["127.0.0.1"], VALID);
    let check = |bytes: &[u8], is_source: bool, expect: &str| {
        let (near, mut far) = sockets();
        far.write_all(bytes).unwrap();
        far.shutdown(Shutdown::Write).unwrap();
        let error = if is_source {
            handshake::accept(near, &host, LIMIT).unwrap_err().0
        } else {
            handshake::connect(near, localhost(), &host, LIMIT).unwrap_err()
        };
        let text = error.to_string();
        assert!(text.contains(expect), "{bytes:?}: {text}");
    };
    check(b"LIMOSA\r\n then some", true, "does not speak TLS");
    check(&[8, 0, 0, 0, 2, 6, 1, 1], false, "does not speak TLS");
    check(b"SSH-2.0", true, "handshake failed");
    check(&[], true, "does it run with --tls?");
    check(&[], false, "does it run with --tls?");
    check(&[22, 3, 1, 0, 200, 1], true, "does it run with --tls?");
    check(&[21, 3, 3, 0, 2, 2, 48], false, "another authority");
}

#[test]
fn a_silent_peer_is_given_up_in_time() {
    let host = Authority::new("test").host(&["127.0.0.1"], VALID);
    let (near, far) = sockets();
    let begun = std::time::Instant::now();
    let error = handshake::accept(near, &host, Duration::from_millis(50)).unwrap_err();
    assert!(error.0.to_string().contains("kept silent"), "{}", error.0);
    assert!(begun.elapsed() < LIMIT);
    drop(far);
}

/// Passes on what comes, with one byte changed, or cut off there.
fn pass_spoilt(mut from: &TcpStream, mut to: &TcpStream, at: usize, change: Option<u8>) {
    let mut bytes = [0; 4096];
    let mut passed = 0;
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        let mut end = count;
        if let Some(byte) = at
            .checked_sub(passed)
            .and_then(|at| bytes[..count].get_mut(at))
        {
            match change {
                Some(change) => *byte ^= change,
                None => end = at - passed,
            }
        }
        passed += count;
        if to.write_all(&bytes[..end]).is_err() || end < count {
            break;
        }
    }
    for socket in [from, to] {
        socket.shutdown(Shutdown::Both).ok();
    }
}

/// Few bytes of a handshake do not matter (those of the old version in a record's header are for show);
/// none panics.
#[test]
fn a_spoilt_handshake_ends_and_nothing_panics() {
    let host = Authority::new("test").host(&["127.0.0.1"], VALID);
    let limit = Duration::from_millis(30);
    let mut failed = 0;
    for seed in 0..120_u32 {
        let random = seed.wrapping_mul(2_654_435_761);
        let (is_from_source, at) = (random & 1 == 0, (random >> 8) as usize % 1200);
        // Headers more often than others.
        let at = if seed < 12 { seed as usize / 2 } else { at };
        let change = (seed % 5 != 4).then_some(1 << (random >> 3 & 7));
        let ((source, near), (target, far)) = (sockets(), sockets());
        let spoilt = thread::scope(|scope| {
            let (out, back) = if is_from_source {
                (at, usize::MAX)
            } else {
                (usize::MAX, at)
            };
            let (near, far) = (&near, &far);
            scope.spawn(move || pass_spoilt(near, far, out, change));
            scope.spawn(move || pass_spoilt(far, near, back, change));
            let accepted = scope.spawn(|| handshake::accept(target, &host, limit).is_ok());
            let connected = handshake::connect(source, localhost(), &host, limit).is_ok();
            !connected || !accepted.join().unwrap()
        });
        failed += u32::from(spoilt);
    }
    assert!(failed > 100, "{failed}");
}
