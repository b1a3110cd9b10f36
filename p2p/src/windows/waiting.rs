//! What a move waits for, for whoever waits for it.

use std::fmt;

use super::Windows;
use super::moves::Phase;
use super::reclaim::Claim;
use crate::layout::Home;

/// What keeps a window's move from ending now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InTheWay {
    /// Its bytes are on their way, in use as before.
    Copying {
        /// They go to the drive and not to another place.
        to_drive: bool,
    },
    /// Write sections are open there, or a peer has work left. They have until the end of the grace.
    Draining {
        /// The sections. If there are none, it is a peer.
        sections: usize,
    },
    /// Somebody was cut off there and has not answered, and the bytes find no place where his late stores do not show.
    Unsafe {
        /// Write sections and mappings that were cut off.
        silent: usize,
        /// Why the bytes cannot be brought to safety.
        why: String,
    },
}

impl fmt::Display for InTheWay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Copying { to_drive: true } => f.write_str("its dirty pages are being written back"),
            Self::Copying { to_drive: false } => f.write_str("its bytes are being copied"),
            Self::Draining { sections: 0 } => f.write_str("a peer has not finished there"),
            Self::Draining { sections: 1 } => f.write_str("a write section there has not ended"),
            Self::Draining { sections } => write!(f, "{sections} write sections there have not ended"),
            Self::Unsafe { silent, why } => {
                write!(
                    f,
                    "{silent} that were cut off there have not answered, and its bytes cannot be brought to safety: {why}"
                )
            }
        }
    }
}

impl Windows {
    /// What keeps the move of a window from ending; `None`: it does not move.
    pub fn in_the_way(&self, index: u32) -> Option<InTheWay> {
        let m = self.window(index)?.moving.as_deref()?;
        Some(match m.phase {
            Phase::Copy => InTheWay::Copying { to_drive: m.request.to == Home::None },
            Phase::Drain { .. } => InTheWay::Draining { sections: m.writers() },
            Phase::Stuck { .. } => {
                let silent = m.fenced.iter().filter(|c| **c != Claim::Device).count();
                InTheWay::Unsafe { silent, why: m.stuck.clone().unwrap_or_default() }
            }
        })
    }
}
