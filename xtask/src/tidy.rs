//! The shape of the tree as a test: crate edges, lengths, headings against the map, words that must not stand in a landing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};

/// Each crate and the crates of this workspace it may depend on (dev-dependencies are free).
/// Direction: base <- cores, dataplane, fsm <- drain <- agent <- decant; the planes hang on dataplane and the cores.
const EDGES: &[(&str, &[&str])] = &[
    ("decant-base", &[]),
    ("decant-nbd", &["decant-base"]),
    ("decant-iscsi", &["decant-base"]),
    ("decant-luks2", &["decant-base"]),
    ("decant-clone", &["decant-base"]),
    ("decant-fsm", &["decant-base"]),
    ("decant-network", &["decant-base"]),
    ("decant-machine", &["decant-base"]),
    ("decant-dataplane", &["decant-base"]),
    ("decant-drain", &["decant-base", "decant-dataplane", "decant-fsm"]),
    (
        "decant-dataplane-user",
        &["decant-base", "decant-clone", "decant-dataplane", "decant-iscsi", "decant-luks2", "decant-nbd"],
    ),
    ("decant-api", &["decant-base", "decant-dataplane", "decant-drain", "decant-machine", "decant-network"]),
    (
        "decant-agent",
        &[
            "decant-api",
            "decant-base",
            "decant-dataplane",
            "decant-dataplane-user",
            "decant-drain",
            "decant-fsm",
            "decant-machine",
            "decant-network",
        ],
    ),
    (
        "decant",
        &[
            "decant-agent",
            "decant-api",
            "decant-base",
            "decant-dataplane",
            "decant-dataplane-user",
            "decant-drain",
            "decant-machine",
            "decant-network",
        ],
    ),
];

/// Crates without I/O: they forbid unsafe code and never read a clock, sleep, open a file or a socket.
const CORES: &[&str] = &["decant-nbd", "decant-iscsi", "decant-clone", "decant-drain", "decant-dataplane"];

/// What a core may not say outside its tests.
const NOT_IN_CORES: &[&str] =
    &["Instant::now", "SystemTime::now", "thread::sleep", "std::fs::", "std::net::Tcp", "thread::spawn", "tokio"];

/// What may stand nowhere. Each is spelt in two halves, so that this file does not name itself.
const NOWHERE: &[(&str, &str)] =
    &[("TO", "DO"), ("FIX", "ME"), ("#[ign", "ore"), ("todo", "!("), ("unimpl", "emented!("), ("/wo", "rk/")];

/// Lines of a source file, its test module aside; and lines of any source file at all.
const MAX_LINES: usize = 700;
const MAX_LINES_AT_ALL: usize = 1000;
/// Lines of the map: it must fit in a head.
const MAX_MAP_LINES: usize = 300;

/// Runs every check and prints all that is wrong.
pub(crate) fn run() -> anyhow::Result<()> {
    let root = crate::root();
    let mut wrong = Vec::new();
    let crates = crate_names(&root)?;
    check_edges(&root, &crates, &mut wrong)?;
    check_map(&root, &crates, &mut wrong)?;
    for file in tracked(&root)? {
        let Ok(text) = std::fs::read_to_string(root.join(&file)) else { continue };
        check_words(&file, &text, &mut wrong);
        if file.extension().is_some_and(|extension| extension == "rs") {
            check_length(&file, &text, &mut wrong);
            check_skips(&file, &text, &mut wrong);
            check_core(&file, &text, &mut wrong);
        }
    }
    if wrong.is_empty() {
        println!("tidy: {} crates in order", crates.len());
        return Ok(());
    }
    for line in &wrong {
        eprintln!("tidy: {line}");
    }
    bail!("{} things are untidy", wrong.len());
}

fn crate_names(root: &Path) -> anyhow::Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(root.join("crates"))? {
        let entry = entry?;
        if entry.path().join("Cargo.toml").is_file() {
            names.insert(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(names)
}

fn check_edges(root: &Path, crates: &BTreeSet<String>, wrong: &mut Vec<String>) -> anyhow::Result<()> {
    let output = crate::cargo().args(["metadata", "--no-deps", "--locked", "--format-version", "1"]).output()?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr)))?;
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        if name == "xtask" {
            continue;
        }
        let Some((_, allowed)) = EDGES.iter().find(|(known, _)| *known == name) else {
            wrong.push(format!("crate {name} is not in the table of edges in xtask/src/tidy.rs"));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let to = dependency["name"].as_str().unwrap_or_default();
            if dependency["kind"].is_null() && crates.contains(to) && !allowed.contains(&to) {
                wrong.push(format!("crate {name} may not depend on {to}"));
            }
        }
        let folder = root.join("crates").join(name);
        if !folder.is_dir() {
            wrong.push(format!("crate {name} does not lie in crates/{name}"));
        }
    }
    Ok(())
}

/// ARCHITECTURE.md has one heading per crate and no other crate's; every page of docs/ is linked from it or the README.
fn check_map(root: &Path, crates: &BTreeSet<String>, wrong: &mut Vec<String>) -> anyhow::Result<()> {
    let map = std::fs::read_to_string(root.join("ARCHITECTURE.md")).context("ARCHITECTURE.md")?;
    if map.lines().count() > MAX_MAP_LINES {
        wrong.push(format!("ARCHITECTURE.md is over {MAX_MAP_LINES} lines"));
    }
    let headings: BTreeSet<String> = map
        .lines()
        .filter_map(|line| line.strip_prefix("### `crates/"))
        .filter_map(|rest| rest.split('`').next())
        .map(str::to_owned)
        .collect();
    for name in crates.difference(&headings) {
        wrong.push(format!("ARCHITECTURE.md has no heading for crates/{name}"));
    }
    for name in headings.difference(crates) {
        wrong.push(format!("ARCHITECTURE.md has a heading for crates/{name}, which is not there"));
    }
    let linked = map + &std::fs::read_to_string(root.join("README.md")).context("README.md")?;
    for entry in std::fs::read_dir(root.join("docs")).into_iter().flatten().flatten() {
        let name = format!("docs/{}", entry.file_name().to_string_lossy());
        if name.ends_with(".md") && !linked.contains(&name) {
            wrong.push(format!("{name} is linked from neither README.md nor ARCHITECTURE.md"));
        }
    }
    Ok(())
}

fn tracked(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let output = std::process::Command::new("git").arg("-C").arg(root).args(["ls-files", "-z"]).output()?;
    Ok(String::from_utf8_lossy(&output.stdout)
        .split('\0')
        .filter(|path| !path.is_empty() && *path != "Cargo.lock")
        .map(PathBuf::from)
        .collect())
}

fn check_words(file: &Path, text: &str, wrong: &mut Vec<String>) {
    for (number, line) in text.lines().enumerate() {
        for (head, tail) in NOWHERE {
            if line.contains(&format!("{head}{tail}")) {
                wrong.push(format!("{}:{}: {head}{tail}", file.display(), number + 1));
            }
        }
    }
}

/// A test that cannot run here names itself, in one word: whoever reads the count of those finds it.
fn check_skips(file: &Path, text: &str, wrong: &mut Vec<String>) {
    for (number, line) in text.lines().enumerate() {
        let Some((_, said)) = line.split_once(concat!("\"SKI", "P ")) else { continue };
        if said.split_once(": ").is_some_and(|(test, _)| test.contains(' ')) {
            wrong.push(format!("{}:{}: what cannot run is not named by its test", file.display(), number + 1));
        }
    }
}

fn is_test_file(file: &Path) -> bool {
    file.components().any(|part| part.as_os_str() == "tests") || file.file_name().is_some_and(|name| name == "tests.rs")
}

/// The text before the test module.
fn without_tests(text: &str) -> &str {
    text.find("#[cfg(test)]\nmod ").map_or(text, |at| &text[..at])
}

fn check_length(file: &Path, text: &str, wrong: &mut Vec<String>) {
    let all = text.lines().count();
    let code = without_tests(text).lines().count();
    if all > MAX_LINES_AT_ALL {
        wrong.push(format!("{} has {all} lines, over {MAX_LINES_AT_ALL}", file.display()));
    } else if !is_test_file(file) && code > MAX_LINES {
        wrong.push(format!("{} has {code} lines without its tests, over {MAX_LINES}", file.display()));
    }
}

fn check_core(file: &Path, text: &str, wrong: &mut Vec<String>) {
    let Some(core) = CORES.iter().find(|core| file.starts_with(format!("crates/{core}/src"))) else { return };
    if is_test_file(file) {
        return;
    }
    if file.ends_with("lib.rs") && !text.contains("#![forbid(unsafe_code)]") {
        wrong.push(format!("{core} is a core and must forbid unsafe code"));
    }
    for (number, line) in without_tests(text).lines().enumerate() {
        let code = line.split("//").next().unwrap_or_default();
        for word in NOT_IN_CORES.iter().filter(|word| code.contains(**word)) {
            wrong.push(format!("{}:{}: {word} in a core", file.display(), number + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_that_cannot_run_is_named_by_one_word() {
        let check = |line: &str| {
            let mut wrong = Vec::new();
            check_skips(Path::new("a.rs"), line, &mut wrong);
            wrong.len()
        };
        let skip = |rest: &str| format!("println!(\"SKI{} {rest}\");", "P");
        assert_eq!(check(&skip("a_test: needs root")), 0);
        assert_eq!(check(&skip("{test}: needs root")), 0);
        assert_eq!(check(&skip("shaped links: need root")), 1);
        assert_eq!(check("strip_prefix(\"SKI\")"), 0);
    }
}
