//! The network under test with a small guest, over loopback only.

mod guest;
mod hostile;
mod services;
mod streams;

use super::{UserNet, UserNetConfig};

/// The byte at `at` of a stream that repeats nowhere near itself.
fn pattern(at: usize) -> u8 {
    (at.wrapping_mul(2_654_435_761) >> 16) as u8
}

fn config(json: &str) -> UserNetConfig {
    serde_json::from_str(json).unwrap()
}

fn refusal(json: &str) -> String {
    UserNet::new(config(json), Box::new(|_| true)).unwrap_err()
}

#[test]
fn options_have_qemus_names_and_errors_name_the_option() {
    let c = config(
        r#"{"net":"192.168.7.0/24","hostname":"vm","restrict":true,"ipv6-prefix":"fd00::",
            "tftp-server-name":"boot","hostfwd":["tcp::0-:22",{"str":"udp:127.0.0.1:0-192.168.7.20:53"}]}"#,
    );
    let net = UserNet::new(c, Box::new(|_| true)).unwrap();
    let guests: Vec<String> = net.hostfwds().iter().map(|(_, g)| g.to_string()).collect();
    assert_eq!(guests, ["192.168.7.15:22", "192.168.7.20:53"]);
    assert!(serde_json::from_str::<UserNetConfig>(r#"{"nett":"x"}"#).is_err());
    for (json, part) in [
        (r#"{"net":"10.0.2"}"#, "net=10.0.2 is not"),
        (r#"{"net":"10.0.2.0/31"}"#, "prefix of 4 to 28"),
        (r#"{"host":"10.0.3.2"}"#, "host=10.0.3.2 is not a host address"),
        (r#"{"dns":"10.0.2.2"}"#, "must differ"),
        (r#"{"ipv4":false,"ipv6":false}"#, "turn one on"),
        (r#"{"hostfwd":["tcp::x-:22"]}"#, "bad host port"),
        (r#"{"hostfwd":["tcp::1"]}"#, "not of the form"),
        (r#"{"hostfwd":["tcp::0-:0"]}"#, "bad guest port"),
        (r#"{"hostfwd":["tcp::0-1.2.3.4:5"]}"#, "not a guest's address"),
    ] {
        let error = refusal(json);
        assert!(error.contains(part), "{json}: {error}");
        assert!(!error.contains('\n'));
    }
}

#[test]
fn a_busy_port_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap();
    let error = refusal(&format!(r#"{{"hostfwd":["tcp:{addr}-:22"]}}"#));
    assert_eq!(error, format!("hostfwd tcp:{addr}: address already in use; pick another host port"));
}

#[test]
fn forwardings_come_and_go_at_run_time() {
    let net = UserNet::new(UserNetConfig::default(), Box::new(|_| true)).unwrap();
    let addr = net.add_hostfwd("tcp:127.0.0.1:0-:22").unwrap();
    assert!(std::net::TcpListener::bind(addr).is_err());
    net.remove_hostfwd(&format!("tcp:{addr}")).unwrap();
    assert!(std::net::TcpListener::bind(addr).is_ok());
    assert!(net.remove_hostfwd(&format!("tcp:{addr}")).is_err());
    assert!(net.hostfwds().is_empty());
}
