//! All of a machine as saved state.

use std::collections::BTreeMap;
use std::io::{Read, Seek, Write};

use mimus_core::accel::VcpuIndex;
use mimus_core::arch::{CpuState, StateGroups};
use mimus_core::snapshot::{
    Payload, SaveSupport, Schema, SnapshotContents, SnapshotError, StateTree, read_snapshot, write_snapshot,
};
use serde::{Deserialize, Serialize};

use super::machine::Machine;

const VCPU: Schema = Schema::new("vcpu", 1);
const CLOCK: Schema = Schema::new("virtual-clock", 1);
const CLOCK_PATH: &str = "/machine/clock";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedVcpu {
    on: bool,
    state: CpuState,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedClock {
    ns: u64,
}

fn vcpu_path(vcpu: VcpuIndex) -> String {
    format!("/machine/cpu.{vcpu}")
}

impl Machine {
    /// What must be the same for a snapshot to be restored.
    fn identity(&self) -> BTreeMap<String, String> {
        let ram: u64 = self.services().ram.blocks().iter().map(|b| b.len()).sum();
        [
            ("producer", format!("mimus {}", env!("CARGO_PKG_VERSION"))),
            ("machine", self.parts.name.to_owned()),
            ("vcpus", self.threads().count().to_string()),
            ("ram", ram.to_string()),
        ]
        .map(|(k, v)| (k.to_owned(), v))
        .into()
    }

    /// Pauses the machine and takes the states of all devices and vCPUs. RAM is apart.
    pub fn save_tree(&mut self) -> Result<StateTree, SnapshotError> {
        self.pause();
        let mut tree = StateTree::new();
        let ns = self.services().clocks.virt.now();
        tree.insert(CLOCK_PATH, Payload::encode(CLOCK, &SavedClock { ns })?)?;
        for vcpu in (0..self.threads().count() as u32).map(VcpuIndex) {
            let lost = |e: mimus_core::vcpu::WorkError| unsupported(&vcpu_path(vcpu), &e.to_string());
            let state = self.vcpu_state(vcpu, StateGroups::All).map_err(lost)?;
            let on = self.threads().is_on(vcpu);
            tree.insert(&vcpu_path(vcpu), Payload::encode(VCPU, &SavedVcpu { on, state })?)?;
        }
        for (path, device) in self.devices() {
            if let SaveSupport::None(reason) = device.support() {
                return Err(unsupported(path, reason));
            }
            tree.insert(path, device.save().map_err(|e| e.at(path))?)?;
        }
        Ok(tree)
    }

    /// Pauses the machine and takes over states. RAM must be that of the same moment. The
    /// machine stays paused; after an error its state is undefined and it must be reset.
    pub fn restore_tree(&mut self, mut tree: StateTree) -> Result<(), SnapshotError> {
        self.pause();
        self.parts.vm.flush_all();
        self.parts.io.reset_timers(&self.parts.services.vcpus);
        let clock: SavedClock = decode(CLOCK, &tree.take(CLOCK_PATH)?)?;
        self.services().clocks.virt.set(clock.ns);
        for vcpu in (0..self.threads().count() as u32).map(VcpuIndex) {
            let path = vcpu_path(vcpu);
            let saved: SavedVcpu = decode(VCPU, &tree.take(&path)?).map_err(|e| e.at(&path))?;
            self.threads().power_off(vcpu);
            let set = self.on_vcpu(vcpu, move |v| v.set_state(&saved.state));
            let invalid = |reason: String| SnapshotError::invalid(VCPU, "state", reason).at(&path);
            set.map_err(|e| invalid(e.to_string()))?.map_err(|e| invalid(e.0))?;
            if saved.on {
                self.threads().power_on(vcpu, None);
            }
        }
        for (path, device) in &self.parts.devices {
            device.restore(&tree.take(path)?).map_err(|e| e.at(path))?;
        }
        self.parts.services.map.apply_pending();
        tree.expect_empty()
    }

    /// Pauses the machine and writes all of it, RAM too.
    pub fn save<W: Write + Seek>(&mut self, out: &mut W) -> Result<(), SnapshotError> {
        let contents = SnapshotContents { meta: self.identity(), tree: self.save_tree()? };
        write_snapshot(out, &contents, &self.services().ram)
    }

    /// Pauses the machine and takes over what [`Machine::save`] wrote on one like it.
    pub fn restore<R: Read>(&mut self, input: &mut R) -> Result<(), SnapshotError> {
        self.pause();
        let own = self.identity();
        let contents = read_snapshot(input, &self.services().ram, |meta| {
            for key in ["machine", "vcpus", "ram"] {
                let (found, want) = (meta.get(key), own.get(key));
                if found != want {
                    let (found, want) = (found.map_or("none", |v| v), want.map_or("none", |v| v));
                    return Err(SnapshotError::NotASnapshot(format!(
                        "the snapshot is of another machine: {key} is {found} there and {want} here"
                    )));
                }
            }
            Ok(())
        })?;
        self.restore_tree(contents.tree)
    }
}

fn unsupported(path: &str, reason: &str) -> SnapshotError {
    SnapshotError::Unsupported { path: path.to_owned(), reason: reason.to_owned() }
}

fn decode<T: serde::de::DeserializeOwned>(schema: Schema, payload: &Payload) -> Result<T, SnapshotError> {
    if payload.schema != schema.name {
        return Err(SnapshotError::WrongSchema { found: payload.schema.clone(), expected: schema.name });
    }
    if payload.version != schema.version {
        let (found, expected) = (payload.version, schema.version);
        return Err(SnapshotError::WrongVersion { schema: schema.name, found, expected });
    }
    payload.decode()
}
