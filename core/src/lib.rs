//! Mechanism and vocabulary shared by accelerators, devices and boards. Knows no chip,
//! no instruction set and no accelerator.
//!
//! * [`memory`] - guest RAM, the region tree, flat views, DMA.
//! * [`bus`] - accesses: sizes, attributes, results; dispatch to devices; x86 ports.
//! * [`irq`] - interrupt lines, MSIs, the controller trait.
//! * [`clock`] - virtual, host and realtime clocks; timers.
//! * [`accel`] - what an accelerator is: VMs, vCPUs, and what they ask of the machine.
//! * [`vcpu`] - the one run loop: threads, pausing, work on a vCPU's thread.
//! * [`device`] - what a device is, how one is described, configured and built.
//! * [`io_thread`] - the event loop host I/O and timers run on; workers for blocking calls.
//! * [`backend`] - traits of the host side: disks, networks, character devices.
//! * [`inputs`] - the one place that what comes from outside passes through where time is counted in instructions.
//! * [`outside`] - chance and the time of day, repeatable with a seed.
//! * [`snapshot`] - saved state: schemas, payloads, the file.
//!
//! Lock order, outermost first: machine control; memory-map commit (no device lock
//! held); one device; interrupt routers, then controllers; leaves (queues).

pub mod accel;
pub mod backend;
pub mod bus;
pub mod clock;
pub mod device;
pub mod error;
pub mod inputs;
pub mod io_thread;
pub mod irq;
pub mod memory;
pub mod outside;
pub mod snapshot;
pub mod vcpu;

pub use mimus_arch as arch;
