//! Where a file's windows may live, as its owner or whoever serves wants it.

use std::fmt;
use std::str::FromStr;

/// Where the windows of a file may live. [`decide`](Self::decide) says whose word counts.
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

/// Who says where a file's windows may live.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PlacedBy {
    /// Nobody: it is `auto`.
    #[default]
    Nobody,
    /// The file has a choice of its own.
    File,
    /// The filesystem, for files without one.
    Filesystem,
    /// The server was started so, for all files.
    Server,
}

impl PlacedBy {
    /// Its number in messages.
    pub fn number(self) -> u16 {
        self as u16
    }

    /// Who is behind a number.
    pub(crate) fn from_number(number: u16) -> Self {
        let all = [Self::File, Self::Filesystem, Self::Server];
        all.into_iter().find(|p| p.number() == number).unwrap_or_default()
    }
}

impl fmt::Display for PlacedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nobody => "nobody has chosen",
            Self::File => "the file's own choice",
            Self::Filesystem => "the filesystem's choice",
            Self::Server => "serve --placement, whatever files say",
        })
    }
}

/// Not the name of a placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a placement is auto, cmb or host")]
pub struct UnknownPlacement;

impl Placement {
    const ALL: [(Self, &'static str); 3] = [(Self::Auto, "auto"), (Self::Cmb, "cmb"), (Self::Host, "host")];

    /// Its number in messages.
    pub fn number(self) -> u16 {
        self as u16
    }

    /// The placement behind a number, if there is one.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.iter().map(|(p, _)| *p).find(|p| u32::from(p.number()) == number)
    }

    /// What an inode keeps for this choice (`extent_fs::SetAttr::placement`).
    pub fn kept(choice: Option<Self>) -> u8 {
        choice.map_or(0, |p| p as u8 + 1)
    }

    /// The choice that an inode keeps. A newer program's number is none.
    pub fn from_kept(kept: u8) -> Option<Self> {
        Self::from_number(u32::from(kept.checked_sub(1)?))
    }

    /// Whose word counts: the server's if it was told anything but `auto`, else the file's, else the filesystem's. `own` and `all` are what
    /// the file's inode and the root directory's keep.
    pub fn decide(server: Self, own: u8, all: u8) -> (Self, PlacedBy) {
        if server != Self::Auto {
            return (server, PlacedBy::Server);
        }
        let own = Self::from_kept(own).map(|p| (p, PlacedBy::File));
        let all = || Self::from_kept(all).map(|p| (p, PlacedBy::Filesystem));
        own.or_else(all).unwrap_or_default()
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
