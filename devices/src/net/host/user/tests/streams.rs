//! TCP both ways, half-closes, refusals, and `hostfwd=tcp`.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use smoltcp::socket::tcp::State;
use smoltcp::wire::IpAddress;

use super::guest::Guest;
use super::{UserNetConfig, config, pattern};

const GATEWAY: [u8; 4] = [10, 0, 2, 2];
const MEGABYTE: usize = 1 << 20;

fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// Sends `len` pattern bytes and closes.
fn serve(mut stream: TcpStream, len: usize) {
    let data: Vec<u8> = (0..len).map(pattern).collect();
    stream.write_all(&data).unwrap();
}

/// Reads to the end, checking the pattern; returns how much came.
fn check(mut stream: impl Read) -> usize {
    let mut buffer = vec![0; 64 << 10];
    let mut at = 0;
    loop {
        let n = stream.read(&mut buffer).unwrap();
        if n == 0 {
            return at;
        }
        assert!(buffer[..n].iter().enumerate().all(|(i, b)| *b == pattern(at + i)), "bytes differ near {at}");
        at += n;
    }
}

/// Reads the guest's socket to its end, checking the pattern.
fn download(guest: &mut Guest, handle: smoltcp::iface::SocketHandle) -> usize {
    let mut at = 0;
    let mut good = true;
    let start = Instant::now();
    loop {
        let socket = guest.tcp(handle);
        while socket.can_recv() {
            at += socket
                .recv(|data| {
                    good &= data.iter().enumerate().all(|(i, b)| *b == pattern(at + i));
                    (data.len(), data.len())
                })
                .unwrap();
        }
        assert!(good, "bytes differ near {at}");
        if matches!(socket.state(), State::CloseWait | State::Closed) {
            return at;
        }
        assert!(start.elapsed() < Duration::from_secs(30), "stuck after {at} bytes");
        guest.step();
    }
}

#[test]
fn twenty_megabytes_down_at_speed() {
    let (listener, port) = listener();
    let server = thread::spawn(move || serve(listener.accept().unwrap().0, 20 * MEGABYTE));
    let mut guest = Guest::new(UserNetConfig::default());
    let start = Instant::now();
    let handle = guest.connect(GATEWAY, port, 40000);
    assert_eq!(download(&mut guest, handle), 20 * MEGABYTE);
    let rate = 20.0 / start.elapsed().as_secs_f64();
    eprintln!("download: {rate:.0} MB/s");
    server.join().unwrap();
    guest.tcp(handle).close();
    guest.until("the close", |g| matches!(g.tcp(handle).state(), State::Closed | State::TimeWait).then_some(()));
}

fn upload(guest: &mut Guest, handle: smoltcp::iface::SocketHandle, len: usize) {
    let data: Vec<u8> = (0..len).map(pattern).collect();
    let mut at = 0;
    guest.until("the connection", |g| g.tcp(handle).may_send().then_some(()));
    guest.until("the upload", |g| {
        at += g.tcp(handle).send_slice(&data[at..]).unwrap();
        g.poll();
        (at == len).then_some(())
    });
    // smoltcp stalls in LAST-ACK when a bare window update comes.
    guest.until("the last byte", |g| (g.tcp(handle).send_queue() == 0).then_some(()));
    guest.tcp(handle).close();
}

#[test]
fn upload_then_answer_after_the_guests_half_close() {
    let (listener, port) = listener();
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let got = check(&stream);
        stream.write_all(format!("{got}").as_bytes()).unwrap();
    });
    let mut guest = Guest::new(UserNetConfig::default());
    let handle = guest.connect(GATEWAY, port, 40001);
    let start = Instant::now();
    upload(&mut guest, handle, 8 * MEGABYTE);
    eprintln!("upload: {:.0} MB/s", 8.0 / start.elapsed().as_secs_f64());
    let mut answer = Vec::new();
    guest.until("the answer", |g| {
        let socket = g.tcp(handle);
        if socket.can_recv() {
            socket.recv(|d| (d.len(), answer.extend_from_slice(d))).unwrap();
        }
        matches!(socket.state(), State::TimeWait | State::Closed).then_some(())
    });
    assert_eq!(answer, (8 * MEGABYTE).to_string().as_bytes());
    server.join().unwrap();
}

#[test]
fn the_guest_may_send_after_the_hosts_half_close() {
    let (listener, port) = listener();
    let server = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        check(stream)
    });
    let mut guest = Guest::new(UserNetConfig::default());
    let handle = guest.connect(GATEWAY, port, 40002);
    guest.until("the host's FIN", |g| (g.tcp(handle).state() == State::CloseWait).then_some(()));
    upload(&mut guest, handle, MEGABYTE);
    guest.until("the end", |g| (g.tcp(handle).state() == State::Closed).then_some(()));
    assert_eq!(server.join().unwrap(), MEGABYTE);
}

#[test]
fn a_refused_connection_is_refused_at_once() {
    let (listener, port) = listener();
    drop(listener);
    let mut guest = Guest::new(UserNetConfig::default());
    let start = Instant::now();
    let handle = guest.connect(GATEWAY, port, 40003);
    guest.until("the reset", |g| (g.tcp(handle).state() == State::Closed).then_some(()));
    assert!(start.elapsed() < Duration::from_millis(900));
}

#[test]
fn loopback_is_reached_through_the_gateway_only() {
    let (_listener, port) = listener();
    let mut guest = Guest::new(UserNetConfig::default());
    for target in [IpAddress::v4(127, 0, 0, 1), IpAddress::v4(10, 0, 2, 99), IpAddress::v4(10, 0, 2, 3)] {
        let handle = guest.connect(std::net::IpAddr::from(target), port, 40004);
        // 10.0.2.99 has no station: its SYN never leaves the guest.
        for _ in 0..20 {
            guest.step();
        }
        assert_ne!(guest.tcp(handle).state(), State::Established, "{target}");
        guest.sockets.remove(handle);
    }
}

#[test]
fn restrict_isolates_but_forwards() {
    let (_listener, port) = listener();
    let mut guest = Guest::new(config(r#"{"restrict":true,"hostfwd":["tcp:127.0.0.1:0-:80"]}"#));
    let handle = guest.connect(GATEWAY, port, 40005);
    guest.until("the reset", |g| (g.tcp(handle).state() == State::Closed).then_some(()));
    let (to, _) = guest.card.net.hostfwds()[0];
    forwarded(&mut guest, to);
}

/// Connects to `to` on the host; the guest serves a megabyte each way.
fn forwarded(guest: &mut Guest, to: std::net::SocketAddr) {
    let handle = guest.tcp_socket();
    guest.tcp(handle).listen(80).unwrap();
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(to).unwrap();
        stream.write_all(&(0..MEGABYTE).map(pattern).collect::<Vec<_>>()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        check(stream)
    });
    assert_eq!(download(guest, handle), MEGABYTE);
    let remote = guest.tcp(handle).remote_endpoint().unwrap();
    assert_eq!(remote.addr, IpAddress::v4(10, 0, 2, 2));
    upload(guest, handle, MEGABYTE);
    guest.until("the end", |g| (g.tcp(handle).state() == State::Closed).then_some(()));
    assert_eq!(client.join().unwrap(), MEGABYTE);
}

#[test]
fn hostfwd_tcp_reaches_a_guest_that_never_spoke() {
    let mut guest = Guest::new(config(r#"{"hostfwd":["tcp:127.0.0.1:0-:80"]}"#));
    let (to, _) = guest.card.net.hostfwds()[0];
    forwarded(&mut guest, to);
}

#[test]
fn a_port_closed_in_the_guest_resets_the_hosts_client() {
    let mut guest = Guest::new(config(r#"{"hostfwd":["tcp:127.0.0.1:0-:81"]}"#));
    let (to, _) = guest.card.net.hostfwds()[0];
    let client = thread::spawn(move || TcpStream::connect(to).unwrap().read(&mut [0; 1]));
    guest.until("the reset", |_| client.is_finished().then_some(()));
    assert_eq!(client.join().unwrap().unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn a_guest_that_takes_nothing_stops_the_stream_and_resumes_it() {
    let (listener, port) = listener();
    let server = thread::spawn(move || serve(listener.accept().unwrap().0, 4 * MEGABYTE));
    let mut guest = Guest::new(UserNetConfig::default());
    let handle = guest.connect(GATEWAY, port, 40006);
    guest.until("some bytes", |g| (g.tcp(handle).recv_queue() > 0).then_some(()));
    let (full, net) = (guest.card.full.clone(), guest.card.net.clone());
    let pauses = thread::spawn(move || {
        for _ in 0..5 {
            full.store(true, Ordering::SeqCst);
            thread::sleep(Duration::from_millis(20));
            full.store(false, Ordering::SeqCst);
            net.guest_can_receive();
            thread::sleep(Duration::from_millis(2));
        }
    });
    assert_eq!(download(&mut guest, handle), 4 * MEGABYTE);
    pauses.join().unwrap();
    server.join().unwrap();
}

#[test]
fn many_streams_at_once() {
    const FLOWS: usize = 40;
    let (listener, port) = listener();
    let server = thread::spawn(move || {
        for _ in 0..FLOWS {
            let (stream, _) = listener.accept().unwrap();
            thread::spawn(move || serve(stream, 100_000));
        }
    });
    let mut guest = Guest::new(UserNetConfig::default());
    let handles: Vec<_> = (0..FLOWS).map(|i| guest.connect(GATEWAY, port, 41000 + i as u16)).collect();
    for handle in handles {
        assert_eq!(download(&mut guest, handle), 100_000);
        guest.tcp(handle).close();
    }
    server.join().unwrap();
}

#[test]
fn tcp_over_ipv6() {
    let Ok(listener) = TcpListener::bind("[::1]:0") else {
        // Not by a macro: the test runner keeps those to itself.
        let _ = std::io::Write::write_all(&mut std::io::stderr(), b"SKIPPED (tcp_over_ipv6): the host has no ::1\n");
        return;
    };
    let port = listener.local_addr().unwrap().port();
    let server = thread::spawn(move || serve(listener.accept().unwrap().0, MEGABYTE));
    let mut guest = Guest::new(UserNetConfig::default());
    let handle = guest.connect(IpAddress::v6(0xfec0, 0, 0, 0, 0, 0, 0, 2), port, 40007);
    assert_eq!(download(&mut guest, handle), MEGABYTE);
    server.join().unwrap();
}

/// Turns the network's thread takes in a fifth of a second.
fn turns(guest: &mut Guest) -> u64 {
    let count = |g: &Guest| g.card.net.shared.turns.load(Ordering::Relaxed);
    for _ in 0..20 {
        guest.step();
    }
    let before = count(guest);
    thread::sleep(Duration::from_millis(200));
    count(guest) - before
}

#[test]
fn connections_that_wait_cost_nothing() {
    let (listener, port) = listener();
    let mut guest = Guest::new(UserNetConfig::default());
    assert!(turns(&mut guest) < 20, "idle");
    // Nothing to say.
    let idle = guest.connect(GATEWAY, port, 40010);
    guest.until("a connection", |g| g.tcp(idle).may_send().then_some(()));
    assert!(turns(&mut guest) < 20, "an idle connection");
    // The host says more than the guest reads.
    let mut host = listener.accept().unwrap().0;
    host.set_nonblocking(true).unwrap();
    while host.write(&[0; 65536]).is_ok() {
        guest.step();
    }
    assert!(turns(&mut guest) < 20, "a guest that does not read");
    // The guest says more than the host reads.
    let full = guest.connect(GATEWAY, port, 40011);
    guest.until("a connection", |g| g.tcp(full).may_send().then_some(()));
    let quiet = listener.accept().unwrap().0;
    for _ in 0..200 {
        guest.tcp(full).send_slice(&[0; 65536]).unwrap();
        guest.poll();
    }
    assert!(turns(&mut guest) < 20, "a host that does not read");
    // Half-closed, either way.
    guest.tcp(idle).close();
    quiet.shutdown(Shutdown::Write).unwrap();
    assert!(turns(&mut guest) < 20, "half-closed connections");
    // A guest that takes no frames.
    guest.card.full.store(true, Ordering::SeqCst);
    host.shutdown(Shutdown::Both).unwrap();
    assert!(turns(&mut guest) < 20, "a guest that takes nothing");
}
