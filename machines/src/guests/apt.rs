//! Fetching one package with the host's own `apt`, beside the system: private lists and
//! cache, sources made from the machine's own. Nothing on the system changes and no
//! privileges are needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::sources::{self, Source};
use super::{GuestError, Progress};

/// A package to fetch.
#[derive(Debug, Clone, Copy)]
pub struct Package {
    /// Its name.
    pub name: &'static str,
    /// Debian architecture, for packages that are not `Architecture: all`.
    pub architecture: Option<&'static str>,
    /// Suites to look in, first choice first.
    pub suites: &'static [&'static str],
    /// It only depends on what is wanted: the package to fetch is the dependency whose name
    /// begins so (`linux-image-amd64` depends on `linux-image-6.1.0-30-amd64`).
    pub dependency: Option<&'static str>,
}

impl Package {
    fn full_name(&self) -> String {
        self.qualified(self.name)
    }

    fn qualified(&self, name: &str) -> String {
        self.architecture.map_or(name.to_owned(), |a| format!("{name}:{a}"))
    }
}

/// What apt's index says about a package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Name.
    pub package: String,
    /// Version.
    pub version: String,
    /// Length of the .deb in bytes.
    pub size: u64,
    /// SHA-256 of the .deb, hexadecimal.
    pub sha256: String,
}

/// Downloads `package` into `work` and unpacks it into `work/root`.
pub fn fetch(package: Package, work: &Path, progress: &dyn Progress) -> Result<Record, GuestError> {
    let own = own_sources()?;
    let mut attempts: Vec<String> = package.suites.iter().filter_map(|s| sources::turned_to(&own, s)).collect();
    // On other distributions the package may be in the sources as they are.
    attempts.push(sources::unchanged(&own));
    let mut last = None;
    for text in attempts {
        let apt = Apt::new(work, &text, package.architecture)?;
        progress.step("reading the package lists");
        let update = apt.run("apt-get", &["update"]);
        match apt.record(package) {
            Ok(record) => return apt.download(&package, record, work, progress),
            Err(e) => last = Some(update.err().unwrap_or(e)),
        }
    }
    Err(last.unwrap_or(GuestError::NoSources))
}

/// Downloads packages with all that they depend on, as for a system that has nothing, and unpacks them into `root`.
pub fn fetch_all(
    packages: &[&str],
    architecture: &str,
    suites: &[&str],
    work: &Path,
    root: &Path,
    progress: &dyn Progress,
) -> Result<(), GuestError> {
    let own = own_sources()?;
    let attempts: Vec<String> = suites.iter().filter_map(|s| sources::turned_to(&own, s)).collect();
    let mut last = GuestError::NoSources;
    for text in attempts {
        let mut apt = Apt::new(work, &text, None)?;
        apt.as_for_nothing(work, architecture)?;
        progress.step("reading the package lists");
        let fetched = apt.run("apt-get", &["update"]).and_then(|_| {
            progress.step(&format!("fetching {} and what they need", packages.join(", ")));
            let install = ["--yes", "--no-install-recommends", "--download-only", "install"];
            apt.run("apt-get", &[&install[..], packages].concat())
        });
        match fetched {
            Ok(_) => {
                progress.step("unpacking");
                return debs(&work.join("apt/cache/archives"))?.iter().try_for_each(|deb| extract(deb, root));
            }
            Err(e) => last = e,
        }
    }
    Err(last)
}

struct Apt {
    options: Vec<String>,
}

impl Apt {
    fn new(work: &Path, sources: &str, architecture: Option<&str>) -> Result<Self, GuestError> {
        let apt = work.join("apt");
        let _ = fs::remove_dir_all(&apt);
        for dir in ["lists/partial", "cache/archives/partial", "parts"] {
            let dir = apt.join(dir);
            fs::create_dir_all(&dir).map_err(|e| GuestError::io("create", &dir, &e))?;
        }
        let file = apt.join("parts/guest.sources");
        fs::write(&file, sources).map_err(|e| GuestError::io("write", &file, &e))?;
        let mut options: Vec<String> = [
            ("Dir::Etc::sourcelist", PathBuf::from("/dev/null")),
            ("Dir::Etc::sourceparts", apt.join("parts")),
            ("Dir::State::lists", apt.join("lists")),
            ("Dir::Cache", apt.join("cache")),
        ]
        .iter()
        .map(|(key, path)| format!("{key}={}", path.display()))
        .collect();
        options.push("Acquire::Languages=none".into());
        options.push("Acquire::Retries=3".into());
        // Only package lists are needed, not the other indexes a desktop asks for.
        for index in ["DEP-11", "DEP-11-icons", "DEP-11-icons-small", "DEP-11-icons-hidpi", "CNF", "Contents-deb"] {
            options.push(format!("Acquire::IndexTargets::deb::{index}::DefaultEnabled=false"));
        }
        // Run by root, apt would drop to a user that cannot write below root's cache.
        options.push("APT::Sandbox::User=root".into());
        if let Some(architecture) = architecture {
            options.push(format!("APT::Architectures::={architecture}"));
        }
        Ok(Apt { options })
    }

    /// Packages are to be chosen for a system of an architecture on which nothing is installed.
    fn as_for_nothing(&mut self, work: &Path, architecture: &str) -> Result<(), GuestError> {
        let status = work.join("apt/status");
        fs::write(&status, "").map_err(|e| GuestError::io("write", &status, &e))?;
        self.options.push(format!("Dir::State::status={}", status.display()));
        self.options.push(format!("APT::Architecture={architecture}"));
        self.options.push(format!("APT::Architectures={architecture}"));
        self.options.push("Debug::NoLocking=true".into());
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("LC_ALL", "C").arg("-q").stdin(Stdio::null());
        for option in &self.options {
            command.args(["-o", option]);
        }
        command
    }

    fn run(&self, program: &'static str, args: &[&str]) -> Result<String, GuestError> {
        let output = self.command(program).args(args).output().map_err(|e| GuestError::tool(program, &e))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(GuestError::Apt { what: format!("{program} {}", args.join(" ")), says: first_error(&output.stderr) })
    }

    fn record(&self, package: Package) -> Result<Record, GuestError> {
        let name = package.full_name();
        let text = self.show(&name)?;
        let Some(prefix) = package.dependency else {
            return parse_record(&text).ok_or(GuestError::NotFound { package: name });
        };
        let missing = || GuestError::NotFound { package: format!("{prefix}… (a dependency of {name})") };
        let real = dependency(&text, prefix).ok_or_else(missing)?;
        parse_record(&self.show(&package.qualified(&real))?).ok_or_else(missing)
    }

    fn show(&self, name: &str) -> Result<String, GuestError> {
        self.run("apt-cache", &["show", "--no-all-versions", name]).map_err(|e| match e {
            GuestError::Apt { .. } => GuestError::NotFound { package: name.to_owned() },
            other => other,
        })
    }

    fn download(
        &self,
        package: &Package,
        record: Record,
        work: &Path,
        progress: &dyn Progress,
    ) -> Result<Record, GuestError> {
        let dir = work.join("deb");
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).map_err(|e| GuestError::io("create", &dir, &e))?;
        progress.step(&format!("fetching {} {}", record.package, record.version));
        let full_name = package.qualified(&record.package);
        let mut child = self
            .command("apt-get")
            .args(["download", &full_name])
            .current_dir(&dir)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| GuestError::tool("apt-get", &e))?;
        // apt tells how far it is only to terminals; the file's length tells it too.
        while child.try_wait().map_err(|e| GuestError::tool("apt-get", &e))?.is_none() {
            progress.download(directory_size(&dir), record.size);
            std::thread::sleep(Duration::from_millis(50));
        }
        let output = child.wait_with_output().map_err(|e| GuestError::tool("apt-get", &e))?;
        if !output.status.success() {
            return Err(GuestError::Apt {
                what: format!("apt-get download {full_name}"),
                says: first_error(&output.stderr),
            });
        }
        progress.download(record.size, record.size);
        let deb = only_deb(&dir)?;
        verify(&deb, &record)?;
        progress.step("unpacking");
        unpack(&deb, &work.join("root"))?;
        Ok(record)
    }
}

/// The machine's enabled sources.
fn own_sources() -> Result<Vec<Source>, GuestError> {
    let (list, parts) = source_paths();
    let mut files = vec![list];
    if let Ok(entries) = fs::read_dir(&parts) {
        files.extend(entries.flatten().map(|e| e.path()));
    }
    files.sort();
    let mut sources = Vec::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        match file.extension().and_then(|e| e.to_str()) {
            Some("sources") => sources.extend(sources::parse_deb822(&text)),
            Some("list") => sources.extend(sources::parse_list(&text)),
            _ => {}
        }
    }
    if sources.is_empty() { Err(GuestError::NoSources) } else { Ok(sources) }
}

/// Where this machine's apt keeps its sources.
fn source_paths() -> (PathBuf, PathBuf) {
    let output = Command::new("apt-config")
        .args(["shell", "LIST", "Dir::Etc::sourcelist/f", "PARTS", "Dir::Etc::sourceparts/d"])
        .output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    let value = |name: &str, default: &str| -> PathBuf {
        let found = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix('='));
        found.map(|v| v.trim_matches('\'')).filter(|v| !v.is_empty()).unwrap_or(default).into()
    };
    (value("LIST", "/etc/apt/sources.list"), value("PARTS", "/etc/apt/sources.list.d"))
}

fn parse_record(text: &str) -> Option<Record> {
    let stanza = text.split("\n\n").next()?;
    let field = |name: &str| stanza.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(": ")).map(str::trim);
    let sha256 = field("SHA256")?.to_ascii_lowercase();
    (sha256.len() == 64).then_some(())?;
    Some(Record {
        package: field("Package")?.to_owned(),
        version: field("Version")?.to_owned(),
        size: field("Size")?.parse().ok()?,
        sha256,
    })
}

/// The first name in the record's `Depends` that begins with `prefix` (Debian policy 7.1).
fn dependency(text: &str, prefix: &str) -> Option<String> {
    let depends = text.lines().find_map(|l| l.strip_prefix("Depends:"))?;
    let names = depends.split([',', '|']).filter_map(|d| d.split([' ', '(', ':']).find(|w| !w.is_empty()));
    names.into_iter().find(|n| n.starts_with(prefix)).map(str::to_owned)
}

/// apt's first complaint.
fn first_error(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let line = text.lines().find(|l| l.starts_with("E:")).or_else(|| text.lines().find(|l| !l.trim().is_empty()));
    line.map_or("no reason given".into(), |l| l.trim_start_matches("E:").trim().to_owned())
}

fn directory_size(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else {
        return 0;
    };
    entries.flatten().filter_map(|e| e.metadata().ok()).map(|m| if m.is_file() { m.len() } else { 0 }).sum()
}

/// The packages in a directory, in order of their names.
fn debs(dir: &Path) -> Result<Vec<PathBuf>, GuestError> {
    let entries = fs::read_dir(dir).map_err(|e| GuestError::io("read", dir, &e))?;
    let is_deb = |p: &PathBuf| p.extension().is_some_and(|x| x == "deb");
    let mut found: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(is_deb).collect();
    found.sort();
    if found.is_empty() {
        return Err(GuestError::Apt { what: "apt-get download".into(), says: "it left no package".into() });
    }
    Ok(found)
}

fn only_deb(dir: &Path) -> Result<PathBuf, GuestError> {
    debs(dir).map(|mut found| found.swap_remove(0))
}

fn verify(deb: &Path, record: &Record) -> Result<(), GuestError> {
    let found = sha256_file(deb)?;
    if found == record.sha256 {
        Ok(())
    } else {
        Err(GuestError::Checksum { file: deb.display().to_string(), expected: record.sha256.clone(), found })
    }
}

/// SHA-256 of a file, hexadecimal.
pub fn sha256_file(path: &Path) -> Result<String, GuestError> {
    let fail = |e: std::io::Error| GuestError::io("read", path, &e);
    let mut file = fs::File::open(path).map_err(fail)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match std::io::Read::read(&mut file, &mut buffer).map_err(fail)? {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    Ok(super::hex(&hash.finalize()))
}

fn unpack(deb: &Path, root: &Path) -> Result<(), GuestError> {
    let _ = fs::remove_dir_all(root);
    fs::create_dir_all(root).map_err(|e| GuestError::io("create", root, &e))?;
    extract(deb, root)
}

/// Adds a package's files to those below `root`.
fn extract(deb: &Path, root: &Path) -> Result<(), GuestError> {
    let output =
        Command::new("dpkg-deb").arg("-x").args([deb, root]).output().map_err(|e| GuestError::tool("dpkg-deb", &e))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(GuestError::Apt { what: format!("dpkg-deb -x {}", deb.display()), says: first_error(&output.stderr) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies() {
        let text = "Package: m\nDepends: linux-base (= 1), linux-image-6.1-amd64:any (= 6.1) | x\n";
        let found = |prefix| dependency(text, prefix);
        assert_eq!(found("linux-image-").as_deref(), Some("linux-image-6.1-amd64"));
        assert_eq!(found("linux-headers-"), None);
    }

    #[test]
    fn records() {
        let hash = "ab".repeat(32);
        let text = format!("Package: x\nVersion: 1:2-3\nSize: 77\nSHA256: {hash}\n\nPackage: x\nVersion: 9\n");
        assert_eq!(
            parse_record(&text),
            Some(Record { package: "x".into(), version: "1:2-3".into(), size: 77, sha256: hash })
        );
        assert_eq!(parse_record("Package: x\nVersion: 1\nSize: 3\nSHA256: 12\n"), None);
        assert_eq!(first_error(b"W: x\nE: Unable to locate\nE: y\n"), "Unable to locate");
    }
}
