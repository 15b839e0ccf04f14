//! Tests against a small guest on loopback.
