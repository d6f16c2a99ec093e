//! Why a request of the control interface was not carried out.

use crate::api::ErrorKind;

/// A request that was refused: one line for the operator and a kind for programs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// What kind it is.
    pub kind: ErrorKind,
    /// What happened and what to do.
    pub message: String,
}

impl Refusal {
    /// The request itself is wrong.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::BadRequest, message)
    }

    /// What it names does not exist.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, message)
    }

    /// It does not fit what is going on.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Conflict, message)
    }

    /// It could not be done.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Failed, message)
    }

    fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        // One line, whatever was quoted in it.
        let message = message.into().replace(['\n', '\r'], " ");
        Self { kind, message }
    }
}
