//! Who may depend on whom: lowest first, each crate only on those its row names.
//!
//! Guests and hosts meet in the IR only; translator, KVM and devices do not see one
//! another; boards see no accelerator. The compiler keeps to these rules once the manifests do.

use anyhow::bail;
use serde_json::Value;

/// (crate, what it may use, what it may use besides in builds and tests: a frontend's tests
/// run its guest code on a real backend)
const RULES: &[(&str, &[&str], &[&str])] = &[
    ("mimus-arch", &[], &[]),
    ("mimus-tcg-decode", &[], &[]),
    ("mimus-tcg-softfloat", &[], &[]),
    ("mimus-tcg-ir", &[], &["mimus-tcg-softfloat"]),
    ("mimus-core", &["mimus-arch"], &[]),
    ("mimus-gdbstub", &["mimus-core", "mimus-arch"], &[]),
    ("mimus-debug", &["mimus-core", "mimus-arch"], &[]),
    ("mimus-tcg-exec", &["mimus-core", "mimus-arch", "mimus-tcg-ir"], &["mimus-tcg-softfloat"]),
    (
        "mimus-tcg-frontend-*",
        &["mimus-core", "mimus-arch", "mimus-tcg-ir", "mimus-tcg-exec", "mimus-tcg-softfloat"],
        &["mimus-tcg-decode", "mimus-tcg-backend-*"],
    ),
    ("mimus-tcg-backend-*", &["mimus-tcg-ir"], &["mimus-tcg-softfloat"]),
    ("mimus-tcg", &["mimus-core", "mimus-arch", "mimus-tcg-*"], &["mimus-tcg-*"]),
    ("mimus-accel-kvm", &["mimus-core", "mimus-arch"], &[]),
    ("mimus-devices", &["mimus-core", "mimus-arch"], &[]),
    ("mimus-machines", &["mimus-core", "mimus-arch", "mimus-devices"], &[]),
    ("mimus", &["mimus-*"], &["mimus-*"]),
    ("mimus-tests", &["mimus-*"], &["mimus-*"]),
    ("mimus-xtask", &["mimus-machines"], &[]),
];

/// Checks the workspace.
pub fn check() -> anyhow::Result<()> {
    let wrong = violations(&crate::metadata()?);
    if wrong.is_empty() {
        println!("check-deps: every dependency is allowed");
        return Ok(());
    }
    for line in &wrong {
        eprintln!("{line}");
    }
    bail!("{} dependencies are not allowed; the rules are in tests/xtask/src/deps.rs", wrong.len())
}

fn violations(metadata: &Value) -> Vec<String> {
    let mut wrong = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        let Some((_, uses, besides)) = RULES.iter().find(|(rule, _, _)| matches(rule, name)) else {
            wrong.push(format!("{name}: no rule says what it may use"));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let used = dependency["name"].as_str().unwrap_or_default();
            // Only ours have a path.
            if dependency["path"].is_null() || used == name {
                continue;
            }
            let normal = dependency["kind"].is_null();
            let allowed = |list: &[&str]| list.iter().any(|rule| matches(rule, used));
            if !(allowed(uses) || !normal && allowed(besides)) {
                wrong.push(format!("{name} must not depend on {used}"));
            }
        }
    }
    wrong
}

fn matches(rule: &str, name: &str) -> bool {
    rule.strip_suffix('*').map_or(rule == name, |prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, uses: &[(&str, Option<&str>)]) -> Value {
        let deps: Vec<Value> =
            uses.iter().map(|(n, kind)| serde_json::json!({"name": n, "kind": kind, "path": "x"})).collect();
        serde_json::json!({"packages": [{"name": name, "dependencies": deps}]})
    }

    #[test]
    fn rules() {
        assert!(violations(&package("mimus-core", &[("mimus-arch", None)])).is_empty());
        assert_eq!(
            violations(&package("mimus-devices", &[("mimus-tcg", None)])),
            ["mimus-devices must not depend on mimus-tcg"]
        );
        assert!(violations(&package("mimus-tcg-backend-arm64", &[("mimus-tcg-ir", None)])).is_empty());
        assert!(!violations(&package("mimus-tcg-backend-arm64", &[("mimus-core", None)])).is_empty());
        assert!(!violations(&package("mimus-tcg-frontend-x86", &[("mimus-tcg-frontend-riscv", None)])).is_empty());
        assert!(violations(&package("mimus-tcg-frontend-riscv", &[("mimus-tcg-decode", Some("build"))])).is_empty());
        assert!(!violations(&package("mimus-tcg-frontend-riscv", &[("mimus-tcg-decode", None)])).is_empty());
        assert_eq!(violations(&package("mimus-new", &[])), ["mimus-new: no rule says what it may use"]);
    }

    /// The workspace itself keeps to them.
    #[test]
    fn this_workspace() {
        assert_eq!(violations(&crate::metadata().unwrap()), Vec::<String>::new());
    }
}
