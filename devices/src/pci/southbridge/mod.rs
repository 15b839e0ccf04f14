//! South bridges.
