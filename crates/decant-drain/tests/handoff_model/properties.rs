//! What must hold in every state, and from which states no end is reached.

use std::collections::{HashMap, HashSet, VecDeque};

use decant_base::Epoch;
use decant_drain::Row;
use decant_drain::handoff::State;
use stateright::{Model, Property};

use crate::model::{Action, World};
use crate::steps::Handoff;
use crate::world::{Kind, Site};

/// The invariants.
pub(crate) fn all() -> Vec<Property<Handoff>> {
    vec![
        Property::always("at most one worker runs the machine", |_, world: &World| {
            world.workers.iter().filter(|w| w.alive && w.site.running).count() <= 1
        }),
        Property::always("whoever runs the machine durably owns it", |model: &Handoff, world: &World| {
            world.workers.iter().all(|w| !w.site.running || model.row(w.disk).state.owned().is_some())
        }),
        Property::always("at most one owner, with the highest epoch", |model: &Handoff, world: &World| {
            let rows: Vec<_> = world.workers.iter().filter(|w| w.alive).map(|w| model.row(w.disk)).collect();
            let owners: Vec<Epoch> = rows.iter().filter_map(|row| row.state.owned()).collect();
            let highest = rows.iter().filter_map(|row| claim(row)).max();
            owners.len() <= 1 && owners.first().is_none_or(|owner| Some(*owner) == highest)
        }),
        Property::always("no write after the seal", |_, world: &World| {
            world.workers.iter().all(|w| !(w.site.running && w.site.kind == Kind::Sealed))
        }),
        Property::always("nobody is told what makes no sense", |_, world: &World| {
            world.workers.iter().all(|w| !w.site.wrong)
        }),
        Property::always("every acknowledged block is readable by the owner", |model: &Handoff, world: &World| {
            model.scope.stateless || world.removed || model.is_readable(world)
        }),
    ]
}

/// The epoch a row claims to have, or to have had.
fn claim(row: &Row) -> Option<Epoch> {
    match row.state {
        State::Active { epoch }
        | State::Moving { epoch, .. }
        | State::Sealed { epoch, .. }
        | State::Released { epoch } => Some(epoch),
        State::None | State::Prepared { .. } => None,
    }
}

impl Handoff {
    /// Whoever owns the machine, or will when its grant arrives, reaches every acknowledged write.
    fn is_readable(&self, world: &World) -> bool {
        let alive = || world.workers.iter().filter(|w| w.alive);
        let origin = alive().any(|w| w.site.kind == Kind::Sealed);
        let reaches = |site: &Site| {
            site.version == world.acknowledged
                && match site.kind {
                    Kind::Plain | Kind::Filled | Kind::Sealed => true,
                    Kind::Clone => origin,
                    Kind::None | Kind::Prepared => false,
                }
        };
        let owner = alive().find(|w| self.row(w.disk).state.owned().is_some());
        match owner {
            // Granted, not begun: the sealed copy is what it will read.
            Some(owner) if owner.site.kind == Kind::Prepared => {
                alive().any(|w| w.site.kind == Kind::Sealed && reaches(&w.site))
            }
            Some(owner) => reaches(&owner.site),
            None => alive().any(|w| reaches(&w.site)),
        }
    }
}

/// States from which no end can be reached.
pub(crate) fn dead_ends(model: &Handoff) -> HashSet<u64> {
    let edges = model.edges.lock().expect("a lock");
    let mut backwards: HashMap<u64, Vec<u64>> = HashMap::new();
    let mut all = HashSet::new();
    for (from, to) in edges.iter() {
        backwards.entry(*to).or_default().push(*from);
        all.extend([*from, *to]);
    }
    let mut reached: HashSet<u64> = model.ends.lock().expect("a lock").iter().copied().collect();
    let mut work: Vec<u64> = reached.iter().copied().collect();
    while let Some(state) = work.pop() {
        for from in backwards.get(&state).into_iter().flatten() {
            if reached.insert(*from) {
                work.push(*from);
            }
        }
    }
    all.difference(&reached).copied().collect()
}

/// A shortest way into one of `dead`, for a person to read.
pub(crate) fn way_into(model: &Handoff, dead: &HashSet<u64>) -> String {
    let mut seen = HashSet::new();
    let mut work: VecDeque<(World, Vec<String>)> =
        model.init_states().into_iter().map(|world| (world, Vec::new())).collect();
    while let Some((world, way)) = work.pop_front() {
        if dead.contains(&model.fingerprint(&world)) {
            let rows =
                world.workers.iter().map(|w| format!("\n  {} {:?}", model.row(w.mem).summary(), w)).collect::<String>();
            return format!("{}{rows}", way.join("\n"));
        }
        let mut actions = Vec::new();
        model.actions(&world, &mut actions);
        for action in actions {
            let Some(next) = model.next_state(&world, action) else { continue };
            if seen.insert(model.fingerprint(&next)) {
                let what = match action {
                    Action::Deliver(letter, _) => format!("{action:?}: {:?}", model.letters.value(letter)),
                    Action::Perform(who, _) | Action::Refuse(who) => {
                        format!(
                            "{action:?}: {:?}",
                            world.workers[who].queue.first().map(|effect| model.effects.value(*effect))
                        )
                    }
                    _ => format!("{action:?}"),
                };
                work.push_back((next, way.iter().cloned().chain([what]).collect()));
            }
        }
    }
    "no way found".to_owned()
}
