//! The examples of docs/export.md and docs/clone.md, run as they stand.

mod tool;

use std::path::Path;
use std::process::Command;

use tool::{directory, text};

/// All `sh` blocks of a page as one script.
fn script(page: &str) -> String {
    let mut script = String::from("set -eu\n");
    let mut lines = page.lines();
    while lines.any(|line| line == "```sh") {
        for line in lines.by_ref().take_while(|line| *line != "```") {
            script.push_str(line);
            script.push('\n');
        }
    }
    script
}

fn run_page(name: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let page = std::fs::read_to_string(root.join("docs").join(name)).expect("the page");
    let script = script(&page);
    assert!(script.lines().count() > 10, "{name} has examples");
    let program = Path::new(env!("CARGO_BIN_EXE_decant")).parent().expect("a directory");
    let path = format!("{}:{}", program.display(), std::env::var("PATH").expect("PATH"));
    let directory = directory();
    let output = Command::new("timeout")
        .args([
            "-s",
            "TERM",
            "120",
            "bash",
            "-x",
            "-c",
            &format!("trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{script}"),
        ])
        .current_dir(directory.path())
        .env("PATH", path)
        .output()
        .expect("bash");
    println!("{name}:\n{}", text(&output));
    assert!(output.status.success(), "{name}: {}", output.status);
}

#[test]
fn the_examples_of_export_run() {
    run_page("export.md");
}

#[test]
fn the_examples_of_clone_run() {
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        return println!("SKIP the_examples_of_clone_run: needs root and /dev/fuse");
    }
    run_page("clone.md");
}
