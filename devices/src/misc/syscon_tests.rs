use super::*;
use crate::testing::memory::{OnBus, any_size};
use crate::testing::state::restore_damaged;
use crate::testing::{Rng, assert_round_trip, reset};
use std::sync::PoisonError;

#[derive(Default)]
struct Requests(Mutex<Vec<SysconRequest>>);

impl Requests {
    fn take(&self) -> Vec<SysconRequest> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn finisher() -> (Arc<Mutex<Syscon>>, Arc<Requests>, OnBus) {
    let requests = Arc::new(Requests::default());
    let log = requests.clone();
    let device = Syscon::new(move |r| log.0.lock().unwrap().push(r));
    let bus = OnBus::new(&device, RULES);
    (device, requests, bus)
}

#[test]
fn requests() {
    let (_, requests, bus) = finisher();
    let write = |value| {
        bus.write(0, AccessSize::B4, value).unwrap();
        requests.take()
    };
    assert_eq!(write(0x5555), [SysconRequest::PowerOff]);
    assert_eq!(write(0x7777), [SysconRequest::Reset]);
    assert_eq!(write(0x3333), [SysconRequest::Fail(0)]);
    assert_eq!(write(0x2a_3333), [SysconRequest::Fail(42)]);
    assert_eq!(write(0xffff_3333), [SysconRequest::Fail(0xffff)]);
    for none in [0, 1, 0x5554, 0xffff_ffff, 0x5555_0000] {
        assert_eq!(write(none), [], "{none:#x}");
    }
    bus.write(0, AccessSize::B2, 0x5555).unwrap();
    assert_eq!(requests.take(), [SysconRequest::PowerOff]);
    bus.write(0, AccessSize::B2, 0x3333).unwrap();
    assert_eq!(requests.take(), [SysconRequest::Fail(0)]);
}

#[test]
fn widths_and_holes() {
    let (_, requests, bus) = finisher();
    for size in [AccessSize::B1, AccessSize::B8] {
        assert!(bus.write(0, size, 0x5555).is_err() && bus.read(0, size).is_err());
    }
    for at in [4, 0x10, SIZE - 4] {
        bus.write(at, AccessSize::B4, 0x5555).unwrap();
        assert_eq!(bus.read(at, AccessSize::B4), Ok(0));
    }
    bus.write(2, AccessSize::B2, 0x5555).unwrap();
    assert_eq!((bus.read(0, AccessSize::B4), requests.take()), (Ok(0), vec![]));
}

#[test]
fn nothing_to_save_or_reset() {
    let (device, requests, _) = finisher();
    let (other, ..) = finisher();
    assert_round_trip(&device, &other);
    reset(&*device);
    assert_eq!(requests.take(), []);
    restore_damaged(&device, |_| {});
}

#[test]
fn random_accesses() {
    let (_, requests, bus) = finisher();
    let mut rng = Rng(11);
    let mut seen = 0;
    for _ in 0..100_000 {
        let value = [0x5555, 0x7777, 0x3333, 0][rng.below(4) as usize] | rng.next() << 16;
        let (at, size) = (if rng.below(2) == 0 { 0 } else { rng.below(SIZE) }, any_size(rng.next()));
        let _ = bus.read(at, size);
        let _ = bus.write(at, size, value);
        seen += requests.take().len();
    }
    assert!(seen > 1000);
}
