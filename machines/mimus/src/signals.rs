//! SIGINT, SIGTERM, SIGHUP and SIGCONT as events on a thread of their own.
//!
//! The signals are blocked before any other thread starts and read from a signalfd, so
//! that no code of ours ever runs in a signal handler. The first request to end asks the
//! machine to stop; a second one, or no end within some seconds, ends the process.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::FromRawFd;
use std::time::Duration;

use crate::terminal;

/// How long the machine has to stop by itself.
const GRACE: Duration = Duration::from_secs(5);
/// `sizeof(struct signalfd_siginfo)`, signalfd(2).
const SIGINFO: usize = 128;

/// Blocks the signals in this thread and all it starts later, and calls `stop` with the
/// signal's number for each one that asks to end. Call before any thread is started.
pub fn watch(stop: impl Fn(i32) + Send + 'static) -> io::Result<()> {
    let mut fd = signal_fd(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGCONT])?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        let mut record = [0u8; SIGINFO];
        let mut asked = false;
        while fd.read_exact(&mut record).is_ok() {
            let number = u32::from_ne_bytes([record[0], record[1], record[2], record[3]]) as i32;
            if number == libc::SIGCONT {
                terminal::reenter();
                continue;
            }
            if number == libc::SIGINT && crate::debugger::interrupt() {
                continue;
            }
            if asked {
                force_exit(number);
            }
            asked = true;
            let _ = std::thread::Builder::new().name("grace".into()).spawn(move || {
                std::thread::sleep(GRACE);
                force_exit(number);
            });
            stop(number);
        }
    })?;
    Ok(())
}

/// The end without asking anyone: only the terminal is put right.
fn force_exit(signal: i32) -> ! {
    terminal::restore();
    std::process::exit(128 + signal)
}

fn signal_fd(signals: &[i32]) -> io::Result<File> {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set it is given; sigaddset and the calls after it get
    // the initialised set; a null old-mask pointer is allowed by pthread_sigmask(3).
    let fd = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        let failed = libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
        if failed != 0 {
            return Err(io::Error::from_raw_os_error(failed));
        }
        libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: signalfd returned a new descriptor that nothing else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}
