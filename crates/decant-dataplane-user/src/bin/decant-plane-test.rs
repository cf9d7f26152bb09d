//! The keeper and the volume process as a program of their own, for this crate's tests. The product's are subcommands of
//! `decant`.

use std::process::ExitCode;

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.split_first() {
        Some((name, rest)) if name == "keeper" => decant_dataplane_user::keeper::main(rest),
        Some((name, rest)) if name == "volume" => decant_dataplane_user::volume::main(rest),
        _ => {
            eprintln!("usage: decant-plane-test keeper|volume");
            ExitCode::from(2)
        }
    }
}
