//! Whether a machine can run here: looked at on the host, before anything is made.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Mutex;

use sha2::{Digest, Sha256};

use crate::spec::MachineSpec;

/// Trees of the root that are made or shared by the shim; nothing of a machine's own can be bound over or into them.
const TAKEN: [&str; 13] =
    ["usr", "etc", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "proc", "dev", "data", "sys", "run"];
/// Trees of the host that every machine sees under the same name.
const SHARED: [&str; 8] = ["usr", "etc", "bin", "sbin", "lib", "lib32", "lib64", "libx32"];

/// The program's file on the host, or why the machine cannot run here.
pub(super) fn check(spec: &MachineSpec) -> Result<PathBuf, String> {
    let program = spec.command.first().ok_or("it has no command")?;
    if spec.uid == 0 || spec.gid == 0 {
        return Err("user and group 0 are the host's root; name another".to_owned());
    }
    if !(1..=31).contains(&spec.stop_signal) {
        return Err(format!("{} is no stop signal: use 1 to 31", spec.stop_signal));
    }
    if spec.address_index == 0 {
        return Err("its address index is 0; they start at 1".to_owned());
    }
    let texts = spec.command.iter().chain(spec.env.keys()).chain(spec.env.values());
    if texts.into_iter().any(|text| text.contains('\0'))
        || spec.env.keys().any(|key| key.is_empty() || key.contains('='))
    {
        return Err("its command or environment has a NUL, or a variable without a proper name".to_owned());
    }
    for bind in &spec.binds {
        check_target(&bind.target)?;
        if !bind.source.is_absolute() {
            return Err(format!("the bind source {} is not an absolute path", bind.source.display()));
        }
        fs::metadata(&bind.source).map_err(|error| format!("the bind source {}: {error}", bind.source.display()))?;
    }
    let on_host = on_host(spec, Path::new(program))?;
    let meta = fs::metadata(&on_host).map_err(|error| format!("its program {}: {error}", on_host.display()))?;
    if !meta.is_file() || meta.permissions().mode() & 0o111 == 0 {
        return Err(format!("its program {} is not an executable file", on_host.display()));
    }
    Ok(on_host)
}

/// The names a plain absolute path consists of.
fn names(path: &Path) -> Option<Vec<&str>> {
    let mut parts = path.components();
    if parts.next() != Some(Component::RootDir) {
        return None;
    }
    parts.map(|part| if let Component::Normal(name) = part { name.to_str() } else { None }).collect()
}

fn check_target(target: &Path) -> Result<(), String> {
    let name = || target.display();
    let names = names(target).filter(|names| !names.is_empty());
    let names = names.ok_or_else(|| format!("the bind target {} is not a plain absolute path", name()))?;
    if names.first().is_some_and(|first| TAKEN.contains(first)) {
        return Err(format!("nothing can be bound at {}: use /opt or a directory of its own", name()));
    }
    Ok(())
}

/// Where the host has what the machine sees at `path`.
fn on_host(spec: &MachineSpec, path: &Path) -> Result<PathBuf, String> {
    let names = names(path).ok_or_else(|| format!("its program {} is not a plain absolute path", path.display()))?;
    let bind = spec
        .binds
        .iter()
        .filter(|bind| path.starts_with(&bind.target))
        .max_by_key(|bind| bind.target.components().count());
    if let Some(bind) = bind {
        let rest = path.strip_prefix(&bind.target).unwrap_or(Path::new(""));
        // Joining nothing would add a slash, which a file does not take.
        return Ok(if rest.as_os_str().is_empty() { bind.source.clone() } else { bind.source.join(rest) });
    }
    if names.first().is_some_and(|first| SHARED.contains(first)) {
        return Ok(path.to_owned());
    }
    Err(format!("its program {} is neither below /usr or /etc nor bound", path.display()))
}

/// Digests of programs, by the file they were taken of.
#[derive(Debug, Default)]
pub(super) struct Digests(Mutex<BTreeMap<Version, String>>);

/// Device, inode, size and time of change: a file whose bytes have changed has another.
type Version = (u64, u64, u64, i64, i64);

impl Digests {
    /// SHA-256, hex, of the file at `path`.
    pub(super) fn of(&self, path: &Path) -> Result<String, String> {
        let failed = |error: std::io::Error| format!("cannot read {}: {error}", path.display());
        let mut file = File::open(path).map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        let key = (meta.dev(), meta.ino(), meta.size(), meta.ctime(), meta.ctime_nsec());
        if let Some(digest) = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get(&key) {
            return Ok(digest.clone());
        }
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 256 * 1024];
        loop {
            match file.read(&mut buffer).map_err(failed)? {
                0 => break,
                length => hash.update(&buffer[..length]),
            }
        }
        let digest: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(key, digest.clone());
        Ok(digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(change: impl FnOnce(&mut serde_json::Value)) -> MachineSpec {
        let mut spec = serde_json::json!({"id": "orders", "command": ["/bin/sh"], "address_index": 1});
        change(&mut spec);
        serde_json::from_value(spec).expect("a spec")
    }

    #[test]
    fn what_cannot_run_is_told_why() {
        let bind = |source: &str, target: &str| serde_json::json!([{"source": source, "target": target}]);
        type Change = Box<dyn FnOnce(&mut serde_json::Value)>;
        let cases: Vec<(Change, &str)> = vec![
            (Box::new(|s| s["command"] = serde_json::json!([])), "it has no command"),
            (Box::new(|s| s["command"][0] = "sh".into()), "its program sh is not a plain absolute path"),
            (
                Box::new(|s| s["command"][0] = "/usr/../bin/sh".into()),
                "its program /usr/../bin/sh is not a plain absolute path",
            ),
            (
                Box::new(|s| s["command"][0] = "/opt/x".into()),
                "its program /opt/x is neither below /usr or /etc nor bound",
            ),
            (
                Box::new(|s| s["command"][0] = "/bin/nosuch".into()),
                "its program /bin/nosuch: No such file or directory (os error 2)",
            ),
            (Box::new(|s| s["command"][0] = "/etc/passwd".into()), "its program /etc/passwd is not an executable file"),
            (Box::new(|s| s["uid"] = 0.into()), "user and group 0 are the host's root; name another"),
            (Box::new(|s| s["stop_signal"] = 99.into()), "99 is no stop signal: use 1 to 31"),
            (Box::new(|s| s["address_index"] = 0.into()), "its address index is 0; they start at 1"),
            (
                Box::new(move |s| s["binds"] = bind("/nosuch", "/opt/x")),
                "the bind source /nosuch: No such file or directory (os error 2)",
            ),
            (
                Box::new(move |s| s["binds"] = bind("/bin/sh", "/usr/x")),
                "nothing can be bound at /usr/x: use /opt or a directory of its own",
            ),
            (Box::new(move |s| s["binds"] = bind("/bin/sh", "/")), "the bind target / is not a plain absolute path"),
        ];
        for (change, want) in cases {
            assert_eq!(check(&spec(change)).expect_err(want), want);
        }
    }

    #[test]
    fn the_program_is_found_where_the_host_has_it() {
        assert_eq!(check(&spec(|_| {})).expect("fits"), Path::new("/bin/sh"));
        let bound = |command: &'static str, target: &'static str, source: &'static str| {
            check(&spec(|s| {
                s["command"] = serde_json::json!([command]);
                s["binds"] = serde_json::json!([{"source": source, "target": target}]);
            }))
        };
        assert_eq!(bound("/opt/app", "/opt/app", "/bin/sh").expect("fits"), Path::new("/bin/sh"));
        assert_eq!(bound("/opt/app/sh", "/opt/app", "/usr/bin").expect("fits"), Path::new("/usr/bin/sh"));
    }

    #[test]
    fn a_digest_follows_its_file() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("program");
        let digests = Digests::default();
        fs::write(&path, "abc").expect("written");
        let first = digests.of(&path).expect("a digest");
        assert_eq!(first, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        fs::write(&path, "abcd").expect("written");
        assert_ne!(digests.of(&path).expect("a digest"), first);
    }
}
