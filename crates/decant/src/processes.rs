//! The processes that Decant starts by itself: keeper, volume, shim. They are no commands for people, so they are told by
//! their first words before the command line is looked at, and start without it.

use std::ffi::OsString;
use std::process::ExitCode;

use tracing_subscriber::EnvFilter;

/// Runs one of them to its end if that is what this process is to be.
pub(crate) fn start() -> Option<ExitCode> {
    let mut words = std::env::args_os().skip(1);
    let first = words.next()?;
    let rest: Vec<OsString> = words.collect();
    match (first.to_str()?, rest.first().and_then(|word| word.to_str())) {
        ("keeper", _) => {
            log();
            Some(decant_dataplane_user::keeper::main(&texts(rest)))
        }
        // `decant volume create` is for people.
        ("volume", Some("--process")) => {
            log();
            Some(decant_dataplane_user::volume::main(&texts(rest)))
        }
        ("shim", _) => Some(decant_machine::shim::main(rest)),
        _ => None,
    }
}

fn texts(words: Vec<OsString>) -> Vec<String> {
    words.into_iter().map(|word| word.to_string_lossy().into_owned()).collect()
}

/// Logs go to the error stream, which whoever starts a process points at a file. `DECANT_LOG` filters, e.g. `debug`.
pub(crate) fn log() {
    let filter = EnvFilter::try_from_env("DECANT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // A second call would only keep the first one's filter.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).try_init();
}
