//! KVM and the translator on the same guests: programs with the instructions that a KVM without hardware behind it
//! cannot execute finish with the same registers and memory as under the translator alone.
//!
//! Without `/dev/kvm` every test says `SKIPPED (name): reason` and passes.

#![cfg(target_arch = "x86_64")]

/// Named bodies of cases.
macro_rules! cases {
    ($($name:literal: |$a:ident| $body:expr;)*) => {
        &[$(($name, (|$a: &mut CodeAssembler| $body) as Body)),*]
    };
}

mod bus;
mod cases;
mod guest;
mod hazards;
mod long_mode;
mod other_modes;
mod user_mode;
