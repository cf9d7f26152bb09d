//! The order service from outside: what it acknowledged survives kill -9, once.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

struct Service {
    child: Child,
    address: String,
}

impl Service {
    fn start(data: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_decant"))
            .args(["demo-orders", "--listen", "[::1]:0", "--fill", "256KiB", "--scratch", "64KiB", "--data"])
            .arg(data)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the service starts");
        let mut line = String::new();
        let out = child.stdout.take().expect("its output is a pipe");
        BufReader::new(out).read_line(&mut line).expect("it says where it listens");
        let address = line.trim().rsplit(' ').next().unwrap_or_default().to_owned();
        assert!(address.starts_with("[::1]:"), "{line:?}");
        Self { child, address }
    }

    fn ask(&self, request: &str) -> std::io::Result<(u16, Value)> {
        let mut stream = TcpStream::connect(&self.address)?;
        stream.write_all(request.as_bytes())?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let status = text.split(' ').nth(1).and_then(|status| status.parse().ok());
        let body = text.split("\r\n\r\n").nth(1).unwrap_or_default();
        match status {
            Some(status) => Ok((status, serde_json::from_str(body).unwrap_or(Value::Null))),
            None => Err(std::io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn order(&self, key: &str, body: &Value) -> std::io::Result<(u16, Value)> {
        let body = body.to_string();
        self.ask(&format!(
            "POST /orders HTTP/1.1\r\nHost: o\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Idempotency-Key: {key}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ))
    }

    fn get(&self, path: &str) -> (u16, Value) {
        self.ask(&format!("GET {path} HTTP/1.1\r\nHost: o\r\nConnection: close\r\n\r\n")).expect("it answers")
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn body(n: usize) -> Value {
    json!({ "reference": format!("r-{n}"), "item": "cask", "quantity": n })
}

#[test]
fn what_was_acknowledged_survives_kill_9_once() {
    let data = tempfile::tempdir().expect("a temporary directory");
    let mut acknowledged: Vec<(usize, Value)> = Vec::new();
    let mut next = 0;
    for round in 0..4 {
        let mut service = Service::start(data.path());
        for (n, row) in &acknowledged {
            let (status, found) = service.get(&format!("/orders/{}", row["id"]));
            assert_eq!((status, &found), (200, row), "order {n} after kill {round}");
        }
        // The last one again, as a client does that heard nothing: same row.
        if let Some((n, row)) = acknowledged.last() {
            let (status, again) = service.order(&format!("k-{n}"), &body(*n)).expect("it answers");
            assert_eq!((status, &again), (200, row));
        }
        std::thread::scope(|scope| {
            // The kill comes while writes are in flight.
            let pid = rustix::process::Pid::from_child(&service.child);
            let killer = scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(150));
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it is there");
            });
            while let Ok((status, row)) = service.order(&format!("k-{next}"), &body(next)) {
                assert!(matches!(status, 200 | 201), "{status} {row}");
                acknowledged.push((next, row));
                next += 1;
            }
            killer.join().expect("the killer ends");
        });
        service.child.wait().expect("it is dead");
    }
    assert!(acknowledged.len() > 20, "only {} writes were acknowledged", acknowledged.len());
    let mut ids: Vec<i64> = acknowledged.iter().filter_map(|(_, row)| row["id"].as_i64()).collect();
    ids.dedup();
    assert_eq!(ids.len(), acknowledged.len(), "no row was given twice");
}

#[test]
fn misuse_is_refused_and_sigterm_ends_it_at_once() {
    let data = tempfile::tempdir().expect("a temporary directory");
    let mut service = Service::start(data.path());
    assert_eq!(service.get("/health").0, 200);
    assert_eq!(service.get("/orders/1").1["reference"], "filled-1", "it was filled");
    assert_eq!(service.get("/orders/99999999").0, 404);
    assert_eq!(service.order("", &body(1)).expect("it answers").0, 400, "no key");
    assert_eq!(service.order("k", &body(1)).expect("it answers").0, 201);
    assert_eq!(service.order("k", &body(2)).expect("it answers").0, 422, "another order under the same key");
    let began = Instant::now();
    rustix::process::kill_process(rustix::process::Pid::from_child(&service.child), rustix::process::Signal::TERM)
        .expect("it is there");
    assert!(service.child.wait().expect("it ends").success());
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    assert!(!data.path().join("scratch").exists(), "the scratch file is deleted");
}
