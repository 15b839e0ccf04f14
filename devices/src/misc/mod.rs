//! Small platform devices.

pub mod fw_cfg;
pub mod syscon;
