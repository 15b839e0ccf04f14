//! Package sources: this machine's own, turned to another suite.
//!
//! Formats: sources.list(5), one line or deb822 stanza for each source. Nothing is
//! invented: addresses, keys and components stay as the machine's administrator set them.

/// Suites of Debian. A source with one of these serves the others from the same address.
const DEBIAN: &[&str] = &[
    "oldoldstable",
    "oldstable",
    "stable",
    "testing",
    "unstable",
    "sid",
    "buster",
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "duke",
];

/// One source in deb822 form, without the fields that choose suite and architecture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Addresses.
    pub uris: String,
    /// Suites.
    pub suites: Vec<String>,
    /// Components; empty for flat repositories.
    pub components: String,
    /// All other fields, as written: `Signed-By: …` and such, continuation lines included.
    pub others: Vec<String>,
}

impl Source {
    /// Whether this serves Debian's main archive (not its security archive).
    pub fn is_debian(&self) -> bool {
        self.components.split_whitespace().any(|c| c == "main")
            && self.suites.iter().any(|s| {
                let base = s.split_once('-').map_or(s.as_str(), |(base, suffix)| {
                    if matches!(suffix, "updates" | "backports" | "proposed-updates") { base } else { "" }
                });
                DEBIAN.contains(&base)
            })
    }

    /// As a deb822 stanza, with `suites` and `components` in place of its own if given.
    pub fn stanza(&self, suites: Option<&str>, components: Option<&str>) -> String {
        let mut out = format!(
            "Types: deb\nURIs: {}\nSuites: {}\n",
            self.uris,
            suites.map_or(self.suites.join(" "), str::to_owned)
        );
        let components = components.unwrap_or(&self.components);
        if !components.is_empty() {
            out.push_str(&format!("Components: {components}\n"));
        }
        for line in &self.others {
            out.push_str(line);
            out.push('\n');
        }
        out
    }
}

/// Reads a `.sources` file.
pub fn parse_deb822(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut stanza: Vec<&str> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            sources.extend(source_of(&stanza));
            stanza.clear();
        } else {
            stanza.push(line);
        }
    }
    sources
}

fn source_of(stanza: &[&str]) -> Option<Source> {
    let mut source = Source { uris: String::new(), suites: Vec::new(), components: String::new(), others: Vec::new() };
    let mut binary = false;
    // Continuation lines (they begin with a space) belong to the field before.
    let mut fields: Vec<(String, Vec<&str>)> = Vec::new();
    for line in stanza {
        match line.split_once(':') {
            Some((name, _)) if !line.starts_with([' ', '\t']) => {
                fields.push((name.trim().to_ascii_lowercase(), vec![line]))
            }
            _ => fields.last_mut()?.1.push(line),
        }
    }
    for (name, lines) in fields {
        let value = || {
            let first = lines[0].split_once(':').map_or("", |(_, v)| v);
            let words: Vec<&str> =
                first.split_whitespace().chain(lines[1..].iter().flat_map(|l| l.split_whitespace())).collect();
            words.join(" ")
        };
        match name.as_str() {
            "types" => binary = value().split(' ').any(|t| t == "deb"),
            "uris" => source.uris = value(),
            "suites" => source.suites = value().split(' ').map(str::to_owned).collect(),
            "components" => source.components = value(),
            "enabled" if matches!(value().as_str(), "no" | "false" | "0") => return None,
            "enabled" | "architectures" | "architectures-add" | "architectures-remove" | "targets" | "pdiffs" => {}
            _ => source.others.extend(lines.iter().map(|l| (*l).to_owned())),
        }
    }
    (binary && !source.uris.is_empty() && !source.suites.is_empty()).then_some(source)
}

/// Reads a `.list` file.
pub fn parse_list(text: &str) -> Vec<Source> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Source> {
    let line = line.split('#').next()?.trim();
    let rest = line.strip_prefix("deb")?.strip_prefix([' ', '\t'])?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(inner) => inner.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    let (uri, suite) = (words.next()?, words.next()?);
    let others = options.split_whitespace().filter_map(|o| {
        let (key, value) = o.split_once('=')?;
        match key.to_ascii_lowercase().as_str() {
            "arch" | "arch+" | "arch-" | "target" => None,
            // The stanza's names of the line's options (sources.list(5), "OPTIONS").
            "signed-by" => Some(format!("Signed-By: {}", value.replace(',', " "))),
            "lang" => None,
            "trusted" => Some(format!("Trusted: {value}")),
            "check-valid-until" => Some(format!("Check-Valid-Until: {value}")),
            "allow-insecure" => Some(format!("Allow-Insecure: {value}")),
            _ => None,
        }
    });
    Some(Source {
        uris: uri.into(),
        suites: vec![suite.into()],
        components: words.collect::<Vec<_>>().join(" "),
        others: others.collect(),
    })
}

/// A `.sources` file in which each of `sources` that is Debian's archive serves `suite`.
/// `None` if none is.
pub fn turned_to(sources: &[Source], suite: &str) -> Option<String> {
    let mut seen = Vec::new();
    for source in sources.iter().filter(|s| s.is_debian()) {
        // The same archive is often listed once for each suite.
        let stanza = source.stanza(Some(suite), Some("main"));
        if !seen.contains(&stanza) {
            seen.push(stanza);
        }
    }
    (!seen.is_empty()).then(|| seen.join("\n"))
}

/// A `.sources` file with the sources unchanged.
pub fn unchanged(sources: &[Source]) -> String {
    sources.iter().map(|s| s.stanza(None, None)).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "\
# comment
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Architectures: amd64
Signed-By: /usr/share/keyrings/key.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main

Types: deb
Enabled: no
URIs: http://off.example
Suites: stable
Components: main

Types: deb
URIs: http://keyed.example/debian
Suites: sid
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc
 -----END PGP PUBLIC KEY BLOCK-----
";

    #[test]
    fn deb822() {
        let sources = parse_deb822(DEB822);
        assert_eq!(sources.len(), 3);
        assert_eq!(sources.iter().map(Source::is_debian).collect::<Vec<_>>(), [true, false, true]);
        let text = turned_to(&sources, "trixie").unwrap();
        assert!(text.starts_with("Types: deb\nURIs: http://mirror.example/debian\nSuites: trixie\nComponents: main\nSigned-By: /usr/share/keyrings/key.gpg\n\n"), "{text}");
        assert!(text.contains(" -----BEGIN PGP") && !text.contains("security") && !text.contains("amd64"), "{text}");
    }

    #[test]
    fn one_line() {
        let text = "deb [arch=amd64 signed-by=/k.gpg] http://m.example/debian stable main # c\ndeb-src http://m.example/debian stable main\n#deb x y z\ndeb http://third.example/apt nodistro main\ndeb http://m.example/debian stable main contrib\n";
        let sources = parse_list(text);
        assert_eq!(sources.len(), 3);
        let turned = turned_to(&sources, "trixie").unwrap();
        assert_eq!(turned.matches("URIs:").count(), 2);
        assert!(turned.contains("Signed-By: /k.gpg") && !turned.contains("third"), "{turned}");
        assert!(turned_to(&sources[1..2], "trixie").is_none());
        assert!(unchanged(&sources).contains("Suites: nodistro"));
    }

    #[test]
    fn rubbish_is_ignored() {
        assert!(parse_deb822(" leading\nTypes: deb\n\n:::\n").is_empty());
        assert!(parse_list("deb\ndeb [x\ndeb [] http://x\n").is_empty());
    }
}
