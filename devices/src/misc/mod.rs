//! Small platform devices.

pub mod fw_cfg;
pub mod i8257;
pub mod port92;
pub mod syscon;
