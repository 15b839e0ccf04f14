//! The test cases of the IR (`tcg/ir/tests/files`) through generated code.
//!
//! The context is empty, so every access goes through its slow path, to the memory of a [`TestHost`]; the fast paths
//! have the random blocks.
#![allow(unsafe_code)]

use super::harness::{Machine, pins};
use mimus_tcg_ir::backend::*;
use mimus_tcg_ir::filetest::{Case, Ending, FaultRecord, Final, GUEST_SLOTS, TestHost, helper, parse};
use mimus_tcg_ir::flags::{self, FLAGS, Flags};
use mimus_tcg_ir::interp::{Fault, InterpHost, extend};
use mimus_tcg_ir::*;
use mimus_tcg_softfloat::riscv::{self, RvFpOp};
use mimus_tcg_softfloat::{FloatStatus, Rounding};
use std::mem::offset_of;

const HOT: usize = 4096;

/// The environment.
#[repr(C)]
struct Env {
    page_base: u64,
    pc: u64,
    kick: u32,
    exit_request: u32,
    exit_code: u32,
    cur_insn: u32,
    reserve_addr: u64,
    reserve_value: u64,
    vector_dead: u64,
    slots: [u64; SLOTS],
    hot: [u8; HOT],
    host: TestHost,
    at: u64,
    info: Emitted,
    dispatch: usize,
    fault: Option<FaultRecord>,
    heat: u16,
    buffer: [u8; 8],
    /// What compact code is changing in `buffer`.
    pending: Option<(u64, Size)>,
}

impl Env {
    /// What has been changed in the buffer goes where it belongs.
    fn write_back(&mut self) {
        if let Some((va, size)) = self.pending.take() {
            let value = u64::from_le_bytes(self.buffer);
            assert!(self.host.store(va, value, size).is_ok(), "what was read can be written");
        }
    }

    /// An access by the code that returns to `ret`.
    fn access<T>(&mut self, ret: u64, f: impl FnOnce(&mut TestHost) -> Result<T, Fault>) -> Option<T> {
        self.write_back();
        let entry = self.info.faults.iter().find(|e| self.at + u64::from(e.host) == ret);
        let entry = *entry.expect("a side-table entry for the return address");
        self.host.begin_insn(entry.pc, entry.len);
        match f(&mut self.host) {
            Ok(value) => Some(value),
            Err(Fault) => {
                self.fault = self.host.fault;
                self.exit_request = 1;
                None
            }
        }
    }

    fn call(&mut self, number: u16, args: [u64; 3]) -> u64 {
        let effect = helper(number, args);
        if let Some((slot, value)) = effect.slot {
            self.slots[usize::from(slot.0)] = value;
        }
        if let Some(pc) = effect.pc {
            self.pc = pc;
        }
        self.exit_request = u32::from(effect.leave);
        effect.result
    }
}

/// The environment that generated code passed.
///
/// # Safety
/// `env` is the one of the run, which nothing else uses meanwhile.
unsafe fn env_of<'a>(env: *mut Env) -> &'a mut Env {
    // SAFETY: as the caller promises.
    unsafe { &mut *env }
}

fn size(desc: u32) -> Size {
    [Size::B1, Size::B2, Size::B4, Size::B8][(desc & 3) as usize]
}

fn ext(desc: u32) -> Ext {
    [Ext::Zero, Ext::Sign, Ext::Ones][(desc >> 8 & 3) as usize]
}

extern "C" fn load(env: *mut Env, va: u64, desc: u32, ret: u64) -> u64 {
    // SAFETY: called by generated code with its environment.
    let env = unsafe { env_of(env) };
    env.access(ret, |h| h.load(va, size(desc), ext(desc))).unwrap_or(0xbad)
}

extern "C" fn store(env: *mut Env, va: u64, value: u64, desc: u32, ret: u64) {
    // SAFETY: as above.
    let env = unsafe { env_of(env) };
    env.access(ret, |h| h.store(va, value, size(desc)));
}

extern "C" fn atomic(env: *mut Env, va: u64, desc: u32, value: u64, ret: u64) -> u64 {
    // SAFETY: as above.
    let env = unsafe { env_of(env) };
    let size = size(desc);
    let before = Flags::unpack(env.slots[usize::from(FLAGS.0)]);
    let kind = desc >> 16 & 0xff;
    env.host.reservation = (env.reserve_addr != !0).then_some((env.reserve_addr, env.reserve_value));
    let result = match (kind, rmw_of_kind(kind)) {
        (ATOMIC_LOAD_RESERVED, _) => env.access(ret, |h| h.load_reserved(va, size, ext(desc))),
        (ATOMIC_STORE_CONDITIONAL, _) => env.access(ret, |h| h.store_conditional(va, value, size)),
        (_, Some(RmwOp::Swap)) => env.access(ret, |h| h.rmw(va, size, true, &mut |_| value)),
        (_, Some(RmwOp::F(op))) => {
            let eval = |memory| flags::eval(op, size, memory, value, before);
            let old = env.access(ret, |h| h.rmw(va, size, true, &mut |memory| eval(memory).0.unwrap_or(memory)));
            if let Some(old) = old {
                env.slots[usize::from(FLAGS.0)] = eval(old).1.pack();
            }
            old
        }
        _ => {
            use AmoOp::*;
            let op = [Swap, Add, Xor, And, Or, MinS, MaxS, MinU, MaxU][kind as usize];
            env.access(ret, |h| h.amo(op, va, value, size))
        }
    };
    (env.reserve_addr, env.reserve_value) = env.host.reservation.unwrap_or((!0, 0));
    result.unwrap_or(0xbad)
}

extern "C" fn cmpxchg(env: *mut Env, va: u64, desc: u32, expected: u64, new: u64, ret: u64) -> u64 {
    // SAFETY: as above.
    let env = unsafe { env_of(env) };
    let expected = extend(expected, size(desc), Ext::Zero);
    let exchange = &mut |old| if old == expected { new } else { old };
    env.access(ret, |h| h.rmw(va, size(desc), true, exchange)).unwrap_or(0xbad)
}

extern "C" fn fp(env: *mut Env, packed: u64) {
    // SAFETY: as above.
    let env = unsafe { env_of(env) };
    let [op, fmt, rm, d, a, b, c, _] = packed.to_le_bytes();
    let slot = |n: u8| env.slots[usize::from(n)];
    let op = super::random::FP_OPS[usize::from(op)];
    let fmt = [FpFmt::F32, FpFmt::F64][usize::from(fmt)];
    let rm = [Rm::NearestEven, Rm::ToZero, Rm::Down, Rm::Up, Rm::NearestMaxMag, Rm::Dynamic][usize::from(rm)];
    env.slots[usize::from(d)] = soft_fp(op, fmt, rm, slot(a), slot(b), slot(c), &mut 0);
}

extern "C" fn access(env: *mut Env, va: u64, word: u32, rax: u64, ret: u64) -> u64 {
    // SAFETY: as above.
    let env = unsafe { env_of(env) };
    let (bytes, write, _) = compact_access_of(word);
    let entry = *env.info.faults.iter().find(|e| env.at + u64::from(e.host) == ret).expect("a side-table entry");
    if let Some(recipe) = env.info.recipes.get(usize::from(entry.recipe)) {
        env.slots[usize::from(FLAGS.0)] = recipe.flags(|slot| env.slots[usize::from(slot.0)]).pack();
    }
    if bytes == 0 {
        return env.page_base.wrapping_add_signed(entry.pc.0.into());
    }
    let size = size(bytes.ilog2());
    let value = match entry.stored {
        Stored::Unknown => None,
        Stored::Scratch => Some(rax),
        Stored::Slot(slot) => Some(env.slots[usize::from(slot.0)]),
        Stored::Imm(imm) => Some(imm as u64),
    };
    let old = match (write, value) {
        (false, _) => env.access(ret, |h| h.load(va, size, Ext::Zero)),
        (true, Some(value)) => env.access(ret, |h| h.store(va, value, size)).map(|()| 0),
        (true, None) => {
            let old = env.access(ret, |h| h.rmw(va, size, true, &mut |old| old));
            env.pending = old.map(|_| (va, size));
            old
        }
    };
    env.buffer = old.unwrap_or(0xbad).to_le_bytes();
    env.buffer.as_ptr() as u64
}

extern "C" fn warm(env: *mut Env, ret: u64) -> u64 {
    // SAFETY: as above.
    unsafe { env_of(env) }.heat = 1;
    ret
}

/// A [`mimus_tcg_ir::filetest::FpFn`].
fn soft_fp(op: FpOp, fmt: FpFmt, rm: Rm, a: u64, b: u64, c: u64, flags: &mut u8) -> u64 {
    let op = RvFpOp::from_index(op as u8).expect("an operation");
    let fmt = match fmt {
        FpFmt::F32 => riscv::FpFmt::F32,
        FpFmt::F64 => riscv::FpFmt::F64,
    };
    let rm = match rm {
        Rm::NearestEven => riscv::Rm::NearestEven,
        Rm::ToZero => riscv::Rm::ToZero,
        Rm::Down => riscv::Rm::Down,
        Rm::Up => riscv::Rm::Up,
        Rm::NearestMaxMag => riscv::Rm::NearestMaxMag,
        Rm::Dynamic => riscv::Rm::Dynamic,
    };
    let mut status = FloatStatus::riscv(Rounding::NearestEven);
    let result = riscv::exec(op, fmt, rm, a, b, c, &mut status);
    *flags |= status.flags.bits();
    result
}

/// Every jump leads out.
extern "C" fn link(env: *mut Env, ret: u64) -> u64 {
    // SAFETY: as above.
    let env = unsafe { env_of(env) };
    let site = env.info.sites.iter().find(|s| env.at + u64::from(s.return_offset) == ret).expect("a site");
    env.pc = env.page_base.wrapping_add(site.to.0 as i64 as u64);
    env.dispatch as u64
}

extern "C" fn helper_call<const N: u16>(env: *mut Env, a: u64, b: u64, c: u64) -> u64 {
    // SAFETY: as above.
    unsafe { env_of(env) }.call(N, [a, b, c])
}

/// A machine for guests with flags, or for those with floating-point slots in registers.
fn machine(pin_order: Vec<Slot>, code_align: u32, flags: bool) -> Machine {
    let config = BackendConfig {
        env: EnvLayout {
            slots: offset_of!(Env, slots) as i32,
            page_base: offset_of!(Env, page_base) as i32,
            pc: offset_of!(Env, pc) as i32,
            kick: offset_of!(Env, kick) as i32,
            exit_request: offset_of!(Env, exit_request) as i32,
            exit_code: offset_of!(Env, exit_code) as i32,
            cur_insn: offset_of!(Env, cur_insn) as i32,
            reserve_addr: offset_of!(Env, reserve_addr) as i32,
            reserve_value: offset_of!(Env, reserve_value) as i32,
            vector_dead: offset_of!(Env, vector_dead) as i32,
            guest: offset_of!(Env, hot) as i32,
            heat: offset_of!(Env, heat) as i32,
            heats: 1,
            divisors: 0,
            unit_buffer: offset_of!(Env, buffer) as i32,
            ..EnvLayout::default()
        },
        context: ContextLayout::STANDARD,
        fns: RuntimeFns {
            load: load as *const () as usize,
            store: store as *const () as usize,
            atomic: atomic as *const () as usize,
            cmpxchg: cmpxchg as *const () as usize,
            unit_load: 0,
            unit_probe: 0,
            unit_store: 0,
            note: 0,
            fp: fp as *const () as usize,
            link: link as *const () as usize,
            trace_full: 0,
            access: access as *const () as usize,
            warm: warm as *const () as usize,
        },
        helpers: vec![
            helper_call::<0> as *const () as usize,
            helper_call::<1> as *const () as usize,
            helper_call::<2> as *const () as usize,
            helper_call::<3> as *const () as usize,
        ],
        pin_order,
        vector: None,
        stack: Some(Slot(4)),
        fp_pin_order: (32..46).map(Slot).collect(),
        fp_flags: None,
        code_align,
        optimise: Optimise::from_environment(),
        flags,
        code_base: 0,
    };
    Machine::with_config(config)
}

/// Runs a case and compares.
fn run(m: &Machine, case: &Case) -> Result<(), String> {
    let (mut out, mut info) = (Vec::new(), Emitted::default());
    m.backend.emit(&case.block, m.blocks_at, None, &mut out, &mut info);
    m.write_code(m.blocks_at, &out);
    let mut env = Box::new(Env {
        page_base: case.page_base,
        pc: 0,
        kick: 0,
        exit_request: 0,
        exit_code: !0,
        cur_insn: 0,
        reserve_addr: !0,
        reserve_value: 0,
        vector_dead: 0xff,
        slots: [0; SLOTS],
        hot: [0; HOT],
        host: case.host(soft_fp),
        at: m.blocks_at as u64,
        info,
        dispatch: m.stubs.dispatch,
        fault: None,
        heat: 1,
        buffer: [0; 8],
        pending: None,
    });
    env.slots[..GUEST_SLOTS].copy_from_slice(&case.slots);
    for (&off, &byte) in &case.env {
        env.hot[off as usize] = byte;
    }
    // A block that jumps to itself would go on for ever.
    env.kick = 1;
    m.enter(std::ptr::from_mut(&mut *env).cast(), m.blocks_at);
    env.write_back();
    let ending = match (env.fault, ExitCode::from_raw(env.exit_code), case.expect.ending) {
        (Some(fault), ..) => Ending::Fault(fault),
        (_, ExitCode::Careful, _) => Ending::Careful(env.pc),
        // Generated code does not say which it was.
        (_, _, Ending::Dispatch(_)) => Ending::Dispatch(env.pc),
        _ => Ending::Next(env.pc),
    };
    let mut slots = [0; GUEST_SLOTS];
    slots.copy_from_slice(&env.slots[..GUEST_SLOTS]);
    let hot = (0..).zip(env.hot).filter(|(_, byte)| *byte != 0).collect();
    case.check(&Final { ending, slots, env: hot, memory: env.host.memory.clone(), fp_flags: None })
}

#[test]
fn cases_of_the_files() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../ir/tests/files");
    let variants = [pins(0), pins(1), [3u8, 4, 5, 6, 7, 2, 1, 8, 9, 0, 12].map(Slot).to_vec()];
    let (mut count, mut failures) = (0, Vec::new());
    for pin_order in variants {
        let machines = [1, 2].map(|align| machine(pin_order.clone(), align, true));
        let without_flags = machine(pin_order.clone(), 2, false);
        for entry in std::fs::read_dir(folder).expect("the IR's test files") {
            let path = entry.expect("a file").path();
            let text = std::fs::read_to_string(&path).expect("a test file can be read");
            for case in parse(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display())) {
                count += 1;
                let mut machines = vec![&machines[case.code_align as usize - 1]];
                if path.ends_with("fp.ir") || path.ends_with("memory.ir") {
                    machines.push(&without_flags);
                }
                for machine in machines {
                    if let Err(e) = run(machine, &case) {
                        failures.push(format!("{}: {e}", path.display()));
                    }
                }
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
    assert!(count >= 300, "only {count} cases were found");
}
