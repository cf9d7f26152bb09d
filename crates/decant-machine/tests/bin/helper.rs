//! What the tests of this crate start as processes of their own: a shim, an agent that dies, a server for machines.

use std::io::{Read, Write};
use std::net::{Ipv6Addr, TcpListener};
use std::process::ExitCode;

use decant_machine::{DriverConfig, MachineSpec, Prepare, ProcessDriver};

fn main() -> ExitCode {
    let mut args: Vec<std::ffi::OsString> = std::env::args_os().skip(1).collect();
    let verb = if args.is_empty() { Default::default() } else { args.remove(0) };
    let rest: Vec<String> = args.iter().map(|text| text.to_string_lossy().into_owned()).collect();
    match (verb.to_str().unwrap_or_default(), &rest[..]) {
        ("shim", _) => return decant_machine::shim::main(args),
        // An agent that is killed right after it has started a machine: [worker, run_dir, state_dir, netns, spec].
        ("agent", [worker, run_dir, state_dir, netns, spec]) => {
            let driver = ProcessDriver::new(DriverConfig {
                worker: worker.parse().expect("a worker"),
                run_dir: run_dir.into(),
                state_dir: state_dir.into(),
                shim: vec![std::env::current_exe().expect("this program").into(), "shim".into()],
            })
            .expect("a driver");
            let spec: MachineSpec = serde_json::from_str(spec).expect("a spec");
            let request =
                Prepare { spec: &spec, netns: netns.as_ref(), epoch: decant_base::Epoch(1), program_digest: None };
            driver.prepare(&request).expect("prepared");
            driver.start(&spec.id, None).expect("started");
            std::process::abort();
        }
        // Answers each connection with a name and what came before its end.
        ("serve", [port, name]) => {
            let port: u16 = port.parse().expect("a port");
            let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).expect("a listener");
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { continue };
                let mut request = Vec::new();
                if stream.read_to_end(&mut request).is_ok() {
                    let _ = stream.write_all(name.as_bytes()).and_then(|()| stream.write_all(&request));
                }
            }
        }
        _ => return ExitCode::from(2),
    }
    ExitCode::SUCCESS
}
