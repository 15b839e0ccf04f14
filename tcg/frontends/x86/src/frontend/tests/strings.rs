//! String instructions against a plain model: every kind, size and direction, over page borders and over each other.

use super::*;

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

#[derive(Clone, Debug)]
struct Case {
    opcode: u8,
    bytes: u64,
    prefix: Option<u8>,
    down: bool,
    count: u64,
    from: u64,
    to: u64,
    value: u64,
}

/// Bytes of memory that instructions work in.
const AREA: u64 = 0x4000;

struct Model {
    memory: Vec<u8>,
    from: u64,
    to: u64,
    count: u64,
    value: u64,
    /// ZF and CF of the last comparison.
    compared: Option<(bool, bool)>,
}

impl Model {
    fn get(&self, at: u64, bytes: u64) -> u64 {
        (0..bytes).fold(0, |v, i| v | u64::from(self.memory[(at - DATA + i) as usize]) << (8 * i))
    }

    fn put(&mut self, at: u64, bytes: u64, value: u64) {
        for i in 0..bytes {
            self.memory[(at - DATA + i) as usize] = (value >> (8 * i)) as u8;
        }
    }

    fn run(&mut self, case: &Case) {
        let bytes = case.bytes;
        let mask = if bytes == 8 { !0 } else { (1 << (8 * bytes)) - 1 };
        let step = if case.down { bytes.wrapping_neg() } else { bytes };
        while case.prefix.is_none() || self.count > 0 {
            let compared = match case.opcode {
                0xa4 => {
                    let value = self.get(self.from, bytes);
                    self.put(self.to, bytes, value);
                    None
                }
                0xaa => {
                    self.put(self.to, bytes, self.value);
                    None
                }
                0xac => {
                    let loaded = self.get(self.from, bytes);
                    self.value = if bytes == 4 { loaded } else { self.value & !mask | loaded };
                    None
                }
                0xa6 => Some((self.get(self.from, bytes), self.get(self.to, bytes))),
                _ => Some((self.value & mask, self.get(self.to, bytes))),
            };
            if matches!(case.opcode, 0xa4 | 0xa6 | 0xac) {
                self.from = self.from.wrapping_add(step);
            }
            if case.opcode != 0xac {
                self.to = self.to.wrapping_add(step);
            }
            let Some(prefix) = case.prefix else {
                self.compared = compared.map(|(a, b)| (a == b, a < b));
                return;
            };
            self.count -= 1;
            if let Some((a, b)) = compared {
                self.compared = Some((a == b, a < b));
                if (a == b) != (prefix == 0xf3) {
                    return;
                }
            }
        }
    }
}

fn random(r: &mut Random) -> Case {
    let opcode = [0xa4, 0xaa, 0xac, 0xa6, 0xae][r.below(5) as usize];
    let bytes = 1 << r.below(4);
    let prefix = [None, Some(0xf3), Some(0xf3), Some(if opcode >= 0xa6 && opcode != 0xaa { 0xf2 } else { 0xf3 })];
    let down = r.below(3) == 0;
    let count = [r.below(4), r.below(80), r.below(900)][r.below(3) as usize];
    let room = 0x1c00;
    let start = if down { room } else { 64 };
    let from = DATA + start + r.below(0x800);
    let near = if r.below(2) == 0 { r.below(40) } else { r.below(0x1000) };
    let to = if r.below(2) == 0 { from + near } else { from - near.min(start) };
    let most = if down { 0xb00 } else { 0x1a00 };
    let value = [0x4141_4141_4141_4141, r.0, 0][r.below(3) as usize];
    // LODS changes what is compared with nothing: no prefix but REP.
    let prefix = if opcode == 0xac { [None, Some(0xf3)][r.below(2) as usize] } else { prefix[r.below(4) as usize] };
    Case { opcode, bytes, prefix, down, count: count.min(most / bytes), from, to, value }
}

#[test]
fn string_instructions_are_the_models() {
    for protected in [false, true] {
        both(|mut g| {
            if protected {
                g.protected()
            } else {
                g.long()
            }
            let mut r = Random(0x1357_9bdf_2468_ace1);
            for _ in 0..1500 {
                let mut case = random(&mut r);
                if protected {
                    case.bytes = case.bytes.min(4);
                    case.value &= 0xffff_ffff;
                }
                // Runs of one byte, so that comparisons go on for a while. What is moved over itself differs everywhere.
                let mut memory = vec![0x41; AREA as usize];
                for _ in 0..if case.opcode == 0xa4 { AREA } else { r.below(6) } {
                    let at = r.below(AREA) as usize;
                    memory[at] = r.below(256) as u8;
                }
                g.put(DATA, &memory);
                let mut code = vec![if case.down { 0xfd } else { 0xfc }];
                code.extend(case.prefix);
                match case.bytes {
                    2 => code.push(0x66),
                    8 => code.push(0x48),
                    _ => {}
                }
                code.extend([case.opcode | u8::from(case.bytes > 1), 0xf4]);
                g.put(CODE, &code);
                g.change(|s| {
                    s.rip = CODE;
                    s.mp_state = MpState::Running;
                    (s.gpr[RSI], s.gpr[RDI], s.gpr[RCX], s.gpr[RAX]) = (case.from, case.to, case.count, case.value);
                });
                let mut m = Model {
                    memory,
                    from: case.from,
                    to: case.to,
                    count: case.count,
                    value: case.value,
                    compared: None,
                };
                m.run(&case);
                let s = g.run();
                let got = (s.gpr[RSI], s.gpr[RDI], s.gpr[RCX], s.gpr[RAX]);
                assert_eq!(got, (m.from, m.to, m.count, m.value), "{case:x?}");
                let mut after = vec![0; AREA as usize];
                g.get(DATA, &mut after);
                assert!(after == m.memory, "{case:x?}");
                if let Some((zero, carry)) = m.compared {
                    let flags = (s.rflags & RFLAGS_ZF != 0, s.rflags & RFLAGS_CF != 0);
                    assert_eq!(flags, (zero, carry), "{case:x?}");
                }
            }
        });
    }
}

#[test]
fn a_fault_in_the_middle_leaves_the_rest() {
    both(|mut g| {
        g.long();
        // The target ends where nothing is mapped.
        g.change(|s| (s.gpr[RSI], s.gpr[RDI], s.gpr[RCX]) = (DATA, 0x4000_0000 - 0x1010, 0x3000));
        g.put(CODE, &[0xf3, 0xa4, 0xf4]);
        let s = g.run();
        assert_eq!((s.rip, s.cr2), (0xa0e1, 0x4000_0000));
        assert_eq!((s.gpr[RSI], s.gpr[RDI], s.gpr[RCX]), (DATA + 0x1010, 0x4000_0000, 0x3000 - 0x1010));
        assert_eq!(g.u64_at(s.gpr[RSP] + 8), CODE);
    });
}

/// All that the source can fault with comes before the target is looked at, as processors do it.
#[test]
fn the_source_faults_before_the_target() {
    const MISSING: u64 = 0x4000_0000;
    const NO_ADDRESS: u64 = 1 << 63;
    // movsb, movsq, cmpsb, cmpsq; each repeated too
    let programs: [&[u8]; 8] = [
        &[0xa4],
        &[0x48, 0xa5],
        &[0xa6],
        &[0x48, 0xa7],
        &[0xf3, 0xa4],
        &[0xf3, 0x48, 0xa5],
        &[0xf3, 0xa6],
        &[0xf3, 0x48, 0xa7],
    ];
    for code in programs {
        for (from, to, vector) in [(MISSING, NO_ADDRESS, 14), (NO_ADDRESS, MISSING, 13), (MISSING, MISSING + 8, 14)] {
            for count in [1, 4] {
                both(|mut g| {
                    g.long();
                    g.put(CODE, code);
                    g.change(|s| (s.gpr[RSI], s.gpr[RDI], s.gpr[RCX]) = (from, to, count));
                    let s = g.run();
                    assert_eq!((s.rip - 0xa001) / 16, vector, "{code:x?} {from:#x} {to:#x}");
                    assert_eq!((s.gpr[RSI], s.gpr[RDI], s.gpr[RCX]), (from, to, count), "{code:x?}");
                    if vector == 14 {
                        assert_eq!((s.cr2, g.u64_at(s.gpr[RSP])), (MISSING, 0), "{code:x?}: a read");
                    }
                });
            }
        }
    }
}

/// Long ones go from page to page, which are anywhere, until one is not there.
#[test]
fn long_moves_and_stores_through_scattered_pages() {
    const HEAP: u64 = 0x4000_0000;
    const PAGES: u64 = 48;
    both(|mut g| {
        g.long();
        let (directory, table) = (TABLES + 0x2000, TABLES + 0x3000);
        g.put_u64(TABLES + 0x1008, directory | 7);
        g.put_u64(directory, table | 7);
        let place = |page: u64| DATA + page * 29 % PAGES * 0x1000;
        for page in 0..PAGES {
            g.put_u64(table + 8 * page, place(page) | 7);
        }
        let mut r = Random(0x2468_ace1_1357_9bdf);
        for round in 0..150 {
            let (stores, bytes) = (r.below(3) == 0, 1 << r.below(4));
            let (mut from, mut to) = (r.below(0x1_8000), r.below(0x1_8000));
            if r.below(3) == 0 {
                // Over each other, by pages or a little, either way.
                to = from.saturating_add_signed([-0x3001, -0x1000, -9, 9, 0x1000, 0x2fff][r.below(6) as usize]);
            }
            if r.below(2) == 0 {
                (from, to) = (from & !(bytes - 1), to & !(bytes - 1));
            }
            // Some leave what is mapped.
            let most = (PAGES * 0x1000 - from.max(to) + 0x800) / bytes;
            let count = r.below(0x1_8000 / bytes).min(most);
            let mut memory: Vec<u8> = (0..PAGES * 0x1000).map(|i| ((i * i) >> 7) as u8 ^ round).collect();
            for page in 0..PAGES {
                g.put(place(page), &memory[page as usize * 0x1000..][..0x1000]);
            }
            let value = [0x2121_2121_2121_2121, r.0][r.below(2) as usize];
            let mut code = vec![0xfc, 0xf3];
            match bytes {
                2 => code.insert(1, 0x66),
                8 => code.push(0x48),
                _ => {}
            }
            code.extend([if stores { 0xaa } else { 0xa4 } | u8::from(bytes > 1), 0xf4]);
            g.put(CODE, &code);
            g.change(|s| {
                (s.rip, s.mp_state, s.gpr[RSP]) = (CODE, MpState::Running, STACK);
                (s.gpr[RSI], s.gpr[RDI], s.gpr[RCX], s.gpr[RAX]) = (HEAP + from, HEAP + to, count, value);
            });
            let mut done = 0;
            let fits = |at: u64| at + bytes <= PAGES * 0x1000;
            while done < count && fits(to + done * bytes) && (stores || fits(from + done * bytes)) {
                let (source, target) = ((from + done * bytes) as usize, (to + done * bytes) as usize);
                let element = match stores {
                    true => value.to_le_bytes()[..bytes as usize].to_vec(),
                    false => memory[source..source + bytes as usize].to_vec(),
                };
                memory[target..target + bytes as usize].copy_from_slice(&element);
                done += 1;
            }
            let s = g.run();
            let what = format!("{bytes} {stores} {from:#x} {to:#x} {count:#x}");
            assert_eq!(s.gpr[RCX], count - done, "{what}");
            assert_eq!(s.gpr[RDI], HEAP + to + done * bytes, "{what}");
            assert_eq!(s.gpr[RSI], HEAP + from + if stores { 0 } else { done * bytes }, "{what}");
            if done < count {
                assert_eq!((s.rip, s.cr2), (0xa0e1, HEAP + PAGES * 0x1000), "{what}");
            }
            let mut after = vec![0; 0x1000];
            for page in 0..PAGES {
                g.get(place(page), &mut after);
                assert!(after == memory[page as usize * 0x1000..][..0x1000], "{what}: page {page:#x}");
            }
        }
    });
}
