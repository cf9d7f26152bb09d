//! cargo-deny: licences, bans and sources. Advisories need the advisory database, which is fetched from outside the crate
//! registry, so they are a command of their own: `cargo deny check advisories`.

use std::process::Stdio;

/// Runs cargo-deny, after installing it from the crate registry where it is missing.
pub(crate) fn run() -> anyhow::Result<()> {
    let probe = crate::cargo().args(["deny", "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !probe.is_ok_and(|status| status.success()) {
        println!("installing cargo-deny with cargo install, to check licences");
        crate::run(crate::cargo().args(["install", "--locked", "--quiet", "cargo-deny"]))?;
    }
    crate::run(crate::cargo().args(["deny", "--log-level", "error", "check", "licenses", "bans", "sources"]))
}
