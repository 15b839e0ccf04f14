//! Character back ends: what a serial port or the monitor is connected to on the host.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, KeyValues};

/// Where a character device's bytes come from and go to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case", deny_unknown_fields)]
pub enum CharBackend {
    /// No device at all.
    #[default]
    None,
    /// A device whose output is dropped.
    Null,
    /// The terminal mimus runs in.
    Stdio {
        /// Ctrl-A commands, and a monitor on Ctrl-A c (`mon:stdio`).
        monitor: bool,
        /// Ctrl-C ends mimus instead of going to the guest.
        signal: bool,
    },
    /// Output to a file; no input.
    File {
        /// The file.
        path: PathBuf,
        /// Keep what it has.
        append: bool,
    },
    /// A new pseudo-terminal.
    Pty,
    /// A stream socket.
    Socket {
        /// Where.
        address: SocketAddress,
        /// Listen rather than connect.
        server: bool,
        /// As a server, do not start the guest before someone connects.
        wait: bool,
        /// Speak telnet's option negotiation.
        telnet: bool,
    },
    /// Named pipes `PATH.in` and `PATH.out`, or `PATH` for both.
    Pipe {
        /// The path.
        path: PathBuf,
    },
    /// A `-chardev` by name.
    Chardev {
        /// Its id.
        id: String,
    },
}

/// `-chardev BACKEND,id=…`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chardev {
    /// Name.
    pub id: String,
    /// Share among several front ends (`mux=on`).
    #[serde(default)]
    pub mux: bool,
    /// The back end.
    pub backend: CharBackend,
}

/// Address of a socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SocketAddress {
    /// TCP host (empty: any) and port.
    Tcp {
        /// Name or address.
        host: String,
        /// Port; 0 lets the host choose one as a server.
        port: u16,
    },
    /// Unix socket.
    Unix {
        /// Its path.
        path: PathBuf,
    },
}

const LEGACY: &str = "it is one of none, null, stdio, mon:stdio, file:PATH, pty, pipe:PATH, tcp:HOST:PORT, unix:PATH, telnet:HOST:PORT, chardev:ID";

impl CharBackend {
    /// The short syntax of `-serial` and `-monitor`.
    pub fn parse_legacy(option: &str, text: &str) -> Result<Self, ConfigError> {
        let fail = |reason: &str| Err(ConfigError::new(option, text, reason));
        let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
        Ok(match kind {
            "none" => CharBackend::None,
            "null" => CharBackend::Null,
            "stdio" => CharBackend::Stdio { monitor: false, signal: true },
            "mon" if rest == "stdio" => CharBackend::Stdio { monitor: true, signal: false },
            "mon" => {
                return fail("the monitor can be multiplexed with the terminal only: mon:stdio");
            }
            "pty" => CharBackend::Pty,
            "file" | "pipe" | "chardev" if rest.is_empty() => {
                return fail("the part after the ':' is missing");
            }
            "file" => CharBackend::File { path: rest.into(), append: false },
            "pipe" => CharBackend::Pipe { path: rest.into() },
            "chardev" => CharBackend::Chardev { id: rest.into() },
            "tcp" | "telnet" | "unix" => legacy_socket(option, text, kind, rest)?,
            "vc" => return fail("mimus has no graphical consoles: use mon:stdio, pty or none"),
            "udp" | "msmouse" | "braille" | "con" | "websocket" | "ringbuf" | "spicevmc" => {
                return fail(&format!("{kind} is a back end of QEMU that mimus does not have; {LEGACY}"));
            }
            path if path.starts_with("/dev/") => {
                return fail("a host serial port is not supported; pass a pty or a socket");
            }
            _ => return fail(LEGACY),
        })
    }
}

fn legacy_socket(option: &str, text: &str, kind: &str, rest: &str) -> Result<CharBackend, ConfigError> {
    let mut kv =
        KeyValues::parse(option, rest, Some("address")).map_err(|e| ConfigError::new(option, text, e.reason))?;
    let address = kv.take("address").unwrap_or_default();
    let server = kv.take_bool("server")?.unwrap_or(false);
    let wait = kv.take_bool("wait")?.unwrap_or(server);
    kv.take_bool("nodelay")?;
    kv.take_bool("delay")?;
    kv.finish().map_err(|e| ConfigError::new(option, text, e.reason))?;
    let address = if kind == "unix" {
        if address.is_empty() {
            return Err(ConfigError::new(option, text, "the socket's path is missing: unix:PATH"));
        }
        SocketAddress::Unix { path: address.into() }
    } else {
        tcp_address(option, text, &address)?
    };
    Ok(CharBackend::Socket { address, server, wait, telnet: kind == "telnet" })
}

fn tcp_address(option: &str, text: &str, address: &str) -> Result<SocketAddress, ConfigError> {
    let parsed = address.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
    let Some((host, port)) = parsed else {
        return Err(ConfigError::new(
            option,
            text,
            "write HOST:PORT with a port from 0 to 65535, for example 127.0.0.1:4321",
        ));
    };
    Ok(SocketAddress::Tcp { host: host.trim_matches(['[', ']']).into(), port })
}

impl Chardev {
    /// `-chardev BACKEND,id=ID,…`
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let mut kv = KeyValues::parse("-chardev", text, Some("backend"))?;
        let kind = kv.take("backend").ok_or_else(|| kv.error("the back end is missing: -chardev stdio,id=c0"))?;
        let id = kv.take("id").ok_or_else(|| kv.error("id= is missing: a chardev is used by its name"))?;
        let mux = kv.take_bool("mux")?.unwrap_or(false);
        let backend = chardev_backend(&mut kv, &kind, mux)?;
        kv.finish()?;
        Ok(Chardev { id, mux, backend })
    }
}

fn chardev_backend(kv: &mut KeyValues, kind: &str, mux: bool) -> Result<CharBackend, ConfigError> {
    let path = |kv: &mut KeyValues| kv.take("path").ok_or_else(|| kv.error(format!("{kind} needs path=")));
    Ok(match kind {
        "null" => CharBackend::Null,
        "stdio" => CharBackend::Stdio { monitor: mux, signal: kv.take_bool("signal")?.unwrap_or(!mux) },
        "pty" => CharBackend::Pty,
        "file" => CharBackend::File { path: path(kv)?.into(), append: kv.take_bool("append")?.unwrap_or(false) },
        "pipe" => CharBackend::Pipe { path: path(kv)?.into() },
        "socket" => {
            let server = kv.take_bool("server")?.unwrap_or(false);
            let wait = kv.take_bool("wait")?.unwrap_or(server);
            let telnet = kv.take_bool("telnet")?.unwrap_or(false);
            kv.take_bool("nodelay")?;
            let address = match kv.take("path") {
                Some(path) => SocketAddress::Unix { path: path.into() },
                None => {
                    let host = kv.take("host").unwrap_or_default();
                    let port = kv.take_number("port")?.ok_or_else(|| kv.error("socket needs path= or port="))?;
                    let port = u16::try_from(port).map_err(|_| kv.error("port= is at most 65535"))?;
                    SocketAddress::Tcp { host, port }
                }
            };
            CharBackend::Socket { address, server, wait, telnet }
        }
        "vc" | "udp" | "ringbuf" | "msmouse" | "wctablet" | "braille" | "serial" | "parallel" | "spicevmc"
        | "spiceport" | "dbus" | "hub" | "qemu-vdagent" | "testdev" => {
            return Err(kv.error(format!(
                "{kind} is a back end of QEMU that mimus does not have; there are null, stdio, file, pty, pipe, socket"
            )));
        }
        other => {
            return Err(
                kv.error(format!("there is no back end '{other}'; there are null, stdio, file, pty, pipe, socket"))
            );
        }
    })
}
