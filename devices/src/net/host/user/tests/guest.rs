//! A small guest: smoltcp behind an Ethernet card whose other end is the
//! network under test.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant as StdInstant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr};

use super::super::{UserNet, UserNetConfig};

/// No single step of a test takes longer than this.
pub const PATIENCE: Duration = Duration::from_secs(10);

pub const MAC: EthernetAddress = EthernetAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]);

/// The guest's card.
pub struct Card {
    pub net: Arc<UserNet>,
    frames: Receiver<Vec<u8>>,
    pending: VecDeque<Vec<u8>>,
    /// When set, the card refuses frames.
    pub full: Arc<AtomicBool>,
    /// Every frame received, while recording.
    pub record: Arc<Mutex<Option<Vec<Vec<u8>>>>>,
}

pub struct Rx(Vec<u8>);
pub struct Tx(Arc<UserNet>);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Tx {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.send(&frame);
        result
    }
}

impl Device for Card {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx;

    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ethernet;
        caps.max_transmission_unit = 1514;
        caps
    }

    fn receive(&mut self, _: Instant) -> Option<(Rx, Tx)> {
        let frame = self.pending.pop_front().or_else(|| self.frames.try_recv().ok())?;
        if let Some(record) = self.record.lock().unwrap().as_mut() {
            record.push(frame.clone());
        }
        Some((Rx(frame), Tx(Arc::clone(&self.net))))
    }

    fn transmit(&mut self, _: Instant) -> Option<Tx> {
        Some(Tx(Arc::clone(&self.net)))
    }
}

pub struct Guest {
    pub card: Card,
    pub iface: Interface,
    pub sockets: SocketSet<'static>,
    start: StdInstant,
}

impl Guest {
    /// A guest with the address 10.0.2.15 and fec0::15 behind `config`.
    pub fn new(config: UserNetConfig) -> Guest {
        let mut guest = Guest::bare(config);
        guest.iface.update_ip_addrs(|a| {
            a.push(IpCidr::new(IpAddress::v4(10, 0, 2, 15), 24)).unwrap();
            a.push(IpCidr::new(IpAddress::v6(0xfec0, 0, 0, 0, 0, 0, 0, 0x15), 64)).unwrap();
        });
        guest.iface.routes_mut().add_default_ipv4_route([10, 0, 2, 2].into()).unwrap();
        guest
    }

    /// A guest without addresses.
    pub fn bare(config: UserNetConfig) -> Guest {
        let (tx, frames) = channel();
        let full = Arc::new(AtomicBool::new(false));
        let refuse = Arc::clone(&full);
        let deliver = move |frame: &[u8]| !refuse.load(Ordering::SeqCst) && tx.send(frame.to_vec()).is_ok();
        let net = Arc::new(UserNet::new(config, Box::new(deliver)).unwrap());
        let mut card = Card { net, frames, pending: VecDeque::new(), full, record: Arc::default() };
        let mut config = Config::new(HardwareAddress::Ethernet(MAC));
        config.random_seed = 7;
        let iface = Interface::new(config, &mut card, Instant::ZERO);
        Guest { card, iface, sockets: SocketSet::new(Vec::new()), start: StdInstant::now() }
    }

    pub fn poll(&mut self) {
        let now = Instant::from_micros(self.start.elapsed().as_micros() as i64);
        self.iface.poll(now, &mut self.card, &mut self.sockets);
    }

    /// Waits at most a few milliseconds for a frame, then runs the guest.
    pub fn step(&mut self) {
        self.poll();
        match self.card.frames.recv_timeout(Duration::from_millis(5)) {
            Ok(frame) => self.card.pending.push_back(frame),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => panic!("the network's thread is gone"),
        }
        self.poll();
    }

    /// Runs the guest until `done` gives a value.
    pub fn until<T>(&mut self, what: &str, mut done: impl FnMut(&mut Guest) -> Option<T>) -> T {
        let start = StdInstant::now();
        loop {
            if let Some(value) = done(self) {
                return value;
            }
            assert!(start.elapsed() < PATIENCE, "{what}: nothing after {PATIENCE:?}");
            self.step();
        }
    }

    pub fn tcp_socket(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 256 << 10]);
        self.sockets.add(tcp::Socket::new(buffer(), buffer()))
    }

    pub fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub fn connect(&mut self, to: impl Into<IpAddr>, port: u16, local: u16) -> SocketHandle {
        let handle = self.tcp_socket();
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
        socket.connect(self.iface.context(), (IpAddress::from(to.into()), port), local).unwrap();
        handle
    }

    pub fn udp(&mut self, port: u16) -> SocketHandle {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 16], vec![0; 65536]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        socket.bind(port).unwrap();
        self.sockets.add(socket)
    }

    pub fn udp_send(&mut self, handle: SocketHandle, to: impl Into<IpAddr>, port: u16, data: &[u8]) {
        self.sockets.get_mut::<udp::Socket<'_>>(handle).send_slice(data, (IpAddress::from(to.into()), port)).unwrap();
        self.poll();
    }

    pub fn udp_recv(&mut self, handle: SocketHandle) -> (Vec<u8>, smoltcp::wire::IpEndpoint) {
        self.until("a datagram", |g| {
            let socket = g.sockets.get_mut::<udp::Socket<'_>>(handle);
            socket.recv().ok().map(|(data, meta)| (data.to_vec(), meta.endpoint))
        })
    }

    /// Waits for a raw frame that `wanted` accepts, past the guest's own stack.
    pub fn raw<T>(&mut self, what: &str, mut wanted: impl FnMut(&[u8]) -> Option<T>) -> T {
        let start = StdInstant::now();
        while start.elapsed() < PATIENCE {
            if let Ok(frame) = self.card.frames.recv_timeout(Duration::from_millis(50))
                && let Some(value) = wanted(&frame)
            {
                return value;
            }
        }
        panic!("{what}: no such frame after {PATIENCE:?}");
    }
}
