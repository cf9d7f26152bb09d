//! A clone against nbdkit's cow filter and QEMU's block-stream, from the same origin.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::Value;

use super::spread::Spread;
use super::{Bench, Server, await_that, output};

pub(super) const MIB: u64 = 1 << 20;

/// An origin served by nbdkit over TCP on loopback.
struct Origin {
    _server: Server,
    uri: String,
    port: u16,
}

impl Origin {
    /// `size` bytes without zeros, from the page cache.
    fn serve(bench: &Bench, size: u64) -> anyhow::Result<Self> {
        let image = bench.path(&format!("origin-{size}"));
        if !image.exists() {
            fill(&image, size)?;
        }
        let port = free_port()?;
        let mut command = Command::new("nbdkit");
        command.args(["-f", "-i", "127.0.0.1", "-r", "-t", "16", "-p", &port.to_string(), "file"]).arg(&image);
        let server = Server::start(&mut command)?;
        await_that("nbdkit", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok())?;
        Ok(Self { _server: server, uri: format!("nbd://127.0.0.1:{port}/"), port })
    }
}

pub(super) fn free_port() -> anyhow::Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Bytes that neither compress nor repeat: xorshift64*, seeded, so that every run has the same.
pub(super) fn fill(image: &Path, size: u64) -> anyhow::Result<()> {
    let mut file = std::io::BufWriter::with_capacity(1 << 20, std::fs::File::create(image)?);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..size / 8 {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        file.write_all(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes())?;
    }
    file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
    Ok(())
}

/// A fresh clone of ours, served on a unix socket.
pub(super) struct Ours {
    _server: Server,
    decant: PathBuf,
    socket: PathBuf,
    control: PathBuf,
}

impl Ours {
    pub(super) fn start(bench: &Bench, origin: &str, hydrate: &str) -> anyhow::Result<Self> {
        let [image, meta, socket] = ["clone.img", "clone.map", "clone.sock"].map(|name| bench.path(name));
        let control = bench.path("clone.map.sock");
        for path in [&image, &meta, &socket, &control] {
            let _ = std::fs::remove_file(path);
        }
        let mut command = Command::new(&bench.decant);
        command.args(["clone", origin]).arg(&image).arg("--meta").arg(&meta);
        command.arg("--serve").arg(format!("unix:{}", socket.display())).args(["--hydrate", hydrate]);
        let server = Server::start(&mut command)?;
        let clone = Self { _server: server, decant: bench.decant.clone(), socket, control };
        // It answers for itself once clients can connect.
        await_that("decant clone", || clone.control.exists() && clone.missing().is_ok())?;
        Ok(clone)
    }

    pub(super) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    pub(super) fn missing(&self) -> anyhow::Result<u64> {
        let mut command = Command::new(&self.decant);
        command.args(["-o", "json", "clone", "status", "--control"]).arg(&self.control);
        let status: Value = serde_json::from_str(&output(&mut command)?)?;
        status["bytes_missing"].as_u64().context("decant clone status has no bytes_missing")
    }
}

/// 4 KiB random reads, one at a time, for two seconds of a part of the device that nothing has read; IOPS.
fn random_reads(uri: &str, size: u64) -> anyhow::Result<f64> {
    let mut command = Command::new("fio");
    command.args(["--name=r", "--ioengine=nbd", "--rw=randread", "--bs=4k", "--iodepth=1", "--time_based"]);
    command.args(["--runtime=2", "--randrepeat=1", "--output-format=json", "--norandommap=0"]);
    command.arg(format!("--uri={uri}")).arg(format!("--size={size}"));
    let output = output(&mut command)?;
    // Its remarks on options stand before the object.
    let object = output.find('{').with_context(|| format!("fio printed no JSON: {output}"))?;
    let report: Value = serde_json::from_str(&output[object..])?;
    report["jobs"][0]["read"]["iops"].as_f64().context("fio reports no IOPS")
}

/// Reads through a fresh clone, nothing hydrated, against nbdkit's cow filter with 4 KiB blocks that keeps what it reads.
pub(super) fn reads(bench: &Bench) -> anyhow::Result<String> {
    let size = 1024 * MIB;
    let origin = Origin::serve(bench, size)?;
    let (mut ours, mut cow, mut direct) = (Spread::default(), Spread::default(), Spread::default());
    for _ in 0..bench.rounds {
        let clone = Ours::start(bench, &origin.uri, "off")?;
        ours.push(random_reads(&clone.uri(), size)?);
        drop(clone);
        let socket = bench.path("cow.sock");
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new("nbdkit");
        command.args(["-f", "-U"]).arg(&socket).args(["--filter=cow", "nbd", "hostname=127.0.0.1"]);
        command.args([format!("port={}", origin.port).as_str(), "export=", "shared=true"]);
        command.args(["cow-on-read=true", "cow-block-size=4k"]).env("TMPDIR", bench.scratch.path());
        let server = Server::start(&mut command)?;
        await_that("nbdkit", || UnixStream::connect(&socket).is_ok())?;
        cow.push(random_reads(&format!("nbd+unix:///?socket={}", socket.display()), size)?);
        drop(server);
        direct.push(random_reads(&origin.uri, size)?);
    }
    Ok(format!(
        "4 KiB random reads at queue depth 1 through a fresh clone of 1 GiB, nothing hydrated, origin on loopback, fio's NBD \
         engine on a unix socket, {} rounds interleaved: median IOPS (lowest–highest).\n\n\
         | | IOPS | against ours |\n|---|---|---|\n\
         | decant clone | {ours} | 1 |\n| nbdkit cow, cow-on-read, 4k | {cow} | {:.2} |\n| the origin itself | {direct} | {:.2} |\n",
        bench.rounds,
        cow.median() / ours.median(),
        direct.median() / ours.median(),
    ))
}

/// 1 GiB from start to the last block here and durable, MiB/s, against QEMU's copy-on-read with block-stream.
pub(super) fn hydration(bench: &Bench) -> anyhow::Result<String> {
    let size = 1024 * MIB;
    let origin = Origin::serve(bench, size)?;
    let (mut ours, mut qemu) = (Spread::default(), Spread::default());
    let rate = |took: Duration| (size / MIB) as f64 / took.as_secs_f64();
    for _ in 0..bench.rounds {
        let began = Instant::now();
        let clone = Ours::start(bench, &origin.uri, "on")?;
        while clone.missing()? > 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        flush(&clone.uri())?;
        ours.push(rate(began.elapsed()));
        drop(clone);
        qemu.push(rate(stream(bench, &origin)?));
    }
    Ok(format!(
        "Hydration of 1 GiB without zeros, origin on loopback, from start to the last block here and flushed, {} rounds \
         interleaved: median MiB/s (lowest–highest).\n\n\
         | | MiB/s | against ours |\n|---|---|---|\n\
         | decant clone | {ours} | 1 |\n| QEMU storage daemon, block-stream into qcow2 | {qemu} | {:.2} |\n",
        bench.rounds,
        qemu.median() / ours.median(),
    ))
}

pub(super) fn flush(uri: &str) -> anyhow::Result<()> {
    output(Command::new("qemu-io").args(["-f", "raw", "-c", "flush", uri])).map(drop)
}

/// How long QEMU takes for the same, its flush included.
fn stream(bench: &Bench, origin: &Origin) -> anyhow::Result<Duration> {
    let [image, qmp, socket] = ["qemu.qcow2", "qmp.sock", "qemu.sock"].map(|name| bench.path(name));
    for path in [&image, &qmp, &socket] {
        let _ = std::fs::remove_file(path);
    }
    let began = Instant::now();
    output(
        Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=64k"])
            .arg(&image)
            .arg("1G"),
    )?;
    let origin = format!(
        "driver=nbd,node-name=src,server.type=inet,server.host=127.0.0.1,server.port={},export=,read-only=on,reconnect-delay=30",
        origin.port
    );
    let mut command = Command::new("qemu-storage-daemon");
    command.arg("--chardev").arg(format!("socket,path={},server=on,wait=off,id=m", qmp.display()));
    command.args(["--monitor", "chardev=m", "--blockdev", &origin]);
    command.arg("--blockdev").arg(format!("driver=file,node-name=dstf,filename={}", image.display()));
    command.args(["--blockdev", "driver=qcow2,node-name=dst,file=dstf,backing=src,discard=unmap,detect-zeroes=unmap"]);
    command.args(["--blockdev", "driver=copy-on-read,node-name=cor,file=dst"]);
    command.arg("--nbd-server").arg(format!("addr.type=unix,addr.path={},max-connections=0", socket.display()));
    command.args(["--export", "type=nbd,id=e0,node-name=cor,name=c,writable=on"]);
    let server = Server::start(&mut command)?;
    await_that("qemu-storage-daemon", || UnixStream::connect(&qmp).is_ok())?;
    let monitor = UnixStream::connect(&qmp)?;
    let mut lines = BufReader::new(monitor.try_clone()?).lines();
    let stream = r#"{"execute":"block-stream","arguments":{"device":"dst","job-id":"s0","on-error":"stop"}}"#;
    writeln!(&monitor, "{{\"execute\":\"qmp_capabilities\"}}\n{stream}")?;
    loop {
        let line = lines.next().context("the monitor ended")??;
        let event: Value = serde_json::from_str(&line)?;
        if event["event"] == "BLOCK_JOB_COMPLETED" {
            break;
        }
        if !event["error"].is_null() {
            bail!("QEMU: {line}");
        }
    }
    flush(&format!("nbd+unix:///c?socket={}", socket.display()))?;
    let took = began.elapsed();
    drop(server);
    Ok(took)
}
