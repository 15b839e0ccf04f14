//! Drives on the board's SATA controller as models: names and options for `-device`.
//!
//! The board attaches an `Arc<Ahci>`, and turns `bus=ide.N` into `port=N`. A drive's state is the controller's.

use std::sync::Arc;

use mimus_core::device::{BuildError, Device, DeviceContext, DeviceModel, Lifecycle, ModelEntry};
use mimus_core::snapshot::{Payload, Schema, Snapshot, SnapshotError, Stateless};
use serde::Deserialize;

use super::ahci::Ahci;
use super::ata::{Drive, Medium, SERIAL_LEN};
use crate::virtio::device::decode_payload;

/// All of them.
pub const MODELS: &[ModelEntry] = &[ModelEntry::of::<IdeDisk>(), ModelEntry::of::<IdeCdrom>()];

const SCHEMA: Schema = Schema::new("sata-drive", 1);

/// Options of `ide-hd` and `ide-cd`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct DriveConfig {
    /// The disk image's id.
    pub drive: Option<String>,
    /// The controller's port: what `bus=ide.N` says; the first free one by default.
    pub port: Option<usize>,
    /// What the guest reads as its serial number.
    pub serial: Option<String>,
    /// Only 0: each port has one drive.
    pub unit: u32,
}

/// `ide-hd`.
pub struct IdeDisk;
/// `ide-cd`.
pub struct IdeCdrom;

impl DeviceModel for IdeDisk {
    const NAME: &'static str = "ide-hd";
    const SUMMARY: &'static str = "hard disk on the board's SATA controller";
    type Config = DriveConfig;
    fn build(c: DriveConfig, ctx: &mut DeviceContext<'_>) -> Result<Arc<dyn Device>, BuildError> {
        build(c, Medium::Disk, ctx)
    }
}

impl DeviceModel for IdeCdrom {
    const NAME: &'static str = "ide-cd";
    const SUMMARY: &'static str = "CD-ROM drive on the board's SATA controller";
    type Config = DriveConfig;
    fn build(c: DriveConfig, ctx: &mut DeviceContext<'_>) -> Result<Arc<dyn Device>, BuildError> {
        build(c, Medium::Cdrom, ctx)
    }
}

fn build(c: DriveConfig, medium: Medium, ctx: &mut DeviceContext<'_>) -> Result<Arc<dyn Device>, BuildError> {
    let no_bus = |_| ctx.invalid("this board has no IDE or SATA controller: use if=virtio, or -machine q35");
    let controller = ctx.attachment::<Arc<Ahci>>().map_err(no_bus)?.clone();
    let id = c.drive.ok_or_else(|| ctx.invalid("drive=ID is missing: -drive file=disk.img,if=none,id=ID makes one"))?;
    let serial = c.serial.unwrap_or_default();
    if serial.len() > SERIAL_LEN {
        return Err(ctx.invalid(format!("serial={serial:?} is longer than {SERIAL_LEN} bytes")));
    }
    if c.unit != 0 {
        return Err(ctx.invalid(format!("unit={}: each port has one drive, unit 0", c.unit)));
    }
    let drive = Drive::new(ctx.block_backend(&id)?, medium, &serial);
    controller.attach(c.port, drive).map_err(|why| ctx.invalid(why))?;
    Ok(Arc::new(SataDrive))
}

/// A drive in its place.
struct SataDrive;

impl Lifecycle for SataDrive {}

impl Snapshot for SataDrive {
    fn schema(&self) -> Schema {
        SCHEMA
    }
    fn save(&self) -> Result<Payload, SnapshotError> {
        Payload::encode(SCHEMA, &Stateless {})
    }
    fn restore(&self, payload: &Payload) -> Result<(), SnapshotError> {
        decode_payload::<Stateless>(SCHEMA, payload).map(|_| ())
    }
}
