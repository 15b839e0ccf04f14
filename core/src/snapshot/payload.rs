//! One device's saved state, and the tree of all of them.

use super::schema::{Schema, SnapshotError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;

/// How deep a saved state may nest.
const MAX_DEPTH: usize = 64;

/// The state of one object: which schema, which version, and the body as a MessagePack
/// map with named fields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Payload {
    /// Schema name.
    pub schema: String,
    /// Schema version.
    pub version: u32,
    /// MessagePack.
    pub body: Vec<u8>,
}

impl Payload {
    /// Encodes a state.
    pub fn encode<T: Serialize>(schema: Schema, state: &T) -> Result<Self, SnapshotError> {
        let body = rmp_serde::to_vec_named(state)
            .map_err(|e| SnapshotError::Encode { schema: schema.name.to_owned(), reason: e.to_string() })?;
        Ok(Self { schema: schema.name.to_owned(), version: schema.version, body })
    }

    /// Decodes the body, all of it.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, SnapshotError> {
        let bad = |reason: String| SnapshotError::Body { schema: self.schema.clone(), reason: one_line(&reason) };
        let mut rest = self.body.as_slice();
        let mut de = rmp_serde::Deserializer::new(&mut rest);
        de.set_max_depth(MAX_DEPTH);
        let state = T::deserialize(&mut de).map_err(|e| bad(e.to_string()))?;
        if rest.is_empty() { Ok(state) } else { Err(bad("bytes after the state".to_owned())) }
    }
}

/// A decoder's words, which may quote what it read, fit for a terminal.
fn one_line(text: &str) -> String {
    const MAX: usize = 300;
    let mut out = String::new();
    for c in text.chars() {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
        if out.len() > MAX {
            return out + "…";
        }
    }
    out
}

/// All saved objects of a machine, by their paths.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StateTree {
    entries: BTreeMap<String, Payload>,
}

impl StateTree {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an object; an error if the path is taken.
    pub fn insert(&mut self, path: &str, payload: Payload) -> Result<(), SnapshotError> {
        if self.entries.insert(path.to_owned(), payload).is_some() {
            return Err(SnapshotError::DuplicatePath { path: path.to_owned() });
        }
        Ok(())
    }

    /// Takes an object out; what is left after a restore belongs to no device.
    pub fn take(&mut self, path: &str) -> Result<Payload, SnapshotError> {
        self.entries.remove(path).ok_or_else(|| SnapshotError::MissingPath { path: path.to_owned() })
    }

    /// The object at a path.
    pub fn get(&self, path: &str) -> Option<&Payload> {
        self.entries.get(path)
    }

    /// Fails with the first object nobody took.
    pub fn expect_empty(&self) -> Result<(), SnapshotError> {
        match self.entries.keys().next() {
            Some(path) => Err(SnapshotError::UnknownPath { path: path.clone() }),
            None => Ok(()),
        }
    }

    /// All objects, by path.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Payload)> {
        self.entries.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// Number of objects.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}
