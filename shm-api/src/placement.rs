//! Where a file's windows may live, as its owner or whoever serves wants it.

use std::fmt;
use std::str::FromStr;

/// Where the windows of a file may live. A file's own setting goes before the server's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// In the CMB while there is room, else in the host cache; but readers on the processor get the host cache where the server has measured that
    /// the CMB is slow for them.
    #[default]
    Auto,
    /// In the CMB while there is room, else in the host cache, whatever was measured.
    Cmb,
    /// In the host cache: the file opted out of direct mapping.
    Host,
}

/// Not the name of a placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a placement is auto, cmb or host")]
pub struct UnknownPlacement;

impl Placement {
    const ALL: [(Self, &'static str); 3] = [(Self::Auto, "auto"), (Self::Cmb, "cmb"), (Self::Host, "host")];

    /// Its number in messages.
    pub fn number(self) -> u32 {
        self as u32
    }

    /// The placement behind a number, if there is one.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.iter().map(|(p, _)| *p).find(|p| p.number() == number)
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::ALL.iter().find(|(p, _)| p == self).map_or("", |(_, name)| name))
    }
}

impl FromStr for Placement {
    type Err = UnknownPlacement;
    fn from_str(text: &str) -> Result<Self, UnknownPlacement> {
        Self::ALL.iter().find(|(_, name)| *name == text).map(|(p, _)| *p).ok_or(UnknownPlacement)
    }
}
