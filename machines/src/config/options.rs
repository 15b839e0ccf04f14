//! The value syntax of the remaining options: `-machine -smp -m -drive -accel -rtc -d`.

use mimus_core::clock::icount::MAX_SHIFT;

use super::keyval::{nearest, parse_size};
use super::{
    Accel, CacheMode, ConfigError, Drive, DriveInterface, Icount, KeyValues, MachineType, Rtc, RtcBase, RtcClock, Smp,
};
use crate::machine::boot_list::parse_index;

/// Most vCPUs any machine of ours may have; boards set their own, lower limits.
pub const MAX_CPUS: u32 = 512;

/// Names that `-d` takes, with what each logs.
pub const LOG_ITEMS: &[(&str, &str)] = &[
    ("in_asm", "guest instructions of each translated block"),
    ("op", "the intermediate code of each translated block"),
    ("out_asm", "host instructions of each translated block"),
    ("exec", "each block entered (slow)"),
    ("int", "interrupts and exceptions taken"),
    ("mmu", "page faults and address translations that fail"),
    ("cpu_reset", "CPU state at reset"),
    ("guest_errors", "what the guest does wrong"),
    ("unimp", "what the guest asks for that is not modelled"),
    ("dev", "device models"),
];

impl MachineType {
    /// `-machine TYPE,key=value,…`; `accel=a:b` is returned apart.
    pub fn parse(text: &str) -> Result<(Self, Vec<Accel>), ConfigError> {
        let mut kv = KeyValues::parse("-machine", text, Some("type"))?;
        let name = kv.take("type");
        let mut accels = Vec::new();
        for names in kv.take_all("accel") {
            for name in names.split(':') {
                accels.push(Accel { name: check_accel(&kv, name)?, options: Vec::new() });
            }
        }
        Ok((MachineType { name, options: kv.rest() }, accels))
    }
}

impl Accel {
    /// `-accel NAME,key=value,…`
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let mut kv = KeyValues::parse("-accel", text, Some("accel"))?;
        let name = kv.take("accel").ok_or_else(|| kv.error("the name is missing: -accel tcg or -accel kvm"))?;
        let name = check_accel(&kv, &name)?;
        Ok(Accel { name, options: kv.rest() })
    }
}

fn check_accel(kv: &KeyValues, name: &str) -> Result<String, ConfigError> {
    match name {
        "tcg" | "kvm" | "null" => Ok(name.into()),
        "hvf" | "whpx" | "nvmm" | "xen" | "qtest" | "mshv" => Err(kv.error(format!(
            "{name} is an accelerator of QEMU that mimus does not have; there are tcg (any guest) and kvm"
        ))),
        list if list.contains(':') => {
            let each: Vec<_> = list.split(':').map(|name| format!("-accel {name}")).collect();
            Err(kv.error(format!(
                "-accel names one: {} takes the first that works, and so does -machine accel={list}",
                each.join(" ")
            )))
        }
        _ => {
            let hint =
                nearest(name, ["tcg", "kvm"].into_iter()).map_or(String::new(), |n| format!(" (did you mean {n}?)"));
            Err(kv.error(format!("there is no accelerator '{name}'{hint}; there are tcg (any guest) and kvm (guests of the host's architecture)")))
        }
    }
}

impl Smp {
    /// `-smp 4` or `-smp cpus=4,sockets=1,cores=2,threads=2,maxcpus=4`
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let mut kv = KeyValues::parse("-smp", text, Some("cpus"))?;
        let mut count = |key| -> Result<Option<u32>, ConfigError> {
            match kv.take_number(key)? {
                None => Ok(None),
                Some(n) if (1..=u64::from(MAX_CPUS)).contains(&n) => Ok(Some(n as u32)),
                Some(n) => Err(kv.error(format!("{key}={n}: it is from 1 to {MAX_CPUS}"))),
            }
        };
        let (cpus, max) = (count("cpus")?, count("maxcpus")?);
        let (sockets, clusters) = (count("sockets")?, count("clusters")?.unwrap_or(1));
        let (cores, threads) = (count("cores")?, count("threads")?);
        let given = |n: Option<u32>| n.unwrap_or(1);
        let product = |a: u32, b: u32, c: u32, d: u32| {
            a.checked_mul(b).and_then(|x| x.checked_mul(c)).and_then(|x| x.checked_mul(d))
        };
        let asked = product(given(sockets), clusters, given(cores), given(threads)).filter(|n| *n <= MAX_CPUS);
        let asked = asked.ok_or_else(|| kv.error(format!("that makes more than {MAX_CPUS} vCPUs")))?;
        let total = max.or(cpus).unwrap_or(asked);
        let cpus = cpus.unwrap_or(total);
        // What is not given follows: cores first, then sockets, as in QEMU since 6.2.
        let (cores, sockets) = match (cores, sockets) {
            (None, _) => (total / (given(sockets) * clusters * given(threads)), given(sockets)),
            (Some(c), None) => (c, total / (c * clusters * given(threads))),
            (Some(c), Some(s)) => (c, s),
        };
        let smp = Smp { cpus, max_cpus: total, sockets, clusters, cores, threads: given(threads) };
        if product(sockets, clusters, cores, smp.threads) != Some(total) {
            return Err(
                kv.error(format!("sockets × clusters × cores × threads must make {total}, the number of vCPUs"))
            );
        }
        if cpus > total {
            return Err(kv.error(format!("cpus={cpus} is more than maxcpus={total}")));
        }
        kv.finish()?;
        Ok(smp)
    }
}

/// `-m 2G`, `-m size=2G` (a number alone counts MiB): bytes.
pub fn parse_memory(text: &str) -> Result<u64, ConfigError> {
    let mut kv = KeyValues::parse("-m", text, Some("size"))?;
    let size = kv.take("size");
    for key in ["slots", "maxmem"] {
        if kv.take(key).is_some() {
            return Err(kv.error(format!(
                "{key}= is memory hot-plug, which mimus does not have (yet): give all of it as size="
            )));
        }
    }
    let size = size.ok_or_else(|| kv.error("the size is missing: -m 512M"))?;
    let bytes = parse_size(&size, 20).map_err(|reason| kv.error(reason))?;
    if bytes == 0 {
        return Err(kv.error("a machine needs memory: -m 512M"));
    }
    if bytes % 4096 != 0 {
        return Err(kv.error("it must be a multiple of 4 KiB"));
    }
    kv.finish()?;
    Ok(bytes)
}

const CACHES: &[(&str, CacheMode)] = &[
    ("writeback", CacheMode::Writeback),
    ("writethrough", CacheMode::Writethrough),
    ("none", CacheMode::None),
    ("directsync", CacheMode::Directsync),
    ("unsafe", CacheMode::Unsafe),
];

impl Drive {
    /// `-drive file=…,if=virtio,format=raw,…`
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let mut kv = KeyValues::parse("-drive", text, None)?;
        let file = kv.take("file");
        let interface = match kv.take("if").as_deref() {
            None | Some("virtio") => DriveInterface::Virtio,
            Some("none") => DriveInterface::None,
            Some("ide") => DriveInterface::Ide,
            Some("pflash") => DriveInterface::Pflash,
            Some(other @ ("scsi" | "sd" | "mtd" | "floppy" | "xen")) => {
                return Err(kv.error(format!(
                    "if={other} is an interface this machine does not have: use if=virtio, if=ide, if=none or if=pflash"
                )));
            }
            Some(other) => {
                return Err(
                    kv.error(format!("there is no interface '{other}': use if=virtio, if=ide, if=none or if=pflash"))
                );
            }
        };
        let format = kv.take("format");
        if let Some(format) = format.as_deref().filter(|f| *f != "raw") {
            return Err(kv.error(format!(
                "format={format}: mimus reads raw images (yet); convert with: qemu-img convert -O raw IN OUT"
            )));
        }
        // Each interface here has one bus: a drive's unit on it is its index.
        let (index, unit) = (kv.take_number("index")?, kv.take_number("unit")?);
        if index.is_some() && unit.is_some() && index != unit {
            return Err(kv.error("index= and unit= both name the drive's place: give one"));
        }
        let index = match index.or(unit) {
            Some(n) if n > 255 => return Err(kv.error("index= and unit= are at most 255")),
            other => other.map(|n| n as u32),
        };
        let cdrom = kv.take_word("media", &[("disk", false), ("cdrom", true)])?.unwrap_or(false);
        let read_only = kv.take_bool("readonly")?.unwrap_or(cdrom);
        let drive = Drive {
            file: file.map(Into::into),
            interface,
            format,
            id: kv.take("id"),
            index,
            read_only,
            snapshot: kv.take_bool("snapshot")?.unwrap_or(false),
            cdrom,
            cache: kv.take_word("cache", CACHES)?,
            discard: kv
                .take_word("discard", &[("unmap", true), ("on", true), ("ignore", false), ("off", false)])?
                .unwrap_or(false),
            serial: kv.take("serial"),
            boot_index: match kv.take("bootindex") {
                Some(text) => parse_index(&text).map_err(|e| kv.error(e))?,
                None => None,
            },
        };
        let of_a_device = matches!(drive.interface, DriveInterface::None | DriveInterface::Pflash);
        if let Some(n) = drive.boot_index.filter(|_| of_a_device) {
            return Err(
                kv.error(format!("bootindex={n} is the device's: -device virtio-blk-pci,drive=ID,bootindex={n}"))
            );
        }
        // How the host does its reads and writes: accepted, our block layer picks its own.
        kv.take_word("aio", &[("threads", ()), ("native", ()), ("io_uring", ())])?;
        kv.take_word("detect-zeroes", &[("off", ()), ("on", ()), ("unmap", ())])?;
        let missing = kv.error("file= is missing: -drive file=disk.img,if=virtio,format=raw");
        // A key that is not there may be this one, mistyped.
        kv.finish()?;
        if drive.file.is_none() && !drive.cdrom { Err(missing) } else { Ok(drive) }
    }
}

impl Icount {
    /// `-icount shift=N|auto,sleep=on|off`
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let mut kv = KeyValues::parse("-icount", text, Some("shift"))?;
        let shift = match kv.take("shift").as_deref() {
            Some("auto") => None,
            Some(n) => match n.parse().ok().filter(|n| *n <= MAX_SHIFT) {
                Some(n) => Some(n),
                None => return Err(kv.error(format!("shift is auto or a number up to {MAX_SHIFT}"))),
            },
            None => return Err(kv.error("shift=N or shift=auto says how long an instruction takes")),
        };
        let sleep = kv.take_bool("sleep")?.unwrap_or(true);
        if kv.take_bool("align")? == Some(true) {
            return Err(kv.error("align=on is not there: shift=auto keeps pace with the host"));
        }
        for key in ["rr", "rrfile", "rrsnapshot"] {
            if kv.take(key).is_some() {
                return Err(kv.error("there is no record and replay yet; leave rr out"));
            }
        }
        kv.finish()?;
        Ok(Icount { shift, sleep })
    }
}

impl Rtc {
    /// `-rtc base=utc|localtime|DATE,clock=host|rt|vm`
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let mut kv = KeyValues::parse("-rtc", text, Some("base"))?;
        let base = match kv.take("base").as_deref() {
            None | Some("utc") => RtcBase::Utc,
            Some("localtime") => RtcBase::Localtime,
            Some(date) => RtcBase::Seconds(
                parse_date(date)
                    .ok_or_else(|| kv.error("base is utc, localtime or a date as 2026-11-25T10:00:00 or 2026-11-25"))?,
            ),
        };
        let clock = kv
            .take_word("clock", &[("host", RtcClock::Host), ("rt", RtcClock::Rt), ("vm", RtcClock::Vm)])?
            .unwrap_or_default();
        kv.take_word("driftfix", &[("none", ()), ("slew", ())])?;
        kv.finish()?;
        Ok(Rtc { base, clock })
    }
}

/// `YYYY-MM-DD[THH:MM:SS]` as seconds since 1970, UTC.
fn parse_date(text: &str) -> Option<i64> {
    let (date, time) = text.split_once('T').unwrap_or((text, "00:00:00"));
    let numbers = |text: &str, sep: char| -> Option<[i64; 3]> {
        let mut it = text.split(sep).map(|p| p.parse::<u32>().ok().map(i64::from));
        let out = [it.next()??, it.next()??, it.next()??];
        it.next().is_none().then_some(out)
    };
    let [year, month, day] = numbers(date, '-')?;
    let [hour, minute, second] = numbers(time, ':')?;
    let days_in = [
        31,
        if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) { 29 } else { 28 },
        31,
        30,
        31,
        30,
        31,
        31,
        30,
        31,
        30,
        31,
    ];
    if !(1..=9999).contains(&year)
        || !(1..=12).contains(&month)
        || day < 1
        || day > days_in[month as usize - 1]
        || hour > 23
        || minute > 59
        || second > 59
    {
        return None;
    }
    // Days from civil: years start in March so that the leap day is the last one.
    let shifted = if month <= 2 { year - 1 } else { year };
    let month_from_march = (month + 9) % 12;
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    let days = shifted * 365 + shifted.div_euclid(4) - shifted.div_euclid(100) + shifted.div_euclid(400) + day_of_year
        - 719_468;
    Some(days * 86_400 + hour * 3600 + minute * 60 + second)
}

/// `-d item,item`: checked names. `-` before a name takes it out, as in QEMU.
pub fn parse_log_items(text: &str) -> Result<Vec<String>, ConfigError> {
    let mut items: Vec<String> = Vec::new();
    for item in text.split(',').filter(|i| !i.is_empty()) {
        if item == "all" {
            items.extend(LOG_ITEMS.iter().map(|(name, _)| (*name).to_owned()));
        } else if item == "nochain" {
            return Err(ConfigError::new(
                "-d",
                text,
                "nochain is of QEMU: mimus logs with -d exec whether blocks are chained or not",
            ));
        } else if let Some(out) = item.strip_prefix('-') {
            items.retain(|i| i != out);
        } else if LOG_ITEMS.iter().any(|(name, _)| *name == item) || item.starts_with("dev:") {
            items.push(item.to_owned());
        } else {
            let hint = match nearest(item, LOG_ITEMS.iter().map(|(name, _)| *name)) {
                Some(near) => format!("did you mean {near}?"),
                None => "see -d help".into(),
            };
            return Err(ConfigError::new("-d", text, format!("there is no log item '{item}'; {hint}")));
        }
    }
    items.sort();
    items.dedup();
    Ok(items)
}
