//! `mimus`: a full-system emulator.
//!
//! `mimus system <guest> …` takes QEMU's command line, as does a link to this program
//! named `mimus-system-<guest>`; the other commands are shorter ways in. This file
//! only tells the commands apart: see [`system`] and [`try_guest`].

mod accels;
mod argv;
mod catalog;
mod cli;
mod console;
mod debugger;
mod doctor;
mod gdb;
mod host;
mod input;
mod line_editor;
mod logging;
mod monitor;
mod mux;
mod preflight;
mod qemu_options;
mod registers;
mod run;
mod signals;
mod stepping;
mod system;
mod terminal;
mod trace_tool;
mod tracing;
mod try_guest;
mod views;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use mimus_machines::boot::SUPPORTED_GUESTS;

const USAGE: &str = "\
mimus: a full-system emulator

usage:
  mimus try <guest>                 fetch a ready-made Linux and boot it to a shell
  mimus system <guest> [options]    run a machine; the options are QEMU's, with one dash or two
  mimus system <guest> -help        the options
  mimus debug <guest> [options]     the same machine, stopped, in our debugger
  mimus trace <what> FILE           print, count and evaluate what -trace FILE wrote; mimus trace help
  mimus doctor                      what works on this machine, and what to do about the rest
  mimus -version                    the version

A link to mimus named mimus-system-<guest> behaves as `mimus system <guest>`.
";

fn main() -> ExitCode {
    terminal::restore_on_panic();
    let mut args = std::env::args_os();
    let program = args.next().unwrap_or_default();
    let rest: Vec<OsString> = args.collect();
    let result = match linked_guest(&program) {
        Some(guest) => system::main(&guest, rest),
        None => command(rest),
    };
    terminal::restore();
    match result {
        Ok(code) => code,
        Err(e) => {
            // One line: the chain of causes, outermost first.
            eprintln!("mimus: {}", one_line(&e));
            ExitCode::FAILURE
        }
    }
}

/// The guest in `mimus-system-<guest>`, if that is the name the program was called by.
fn linked_guest(program: &OsString) -> Option<String> {
    let name = Path::new(program).file_name()?.to_str()?;
    Some(name.strip_prefix("mimus-system-")?.to_owned())
}

fn command(rest: Vec<OsString>) -> anyhow::Result<ExitCode> {
    let mut rest = rest.into_iter();
    let Some(first) = rest.next() else {
        print!("{USAGE}\nguests: {}\n", SUPPORTED_GUESTS.join(", "));
        return Ok(ExitCode::SUCCESS);
    };
    match first.to_str().unwrap_or_default() {
        "system" => match rest.next() {
            Some(guest) => system::main(&guest.to_string_lossy(), rest.collect()),
            None => anyhow::bail!(
                "system: the guest is missing: mimus system riscv64 -help (guests: {})",
                SUPPORTED_GUESTS.join(", ")
            ),
        },
        "debug" => match rest.next() {
            Some(guest) => system::debug(&guest.to_string_lossy(), rest.collect()),
            None => anyhow::bail!("debug: the guest is missing: mimus debug riscv64 -kernel Image"),
        },
        "try" => try_guest::main(rest.collect()),
        "trace" => trace_tool::main(rest.collect()),
        "doctor" => doctor::main(rest.collect()),
        "help" | "-help" | "--help" | "-h" => {
            print!("{USAGE}\nguests: {}\n", SUPPORTED_GUESTS.join(", "));
            Ok(ExitCode::SUCCESS)
        }
        "version" | "-version" | "--version" | "-V" => {
            println!("{}", system::version());
            Ok(ExitCode::SUCCESS)
        }
        other if other.starts_with('-') => {
            anyhow::bail!("{other}: options of a machine come after the guest: mimus system riscv64 {other} …")
        }
        other => {
            let near = mimus_machines::config::keyval::nearest(
                other,
                ["system", "debug", "try", "trace", "doctor", "help", "version"].into_iter(),
            );
            anyhow::bail!(
                "there is no command '{other}'{}; see mimus help",
                near.map_or(String::new(), |n| format!(" (did you mean {n}?)"))
            )
        }
    }
}

/// An error with its causes, those left out that it quotes itself.
fn one_line(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}
