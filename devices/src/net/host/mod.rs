//! Host back ends of network devices: where a guest's Ethernet frames go.

pub mod user;
