//! An agent of canned answers, for tests of the command line.

#![allow(dead_code, reason = "each test file uses its part")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use expect_test::Expect;
use serde::Serialize;

/// An agent that gives the same answers in order to whoever asks, and remembers what was asked.
pub(crate) struct Canned {
    directory: tempfile::TempDir,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Canned {
    pub(crate) fn new(answers: Vec<(u16, String)>) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let listener = UnixListener::bind(directory.path().join("agent.sock")).expect("a socket");
        let asked = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&asked);
        std::thread::spawn(move || {
            let mut answers = answers.into_iter();
            while let Ok((stream, _)) = listener.accept() {
                serve(stream, &mut answers, &heard);
            }
        });
        Self { directory, asked }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("agent.sock")
    }

    pub(crate) fn asked(&self) -> Vec<String> {
        self.asked.lock().expect("no panic").clone()
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        decant().arg("--socket").arg(self.socket()).args(arguments).output().expect("decant runs")
    }
}

fn serve(stream: UnixStream, answers: &mut impl Iterator<Item = (u16, String)>, asked: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(stream);
    loop {
        let (mut line, mut length) = (String::new(), 0);
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        let first = line.trim().trim_end_matches(" HTTP/1.1").to_owned();
        loop {
            line.clear();
            reader.read_line(&mut line).expect("a header");
            if let Some(value) = line.strip_prefix("Content-Length: ") {
                length = value.trim().parse().expect("a length");
            }
            if line.trim().is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).expect("a body");
        asked.lock().expect("no panic").push(format!("{first} {}", String::from_utf8_lossy(&body)).trim().to_owned());
        let Some((status, text)) = answers.next() else { return };
        write!(reader.get_mut(), "HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n{text}", text.len())
            .expect("it is read");
    }
}

pub(crate) fn decant() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_decant"));
    command.env_remove("DECANT_SOCKET");
    command
}

pub(crate) fn ok(value: &impl Serialize) -> (u16, String) {
    (200, serde_json::to_string(value).expect("it is JSON"))
}

pub(crate) fn check(output: &Output, code: i32, stdout: Expect, stderr: Expect) {
    stdout.assert_eq(&String::from_utf8_lossy(&output.stdout));
    stderr.assert_eq(&String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(code), "{output:?}");
}
