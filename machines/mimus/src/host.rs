//! What this host has: memory, for sizing errors.

/// Total memory with swap, and what is available now, in bytes (`proc_meminfo(5)`).
pub fn memory() -> Option<(u64, u64)> {
    parse_meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

fn parse_meminfo(text: &str) -> Option<(u64, u64)> {
    let field = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().trim_end_matches(" kB").trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    let swap = field("SwapTotal").unwrap_or(0);
    Some((field("MemTotal")? + swap, field("MemAvailable")? + field("SwapFree").unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    #[test]
    fn meminfo() {
        let text = "MemTotal:       1000 kB\nMemFree: 1 kB\nMemAvailable:    600 kB\nSwapTotal:       24 kB\nSwapFree: 10 kB\n";
        assert_eq!(super::parse_meminfo(text), Some((1024 * 1024, 610 * 1024)));
        assert_eq!(super::parse_meminfo("x"), None);
    }
}
