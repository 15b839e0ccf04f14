//! Transcripts: what is sent to each guest on each engine, and what it answers.
//!
//! A line that begins with `>` is a packet, the one with `<` behind it the reply; `~` sends Ctrl-C; `?name` begins lines that
//! hold only if the engine has that ability, up to `?`. `MIMUS_GOLDEN=write` writes the replies anew.

use std::fmt::Write;
use std::path::PathBuf;

use mimus_tests::cpus::alone;

use crate::harness::{Client, Debuggee, Engine, Setup};
use crate::programs;

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/gdb/golden").join(format!("{name}.txt"))
}

/// The transcript that the packets of `script` give.
fn play(script: &str, client: &mut Client, abilities: &[&str]) -> String {
    let mut out = String::new();
    let mut skip = false;
    let mut reply: Option<String> = None;
    for line in script.lines() {
        if let Some(ability) = line.strip_prefix('?') {
            skip = !ability.is_empty() && !abilities.contains(&ability);
        } else if skip {
            // As it stands there.
        } else if let Some(packet) = line.strip_prefix("> ") {
            reply = Some(client.ask(packet));
        } else if line == "~" {
            reply = Some(client.interrupt());
        } else if line.starts_with('<') {
            let reply = reply.take().unwrap_or_default();
            let _ = writeln!(out, "{}", format!("< {}", reply.replace('\n', "\\n")).trim_end());
            continue;
        }
        let _ = writeln!(out, "{line}");
    }
    out
}

fn compare(name: &str, engine: Engine, guest: &Debuggee, abilities: &[&str]) {
    let path = path(name);
    let script = std::fs::read_to_string(&path).unwrap();
    let got = play(&script, &mut guest.client(), abilities);
    if std::env::var("MIMUS_GOLDEN").is_ok_and(|v| v == "write") && engine == Engine::Jit {
        std::fs::write(&path, &got).unwrap();
        return;
    }
    let mut last = "";
    for (number, (wanted, got)) in script.lines().zip(got.lines()).enumerate() {
        assert_eq!(got, wanted, "{name} on {engine:?}, line {}, after {last}", number + 1);
        last = wanted;
    }
    assert_eq!(got.lines().count(), script.lines().count());
}

const ALL: &[&str] = &["watch"];

#[test]
fn riscv64() {
    let _one = alone();
    for engine in [Engine::Jit, Engine::Interp] {
        let kernel = programs::riscv::bare().finish();
        let guest = Setup::new("riscv64", "virt", 1).kernel(&kernel, true).start(engine);
        compare("riscv64", engine, &guest, ALL);
        let counted = guest.word(programs::riscv::JIFFIES);
        guest.wait_for(programs::riscv::JIFFIES, counted + 1000);
    }
}

#[cfg(target_arch = "x86_64")]
fn x86_guest(name: &str, engine: Engine, abilities: &[&str]) {
    let long = name == "x86_64";
    let guest = Setup::new(name, "pc", 1).rom(&programs::x86::rom(long)).start(engine);
    compare(name, engine, &guest, abilities);
    let counted = guest.word(programs::x86::JIFFIES);
    guest.wait_for(programs::x86::JIFFIES, counted + 1000);
}

#[cfg(target_arch = "x86_64")]
#[test]
fn x86_under_the_translator() {
    let _one = alone();
    for engine in [Engine::Jit, Engine::Interp] {
        x86_guest("x86_64", engine, ALL);
        x86_guest("i386", engine, ALL);
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn x86_under_kvm() {
    use crate::harness::skipped;
    use mimus_core::accel::Accelerator;
    let name = "x86_under_kvm";
    let why = mimus_accel_kvm::KvmAccelerator.probe(mimus_core::arch::GuestArch::X86_64).err();
    if let Some(why) = why {
        return skipped(name, &why.to_string());
    }
    let abilities: &[&str] = match mimus_accel_kvm::Quirks::of_host() {
        Ok(q) if q.no_watchpoints => {
            skipped("x86_under_kvm, watchpoints", "this host's KVM does not report watched accesses");
            &[]
        }
        Ok(_) => ALL,
        Err(e) => return skipped(name, &e.to_string()),
    };
    x86_guest("x86_64", Engine::Kvm, abilities);
    x86_guest("i386", Engine::Kvm, abilities);
}
