//! Entropy source.
//!
//! Spec: VIRTIO 1.2 §5.4. The bytes are the host kernel's. Checked with: Linux
//! virtio_rng.

use super::device::{VirtioDevice, VirtioLink, attached, decode_payload};
use super::device_id;
use mimus_core::error::HostError;
use mimus_core::snapshot::{Payload, Schema, SnapshotError, Stateless};
use std::fs::File;
use std::io::Read;
use std::sync::{Arc, OnceLock};

/// Most bytes given per request; drivers ask again.
const MAX_REQUEST: u64 = 4096;
const SCHEMA: Schema = Schema::new("virtio-rng", 1);

/// An entropy source.
pub struct VirtioRng {
    /// `None`: the host's chance, or what `-seed` makes of it.
    source: Option<File>,
    link: OnceLock<Arc<VirtioLink>>,
}

impl VirtioRng {
    /// Reads from `path`, a device that never blocks; by default the host's chance.
    pub fn new(path: Option<&str>) -> Result<Arc<Self>, HostError> {
        let open = |path| File::open(path).map_err(|e| HostError::new(format!("open entropy source {path}"), e));
        let source = path.map(open).transpose()?;
        Ok(Arc::new(Self { source, link: OnceLock::new() }))
    }

    fn random(&self, len: u64) -> Vec<u8> {
        let mut data = vec![0; len.min(MAX_REQUEST) as usize];
        let n = match &self.source {
            Some(file) => {
                let mut file = file;
                file.read(&mut data).unwrap_or(0)
            }
            None => mimus_core::outside::random(&mut data).map_or(0, |()| data.len()),
        };
        data.truncate(n);
        data
    }
}

impl VirtioDevice for VirtioRng {
    fn device_id(&self) -> u32 {
        device_id::RNG
    }
    fn name(&self) -> &'static str {
        "virtio-rng"
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![8]
    }
    fn features(&self) -> u64 {
        0
    }
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }
    fn attach(&self, link: Arc<VirtioLink>) {
        let _ = self.link.set(link);
    }
    fn notify(&self, queue: u16) {
        let link = attached(&self.link);
        link.for_each_chain(queue, |chain| {
            let data = self.random(chain.writable.len());
            let written = chain.writable.write(link.dma(), 0, &data).unwrap_or(0);
            link.complete(queue, &chain, written as u32);
            true
        });
    }
    fn reset(&self) {}
    fn save(&self) -> Result<Payload, SnapshotError> {
        Payload::encode(SCHEMA, &Stateless {})
    }
    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError> {
        decode_payload::<Stateless>(SCHEMA, payload).map(|_| ())
    }
}
