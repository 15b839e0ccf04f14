//! Computations on the host's own units.

use mimus_arch::x86::X86Features;

/// Features of the host that guest instructions can use.
pub fn host_features() -> X86Features {
    let mut set = X86Features::EMPTY;
    let mut add = |name: &str, present: bool| {
        if present {
            set = set.union(X86Features::of(&[name]));
        }
    };
    add("ssse3", is_x86_feature_detected!("ssse3"));
    set
}
