//! Conversations with a machine that is not one.

use super::*;
use crate::packet::to_hex;
use crate::registers::Model;
use mimus_arch::riscv::RiscvState;
use mimus_arch::{CpuState, GuestArch};
use mimus_core::bus::GuestVirt;
use std::sync::Mutex;

const BASE: u64 = 0x8000_0000;

struct Fake {
    states: Mutex<Vec<RiscvState>>,
    memory: Mutex<Vec<u8>>,
    log: Mutex<Vec<String>>,
}

impl Fake {
    fn note(&self, text: impl Into<String>) {
        self.log.lock().unwrap().push(text.into());
    }
    fn log(&self) -> Vec<String> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }
}

impl Target for Fake {
    fn model(&self) -> Model {
        Model { arch: GuestArch::Riscv64, avx: false }
    }
    fn vcpus(&self) -> u32 {
        2
    }
    fn describe(&self, vcpu: u32) -> String {
        format!("CPU#{vcpu}")
    }
    fn state(&self, vcpu: u32) -> Result<CpuState, String> {
        Ok(CpuState::Riscv(Box::new(self.states.lock().unwrap()[vcpu as usize].clone())))
    }
    fn set_state(&self, vcpu: u32, state: CpuState) -> Result<(), String> {
        self.states.lock().unwrap()[vcpu as usize] = state.as_riscv().ok_or("not RISC-V")?.clone();
        Ok(())
    }
    /// Two pages at the end of the address space, in the wrong order.
    fn translate(&self, _vcpu: u32, va: u64) -> Option<(u64, u64)> {
        let pa = match va & !0xfff {
            0xffff_ffff_ffff_e000 => BASE + 0x1000,
            0xffff_ffff_ffff_f000 => BASE,
            _ => return None,
        };
        Some((pa + (va & 0xfff), 0x1000 - (va & 0xfff)))
    }
    fn read(&self, pa: u64, to: &mut [u8], _devices: bool) -> bool {
        let memory = self.memory.lock().unwrap();
        let at = usize::try_from(pa.wrapping_sub(BASE)).unwrap();
        memory.get(at..).and_then(|m| m.get(..to.len())).map(|m| to.copy_from_slice(m)).is_some()
    }
    fn write(&self, pa: u64, from: &[u8], _devices: bool) -> bool {
        let mut memory = self.memory.lock().unwrap();
        let at = usize::try_from(pa.wrapping_sub(BASE)).unwrap();
        memory.get_mut(at..).and_then(|m| m.get_mut(..from.len())).map(|m| m.copy_from_slice(from)).is_some()
    }
    fn rom(&self) -> Vec<(u64, u64)> {
        vec![(0x1000, 0x1000)]
    }
    fn insert(&self, point: Point) -> Result<(), String> {
        self.note(format!("insert {point:x?}"));
        if point == (Point::Break { va: 0xbad }) { Err("not there".to_owned()) } else { Ok(()) }
    }
    fn remove(&self, point: Point) -> Result<(), String> {
        self.note(format!("remove {point:x?}"));
        Ok(())
    }
    fn resume(&self, actions: &[Action]) {
        self.note(format!("resume {actions:?}"));
    }
    fn release(&self) {
        self.note("release");
    }
    fn stop(&self) {
        self.note("stop");
    }
    fn settle(&self, _: std::time::Duration) -> bool {
        true
    }
    fn running(&self) -> bool {
        false
    }
    fn kill(&self) {
        self.note("kill");
    }
    fn monitor(&self, line: &str) -> String {
        format!("<{line}>\n")
    }
}

struct Client {
    session: Session,
    fake: Arc<Fake>,
}

impl Client {
    fn new() -> Client {
        let states = (0..2).map(|hart| RiscvState::new(hart, 0x8000_0000_0014_112d, 0x1000 + hart)).collect();
        let memory = Mutex::new((0..0x2000u32).map(|i| (i / 16) as u8).collect());
        let fake = Arc::new(Fake { states: Mutex::new(states), memory, log: Mutex::default() });
        Client { session: Session::new(fake.clone()), fake }
    }

    fn raw(&mut self, bytes: &[u8]) -> (Vec<u8>, Flow) {
        let mut out = Vec::new();
        let flow = self.session.bytes(bytes, &mut out);
        (out, flow)
    }

    /// Sends a packet; the body of the reply, or nothing.
    fn ask(&mut self, body: &str) -> String {
        let (out, _) = self.raw(&encode(body.as_bytes()));
        body_of(&out)
    }

    fn event(&mut self, event: Event) -> String {
        let mut out = Vec::new();
        if self.session.running && !self.session.started {
            self.session.event(Event::Running, &mut out);
        }
        self.session.event(event, &mut out);
        body_of(&out)
    }
}

fn body_of(out: &[u8]) -> String {
    let mut framer = Framer::default();
    let packet = out.iter().find_map(|b| framer.feed(*b));
    match packet {
        Some(Incoming::Packet(body)) => String::from_utf8(body).unwrap(),
        None => String::new(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_beginning_of_a_session() {
    let mut c = Client::new();
    assert_eq!(c.raw(b"+$qC#b4").0, b"+$QC1#c5");
    assert_eq!(c.raw(b"-").0, b"$QC1#c5", "sent again");
    assert_eq!(c.raw(b"$qC#b5").0, b"-");
    assert!(c.ask("qSupported:multiprocess+;swbreak+").contains("QStartNoAckMode+"));
    assert_eq!(c.ask("vMustReplyEmpty"), "");
    assert_eq!(c.raw(b"$QStartNoAckMode#b0").0, b"+$OK#9a", "this one is still acknowledged");
    assert_eq!(c.raw(b"$qC#b4").0, b"$QC1#c5");
    assert_eq!((c.ask("?"), c.ask("qAttached")), ("T05thread:1;".to_owned(), "1".to_owned()));
    assert_eq!((c.ask("qfThreadInfo"), c.ask("qsThreadInfo")), ("m1,2".to_owned(), "l".to_owned()));
    assert_eq!(c.ask("qThreadExtraInfo,2"), to_hex(b"CPU#1"));
    assert_eq!((c.ask("T2"), c.ask("T3"), c.ask("Tx")), ("OK".into(), "E22".into(), "E22".into()));
    assert_eq!(c.ask("vCont?"), "vCont;c;C;s;S");
    assert_eq!(c.ask("qRcmd,6162"), to_hex(b"<ab>\n"));
}

#[test]
fn registers_of_each_vcpu() {
    let mut c = Client::new();
    let g = c.ask("g");
    assert_eq!((g.len(), &g[512..]), (33 * 16, "0010000000000000"));
    assert_eq!((c.ask("Hg2"), c.ask("p20"), c.ask("qC")), ("OK".into(), "0110000000000000".into(), "QC2".into()));
    assert_eq!(c.ask("P5=efcdab8967452301"), "OK");
    assert_eq!(c.fake.states.lock().unwrap()[1].x[5], 0x0123_4567_89ab_cdef);
    assert_eq!((c.ask("P5=ef"), c.ask("P5=éé"), c.ask("P999999=00")), ("E14".into(), "E14".into(), "E14".into()));
    // satp, by gdb's number of it
    assert_eq!((c.ask("P1c1=0100000000000080"), c.ask("p1c1")), ("OK".into(), "0100000000000080".into()));
    let all = format!("G{}", "11".repeat(33 * 8));
    assert_eq!((c.ask(&all), c.ask("p1f"), c.ask("p0")), ("OK".into(), "11".repeat(8), "00".repeat(8)));
    assert_eq!(
        (c.ask("G00"), c.ask("Hg3"), c.ask("Hx1"), c.ask("p")),
        ("E14".into(), "E22".into(), "E22".into(), "E22".into())
    );
    let first = c.ask("qXfer:features:read:target.xml:0,40");
    assert!(first.starts_with("m<?xml") && first.len() == 65);
    assert!(c.ask("qXfer:features:read:target.xml:fffff,40") == "l");
    assert!(c.ask("qXfer:memory-map:read::0,1000").contains("type=\"rom\" start=\"0x1000\""));
}

#[test]
fn lldb_is_told_which_register_is_which() {
    let mut c = Client::new();
    let info = c.ask("qProcessInfo");
    assert!(info.starts_with("pid:1;triple:") && info.ends_with(";endian:little;ptrsize:8;"), "{info}");
    assert!(info.contains(&to_hex(b"riscv64-unknown-none")));
    let xml = c.ask("qXfer:features:read:target.xml:0,1fff");
    assert!(xml.contains("name=\"pc\" generic=\"pc\"") && xml.contains("name=\"fp\" generic=\"fp\""), "{xml}");
}

#[test]
fn memory_virtual_and_physical() {
    let mut c = Client::new();
    assert_eq!(c.ask("mffffffffffffeffe,4"), "ffff0000", "two pages");
    assert_eq!(c.ask("mfffffffffffffffe,4"), "ffff", "as much as there is");
    assert_eq!((c.ask("m0,4"), c.ask("m80001000,2")), ("E14".into(), "E14".into()));
    assert_eq!((c.ask("Qqemu.PhyMemMode:1"), c.ask("qqemu.PhyMemMode")), ("OK".into(), "1".into()));
    assert_eq!(c.ask("m80000010,2"), "0101");
    assert_eq!((c.ask("M80000010,2:abcd"), c.ask("m80000010,3")), ("OK".into(), "abcd01".into()));
    assert_eq!((c.ask("M80000010,3:abcd"), c.ask("M80002000,1:ab")), ("E22".into(), "E14".into()));
    assert_eq!((c.ask("X80000010,2:#$"), c.ask("m80000010,2")), ("OK".into(), "2324".into()));
    c.ask("Qqemu.PhyMemMode:0");
    assert_eq!((c.ask("Mffffffffffffeffe,4:01020304"), c.ask("mffffffffffffeffe,4")), ("OK".into(), "01020304".into()));
    assert_eq!(c.ask("Mfffffffffffffffe,4:01020304"), "E14");
    assert_eq!(c.ask("mffffffffffffe000,ffffffffffffffff").len() / 2, MAX_READ.min(0x2000));
}

#[test]
fn points_are_set_once_and_do_not_outlive_the_session() {
    let mut c = Client::new();
    assert_eq!(
        (c.ask("Z0,1000,2"), c.ask("Z1,1000,2"), c.ask("Z2,2000,8"), c.ask("Z4,10,1")),
        ("OK".into(), "OK".into(), "OK".into(), "OK".into())
    );
    assert_eq!(
        (c.ask("z4,10,1"), c.ask("z4,10,1"), c.ask("Zx,1,1"), c.ask("Z0,x,1")),
        ("OK".into(), "OK".into(), "".into(), "E22".into())
    );
    assert_eq!(c.ask("Z0,bad,2"), "E0e");
    assert_eq!(c.fake.log().len(), 5, "three set, one taken, one refused");
    let (out, flow) = c.raw(&encode(b"D"));
    assert_eq!((body_of(&out).as_str(), flow), ("OK", Flow::Close));
    let log = c.fake.log();
    assert_eq!(log.iter().filter(|l| l.starts_with("remove")).count(), 2);
    assert_eq!(log.last().unwrap(), "resume [Run, Run]");
}

#[test]
fn running_and_stopping() {
    let mut c = Client::new();
    assert_eq!(c.ask("vCont;s:2"), "", "no reply until it stops");
    assert_eq!(c.fake.log(), ["resume [Hold, Step { interrupts: false }]"]);
    assert_eq!(c.event(Event::Stop(1, DebugStop::Step)), "");
    assert_eq!(c.event(Event::Stopped), "T05thread:2;");
    assert_eq!(c.ask("?"), "T05thread:2;");
    // Two at once: the second is told when the client goes on, without running.
    c.ask("Z0,1000,2");
    c.ask("vCont;c");
    c.fake.log();
    c.event(Event::Stop(1, DebugStop::Watch { va: GuestVirt(0x42), kind: WatchKind::Read }));
    c.event(Event::Stop(0, DebugStop::Breakpoint));
    assert_eq!(c.event(Event::Stopped), "T05thread:2;rwatch:42;");
    assert_eq!(c.ask("vCont;c"), "T05thread:1;swbreak:;");
    assert_eq!(c.fake.log(), Vec::<String>::new());
    // Ctrl-C, and a stop by somebody else.
    assert_eq!(c.ask("c"), "");
    c.raw(b"\x03");
    assert_eq!(c.event(Event::Stopped), "T02thread:1;");
    assert_eq!(c.fake.log(), ["resume [Run, Run]", "stop"]);
    c.raw(b"\x03");
    assert_eq!(c.fake.log(), Vec::<String>::new(), "it stands still already");
    assert_eq!(
        (c.ask("qemu.sstep"), c.ask("Qqemu.sstep=1"), c.ask("qqemu.sstep")),
        ("".into(), "OK".into(), "0x1".into())
    );
    c.ask("s");
    assert_eq!(c.fake.log(), ["resume [Step { interrupts: true }, Run]"]);
    assert_eq!(c.ask("vCont;c"), "E16", "it runs");
    assert_eq!((c.event(Event::Ended), c.ask("vCont;x")), ("W00".into(), "E22".into()));
}

#[test]
fn the_end() {
    let mut c = Client::new();
    assert_eq!(c.raw(&encode(b"k")).1, Flow::Close);
    assert_eq!(c.fake.log(), ["kill"]);
    assert_eq!(body_of(&c.raw(&encode(b"vKill;1")).0), "OK");
}

/// Whatever comes, it answers or does not, and goes on. `MIMUS_FUZZ_PACKETS` says how many.
#[test]
fn nonsense() {
    let mut c = Client::new();
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let words = [
        "g",
        "G",
        "p",
        "P",
        "m",
        "M",
        "X",
        "Z0",
        "z2",
        "H",
        "T",
        "qRcmd,",
        "qXfer:features:read:target.xml:",
        "vCont;",
        "c",
        "s",
        "S",
        "Qqemu.sstep=",
        "Z0,",
        "Z2,",
        "z0,",
        "z2,",
        "Hg",
        "Hc",
        "P5=",
        "M80000010,2:",
        "X80000010,2:",
        "vCont;s:",
        "vCont;c:",
        "qXfer:memory-map:read::",
        "qSupported:error-message+;",
        "qThreadExtraInfo,",
        "Qqemu.PhyMemMode:",
        "qHostInfo",
        "D",
        "?",
        "vCont?",
    ];
    let bytes = b"0123456789abcdef,:;=-\xff\x00\xc3\xa9~";
    let packets = std::env::var("MIMUS_FUZZ_PACKETS").ok().and_then(|v| v.parse().ok()).unwrap_or(100_000);
    for _ in 0..packets {
        let mut body = words[random() as usize % words.len()].as_bytes().to_vec();
        for _ in 0..random() % 24 {
            body.push(bytes[random() as usize % bytes.len()]);
        }
        c.raw(&encode(&body));
        if random() % 4 == 0 {
            c.event(Event::Stop((random() % 2) as u32, DebugStop::Step));
            c.event(Event::Stopped);
        }
        c.fake.log();
    }
    c.event(Event::Stopped);
    assert_eq!(c.ask("qAttached"), "1");
    assert!(c.session.points.len() <= MAX_BREAKPOINTS + MAX_WATCHPOINTS && c.session.stops.len() <= 2);
}
