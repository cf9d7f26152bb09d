use std::path::Path;

use expect_test::{Expect, expect};

use super::*;

const REFERENCE: &str = include_str!("../../../../docs/agent.md");

/// The example of the reference: the first TOML block.
fn example() -> String {
    let start = REFERENCE.find("```toml\n").expect("docs/agent.md has an example") + 8;
    let length = REFERENCE[start..].find("```").expect("the example ends");
    REFERENCE[start..start + length].to_owned()
}

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, Path::new("/etc/decant/worker.toml"))
}

#[test]
fn the_example_of_the_reference_is_good() {
    let config = parse(&example()).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(config.worker.as_str(), "worker-1");
    assert_eq!(config.tls.ca, Path::new("/etc/decant/ca.pem"));
    assert_eq!(config.socket(), Path::new("/run/decant/agent.sock"));
    assert_eq!(config.drain.retention, Duration::from_secs(24 * 3600));
    assert_eq!(config.peers.len(), 2);
    assert_eq!(config.index_of(&config.peers[1].worker), Some(3));
}

#[test]
fn every_key_is_in_the_reference() {
    for key in [
        "worker",
        "worker_index",
        "region",
        "state_dir",
        "run_dir",
        "listen",
        "data_listen",
        "labels",
        "capacity.machines",
        "capacity.bytes",
        "tls.ca",
        "tls.cert",
        "tls.key",
        "luks.header",
        "keys.source",
        "keys.directory",
        "keys.command",
        "network.id",
        "drain.max_migrations",
        "drain.retention",
        "drain.prepare_timeout",
        "drain.stop_timeout",
        "peers",
        "proxy.services",
        "proxy.max_parked",
        "proxy.max_connections",
        "proxy.park_timeout",
        "program",
    ] {
        assert!(REFERENCE.contains(&format!("| `{key}` |")), "docs/agent.md does not explain `{key}`");
    }
}

fn check(from: &str, to: &str, expected: Expect) {
    let text = example().replacen(from, to, 1);
    assert_ne!(text, example(), "{from:?} is not in the example");
    expected.assert_eq(&parse(&text).expect_err("must be refused").to_string());
}

#[test]
fn errors_name_key_cause_and_fix() {
    check(
        "region",
        "regoin",
        expect![[r#"
        /etc/decant/worker.toml: TOML parse error at line 3, column 1
          |
        3 | regoin = "local"
          | ^^^^^^
        unknown field `regoin`, expected one of `worker`, `worker_index`, `region`, `state_dir`, `run_dir`, `listen`, `data_listen`, `labels`, `capacity`, `tls`, `luks`, `keys`, `network`, `drain`, `iscsi`, `peers`, `proxy`, `program`
          fix: compare with the reference in docs/agent.md"#]],
    );
    check(
        "worker_index = 1\n",
        "",
        expect![[r#"
        /etc/decant/worker.toml: TOML parse error at line 1, column 1
          |
        1 | worker = "worker-1"
          | ^
        missing field `worker_index`
          fix: compare with the reference in docs/agent.md"#]],
    );
    check(
        "listen = \"[",
        "listen = \"x[",
        expect![[r#"
        /etc/decant/worker.toml: TOML parse error at line 6, column 10
          |
        6 | listen = "x[fdde::1]:7070"
          |          ^^^^^^^^^^^^^^^^^
        invalid socket address syntax
          fix: compare with the reference in docs/agent.md"#]],
    );
    check(
        "worker = \"worker-1\"",
        "worker = \"Worker 1\"",
        expect![[r#"
        /etc/decant/worker.toml: TOML parse error at line 1, column 10
          |
        1 | worker = "Worker 1"
          |          ^^^^^^^^^^
        worker "Worker 1" is not valid: use 1 to 63 characters of a-z, 0-9 and '-', not starting or ending with '-'
          fix: compare with the reference in docs/agent.md"#]],
    );
    check(
        "data_listen = \"[fdde::1]",
        "data_listen = \"[::]",
        expect![[r#"
        /etc/decant/worker.toml: key `data_listen`: :: is no address that a peer can connect to
          fix: write the address of this worker that the peers reach, e.g. "[fdde::1]:0""#]],
    );
    check(
        "\"1TiB\"",
        "\"1 terabyte\"",
        expect![[r#"
        /etc/decant/worker.toml: key `capacity.bytes`: "1 terabyte" is not a size: write a number with KiB, MiB, GiB or TiB, e.g. 4GiB
          fix: write a size such as "1TiB""#]],
    );
    check(
        "\"16MiB\"",
        "\"5MiB\"",
        expect![[r#"
        /etc/decant/worker.toml: key `luks.header`: a header of 5 MiB is not made here
          fix: write "4MiB" or "16MiB"; what peers use does not matter"#]],
    );
    check(
        "retention = \"24h\"",
        "retention = \"a day\"",
        expect![[r#"
        /etc/decant/worker.toml: key `drain.retention`: "a day" is no duration
          fix: write a number with ms, s, m, h or d, e.g. "24h""#]],
    );
    check(
        "max_migrations = 2",
        "max_migrations = 0",
        expect![[r#"
        /etc/decant/worker.toml: key `drain.max_migrations`: 0 machines at a time never end
          fix: write at least 1"#]],
    );
    check(
        "source = \"file\"",
        "source = \"vault\"",
        expect![[r#"
        /etc/decant/worker.toml: TOML parse error at line 20, column 10
           |
        20 | source = "vault"
           |          ^^^^^^^
        unknown variant `vault`, expected one of `file`, `command`, `keyring`
          fix: compare with the reference in docs/agent.md"#]],
    );
    check(
        "worker = \"worker-2\"",
        "worker = \"worker-1\"",
        expect![[r#"
        /etc/decant/worker.toml: key `peers[0].worker`: worker-1 is named twice
          fix: list every other worker once, and not this one"#]],
    );
    check(
        "worker_index = 3",
        "worker_index = 2",
        expect![[r#"
        /etc/decant/worker.toml: key `peers[1].worker_index`: 2 is the index of worker-2 already
          fix: give every worker of the fleet its own index"#]],
    );
}

#[test]
fn a_missing_file_is_named() {
    let error = Config::load(Path::new("/nonexistent/worker.toml")).expect_err("there is none");
    expect![[r#"
        cannot read /nonexistent/worker.toml: No such file or directory (os error 2)
          fix: name the worker's configuration with --config"#]]
    .assert_eq(&error.to_string());
}
