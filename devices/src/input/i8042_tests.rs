use super::*;
use crate::testing::{Levels, Rng, assert_round_trip, inb, outb, reset, restore_with};
use mimus_core::backend::{Key, MouseButton};
use std::sync::atomic::{AtomicU32, Ordering};

const A: Key = Key(30);
const UP: Key = Key(103);
const F7: Key = Key(65);

struct Pc {
    levels: Arc<Levels>,
    resets: Arc<AtomicU32>,
    kbc: Arc<Mutex<I8042>>,
    sink: Arc<dyn InputSink>,
}

impl Pc {
    fn new() -> Self {
        let (levels, resets) = (Levels::new(), Arc::new(AtomicU32::new(0)));
        let lines = I8042Lines { keyboard: levels.line(1), mouse: levels.line(12), a20: levels.line(20) };
        let r = resets.clone();
        let kbc = I8042::new(lines, Box::new(move || _ = r.fetch_add(1, Ordering::Relaxed)));
        assert_eq!(levels.take(), [(20, true)]);
        Pc { levels, resets, sink: I8042::sink(&kbc), kbc }
    }

    fn status(&self) -> u8 {
        inb(&*self.kbc, REGION_COMMAND, 0)
    }

    fn read(&self) -> u8 {
        inb(&*self.kbc, REGION_DATA, 0)
    }

    fn command(&self, value: u8) {
        outb(&*self.kbc, REGION_COMMAND, 0, value);
    }

    fn data(&self, value: u8) {
        outb(&*self.kbc, REGION_DATA, 0, value);
    }

    fn ask(&self, command: u8) -> u8 {
        self.command(command);
        assert_eq!(self.status() & (STATUS_FULL | STATUS_AUX), STATUS_FULL);
        self.read()
    }

    /// All bytes there are, of keyboard or mouse.
    fn drain(&self, aux: bool) -> Vec<u8> {
        let want = STATUS_FULL | if aux { STATUS_AUX } else { 0 };
        let more = || (self.status() & (STATUS_FULL | STATUS_AUX) == want).then(|| self.read());
        std::iter::from_fn(more).collect()
    }

    fn keyboard(&self, bytes: &[u8]) -> Vec<u8> {
        bytes
            .iter()
            .flat_map(|b| {
                self.data(*b);
                self.drain(false)
            })
            .collect()
    }

    fn mouse(&self, bytes: &[u8]) -> Vec<u8> {
        let one = |b: &u8| {
            self.command(WRITE_AUX);
            self.data(*b);
            self.drain(true)
        };
        bytes.iter().flat_map(one).collect()
    }

    fn ccb(&self, value: u8) {
        self.command(WRITE_CCB);
        self.data(value);
    }

    fn key(&self, key: Key, down: bool) {
        self.sink.input(&[InputEvent::Key { key, down }]);
    }

    fn motion(&self, dx: i32, dy: i32) {
        self.sink.input(&[InputEvent::Motion { dx, dy }]);
    }
}

#[test]
fn controller_commands() {
    let pc = Pc::new();
    assert_eq!(pc.status(), 0x18);
    assert_eq!(pc.ask(READ_CCB), 0x43);
    assert_eq!(pc.ask(SELF_TEST), 0x55);
    assert_eq!(pc.status() & CCB_SYSTEM, CCB_SYSTEM);
    assert_eq!((pc.ask(TEST_KEYBOARD), pc.ask(TEST_AUX)), (0, 0));
    pc.command(DISABLE);
    pc.command(DISABLE_AUX);
    assert_eq!(pc.ask(READ_CCB), 0x77);
    pc.command(ENABLE);
    pc.command(ENABLE_AUX);
    pc.ccb(0xff);
    assert_eq!(pc.ask(READ_CCB), 0x77);
    assert_eq!((pc.ask(READ_INPUT), pc.ask(0x31), pc.ask(READ_TEST)), (0xa0, 0, 0));
    pc.command(0xff);
    pc.command(0x99);
    assert_eq!(pc.status() & STATUS_FULL, 0);
    assert_eq!(pc.read(), 0, "the last byte again");
    pc.data(0);
    assert_eq!(pc.status() & STATUS_COMMAND, 0);
}

#[test]
fn the_command_port_loops_bytes_back() {
    let pc = Pc::new();
    pc.command(WRITE_BUFFER);
    pc.data(0x5a);
    assert_eq!(pc.drain(false), [0x5a]);
    pc.command(WRITE_AUX_BUFFER);
    pc.data(0xa5);
    assert_eq!(pc.drain(true), [0xa5], "how Linux finds the mouse port");
    assert_eq!(pc.levels.take(), [(1, true), (1, false), (12, true), (12, false)]);
    for n in 0..40 {
        pc.command(WRITE_BUFFER);
        pc.data(n);
    }
    assert_eq!(pc.drain(false).len(), OWN + 1);
}

#[test]
fn reset_and_a20() {
    let pc = Pc::new();
    let resets = || pc.resets.load(Ordering::Relaxed);
    pc.command(A20_OFF);
    assert_eq!(pc.levels.take(), [(20, false)]);
    assert_eq!(pc.ask(READ_OUTPUT), 0xc1);
    pc.levels.take();
    pc.command(WRITE_OUTPUT);
    pc.data(0xc3);
    assert_eq!((pc.levels.take(), resets()), (vec![(20, true)], 0));
    pc.command(0xfe);
    assert_eq!(resets(), 1);
    pc.command(WRITE_OUTPUT);
    pc.data(0xc2);
    assert_eq!(resets(), 2);
    pc.command(A20_OFF);
    pc.levels.take();
    reset(&*pc.kbc);
    assert_eq!(pc.levels.take(), [(20, true)]);
}

#[test]
fn keys_in_all_sets() {
    let pc = Pc::new();
    let press = |key| {
        pc.key(key, true);
        pc.key(key, false);
        pc.drain(false)
    };
    assert_eq!(press(A), [0x1e, 0x9e]);
    assert_eq!(press(UP), [0xe0, 0x48, 0xe0, 0xc8]);
    assert_eq!(press(F7), [0x41, 0xc1]);
    assert_eq!(press(Key(0x2ff)), [] as [u8; 0]);
    pc.ccb(CCB_INT);
    assert_eq!(press(A), [0x1c, 0xf0, 0x1c]);
    assert_eq!(pc.keyboard(&[0xf0, 0]), [0xfa, 0xfa, 2]);
    assert_eq!(pc.keyboard(&[0xf0, 1, 0xf0, 0]), [0xfa, 0xfa, 0xfa, 0xfa, 1]);
    assert_eq!(press(UP), [0xe0, 0x48, 0xe0, 0xc8]);
    assert_eq!(pc.keyboard(&[0xf0, 3]), [0xfa, 0xfe]);
}

#[test]
fn keyboard_commands() {
    let pc = Pc::new();
    pc.ccb(0);
    assert_eq!(pc.keyboard(&[0xff]), [0xfa, 0xaa]);
    assert_eq!(pc.keyboard(&[0xf2]), [0xfa, 0xab, 0x83]);
    assert_eq!(pc.keyboard(&[0xee, 0xfe]), [0xee, 0xee]);
    assert_eq!(pc.keyboard(&[0xed, 2, 0xf3, 0x20]), [0xfa; 4]);
    assert_eq!(lock(&pc.kbc).leds(), 2);
    assert_eq!(pc.keyboard(&[0xed, 0xf4]), [0xfa, 0xfa], "a command instead of the parameter");
    assert_eq!(pc.keyboard(&[0xf5]), [0xfa]);
    pc.key(A, true);
    assert_eq!(pc.drain(false), [] as [u8; 0], "disabled");
    assert_eq!(pc.keyboard(&[0xf4, 0xfa, 0xf6, 0x01]), [0xfa, 0xfa, 0xfa, 0xfe]);
    pc.key(A, true);
    assert_eq!(pc.drain(false), [0x1c]);
    pc.ccb(CCB_TRANSLATE);
    assert_eq!(pc.keyboard(&[0xf2]), [0xfa, 0xab, 0x41], "the identification is translated too");
}

#[test]
fn the_keyboard_buffer_overruns() {
    let pc = Pc::new();
    pc.ccb(CCB_DISABLE);
    for _ in 0..20 {
        pc.key(A, true);
    }
    assert_eq!(pc.drain(false), [] as [u8; 0], "held back");
    pc.ccb(0);
    let bytes = pc.drain(false);
    assert_eq!(bytes, [vec![0x1c; 15], vec![0]].concat());
}

#[test]
fn interrupts() {
    let pc = Pc::new();
    pc.key(A, true);
    pc.key(A, false);
    assert_eq!(pc.levels.take(), [(1, true)]);
    pc.read();
    assert_eq!(pc.levels.take(), [(1, false), (1, true)], "an edge for every byte");
    pc.read();
    assert_eq!(pc.levels.take(), [(1, false)]);
    pc.ccb(0);
    pc.key(A, true);
    assert_eq!(pc.levels.take(), []);
    pc.ccb(CCB_INT);
    assert_eq!(pc.levels.take(), [(1, true)]);
}

#[test]
fn mouse_commands() {
    let pc = Pc::new();
    assert_eq!(pc.mouse(&[0xff]), [0xfa, 0xaa, 0]);
    assert_eq!(pc.mouse(&[0xf2]), [0xfa, 0]);
    assert_eq!(pc.mouse(&[0xe8, 3, 0xf3, 40, 0xe7, 0xf4]), [0xfa; 6]);
    assert_eq!(pc.mouse(&[0xe9]), [0xfa, 0x30, 3, 40]);
    assert_eq!(pc.mouse(&[0xe8, 4, 0xf3, 41, 0x00]), [0xfa, 0xfe, 0xfa, 0xfe, 0xfe]);
    assert_eq!(pc.mouse(&[0xee, 0x42, 0xf4, 0xec, 0xf2]), [0xfa, 0x42, 0xf4, 0xfa, 0xfa, 0]);
    assert_eq!(pc.mouse(&[0xf0, 0xe9]), [0xfa, 0xfa, 0x70, 3, 40]);
    pc.motion(5, -6);
    assert_eq!(pc.drain(true), [] as [u8; 0], "remote mode");
    assert_eq!(pc.mouse(&[0xeb]), [0xfa, 0x08, 5, 6]);
    assert_eq!(pc.mouse(&[0xfe]), [6]);
    assert_eq!(pc.mouse(&[0xf6, 0xe9]), [0xfa, 0xfa, 0, 2, 100]);
}

#[test]
fn mouse_reports() {
    let pc = Pc::new();
    pc.motion(1, 1);
    assert_eq!(pc.drain(true), [] as [u8; 0], "not enabled");
    pc.mouse(&[0xf4]);
    pc.levels.take();
    pc.sink.input(&[
        InputEvent::Motion { dx: -3, dy: 4 },
        InputEvent::Button { button: MouseButton::Left, down: true },
        InputEvent::Wheel { clicks: 1 },
    ]);
    assert_eq!(pc.levels.take(), [(12, true)]);
    assert_eq!(pc.drain(true), [0x39, 0xfd, 0xfc]);
    pc.sink.input(&[InputEvent::Button { button: MouseButton::Left, down: true }]);
    assert_eq!(pc.drain(true), [] as [u8; 0], "nothing changed");
    pc.motion(600, 0);
    assert_eq!(pc.drain(true), [9, 255, 0, 9, 255, 0, 9, 90, 0]);
    for _ in 0..1000 {
        pc.motion(1, 0);
    }
    let sum: u32 = pc.drain(true).chunks(3).map(|p| u32::from(p[1])).sum();
    assert_eq!(sum, 1000, "no movement is lost");
    pc.mouse(&[0xe7]);
    pc.motion(4, -10);
    assert_eq!(pc.drain(true), [9, 6, 20], "2:1");
    pc.motion(i32::MAX, i32::MIN);
    pc.motion(i32::MAX, i32::MIN);
    assert!(pc.drain(true).len() > 3 * 500);
}

#[test]
fn wheels_and_more_buttons() {
    let pc = Pc::new();
    pc.mouse(&[0xf3, 200, 0xf3, 100, 0xf3, 80]);
    assert_eq!(pc.mouse(&[0xf2]), [0xfa, 3]);
    pc.mouse(&[0xf4]);
    pc.sink.input(&[InputEvent::Wheel { clicks: 2 }]);
    assert_eq!(pc.drain(true), [8, 0, 0, 0xfe]);
    pc.mouse(&[0xf3, 200, 0xf3, 200, 0xf3, 80]);
    assert_eq!(pc.mouse(&[0xf2]), [0xfa, 4]);
    pc.sink.input(&[
        InputEvent::Wheel { clicks: -9 },
        InputEvent::Button { button: MouseButton::Side, down: true },
        InputEvent::Button { button: MouseButton::Middle, down: true },
    ]);
    assert_eq!(pc.drain(true), [0xc, 0, 0, 0x17, 0xc, 0, 0, 0x12]);
    pc.mouse(&[0xff]);
    assert_eq!(pc.mouse(&[0xf2]), [0xfa, 0]);
}

#[test]
fn saved_and_restored() {
    let pc = Pc::new();
    pc.mouse(&[0xf4]);
    pc.key(A, false);
    pc.motion(1, 2);
    pc.command(WRITE_AUX);
    let other = Pc::new();
    assert_round_trip(&pc.kbc, &other.kbc);
    assert_eq!(other.levels.take(), []);
    other.data(0xf2);
    assert_eq!(other.drain(false), [0x9e]);
    assert_eq!(other.drain(true), [0xfa, 0]);
    for (pointer, value) in [("/ccb", 0x80), ("/keyboard/set", 3), ("/mouse/id", 1), ("/mouse/dx", 1 << 20)] {
        assert!(restore_with(&other.kbc, pointer, value).is_err(), "{pointer}");
    }
    assert!(restore_with(&other.kbc, "/keyboard/keys", vec![0; 17]).is_err());
    assert!(restore_with(&other.kbc, "/mouse/replies", vec![0; 9]).is_err());
    restore_with(&other.kbc, "/output_port", 0xc1).unwrap();
    assert_eq!(other.levels.take().last(), Some(&(20, false)));
}

#[test]
fn random_accesses() {
    let mut rng = Rng(11);
    let pc = Pc::new();
    for _ in 0..100_000 {
        match rng.below(6) {
            0 => pc.command(rng.next() as u8),
            1 => pc.data(rng.next() as u8),
            2 => pc.key(Key(rng.below(300) as u16), rng.below(2) == 0),
            3 => pc.motion(rng.next() as i32, rng.next() as i32),
            _ => _ = pc.read(),
        }
    }
    let other = Pc::new();
    assert_round_trip(&pc.kbc, &other.kbc);
}
