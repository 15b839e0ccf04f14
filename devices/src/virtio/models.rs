//! The virtio devices as models: names and options for `-device`.
//!
//! `…-device` is the device behind virtio-mmio registers: the board gives it the
//! interrupt `irq` and maps its region `regs`. `…-pci` is the device as a PCI function:
//! the board attaches an `Arc<PciBus>`.

use super::balloon::{VirtioBalloon, VirtioBalloonOptions};
use super::block::{SERIAL_LEN, VirtioBlock, VirtioBlockOptions};
use super::console::VirtioConsole;
use super::device::VirtioDevice;
use super::net::{VirtioNet, VirtioNetOptions};
use super::queue::MAX_QUEUE_SIZE;
use super::rng::VirtioRng;
use super::transport::mmio::{ACCESS_RULES, REGION_LEN, VirtioMmio};
use super::transport::pci::{VirtioPci, VirtioPciOptions};
use crate::pci::{DevFn, PciBus};
use mimus_core::backend::MacAddress;
use mimus_core::device::{BuildError, Device, DeviceContext, DeviceModel, Lifecycle, ModelEntry};
use mimus_core::snapshot::{Payload, Schema, Snapshot, SnapshotError, Stateless};
use serde::Deserialize;
use std::sync::Arc;

/// All of them.
pub const MODELS: &[ModelEntry] = &[
    ModelEntry::of::<BlockMmio>(),
    ModelEntry::of::<BlockPci>(),
    ModelEntry::of::<NetMmio>(),
    ModelEntry::of::<NetPci>(),
    ModelEntry::of::<RngMmio>(),
    ModelEntry::of::<RngPci>(),
    ModelEntry::of::<SerialMmio>(),
    ModelEntry::of::<SerialPci>(),
    ModelEntry::of::<VirtConsoleModel>(),
    ModelEntry::of::<BalloonMmio>(),
    ModelEntry::of::<BalloonPci>(),
];

type Built = Result<Arc<dyn VirtioDevice>, BuildError>;

/// Puts a device behind virtio-mmio registers.
fn on_mmio(device: Arc<dyn VirtioDevice>, ctx: &mut DeviceContext<'_>) -> Result<Arc<dyn Device>, BuildError> {
    let region = ctx.mmio_region("regs", REGION_LEN, ACCESS_RULES);
    let this = VirtioMmio::new(device, ctx.dma(), ctx.irq_line("irq"));
    ctx.bind(&region, 0, &this);
    this.add_doorbells(ctx, region.region())?;
    Ok(this)
}

/// What every `…-pci` model takes besides the device's own options.
struct PciProperties {
    addr: Option<String>,
    vectors: Option<u16>,
    disable_modern: bool,
    romfile: Option<String>,
}

/// Puts a device on the PCI bus the board attached.
fn on_pci(
    device: Arc<dyn VirtioDevice>,
    p: PciProperties,
    ctx: &mut DeviceContext<'_>,
) -> Result<Arc<dyn Device>, BuildError> {
    if p.disable_modern {
        return Err(ctx.invalid("disable-modern=on leaves nothing: there is no legacy interface"));
    }
    if p.romfile.is_some_and(|f| !f.is_empty()) {
        return Err(ctx.invalid("romfile: there are no option ROMs; leave it empty"));
    }
    let no_bus = |_| ctx.invalid("this machine has no PCI bus; use the model that ends in -device instead of -pci");
    let bus = ctx.attachment::<Arc<PciBus>>().map_err(no_bus)?.clone();
    let parse = |a: String| a.parse::<DevFn>();
    let slot = p.addr.map(parse).transpose().and_then(|a| bus.reserve(a));
    let slot = slot.map_err(|e| ctx.invalid(e.to_string()))?;
    let this = VirtioPci::plug(device, slot, VirtioPciOptions { vectors: p.vectors });
    this.add_doorbells(ctx)?;
    Ok(this)
}

/// The two models of a device type: one set of options, two transports.
macro_rules! models {
    ($build:ident: $summary:literal,
     $mmio:ident = $mmio_name:literal: $mmio_config:ident,
     $pci:ident = $pci_name:literal: $pci_config:ident,
     { $($(#[$meta:meta])* $field:ident: $type:ty,)* }) => {
        #[doc = concat!("Options of `", $mmio_name, "`.")]
        #[derive(Clone, Debug, Default, Deserialize)]
        #[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
        pub struct $mmio_config {
            $($(#[$meta])* pub $field: $type,)*
        }

        #[doc = concat!("Options of `", $pci_name, "`.")]
        #[derive(Clone, Debug, Default, Deserialize)]
        #[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
        pub struct $pci_config {
            $($(#[$meta])* pub $field: $type,)*
            /// Address on the bus, `DEVICE` or `DEVICE.FUNCTION`; the first free by default.
            pub addr: Option<String>,
            /// MSI-X vectors, 0 for none; one per queue and one more by default.
            pub vectors: Option<u16>,
            /// Accepted: there is no legacy interface.
            pub disable_legacy: Option<String>,
            /// Only off.
            pub disable_modern: bool,
            /// Accepted: devices with several functions say so by themselves.
            pub multifunction: bool,
            /// Only empty.
            pub romfile: Option<String>,
        }

        #[doc = concat!("`", $mmio_name, "`.")]
        pub struct $mmio;
        impl DeviceModel for $mmio {
            const NAME: &'static str = $mmio_name;
            const SUMMARY: &'static str = concat!($summary, ", memory-mapped");
            type Config = $mmio_config;
            fn build(c: $mmio_config, ctx: &mut DeviceContext<'_>) -> Result<Arc<dyn Device>, BuildError> {
                on_mmio($build(c, ctx)?, ctx)
            }
        }

        #[doc = concat!("`", $pci_name, "`.")]
        pub struct $pci;
        impl DeviceModel for $pci {
            const NAME: &'static str = $pci_name;
            const SUMMARY: &'static str = concat!($summary, ", PCI");
            type Config = $pci_config;
            fn build(c: $pci_config, ctx: &mut DeviceContext<'_>) -> Result<Arc<dyn Device>, BuildError> {
                let own = $mmio_config { $($field: c.$field,)* };
                let (addr, vectors, disable_modern, romfile) = (c.addr, c.vectors, c.disable_modern, c.romfile);
                on_pci($build(own, ctx)?, PciProperties { addr, vectors, disable_modern, romfile }, ctx)
            }
        }
    };
}

models! {
    build_block: "virtio disk",
    BlockMmio = "virtio-blk-device": BlockConfig,
    BlockPci = "virtio-blk-pci": BlockPciConfig,
    {
        /// The drive it shows.
        drive: Option<String>,
        /// Serial number, at most 20 bytes.
        serial: Option<String>,
        /// Number of queues; 1 by default.
        num_queues: Option<u16>,
        /// Entries per queue, a power of two; 256 by default.
        queue_size: Option<u16>,
        /// Discard and write-zeroes; on by default.
        discard: Option<bool>,
    }
}

models! {
    build_net: "virtio network card",
    NetMmio = "virtio-net-device": NetConfig,
    NetPci = "virtio-net-pci": NetPciConfig,
    {
        /// The network it is on.
        netdev: Option<String>,
        /// Its Ethernet address; by default one of 52:54:00:12:34:56 and on.
        mac: Option<MacAddress>,
        /// Largest packet to tell the guest, in bytes.
        #[serde(rename = "host_mtu")]
        host_mtu: Option<u16>,
        /// Checksum and segmentation offload; on by default.
        offload: Option<bool>,
        /// Entries of the receive queue, a power of two; 256 by default.
        #[serde(rename = "rx_queue_size")]
        rx_queue_size: Option<u16>,
        /// Entries of the transmit queue, a power of two; 256 by default.
        #[serde(rename = "tx_queue_size")]
        tx_queue_size: Option<u16>,
    }
}

models! {
    build_rng: "virtio entropy source",
    RngMmio = "virtio-rng-device": RngConfig,
    RngPci = "virtio-rng-pci": RngPciConfig,
    {
        /// Where the bytes come from; `/dev/urandom` by default.
        filename: Option<String>,
    }
}

models! {
    build_serial: "virtio console with one port",
    SerialMmio = "virtio-serial-device": SerialConfig,
    SerialPci = "virtio-serial-pci": SerialPciConfig,
    {
        /// The port's host side; without it, plug a `virtconsole`.
        chardev: Option<String>,
        /// Only 1.
        #[serde(rename = "max_ports")]
        max_ports: Option<u16>,
    }
}

models! {
    build_balloon: "virtio memory balloon",
    BalloonMmio = "virtio-balloon-device": BalloonConfig,
    BalloonPci = "virtio-balloon-pci": BalloonPciConfig,
    {
        /// The guest may take pages back when it runs out of memory.
        deflate_on_oom: bool,
        /// The guest reports free pages, which go back to the host until they are used.
        free_page_reporting: bool,
    }
}

fn queue_size(ctx: &DeviceContext<'_>, name: &str, value: Option<u16>) -> Result<u16, BuildError> {
    let size = value.unwrap_or(256);
    let possible = size.is_power_of_two() && (2..=MAX_QUEUE_SIZE).contains(&size);
    possible
        .then_some(size)
        .ok_or_else(|| ctx.invalid(format!("{name}={size} is not a power of two from 2 to {MAX_QUEUE_SIZE}")))
}

fn build_block(c: BlockConfig, ctx: &mut DeviceContext<'_>) -> Built {
    let id = c.drive.ok_or_else(|| ctx.invalid("drive=ID is missing: -drive file=disk.img,if=none,id=ID makes one"))?;
    let serial = c.serial.unwrap_or_default();
    if serial.len() > SERIAL_LEN {
        return Err(ctx.invalid(format!("serial={serial:?} is longer than {SERIAL_LEN} bytes")));
    }
    let queues = c.num_queues.unwrap_or(1);
    if !(1..=64).contains(&queues) {
        return Err(ctx.invalid(format!("num-queues={queues} is not from 1 to 64")));
    }
    let queue_size = queue_size(ctx, "queue-size", c.queue_size)?;
    let options = VirtioBlockOptions { serial, queues, queue_size, discard: c.discard.unwrap_or(true) };
    Ok(VirtioBlock::new(ctx.block_backend(&id)?, options))
}

fn build_net(c: NetConfig, ctx: &mut DeviceContext<'_>) -> Built {
    let id = c.netdev.ok_or_else(|| ctx.invalid("netdev=ID is missing: -netdev user,id=ID makes one"))?;
    let networks = ctx.services().backends.list_net();
    let number = networks.iter().position(|n| n.0 == id).unwrap_or(0);
    let mac = c.mac.unwrap_or_else(|| MacAddress::nth(number as u8));
    if mac.is_multicast() {
        return Err(ctx.invalid(format!("mac={mac} is a group address: its first byte must be even")));
    }
    let options = VirtioNetOptions {
        mac,
        mtu: c.host_mtu,
        offload: c.offload.unwrap_or(true),
        rx_queue_size: queue_size(ctx, "rx_queue_size", c.rx_queue_size)?,
        tx_queue_size: queue_size(ctx, "tx_queue_size", c.tx_queue_size)?,
    };
    Ok(VirtioNet::new(ctx.net_backend(&id)?, options))
}

fn build_rng(c: RngConfig, _ctx: &mut DeviceContext<'_>) -> Built {
    Ok(VirtioRng::new(c.filename.as_deref())?)
}

fn build_serial(c: SerialConfig, ctx: &mut DeviceContext<'_>) -> Built {
    if c.max_ports.is_some_and(|n| n != 1) {
        return Err(ctx.invalid("max_ports: this console has one port"));
    }
    let console = VirtioConsole::new();
    if let Some(id) = c.chardev {
        console.connect(ctx.char_backend(&id)?);
    }
    Ok(console)
}

fn build_balloon(c: BalloonConfig, _ctx: &mut DeviceContext<'_>) -> Built {
    let (deflate_on_oom, free_page_reporting) = (c.deflate_on_oom, c.free_page_reporting);
    Ok(VirtioBalloon::new(VirtioBalloonOptions { deflate_on_oom, free_page_reporting }))
}

/// Options of `virtconsole`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct VirtConsoleConfig {
    /// The host side.
    pub chardev: Option<String>,
    /// Accepted: a name for multi-port drivers.
    pub name: Option<String>,
}

/// `virtconsole`: what is plugged into the port of a `virtio-serial-…`, which the board
/// attaches as `Arc<VirtioConsole>` (see [`super::virtio_device_of`]).
pub struct VirtConsoleModel;

impl DeviceModel for VirtConsoleModel {
    const NAME: &'static str = "virtconsole";
    const SUMMARY: &'static str = "console on the port of a virtio-serial device";
    type Config = VirtConsoleConfig;
    fn build(c: VirtConsoleConfig, ctx: &mut DeviceContext<'_>) -> Result<Arc<dyn Device>, BuildError> {
        let no_bus = |_| ctx.invalid("there is no virtio-serial device before it: add -device virtio-serial-device");
        let console = ctx.attachment::<Arc<VirtioConsole>>().map_err(no_bus)?.clone();
        let id = c.chardev.ok_or_else(|| ctx.invalid("chardev=ID is missing: -chardev stdio,id=ID makes one"))?;
        if !console.connect(ctx.char_backend(&id)?) {
            return Err(ctx.invalid("the virtio-serial device has one port, which is in use"));
        }
        Ok(Arc::new(VirtConsole))
    }
}

/// A plugged port: all state is the virtio-serial device's.
struct VirtConsole;

const PORT_SCHEMA: Schema = Schema::new("virtconsole", 1);

impl Lifecycle for VirtConsole {}

impl Snapshot for VirtConsole {
    fn schema(&self) -> Schema {
        PORT_SCHEMA
    }
    fn save(&self) -> Result<Payload, SnapshotError> {
        Payload::encode(PORT_SCHEMA, &Stateless {})
    }
    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError> {
        super::device::decode_payload::<Stateless>(PORT_SCHEMA, payload).map(|_| ())
    }
}
