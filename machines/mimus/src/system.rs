//! `mimus system <guest> …`: from the command line to a running machine.

use std::ffi::OsString;
use std::process::ExitCode;

use mimus_machines::boot::SUPPORTED_GUESTS;
use mimus_machines::config::keyval::nearest;

use crate::{catalog, cli, logging, preflight, run};

/// Name and version, as `-version` prints it.
pub fn version() -> String {
    format!("mimus {}", env!("CARGO_PKG_VERSION"))
}

/// Runs the machine that `words` describe.
pub fn main(guest: &str, words: Vec<OsString>) -> anyhow::Result<ExitCode> {
    if matches!(guest, "-help" | "--help" | "help" | "-h") {
        print!("{}", cli::help("<guest>"));
        println!("\nguests: {}", SUPPORTED_GUESTS.join(", "));
        return Ok(ExitCode::SUCCESS);
    }
    if !SUPPORTED_GUESTS.contains(&guest) {
        let near =
            nearest(guest, SUPPORTED_GUESTS.iter().copied()).map_or(String::new(), |n| format!(" (did you mean {n}?)"));
        anyhow::bail!("system {guest}: there is no such guest{near}; there are {}", SUPPORTED_GUESTS.join(", "));
    }
    run_with(guest, words, false)
}

/// Debugs the machine that `words` describe.
pub fn debug(guest: &str, words: Vec<OsString>) -> anyhow::Result<ExitCode> {
    if !SUPPORTED_GUESTS.contains(&guest) {
        return main(guest, words);
    }
    run_with(guest, words, true)
}

fn run_with(guest: &str, words: Vec<OsString>, debug: bool) -> anyhow::Result<ExitCode> {
    let mut args = cli::parse(words)?;
    if args.help {
        print!("{}", cli::help(guest));
        return Ok(ExitCode::SUCCESS);
    }
    if args.version {
        println!("{}", version());
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(text) = catalog::requested(guest, &args) {
        print!("{text}");
        return Ok(ExitCode::SUCCESS);
    }
    if debug {
        // The terminal is the debugger's; what the guest prints goes there too.
        if args.serial.is_empty() {
            args.serial.push("file:/dev/stdout".to_owned());
        }
        args.paused = true;
    }
    let config = args.into_config(guest)?;
    logging::start(&config.log)?;
    preflight::check(&config)?;
    run::run_machine(config, debug)
}
