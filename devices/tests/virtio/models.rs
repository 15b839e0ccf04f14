//! The models, from options to devices.

use super::machine::Machine;
use mimus_core::clock::Clocks;
use mimus_core::device::{Backends, Device, DeviceContext, Options, Registry, Services};
use mimus_core::io_thread::IoThread;
use mimus_core::memory::GuestRam;
use mimus_devices::block::host::NullBlock;
use mimus_devices::virtio::console::VirtioConsole;
use mimus_devices::virtio::models::MODELS;
use mimus_devices::virtio::virtio_device_of;
use std::sync::Arc;

const REGISTRY: Registry = Registry::new(&[MODELS]);

struct Silent;
impl mimus_core::backend::CharBackend for Silent {
    fn write(&self, data: &[u8]) -> usize {
        data.len()
    }
    fn set_receiver(&self, _: mimus_core::backend::char::CharReceiver) {}
    fn input_ready(&self) {}
}

struct Nowhere;
impl mimus_core::backend::NetBackend for Nowhere {
    fn send(&self, _: &[u8]) {}
    fn set_receiver(&self, _: mimus_core::backend::net::NetReceiver) {}
    fn receive_ready(&self) {}
}

fn services(m: &Machine) -> (Services, IoThread) {
    let clocks = Clocks::new();
    let io = IoThread::spawn("io-test", &clocks).unwrap();
    let backends = Backends::new();
    for i in 0..2 {
        backends.add_block(&format!("d{i}"), Arc::new(NullBlock::new(1 << 20, true)));
        backends.add_net(&format!("n{i}"), Arc::new(Nowhere));
        backends.add_char(&format!("c{i}"), Arc::new(Silent));
    }
    let services = Services {
        map: m.map.clone(),
        memory: m.space.clone(),
        ram: GuestRam::new(),
        clocks,
        io_thread: io.handle().clone(),
        backends,
        vcpus: Vec::new(),
        doorbells: false,
    };
    (services, io)
}

/// Builds `text` with everything a board can attach; the error as text.
fn build(m: &Machine, s: &Services, text: &str) -> Result<Arc<dyn Device>, String> {
    let (name, options) = Options::parse_with_first(text, "driver").unwrap();
    let entry = REGISTRY.find(&name.unwrap()).unwrap();
    let mut ctx = DeviceContext::new(s, format!("/machine/{text}")).with_attachment(m.gpex.bus().clone());
    (entry.build)(&options, &mut ctx).map_err(|e| e.to_string())
}

#[test]
fn every_model_builds_resets_and_saves() {
    let m = Machine::new();
    let (s, _io) = services(&m);
    let texts = [
        "virtio-blk-device,drive=d0,serial=x,num-queues=2",
        "virtio-blk-pci,drive=d1,addr=7.1,disable-legacy=on",
        "virtio-net-device,netdev=n0,mac=52:54:00:00:00:01",
        "virtio-net-pci,netdev=n1,romfile=,vectors=0",
        "virtio-rng-device",
        "virtio-rng-pci",
        "virtio-serial-device,chardev=c0",
        "virtio-serial-pci",
        "virtio-balloon-device,deflate-on-oom=on",
        "virtio-balloon-pci,free-page-reporting=on",
    ];
    for text in texts {
        let device = build(&m, &s, text).unwrap();
        super::driver::reset(&*device);
        let saved = device.save().unwrap();
        device.restore(&saved).unwrap();
        assert_eq!(device.save().unwrap(), saved, "{text}");
        if let Some(console) = virtio_device_of::<VirtioConsole>(&*device).filter(|_| text.ends_with("pci")) {
            let mut ctx = DeviceContext::new(&s, "/machine/port").with_attachment(console);
            let options = Options::parse("chardev=c1").unwrap();
            (REGISTRY.find("virtconsole").unwrap().build)(&options, &mut ctx).unwrap();
        }
    }
    let listed: Vec<String> = m.gpex.bus().list().iter().map(|d| d.to_string()).collect();
    assert_eq!(listed, ["00.0", "01.0", "02.0", "03.0", "04.0", "07.1"]);
}

#[test]
fn mistakes_are_named() {
    let m = Machine::new();
    let (s, _io) = services(&m);
    let says = |text: &str, want: &str| {
        let error = build(&m, &s, text).err().unwrap();
        assert!(error.contains(want) && !error.contains('\n'), "{text}: {error}");
    };
    says("virtio-blk-device", "drive=ID is missing");
    says("virtio-blk-device,drive=d9", "no block backend");
    says("virtio-blk-device,drive=d0,queue-size=100", "power of two");
    says("virtio-blk-device,drvie=d0", "did you mean \"drive\"");
    says("virtio-blk-pci,drive=d0,addr=40", "not a PCI address");
    says("virtio-rng-pci,addr=0", "is taken");
    says("virtio-rng-pci,disable-modern=on", "no legacy interface");
    says("virtio-net-device,netdev=n0,mac=01:00:00:00:00:00", "group address");
    says("virtio-net-pci,netdev=n1,romfile=x.rom", "no option ROMs");
    says("virtconsole,chardev=c0", "add -device virtio-serial-device");
    let mut ctx = DeviceContext::new(&s, "/machine/x");
    let built = (REGISTRY.find("virtio-rng-pci").unwrap().build)(&Options::new(), &mut ctx);
    assert!(built.err().unwrap().to_string().contains("no PCI bus"));
}
