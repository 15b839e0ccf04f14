//! Vmcoreinfo: a page of text in which a Linux kernel tells crash tools where its tables are.
//!
//! Lines are `KEY=VALUE`, `SYMBOL(name)=hex`, `OFFSET(struct.member)=decimal`, `SIZE(struct)=…`, `NUMBER(name)=…`
//! (Documentation/admin-guide/kdump/vmcoreinfo.rst). It begins a page of its own.

use std::collections::HashMap;

use super::memory::{Memory, printable};

/// Pages of RAM that are looked at: 16 GiB.
const MOST_PAGES: u64 = 4 << 20;
const FIRST: &[u8] = b"OSRELEASE=";

/// The text, taken apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vmcoreinfo {
    /// Physical address.
    pub at: u64,
    text: Vec<u8>,
    values: HashMap<String, String>,
}

impl Vmcoreinfo {
    /// Finds it in RAM.
    pub fn find(m: &Memory<'_>) -> Option<Vmcoreinfo> {
        let mut found = None;
        m.physical(MOST_PAGES, FIRST.len(), &mut |pa, first| {
            if first == FIRST {
                found = Vmcoreinfo::read(m, pa);
            }
            found.is_some()
        });
        found
    }

    /// That of a page.
    fn read(m: &Memory<'_>, at: u64) -> Option<Vmcoreinfo> {
        let mut text = vec![0; 4096];
        if !m.read_physical(at, &mut text) {
            return None;
        }
        let end = text.iter().position(|b| *b == 0).unwrap_or(text.len());
        text.truncate(end);
        let lines = text.split(|b| *b == b'\n').map(printable);
        let values: HashMap<String, String> =
            lines.filter_map(|l| l.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned()))).collect();
        // Copies of a page's begin lie about in page caches: this is a kernel's own.
        let known = values.contains_key("PAGESIZE") && values.contains_key("SYMBOL(init_uts_ns)");
        known.then_some(Vmcoreinfo { at, text, values })
    }

    /// Whether it is still there: the guest was not reset.
    pub fn is_there(&self, m: &Memory<'_>) -> bool {
        let mut text = vec![0; self.text.len()];
        m.read_physical(self.at, &mut text) && text == self.text
    }

    /// The kernel's release.
    pub fn release(&self) -> &str {
        self.values.get("OSRELEASE").map_or("", String::as_str)
    }

    /// The build identity, in hexadecimal.
    pub fn build_id(&self) -> Option<&str> {
        self.values.get("BUILD-ID").map(String::as_str)
    }

    /// A symbol's address.
    pub fn symbol(&self, name: &str) -> Option<u64> {
        u64::from_str_radix(self.values.get(&format!("SYMBOL({name})"))?, 16).ok()
    }

    /// Bytes of `struct.member` from its structure's begin.
    pub fn offset(&self, member: &str) -> Option<u64> {
        self.small(&format!("OFFSET({member})"))
    }

    /// Bytes of a structure.
    pub fn size(&self, name: &str) -> Option<u64> {
        self.small(&format!("SIZE({name})"))
    }

    fn small(&self, key: &str) -> Option<u64> {
        self.values.get(key)?.parse().ok().filter(|v| *v < 1 << 20)
    }
}
