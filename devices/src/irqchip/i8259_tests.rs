use super::*;
use crate::testing::{Levels, Rng, assert_round_trip, inb, outb, reset, restore_with, saved};

struct Pc {
    pic: Arc<Mutex<I8259>>,
    irqs: Arc<dyn IrqController>,
    levels: Arc<Levels>,
}

impl Pc {
    /// Initialised as a PC's firmware does, vectors 0x20 and 0x28, nothing masked.
    fn new() -> Self {
        let levels = Levels::new();
        let pic = I8259::new(levels.line(0));
        let pc = Pc { irqs: I8259::irqs(&pic), pic, levels };
        pc.init(0x11, 0x01);
        pc
    }

    fn init(&self, icw1: u8, icw4: u8) {
        for (region, base, icw3) in [(REGION_MASTER, 0x20, 4), (REGION_SLAVE, 0x28, 2)] {
            outb(&*self.pic, region, 0, icw1);
            outb(&*self.pic, region, 1, base);
            outb(&*self.pic, region, 1, icw3);
            outb(&*self.pic, region, 1, icw4);
        }
    }

    fn raise(&self, irq: u32) {
        self.irqs.set_input(irq, true);
    }

    fn pulse(&self, irq: u32) {
        self.irqs.set_input(irq, true);
        self.irqs.set_input(irq, false);
    }

    fn ack(&self) -> u8 {
        lock(&self.pic).acknowledge()
    }

    fn int(&self) -> bool {
        lock(&self.pic).output()
    }

    fn command(&self, region: u32, value: u8) {
        outb(&*self.pic, region, 0, value);
    }

    fn mask(&self, region: u32, value: u8) {
        outb(&*self.pic, region, 1, value);
    }

    fn isr(&self, region: u32) -> u8 {
        self.command(region, 0x0b);
        inb(&*self.pic, region, 0)
    }

    fn irr(&self, region: u32) -> u8 {
        self.command(region, 0x0a);
        inb(&*self.pic, region, 0)
    }
}

const EOI: u8 = 0x20;

#[test]
fn nothing_before_initialisation() {
    let pic = I8259::new(IrqLine::disconnected());
    I8259::irqs(&pic).set_input(0, true);
    assert!(!lock(&pic).output());
    outb(&*pic, REGION_MASTER, 0, 0x13);
    outb(&*pic, REGION_MASTER, 1, 0x4f);
    assert!(!lock(&pic).output(), "ICW4 is missing");
    outb(&*pic, REGION_MASTER, 1, 1);
    assert!(!lock(&pic).output(), "the edge was before");
    I8259::irqs(&pic).set_input(1, true);
    assert_eq!(lock(&pic).acknowledge(), 0x49);
}

#[test]
fn priorities_nest() {
    let pc = Pc::new();
    pc.pulse(4);
    assert_eq!(pc.levels.take(), [(0, true)]);
    assert_eq!(pc.ack(), 0x24);
    assert_eq!(pc.levels.take(), [(0, false)]);
    pc.pulse(6);
    assert!(!pc.int(), "lower than in service");
    pc.pulse(1);
    assert_eq!(pc.ack(), 0x21);
    assert_eq!(pc.isr(REGION_MASTER), 0x12);
    pc.command(REGION_MASTER, EOI);
    assert_eq!(pc.isr(REGION_MASTER), 0x10);
    assert!(!pc.int());
    pc.command(REGION_MASTER, 0x60 | 4);
    assert_eq!(pc.ack(), 0x26);
}

#[test]
fn cascade() {
    let pc = Pc::new();
    pc.raise(12);
    assert_eq!(pc.irr(REGION_MASTER), 4);
    assert_eq!(pc.irr(REGION_SLAVE), 0x10);
    assert_eq!(pc.ack(), 0x2c);
    assert_eq!((pc.isr(REGION_MASTER), pc.isr(REGION_SLAVE)), (4, 0x10));
    pc.raise(8);
    assert!(!pc.int(), "the slave's input is in service at the master");
    pc.command(REGION_MASTER, EOI);
    assert_eq!(pc.ack(), 0x28);
    pc.command(REGION_SLAVE, EOI);
    pc.command(REGION_SLAVE, EOI);
    pc.command(REGION_MASTER, EOI);
    assert!(!pc.int());
}

#[test]
fn special_fully_nested() {
    let pc = Pc::new();
    pc.init(0x11, 0x11);
    pc.pulse(12);
    assert_eq!(pc.ack(), 0x2c);
    pc.pulse(5);
    assert!(!pc.int(), "lower at the master");
    pc.pulse(9);
    assert_eq!(pc.ack(), 0x29, "higher within the slave");
}

#[test]
fn edges_and_levels() {
    let pc = Pc::new();
    pc.raise(5);
    pc.ack();
    pc.command(REGION_MASTER, EOI);
    assert!(!pc.int(), "no second edge");
    outb(&*pc.pic, REGION_ELCR, 0, 0xff);
    outb(&*pc.pic, REGION_ELCR, 1, 0xff);
    assert_eq!(inb(&*pc.pic, REGION_ELCR, 0), 0xf8);
    assert_eq!(inb(&*pc.pic, REGION_ELCR, 1), 0xde);
    assert_eq!(pc.ack(), 0x25);
    pc.command(REGION_MASTER, EOI);
    assert!(pc.int(), "still at the level");
    pc.irqs.set_input(5, false);
    assert!(!pc.int());
    pc.init(0x19, 1);
    pc.raise(0);
    pc.ack();
    pc.command(REGION_MASTER, EOI);
    assert_eq!(pc.ack(), 0x20, "LTIM");
}

#[test]
fn spurious() {
    let pc = Pc::new();
    assert_eq!(pc.ack(), 0x27);
    assert_eq!(pc.isr(REGION_MASTER), 0);
    outb(&*pc.pic, REGION_ELCR, 1, 8);
    pc.pulse(9);
    pc.mask(REGION_SLAVE, 0xff);
    assert!(!pc.int());
    assert_eq!(pc.ack(), 0x27);
}

#[test]
fn masks() {
    let pc = Pc::new();
    pc.mask(REGION_MASTER, 0xfe);
    assert_eq!(inb(&*pc.pic, REGION_MASTER, 1), 0xfe);
    pc.pulse(3);
    assert!(!pc.int());
    assert_eq!(pc.irr(REGION_MASTER), 8, "requests are seen through the mask");
    pc.mask(REGION_MASTER, 0xf7);
    assert_eq!(pc.ack(), 0x23);
}

#[test]
fn automatic_end_and_rotation() {
    let pc = Pc::new();
    pc.init(0x11, 3);
    pc.pulse(3);
    pc.ack();
    assert_eq!(pc.isr(REGION_MASTER), 0);
    pc.command(REGION_MASTER, 0x80);
    pc.pulse(3);
    pc.ack();
    pc.pulse(3);
    pc.pulse(4);
    assert_eq!(pc.ack(), 0x24, "3 is last after its turn");
    assert_eq!(pc.ack(), 0x23);
    pc.command(REGION_MASTER, 0);
    pc.pulse(0);
    assert_eq!(pc.ack(), 0x20);
    pc.pulse(0);
    pc.pulse(4);
    assert_eq!(pc.ack(), 0x24, "no more rotation: 3 is still last");
}

#[test]
fn rotation_by_command() {
    let pc = Pc::new();
    pc.pulse(4);
    pc.ack();
    // The data sheet's example of "automatic rotation": 4 becomes the lowest.
    pc.command(REGION_MASTER, 0xa0);
    pc.pulse(3);
    pc.pulse(6);
    assert_eq!(pc.ack(), 0x26);
    pc.command(REGION_MASTER, 0xe0 | 6);
    assert_eq!(pc.ack(), 0x23);
    pc.command(REGION_MASTER, 0x60 | 3);
    pc.command(REGION_MASTER, 0xc0 | 5);
    pc.pulse(5);
    pc.pulse(7);
    assert_eq!(pc.ack(), 0x27);
}

#[test]
fn special_mask_mode() {
    let pc = Pc::new();
    pc.pulse(4);
    pc.ack();
    pc.pulse(6);
    assert!(!pc.int());
    pc.mask(REGION_MASTER, 0x10);
    assert!(!pc.int());
    pc.command(REGION_MASTER, 0x68);
    assert_eq!(pc.ack(), 0x26);
    pc.command(REGION_MASTER, EOI);
    assert_eq!(pc.isr(REGION_MASTER), 0x10, "a masked input is not ended");
    pc.command(REGION_MASTER, EOI);
    assert_eq!(pc.isr(REGION_MASTER), 0x10);
    pc.command(REGION_MASTER, 0x48);
    pc.command(REGION_MASTER, EOI);
    assert_eq!(pc.isr(REGION_MASTER), 0);
}

#[test]
fn poll() {
    let pc = Pc::new();
    pc.command(REGION_MASTER, 0x0c);
    assert_eq!(inb(&*pc.pic, REGION_MASTER, 0), 0);
    pc.pulse(6);
    pc.command(REGION_MASTER, 0x0c);
    assert_eq!(inb(&*pc.pic, REGION_MASTER, 1), 0x86);
    assert_eq!(pc.isr(REGION_MASTER), 0x40);
    assert_eq!(inb(&*pc.pic, REGION_MASTER, 1), 0, "the mask again");
}

#[test]
fn reset_and_snapshot() {
    let pc = Pc::new();
    outb(&*pc.pic, REGION_ELCR, 0, 0x20);
    pc.raise(5);
    pc.raise(9);
    let other = Pc::new();
    assert_round_trip(&pc.pic, &other.pic);
    assert_eq!(other.ack(), 0x29);
    for (field, value) in
        [("/master/lowest", 8), ("/slave/next_icw", 1), ("/slave/base", 3), ("/master/elcr", 1), ("/master/lines", 4)]
    {
        assert!(restore_with(&pc.pic, field, value).is_err(), "{field}");
    }
    assert!(restore_with(&pc.pic, "/slave/next_icw", 3).is_err(), "initialised");
    reset(&*pc.pic);
    assert!(!pc.int());
    assert_eq!(saved(&pc.pic).pointer("/master/lines").unwrap(), 0x20, "inputs are the devices'");
}

#[test]
fn fuzz() {
    let pc = Pc::new();
    let mut rng = Rng(1);
    for _ in 0..200_000 {
        let value = rng.next() as u8;
        match rng.below(5) {
            0 => drop(inb(&*pc.pic, rng.below(4) as u32, rng.below(4) as u16)),
            1 | 2 => outb(&*pc.pic, rng.below(4) as u32, rng.below(4) as u16, value),
            3 => pc.irqs.set_input(rng.below(20) as u32, value & 1 != 0),
            _ => drop(pc.ack()),
        }
    }
    let other = Pc::new();
    assert_round_trip(&pc.pic, &other.pic);
}
