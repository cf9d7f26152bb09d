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
        // Taken on the way back from this very call: nothing of the process goes on beyond the point.
        let _ = rustix::process::kill_process(rustix::process::getpid(), plan.signal);
    }
}
