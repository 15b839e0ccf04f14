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
