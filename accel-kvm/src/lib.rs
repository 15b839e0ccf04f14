//! the KVM accelerator.
