//! PMP: the matching modes, permissions, locking and the page summary,
//! against a byte-by-byte reading of the manual.

use super::*;

const OFF: u8 = 0;
const TOR: u8 = 1 << 3;
const NA4: u8 = 2 << 3;
const NAPOT: u8 = 3 << 3;

fn pmp(entries: &[(u8, u64)]) -> Pmp {
    let mut config = [0; 16];
    let mut address = [0; 16];
    for (i, entry) in entries.iter().enumerate() {
        (config[i], address[i]) = *entry;
    }
    let mut pmp = Pmp::new(16);
    pmp.restore(config, address);
    pmp
}

/// Which entry matches the byte at `pa`, by the definition.
fn matching(pmp: &Pmp, pa: u64) -> Option<usize> {
    (0..16).find(|&i| {
        let word = pa >> 2;
        let address = pmp.address[i];
        match matching_mode(pmp.config[i]) {
            0 => false,
            1 => word < address && (i == 0 || word >= pmp.address[i - 1]),
            2 => word == address,
            _ => {
                let low = address ^ address.wrapping_add(1); // trailing ones and the zero above
                (word ^ address) & !low == 0
            }
        }
    })
}

/// The decision, by the definition.
fn expected(pmp: &Pmp, pa: u64, len: u64, access: Access, privilege: Privilege) -> bool {
    let matches: Vec<_> = (pa..pa + len).map(|b| matching(pmp, b)).collect();
    let first = matches.iter().flatten().min().copied();
    match first {
        None => pmp.entries == 0 || privilege == Privilege::Machine,
        // All bytes must match the lowest-numbered entry that matches any.
        Some(_) if matches.iter().any(|m| *m != first) => false,
        Some(i) => {
            let config = pmp.config[i];
            privilege == Privilege::Machine && config & LOCKED == 0 || Permissions::from_config(config).allows(access)
        }
    }
}

fn compare(pmp: &Pmp) {
    for privilege in [Privilege::User, Privilege::Supervisor, Privilege::Machine] {
        for access in [Access::Fetch, Access::Load, Access::Store] {
            for pa in 0x7ff0..0x9010 {
                for len in [1, 2, 4, 8] {
                    let want = expected(pmp, pa, len, access, privilege);
                    assert_eq!(
                        pmp.check(pa, len, access, privilege),
                        want,
                        "{pa:x}+{len} {access:?} {privilege:?} {pmp:?}"
                    );
                }
            }
            for page in [0x7000, 0x8000, 0x9000] {
                if let Some(permissions) = pmp.page_permissions(page + 5, privilege) {
                    for pa in (page..page + 4096).step_by(4) {
                        assert_eq!(permissions.allows(access), expected(pmp, pa, 4, access, privilege));
                    }
                }
            }
        }
    }
}

#[test]
fn matching_modes_and_priorities() {
    for permissions in [0, R, R | W, X, R | X, R | W | X] {
        for lock in [0, LOCKED] {
            let p = permissions | lock;
            compare(&pmp(&[(NA4 | p, 0x8000 >> 2)]));
            compare(&pmp(&[(OFF, 0x8004 >> 2), (TOR | p, 0x8800 >> 2)]));
            compare(&pmp(&[(TOR | p, 0x8400 >> 2)]));
            compare(&pmp(&[(NAPOT | p, 0x8000 >> 2)])); // 8 bytes
            compare(&pmp(&[(NAPOT | p, 0x8000 >> 2 | 0x1ff)])); // 4 KiB
            compare(&pmp(&[(NAPOT | p, 0x8000 >> 2 | 0xff), (NAPOT | R | W | X, !0)]));
        }
    }
}

#[test]
fn empty_ranges_match_nothing() {
    compare(&pmp(&[(OFF, 0x8800 >> 2), (TOR | R, 0x8800 >> 2)]));
    compare(&pmp(&[(OFF, 0x8800 >> 2), (TOR | R, 0x8000 >> 2), (NAPOT | R | W | X, !0)]));
}

#[test]
fn off_means_machine_only_unless_absent() {
    let off = Pmp::new(16);
    assert_eq!(off.page_permissions(0x8000, Privilege::Machine), Some(Permissions::ALL));
    assert_eq!(off.page_permissions(0x8000, Privilege::User), Some(Permissions::NONE));
    let none = Pmp::new(0);
    assert_eq!(none.page_permissions(0x8000, Privilege::User), Some(Permissions::ALL));
    assert!(none.check(0x8000, 8, Access::Fetch, Privilege::Supervisor));
    assert!(!none.check(1 << 56, 1, Access::Load, Privilege::Machine));
    assert!(!none.check(u64::MAX, u64::MAX, Access::Load, Privilege::Machine));
}

#[test]
fn one_entry_for_all_of_memory() {
    for address in [!0, ADDRESS_MASK, ADDRESS_MASK >> 1] {
        let all = pmp(&[(NAPOT | R | W | X, address)]);
        assert_eq!(all.page_permissions(0, Privilege::User), Some(Permissions::ALL));
        assert_eq!(all.page_permissions(PA_LIMIT - 1, Privilege::User), Some(Permissions::ALL));
        assert!(all.check(PA_LIMIT - 8, 8, Access::Store, Privilege::User));
    }
}

#[test]
fn page_that_differs_inside_has_no_summary() {
    let p = pmp(&[(NA4 | R, 0x8000 >> 2), (NAPOT | R | W | X, !0)]);
    assert_eq!(p.page_permissions(0x8000, Privilege::Supervisor), None);
    assert_eq!(p.page_permissions(0x9000, Privilege::Supervisor), Some(Permissions::ALL));
}

#[test]
fn locked_entries_stay() {
    let mut p = Pmp::new(16);
    p.set_address(0, 0x1000);
    p.set_address(1, 0x2000);
    p.set_config_word(0, u64::from(TOR | R | LOCKED) << 8);
    p.set_address(0, 5);
    p.set_address(1, 6);
    assert_eq!((p.address(0), p.address(1)), (0x1000, 0x2000), "a locked TOR entry locks its base too");
    p.set_config_word(0, 0x1f1f);
    assert_eq!(p.config_word(0), u64::from(TOR | R | LOCKED) << 8 | 0x1f);
    p.set_address(2, !0);
    assert_eq!(p.address(2), ADDRESS_MASK);
    assert!(!p.check(0x5000, 4, Access::Store, Privilege::Machine));
}

#[test]
fn registers_are_warl() {
    let mut p = Pmp::new(16);
    p.set_config_word(1, 0x7f62_7f62_7f62_7f62);
    assert_eq!(p.config_word(1), 0x1f00_1f00_1f00_1f00);
    let mut four = Pmp::new(4);
    four.set_config_word(0, 0x1f1f_1f1f_1f1f_1f1f);
    four.set_address(4, 9);
    assert_eq!((four.config_word(0), four.address(4)), (0x1f1f_1f1f, 0));
    assert_eq!(four.address(99), 0);
}
