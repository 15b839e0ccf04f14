//! The host side of devices, as traits. Implementations live with the device classes.

pub mod block;
pub mod char;
pub mod input;
pub mod net;

pub use block::{BlockBackend, BlockBuffer, BlockCompletion, BlockError, BlockOp, BlockRequest};
pub use char::{CharBackend, CharEvent};
pub use input::{InputEvent, InputSink, Key, MouseButton};
pub use net::{MacAddress, NetBackend};
