// UNSAFE: asks the C library for the local time zone.
//! The host's local time.
#![allow(unsafe_code)]

/// Seconds that local time is ahead of UTC at `at` (seconds since 1970, UTC), by the host's time zone (`TZ`,
/// `/etc/localtime`).
pub fn utc_offset(at: i64) -> i64 {
    let at: libc::time_t = at;
    // SAFETY: an all-zero tm is a valid one; both pointers are to our own variables for the time of the call.
    unsafe {
        let mut local: libc::tm = std::mem::zeroed();
        if libc::localtime_r(&at, &mut local).is_null() { 0 } else { local.tm_gmtoff }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_the_host_says() {
        let Ok(out) = std::process::Command::new("date").args(["-d", "@1795600800", "+%z"]).output() else {
            eprintln!("SKIPPED (as_the_host_says): there is no date program");
            return;
        };
        let text = String::from_utf8(out.stdout).unwrap();
        let number: i64 = text.trim().parse().unwrap();
        assert_eq!(utc_offset(1_795_600_800), (number / 100) * 3600 + (number % 100) * 60);
    }
}
