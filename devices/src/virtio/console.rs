//! Console with one port.
//!
//! Spec: VIRTIO 1.2 §5.3. Modelled: port 0, emergency write, size. Not modelled:
//! `VIRTIO_CONSOLE_F_MULTIPORT`. Checked with: Linux virtio_console (hvc).

use super::chain::Chain;
use super::device::{VirtioDevice, VirtioLink, decode_payload, lock};
use super::device_id;
use mimus_core::backend::CharBackend;
use mimus_core::snapshot::{Payload, Schema, SnapshotError};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, OnceLock};

const FEATURE_SIZE: u64 = 1 << 0;
const FEATURE_EMERG_WRITE: u64 = 1 << 2;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// Offset of the emergency write register in the configuration space.
const CONFIG_EMERG_WR: usize = 8;
/// Bytes given to the backend at a time.
const CHUNK: usize = 4096;
const SCHEMA: Schema = Schema::new("virtio-console", 1);

/// A console whose port is connected to a character backend.
pub struct VirtioConsole(Arc<Inner>);

struct Inner {
    /// The host side of port 0, once something is plugged there.
    backend: OnceLock<Arc<dyn CharBackend>>,
    link: OnceLock<Arc<VirtioLink>>,
    /// Device-level lock of the transmit side.
    transmit: Mutex<Transmit>,
    /// Device-level lock of the receive side.
    receive: Mutex<()>,
    /// Columns and rows, if the host knows them.
    size: Mutex<Option<(u16, u16)>>,
}

#[derive(Default)]
struct Transmit {
    /// Bytes of the next chain the backend took already.
    sent: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    transmit_sent: u64,
}

impl VirtioConsole {
    /// A console whose port is not connected: output vanishes until
    /// [`VirtioConsole::connect`].
    pub fn new() -> Arc<Self> {
        Arc::new(Self(Arc::new(Inner {
            backend: OnceLock::new(),
            link: OnceLock::new(),
            transmit: Mutex::default(),
            receive: Mutex::default(),
            size: Mutex::new(None),
        })))
    }

    /// Connects the port, once; false if it is connected.
    pub fn connect(&self, backend: Arc<dyn CharBackend>) -> bool {
        if self.0.backend.set(backend.clone()).is_err() {
            return false;
        }
        let (weak, writable) = (Arc::downgrade(&self.0), Arc::downgrade(&self.0));
        backend.set_receiver(Box::new(move |data| weak.upgrade().map_or(data.len(), |i| i.receive(data))));
        backend.set_writable_listener(Box::new(move || {
            if let Some(inner) = writable.upgrade() {
                inner.transmit();
            }
        }));
        true
    }

    /// Tells the guest the size of the terminal.
    pub fn set_size(&self, columns: u16, rows: u16) {
        *lock(&self.0.size) = Some((columns, rows));
        if let Some(link) = self.0.link.get() {
            link.config_changed();
        }
    }
}

impl Inner {
    /// Hands input to the guest; returns how many bytes it had room for.
    fn receive(&self, data: &[u8]) -> usize {
        let Some(link) = self.link.get() else { return 0 };
        let _order = lock(&self.receive);
        let mut taken = 0;
        while taken < data.len() {
            let Some(chain) = link.pop(RECEIVE) else {
                if link.enable_notify(RECEIVE) {
                    continue;
                }
                break;
            };
            let n = chain.writable.write(link.dma(), 0, &data[taken..]).unwrap_or(0);
            link.push(RECEIVE, &chain, n as u32);
            taken += n;
        }
        if taken > 0 {
            link.signal(RECEIVE);
        }
        taken
    }

    fn input_ready(&self) {
        if let Some(backend) = self.backend.get() {
            backend.input_ready();
        }
    }

    /// Sends what the guest made available, as far as the backend takes it.
    fn transmit(&self) {
        let Some(link) = self.link.get() else { return };
        let mut t = lock(&self.transmit);
        link.for_each_chain(TRANSMIT, |chain| {
            let all = self.send(link, &chain, &mut t);
            if all {
                t.sent = 0;
                link.complete(TRANSMIT, &chain, 0);
            } else {
                link.undo_pop(TRANSMIT, &chain);
            }
            all
        });
    }

    /// True if the backend took all of the chain.
    fn send(&self, link: &VirtioLink, chain: &Chain, t: &mut Transmit) -> bool {
        let mut buf = [0; CHUNK];
        while t.sent < chain.readable.len() {
            // Memory that cannot be read is not sent.
            let Ok(n) = chain.readable.read(link.dma(), t.sent, &mut buf) else { return true };
            let taken = self.backend.get().map_or(n, |b| b.write(&buf[..n]).min(n));
            t.sent += taken as u64;
            if taken < n {
                return false;
            }
        }
        true
    }
}

impl VirtioDevice for VirtioConsole {
    fn device_id(&self) -> u32 {
        device_id::CONSOLE
    }
    fn name(&self) -> &'static str {
        "virtio-console"
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![128, 128]
    }
    fn features(&self) -> u64 {
        let size = if lock(&self.0.size).is_some() { FEATURE_SIZE } else { 0 };
        FEATURE_EMERG_WRITE | size
    }
    /// §5.3.4: columns, rows, ports, emergency write.
    fn config(&self) -> Vec<u8> {
        let (columns, rows) = lock(&self.0.size).unwrap_or_default();
        let mut c = Vec::with_capacity(12);
        c.extend(columns.to_le_bytes());
        c.extend(rows.to_le_bytes());
        c.extend(1u32.to_le_bytes());
        c.extend(0u32.to_le_bytes());
        c
    }
    fn config_write(&self, offset: usize, data: &[u8]) {
        if let (CONFIG_EMERG_WR, [byte, ..]) = (offset, data)
            && let Some(backend) = self.0.backend.get()
        {
            backend.write(&[*byte]);
        }
    }
    fn attach(&self, link: Arc<VirtioLink>) {
        let _ = self.0.link.set(link);
    }
    fn activate(&self) {
        self.0.input_ready();
    }
    fn notify(&self, queue: u16) {
        match queue {
            RECEIVE => self.0.input_ready(),
            TRANSMIT => self.0.transmit(),
            _ => {}
        }
    }
    fn reset(&self) {
        // Both locks in turn: whoever is in the middle of a chain ends first.
        drop(lock(&self.0.receive));
        lock(&self.0.transmit).sent = 0;
    }
    fn save(&self) -> Result<Payload, SnapshotError> {
        Payload::encode(SCHEMA, &State { transmit_sent: lock(&self.0.transmit).sent })
    }
    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError> {
        let state: State = decode_payload(SCHEMA, payload)?;
        lock(&self.0.transmit).sent = state.transmit_sent;
        Ok(())
    }
}
