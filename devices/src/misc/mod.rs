//! Small platform devices.

pub mod debugcon;
pub mod fw_cfg;
pub mod i8257;
pub mod isa_debug_exit;
pub mod port92;
pub mod post;
pub mod pvpanic;
pub mod syscon;
