//! PS/2 keyboard and mouse, as the bytes on their wires.
//!
//! Spec: IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller" and "Keyboards";
//! Microsoft "Keyboard Scan Code Specification" 1.3a; Microsoft IntelliMouse extensions for the wheel.

pub mod keyboard;
pub mod mouse;
pub mod scancodes;

use std::collections::VecDeque;

/// "The keyboard has a 16-byte buffer"; so have mice here.
const BUFFER: usize = 16;
/// Replies are at most this long at a time: acknowledge, and what was asked for.
const REPLIES: usize = 8;

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const TEST_PASSED: u8 = 0xaa;

/// Checks the length of a saved queue.
fn fits(replies: &VecDeque<u8>, buffer: &VecDeque<u8>) -> bool {
    replies.len() <= REPLIES && buffer.len() <= BUFFER
}
