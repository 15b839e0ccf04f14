//! What the debugger's views are made of: devices' states, PCI functions, remembered translations.

use std::sync::Arc;

use mimus_core::bus::AccessSize;
use mimus_core::device::Device;
use mimus_core::snapshot::{Payload, SaveSupport};
use mimus_debug::devices::DeviceState;
use mimus_debug::pci::PciFunction;
use mimus_devices::pci::PciBus;
use mimus_machines::machine::Machine;
use serde_json::Value;

/// Deepest nesting of states in states.
const DEEPEST: u32 = 4;

/// What of a machine is looked at; it lives on while it is.
pub struct Views {
    devices: Vec<(String, Arc<dyn Device>)>,
    pci: Vec<Arc<PciBus>>,
}

impl Views {
    /// Of `machine`.
    pub fn new(machine: &Machine) -> Views {
        let devices = machine.devices().map(|(path, device)| (path.to_owned(), device.clone())).collect();
        Views { devices, pci: machine.pci_buses().to_vec() }
    }

    /// The devices' states; the machine stands.
    pub fn devices(&self) -> Vec<DeviceState> {
        self.devices.iter().map(|(path, device)| state(path, &**device)).collect()
    }

    /// The PCI functions, by bus and address.
    pub fn pci(&self) -> Vec<PciFunction> {
        let of = |bus: &Arc<PciBus>| {
            let function = |devfn: mimus_devices::pci::DevFn| PciFunction {
                bus: bus.name().to_owned(),
                devfn: devfn.0,
                // Reads of configuration space change nothing.
                registers: (0..256).map(|at| bus.config_read(devfn, at, AccessSize::B1) as u8).collect(),
                bars: bus.bar_lens(devfn),
            };
            bus.list().into_iter().map(function).collect::<Vec<_>>()
        };
        self.pci.iter().flat_map(of).collect()
    }
}

fn state(path: &str, device: &dyn Device) -> DeviceState {
    let empty =
        |schema: &str, why: String| DeviceState { path: path.to_owned(), schema: schema.to_owned(), fields: Err(why) };
    if let SaveSupport::None(why) = device.support() {
        return empty("", why.to_owned());
    }
    let payload = match device.save() {
        Ok(payload) => payload,
        Err(e) => return empty("", e.to_string()),
    };
    match payload.decode::<Value>() {
        Ok(fields) => DeviceState { path: path.to_owned(), schema: payload.schema, fields: Ok(nested(fields, 0)) },
        Err(e) => empty(&payload.schema, e.to_string()),
    }
}

/// A state with the states in it decoded: those have a schema, a version and a body of bytes.
fn nested(value: Value, depth: u32) -> Value {
    let Value::Object(mut fields) = value else { return value };
    let version = fields.get("version").and_then(Value::as_u64);
    if let (Some(Value::String(schema)), Some(version), Some(Value::Array(body))) =
        (fields.get("schema"), version, fields.get("body"))
    {
        let body = body.iter().map(|b| b.as_u64().and_then(|b| u8::try_from(b).ok())).collect::<Option<Vec<u8>>>();
        let payload = body.map(|body| Payload { schema: schema.clone(), version: version as u32, body });
        if let Some(inner) = payload.and_then(|p| p.decode::<Value>().ok()) {
            fields.insert("body".to_owned(), inner);
        }
    }
    if depth == DEEPEST {
        return Value::Object(fields);
    }
    Value::Object(fields.into_iter().map(|(name, v)| (name, nested(v, depth + 1))).collect())
}
