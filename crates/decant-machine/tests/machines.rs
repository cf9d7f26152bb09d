//! Machines as their users see them: real programs in real namespaces, with and without a volume. Needs root.

mod fixture;

use std::path::Path;
use std::time::{Duration, Instant};

use decant_base::Epoch;
use decant_machine::{Change, MachineError, Prepare, State};
use fixture::{Fixture, Volume, run, shell, spec};

const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn a_machine_sees_its_own_world_and_nothing_of_the_host() {
    let Some(fixture) = Fixture::new("world") else { return };
    let volume = Volume::new(&fixture, 16);
    let script = r#"
        id -u; id -g; hostname; cat /proc/self/comm
        ls -d /proc/[0-9]* | wc -l
        ls /root /home /work /sys /mnt 2>/dev/null | wc -l
        touch /usr/x /etc/x /x /opt/x 2>/dev/null; ls /usr/x /etc/x /x /opt/x 2>/dev/null | wc -l
        ls /dev | tr '\n' ' '; echo
        grep -E '^(NoNewPrivs|CapEff|CapBnd)' /proc/self/status | tr '\n\t' '  '; echo
        pwd; echo "$GREETING $HOME"
        touch /data/mine /tmp/mine /run/mine /dev/shm/mine && echo writable
        head -c 4 /dev/zero | wc -c; echo >/dev/null && echo null
        readlink /proc/self/ns/net /proc/self/ns/ipc /proc/self/ns/uts | sort -u | wc -l
        ls -l /proc/self/fd | grep -vc ' -> /proc/'
        kill -9 1; echo survived
        mount -t tmpfs none /tmp 2>/dev/null || echo no-mount
        cat /opt/greeting
        exec sleep 1000
    "#;
    std::fs::write(fixture.path("greeting"), "bound\n").expect("written");
    let spec = fixture::with(spec("orders", &["/bin/sh", "-c", script]), |spec| {
        spec["volume"] = "orders".into();
        spec["env"] = serde_json::json!({"GREETING": "hello"});
        spec["binds"] = serde_json::json!([{"source": fixture.path("greeting"), "target": "/opt/greeting"}]);
    });
    fixture.start(&spec, Some(&volume.device));
    let log = fixture.wait_for_log(&spec, "bound\n");
    let lines: Vec<&str> = log.lines().collect();
    // The shim, the shell and the pipeline.
    let count: usize = lines[4].trim().parse().expect("a count");
    assert!((2..=6).contains(&count), "{log}");
    let want = [
        "65534",
        "65534",
        "orders",
        "cat",
        lines[4],
        "0",
        "0",
        "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero ",
        "CapBnd: 0000000000000000 CapEff: 0000000000000000 NoNewPrivs: 1",
    ];
    assert_eq!(lines[..8], want[..8], "{log}");
    for part in want[8].split(' ') {
        assert!(lines[8].contains(part), "{log}");
    }
    assert_eq!(lines[9..14], ["/data", "hello /data", "writable", "4", "null"], "{log}");
    assert_eq!(lines[14], "3", "{log}");
    // The standard streams and ls's own first line: nothing of the shim's.
    assert_eq!(lines[15], "4", "{log}");
    assert_eq!(lines[lines.len() - 3..], ["survived", "no-mount", "bound"], "{log}");
    let pid = fixture.pid(&spec, &fixture.wait_for(&spec, |_| true));
    let seen =
        decant_machine::inside(pid, || Ok((std::fs::read_to_string("/opt/greeting")?, Path::new("/root").exists())));
    assert_eq!(seen.expect("seen"), ("bound\n".to_owned(), false));
    let host = run(&["readlink", "/proc/self/ns/net"]);
    let status = fixture.driver.status(&spec.id).expect("a status").expect("it is here");
    let pid = status.pid.expect("a process");
    assert_ne!(host, run(&["readlink", &format!("/proc/{pid}/ns/net")]));
    println!("timings: {:?}", status.timings);
    assert_eq!(fixture.driver.stop(&spec.id, PATIENCE).expect("stopped"), Change::Made);
    println!("timings: {:?}", fixture.driver.status(&spec.id).expect("a status").expect("its last word").timings);
}

#[test]
fn a_stop_leaves_nothing_running_and_nothing_mounted() {
    let Some(fixture) = Fixture::new("stop") else { return };
    let volume = Volume::new(&fixture, 16);
    // Ignores the signal, leaves a daemon in a session of its own, an orphan, and a child that ignores it too.
    let script = r#"
        trap '' TERM
        setsid sh -c 'trap "" TERM HUP; (sleep 1000 &) ; exec sleep 1000' &
        (sh -c 'sleep 1000' &) 
        echo data > /data/file
        echo ready
        while :; do sleep 1000; done
    "#;
    let spec = fixture::with(spec("orders", &["/bin/sh", "-c", script]), |spec| {
        spec["volume"] = "orders".into();
        spec["stop_timeout_ms"] = 100.into();
    });
    fixture.start(&spec, Some(&volume.device));
    fixture.wait_for_log(&spec, "ready\n");
    let began = Instant::now();
    assert_eq!(fixture.driver.stop(&spec.id, PATIENCE).expect("stopped"), Change::Made);
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(100) && took < Duration::from_secs(5), "{took:?}");
    assert_eq!(fixture.driver.stop(&spec.id, PATIENCE).expect("stopped"), Change::Unchanged);
    let status = fixture.driver.status(&spec.id).expect("a status").expect("its last word");
    assert_eq!((status.state, status.unclean), (State::Stopped, false));
    assert_eq!(volume.read("file"), "data\n");
    // Started again for the next claim, it finds its data and its log goes on.
    let spec = fixture::with(spec, |spec| {
        spec["command"] = serde_json::json!(["/bin/sh", "-c", "cat /data/file; exec sleep 1000"]);
    });
    fixture.start_at(&spec, Some(&volume.device), Epoch(2));
    fixture.wait_for_log(&spec, "data\n");
    assert_eq!(fixture.driver.kill(&spec.id, PATIENCE).expect("killed"), Change::Made);
}

#[test]
fn a_prompt_program_is_stopped_in_milliseconds_by_its_own_signal() {
    let Some(fixture) = Fixture::new("prompt") else { return };
    let script = "trap 'echo bye; exit 0' USR1; echo ready; while :; do read x < /tmp/fifo; done";
    let script = format!("mkfifo /tmp/fifo; {script}");
    let spec = fixture::with(spec("orders", &["/bin/sh", "-c", &script]), |spec| spec["stop_signal"] = 10.into());
    fixture.start(&spec, None);
    fixture.wait_for_log(&spec, "ready\n");
    let began = Instant::now();
    fixture.driver.stop(&spec.id, PATIENCE).expect("stopped");
    println!("stopped in {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert!(fixture.log(&spec).contains("bye\n"));
}

#[test]
fn a_machine_that_only_waits_costs_nothing_and_can_be_sent_away() {
    let Some(fixture) = Fixture::new("waits") else { return };
    let waiting = fixture::with(spec("waiting", &["/bin/sleep", "1000"]), |spec| spec["volume"] = "orders".into());
    fixture.prepare(&waiting, Epoch(3));
    let running = spec("running", &["/bin/sleep", "1000"]);
    fixture.start(&running, None);
    let status = fixture.wait_for(&waiting, |_| true);
    assert_eq!((status.state, status.epoch, status.pid), (State::Waiting, Epoch(3), None));
    // No turn of a loop that nothing asked for: the same processor time, ten times over.
    let spent = |spec| fixture.shim_ticks(spec);
    let before = (spent(&waiting), spent(&running));
    std::thread::sleep(Duration::from_millis(300));
    let after = (spent(&waiting), spent(&running));
    assert!(after.0 - before.0 <= 1 && after.1 - before.1 <= 1, "{before:?} {after:?}");
    assert_eq!(fixture.driver.stop(&waiting.id, PATIENCE).expect("sent away"), Change::Made);
    assert_eq!(fixture.driver.kill(&running.id, PATIENCE).expect("killed"), Change::Made);
    for spec in [&waiting, &running] {
        fixture.driver.remove(&spec.id, false).expect("removed");
        assert!(fixture.driver.status(&spec.id).expect("a status").is_none());
    }
    assert!(fixture.driver.survivors().expect("a list").is_empty());
}

#[test]
fn a_mount_copied_into_another_namespace_is_noticed_and_named() {
    let Some(fixture) = Fixture::new("copied") else { return };
    let volume = Volume::new(&fixture, 16);
    let spec = fixture::with(spec("orders", &["/bin/sleep", "1000"]), |spec| spec["volume"] = "orders".into());
    let status = fixture.start(&spec, Some(&volume.device));
    let pid = fixture.pid(&spec, &status);
    // Outside the machine's cgroup, as a debugger or a backup job of the host would be.
    let mut spy = std::process::Command::new("nsenter")
        .args(["-t", &pid.to_string(), "-m", "unshare", "-m", "sh", "-c", "echo in; read x"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("nsenter (util-linux)");
    let mut word = [0; 3];
    std::io::Read::read_exact(spy.stdout.as_mut().expect("a pipe"), &mut word).expect("its word");
    let error = fixture.driver.stop(&spec.id, PATIENCE).expect_err("noticed");
    let text = error.to_string();
    assert!(matches!(error, MachineError::DeviceBusy { .. }), "{text}");
    assert!(text.contains("mounted at /data for process"), "{text}");
    drop(spy.stdin.take());
    spy.wait().expect("its end");
    fixture.driver.stop(&spec.id, PATIENCE).expect("the device is free now");
}

#[test]
fn programs_are_started_again_by_their_policy() {
    let Some(fixture) = Fixture::new("policy") else { return };
    let case = |name: &str, script: &str, policy: &str| {
        let spec = fixture::with(spec(name, &["/bin/sh", "-c", script]), |spec| spec["restart"] = policy.into());
        fixture.start(&spec, None);
        spec
    };
    let always = case("always", "echo run; exit 0", "always");
    let failing = case("failing", "echo run; sleep 1000 & exit 3", "on_failure");
    let ending = case("ending", "echo run; exit 0", "on_failure");
    let never = case("never", "echo run; kill -SEGV $$", "never");
    for (spec, again) in [(&always, true), (&failing, true), (&ending, false), (&never, false)] {
        if again {
            fixture.wait_for(spec, |status| status.restarts >= 3);
            assert!(fixture.log(spec).matches("run\n").count() >= 3, "{}", fixture.log(spec));
        } else {
            let status = fixture.wait_for(spec, |status| status.state == State::Exited);
            assert_eq!(status.restarts, 0);
        }
    }
    let exit = |spec| serde_json::to_string(&fixture.wait_for(spec, |_| true).last_exit).expect("JSON");
    assert_eq!((exit(&failing), exit(&never)), (r#"{"code":3}"#.to_owned(), r#"{"signal":11}"#.to_owned()));
    let log = fixture.log(&always);
    assert!(log.contains("decant: the program is started again in 100 ms\n"), "{log}");
    assert!(log.contains("decant: the program is started again in 200 ms\n"), "{log}");
    for spec in [&always, &failing, &ending, &never] {
        assert_eq!(fixture.driver.stop(&spec.id, PATIENCE).expect("stopped"), Change::Made);
    }
}

#[test]
fn machines_outlive_the_agent_and_are_found_again() {
    let Some(fixture) = Fixture::new("agent") else { return };
    let spec = spec("orders", &["/bin/sh", "-c", "echo ready; exec sleep 1000"]);
    let status = std::process::Command::new(fixture::HELPER)
        .arg("agent")
        .args(["worker-1", &fixture.path("run"), &fixture.path("state"), &fixture.netns(&spec).to_string_lossy()])
        .arg(serde_json::to_string(&spec).expect("JSON"))
        .status()
        .expect("an agent");
    assert!(!status.success(), "it was to die");
    let survivors = fixture.driver.survivors().expect("a list");
    assert_eq!(survivors.len(), 1);
    let status = survivors[0].status.as_ref().expect("its shim answers");
    assert_eq!((status.state, status.epoch), (State::Running, Epoch(1)));
    // What was done is not done again; another claim is a conflict.
    let netns = fixture.netns(&spec);
    let request = |epoch| Prepare { spec: &spec, netns: &netns, epoch, program_digest: None };
    assert_eq!(fixture.driver.prepare(&request(Epoch(1))).expect("prepared"), Change::Unchanged);
    assert_eq!(fixture.driver.start(&spec.id, None).expect("started").restarts, 0);
    let error = fixture.driver.prepare(&request(Epoch(2))).expect_err("another claim");
    assert_eq!(error.to_string(), "machine orders is already here, for epoch 1 and not 2");
    let other = fixture::with(spec.clone(), |spec| spec["stop_timeout_ms"] = 1.into());
    let error = fixture
        .driver
        .prepare(&Prepare { spec: &other, netns: &netns, epoch: Epoch(1), program_digest: None })
        .expect_err("another description");
    assert_eq!(error.to_string(), "machine orders is already here, with another description");
    let error = fixture.driver.remove(&spec.id, true).expect_err("it runs");
    assert_eq!(error.to_string(), "machine orders: it is here: stop it first");
    // A second shim on the same machine does not get past the lock.
    let second = run(&[fixture::HELPER, "shim", &format!("{}/machines/orders/shim.json", fixture.path("run"))]);
    assert_eq!(second.trim(), r#"{"failed":"another shim runs this machine on this worker"}"#);
    fixture.driver.stop(&spec.id, PATIENCE).expect("stopped");
    fixture.driver.remove(&spec.id, true).expect("removed");
    assert!(fixture.driver.status(&spec.id).expect("a status").is_none());
    assert!(!Path::new(&fixture.path("state/machines/orders")).exists());
}

#[test]
fn all_of_a_machine_ends_with_its_shim() {
    let Some(fixture) = Fixture::new("shim") else { return };
    let volume = Volume::new(&fixture, 16);
    let script = "setsid sleep 1000 & echo kept > /data/file; sync -f /data; echo ready; wait";
    let spec = fixture::with(spec("orders", &["/bin/sh", "-c", script]), |spec| spec["volume"] = "orders".into());
    fixture.start(&spec, Some(&volume.device));
    fixture.wait_for_log(&spec, "ready\n");
    fixture.kill_shim(&spec);
    let status = fixture.wait_for(&spec, |status| status.state == State::Lost);
    assert_eq!(status.reason.as_deref(), Some("its shim is gone, and all of the machine with it"));
    fixture.driver.stop(&spec.id, PATIENCE).expect("nothing is left, nobody holds the device");
    fixture.start_at(&spec, Some(&volume.device), Epoch(1));
    fixture.wait_for(&spec, |status| status.state == State::Running);
    fixture.driver.stop(&spec.id, PATIENCE).expect("stopped");
    assert_eq!(volume.read("file"), "kept\n");
}

#[test]
fn what_cannot_be_made_or_mounted_is_an_error_that_says_so() {
    let Some(fixture) = Fixture::new("unfit") else { return };
    let refused = |spec, digest: Option<&str>| {
        let netns = fixture.netns(&spec);
        let request = Prepare { spec: &spec, netns: &netns, epoch: Epoch(1), program_digest: digest };
        fixture.driver.prepare(&request).expect_err("unfit").to_string()
    };
    let plain = spec("orders", &["/bin/sleep", "1000"]);
    let text = refused(plain.clone(), Some("00"));
    assert!(text.contains("its program /bin/sleep is another one than where it runs: SHA-256"), "{text}");
    assert!(text.ends_with("install the same version here, or let any do (--any-program)"), "{text}");
    // The host has it; the machine's root leads nowhere.
    std::os::unix::fs::symlink("/bin/sleep", fixture.path("tool")).expect("a link");
    std::fs::create_dir(fixture.path("tools")).expect("a directory");
    std::os::unix::fs::symlink(fixture.path("tool"), fixture.path("tools/sleep")).expect("a link");
    let bound = fixture::with(spec("orders", &["/opt/tools/sleep", "1"]), |spec| {
        spec["binds"] = serde_json::json!([{"source": fixture.path("tools"), "target": "/opt/tools"}]);
    });
    let text = refused(bound, None);
    assert_eq!(
        text,
        "machine orders cannot run here: cannot find the program /opt/tools/sleep inside the machine: No such file or directory (os error 2)"
    );
    assert_eq!(
        fixture.driver.start(&plain.id, None).expect_err("not prepared").to_string(),
        "machine orders is not prepared on this worker"
    );

    let volume = Volume::empty(&fixture, 16);
    let spec = fixture::with(spec("volume", &["/bin/sleep", "1000"]), |spec| spec["volume"] = "orders".into());
    fixture.prepare(&spec, Epoch(1));
    let text = fixture.driver.start(&spec.id, None).expect_err("no device").to_string();
    assert_eq!(text, "machine volume: the machine has a volume and was not given a device");
    let text = fixture.driver.start(&spec.id, Some(&volume.device)).expect_err("no file system").to_string();
    assert!(
        text.starts_with(&format!("machine volume: cannot mount {} at /data: ", volume.device.display())),
        "{text}"
    );
    let status = fixture.wait_for(&spec, |status| status.state == State::Failed);
    assert!(status.reason.expect("a reason").starts_with("cannot mount"));
    // Once there is a file system, the same machine goes on.
    shell(&format!("mkfs.ext4 -q {}", volume.device.display()));
    fixture.driver.start(&spec.id, Some(&volume.device)).expect("started");
    fixture.driver.stop(&spec.id, PATIENCE).expect("stopped");
}

#[test]
fn a_stop_that_hangs_on_the_volume_says_so_and_goes_on_when_that_answers() {
    let Some(fixture) = Fixture::new("hang") else { return };
    let volume = Volume::new(&fixture, 16);
    let script = "echo ready; read x < /tmp/none; while :; do echo x >> /data/file; done";
    let script = format!("mkfifo /tmp/none; (echo > /tmp/none) & {script}");
    let spec = fixture::with(spec("orders", &["/bin/sh", "-c", &script]), |spec| {
        spec["volume"] = "orders".into();
        spec["stop_timeout_ms"] = 10.into();
    });
    let status = fixture.start(&spec, Some(&volume.device));
    fixture.wait_for_log(&spec, "ready\n");
    let pid = fixture.pid(&spec, &status).to_string();
    // A frozen file system holds its writers in D, as a parked read of a clone without origin does.
    run(&["nsenter", "-t", &pid, "-m", "fsfreeze", "-f", "/data"]);
    fixture.wait_for_process_state(&pid, 'D');
    let error = fixture.driver.stop(&spec.id, Duration::from_millis(300)).expect_err("it hangs");
    let text = error.to_string();
    println!("{text}");
    assert!(matches!(error, MachineError::TimedOut { .. }), "{text}");
    // While it hangs it still answers, and can be told again, harder.
    assert_eq!(fixture.wait_for(&spec, |_| true).state, State::Stopping);
    let error = fixture.driver.kill(&spec.id, Duration::from_millis(100)).expect_err("it still hangs");
    assert!(error.to_string().contains("waits for its disk"), "{error}");
    run(&["nsenter", "-t", &pid, "-m", "fsfreeze", "-u", "/data"]);
    fixture.driver.stop(&spec.id, PATIENCE).expect("stopped");
}

#[test]
fn a_trim_reaches_the_device_while_the_machine_runs() {
    let Some(fixture) = Fixture::new("trim") else { return };
    let volume = Volume::new(&fixture, 64);
    let script = "dd if=/dev/urandom of=/data/big bs=1M count=40 2>/dev/null; sync -f /data; rm /data/big; sync -f /data; echo ready; exec sleep 1000";
    let spec = fixture::with(spec("orders", &["/bin/sh", "-c", script]), |spec| spec["volume"] = "orders".into());
    fixture.start(&spec, Some(&volume.device));
    fixture.wait_for_log(&spec, "ready\n");
    assert!(volume.allocated() > 40 << 20);
    let trimmed = fixture.driver.trim(&spec.id).expect("trimmed");
    assert!(trimmed.0 > 40 << 20, "{trimmed:?}");
    assert!(volume.allocated() < 8 << 20, "{}", volume.allocated());
    fixture.driver.sync(&spec.id).expect("synced");
    fixture.driver.stop(&spec.id, PATIENCE).expect("stopped");
}

#[test]
fn a_write_back_that_fails_is_told_by_a_stop_and_taken_by_a_kill() {
    let Some(fixture) = Fixture::new("unclean") else { return };
    // The volume's file is on a file system that is too small for it: late writes fail.
    let small = fixture.path("small");
    std::fs::create_dir(&small).expect("a directory");
    run(&["mount", "-t", "tmpfs", "-o", "size=24m", "none", &small]);
    let volume = Volume::at(&format!("{small}/volume.img"), 64);
    shell(&format!("mkfs.ext4 -q {}", volume.device.display()));
    // Nothing is synced: the program was told of no write that it is on the medium.
    let script = "dd if=/dev/urandom of=/data/big bs=1M count=40 2>/dev/null; echo ready; exec sleep 1000";
    let spec = fixture::with(spec("orders", &["/bin/sh", "-c", script]), |spec| spec["volume"] = "orders".into());
    fixture.start(&spec, Some(&volume.device));
    fixture.wait_for_log(&spec, "ready\n");
    for _ in 0..2 {
        let error = fixture.driver.stop(&spec.id, PATIENCE).expect_err("not all was written");
        assert!(matches!(error, MachineError::Unclean { .. }), "{error}");
    }
    let status = fixture.wait_for(&spec, |status| status.state == State::Stopped);
    assert!(status.unclean);
    assert_eq!(fixture.driver.kill(&spec.id, PATIENCE).expect("as after a power cut"), Change::Unchanged);
    drop(volume);
    run(&["umount", "-l", &small]);
}

#[test]
fn the_program_is_the_one_it_was_started_from_until_it_is_started_again() {
    let Some(fixture) = Fixture::new("program") else { return };
    let program = fixture.path("program");
    std::fs::copy("/bin/sleep", &program).expect("a program");
    let spec = fixture::with(spec("orders", &["/opt/program", "1000"]), |spec| {
        spec["binds"] = serde_json::json!([{"source": program, "target": "/opt/program"}]);
    });
    let old = fixture.driver.started_from(&spec).expect("what it would start");
    fixture.start(&spec, None);
    // As an upgrade does it: another file under the same name.
    let next = fixture.path("next");
    let upgraded = [std::fs::read(&program).expect("read"), b"version 2".to_vec()].concat();
    std::fs::write(&next, upgraded).expect("written");
    std::fs::set_permissions(&next, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("set");
    std::fs::rename(&next, &program).expect("replaced");
    assert_eq!(fixture.driver.started_from(&spec).expect("what runs"), old);
    fixture.driver.stop(&spec.id, PATIENCE).expect("stopped");
    assert_ne!(fixture.driver.started_from(&spec).expect("what it would start"), old);
}
