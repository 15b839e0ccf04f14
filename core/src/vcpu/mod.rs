//! The one run loop.
