//! Kernels made by hand.

use super::*;
use crate::target::{Point, Region, Stop};
use mimus_arch::x86::X86State;
use mimus_core::accel::RecentEvent;

/// Memory from physical address 0x10_0000 on, mapped at one virtual address.
pub struct Ram {
    bytes: Vec<u8>,
    cpu: CpuState,
}

/// Where RAM begins.
pub const START: u64 = 0x10_0000;
/// Page tables are before it.
const TABLES: usize = 0x8000;

impl Ram {
    /// With `image` at virtual address `base`, for a vCPU with pointers of `word` bytes.
    pub fn new(word: usize, base: u64, image: Vec<u8>) -> Ram {
        let mut bytes = vec![0; TABLES];
        let first = START + TABLES as u64;
        let mut put = |at: u64, value: u64, n: usize| {
            bytes[(at - START) as usize..][..n].copy_from_slice(&value.to_le_bytes()[..n]);
        };
        let mut s = X86State::reset(true);
        s.cr3 = START;
        s.cr0 = 0x8000_0001;
        let pages = (image.len() as u64).div_ceil(4096).min(1024);
        if word == 4 {
            put(START + (base >> 22) * 4, START + 0x1003, 4);
            (0..pages)
                .for_each(|i| put(START + 0x1000 + ((base >> 12 & 0x3ff) + i) % 1024 * 4, (first + i * 4096) | 3, 4));
        } else {
            (s.cr4, s.efer) = (0x20, 0x500);
            put(START + (base >> 39 & 511) * 8, START + 0x1003, 8);
            put(START + 0x1000 + (base >> 30 & 511) * 8, START + 0x2003, 8);
            put(START + 0x2000 + (base >> 21 & 511) * 8, START + 0x3003, 8);
            (0..pages.min(512))
                .for_each(|i| put(START + 0x3000 + ((base >> 12 & 511) + i) % 512 * 8, (first + i * 4096) | 3, 8));
        }
        bytes.extend(image);
        Ram { bytes, cpu: CpuState::X86(Box::new(s)) }
    }

    pub fn memory(&self) -> Memory<'_> {
        memory(self, &self.cpu).unwrap()
    }
}

/// Numbers that repeat (xorshift).
pub fn random(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

impl Target for Ram {
    fn vcpus(&self) -> u32 {
        1
    }
    fn state(&self, _: u32) -> Result<CpuState, String> {
        Ok(self.cpu.clone())
    }
    fn set_state(&self, _: u32, _: CpuState) -> Result<(), String> {
        Err("it stands".to_owned())
    }
    fn translate(&self, _: u32, va: u64) -> Option<(u64, u64)> {
        self.memory().translate(va).map(|pa| (pa, 4096 - (pa & 4095)))
    }
    fn read(&self, pa: u64, to: &mut [u8]) -> bool {
        let Some(at) = pa.checked_sub(START).and_then(|at| usize::try_from(at).ok()) else { return false };
        let end = at.saturating_add(to.len());
        self.bytes.get(at..end).map(|from| to.copy_from_slice(from)).is_some()
    }
    fn write(&self, _: u64, _: &[u8]) -> bool {
        false
    }
    fn insert(&self, _: Point) -> Result<(), String> {
        Ok(())
    }
    fn remove(&self, _: Point) -> Result<(), String> {
        Ok(())
    }
    fn running(&self) -> bool {
        false
    }
    fn go(&self) -> Stop {
        Stop::Paused
    }
    fn resume(&self) {}
    fn step(&self, vcpu: u32, _: u64, _: crate::steps::StepKind) -> Result<Stop, String> {
        Ok(Stop::Step { vcpu })
    }
    fn pause(&self) {}
    fn recent(&self, _: u32) -> Vec<RecentEvent> {
        Vec::new()
    }
    fn jumps(&self, _: u32) -> Vec<u64> {
        Vec::new()
    }
    fn disassemble(&self, _: u8, _: &[u8], _: u64) -> (String, usize) {
        ("nop".to_owned(), 1)
    }
    fn regions(&self) -> Vec<Region> {
        vec![Region { base: START, len: self.bytes.len() as u64, kind: "ram", name: "ram".to_owned() }]
    }
}

#[test]
fn there_is_no_kernel() {
    let ram = Ram::new(8, 0xffff_ffff_8100_0000, vec![0; 1 << 20]);
    let why = Linux::find(&ram, &ram.cpu).err().unwrap();
    assert!(why.contains("symbols vmlinux"), "{why}");
    let off = CpuState::X86(Box::new(X86State::reset(true)));
    assert!(Linux::find(&ram, &off).err().unwrap().contains("paging is off"));
}

const IMAGE: u64 = 0xffff_ffff_8100_0000;

fn put(image: &mut [u8], at: u64, value: u64, bytes: usize) {
    image[at as usize..at as usize + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
}

/// A log of four descriptors and 128 bytes of text, in which the last text is at the ring's begin.
fn log() -> (Vec<u8>, u64) {
    let mut m = vec![0; 0x4000];
    let id_mask = (1u64 << 62) - 1;
    // The pointer, then the ring: count_bits, descs, infos, head_id, tail_id, (last finalized), size_bits, data.
    put(&mut m, 0, IMAGE + 0x100, 8);
    let first = id_mask - 1;
    let ring = [2, IMAGE + 0x1000, IMAGE + 0x2000, first.wrapping_add(2) & id_mask, first, 7, IMAGE + 0x3000];
    ring.iter().enumerate().for_each(|(i, v)| put(&mut m, 0x100 + 8 * i as u64, *v, 8));
    for (i, (text, begin)) in [("first", 0x20), ("second\x1b[2J", 0x40), ("third", 0x60)].into_iter().enumerate() {
        let id = first.wrapping_add(i as u64) & id_mask;
        let index = id & 3;
        put(&mut m, 0x1000 + 24 * index, 2 << 62 | id, 8);
        let next = if i == 2 { 0x90 } else { begin + 0x20 };
        put(&mut m, 0x1000 + 24 * index + 8, begin, 8);
        put(&mut m, 0x1000 + 24 * index + 16, next, 8);
        // Sequence, time, length of the text, facility, flags and level.
        put(&mut m, 0x2000 + 88 * index, i as u64, 8);
        put(&mut m, 0x2000 + 88 * index + 8, 1_234_567_890, 8);
        put(&mut m, 0x2000 + 88 * index + 16, text.len() as u64 | 6 << 29, 4);
        let place = if i == 2 { 0 } else { begin };
        put(&mut m, 0x3000 + place, id, 8);
        m[0x3008 + place as usize..][..text.len()].copy_from_slice(text.as_bytes());
    }
    (m, IMAGE)
}

#[test]
fn a_log() {
    let (image, prb) = log();
    let ram = Ram::new(8, IMAGE, image);
    let all = dmesg::read(&ram.memory(), prb, &Vmcoreinfo::default(), 10).unwrap();
    let text = "<6>[    1.234567] first\n<6>[    1.234567] second.[2J\n<6>[    1.234567] third\n";
    assert_eq!(dmesg::show(&all), text);
    assert_eq!(dmesg::read(&ram.memory(), prb, &Vmcoreinfo::default(), 1).unwrap().len(), 1);
}

/// Tasks of a kernel without types: 40 bytes in front, the list, numbers, parent, name; in this order.
fn tasks_image() -> Vec<u8> {
    let mut m = vec![0; 0x10000];
    let at = |i: u64| 0x1000 + 0x1000 * i;
    let names = ["swapper/0", "init", "kthreadd", "kworker/0:1"];
    for (i, name) in (0..).zip(names) {
        let (task, next, last) = (at(i), at((i + 1) % 4), at((i + 3) % 4));
        // thread_info, then the state before the stack.
        put(&mut m, task + 16, [0, 1, 2, 0x402][i as usize], 4);
        put(&mut m, task + 20, 0xc100_8000 + 0x1000 * i, 4);
        put(&mut m, task + 40, 0xc100_0000 + next + 40, 4);
        put(&mut m, task + 44, 0xc100_0000 + last + 40, 4);
        let pid = [0, 1, 2, 77][i as usize];
        put(&mut m, task + 64, pid, 4);
        put(&mut m, task + 68, pid, 4);
        put(&mut m, task + 76, 0xc100_0000 + at(if i == 3 { 2 } else { 0 }), 4);
        m[(task + 200) as usize..][..name.len()].copy_from_slice(name.as_bytes());
    }
    m
}

fn linux_without_types() -> Linux {
    let image = (0xc100_0000, 0xc101_0000);
    let places =
        kallsyms::Places { num_syms: 0, names: 0, token_table: 0, token_index: 0, offsets: 0, relative_base: 0 };
    let (info, names) = (Vmcoreinfo::default(), Arc::default());
    Linux { info, names, types: None, orc: None, places, image, account: String::new() }
}

#[test]
fn tasks_by_what_must_hold() {
    let ram = Ram::new(4, 0xc100_0000, tasks_image());
    let tasks = tasks::read(&ram.memory(), &linux_without_types()).unwrap();
    let seen: Vec<_> = tasks.iter().map(|t| (t.pid, t.parent, t.state, t.kernel, t.name.as_str())).collect();
    let wanted = [
        (0, 0, 'R', true, "swapper/0"),
        (1, 0, 'S', false, "init"),
        (2, 0, 'D', true, "kthreadd"),
        (77, 2, 'I', true, "kworker/0:1"),
    ];
    assert_eq!(seen, wanted);
    assert_eq!(tasks[3].at, 0xc100_4000);
}

/// The same with a program: process 1 has three areas, two of a file, and arguments.
fn program_image() -> (Vec<u8>, u64) {
    const AT: u64 = 0xc100_0000;
    let mut m = tasks_image();
    m.resize(0x20000, 0);
    let (mm, node, area, file, folder) = (0x10000, 0x10400, 0x10800, 0x11000, 0x11800);
    // `mm` and `active_mm` behind the list; a kernel thread's `active_mm` is what it came upon.
    put(&mut m, 0x2000 + 40 + 12, AT + mm, 4);
    put(&mut m, 0x2000 + 40 + 16, AT + mm, 4);
    put(&mut m, 0x1000 + 40 + 16, AT + 0x1_3000, 4);
    // A maple tree of one leaf, the tables, and where the program's parts are.
    put(&mut m, mm + 8, (AT + node) | 1 << 3 | 2, 4);
    let tables = 0x1f000;
    put(&mut m, mm + 20, AT + tables, 4);
    let places = [0x1000, 0x1800, 0x2000, 0x2100, 0x3000, 0x3800, 0xbf00, 0xbf10, 0xbf20, 0xbf20, 0xbf40, 33, 0x3000];
    (0..).zip(places).for_each(|(i, place)| put(&mut m, mm + 40 + 4 * i, place, 4));
    // Slots: nothing, text, nothing, data, a hole, the vDSO, nothing.
    let slots = [(0xfff, 0), (0x1fff, area), (0x2fff, area + 0x80), (0x3fff, area + 0x100), (0, 0)];
    for (i, (pivot, entry)) in (0..).zip(slots) {
        put(&mut m, node + 4 + 4 * i, pivot, 4);
        put(&mut m, node + 128 + 4 * i, if entry == 0 { 0 } else { AT + entry }, 4);
    }
    for (i, (flags, file, page)) in (0..).zip([(0x75, AT + file, 0), (0x73, AT + file, 5), (0x75, 0, 0)]) {
        let at = area + 0x80 * i;
        let fields = [
            0x1000 + 0x1000 * i,
            0x2000 + 0x1000 * i,
            AT + mm,
            0x25,
            flags,
            0,
            0,
            AT + 0x500 + 0x40 * (i / 2),
            page,
            file,
        ];
        (0..).zip(fields).for_each(|(i, field)| put(&mut m, at + 4 * i, field, 4));
    }
    // The file's folder entry: parent, length and name, which is in it.
    put(&mut m, file + 12, AT + file + 0x100, 4);
    for (at, parent, name) in [(file + 0x100, folder, "sh"), (folder, folder, "/")] {
        put(&mut m, at + 16, AT + parent, 4);
        put(&mut m, at + 28, AT + at + 40, 4);
        m[(at + 40) as usize..][..name.len()].copy_from_slice(name.as_bytes());
    }
    (m, tables)
}

/// Its kernel is mapped by the program's tables, a copy of those in use.
fn program_ram((image, tables): (Vec<u8>, u64)) -> Ram {
    let mut ram = Ram::new(4, 0xc100_0000, image);
    let from = ram.bytes[..4096].to_vec();
    ram.bytes[TABLES + tables as usize..][..4096].copy_from_slice(&from);
    ram
}

#[test]
fn a_program_by_what_must_hold() {
    let ram = program_ram(program_image());
    let (m, linux) = (ram.memory(), linux_without_types());
    let all = tasks::read(&m, &linux).unwrap();
    assert_eq!((all[1].mm, all[0].mm, all[3].mm), (Some(0xc101_0000), None, None));
    let space = programs::Space::of(&m, &linux, &all, &all[1]).unwrap();
    let shown = mappings::show(&space.mappings);
    let wanted = "00001000-00002000 r-xp 00000000 /sh\n00002000-00003000 rw-p 00005000 /sh\n00003000-00004000 r-xp 00000000 [vdso]\n";
    assert_eq!(shown, wanted);
    assert_eq!(space.lookup(0x1234), Some(("sh".to_owned(), 0x234)));
    assert!(tasks::show(&m, &linux, &all).contains(" init  /sh\n"));
    let why = programs::Space::of(&m, &linux, &all, &all[2]).err().unwrap();
    assert!(why.contains("it has mapped nothing"), "{why}");
    assert!(programs::Space::current(&m, &linux).is_none(), "the tables in use are the kernel's own");
}

/// Structures changed at random: answers or errors, and an end.
#[test]
fn hostile_structures() {
    let ((log, prb), tasks, mut seed) = (log(), tasks_image(), 9);
    for _ in 0..300 {
        let mut bad = log.clone();
        for _ in 0..3 {
            let at = [0x100, 0x1000, 0x2000, 0x3000][random(&mut seed) as usize % 4] + random(&mut seed) as usize % 96;
            bad[at] = random(&mut seed) as u8;
        }
        let _ = dmesg::read(&Ram::new(8, IMAGE, bad).memory(), prb, &Vmcoreinfo::default(), 100);
        let mut bad = tasks.clone();
        for _ in 0..2 {
            let at = 0x1000 * (1 + random(&mut seed) as usize % 4) + random(&mut seed) as usize % 220;
            bad[at] = random(&mut seed) as u8;
        }
        let ram = Ram::new(4, 0xc100_0000, bad);
        let _ = tasks::read(&ram.memory(), &linux_without_types());
        let _ = modules::read(&ram.memory(), &linux_without_types());
    }
}

#[test]
fn hostile_programs() {
    let ((image, tables), mut seed) = (program_image(), 3);
    for _ in 0..300 {
        let mut bad = image.clone();
        for _ in 0..3 {
            let at = [0x10000, 0x10400, 0x10480, 0x10800, 0x10880, 0x11000, 0x11100, 0x11800];
            let at = at[random(&mut seed) as usize % at.len()] + random(&mut seed) as usize % 128;
            bad[at] = random(&mut seed) as u8;
        }
        let ram = program_ram((bad, tables));
        let (m, linux) = (ram.memory(), linux_without_types());
        let Ok(all) = tasks::read(&m, &linux) else { continue };
        for task in &all {
            if let Ok(space) = programs::Space::of(&m, &linux, &all, task) {
                let _ = (space.lookup(0x1800), space.address("main"), mappings::show(&space.mappings));
            }
            let _ = tasks::kept(&m, &linux, &all, task);
        }
    }
}
