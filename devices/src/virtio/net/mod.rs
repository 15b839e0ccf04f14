//! Network card.
//!
//! Spec: VIRTIO 1.2 §5.1. Modelled: one queue pair, mergeable receive buffers, link
//! status, MTU, transmit checksum and TCP segmentation offload (done here, in software),
//! checksum validation of received frames. Not modelled: control queue, filters (all
//! frames are received), receive segmentation offload. Checked with: Linux virtio_net.

pub mod header;
pub mod offload;

use super::chain::Chain;
use super::device::{VirtioDevice, VirtioLink, attached, decode_payload, lock};
use super::device_id;
use super::queue::QueueError;
use header::{HEADER_LEN, Header};
use mimus_core::backend::net::MAX_FRAME;
use mimus_core::backend::{MacAddress, NetBackend};
use mimus_core::bus::{BusFault, GuestPhys};
use mimus_core::snapshot::{Payload, Schema, SnapshotError, Stateless};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

/// Feature bits (§5.1.3).
mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
}

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Status bit: the link is up.
const LINK_UP: u16 = 1;
/// Frames sent between two interrupts, at most.
const SIGNAL_EVERY: u32 = 64;
const SCHEMA: Schema = Schema::new("virtio-net", 1);

/// What a card's user may choose.
#[derive(Clone, Copy, Debug)]
pub struct VirtioNetOptions {
    /// The card's address.
    pub mac: MacAddress,
    /// Largest packet to tell the guest, if any.
    pub mtu: Option<u16>,
    /// Offer checksum and segmentation offload.
    pub offload: bool,
    /// Entries of the receive queue, a power of two.
    pub rx_queue_size: u16,
    /// Entries of the transmit queue, a power of two.
    pub tx_queue_size: u16,
}

impl Default for VirtioNetOptions {
    fn default() -> Self {
        Self { mac: MacAddress::nth(0), mtu: None, offload: true, rx_queue_size: 256, tx_queue_size: 256 }
    }
}

/// A network card over a host backend.
pub struct VirtioNet(Arc<Inner>);

struct Inner {
    backend: Arc<dyn NetBackend>,
    options: VirtioNetOptions,
    link: OnceLock<Arc<VirtioLink>>,
    /// Device-level lock of the receive side.
    receive: Mutex<()>,
    /// Device-level lock of the transmit side: frames keep their order.
    transmit: Mutex<()>,
    /// The backend was turned away and wants to hear of room.
    starved: AtomicBool,
}

/// What became of a frame for the guest.
enum Received {
    Delivered,
    Dropped,
    NoRoom,
}

impl VirtioNet {
    /// A card on `backend`.
    pub fn new(backend: Arc<dyn NetBackend>, options: VirtioNetOptions) -> Arc<Self> {
        let inner = Arc::new(Inner {
            backend,
            options,
            link: OnceLock::new(),
            receive: Mutex::default(),
            transmit: Mutex::default(),
            starved: AtomicBool::new(false),
        });
        let (weak, changed) = (Arc::downgrade(&inner), Arc::downgrade(&inner));
        inner.backend.set_receiver(Box::new(move |frame| weak.upgrade().is_none_or(|i| i.receive(frame))));
        inner.backend.set_link_listener(Box::new(move |_| {
            if let Some(link) = changed.upgrade().and_then(|i| i.link.get().cloned()) {
                link.config_changed();
            }
        }));
        Arc::new(Self(inner))
    }

    /// The card's address.
    pub fn mac(&self) -> MacAddress {
        self.0.options.mac
    }
}

impl Inner {
    /// Takes one frame for the guest; false if it should be offered again.
    fn receive(&self, frame: &[u8]) -> bool {
        let Some(link) = self.link.get() else { return true };
        if frame.is_empty() || frame.len() > MAX_FRAME {
            return true;
        }
        let _order = lock(&self.receive);
        match self.deliver(link, frame) {
            Received::Delivered => link.signal(RECEIVE),
            Received::Dropped => {}
            Received::NoRoom => {
                self.starved.store(true, Ordering::Release);
                return false;
            }
        }
        true
    }

    fn deliver(&self, link: &VirtioLink, frame: &[u8]) -> Received {
        if link.status() & super::status::DRIVER_OK == 0 {
            // Nobody listens yet: as on a wire.
            return Received::Dropped;
        }
        let need = (HEADER_LEN + frame.len()) as u64;
        let mergeable = link.has_feature(feature::MRG_RXBUF);
        let mut chains: Vec<(Chain, u32)> = Vec::new();
        let mut room = 0;
        while room < need {
            let Some(chain) = link.pop(RECEIVE) else {
                // Ask to be notified first, then look again.
                if link.enable_notify(RECEIVE) {
                    continue;
                }
                undo(link, &chains);
                return if link.is_live() || self.stopped(link) { Received::NoRoom } else { Received::Dropped };
            };
            let take = chain.writable.len().min(need - room);
            room += take;
            chains.push((chain, take as u32));
            if room < need && (!mergeable || take == 0) {
                log::debug!("virtio-net: a frame of {} bytes does not fit the guest's buffers", frame.len());
                undo(link, &chains);
                return Received::Dropped;
            }
        }
        self.fill(link, &chains, frame)
    }

    /// True if nothing but the machine standing keeps frames away.
    fn stopped(&self, link: &VirtioLink) -> bool {
        link.status() & super::status::NEEDS_RESET == 0
    }

    fn fill(&self, link: &VirtioLink, chains: &[(Chain, u32)], frame: &[u8]) -> Received {
        let valid = link.has_feature(feature::GUEST_CSUM) && offload::checksum_is_valid(frame);
        let header = Header::received(valid, chains.len() as u16);
        let mut done = 0;
        let mut copy = || -> Result<(), BusFault> {
            for (chain, take) in chains {
                let (mut at, mut left) = (0, *take as usize);
                while left > 0 {
                    let rest = match done {
                        0..HEADER_LEN => &header[done..],
                        _ => &frame[done - HEADER_LEN..],
                    };
                    let part = &rest[..rest.len().min(left)];
                    chain.writable.write(link.dma(), at, part)?;
                    at += part.len() as u64;
                    left -= part.len();
                    done += part.len();
                }
            }
            Ok(())
        };
        match copy() {
            Ok(()) => {
                link.push_all(RECEIVE, chains);
                Received::Delivered
            }
            Err(fault) => {
                link.broken(RECEIVE, QueueError::Memory { addr: GuestPhys::default(), fault });
                Received::Dropped
            }
        }
    }

    /// Sends all frames the guest made available.
    fn transmit(&self, link: &VirtioLink) {
        let _order = lock(&self.transmit);
        link.disable_notify(TRANSMIT);
        let mut unsignalled = 0;
        link.for_each_chain(TRANSMIT, |chain| {
            self.send(link, &chain);
            link.push(TRANSMIT, &chain, 0);
            unsignalled += 1;
            if unsignalled == SIGNAL_EVERY {
                unsignalled = 0;
                link.signal(TRANSMIT);
            }
            true
        });
        if unsignalled > 0 {
            link.signal(TRANSMIT);
        }
    }

    /// Sends one frame; one that makes no sense is dropped.
    fn send(&self, link: &VirtioLink, chain: &Chain) {
        let data = chain.readable.read_all(link.dma(), HEADER_LEN + MAX_FRAME);
        let Ok(Some(mut data)) = data else {
            log::debug!("virtio-net: a frame that is too long or not in RAM is dropped");
            return;
        };
        let Some((header, frame)) = data.split_first_chunk_mut::<HEADER_LEN>() else { return };
        let sent = Header::parse(header).and_then(|h| {
            let backend = &self.backend;
            offload::transmit(&h, frame, |f| backend.send(f))
        });
        if sent.is_none() {
            log::debug!("virtio-net: a frame whose header does not fit it is dropped");
        }
    }
}

fn undo(link: &VirtioLink, chains: &[(Chain, u32)]) {
    chains.iter().rev().for_each(|(c, _)| link.undo_pop(RECEIVE, c));
}

impl VirtioDevice for VirtioNet {
    fn device_id(&self) -> u32 {
        device_id::NET
    }
    fn name(&self) -> &'static str {
        "virtio-net"
    }
    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.0.options.rx_queue_size, self.0.options.tx_queue_size]
    }
    fn features(&self) -> u64 {
        let o = &self.0.options;
        let mtu = if o.mtu.is_some() { feature::MTU } else { 0 };
        let tso = feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_ECN;
        let offload = if o.offload { feature::CSUM | feature::GUEST_CSUM | tso } else { 0 };
        feature::MAC | feature::STATUS | feature::MRG_RXBUF | mtu | offload
    }
    /// §5.1.4: address, status, queue pairs, MTU.
    fn config(&self) -> Vec<u8> {
        let o = &self.0.options;
        let mut c = o.mac.0.to_vec();
        c.extend(if self.0.backend.link_up() { LINK_UP } else { 0 }.to_le_bytes());
        c.extend(1u16.to_le_bytes());
        c.extend(o.mtu.unwrap_or(0).to_le_bytes());
        c
    }
    fn attach(&self, link: Arc<VirtioLink>) {
        let _ = self.0.link.set(link);
    }
    fn activate(&self) {
        // Room is asked about when there is none; nobody need tell before.
        attached(&self.0.link).disable_notify(RECEIVE);
        self.0.backend.receive_ready();
    }
    fn notify(&self, queue: u16) {
        match queue {
            RECEIVE if self.0.starved.swap(false, Ordering::AcqRel) => {
                attached(&self.0.link).disable_notify(RECEIVE);
                self.0.backend.receive_ready();
            }
            TRANSMIT => self.0.transmit(attached(&self.0.link)),
            _ => {}
        }
    }
    fn reset(&self) {
        // Whoever is in the middle of a frame ends first.
        drop(lock(&self.0.receive));
        drop(lock(&self.0.transmit));
        self.0.starved.store(false, Ordering::Release);
    }
    fn save(&self) -> Result<Payload, SnapshotError> {
        Payload::encode(SCHEMA, &Stateless {})
    }
    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError> {
        decode_payload::<Stateless>(SCHEMA, payload)?;
        // Look for frames when the machine starts, whatever the source was doing.
        self.0.starved.store(true, Ordering::Release);
        Ok(())
    }
}
