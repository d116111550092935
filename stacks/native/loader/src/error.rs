//! What can go wrong, each with the file, the record and what to do next.

use std::fmt;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A kind of failure: the Python binding maps each to an exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An argument that the caller can correct.
    Input,
    /// Data that is not what it claims to be: malformed JSON, invalid UTF-8, a truncated file.
    Data,
    /// A file or store that could not be read, after retries where those make sense.
    Io,
    /// A file that is not the one that the manifest describes.
    Changed,
    /// Use from a forked process, or after `close`.
    Misuse,
    /// A panic: a defect of this crate, or of one that it uses.
    Bug,
}

/// An error with its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// What kind of failure it is.
    pub kind: Kind,
    /// What happened, without the place.
    pub message: String,
    /// The file it happened in, as it was given.
    pub file: Option<String>,
    /// Where in the file: `line 12`, `row 7 of row group 3`, `bytes 10..20`.
    pub record: Option<String>,
}

impl Error {
    /// An error of a kind, without a place yet.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), file: None, record: None }
    }

    /// An argument that the caller can correct.
    pub fn input(message: impl Into<String>) -> Self {
        Self::new(Kind::Input, message)
    }

    /// Data that is not what it claims to be.
    pub fn data(message: impl Into<String>) -> Self {
        Self::new(Kind::Data, message)
    }

    /// The file it happened in, unless a more exact place is known already.
    #[must_use]
    pub fn in_file(mut self, file: &str) -> Self {
        self.file.get_or_insert_with(|| file.to_owned());
        self
    }

    /// Where in the file, unless it is known already.
    #[must_use]
    pub fn at(mut self, record: impl Into<String>) -> Self {
        self.record.get_or_insert_with(|| record.into());
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.file, &self.record) {
            (Some(file), Some(record)) => write!(f, "{file}, {record}: {}", self.message),
            (Some(file), None) => write!(f, "{file}: {}", self.message),
            _ => f.write_str(&self.message),
        }
    }
}

impl std::error::Error for Error {}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Self::new(Kind::Io, error.to_string())
    }
}
