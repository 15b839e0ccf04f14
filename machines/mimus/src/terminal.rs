//! The terminal mimus runs in: raw mode, and the way back out of it on every path.
//!
//! The settings found at the start are kept in one place, so that whoever ends the run
//! (the normal end, an error, a panic on any thread, a signal) can put them back.

use std::io::stdin;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::termios::{LocalModes, OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

/// Settings to go back to; `None` while nothing was changed.
static SAVED: Mutex<Option<Saved>> = Mutex::new(None);
static RAW: AtomicBool = AtomicBool::new(false);

struct Saved {
    original: Termios,
    raw: Termios,
}

/// Puts the terminal into raw mode, if standard input is one. `signals` keeps Ctrl-C and
/// Ctrl-Z as signals to mimus; else the guest gets them as bytes.
pub fn enter_raw(signals: bool) -> anyhow::Result<RawMode> {
    let input = stdin();
    if !isatty(&input) {
        return Ok(RawMode(()));
    }
    let original = tcgetattr(&input)?;
    let mut raw = original.clone();
    raw.make_raw();
    // Output stays processed as far as the guest is concerned: it sends its own CR LF.
    if signals {
        raw.local_modes |= LocalModes::ISIG;
    }
    tcsetattr(&input, OptionalActions::Drain, &raw)?;
    if let Ok(mut saved) = SAVED.lock() {
        *saved = Some(Saved { original, raw });
    }
    RAW.store(true, Ordering::Relaxed);
    Ok(RawMode(()))
}

/// Goes back when dropped.
#[must_use]
pub struct RawMode(());

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back as it was found. May be called at any time and more than once.
pub fn restore() {
    // A poisoned lock still holds good settings.
    let mut saved = SAVED.lock().unwrap_or_else(|e| e.into_inner());
    if let Some(saved) = saved.take() {
        let _ = tcsetattr(stdin(), OptionalActions::Now, &saved.original);
    }
    RAW.store(false, Ordering::Relaxed);
}

/// Back to raw after mimus was stopped and continued by the shell (SIGCONT).
pub fn reenter() {
    if let Some(saved) = SAVED.lock().unwrap_or_else(|e| e.into_inner()).as_ref() {
        let _ = tcsetattr(stdin(), OptionalActions::Now, &saved.raw);
    }
}

/// End of a line as the terminal needs it now.
pub fn newline() -> &'static str {
    if RAW.load(Ordering::Relaxed) { "\r\n" } else { "\n" }
}

/// Makes every panic, on any thread, restore the terminal before its message, and gives the
/// message in one line: a panic is a defect of ours, and the user is told how to report it.
pub fn restore_on_panic() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        if std::env::var_os("RUST_BACKTRACE").is_some() {
            default(info);
            return;
        }
        let message = info.payload_as_str().unwrap_or("unknown");
        let place = info.location().map_or(String::new(), |l| format!(" ({}:{})", l.file(), l.line()));
        eprintln!(
            "mimus: internal error: {message}{place}; please report it with the command line and the output under RUST_BACKTRACE=1"
        );
    }));
}
