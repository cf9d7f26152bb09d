//! PID 1 of each machine's namespaces.

use std::ffi::OsString;
use std::process::ExitCode;

/// Runs a shim: `decant shim CONFIG`, where CONFIG is the file that the driver wrote. To be called before the process has a
/// second thread.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    drop(args.into_iter().collect::<Vec<_>>());
    ExitCode::FAILURE
}
