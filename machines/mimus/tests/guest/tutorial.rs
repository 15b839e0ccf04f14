//! `docs/tutorial-debugging.md` without gdb, and what traces of its kernel tell: each command the page shows is given, and
//! says what it says. The part with gdb is in `gdb.rs`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::harness::{Dir, Mimus, skipped};

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs")
}

/// Builds the tutorial's kernel as the page says; `None` after saying what is not there.
fn kernel(test: &str, dir: &Dir, source: &str) -> Option<String> {
    std::fs::write(dir.path("sensors.S"), source).unwrap();
    let page = std::fs::read_to_string(docs().join("tutorial-debugging.md")).unwrap();
    let commands = page.lines().filter_map(|l| l.strip_prefix("$ riscv64-linux-gnu-"));
    for command in commands {
        let mut words = command.split(' ');
        let program = format!("riscv64-linux-gnu-{}", words.next().unwrap());
        match Command::new(&program).args(words).current_dir(&dir.0).stderr(Stdio::null()).status() {
            Ok(status) => assert!(status.success(), "{command}"),
            Err(_) => {
                skipped(test, &format!("there is no {program} (binutils-riscv64-linux-gnu)"));
                return None;
            }
        }
    }
    Some(dir.path("sensors"))
}

fn source() -> String {
    std::fs::read_to_string(docs().join("tutorial/sensors.S")).unwrap()
}

/// The source as the page mends it.
fn mended() -> String {
    let page = std::fs::read_to_string(docs().join("tutorial-debugging.md")).unwrap();
    let new = page.split("```").find(|b| b.starts_with("\ncopy_string:")).expect("the new copy_string").trim_start();
    let source = source();
    let (before, after) = source.split_once("copy_string:\n").expect("copy_string");
    let (_, after) = after.split_once("        ret\n").expect("its end");
    format!("{before}{new}{after}")
}

#[test]
fn without_gdb() {
    let test = "tutorial::without_gdb";
    let dir = Dir::new("tutorial-without-gdb");
    let Some(_) = kernel(test, &dir, &source()) else { return };
    let page = std::fs::read_to_string(docs().join("tutorial-debugging.md")).unwrap();
    let start =
        page.lines().find_map(|l| l.strip_prefix("$ mimus ").filter(|l| l.starts_with("debug "))).expect("its start");
    let sessions: Vec<&str> = page.split("```").skip(1).step_by(2).filter(|b| b.contains("(debug) ")).collect();
    assert_eq!(sessions.len(), 2, "the crash, and who wrote it");
    for session in sessions {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mimus"));
        command.args(start.split(' ')).current_dir(&dir.0);
        let mut machine = Mimus::of(command);
        machine.wait_for("=> ");
        let mut said = 0;
        for line in session.lines().filter(|l| !l.is_empty() && *l != "…") {
            match line.strip_prefix("(debug) ") {
                Some(command) => machine.send(&format!("{command}\n")),
                None => {
                    machine.wait_for(line);
                    said += 1;
                }
            }
        }
        assert!(said > 3, "{session}");
        machine.send("quit\n");
        machine.end_well();
    }
}

/// `mimus trace` of the kernel with its bug: what the page finds with a watchpoint is in the trace.
#[test]
fn the_trace_tells_who_wrote_it() {
    let test = "tutorial::the_trace_tells_who_wrote_it";
    let dir = Dir::new("tutorial-trace");
    let Some(kernel) = kernel(test, &dir, &source()) else { return };
    let file = dir.path("trace");
    let args = ["-accel", "tcg", "-bios", "none", "-kernel", &kernel, "-trace", &format!("{file},what=mem")];
    let mut machine = Mimus::riscv64(&args);
    machine.wait_for("pressure is trap!");
    machine.send("\u{1}x");
    machine.end_well();
    let trace = |args: &[&str]| {
        let mut mimus = Mimus::start(&[&["trace"], args].concat());
        mimus.end_well();
        mimus.transcript()
    };
    let last = trace(&["last-write", &file, "0x80000388", "--symbols", &kernel]);
    assert!(last.contains("<copy_string") && last.contains("store  1 at 0000000080000388 = 0x0"), "{last}");
    // Before that it was right: the time is what the answer begins with.
    let time = last.split_whitespace().next().unwrap_or_default();
    let before = trace(&["last-write", &file, "0x80000388", "--before", time, "--symbols", &kernel]);
    assert!(before.contains("<register_sensor") && before.contains("= 0x80000210"), "{before}");
    let flame = trace(&["flame", &file, "--symbols", &kernel]);
    assert!(flame.lines().any(|l| l.contains("register_sensor;copy_string ")), "{flame}");
    let only = trace(&["print", &file, "addr=0x80000388-0x8000038f", "--symbols", &kernel]);
    let accesses: Vec<&str> = only.lines().filter(|l| l.contains(" store ") || l.contains(" load ")).collect();
    assert!(accesses.len() >= 3 && accesses.iter().all(|l| l.contains(" at 0000000080000388 = ")), "{only}");
    // Of a trace that breaks off, what there is.
    let bytes = std::fs::read(&file).unwrap();
    let short = dir.path("short");
    std::fs::write(&short, &bytes[..bytes.len() - 7]).unwrap();
    for command in ["print", "count", "flame", "coverage"] {
        let said = trace(&[command, &short]);
        assert!(said.contains("breaks off"), "{command}: {said}");
    }
    for (text, says) in [
        (&bytes[..10], "the trace breaks off"),
        (&b"hello, this is no trace at all, but long enough for a header"[..], "this is no trace"),
    ] {
        std::fs::write(&short, text).unwrap();
        let mut mimus = Mimus::start(&["trace", "print", &short]);
        assert_eq!(mimus.end().code(), Some(1));
        assert!(mimus.transcript().contains(says), "{}", mimus.transcript());
    }
}

/// What is traced of an access to a device does not get in the way of what is traced of the same access to memory.
#[test]
fn a_trace_of_everything() {
    let test = "tutorial::a_trace_of_everything";
    let dir = Dir::new("tutorial-everything");
    let Some(kernel) = kernel(test, &dir, &mended()) else { return };
    let file = dir.path("trace");
    let traced = format!("{file},what=all");
    let mut machine = Mimus::riscv64(&["-accel", "tcg", "-bios", "none", "-kernel", &kernel, "-trace", &traced]);
    machine.end_well();
    let said = machine.transcript().replace('\r', "");
    let text = said.find("light is dim").and_then(|at| said.get(at..)).expect(&said);
    let text = &text[..text.find("all sensors read\n").expect(text) + "all sensors read\n".len()];
    let mut mimus = Mimus::start(&["trace", "print", &file, "-n", "1000000"]);
    mimus.end_well();
    let printed = mimus.transcript();
    let lines: Vec<&str> = printed.lines().map(str::trim).collect();
    let mut written = Vec::new();
    for pair in lines.windows(2) {
        // Time, vCPU, the instruction's address, then what it did.
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let (device, access) = (words(pair[0]), words(pair[1]));
        let what = device.get(3..).unwrap_or_default().join(" ");
        let Some(value) = what.strip_prefix("device write 1 at 0x10000000 = ") else { continue };
        assert_eq!(access[..3], device[..3], "{pair:?}");
        assert_eq!(access[3..].join(" "), format!("store 1 at 0000000010000000 = {value}"), "{pair:?}");
        written.push(u8::from_str_radix(value.trim_start_matches("0x"), 16).unwrap());
    }
    assert_eq!(String::from_utf8_lossy(&written).replace('\r', ""), text);
}

/// Coverage of the mended kernel, line by line and block by block.
#[test]
fn coverage_of_the_mended_kernel() {
    let test = "tutorial::coverage_of_the_mended_kernel";
    let dir = Dir::new("tutorial-coverage");
    let source = mended();
    let Some(kernel) = kernel(test, &dir, &source) else { return };
    let (file, lcov, drcov) = (dir.path("trace"), dir.path("lcov"), dir.path("drcov"));
    let mut machine = Mimus::riscv64(&["-accel", "tcg", "-bios", "none", "-kernel", &kernel, "-trace", &file]);
    machine.end_well();
    assert!(machine.transcript().contains("all sensors read"), "{}", machine.transcript());
    let args = ["trace", "coverage", &file, "--symbols", &kernel, "--lcov", &lcov, "--drcov", &drcov];
    let mut mimus = Mimus::start(&args);
    mimus.end_well();
    let lcov = std::fs::read_to_string(&lcov).unwrap();
    let mut records = lcov.split("end_of_record\n").filter(|r| !r.is_empty());
    let record = records.next().expect("a source file");
    assert!(records.next().is_none() && record.starts_with("TN:\nSF:") && record.contains("sensors.S\n"), "{lcov}");
    let lines: Vec<(usize, u64)> = record
        .lines()
        .filter_map(|l| l.strip_prefix("DA:")?.split_once(','))
        .map(|(line, times)| (line.parse().unwrap(), times.parse().unwrap()))
        .collect();
    assert!(lines.is_sorted() && lines.windows(2).all(|w| w[0].0 != w[1].0));
    let hit = lines.iter().filter(|(_, times)| *times != 0).count();
    assert!(record.contains(&format!("LF:{}\nLH:{hit}\n", lines.len())), "{record}");
    // Against the source: what runs once for each sensor, and the handler that never does.
    let text: Vec<&str> = source.lines().collect();
    let times_of = |label: &str| {
        let at = text.iter().position(|l| l.starts_with(label)).unwrap_or_else(|| panic!("{label}"));
        // The first line with code at or behind the label.
        lines.iter().find(|(line, _)| *line > at).map(|(_, times)| *times)
    };
    assert_eq!(times_of("register_sensor:"), Some(3), "{record}");
    assert_eq!(times_of("copy_string:"), Some(3), "{record}");
    assert_eq!(times_of("read_pressure:"), Some(1), "{record}");
    assert_eq!(times_of("trap:"), Some(0), "{record}");
    // drcov: a module that is the kernel, and blocks within it.
    let drcov = std::fs::read(&drcov).unwrap();
    let table = drcov.windows(10).position(|w| w == b"BB Table: ").unwrap();
    let head = String::from_utf8_lossy(&drcov[..table]);
    let wanted = ["DRCOV VERSION: 2\n", "Module Table: version 2, count 2\n", "Columns: id, base, end, entry, path\n"];
    assert!(wanted.iter().all(|w| head.contains(w)) && head.contains(&format!(", {kernel}\n")), "{head}");
    let line_end = table + drcov[table..].iter().position(|b| *b == b'\n').unwrap();
    let count: usize = String::from_utf8_lossy(&drcov[table + 10..line_end]).trim_end_matches(" bbs").parse().unwrap();
    let blocks = &drcov[line_end + 1..];
    assert_eq!(blocks.len(), 8 * count);
    // The other module is the board's ROM, which leads to the kernel.
    let of = |module: u8| blocks.chunks(8).filter(|b| b[6..] == [module, 0]).collect::<Vec<_>>();
    assert_eq!((of(1).len(), of(0).len()), (1, count - 1), "{head}");
    assert!(of(0).iter().all(|b| u32::from_le_bytes(b[..4].try_into().unwrap()) < 0x1000));
}
