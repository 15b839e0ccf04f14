//! User networking with a real guest: out to a server of the test's, in through a
//! forwarded port.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use crate::harness::{LIMIT, commands, hex};

const BYTES: usize = 24 << 20;

pub fn data() -> Vec<u8> {
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x.to_le_bytes()
    };
    (0..BYTES / 8).flat_map(|_| next()).collect()
}

/// Serves `body` to whoever asks, over HTTP/1.0.
pub fn serve(body: Vec<u8>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            while lines.next().is_some_and(|l| l.is_ok_and(|l| !l.is_empty())) {}
            let head = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
        }
    });
    port
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn download_and_forward(test: &str, device: &str) {
    let Some(c) = commands(test) else { return };
    let body = data();
    let hash = hex(&Sha256::digest(&body));
    let server = serve(body);
    let forwarded = free_port();
    let netdev = format!("user,id=n0,hostfwd=tcp:127.0.0.1:{forwarded}-:7");
    let mut guest = c.boot(&["-no-reboot", "-netdev", &netdev, "-device", device]);
    let got = guest.run(&format!("wget -q -O - http://10.0.2.2:{server}/data | sha256sum"));
    assert_eq!(got.split_whitespace().next(), Some(hash.as_str()));
    // DHCP gives the address the rest has taken for granted.
    let lease = guest.run("udhcpc -n -q -i eth0 -s /bin/true 2>&1");
    assert!(lease.contains("10.0.2.15"), "{lease}");
    guest.run("ping -c 2 10.0.2.2 >/dev/null");
    guest.run("nc -l -p 7 -e cat &");
    assert_eq!(echo(forwarded, b"through the door\n"), b"through the door\n");
    guest.send("poweroff -f\n");
    guest.end_well();
}

/// What the guest's listener sends back; it may need a moment to be there.
fn echo(port: u16, text: &[u8]) -> Vec<u8> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let mut back = vec![0; text.len()];
        let attempt = TcpStream::connect(("127.0.0.1", port)).and_then(|mut s| {
            s.set_read_timeout(Some(Duration::from_secs(10)))?;
            s.write_all(text)?;
            s.read_exact(&mut back)
        });
        match attempt {
            Ok(()) => return back,
            Err(e) => assert!(Instant::now() < deadline, "nothing comes back: {e}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn download_and_forward_over_virtio_mmio() {
    download_and_forward("download_and_forward_over_virtio_mmio", "virtio-net-device,netdev=n0");
}

#[test]
fn download_and_forward_over_virtio_pci() {
    download_and_forward("download_and_forward_over_virtio_pci", "virtio-net-pci,netdev=n0");
}
