//! What proves who one is to the other side of an export or an origin: CHAP secrets and certificates, from files.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use decant_dataplane_user::export::iscsi::{Chap, Credentials, Secret};
use decant_dataplane_user::tls::{Identity, Paths};

use super::Failure;

/// Most bytes of a file of CHAP secrets.
const MAX_CHAP_FILE: u64 = 16 * 1024;

/// How a `--chap` file is written, for messages.
const CHAP_FORM: &str = "write lines `username = NAME` and `password = SECRET` (12 to 255 bytes), and username_in and password_in if \
                         the target has to prove itself too";

/// Reads a `--chap` file: open-iscsi's names, seen from the initiator, so that one file serves both ends. `username` and
/// `password` are what the initiator proves; `username_in` and `password_in` what the target does.
pub(crate) fn chap(path: &Path) -> Result<Chap, Failure> {
    let wrong =
        |cause: String| Failure::usage("CHAP file not usable", format!("{}: {cause}", path.display()), CHAP_FORM);
    let meta = std::fs::metadata(path).map_err(|error| wrong(error.to_string()))?;
    if meta.mode() & 0o077 != 0 {
        return Err(Failure::usage(
            "CHAP file not usable",
            format!("{}: others than its owner may read it", path.display()),
            format!("chmod 600 {}", path.display()),
        ));
    }
    if meta.len() > MAX_CHAP_FILE {
        return Err(wrong(format!("it has more than {MAX_CHAP_FILE} bytes")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    parse_chap(&text).map_err(wrong)
}

fn parse_chap(text: &str) -> Result<Chap, String> {
    let mut found = BTreeMap::new();
    for (number, line) in text.lines().enumerate().map(|(index, line)| (index + 1, line.trim())) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        // The line itself may be a secret and is not shown.
        let (name, value) = line.split_once('=').ok_or_else(|| format!("line {number} has no `=`"))?;
        let name = name.trim();
        if !["username", "password", "username_in", "password_in"].contains(&name) {
            return Err(format!("line {number}: no such name"));
        }
        if found.insert(name, value.trim()).is_some() {
            return Err(format!("line {number}: {name} again"));
        }
    }
    let pair = |name: &str, password: &str| match (found.get(name), found.get(password)) {
        (Some(name), Some(secret)) if !name.is_empty() => {
            let secret = Secret::new(*secret).map_err(|error| format!("{password}: {error}"))?;
            Ok(Some(Credentials { name: (*name).to_owned(), secret }))
        }
        (None, None) => Ok(None),
        _ => Err(format!("{name} and {password} belong together")),
    };
    let initiator = pair("username", "password")?.ok_or("it names no username and password")?;
    Chap::new(initiator, pair("username_in", "password_in")?).map_err(|error| error.to_string())
}

/// Reads `--tls`: a directory with `ca.pem` and one other certificate with its key (`NAME.pem`, `NAME.key`: what `decant ca issue`
/// makes, and a copy of the authority's certificate), or `CA,CERT,KEY`.
pub(crate) fn identity(text: &str) -> Result<Identity, Failure> {
    let wrong = |cause: String| {
        Failure::usage(
            "certificates not usable",
            cause,
            "name a directory with ca.pem, NAME.pem and NAME.key (see `decant ca --help`), or three files: CA,CERT,KEY",
        )
    };
    let paths = match *text.split(',').collect::<Vec<_>>() {
        [ca, cert, key] => Paths { ca: ca.into(), cert: cert.into(), key: key.into() },
        [directory] => in_directory(Path::new(directory)).map_err(wrong)?,
        _ => return Err(wrong(format!("{text:?} is neither a directory nor three files"))),
    };
    Identity::load(&paths).map_err(|error| {
        let source = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
        wrong(format!("{error}{source}"))
    })
}

fn in_directory(directory: &Path) -> Result<Paths, String> {
    let ca = directory.join("ca.pem");
    let entries = std::fs::read_dir(directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    let is_pair = |path: &PathBuf| {
        path.extension().is_some_and(|end| end == "pem") && *path != ca && path.with_extension("key").exists()
    };
    let found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(is_pair).collect();
    match &found[..] {
        [cert] => Ok(Paths { key: cert.with_extension("key"), cert: cert.clone(), ca }),
        [] => Err(format!("{} holds no NAME.pem with its NAME.key", directory.display())),
        more => Err(format!("{} holds {} certificates with keys; name the files", directory.display(), more.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chap_files_read_and_faults_do_not_show_secrets() {
        let one = parse_chap("# who\nusername = backup\npassword = twelve bytes!\n").expect("valid");
        assert_eq!((one.initiator().name.as_str(), one.target().is_none()), ("backup", true));
        let both = "username=a\npassword=twelve bytes!\nusername_in=b\npassword_in = = another one =";
        assert_eq!(parse_chap(both).expect("valid").target().expect("mutual").name, "b");
        for (text, reason) in [
            ("", "names no username"),
            ("username = a", "belong together"),
            ("username = a\npassword = short", "12 to 255 bytes"),
            ("username = a\npassword = twelve bytes!\nusername_in = b\npassword_in = twelve bytes!", "must differ"),
            ("hush this is secret", "line 1 has no `=`"),
            ("hush this = secret", "line 1: no such name"),
            ("username = a\nusername = b", "line 2: username again"),
        ] {
            let error = parse_chap(text).expect_err("invalid");
            assert!(error.contains(reason) && !error.contains("hush"), "{text:?}: {error}");
        }
    }
}
