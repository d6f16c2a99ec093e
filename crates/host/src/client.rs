//! A blocking client of the daemon's control interface.
//!
//! One request is one connection to the Unix socket: HTTP/1.1 with `Connection: close`, a JSON body
//! each way. That is all the daemon needs from a client, so no HTTP library stands here, and the
//! command line stays free of an asynchronous runtime. The answer comes from a program that may be
//! broken or not ours: its head and body are limited, and so is the time.

use crate::api::{
    BalloonBody, CommandBody, CommandKind, ErrorBody, ErrorKind, GuestReport, HostInfo,
    IncomingInfo, LimitsPatch, MigrateAnswer, MigrateBody, MigrationInfo, PreflightInfo,
    ResolveBody, ResolveWord, SectionInfo, VmInfo, VmSpec,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Largest answer: a list of a few hundred migrations with all their rounds stays far below.
const ANSWER_BYTES_MAX: u64 = 64 << 20;
/// Longest silence of the daemon; making a big VM or a long poll takes seconds.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// Talks to the daemon of one socket; cheap to make and to clone.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no limosa daemon answers at {}: start one with 'limosa host'", socket.display())]
    NoDaemon {
        /// Where one was looked for.
        socket: PathBuf,
    },
    /// The connection broke.
    #[error("the limosa daemon at {} did not answer", socket.display())]
    Lost {
        /// The daemon's socket.
        socket: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It ended in the middle.
    #[error("the limosa daemon at {} ended before it had answered: 'limosa host' finds again what runs there", socket.display())]
    CutOff {
        /// The daemon's socket.
        socket: PathBuf,
    },
    /// The daemon said no.
    #[error("{}", body.error)]
    Refused {
        /// The HTTP status.
        status: u16,
        /// What it said.
        body: ErrorBody,
    },
    /// The answer is not what this version understands.
    #[error("the daemon at {} gave an answer that is not understood ({what}): use the same release for both", socket.display())]
    Malformed {
        /// The daemon's socket.
        socket: PathBuf,
        /// What was wrong.
        what: String,
    },
}

impl ClientError {
    /// What kind of refusal it was, if it was one.
    pub const fn kind(&self) -> Option<ErrorKind> {
        match self {
            Self::Refused { body, .. } => Some(body.kind),
            Self::NoDaemon { .. }
            | Self::Lost { .. }
            | Self::CutOff { .. }
            | Self::Malformed { .. } => None,
        }
    }
}

impl Client {
    /// For the daemon that listens on `socket`, which is not contacted yet.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
        }
    }

    /// The daemon's socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What the daemon says about itself.
    ///
    /// # Errors
    /// [`ClientError`], as for all requests.
    pub fn host(&self) -> Result<HostInfo, ClientError> {
        self.get("/v1/host")
    }

    /// All virtual machines, by name.
    ///
    /// # Errors
    /// As for all requests.
    pub fn vms(&self) -> Result<Vec<VmInfo>, ClientError> {
        self.get("/v1/vms")
    }

    /// One virtual machine.
    ///
    /// # Errors
    /// As for all requests.
    pub fn vm(&self, name: &str) -> Result<VmInfo, ClientError> {
        self.get(&format!("/v1/vms/{}", encode(name)))
    }

    /// Makes a virtual machine and starts it.
    ///
    /// # Errors
    /// As for all requests.
    pub fn run(&self, spec: &VmSpec) -> Result<VmInfo, ClientError> {
        self.request("POST", "/v1/vms", Some(spec))
    }

    /// Ends a virtual machine, or removes one that ended. With `force` its process is killed if it
    /// does not answer, and a guest that was handed over is given up.
    ///
    /// # Errors
    /// As for all requests.
    pub fn stop(&self, name: &str, force: bool) -> Result<(), ClientError> {
        let path = format!("/v1/vms/{}?force={force}", encode(name));
        self.request::<(), Nothing>("DELETE", &path, None)
            .map(|Nothing {}| ())
    }

    /// Every part of the state that would move with it.
    ///
    /// # Errors
    /// As for all requests.
    pub fn inspect(&self, name: &str) -> Result<Vec<SectionInfo>, ClientError> {
        self.get(&format!("/v1/vms/{}/inspect", encode(name)))
    }

    /// What a micro guest says about itself.
    ///
    /// # Errors
    /// As for all requests.
    pub fn guest(&self, name: &str) -> Result<GuestReport, ClientError> {
        self.get(&format!("/v1/vms/{}/guest", encode(name)))
    }

    /// Gives a micro guest a command; `command_done` and `sweep_id` of its report tell when it
    /// was carried out.
    ///
    /// # Errors
    /// As for all requests.
    pub fn command(&self, name: &str, kind: CommandKind) -> Result<(), ClientError> {
        let path = format!("/v1/vms/{}/command", encode(name));
        self.request("POST", &path, Some(&CommandBody { kind }))
            .map(|Nothing {}| ())
    }

    /// What would come of a migration: nothing is moved.
    ///
    /// # Errors
    /// As for all requests.
    pub fn preflight(&self, name: &str, body: &MigrateBody) -> Result<PreflightInfo, ClientError> {
        let path = format!("/v1/vms/{}/preflight", encode(name));
        self.request("POST", &path, Some(body))
    }

    /// Has a guest give up so much of its memory, or take back what is above; the answer tells how it
    /// stands at the beginning.
    ///
    /// # Errors
    /// As for all requests.
    pub fn set_balloon(&self, name: &str, target_bytes: u64) -> Result<VmInfo, ClientError> {
        let path = format!("/v1/vms/{}/balloon", encode(name));
        self.request("PUT", &path, Some(&BalloonBody { target_bytes }))
    }

    /// Starts a migration and gives its id.
    ///
    /// # Errors
    /// As for all requests.
    pub fn migrate(&self, name: &str, body: &MigrateBody) -> Result<String, ClientError> {
        let path = format!("/v1/vms/{}/migrate", encode(name));
        self.request("POST", &path, Some(body))
            .map(|answer: MigrateAnswer| answer.id)
    }

    /// Migrations away from this host, running and past ones, oldest first.
    ///
    /// # Errors
    /// As for all requests.
    pub fn migrations(&self) -> Result<Vec<MigrationInfo>, ClientError> {
        self.get("/v1/migrations")
    }

    /// One migration, as it stands now.
    ///
    /// # Errors
    /// As for all requests.
    pub fn migration(&self, id: &str) -> Result<MigrationInfo, ClientError> {
        self.get(&format!("/v1/migrations/{}", encode(id)))
    }

    /// One migration, as soon as it is over, at the latest after `wait` (the daemon waits at most
    /// ten seconds). Look at `stage` of the answer.
    ///
    /// # Errors
    /// As for all requests.
    pub fn wait(&self, id: &str, wait: Duration) -> Result<MigrationInfo, ClientError> {
        let path = format!("/v1/migrations/{}?wait_ms={}", encode(id), wait.as_millis());
        self.get(&path)
    }

    /// Changes technique and limits of a running migration; the answer has the new ones.
    ///
    /// # Errors
    /// As for all requests.
    pub fn set(&self, id: &str, patch: &LimitsPatch) -> Result<MigrationInfo, ClientError> {
        self.request(
            "PATCH",
            &format!("/v1/migrations/{}", encode(id)),
            Some(patch),
        )
    }

    /// Aborts a migration; its report says when it is over and how it ended.
    ///
    /// # Errors
    /// As for all requests; a conflict if it is too late.
    pub fn abort(&self, id: &str) -> Result<(), ClientError> {
        let path = format!("/v1/migrations/{}/abort", encode(id));
        self.request::<(), Nothing>("POST", &path, None)
            .map(|Nothing {}| ())
    }

    /// Decides how a migration ended that nobody can be asked about; `id` may be one that came to
    /// this host, too.
    ///
    /// # Errors
    /// As for all requests; a conflict if there is nothing to decide.
    pub fn resolve(&self, id: &str, word: ResolveWord) -> Result<(), ClientError> {
        let path = format!("/v1/migrations/{}/resolve", encode(id));
        self.request("POST", &path, Some(&ResolveBody { word }))
            .map(|Nothing {}| ())
    }

    /// Migrations to this host that are under way.
    ///
    /// # Errors
    /// As for all requests.
    pub fn incoming(&self) -> Result<Vec<IncomingInfo>, ClientError> {
        self.get("/v1/incoming")
    }

    /// The interface's own description.
    ///
    /// # Errors
    /// As for all requests.
    pub fn openapi(&self) -> Result<serde_json::Value, ClientError> {
        self.get("/v1/openapi.json")
    }

    fn get<A: DeserializeOwned>(&self, path: &str) -> Result<A, ClientError> {
        self.request::<(), A>("GET", path, None)
    }

    fn request<B: Serialize, A: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: Option<&B>,
    ) -> Result<A, ClientError> {
        let body = match body {
            Some(body) => serde_json::to_vec(body).expect("plain data serializes"),
            None => Vec::new(),
        };
        let answer = self.exchange(method, path, &body)?;
        let malformed = |what: String| ClientError::Malformed {
            socket: self.socket.clone(),
            what,
        };
        let (status, body) = split_answer(&answer).map_err(|broken| match broken {
            Broken::CutOff => ClientError::CutOff {
                socket: self.socket.clone(),
            },
            Broken::Foreign(what) => malformed(what.into()),
        })?;
        if !(200..300).contains(&status) {
            return Err(match serde_json::from_slice(body) {
                Ok(body) => ClientError::Refused { status, body },
                Err(_) => malformed(format!("HTTP status {status}")),
            });
        }
        serde_json::from_slice(body).map_err(|error| malformed(error.to_string()))
    }

    /// Sends a request and reads until the daemon closes the connection.
    fn exchange(&self, method: &str, path: &str, body: &[u8]) -> Result<Vec<u8>, ClientError> {
        let mut stream = UnixStream::connect(&self.socket).map_err(|source| {
            let socket = self.socket.clone();
            match source.kind() {
                // No socket, or one that a killed daemon left behind.
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    ClientError::NoDaemon { socket }
                }
                _ => ClientError::Lost { socket, source },
            }
        })?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: limosa\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        let mut request = head.into_bytes();
        request.extend_from_slice(body);
        let mut answer = Vec::new();
        let mut talk = || {
            stream.set_read_timeout(Some(SILENCE_MAX))?;
            stream.set_write_timeout(Some(SILENCE_MAX))?;
            stream.write_all(&request)?;
            (&stream).take(ANSWER_BYTES_MAX).read_to_end(&mut answer)
        };
        talk().map_err(|source| ClientError::Lost {
            socket: self.socket.clone(),
            source,
        })?;
        Ok(answer)
    }
}

/// The answer to a request that only does something.
#[derive(serde::Deserialize)]
struct Nothing {}

/// Why an answer cannot be taken apart.
#[derive(Debug, PartialEq, Eq)]
enum Broken {
    /// It ends too early.
    CutOff,
    /// It is none of a daemon's, for this reason.
    Foreign(&'static str),
}

/// Status and body of an answer. Bodies with a length only: the daemon sends no others.
fn split_answer(answer: &[u8]) -> Result<(u16, &[u8]), Broken> {
    let end = answer
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .ok_or(Broken::CutOff)?;
    let head = str::from_utf8(&answer[..end]);
    let head = head.map_err(|_| Broken::Foreign("HTTP head is not text"))?;
    let body = &answer[end + 4..];
    let mut lines = head.split("\r\n");
    let mut status = lines.next().unwrap_or_default().split(' ');
    if status.next() != Some("HTTP/1.1") {
        return Err(Broken::Foreign("not HTTP/1.1"));
    }
    let status = status.next().and_then(|code| code.parse().ok());
    let status = status.ok_or(Broken::Foreign("no HTTP status"))?;
    for line in lines {
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        if name.eq_ignore_ascii_case("content-length") {
            let length = value.trim().parse();
            let length: usize = length.map_err(|_| Broken::Foreign("bad content length"))?;
            let body = body.get(..length).ok_or(Broken::CutOff)?;
            return Ok((status, body));
        }
    }
    Ok((status, body))
}

/// A path segment: everything but plain letters, digits and `-_.` as `%XX`.
fn encode(segment: &str) -> String {
    let mut text = String::with_capacity(segment.len());
    for byte in segment.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.".contains(&byte) {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(answer: &str, expect: Result<(u16, &str), Broken>) {
        let split = split_answer(answer.as_bytes());
        assert_eq!(
            split,
            expect.map(|(status, body)| (status, body.as_bytes()))
        );
    }

    #[test]
    fn answers_are_taken_apart() {
        check(
            "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
            Ok((200, "{}")),
        );
        check(
            "HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nabcdef",
            Ok((404, "abc")),
        );
        check("HTTP/1.1 200 OK\r\n\r\n[]", Ok((200, "[]")));
    }

    #[test]
    fn foreign_answers_are_errors() {
        let foreign = |what| Err(Broken::Foreign(what));
        check("SSH-2.0-x\r\n\r\n", foreign("not HTTP/1.1"));
        check("HTTP/1.1 abc\r\n\r\n", foreign("no HTTP status"));
        check(
            "HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n{}",
            foreign("bad content length"),
        );
    }

    #[test]
    fn an_answer_without_its_end_was_cut_off() {
        check("", Err(Broken::CutOff));
        check("HTTP/1.1 200 OK\r\ncontent-le", Err(Broken::CutOff));
        check(
            "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{}",
            Err(Broken::CutOff),
        );
    }

    #[test]
    fn path_segments_cannot_leave_their_place() {
        assert_eq!(encode("web-1_a.b"), "web-1_a.b");
        assert_eq!(encode("../a b?c"), "..%2Fa%20b%3Fc");
    }

    #[test]
    fn a_missing_daemon_is_named() {
        let error = Client::new("/nonexistent/host.sock").host().unwrap_err();
        assert_eq!(
            error.to_string(),
            "no limosa daemon answers at /nonexistent/host.sock: start one with 'limosa host'"
        );
    }
}
