//! Disks, networks and character devices of the host, from a configuration.

use std::sync::Arc;

use mimus_core::backend::{BlockBackend, CharBackend};
use mimus_core::device::Backends;
use mimus_core::error::HostError;
use mimus_core::io_thread::IoThreadHandle;
use mimus_devices::block::host::{OverlayBlock, RawBlock, RawOptions};
use mimus_devices::char::host::{FileChar, NullChar, PipeChar, PtyChar, SocketAddress, SocketChar, SocketOptions};
use mimus_devices::net::host::user::{UserNet as UserNetwork, UserNetConfig};

use super::MachineError;
use crate::config::{
    CacheMode, CharBackend as CharConfig, ConfigError, Drive, MachineConfig, NetdevBackend, Protocol,
    SocketAddress as SocketConfig, UserNet,
};

/// The name of a `-drive` among the block back ends.
pub fn drive_id(index: usize, drive: &Drive) -> String {
    drive.id.clone().unwrap_or_else(|| format!("#drive{index}"))
}

/// The name of a `-nic` among the network back ends.
pub fn nic_id(index: usize, id: Option<&str>) -> String {
    id.map_or_else(|| format!("#nic{index}"), str::to_owned)
}

/// The name of the network of the board's default card.
pub const DEFAULT_NETWORK: &str = "#net";

/// True if the board's default card is wanted: no word about networks.
pub fn default_network(config: &MachineConfig) -> bool {
    config.nics.is_empty() && config.netdevs.is_empty() && !config.no_defaults
}

/// Opens what `-drive`, `-netdev` and `-nic` name.
pub fn open(config: &MachineConfig, backends: &Backends) -> Result<(), MachineError> {
    for (index, drive) in config.drives.iter().enumerate() {
        let id = drive_id(index, drive);
        if !backends.add_block(&id, open_drive(drive, config.snapshot)?) {
            return Err(
                ConfigError::new("-drive", &format!("id={id}"), "this id is given twice: each must differ").into()
            );
        }
    }
    for netdev in &config.netdevs {
        add_network(backends, "-netdev", &netdev.id, &netdev.backend)?;
    }
    for (index, nic) in config.nics.iter().enumerate() {
        if let Some(backend) = &nic.backend {
            add_network(backends, "-nic", &nic_id(index, nic.id.as_deref()), backend)?;
        }
    }
    if default_network(config) {
        add_network(backends, "-nic", DEFAULT_NETWORK, &NetdevBackend::User(UserNet::default()))?;
    }
    Ok(())
}

fn open_drive(drive: &Drive, snapshot: bool) -> Result<Arc<dyn BlockBackend>, MachineError> {
    let Some(path) = &drive.file else {
        return Err(ConfigError::new("-drive", "", "file= is missing: name a disk image").into());
    };
    let name = format!("file={}", path.display());
    if let Some(format) = drive.format.as_deref().filter(|f| *f != "raw") {
        let reason = format!(
            "format={format} is not supported; convert it with: qemu-img convert -O raw {} disk.img",
            path.display()
        );
        return Err(ConfigError::new("-drive", &name, reason).into());
    }
    let read_only = drive.read_only || drive.cdrom;
    let temporary = (drive.snapshot || snapshot) && !read_only;
    if drive.format.is_none()
        && let Some(format) = foreign_format(path)
    {
        let reason = format!(
            "it looks like a {format} image; convert it with: qemu-img convert -O raw {} disk.img (or say format=raw if it is none)",
            path.display()
        );
        return Err(ConfigError::new("-drive", &name, reason).into());
    }
    let sync = matches!(drive.cache, Some(CacheMode::Writethrough | CacheMode::Directsync));
    let options = RawOptions { read_only: read_only || temporary, discard: drive.discard, lock: true, sync };
    let open = |reason| MachineError::from(ConfigError::new("-drive", &name, reason));
    let disk = Arc::new(RawBlock::open(path, options).map_err(|e| open(e.reason))?);
    if temporary {
        return Ok(Arc::new(OverlayBlock::new(disk).map_err(|e| open(e.reason))?));
    }
    Ok(disk)
}

/// The format whose header the file begins with. Never asked when `format=` says raw: a
/// guest can write any header to its disk.
fn foreign_format(path: &std::path::Path) -> Option<&'static str> {
    const MAGICS: &[(&[u8], &str)] = &[
        (b"QFI\xfb", "qcow2"),
        (b"KDMV", "vmdk"),
        (b"# Disk DescriptorFile", "vmdk"),
        (b"conectix", "vpc"),
        (b"vhdxfile", "vhdx"),
        (b"<<< Oracle VM VirtualBox Disk Image >>>", "vdi"),
    ];
    let mut head = [0; 64];
    let mut file = std::fs::File::open(path).ok().filter(|f| f.metadata().is_ok_and(|m| m.is_file()))?;
    let n = std::io::Read::read(&mut file, &mut head).ok()?;
    MAGICS.iter().find(|(magic, _)| head[..n].starts_with(magic)).map(|m| m.1)
}

fn add_network(backends: &Backends, option: &str, id: &str, backend: &NetdevBackend) -> Result<(), MachineError> {
    let NetdevBackend::User(user) = backend;
    let network =
        UserNetwork::open(user_config(user)).map_err(|e| MachineError::Other(format!("{option} user: {e}")))?;
    if !backends.add_net(id, Arc::new(network)) {
        return Err(ConfigError::new(option, &format!("id={id}"), "this id is given twice: each must differ").into());
    }
    Ok(())
}

fn user_config(user: &UserNet) -> UserNetConfig {
    let forward = |f: &crate::config::HostForward| {
        let protocol = match f.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        let text = |a: Option<std::net::Ipv4Addr>| a.map(|a| a.to_string()).unwrap_or_default();
        let (host, guest) = (text(f.host_address), text(f.guest_address));
        let line = format!("{protocol}:{host}:{}-{guest}:{}", f.host_port, f.guest_port);
        line.as_str().into()
    };
    UserNetConfig {
        net: Some(format!("{}/{}", user.network, user.prefix)),
        host: user.host,
        dns: user.dns,
        dhcpstart: user.dhcp_start,
        hostname: user.hostname.clone(),
        restrict: Some(user.restrict),
        hostfwd: user.forwards.iter().map(forward).collect(),
        ..UserNetConfig::default()
    }
}

/// Opens a character back end other than the terminal; nothing for `none`.
pub fn open_char(
    option: &str,
    config: &CharConfig,
    io: &IoThreadHandle,
) -> Result<Option<Arc<dyn CharBackend>>, MachineError> {
    let named = |e: HostError| MachineError::Other(format!("{option}: {e}"));
    Ok(Some(match config {
        CharConfig::None => return Ok(None),
        CharConfig::Null => NullChar::new(),
        CharConfig::File { path, append } => FileChar::open(io, path, *append).map_err(named)?,
        CharConfig::Pipe { path } => PipeChar::open(io, path).map_err(named)?,
        CharConfig::Pty => {
            let pty = PtyChar::open(io).map_err(named)?;
            eprintln!("{option}: connected to {}", pty.path().display());
            pty
        }
        CharConfig::Socket { address, server, wait, telnet } => {
            let address = match address {
                SocketConfig::Tcp { host, port } => SocketAddress::Tcp { host: host.clone(), port: *port },
                SocketConfig::Unix { path } => SocketAddress::Unix(path.clone()),
            };
            let socket =
                SocketChar::open(io, SocketOptions { address, server: *server, telnet: *telnet }).map_err(named)?;
            if *server && let Some(at) = socket.local_addr() {
                eprintln!("{option}: listening on {at}");
            }
            if *server && *wait {
                socket.wait_connected(None);
            }
            socket
        }
        CharConfig::Stdio { .. } | CharConfig::Chardev { .. } => {
            return Err(MachineError::Other(format!("{option}: the terminal cannot be used here")));
        }
    }))
}
