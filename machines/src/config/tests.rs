//! The value syntax of every option: what is accepted, and that errors say what to do.

use super::keyval::{nearest, parse_size, split};
use super::options::{parse_log_items, parse_memory};
use super::*;

fn says<T: std::fmt::Debug>(result: Result<T, ConfigError>, words: &[&str]) {
    let text = result.unwrap_err().to_string();
    assert_eq!(text.lines().count(), 1, "{text}");
    for word in words {
        assert!(text.contains(word), "'{word}' not in: {text}");
    }
}

#[test]
fn commas() {
    assert_eq!(split("a,,b,c=d"), ["a,b", "c=d"]);
    assert_eq!(split(""), [""]);
    assert_eq!(split(",,,"), [",", ""]);
    assert_eq!(nearest("vritio", ["virtio", "none"].into_iter()), Some("virtio"));
    assert_eq!(nearest("xyzzy", ["virtio", "none"].into_iter()), None);
}

#[test]
fn sizes() {
    assert_eq!(parse_size("512", 20), Ok(512 << 20));
    assert_eq!(parse_size("2G", 20), Ok(2 << 30));
    assert_eq!(parse_size("1.5g", 20), Ok(3 << 29));
    assert_eq!(parse_size("64k", 20), Ok(65536));
    for bad in ["", "G", "2X", "-1", "99999999999999T", "1e5", "nan", "1.G.2"] {
        assert!(parse_size(bad, 20).is_err(), "{bad}");
    }
}

#[test]
fn memory() {
    assert_eq!(parse_memory("2G").unwrap(), 2 << 30);
    assert_eq!(parse_memory("size=256").unwrap(), 256 << 20);
    says(parse_memory("0"), &["-m 0: ", "-m 512M"]);
    says(parse_memory("2Q"), &["-m 2Q: ", "unit"]);
    says(parse_memory("2G,slots=2"), &["hot-plug"]);
    says(parse_memory("1000b"), &["4 KiB"]);
}

#[test]
fn smp() {
    let s = Smp::parse("4").unwrap();
    assert_eq!((s.cpus, s.max_cpus, s.cores, s.sockets), (4, 4, 4, 1));
    let s = Smp::parse("cpus=8,sockets=2,threads=2").unwrap();
    assert_eq!((s.cores, s.sockets, s.threads), (2, 2, 2));
    let s = Smp::parse("2,cores=2").unwrap();
    assert_eq!((s.sockets, s.cores), (1, 2));
    let s = Smp::parse("2,maxcpus=4").unwrap();
    assert_eq!((s.cpus, s.max_cpus), (2, 4));
    says(Smp::parse("0"), &["from 1 to"]);
    says(Smp::parse("x"), &["whole number"]);
    says(Smp::parse("4,maxcpus=2"), &["more than maxcpus"]);
    says(Smp::parse("3,cores=2"), &["must make 3"]);
    says(Smp::parse("sockets=512,cores=512,threads=512,clusters=512"), &["more than 512"]);
    says(Smp::parse("4,core=2"), &["no key 'core'", "did you mean cores?"]);
}

#[test]
fn machine_and_accel() {
    let (m, a) = MachineType::parse("virt,accel=kvm:tcg,aclint=on").unwrap();
    assert_eq!(m.name.as_deref(), Some("virt"));
    assert_eq!(m.options, [("aclint".into(), "on".into())]);
    assert_eq!(a.iter().map(|a| a.name.as_str()).collect::<Vec<_>>(), ["kvm", "tcg"]);
    assert_eq!(Accel::parse("tcg,thread=multi").unwrap().options[0], ("thread".into(), "multi".into()));
    says(Accel::parse("kmv"), &["did you mean kvm?"]);
    says(Accel::parse("hvf"), &["QEMU"]);
}

#[test]
fn drives() {
    let d =
        Drive::parse("file=a,,b.img,if=virtio,format=raw,readonly=on,id=d0,snapshot=on,cache=none,aio=native").unwrap();
    assert_eq!(d.file.as_deref(), Some(std::path::Path::new("a,b.img")));
    assert!(d.read_only && d.snapshot && d.cache == Some(CacheMode::None));
    assert_eq!(Drive::parse("if=pflash,file=x").unwrap().interface, DriveInterface::Pflash);
    says(Drive::parse("file=x,if=scsi"), &["if=virtio"]);
    says(Drive::parse("file=x,format=qcow2"), &["qemu-img convert"]);
    assert_eq!(Drive::parse("file=x,bootindex=3").unwrap().boot_index, Some(3));
    assert_eq!(Drive::parse("file=x,if=ide,media=cdrom,bootindex=0").unwrap().boot_index, Some(0));
    says(Drive::parse("file=x,bootindex=first"), &["bootindex=first", "whole number"]);
    says(Drive::parse("file=x,if=none,id=a,bootindex=3"), &["-device virtio-blk-pci"]);
    says(Drive::parse("if=none"), &["file= is missing"]);
    says(Drive::parse("fille=a.img"), &["there is no key 'fille'; did you mean file?"]);
    says(Drive::parse("file=x,raedonly=on"), &["did you mean readonly?"]);
    says(Drive::parse("file=x,readonly=maybe"), &["on or off"]);
}

#[test]
fn character_backends() {
    use CharBackend as B;
    let parse = |t| B::parse_legacy("-serial", t);
    assert_eq!(parse("mon:stdio").unwrap(), B::Stdio { monitor: true, signal: false });
    assert_eq!(parse("stdio").unwrap(), B::Stdio { monitor: false, signal: true });
    assert_eq!(parse("file:/tmp/x:y").unwrap(), B::File { path: "/tmp/x:y".into(), append: false });
    let tcp = B::Socket {
        address: SocketAddress::Tcp { host: "127.0.0.1".into(), port: 4321 },
        server: true,
        wait: false,
        telnet: false,
    };
    assert_eq!(parse("tcp:127.0.0.1:4321,server,nowait").unwrap(), tcp);
    assert_eq!(parse("tcp:127.0.0.1:4321,server=on,wait=off").unwrap(), tcp);
    assert!(matches!(parse("unix:/x/y,server").unwrap(), B::Socket { wait: true, .. }));
    says(parse("tcp:localhost"), &["HOST:PORT"]);
    says(parse("vc"), &["mon:stdio"]);
    says(parse("stdoi"), &["one of none"]);
    let c = Chardev::parse("socket,id=c0,path=/x,server=on,wait=off").unwrap();
    assert_eq!(c.id, "c0");
    assert_eq!(
        Chardev::parse("stdio,mux=on,id=s,signal=off").unwrap().backend,
        B::Stdio { monitor: true, signal: false }
    );
    says(Chardev::parse("stdio"), &["id= is missing"]);
    says(Chardev::parse("spicevmc,id=x"), &["QEMU"]);
}

#[test]
fn networks() {
    let n = Netdev::parse(
        "user,id=n0,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp::53-10.0.2.15:53,net=10.1.0.0/16,restrict=on",
    )
    .unwrap();
    let NetdevBackend::User(user) = n.backend;
    assert_eq!((user.network.octets(), user.prefix, user.restrict), ([10, 1, 0, 0], 16, true));
    assert_eq!(user.forwards[0].host_port, 2222);
    assert_eq!(user.forwards[1].protocol, Protocol::Udp);
    assert_eq!(Nic::parse("none").unwrap().backend, None);
    let nic = Nic::parse("user,model=virtio-net-pci,mac=52:54:00:12:34:56").unwrap();
    assert_eq!(nic.mac, Some([0x52, 0x54, 0, 0x12, 0x34, 0x56]));
    says(Netdev::parse("user"), &["id= is missing"]);
    says(Netdev::parse("tap,id=n"), &["user"]);
    says(Netdev::parse("user,id=n,hostfwd=2222:22"), &["tcp:127.0.0.1:2222-:22"]);
    says(Netdev::parse("user,id=n,dns=192.168.1.1"), &["not in the guest's network"]);
    says(Nic::parse("user,mac=01:00:00:00:00:00"), &["mac="]);
}

#[test]
fn icount() {
    assert_eq!(Icount::parse("7").unwrap(), Icount { shift: Some(7), sleep: true });
    assert_eq!(Icount::parse("shift=auto,sleep=off").unwrap(), Icount { shift: None, sleep: false });
    for (text, says) in [("shift=11", "up to 10"), ("sleep=on", "shift=N"), ("shift=0,rr=record", "no record")] {
        assert!(Icount::parse(text).unwrap_err().to_string().contains(says), "{text}");
    }
}

#[test]
fn clock() {
    assert_eq!(Rtc::parse("base=localtime,clock=vm").unwrap(), Rtc { base: RtcBase::Localtime, clock: RtcClock::Vm });
    for (text, seconds) in [
        ("1970-01-01", 0),
        ("2000-03-01T00:00:01", 951_868_801),
        ("2026-11-25T10:00:00", 1_795_600_800),
        ("1969-12-31", -86_400),
    ] {
        assert_eq!(Rtc::parse(text).unwrap().base, RtcBase::Seconds(seconds), "{text}");
    }
    for bad in ["2026-13-01", "2025-02-29", "yesterday", "2026-1", "99999999999-01-01"] {
        says(Rtc::parse(bad), &["2026-11-25"]);
    }
}

#[test]
fn log_items() {
    assert_eq!(parse_log_items("int,in_asm,int").unwrap(), ["in_asm", "int"]);
    assert_eq!(parse_log_items("int,unimp,-int").unwrap(), ["unimp"]);
    says(parse_log_items("in_asn"), &["did you mean in_asm?"]);
}

#[test]
fn names_are_checked() {
    let mut c = MachineConfig::new("riscv64");
    c.serials.push(CharBackend::Chardev { id: "c1".into() });
    says(c.validate(), &["-serial chardev:c1", "-chardev"]);
    c.chardevs.push(Chardev::parse("null,id=c0").unwrap());
    says(c.validate(), &["known: c0"]);
    c.serials = vec![CharBackend::Stdio { monitor: false, signal: true }];
    c.monitor = CharBackend::Stdio { monitor: false, signal: true };
    says(c.validate(), &["mon:stdio"]);
    c.monitor = CharBackend::None;
    c.validate().unwrap();
    c.chardevs.push(Chardev::parse("null,id=c0").unwrap());
    says(c.validate(), &["given twice"]);
}

#[test]
fn a_config_is_json() {
    let mut c = MachineConfig::new("riscv64");
    c.boot.bios = Bios::File("/x".into());
    c.nics.push(Nic::parse("user,hostfwd=tcp::1-:2").unwrap());
    c.serials.push(CharBackend::parse_legacy("-serial", "tcp::1,server").unwrap());
    let text = serde_json::to_string(&c).unwrap();
    assert_eq!(serde_json::from_str::<MachineConfig>(&text).unwrap(), c);
    assert!(serde_json::from_str::<MachineConfig>(r#"{"guest":"riscv64","kernle":1}"#).is_err());
}

/// Whatever is written, a parser answers.
#[test]
fn no_text_panics() {
    let words = [
        "file",
        "=",
        ",",
        ",,",
        ":",
        "-",
        "tcp",
        "user",
        "id",
        "0x",
        "9999999999999999999",
        "é",
        "on",
        "/",
        "T",
        "stdio",
        "socket",
        "port",
        "hostfwd",
        "mac",
        "",
    ];
    let mut seed = 7u64;
    for _ in 0..20_000 {
        let mut text = String::new();
        for _ in 0..8 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            text.push_str(words[(seed >> 33) as usize % words.len()]);
        }
        let _ =
            (Drive::parse(&text), Netdev::parse(&text), Nic::parse(&text), Chardev::parse(&text), Smp::parse(&text));
        let _ = (
            CharBackend::parse_legacy("-serial", &text),
            Rtc::parse(&text),
            parse_memory(&text),
            parse_log_items(&text),
            MachineType::parse(&text),
        );
    }
}
