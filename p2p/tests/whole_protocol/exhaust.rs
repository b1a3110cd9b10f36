//! A search that remembers of each state no more than a hash of 64 bits: for those that are too large for stateright's own, which keeps a
//! way to every state. Two states with one hash would be taken for one: among 10^8 states that is one chance in some thousands.

use std::collections::HashSet;
use std::hash::{BuildHasherDefault, DefaultHasher, Hash, Hasher};

use stateright::Model;

use crate::protocol::Protocol;
use crate::state::State;

/// Hashes are hashes already.
#[derive(Default)]
struct Same(u64);

impl Hasher for Same {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {
        unreachable!("only u64 are kept");
    }
    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

fn hash(state: &State) -> u64 {
    let mut hasher = DefaultHasher::new();
    state.hash(&mut hasher);
    hasher.finish()
}

/// What was searched.
#[derive(Debug)]
pub struct Searched {
    /// Steps taken.
    pub steps: u64,
    /// Distinct states.
    pub states: usize,
    /// Steps to the farthest.
    pub depth: u32,
}

/// Searches everything, breadth first, and demands every property in every state.
pub fn exhaust(model: &Protocol) -> Searched {
    let properties = model.properties();
    let mut known: HashSet<u64, BuildHasherDefault<Same>> = HashSet::default();
    let mut level = model.init_states();
    known.extend(level.iter().map(hash));
    let (mut steps, mut depth) = (0, 0);
    let mut actions = Vec::new();
    loop {
        let mut next = Vec::new();
        for state in &level {
            for property in &properties {
                let holds = (property.condition)(model, state);
                assert!(holds, "{}, after {depth} steps, in {state:?}", property.name);
            }
            actions.clear();
            model.actions(state, &mut actions);
            for &action in &actions {
                steps += 1;
                if let Some(new) = model.next_state(state, action)
                    && known.insert(hash(&new))
                {
                    next.push(new);
                }
            }
        }
        if next.is_empty() {
            return Searched { steps, states: known.len(), depth };
        }
        depth += 1;
        eprintln!("after {depth} steps: {} states, {} of them new", known.len(), next.len());
        level = next;
    }
}
