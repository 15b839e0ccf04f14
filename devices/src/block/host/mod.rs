//! Disks of the host: image files and host devices.

pub mod null;
pub mod overlay;
pub mod pool;
pub mod raw;

pub use null::NullBlock;
pub use overlay::OverlayBlock;
pub use raw::{RawBlock, RawOptions};

/// Why a disk cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("disk {path}: {reason}")]
pub struct OpenError {
    /// The file.
    pub path: String,
    /// What is wrong and what to do.
    pub reason: String,
}
