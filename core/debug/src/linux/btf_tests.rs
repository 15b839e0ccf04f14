//! Types made by hand.

use super::*;

/// A little kernel's types: what the tests look for.
fn bytes() -> Vec<u8> {
    let mut strings = vec![0u8];
    let mut name = |text: &str| {
        let at = strings.len() as u32;
        strings.extend(text.bytes());
        strings.push(0);
        at
    };
    let mut types: Vec<u32> = Vec::new();
    // 1: int
    types.extend([name("int"), 1 << 24, 4, 32]);
    // 2: pointer to 1
    types.extend([0, 2 << 24, 1]);
    // 3: struct list_head { next; prev; }
    types.extend([name("list_head"), STRUCT << 24 | 2, 16, name("next"), 2, 0, name("prev"), 2, 64]);
    // 4: array of three list_heads
    types.extend([0, ARRAY << 24, 0, 3, 1, 3]);
    // 5: anonymous union { int a; list_head both; }
    types.extend([0, UNION << 24 | 2, 16, name("a"), 1, 0, name("both"), 3, 0]);
    // 6: typedef of it
    types.extend([name("either"), TYPEDEF << 24, 5]);
    // 7: struct task { int pid:5 at bit 3; <anonymous 6>; list_head all[3]; }, with bit fields
    let task =
        [name("task"), 1 << 31 | STRUCT << 24 | 3, 88, name("pid"), 1, 5 << 24 | 3, 0, 6, 64, name("all"), 4, 192];
    types.extend(task);
    // 8: an anonymous structure in itself
    types.extend([name("ring"), STRUCT << 24 | 2, 8, 0, 8, 0, 0, 8, 0]);
    let types: Vec<u8> = types.iter().flat_map(|w| w.to_le_bytes()).collect();
    let mut out = vec![0x9f, 0xeb, 1, 0];
    for word in [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32] {
        out.extend(word.to_le_bytes());
    }
    out.extend(types);
    out.extend(strings);
    out
}

#[test]
fn members_of_structures() {
    let btf = Btf::parse(&bytes(), 8).unwrap();
    assert_eq!(btf.len(), 8);
    let pid = btf.member("task", "pid").unwrap();
    assert_eq!((pid.bit, pid.bits), (3, Some(5)));
    assert_eq!(btf.member("task", "both.prev").unwrap().offset(), 16, "through an anonymous typedef");
    assert_eq!(btf.member("task", "all[2].prev").map(|m| (m.offset(), m.size)), Some((24 + 32 + 8, 8)));
    assert_eq!(btf.member("task", "all").unwrap().size, 48);
    assert_eq!((btf.size_of("task"), btf.size_of("nobody")), (Some(88), None));
    let names: Vec<String> = btf.members("task").unwrap().into_iter().map(|m| m.0).collect();
    assert_eq!(names, ["pid", "a", "both", "all"]);
    assert_eq!(btf.near("tsk").as_deref(), Some("task"));
    for path in ["x", "pid.x", "all[x]", "all[", "pid[0]", "", "both.", "all[18446744073709551615]"] {
        assert!(btf.member("task", path).is_none(), "{path}");
    }
}

#[test]
fn what_is_in_itself_comes_to_an_end() {
    let btf = Btf::parse(&bytes(), 8).unwrap();
    assert!(btf.member("ring", "x").is_none());
    assert_eq!(btf.members("ring"), Some(Vec::new()));
}

/// Each byte of it changed in turn: an error or an answer, no panic.
#[test]
fn damaged() {
    let good = bytes();
    for at in 0..good.len() {
        for change in [1, 0x80, 0xff] {
            let mut bad = good.clone();
            bad[at] ^= change;
            if let Ok(btf) = Btf::parse(&bad, 8) {
                let _ = (btf.member("task", "all[1].next"), btf.members("task"), btf.members("ring"), btf.near("tusk"));
            }
        }
        assert!(Btf::parse(&good[..at], 8).is_err());
    }
}
