//! What a device says about its saved state.

use super::payload::Payload;
use crate::device::device::lock;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Mutex;

/// Name and version of a saved form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Schema {
    /// The device's model name.
    pub name: &'static str,
    /// Raised when old states need [`SaveRestore::upgrade`].
    pub version: u32,
}

impl Schema {
    /// `Schema::new("ns16550a", 1)`.
    pub const fn new(name: &'static str, version: u32) -> Self {
        Self { name, version }
    }
}

/// Whether a device can be saved; asked before anyone tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveSupport {
    /// It can.
    Full,
    /// It cannot, because.
    None(&'static str),
}

/// Saving and restoring, as a device's author writes it.
pub trait SaveRestore {
    /// Name and version of [`SaveRestore::State`].
    const SCHEMA: Schema;
    /// Whether it can be saved.
    const SUPPORT: SaveSupport = SaveSupport::Full;
    /// The saved form: a struct of named fields.
    type State: Serialize + DeserializeOwned;

    /// The state now. The machine is stopped.
    fn save_state(&self) -> Self::State;

    /// Takes over a state. It may come from anywhere: validate.
    fn restore_state(&mut self, state: Self::State) -> Result<(), SnapshotError>;

    /// Turns the body of an older version into the current form.
    fn upgrade(_from: u32, _old: &Payload) -> Option<Self::State> {
        None
    }
}

/// Saving and restoring, as the machine calls it.
pub trait Snapshot: Send + Sync {
    /// Name and version of what [`Snapshot::save`] gives.
    fn schema(&self) -> Schema;
    /// Whether it can be saved.
    fn support(&self) -> SaveSupport {
        SaveSupport::Full
    }
    /// The state now. The machine is stopped.
    fn save(&self) -> Result<Payload, SnapshotError>;
    /// Takes over a state.
    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError>;
}

/// Checks the schema of `payload` and decodes it, upgrading if it is older.
pub fn decode_state<D: SaveRestore>(payload: &Payload) -> Result<D::State, SnapshotError> {
    let Schema { name, version } = D::SCHEMA;
    if payload.schema != name {
        return Err(SnapshotError::WrongSchema { found: payload.schema.clone(), expected: name });
    }
    if payload.version == version {
        return payload.decode();
    }
    let upgraded = (payload.version < version).then(|| D::upgrade(payload.version, payload)).flatten();
    upgraded.ok_or(SnapshotError::WrongVersion { schema: name, found: payload.version, expected: version })
}

impl<D: SaveRestore + Send> Snapshot for Mutex<D> {
    fn schema(&self) -> Schema {
        D::SCHEMA
    }
    fn support(&self) -> SaveSupport {
        D::SUPPORT
    }
    fn save(&self) -> Result<Payload, SnapshotError> {
        Payload::encode(D::SCHEMA, &lock(self).save_state())
    }
    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError> {
        let state = decode_state::<D>(payload)?;
        lock(self).restore_state(state)
    }
}

/// The [`SaveRestore::State`] of a device that has none.
#[derive(Clone, Copy, Debug, Default, Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stateless {}

/// Why a state cannot be saved or restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The payload is of another device.
    #[error("saved state is of a {found}, not of a {expected}")]
    WrongSchema { found: String, expected: &'static str },
    /// The payload's version cannot be read.
    #[error("saved state of {schema} has version {found}; this program reads {expected}")]
    WrongVersion { schema: &'static str, found: u32, expected: u32 },
    /// The body does not decode.
    #[error("saved state of {schema}: {reason}")]
    Body { schema: String, reason: String },
    /// The body decodes, but says something impossible.
    #[error("saved state of {schema}: {field} is invalid: {reason}")]
    Invalid { schema: &'static str, field: &'static str, reason: String },
    /// A state cannot be encoded.
    #[error("cannot save state of {schema}: {reason}")]
    Encode { schema: String, reason: String },
    /// A device cannot be saved.
    #[error("{path} cannot be saved: {reason}")]
    Unsupported { path: String, reason: String },
    /// The file has no state for a device of the machine.
    #[error("the snapshot has nothing for {path}: it is of a different machine")]
    MissingPath { path: String },
    /// The file has a state for a device the machine does not have.
    #[error("the snapshot has {path}, which this machine does not have")]
    UnknownPath { path: String },
    /// Two states for one device.
    #[error("two objects have the path {path}")]
    DuplicatePath { path: String },
    /// The state of one device, by path.
    #[error("{path}: {source}")]
    At { path: String, source: Box<SnapshotError> },
    /// The file is damaged.
    #[error("the snapshot is damaged: {0}")]
    Damaged(String),
    /// The file is not a snapshot, or of another version.
    #[error("{0}")]
    NotASnapshot(String),
    /// The host failed.
    #[error("snapshot I/O: {0}")]
    Io(#[from] std::io::Error),
}

impl SnapshotError {
    /// For `restore_state`: a field with an impossible value.
    pub fn invalid(schema: Schema, field: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { schema: schema.name, field, reason: reason.into() }
    }

    /// Says which device it was.
    pub fn at(self, path: &str) -> Self {
        Self::At { path: path.to_owned(), source: Box::new(self) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    struct Counter(u32);

    #[derive(Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct State {
        count: u32,
    }

    impl SaveRestore for Counter {
        const SCHEMA: Schema = Schema::new("counter", 2);
        type State = State;
        fn save_state(&self) -> State {
            State { count: self.0 }
        }
        fn restore_state(&mut self, s: State) -> Result<(), SnapshotError> {
            if s.count > 100 {
                return Err(SnapshotError::invalid(Self::SCHEMA, "count", "at most 100"));
            }
            self.0 = s.count;
            Ok(())
        }
        fn upgrade(from: u32, old: &Payload) -> Option<State> {
            (from == 1).then(|| old.decode::<(u32,)>().ok().map(|(count,)| State { count })).flatten()
        }
    }

    #[test]
    fn save_restore_upgrade() {
        let device = Mutex::new(Counter(7));
        let saved = device.save().unwrap();
        let other = Mutex::new(Counter(0));
        other.restore(&saved).unwrap();
        assert_eq!(lock(&other).0, 7);
        let old = Payload::encode(Schema::new("counter", 1), &(9u32,)).unwrap();
        other.restore(&old).unwrap();
        assert_eq!(lock(&other).0, 9);
    }

    #[test]
    fn bad_states_are_refused() {
        let device = Mutex::new(Counter(0));
        let restore = |p: Payload| device.restore(&p).unwrap_err().to_string();
        let encode = |n, v, c| Payload::encode(Schema::new(n, v), &State { count: c }).unwrap();
        assert!(restore(encode("other", 2, 1)).contains("of a other"));
        assert!(restore(encode("counter", 3, 1)).contains("version 3"));
        assert!(restore(encode("counter", 2, 101)).contains("at most 100"));
        let named = Payload::encode(Schema::new("counter", 2), &std::collections::BTreeMap::from([("co\nunt", 1)]));
        let error = restore(named.unwrap());
        assert!(error.contains("co\\nunt") && !error.contains('\n'), "{error}");
        let long = std::collections::BTreeMap::from([("x".repeat(10_000), 1)]);
        assert!(restore(Payload::encode(Schema::new("counter", 2), &long).unwrap()).len() < 500);
        let mut trailing = encode("counter", 2, 1);
        trailing.body.push(0);
        assert!(restore(trailing).contains("bytes after"));
        let mut cut = encode("counter", 2, 1);
        cut.body.truncate(3);
        restore(cut);
        let huge = Payload { schema: "counter".into(), version: 2, body: vec![0xdf, 0xff, 0xff, 0xff, 0xff] };
        restore(huge);
        assert_eq!(lock(&device).0, 0);
    }
}
