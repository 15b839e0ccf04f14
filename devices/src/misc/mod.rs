//! Small platform devices.

pub mod syscon;
