//! User networking (`-netdev user`): a whole small network behind the guest's
//! card, with no privileges. The guest's TCP and UDP become sockets of this
//! process; a gateway, a DHCP server and a DNS forwarder live at 10.0.2.2 and
//! 10.0.2.3; `hostfwd` leads ports of the host into the guest.
//!
//! One thread runs it all. [`UserNet::send`] queues a frame of the guest and
//! never blocks; frames to the guest are delivered by a callback on that thread.

mod arp;
mod config;
mod dhcp;
mod dns;
mod env;
mod frag;
mod hostfwd;
mod icmp;
mod link;
mod ndp;
mod stack;
mod tcp_flow;
mod tcp_nat;
#[cfg(test)]
mod tests;
mod udp_nat;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};

pub use config::{ListString, UserNetConfig};

use mimus_core::backend::net::{MAX_FRAME, NetBackend, NetReceiver};

use config::Net;
use hostfwd::{HostFwd, Listener, Proto};
use stack::Stack;

/// Frames of the guest waiting to be processed: beyond either bound they are
/// dropped, as a card drops what the wire does not take.
const INBOX_FRAMES: usize = 4096;
const INBOX_BYTES: usize = 8 << 20;

/// What the stack's thread is told.
enum Command {
    Add(HostFwd, Listener),
    Remove(Proto, SocketAddr, mpsc::Sender<bool>),
}

#[derive(Default)]
struct Inbox {
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
    commands: Vec<Command>,
}

/// What the handle and the stack's thread share.
struct Shared {
    inbox: Mutex<Inbox>,
    /// The thread waits, or is about to: wake it.
    sleeping: AtomicBool,
    can_receive: AtomicBool,
    stop: AtomicBool,
    dropped: AtomicU64,
    /// Turns of the thread's loop: tests see that it rests.
    #[cfg(test)]
    turns: AtomicU64,
    /// Who takes the frames for the guest; without anyone they are kept.
    receiver: Mutex<Option<Arc<NetReceiver>>>,
    wake: OwnedFd,
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Offers a frame to the guest.
    fn deliver(&self, frame: &[u8]) -> bool {
        let receiver = self.receiver.lock().unwrap_or_else(PoisonError::into_inner).clone();
        receiver.is_some_and(|r| r(frame))
    }

    fn wake(&self) {
        if self.sleeping.swap(false, Ordering::SeqCst) {
            // Only a full counter fails, and that wakes as well.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }
}

/// A running user network. Dropping it stops its thread and closes every
/// connection.
pub struct UserNet {
    shared: Arc<Shared>,
    net: Net,
    hostfwd: Mutex<Vec<HostFwd>>,
    thread: Option<JoinHandle<()>>,
}

impl UserNet {
    /// Checks `config`, opens the `hostfwd` ports and starts the network.
    ///
    /// `deliver` gets each frame for the guest, on the network's thread. When
    /// it returns `false` the frame is kept and offered again after
    /// [`guest_can_receive`](Self::guest_can_receive).
    pub fn new(config: UserNetConfig, deliver: NetReceiver) -> Result<UserNet, String> {
        let this = UserNet::open(config)?;
        this.set_receiver(deliver);
        Ok(this)
    }

    /// As [`new`](Self::new), with the receiver to come by
    /// [`NetBackend::set_receiver`].
    pub fn open(config: UserNetConfig) -> Result<UserNet, String> {
        let net = Net::new(&config)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| format!("netdev user: cannot create an event counter: {e}"))?;
        let shared = Arc::new(Shared {
            inbox: Mutex::default(),
            sleeping: AtomicBool::new(false),
            can_receive: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            dropped: AtomicU64::new(0),
            #[cfg(test)]
            turns: AtomicU64::new(0),
            receiver: Mutex::default(),
            wake,
        });
        let mut forwards = Vec::new();
        for fwd in net.hostfwds(&config)? {
            let (fwd, listener) = listen(fwd)?;
            shared.inbox().commands.push(Command::Add(fwd, listener));
            forwards.push(fwd);
        }
        let mut stack = Stack::new(net.clone(), Arc::clone(&shared))?;
        let thread = std::thread::Builder::new()
            .name("net-user".into())
            .spawn(move || stack.run())
            .map_err(|e| format!("netdev user: cannot start a thread: {e}"))?;
        Ok(UserNet { shared, net, hostfwd: Mutex::new(forwards), thread: Some(thread) })
    }

    /// Takes an Ethernet frame (no FCS) of the guest. Never blocks; `false`
    /// when it was dropped because the network is behind.
    pub fn send(&self, frame: &[u8]) -> bool {
        if frame.len() > MAX_FRAME {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        let mut inbox = self.shared.inbox();
        if inbox.frames.len() >= INBOX_FRAMES || inbox.bytes + frame.len() > INBOX_BYTES {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        inbox.bytes += frame.len();
        inbox.frames.push_back(frame.to_vec());
        drop(inbox);
        self.shared.wake();
        true
    }

    /// The guest takes frames again after `deliver` returned `false`. Cheap
    /// enough to call whenever the guest adds receive buffers.
    pub fn guest_can_receive(&self) {
        self.shared.can_receive.store(true, Ordering::SeqCst);
        self.shared.wake();
    }

    /// Frames of the guest dropped by [`send`](Self::send) so far.
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    /// Adds a forwarding at run time; returns the host address it listens on
    /// (a host port of 0 lets the host choose).
    pub fn add_hostfwd(&self, text: &str) -> Result<SocketAddr, String> {
        let (fwd, listener) = listen(HostFwd::parse(text, &self.net)?)?;
        self.hostfwds_mut().push(fwd);
        self.shared.inbox().commands.push(Command::Add(fwd, listener));
        self.shared.wake();
        Ok(fwd.host)
    }

    /// Removes the forwarding `tcp|udp:[hostaddr]:hostport`. Connections made
    /// through it stay.
    pub fn remove_hostfwd(&self, text: &str) -> Result<(), String> {
        let fwd = HostFwd::parse_host(text)?;
        let (reply, answer) = mpsc::channel();
        self.shared.inbox().commands.push(Command::Remove(fwd.0, fwd.1, reply));
        self.shared.wake();
        match answer.recv() {
            Ok(true) => {
                self.hostfwds_mut().retain(|f| (f.proto, f.host) != fwd);
                Ok(())
            }
            _ => Err(format!("hostfwd {text}: there is no such forwarding")),
        }
    }

    /// The forwardings in force: host address and guest address of each.
    pub fn hostfwds(&self) -> Vec<(SocketAddr, SocketAddr)> {
        self.hostfwds_mut().iter().map(|f| (f.host, f.guest)).collect()
    }

    fn hostfwds_mut(&self) -> MutexGuard<'_, Vec<HostFwd>> {
        self.hostfwd.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opens a forwarding's port and fills in the port the host chose.
fn listen(mut fwd: HostFwd) -> Result<(HostFwd, Listener), String> {
    let listener = fwd.listen()?;
    let local = match &listener {
        Listener::Tcp(l) => l.local_addr(),
        Listener::Udp(s) => s.local_addr(),
    };
    fwd.host = local.unwrap_or(fwd.host);
    Ok((fwd, listener))
}

impl NetBackend for UserNet {
    fn send(&self, frame: &[u8]) {
        UserNet::send(self, frame);
    }

    fn set_receiver(&self, receiver: NetReceiver) {
        let mut slot = self.shared.receiver.lock().unwrap_or_else(PoisonError::into_inner);
        *slot = Some(Arc::new(receiver));
        drop(slot);
        self.guest_can_receive();
    }

    fn receive_ready(&self) {
        self.guest_can_receive();
    }

    fn describe(&self) -> String {
        let v4 = self.net.v4.map(|n| format!("net={},host={}", n.net, n.host));
        let v6 = self.net.v6.map(|n| format!("ipv6-host={}", n.host));
        let parts: Vec<String> = v4.into_iter().chain(v6).collect();
        let restrict = if self.net.restrict { "on" } else { "off" };
        format!("user: {},restrict={restrict}", parts.join(","))
    }
}

impl Drop for UserNet {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            // The receiver may hold the last handle: the thread ends by itself.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

impl std::fmt::Debug for UserNet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UserNet").field("net", &self.net).finish_non_exhaustive()
    }
}
