//! One connection: packets in, replies out, no input and output of its own.

use crate::memory::{self, Space};
use crate::packet::{Framer, Incoming, MAX_BODY, encode, from_hex, number, to_hex};
use crate::registers::{self, Layout};
use crate::resume::{Threads, vcont};
use crate::target::{Action, Point, Target};
use mimus_core::accel::{DebugStop, WatchKind};
use std::collections::VecDeque;
use std::sync::Arc;

/// Something that happened to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A vCPU has a reason to stop; all will.
    Stop(u32, DebugStop),
    /// It stands still.
    Stopped,
    /// It runs.
    Running,
    /// It is over.
    Ended,
}

/// What becomes of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// It goes on.
    Open,
    /// It is to be closed.
    Close,
}

/// Most bytes of memory in a reply.
const MAX_READ: usize = MAX_BODY / 2 - 8;
/// Bit of the step mask: steps take no interrupts (as QEMU's `SSTEP_NOIRQ`).
const NO_INTERRUPTS: u64 = 2;
/// Most breakpoints, and most watchpoints, of a client.
const MAX_BREAKPOINTS: usize = 1 << 16;
const MAX_WATCHPOINTS: usize = 1 << 10;

/// A client's session.
pub struct Session {
    target: Arc<dyn Target>,
    framer: Framer,
    no_ack: bool,
    last_sent: Vec<u8>,
    /// The client waits for a stop.
    running: bool,
    /// Whether the machine has done so since the client asked.
    started: bool,
    continued: bool,
    /// It asked for one by Ctrl-C.
    interrupted: bool,
    /// Stops not told yet.
    stops: VecDeque<(u32, DebugStop)>,
    /// What `?` answers.
    last_stop: String,
    /// vCPU of `g`, `m` and the like.
    current: u32,
    /// Those of `c` and `s`.
    resumed: Threads,
    physical: bool,
    step_mask: u64,
    points: Vec<Point>,
    /// How the client numbers registers.
    layout: Layout,
    /// The description it reads.
    description: String,
    /// The client has ended the machine.
    killed: bool,
    /// It understands `E.message`.
    error_messages: bool,
    /// The client is lldb.
    lldb: bool,
}

impl Session {
    /// A session with a machine that stands still.
    pub fn new(target: Arc<dyn Target>) -> Self {
        let layout = Layout::of_model(target.model());
        Self {
            target,
            framer: Framer::default(),
            no_ack: false,
            last_sent: Vec::new(),
            running: false,
            started: false,
            continued: false,
            interrupted: false,
            stops: VecDeque::new(),
            last_stop: "T05thread:1;".to_owned(),
            current: 0,
            resumed: Threads::All,
            physical: false,
            step_mask: 1 | NO_INTERRUPTS,
            points: Vec::new(),
            layout,
            description: String::new(),
            killed: false,
            error_messages: false,
            lldb: false,
        }
    }

    /// Takes bytes from the client; what to send is added to `out`.
    pub fn bytes(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Flow {
        for byte in bytes {
            let Some(incoming) = self.framer.feed(*byte) else { continue };
            match incoming {
                Incoming::Interrupt => self.interrupt(),
                Incoming::Resend => out.extend(&self.last_sent),
                Incoming::Damaged if self.no_ack => {}
                Incoming::Damaged => out.push(b'-'),
                Incoming::Packet(body) => {
                    if !self.no_ack {
                        out.push(b'+');
                    }
                    if self.packet(&body, out) == Flow::Close {
                        return Flow::Close;
                    }
                }
            }
        }
        Flow::Open
    }

    fn interrupt(&mut self) {
        if self.running {
            self.interrupted = true;
            self.target.stop();
        }
    }

    /// Takes note of what the machine did.
    pub fn event(&mut self, event: Event, out: &mut Vec<u8>) -> Flow {
        match event {
            Event::Stop(vcpu, stop) => {
                self.stops.retain(|s| s.0 != vcpu);
                self.stops.push_back((vcpu, stop));
            }
            // A stop of before the client's command may come late.
            Event::Stopped if self.running && self.started => self.tell_stop(out),
            Event::Stopped => {}
            Event::Running => {
                self.started = true;
                // What other vCPUs did while the last stop was told.
                let breaks = self.points.iter().any(|p| matches!(p, Point::Break { .. }));
                self.stops.retain(|(_, stop)| match stop {
                    DebugStop::Step => false,
                    DebugStop::Breakpoint => breaks,
                    _ => true,
                });
            }
            Event::Ended => {
                self.send("W00", out);
                return Flow::Close;
            }
        }
        Flow::Open
    }

    /// Whether the client waits for a stop.
    pub fn runs(&self) -> bool {
        self.running
    }

    /// Whether the client has ended the machine.
    pub fn killed(&self) -> bool {
        self.killed
    }

    /// Whether the client has ever let the machine run.
    pub fn continued(&self) -> bool {
        self.continued
    }

    /// The connection is gone, or done with: nothing of it stays in the machine, which goes on.
    pub fn end(&mut self, go_on: bool) {
        for point in std::mem::take(&mut self.points) {
            if let Err(e) = self.target.remove(point) {
                log::warn!("gdb: {e}");
            }
        }
        self.running = false;
        self.target.release();
        if go_on {
            self.target.resume(&vec![Action::Run; self.target.vcpus() as usize]);
        }
    }

    fn send(&mut self, body: &str, out: &mut Vec<u8>) {
        self.last_sent = encode(body.as_bytes());
        out.extend(&self.last_sent);
    }

    fn tell_stop(&mut self, out: &mut Vec<u8>) {
        self.running = false;
        let interrupted = std::mem::take(&mut self.interrupted);
        let reply = match self.stops.pop_front() {
            Some((vcpu, stop)) => {
                self.current = vcpu;
                stop_reply(vcpu, stop)
            }
            None if interrupted => format!("T02thread:{:x};", self.current + 1),
            None => format!("T05thread:{:x};", self.current + 1),
        };
        self.last_stop.clone_from(&reply);
        self.send(&reply, out);
    }

    fn packet(&mut self, body: &[u8], out: &mut Vec<u8>) -> Flow {
        // X has binary data behind its colon; everything else is text.
        if body.first() == Some(&b'X') {
            let reply = self.write_binary(&body[1..]).unwrap_or("E22");
            self.send(reply, out);
            return Flow::Open;
        }
        let Ok(text) = std::str::from_utf8(body) else {
            self.send("", out);
            return Flow::Open;
        };
        let (head, rest) = text.split_at_checked(1).unwrap_or(("", ""));
        match head {
            "c" | "s" | "C" | "S" => self.resume_one(head, rest, out),
            "v" if rest.starts_with("Cont;") => self.resume_vcont(&rest[5..], out),
            "D" => {
                self.send("OK", out);
                self.continued = true;
                // While it runs, it has to be stopped first.
                if !self.running {
                    self.end(true);
                }
                return Flow::Close;
            }
            "k" => {
                self.killed = true;
                self.target.kill();
                return Flow::Close;
            }
            "v" if rest.starts_with("Kill") => {
                self.send("OK", out);
                self.killed = true;
                self.target.kill();
                return Flow::Close;
            }
            _ => {
                let reply = self.reply(head, rest).unwrap_or_else(|| "E22".to_owned());
                self.send(&reply, out);
                self.no_ack |= text == "QStartNoAckMode";
            }
        }
        Flow::Open
    }

    /// The reply to a packet that has one at once; `None`: its arguments make no sense.
    fn reply(&mut self, head: &str, rest: &str) -> Option<String> {
        Some(match head {
            "?" => self.last_stop.clone(),
            "g" => self.state(|s| self.layout.read_general(s)),
            "G" => self.change(|s| self.layout.write_general(s, rest)),
            "p" => {
                let n = u32::try_from(number(rest)?).ok()?;
                self.state(|s| self.layout.read(s, n))
            }
            "P" => {
                let (n, value) = rest.split_once('=')?;
                let n = u32::try_from(number(n)?).ok()?;
                self.change(|s| self.layout.write(s, n, value))
            }
            "m" => {
                let (addr, len) = range(rest)?;
                let bytes = memory::read(&*self.target, self.space(), addr, len.min(MAX_READ));
                if bytes.is_empty() && len != 0 { "E14".to_owned() } else { to_hex(&bytes) }
            }
            "M" => {
                let (place, data) = rest.split_once(':')?;
                let (addr, len) = range(place)?;
                let data = from_hex(data).filter(|d| d.len() == len)?;
                ok(memory::write(&*self.target, self.space(), addr, &data), "E14")
            }
            "Z" | "z" => return self.point(head == "Z", rest),
            "H" => return self.select(rest),
            "T" => ok(matches!(Threads::parse(rest, self.target.vcpus())?, Threads::One(_)), "E01"),
            "q" => return self.query(rest),
            "Q" => return self.set(rest),
            "v" if rest == "Cont?" => "vCont;c;C;s;S".to_owned(),
            _ => String::new(),
        })
    }

    fn space(&self) -> Space {
        if self.physical { Space::Physical } else { Space::Virtual(self.current) }
    }

    fn write_binary(&mut self, rest: &[u8]) -> Option<&'static str> {
        let colon = rest.iter().position(|b| *b == b':')?;
        let (addr, len) = range(std::str::from_utf8(&rest[..colon]).ok()?)?;
        let data = &rest[colon + 1..];
        if data.len() != len {
            return None;
        }
        Some(if memory::write(&*self.target, self.space(), addr, data) { "OK" } else { "E14" })
    }

    fn state(&self, f: impl FnOnce(&mimus_arch::CpuState) -> Option<String>) -> String {
        let state = self.target.state(self.current).map_err(|e| log::warn!("gdb: {e}"));
        state.ok().and_then(|s| f(&s)).unwrap_or_else(|| "E14".to_owned())
    }

    fn change(&self, f: impl FnOnce(&mut mimus_arch::CpuState) -> bool) -> String {
        let changed = self.target.state(self.current).and_then(|mut s| {
            let fine = f(&mut s);
            if fine { self.target.set_state(self.current, s).map(|()| true) } else { Ok(false) }
        });
        ok(
            changed.unwrap_or_else(|e| {
                log::warn!("gdb: {e}");
                false
            }),
            "E14",
        )
    }

    fn select(&mut self, rest: &str) -> Option<String> {
        let (op, who) = rest.split_at_checked(1)?;
        let threads = Threads::parse(who, self.target.vcpus())?;
        match op {
            "g" => {
                if let Threads::One(n) = threads {
                    self.current = n;
                }
            }
            "c" => self.resumed = threads,
            _ => return None,
        }
        Some("OK".to_owned())
    }

    /// `Z` and `z`: TYPE,ADDR,KIND. Software and hardware breakpoints are the same to the machine.
    fn point(&mut self, insert: bool, rest: &str) -> Option<String> {
        let mut parts = rest.split(';').next()?.split(',');
        let (kind, va, len) = (parts.next()?, number(parts.next()?)?, number(parts.next()?)?);
        let watch = |kind| Point::Watch { va, len, kind };
        let point = match kind {
            "0" | "1" => Point::Break { va },
            "2" => watch(WatchKind::Write),
            "3" => watch(WatchKind::Read),
            "4" => watch(WatchKind::ReadWrite),
            _ => return Some(String::new()),
        };
        let known = self.points.iter().position(|p| *p == point);
        let done = match (insert, known) {
            (true, Some(_)) | (false, None) => Ok(()),
            (true, None) if self.is_full(point) => Err("too many breakpoints or watchpoints".to_owned()),
            (true, None) => self.target.insert(point).map(|()| self.points.push(point)),
            (false, Some(at)) => {
                self.points.swap_remove(at);
                self.target.remove(point)
            }
        };
        // A client that says it understands is told why; others see a number only.
        Some(match done {
            Ok(()) => "OK".to_owned(),
            Err(e) => {
                log::warn!("gdb: {e}");
                if self.error_messages { format!("E.{e}") } else { "E0e".to_owned() }
            }
        })
    }

    fn is_full(&self, point: Point) -> bool {
        let is_break = |p: &Point| matches!(p, Point::Break { .. });
        let of_kind = self.points.iter().filter(|p| is_break(p) == is_break(&point)).count();
        of_kind >= if is_break(&point) { MAX_BREAKPOINTS } else { MAX_WATCHPOINTS }
    }

    fn query(&mut self, rest: &str) -> Option<String> {
        let vcpus = self.target.vcpus();
        if let Some(command) = rest.strip_prefix("Rcmd,") {
            let line = String::from_utf8(from_hex(command)?).ok()?;
            let text = self.target.monitor(&line);
            return Some(if text.is_empty() { "OK".to_owned() } else { to_hex(text.as_bytes()) });
        }
        if let Some(xfer) = rest.strip_prefix("Xfer:features:read:target.xml:") {
            return self.describe(xfer);
        }
        if let Some(xfer) = rest.strip_prefix("Xfer:memory-map:read::") {
            return part(&memory::map_xml(&self.target.rom()), xfer);
        }
        if let Some(id) = rest.strip_prefix("ThreadExtraInfo,") {
            let Threads::One(n) = Threads::parse(id, vcpus)? else { return None };
            return Some(to_hex(self.target.describe(n).as_bytes()));
        }
        Some(match rest.split(':').next()? {
            "Supported" => {
                self.error_messages = rest.contains("error-message+");
                format!(
                    "PacketSize={MAX_BODY:x};qXfer:features:read+;qXfer:memory-map:read+;QStartNoAckMode+;\
                     vContSupported+;swbreak+;hwbreak+"
                )
            }
            "C" => format!("QC{:x}", self.current + 1),
            "Attached" => "1".to_owned(),
            // lldb's, which knows the architecture before it reads a description, and has one for all modes.
            what @ ("HostInfo" | "ProcessInfo") => {
                self.lldb = true;
                let pid = if what == "ProcessInfo" { "pid:1;" } else { "" };
                format!("{pid}{}", registers::triple(self.target.model()))
            }
            "fThreadInfo" => {
                let ids: Vec<String> = (1..=vcpus).map(|n| format!("{n:x}")).collect();
                format!("m{}", ids.join(","))
            }
            "sThreadInfo" => "l".to_owned(),
            "Symbol" => "OK".to_owned(),
            "qemu.PhyMemMode" => u8::from(self.physical).to_string(),
            "qemu.sstepbits" => format!("ENABLE=1,NOIRQ={NO_INTERRUPTS}"),
            "qemu.sstep" => format!("{:#x}", self.step_mask),
            _ => String::new(),
        })
    }

    /// A part of the target description. One read from its beginning is for the code that executes now; that is
    /// then how the client numbers registers.
    fn describe(&mut self, range_text: &str) -> Option<String> {
        if self.description.is_empty() || range(range_text)?.0 == 0 {
            let model = self.target.model();
            self.layout = match self.lldb {
                true => Layout::of_model(model),
                false => Layout::of_state(model, &self.target.state(self.current).ok()?),
            };
            self.description = self.layout.description();
            if self.lldb {
                self.description = registers::for_lldb(&self.description);
            }
        }
        part(&self.description, range_text)
    }

    fn set(&mut self, rest: &str) -> Option<String> {
        if let Some(mode) = rest.strip_prefix("qemu.PhyMemMode:") {
            self.physical = match mode {
                "0" => false,
                "1" => true,
                _ => return None,
            };
        } else if let Some(mask) = rest.strip_prefix("qemu.sstep=").or_else(|| rest.strip_prefix("qemu.sstep:")) {
            let mask = number(mask.trim_start_matches("0x")).filter(|m| m & !7 == 0)?;
            self.step_mask = mask;
        } else if rest != "StartNoAckMode" {
            return Some(String::new());
        }
        Some("OK".to_owned())
    }

    fn resume_one(&mut self, head: &str, rest: &str, out: &mut Vec<u8>) {
        // After C and S, a signal that means nothing here; then perhaps an address.
        let addr = match head {
            "C" | "S" => rest.split_once(';').map_or("", |r| r.1),
            _ => rest,
        };
        if !addr.is_empty() {
            let moved = number(addr).map(|pc| {
                self.change(|s| {
                    s.set_pc(pc);
                    true
                })
            });
            if moved.as_deref() != Some("OK") {
                return self.send("E22", out);
            }
        }
        let who = match self.resumed {
            Threads::One(n) => format!(":{:x}", n + 1),
            _ if head.eq_ignore_ascii_case("s") => format!(":{:x};c", self.current + 1),
            _ => String::new(),
        };
        self.resume_vcont(&format!("{}{who}", head.to_ascii_lowercase()), out);
    }

    fn resume_vcont(&mut self, text: &str, out: &mut Vec<u8>) {
        let interrupts = self.step_mask & NO_INTERRUPTS == 0;
        let Some(actions) = vcont(text, self.target.vcpus(), self.current, interrupts) else {
            return self.send("E22", out);
        };
        if self.running {
            return self.send("E16", out);
        }
        (self.running, self.started, self.continued) = (true, false, true);
        self.drop_stale_stops();
        let told = |s: &(u32, DebugStop)| actions.get(s.0 as usize).is_some_and(|a| *a != Action::Hold);
        if let Some(at) = self.stops.iter().position(told) {
            // Another vCPU stopped together with the one that was told of.
            self.stops.swap(0, at);
            return self.tell_stop(out);
        }
        self.target.resume(&actions);
    }

    /// Forgets stops at breakpoints that have been removed since.
    fn drop_stale_stops(&mut self) {
        let mut stops = std::mem::take(&mut self.stops);
        stops.retain(|(vcpu, stop)| match stop {
            DebugStop::Breakpoint => {
                let pc = self.target.state(*vcpu).map(|s| s.pc());
                pc.is_ok_and(|va| self.points.contains(&Point::Break { va }))
            }
            DebugStop::Step => false,
            DebugStop::Watch { .. } | DebugStop::Caught(_) => true,
        });
        self.stops = stops;
    }
}

fn stop_reply(vcpu: u32, stop: DebugStop) -> String {
    let thread = vcpu + 1;
    match stop {
        DebugStop::Step | DebugStop::Caught(_) => format!("T05thread:{thread:x};"),
        DebugStop::Breakpoint => format!("T05thread:{thread:x};swbreak:;"),
        DebugStop::Watch { va, kind } => {
            let kind = match kind {
                WatchKind::Write => "watch",
                WatchKind::Read => "rwatch",
                WatchKind::ReadWrite => "awatch",
            };
            format!("T05thread:{thread:x};{kind}:{:x};", va.0)
        }
    }
}

fn ok(fine: bool, error: &str) -> String {
    if fine { "OK".to_owned() } else { error.to_owned() }
}

/// ADDR,LEN
fn range(text: &str) -> Option<(u64, usize)> {
    let (addr, len) = text.split_once(',')?;
    Some((number(addr)?, usize::try_from(number(len)?).ok()?))
}

/// A part of a `qXfer` object: OFFSET,LENGTH.
fn part(object: &str, range_text: &str) -> Option<String> {
    let (offset, len) = range(range_text)?;
    let offset = usize::try_from(offset).ok()?.min(object.len());
    let end = offset.saturating_add(len.min(MAX_BODY / 2)).min(object.len());
    let more = if end == object.len() { 'l' } else { 'm' };
    Some(format!("{more}{}", object.get(offset..end)?))
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
