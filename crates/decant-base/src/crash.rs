//! Named points at which a test can kill the process, as `kill -9` would.
//!
//! A point costs one load where no test asked for it. `DECANT_CRASH=NAME` (or `NAME#3` for its third passage) in the
//! environment makes the process end there by `SIGKILL`, or with `DECANT_CRASH_SIGNAL=stop` stand still there by `SIGSTOP`,
//! so that a test can kill this process and others at the same instant. `DECANT_CRASH_TRACE=FILE` appends the name of every
//! point that is passed, so that a sweep can enumerate them from an undisturbed run.

use std::collections::HashMap;
use std::io::Write;
use std::sync::{Mutex, OnceLock};

use rustix::process::Signal;

struct Plan {
    point: Option<(String, u64)>,
    signal: Signal,
    trace: Option<std::fs::File>,
    passed: Mutex<HashMap<String, u64>>,
}

static PLAN: OnceLock<Option<Plan>> = OnceLock::new();

fn plan() -> &'static Option<Plan> {
    PLAN.get_or_init(|| {
        let point = std::env::var("DECANT_CRASH").ok().map(|text| match text.rsplit_once('#') {
            Some((name, nth)) => (name.to_owned(), nth.parse().unwrap_or(1)),
            None => (text, 1),
        });
        let trace = std::env::var_os("DECANT_CRASH_TRACE")
            .and_then(|path| std::fs::OpenOptions::new().create(true).append(true).open(path).ok());
        let stop = std::env::var("DECANT_CRASH_SIGNAL").is_ok_and(|text| text == "stop");
        let signal = if stop { Signal::STOP } else { Signal::KILL };
        (point.is_some() || trace.is_some()).then(|| Plan { point, signal, trace, passed: Mutex::default() })
    })
}

/// Whether a test watches the points, for callers whose point names cost something to make.
pub fn is_watched() -> bool {
    plan().is_some()
}

/// Passes the point `name`: dies or stops here if a test asked for that, records the passage if a test traces.
pub fn point(name: &str) {
    let Some(plan) = plan() else { return };
    if let Some(mut trace) = plan.trace.as_ref() {
        // One write call: appends of several processes do not mix.
        let _ = trace.write_all(format!("{name}\n").as_bytes());
    }
    let Some((wanted, nth)) = &plan.point else { return };
    if wanted != name {
        return;
    }
    let mut passed = plan.passed.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let count = passed.entry(name.to_owned()).or_insert(0);
    *count += 1;
    if *count == *nth {
        end_here(plan.signal);
    }
}

/// Gives the process the signal; this thread does not go on beyond the point.
fn end_here(signal: Signal) {
    let _ = rustix::process::kill_process(rustix::process::getpid(), signal);
    // Every thread takes a SIGKILL on its way back from the very call above. A SIGSTOP waits for one thread of the kernel's choice,
    // the first, and stops the others when that one has taken it: this one must not send or write anything meanwhile.
    while is_pending(signal) {
        std::thread::yield_now();
    }
}

/// Whether a signal to the whole process was not taken yet, by `ShdPnd` of proc_pid_status(5), a mask with signal 1 as bit 0.
fn is_pending(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("ShdPnd:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal.as_raw() - 1) & 1 == 1
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use rustix::process::{Pid, WaitId, WaitIdOptions, kill_process, waitid};

    use super::*;

    /// The child's part of the test below; does nothing in an ordinary run.
    #[test]
    fn a_child_passes_a_point_in_one_of_many_threads() {
        let Some(file) = std::env::var_os("DECANT_TEST_BEYOND") else { return };
        let passes = std::thread::spawn(move || {
            // The first thread, which is to take the signal, gets the one processor last.
            rustix::process::setpriority_process(Some(rustix::process::getpid()), 19).expect("a lower priority");
            point("here");
            std::fs::write(file, "beyond").expect("a file");
        });
        passes.join().expect("it goes on");
    }

    #[test]
    fn a_process_that_is_to_stand_still_does_nothing_beyond_the_point() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        for n in 0..5 {
            let beyond = directory.path().join(n.to_string());
            let mut child = Command::new("taskset")
                .args(["--cpu-list", "0"])
                .arg(std::env::current_exe().expect("this program"))
                .args(["--exact", "crash::tests::a_child_passes_a_point_in_one_of_many_threads"])
                .env("DECANT_TEST_BEYOND", &beyond)
                .env("DECANT_CRASH", "here")
                .env("DECANT_CRASH_SIGNAL", "stop")
                .stdout(Stdio::null())
                .spawn()
                .expect("taskset, of the Debian package util-linux");
            let pid = Pid::from_child(&child);
            let options = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            let status = waitid(WaitId::Pid(pid), options).expect("it is our child").expect("something happened");
            let went_on = beyond.exists();
            // Nobody else ends it.
            kill_process(pid, Signal::CONT).expect("it is there");
            assert!(child.wait().expect("it ends").success());
            assert!(status.stopped() && !went_on, "try {n}: it went on beyond the point: {status:?}");
            assert!(beyond.exists(), "try {n}: it goes on when it is told to");
        }
    }
}
