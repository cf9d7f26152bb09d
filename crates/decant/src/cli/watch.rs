//! Watching a drain or a migration: live on a terminal, one line per change otherwise, one JSON object per change with
//! `-o json`. Ctrl-C detaches and says so; what is watched goes on.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::mpsc;
use std::time::Duration;

use decant_api::{Drain, DrainPhase, Migration, MigrationPhase, path};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde::Serialize;

use super::output::{Output, duration, print};
use super::{Agent, Exit, Failure, Global, drain, progress};

/// Between two looks: finer than a person reads, and nothing for an agent to answer.
const PACE: Duration = Duration::from_millis(100);
/// Failed looks in a row after which watching ends: an agent that restarts is back within seconds.
const PATIENCE: u32 = 100;

/// Follows a drain to its end.
pub(crate) fn drain(agent: &mut Agent, first: Drain, global: &Global, detach: bool) -> Result<Exit, Failure> {
    let (id, at) = (first.drain.clone(), path::drain(&first.drain));
    let hint = format!("decant drain watch {id}");
    let last = follow(agent, first, &at, global, detach, &hint)?;
    let Some(last) = last else { return Ok(Exit::Detached) };
    for blocker in last.blockers.iter().filter(|_| global.output == Output::Table) {
        eprintln!("{}", drain::blocker_text(blocker));
    }
    Ok(match last.phase {
        DrainPhase::Drained | DrainPhase::Planned => Exit::Done,
        DrainPhase::Blocked => Exit::Blocked,
        DrainPhase::Deadline => Exit::Deadline,
        _ => Exit::Cancelled,
    })
}

/// Follows a migration to its end.
pub(crate) fn migration(agent: &mut Agent, first: Migration, global: &Global, detach: bool) -> Result<Exit, Failure> {
    let (id, at) = (first.migration.clone(), path::migration(&first.migration));
    let last = follow(agent, first, &at, global, detach, &format!("decant migration watch {id}"))?;
    let Some(last) = last else { return Ok(Exit::Detached) };
    Ok(match last.phase {
        MigrationPhase::Verified | MigrationPhase::Cleaned => Exit::Done,
        MigrationPhase::Cancelled => Exit::Cancelled,
        MigrationPhase::Stuck => Exit::Blocked,
        _ => Exit::Error,
    })
}

/// Something that goes on and ends.
trait Watched: Serialize + serde::de::DeserializeOwned + PartialEq {
    fn is_over(&self) -> bool;
    /// Lines keyed by what they are about; a changed line is printed again.
    fn lines(&self) -> Vec<(String, String)>;
    /// A line for its end.
    fn end(&self) -> String;
    /// What of it a change is: without figures that change all the time.
    fn gist(&self) -> String;
    /// Done and total bytes.
    fn bytes(&self) -> (u64, u64);
}

impl Watched for Drain {
    fn is_over(&self) -> bool {
        self.phase.is_final() || self.phase == DrainPhase::Blocked
    }

    fn lines(&self) -> Vec<(String, String)> {
        let mut lines = vec![(String::new(), progress::drain_line(self))];
        let machines = self.machines.iter().map(|machine| machine.machine.to_string());
        lines.extend(machines.zip(progress::drain_machine_lines(self)));
        lines
    }

    fn end(&self) -> String {
        let mut text = progress::drain_phase(self.phase).to_owned();
        if let (Some(evacuated), Some(drained)) = (self.evacuated_ms, self.drained_ms) {
            text.push_str(&format!(" (evacuated after {}, drained after {})", duration(evacuated), duration(drained)));
        }
        text
    }

    fn gist(&self) -> String {
        let machines: Vec<String> =
            self.machines.iter().map(|m| format!("{:?}{:?}{:?}", m.machine, m.phase, m.why)).collect();
        format!("{:?} {machines:?}", self.phase)
    }

    fn bytes(&self) -> (u64, u64) {
        (self.bytes_done, self.bytes_total)
    }
}

impl Watched for Migration {
    fn is_over(&self) -> bool {
        self.phase.is_final() || matches!(self.phase, MigrationPhase::Verified | MigrationPhase::Stuck)
    }

    fn lines(&self) -> Vec<(String, String)> {
        vec![(String::new(), progress::migration_line(self))]
    }

    fn end(&self) -> String {
        progress::migration_line(self)
    }

    fn gist(&self) -> String {
        format!("{:?} {:?}", self.phase, self.why)
    }

    fn bytes(&self) -> (u64, u64) {
        self.progress.map_or((0, 0), |progress| (progress.bytes_done, progress.bytes_total))
    }
}

/// Follows `thing` until it is over: `None` if we detached before.
fn follow<T: Watched>(
    agent: &mut Agent,
    mut thing: T,
    at: &str,
    global: &Global,
    detach: bool,
    hint: &str,
) -> Result<Option<T>, Failure> {
    let mut screen = Screen::new(global.output);
    let interrupts = interrupts().map_err(|error| Failure::local("cannot watch", error, "use --detach"))?;
    let mut failures = 0;
    loop {
        screen.draw(&thing);
        if thing.is_over() {
            screen.finish(&thing);
            return Ok(Some(thing));
        }
        if detach || interrupts.recv_timeout(PACE).is_ok() {
            screen.clear();
            match global.output {
                Output::Table => eprintln!("detached; it goes on. Watch it with: {hint}"),
                // Not among the objects: whoever reads those learns it from the exit status.
                Output::Json => eprintln!("{}", serde_json::json!({ "detached": true, "watch": hint })),
            }
            return Ok(None);
        }
        match agent.get::<T>(at) {
            Ok(next) => (thing, failures) = (next, 0),
            Err(failure) => {
                failures += 1;
                if failures > PATIENCE {
                    return Err(failure);
                }
            }
        }
    }
}

/// A message for each Ctrl-C or SIGTERM.
pub(crate) fn interrupts() -> std::io::Result<mpsc::Receiver<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let (sender, receiver) = mpsc::channel();
    let mut signals = {
        use tokio::signal::unix::{SignalKind, signal};
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            loop {
                tokio::select! {
                    _ = signals.0.recv() => {}
                    _ = signals.1.recv() => {}
                }
                if sender.send(()).is_err() {
                    return;
                }
            }
        });
    });
    Ok(receiver)
}

/// Where progress appears.
enum Screen {
    /// Bars that are drawn over.
    Live { all: MultiProgress, bars: HashMap<String, ProgressBar> },
    /// A line per change.
    Lines { last: HashMap<String, String>, gist: String },
    /// An object per change.
    Json { gist: String },
}

impl Screen {
    fn new(output: Output) -> Self {
        match output {
            Output::Json => Self::Json { gist: String::new() },
            Output::Table if std::io::stderr().is_terminal() && std::io::stdout().is_terminal() => {
                Self::Live { all: MultiProgress::new(), bars: HashMap::new() }
            }
            Output::Table => Self::Lines { last: HashMap::new(), gist: String::new() },
        }
    }

    fn draw<T: Watched>(&mut self, thing: &T) {
        match self {
            Self::Live { all, bars } => {
                for (key, line) in thing.lines() {
                    let bar = bars.entry(key.clone()).or_insert_with(|| all.add(bar(key.is_empty())));
                    if key.is_empty() {
                        let (done, total) = thing.bytes();
                        bar.set_length(total.max(1));
                        bar.set_position(if total == 0 { 0 } else { done.min(total) });
                    }
                    bar.set_message(line);
                    bar.tick();
                }
            }
            Self::Lines { last, gist } => {
                let now = thing.gist();
                if *gist == now {
                    return;
                }
                *gist = now;
                for (key, line) in thing.lines() {
                    if last.get(&key) != Some(&line) {
                        print(&line);
                        last.insert(key, line);
                    }
                }
            }
            Self::Json { gist } => {
                let (done, total) = thing.bytes();
                let now = format!("{} {done} {total}", thing.gist());
                if *gist != now {
                    *gist = now;
                    print(&serde_json::to_string(thing).unwrap_or_else(|error| error.to_string()));
                }
            }
        }
    }

    fn clear(&self) {
        if let Self::Live { all, .. } = self {
            let _ = all.clear();
        }
    }

    fn finish<T: Watched>(&self, thing: &T) {
        self.clear();
        match self {
            Self::Live { .. } => print(&thing.end()),
            Self::Lines { last, .. } if last.get("") != Some(&thing.end()) => print(&thing.end()),
            Self::Lines { .. } | Self::Json { .. } => {}
        }
    }
}

fn bar(first: bool) -> ProgressBar {
    let template = if first { "{bar:24} {wide_msg}" } else { "  {wide_msg}" };
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(1).with_style(style.progress_chars("=> "))
}
