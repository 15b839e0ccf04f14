//! One model of device: its name, its options, how to build it.

use super::context::{BuildError, DeviceContext};
use super::device::Device;
use super::keyvalue::{Options, property_names};
use serde::de::DeserializeOwned;
use std::sync::Arc;

/// A model of device. One impl per model.
pub trait DeviceModel {
    /// `ns16550a`, `virtio-blk-device`: the name in `-device`, the monitor, schemas, logs.
    const NAME: &'static str;
    /// One line for `-device help`.
    const SUMMARY: &'static str;
    /// Its options: a struct with `#[serde(rename_all = "kebab-case", default)]`.
    type Config: DeserializeOwned + Default;

    /// Builds one.
    fn build(config: Self::Config, ctx: &mut DeviceContext<'_>) -> Result<Arc<dyn Device>, BuildError>;
}

/// Builds a device from its options.
pub type BuildFn = fn(&Options, &mut DeviceContext<'_>) -> Result<Arc<dyn Device>, BuildError>;

/// A row of a registry: a [`DeviceModel`] as a value.
#[derive(Clone, Copy)]
pub struct ModelEntry {
    /// [`DeviceModel::NAME`].
    pub name: &'static str,
    /// [`DeviceModel::SUMMARY`].
    pub summary: &'static str,
    /// Builds one from options.
    pub build: BuildFn,
    /// The names of its options.
    pub properties: fn() -> &'static [&'static str],
}

impl ModelEntry {
    /// The row of a model, for `pub const MODELS: &[ModelEntry] = &[ModelEntry::of::<X>()]`.
    pub const fn of<M: DeviceModel>() -> Self {
        Self { name: M::NAME, summary: M::SUMMARY, build: build_model::<M>, properties: property_names::<M::Config> }
    }
}

fn build_model<M: DeviceModel>(options: &Options, ctx: &mut DeviceContext<'_>) -> Result<Arc<dyn Device>, BuildError> {
    let config = options.to_config::<M::Config>(M::NAME)?;
    M::build(config, ctx)
}

impl std::fmt::Debug for ModelEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ModelEntry({})", self.name)
    }
}
