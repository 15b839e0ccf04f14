//! Where RAM comes from: `-object memory-backend-…`, `-mem-path`, `-mem-prealloc`, `-overcommit`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::keyval::{nearest, parse_size};
use super::{ConfigError, KeyValues};

/// Host memory of the machine's RAM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HostMemory {
    /// `-overcommit mem-lock=`
    pub lock: MemoryLock,
    /// Where it comes from; `None`: anonymous memory.
    pub backend: Option<MemoryBackend>,
    /// `-mem-prealloc`: it is taken from the host at the start.
    pub prealloc: bool,
    /// `-overcommit cpu-pm=on`: guests that wait keep their processor of the host.
    pub cpu_pm: bool,
}

/// `mem-lock=` of `-overcommit`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryLock {
    /// RAM may be swapped out.
    #[default]
    Off,
    /// All of it is taken at the start and stays in memory.
    On,
    /// What was touched stays in memory.
    OnFault,
}

/// `-object memory-backend-ram|memfd|file`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryBackend {
    /// Its name.
    pub id: String,
    /// Bytes; `None` is as much as the machine has.
    #[serde(default)]
    pub size: Option<u64>,
    /// What it is.
    pub kind: MemoryKind,
    /// `share=on`: other processes see what the guest writes.
    #[serde(default)]
    pub share: bool,
    /// `prealloc=on`
    #[serde(default)]
    pub prealloc: bool,
}

/// What a memory backend is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum MemoryKind {
    /// Anonymous memory.
    Ram,
    /// A memfd.
    Memfd {
        /// Bytes of its pages from the host's pool of huge ones; 0 is the host's default size.
        huge: Option<u64>,
    },
    /// A file, or a file without a name in a directory.
    File {
        /// Where.
        path: PathBuf,
    },
}

const KINDS: [&str; 3] = ["memory-backend-ram", "memory-backend-memfd", "memory-backend-file"];

impl MemoryBackend {
    /// `-object memory-backend-ram,id=NAME,size=2G,share=on,prealloc=on`
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let mut kv = KeyValues::parse("-object", text, Some("qom-type"))?;
        let kind = kv.take("qom-type").unwrap_or_default();
        if !KINDS.contains(&kind.as_str()) {
            let hint = nearest(&kind, KINDS.into_iter()).map_or(String::new(), |n| format!(" (did you mean {n}?)"));
            return Err(kv.error(format!("there is no object '{kind}'{hint}; there are {}", KINDS.join(", "))));
        }
        let id = kv.take("id").filter(|id| !id.is_empty());
        let id = id.ok_or_else(|| kv.error("id= is missing; it goes with -machine memory-backend=ID"))?;
        let size = kv.take("size").map(|s| parse_size(&s, 0).map_err(|e| kv.error(format!("size={s}: {e}"))));
        let size = size.transpose()?;
        let memfd = kind == KINDS[1];
        let share = kv.take_bool("share")?.unwrap_or(memfd);
        let prealloc = kv.take_bool("prealloc")?.unwrap_or(false);
        // How many threads do it, and what the host may do with the pages: the defaults are the best there are.
        kv.take_number("prealloc-threads")?;
        for key in ["merge", "dump", "reserve", "discard-data", "x-use-canonical-path-for-ramblock-id"] {
            kv.take_bool(key)?;
        }
        let kind = match &kind {
            _ if memfd => Self::memfd(&mut kv)?,
            k if k == KINDS[0] => MemoryKind::Ram,
            _ => {
                let path = kv.take("mem-path").ok_or_else(|| kv.error("mem-path= is missing"))?;
                MemoryKind::File { path: path.into() }
            }
        };
        kv.finish()?;
        Ok(Self { id, size, kind, share, prealloc })
    }

    fn memfd(kv: &mut KeyValues) -> Result<MemoryKind, ConfigError> {
        let huge = kv.take_bool("hugetlb")?.unwrap_or(false);
        let size =
            kv.take("hugetlbsize").map(|s| parse_size(&s, 0).map_err(|e| kv.error(format!("hugetlbsize={s}: {e}"))));
        let size = size.transpose()?;
        kv.take_bool("seal")?;
        if size.is_some() && !huge {
            return Err(kv.error("hugetlbsize= goes with hugetlb=on"));
        }
        Ok(MemoryKind::Memfd { huge: huge.then_some(size.unwrap_or(0)) })
    }
}

impl HostMemory {
    /// `-overcommit mem-lock=on|off|on-fault,cpu-pm=on|off`
    pub fn overcommit(&mut self, text: &str) -> Result<(), ConfigError> {
        let mut kv = KeyValues::parse("-overcommit", text, None)?;
        let words = [("off", MemoryLock::Off), ("on", MemoryLock::On), ("on-fault", MemoryLock::OnFault)];
        if let Some(lock) = kv.take_word("mem-lock", &words)? {
            self.lock = lock;
        }
        if let Some(on) = kv.take_bool("cpu-pm")? {
            self.cpu_pm = on;
        }
        kv.finish()
    }

    /// Takes the backend called `id` of those given; an error if there is none.
    pub fn choose(&mut self, given: &[MemoryBackend], id: Option<&str>) -> Result<(), ConfigError> {
        match id {
            Some(id) => {
                let found = given.iter().find(|b| b.id == id).cloned();
                let known: Vec<&str> = given.iter().map(|b| b.id.as_str()).collect();
                self.backend = Some(found.ok_or_else(|| {
                    let known = super::known_names(&known, "give one with -object memory-backend-ram,id=ID,size=SIZE");
                    ConfigError::new(
                        "-machine",
                        &format!("memory-backend={id}"),
                        format!("there is none of that name; {known}"),
                    )
                })?);
                Ok(())
            }
            None => match given.first() {
                Some(b) => {
                    let reason = format!("nothing uses it: add -machine memory-backend={}", b.id);
                    Err(ConfigError::new("-object", &format!("id={}", b.id), reason))
                }
                None => Ok(()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        MemoryBackend::parse(text).unwrap_err().to_string()
    }

    #[test]
    fn backends() {
        let b =
            MemoryBackend::parse("memory-backend-memfd,id=m,size=2G,hugetlb=on,hugetlbsize=2M,prealloc=on").unwrap();
        assert_eq!((b.size, b.share, b.prealloc), (Some(2 << 30), true, true));
        assert_eq!(b.kind, MemoryKind::Memfd { huge: Some(2 << 20) });
        let b = MemoryBackend::parse("memory-backend-file,id=m,mem-path=/dev/hugepages,size=1G,merge=off").unwrap();
        assert_eq!((b.kind, b.share), (MemoryKind::File { path: "/dev/hugepages".into() }, false));
        assert_eq!(MemoryBackend::parse("memory-backend-ram,id=m").unwrap().size, None);
        assert!(error("memory-backend-rma,id=m").contains("did you mean memory-backend-ram?"));
        assert!(error("rng-random,id=m").contains("there are memory-backend-ram"));
        assert!(error("memory-backend-ram,size=1G").contains("id= is missing"));
        assert!(error("memory-backend-file,id=m").contains("mem-path= is missing"));
        assert!(error("memory-backend-memfd,id=m,hugetlbsize=2M").contains("hugetlb=on"));
        assert!(error("memory-backend-ram,id=m,mem-path=/x").contains("no key 'mem-path'"));
    }

    #[test]
    fn overcommit_and_choice() {
        let mut m = HostMemory::default();
        m.overcommit("mem-lock=on-fault,cpu-pm=on").unwrap();
        assert_eq!((m.lock, m.cpu_pm), (MemoryLock::OnFault, true));
        assert!(m.overcommit("mem-lock=maybe").unwrap_err().to_string().contains("off, on, on-fault"));
        let given = [MemoryBackend::parse("memory-backend-ram,id=m,size=1G").unwrap()];
        assert!(m.choose(&given, Some("x")).unwrap_err().to_string().contains("known: m"));
        assert!(m.choose(&given, None).unwrap_err().to_string().contains("-machine memory-backend=m"));
        m.choose(&given, Some("m")).unwrap();
        assert_eq!(m.backend.unwrap().id, "m");
    }
}
