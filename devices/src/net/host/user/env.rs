//! What every protocol of the stack shares: the network, the wire to the
//! guest, the event queue and the clock.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::epoll;
use smoltcp::time::Instant;

use super::config::Net;
use super::link::Link;

/// Whom an event of the event queue belongs to. Identifiers are never reused,
/// so an event that arrives late finds nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token {
    Wake,
    Tcp(u64),
    Udp(u64),
    Dns(u64),
    Ping(u64),
    Listener(u64),
}

impl Token {
    fn pack(self) -> u64 {
        let (kind, id) = match self {
            Token::Wake => (0, 0),
            Token::Tcp(id) => (1, id),
            Token::Udp(id) => (2, id),
            Token::Dns(id) => (3, id),
            Token::Ping(id) => (4, id),
            Token::Listener(id) => (5, id),
        };
        kind << 56 | id
    }

    pub fn unpack(raw: u64) -> Option<Token> {
        let id = raw & ((1 << 56) - 1);
        Some(match raw >> 56 {
            0 => Token::Wake,
            1 => Token::Tcp(id),
            2 => Token::Udp(id),
            3 => Token::Dns(id),
            4 => Token::Ping(id),
            5 => Token::Listener(id),
            _ => return None,
        })
    }
}

pub(super) struct Env {
    pub net: Net,
    pub link: Link,
    /// Time as the flows see it: it stands still while the guest takes nothing.
    pub now: Instant,
    /// How many host sockets one protocol may hold.
    pub max_sockets: usize,
    epoll: OwnedFd,
    ids: u64,
    random: RandomState,
}

impl Env {
    pub fn new(net: Net, link: Link) -> Result<Env, String> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|e| format!("netdev user: cannot create an event queue: {e}"))?;
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let max_sockets = limit.map_or(1024, |n| (n / 4).clamp(8, 1024) as usize);
        Ok(Env { net, link, now: Instant::ZERO, max_sockets, epoll, ids: 0, random: RandomState::new() })
    }

    /// A fresh identifier for a [`Token`].
    pub fn next_id(&mut self) -> u64 {
        self.ids += 1;
        self.ids
    }

    /// An unpredictable number (sequence numbers, ports): keyed SipHash of a
    /// counter, keyed anew for each stack.
    pub fn random(&mut self) -> u64 {
        let mut hasher = self.random.build_hasher();
        hasher.write_u64(self.next_id());
        hasher.finish()
    }

    /// Reports each change of `fd`'s readiness once, until it is closed.
    pub fn watch(&self, fd: impl AsFd, token: Token) -> std::io::Result<()> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token.pack()), flags)?;
        Ok(())
    }

    /// Waits at most `timeout_us` microseconds (`None`: for ever).
    pub fn wait(&self, events: &mut Vec<epoll::Event>, timeout_us: Option<i64>) {
        events.clear();
        let timeout =
            timeout_us.map(|us| rustix::event::Timespec { tv_sec: us / 1_000_000, tv_nsec: us % 1_000_000 * 1000 });
        // EINTR and the like only cost another turn of the caller's loop.
        let _ = epoll::wait(&self.epoll, rustix::buffer::spare_capacity(events), timeout.as_ref());
    }
}

/// An IP packet of the guest, as a range of its Ethernet frame.
#[derive(Debug, Clone, Copy)]
pub(super) struct IpInfo {
    pub src: IpAddr,
    pub dst: IpAddr,
    pub proto: smoltcp::wire::IpProtocol,
}
