// UNSAFE: installs a signal handler and sends signals.
//! The signal that takes a thread out of `KVM_RUN`.
//!
//! Its handler does nothing: the signal's arrival is enough. What makes a kick that comes just before
//! `KVM_RUN` count is the run page's `immediate_exit`.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::sync::Once;

/// Which signal: not the first real-time ones, which C libraries use.
fn number() -> libc::c_int {
    libc::SIGRTMIN() + 3
}

extern "C" fn nothing(_: libc::c_int) {}

/// Installs the handler, once per process.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: an all-zero sigaction is a valid one, and the handler may run at any time: it is empty.
        // Without SA_RESTART the signal ends the ioctl.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(number(), &action, std::ptr::null_mut());
        }
    });
}

thread_local! {
    static TID: Cell<i32> = const { Cell::new(0) };
}

/// The calling thread's number, with the signal unblocked in it.
pub fn this_thread() -> i32 {
    let known = TID.get();
    if known != 0 {
        return known;
    }
    // SAFETY: no memory is involved but the set, which is initialised before it is used.
    let tid = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, number());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
        libc::gettid()
    };
    TID.set(tid);
    tid
}

/// Interrupts a thread of this process. One that is gone is no error.
pub fn send(tid: i32) {
    // SAFETY: tgkill reads nothing of ours; thread and process numbers are checked by the kernel.
    unsafe {
        libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, number());
    }
}
