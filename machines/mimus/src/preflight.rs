//! Checks of the host's side before anything is built, for errors that name the option.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};

use anyhow::bail;
use mimus_core::error::why_not_made;
use mimus_machines::boot::human;
use mimus_machines::config::{Drive, DriveInterface, HostForward, MachineConfig, NetdevBackend, Protocol};

use crate::host;

/// Least RAM a machine gets: below, not even the device tree has room beside a kernel.
const MIN_MEMORY: u64 = 8 << 20;

/// Finds what cannot work on this host.
pub fn check(config: &MachineConfig) -> anyhow::Result<()> {
    memory(config.memory, host::memory())?;
    for drive in &config.drives {
        disk(drive, config.snapshot)?;
    }
    for (option, backend) in config
        .netdevs
        .iter()
        .map(|n| ("-netdev", Some(&n.backend)))
        .chain(config.nics.iter().map(|n| ("-nic", n.backend.as_ref())))
    {
        if let Some(NetdevBackend::User(user)) = backend {
            user.forwards.iter().try_for_each(|f| port(option, f))?;
        }
    }
    if let Some(path) = &config.pidfile {
        let failed = |e| anyhow::anyhow!("-pidfile {}: {}", path.display(), why_not_made(path, &e));
        std::fs::write(path, format!("{}\n", std::process::id())).map_err(failed)?;
    }
    Ok(())
}

fn memory(asked: u64, host: Option<(u64, u64)>) -> anyhow::Result<()> {
    if asked < MIN_MEMORY {
        bail!(
            "-m {}: too little for a machine to start; use -m 512M, or at least -m {}",
            human(asked),
            human(MIN_MEMORY).replace(" MiB", "M")
        );
    }
    match host {
        Some((total, available)) if asked > total => {
            bail!(
                "-m {}: this host has {} of memory ({} available); use at most -m {}M",
                human(asked),
                human(total),
                human(available),
                (available >> 20).max(8)
            )
        }
        _ => Ok(()),
    }
}

fn disk(drive: &Drive, snapshot: bool) -> anyhow::Result<()> {
    let Some(path) = &drive.file else {
        return Ok(());
    };
    let name = path.display();
    let writable = !(drive.read_only || drive.snapshot || snapshot);
    match OpenOptions::new().read(true).write(writable).open(path) {
        Ok(file) if file.metadata().is_ok_and(|m| m.is_dir()) => {
            bail!("-drive file={name}: it is a directory; give a disk image")
        }
        Ok(_) => Ok(()),
        Err(e) if e.kind() == ErrorKind::NotFound && drive.interface == DriveInterface::Pflash => {
            bail!("-drive if=pflash,file={name}: no such file; give a firmware image, or a copy of its variables")
        }
        Err(e) if e.kind() == ErrorKind::NotFound => {
            bail!("-drive file={name}: no such file; make an empty disk with: truncate -s 8G {name}")
        }
        Err(e) if e.kind() == ErrorKind::IsADirectory => {
            bail!("-drive file={name}: it is a directory; give a disk image")
        }
        Err(e) if writable && matches!(e.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) => {
            bail!("-drive file={name}: it cannot be written ({e}); make it writable, or add readonly=on or snapshot=on")
        }
        Err(e) => bail!("-drive file={name}: {e}"),
    }
}

fn port(option: &str, forward: &HostForward) -> anyhow::Result<()> {
    if forward.host_port == 0 {
        return Ok(());
    }
    let address = forward.host_address.unwrap_or(Ipv4Addr::UNSPECIFIED);
    let (name, bound) = match forward.protocol {
        Protocol::Tcp => ("TCP", TcpListener::bind((address, forward.host_port)).map(drop)),
        Protocol::Udp => ("UDP", UdpSocket::bind((address, forward.host_port)).map(drop)),
    };
    let port = forward.host_port;
    match bound {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == ErrorKind::AddrInUse => {
            bail!("{option} hostfwd: {name} port {port} of {address} is in use by another program; choose another port")
        }
        Err(e) if e.kind() == ErrorKind::PermissionDenied => {
            bail!("{option} hostfwd: {name} port {port} needs privileges on this host; use a port above 1023")
        }
        Err(e) => bail!("{option} hostfwd: cannot listen on {name} port {port} of {address}: {e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_too_little_or_too_much() {
        let host = Some((24 << 30, 20 << 30));
        assert!(memory(1 << 20, host).unwrap_err().to_string().starts_with("-m 1 MiB: too little"));
        assert_eq!(
            memory(1 << 40, host).unwrap_err().to_string(),
            "-m 1 TiB: this host has 24 GiB of memory (20 GiB available); use at most -m 20480M"
        );
        assert!(memory(512 << 20, host).is_ok());
    }

    #[test]
    fn a_busy_port_is_told() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let busy = listener.local_addr().unwrap().port();
        let forward = HostForward::parse(&format!("tcp:127.0.0.1:{busy}-:22")).unwrap();
        assert!(port("-nic", &forward).unwrap_err().to_string().contains("in use by another program"));
    }
}
