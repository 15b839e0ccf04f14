//! What the debugger's views are made of: devices' states, PCI functions, remembered translations.

use std::fmt;
use std::sync::Arc;

use mimus_core::bus::AccessSize;
use mimus_core::device::Device;
use mimus_core::snapshot::{Payload, SaveSupport};
use mimus_debug::devices::DeviceState;
use mimus_debug::pci::PciFunction;
use mimus_devices::pci::PciBus;
use mimus_machines::machine::Machine;
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
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
    match payload.decode::<Fields>() {
        Ok(Fields(fields)) => {
            DeviceState { path: path.to_owned(), schema: payload.schema, fields: Ok(nested(fields, 0)) }
        }
        Err(e) => empty(&payload.schema, e.to_string()),
    }
}

/// A saved state's fields. Keys of its maps may be numbers, which JSON's are not.
struct Fields(Value);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Fields, D::Error> {
        deserializer.deserialize_any(AnyField).map(Fields)
    }
}

struct AnyField;

impl<'de> Visitor<'de> for AnyField {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field of a saved state")
    }
    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(v.into())
    }
    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(v.into())
    }
    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(v.into())
    }
    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(v.into())
    }
    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(v.into())
    }
    fn visit_bytes<E>(self, v: &[u8]) -> Result<Value, E> {
        Ok(v.into())
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(AnyField)
    }
    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(AnyField)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut all = Vec::new();
        while let Some(Fields(value)) = seq.next_element()? {
            all.push(value);
        }
        Ok(Value::Array(all))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut all = serde_json::Map::new();
        while let Some((Fields(key), Fields(value))) = map.next_entry()? {
            let key = key.as_str().map_or_else(|| key.to_string(), str::to_owned);
            all.insert(key, value);
        }
        Ok(Value::Object(all))
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
        if let Some(Fields(inner)) = payload.and_then(|p| p.decode::<Fields>().ok()) {
            fields.insert("body".to_owned(), inner);
        }
    }
    if depth == DEEPEST {
        return Value::Object(fields);
    }
    Value::Object(fields.into_iter().map(|(name, v)| (name, nested(v, depth + 1))).collect())
}
