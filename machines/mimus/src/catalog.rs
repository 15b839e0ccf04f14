//! The lists behind `-machine help`, `-cpu help`, `-accel help`, `-device help` and so on.

use mimus_core::arch::GuestArch;
use mimus_machines::boards;
use mimus_machines::config::options::LOG_ITEMS;

use crate::cli::SystemArgs;

/// The list that one of the options asks for by `help` or `?`, if any does.
pub fn requested(guest: &str, args: &SystemArgs) -> Option<String> {
    let asks = |text: &str| matches!(text, "help" | "?");
    let any = |texts: &[String]| texts.iter().any(|t| asks(t));
    if any(&args.machine) {
        return Some(table(&format!("boards of {guest}:"), &boards::list(arch(guest)?)));
    }
    if args.cpu.as_deref().is_some_and(asks) {
        return Some(table(&format!("CPU models of {guest}:"), &boards::cpus(arch(guest)?)));
    }
    if any(&args.accel) {
        return Some(accelerators());
    }
    if any(&args.device) {
        return Some(crate::run::device_help(None));
    }
    if let Some(driver) = args.device.iter().find_map(|d| d.strip_suffix(",help").or(d.strip_suffix(",?"))) {
        return Some(crate::run::device_help(Some(driver)));
    }
    if any(&args.netdev) || any(&args.nic) {
        return Some(table(
            "network back ends:",
            &[(
                "user",
                "NAT to the host's network, without privileges (net=, host=, dns=, dhcpstart=, hostname=, restrict=, hostfwd=)",
            )],
        ));
    }
    if any(&args.chardev) {
        return Some(table(
            "character back ends:",
            &[
                ("null", "output is dropped"),
                ("stdio", "this terminal (mux=, signal=)"),
                ("file", "output to a file (path=, append=)"),
                ("pty", "a new pseudo-terminal"),
                ("pipe", "named pipes PATH.in and PATH.out (path=)"),
                ("socket", "TCP or Unix socket (host=, port= or path=, server=, wait=, telnet=)"),
            ],
        ));
    }
    args.log.as_deref().is_some_and(asks).then(|| table("log items of -d:", LOG_ITEMS))
}

fn accelerators() -> String {
    let kvm = match std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => "the host's virtualisation (/dev/kvm), for guests of the host's architecture",
        Err(_) => "the host's virtualisation; /dev/kvm cannot be opened here",
    };
    table("accelerators:", &[("tcg", "dynamic translation, for any guest"), ("kvm", kvm)])
}

fn arch(guest: &str) -> Option<GuestArch> {
    GuestArch::ALL.into_iter().find(|a| a.name() == guest)
}

/// A heading and two columns.
pub fn table<T: AsRef<str>>(heading: &str, rows: &[(&str, T)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut out = format!("{heading}\n");
    for (name, about) in rows {
        out.push_str(&format!("  {name:<width$}  {}\n", about.as_ref()));
    }
    out
}
