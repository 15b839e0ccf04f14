//! Saved state: what a device saves, and the file it is kept in.

pub mod file;
pub mod payload;
pub mod schema;

pub use file::{SnapshotContents, read_snapshot, write_snapshot};
pub use payload::{Payload, StateTree};
pub use schema::{SaveRestore, SaveSupport, Schema, Snapshot, SnapshotError, Stateless, decode_state};
