//! The shared words: where they lie and how they are packed. Nothing here touches memory.
//!
//! Three regions, each in a memfd of its own that the server creates, sizes and seals:
//!
//! * the *control page(s)*: one header and one control slot per window; the server writes, clients map it read-only;
//! * a *client region* per client: its section slots and its dirty bits; the client writes, and every word is hostile;
//! * the window memory itself: the CMB, and one sparse host-cache file per object.
//!
//! All words are little-endian and naturally aligned. `docs/revocation.md` argues the protocol that runs over them.

/// "cmbfsctl", little-endian, at offset 0 of the control region.
pub const CONTROL_MAGIC: u64 = u64::from_le_bytes(*b"cmbfsctl");
/// Version of everything in this file.
pub const VERSION: u32 = 1;

/// Bytes before the first control slot.
pub const CONTROL_HEADER: usize = 4096;
/// Bytes per control slot.
pub const CONTROL_SLOT: usize = 32;

/// Byte offsets in the control header.
pub mod header {
    /// `u64`: [`CONTROL_MAGIC`](super::CONTROL_MAGIC).
    pub const MAGIC: usize = 0;
    /// `u32`: [`VERSION`](super::VERSION).
    pub const VERSION: usize = 8;
    /// `u32`: bytes per control slot.
    pub const SLOT_SIZE: usize = 12;
    /// `u32`: number of control slots.
    pub const SLOTS: usize = 16;
    /// `u64`: offset in the CMB of the canary word, or all ones when the CMB is ordinary memory and needs none.
    pub const CANARY: usize = 24;
    /// `u64`: the device generation. On a cache line of its own with the next word: both are read with every copy.
    pub const DEVICE_GENERATION: usize = 64;
    /// `u32`: robust-futex word of the server: its owner's thread id while it lives; see [`server_alive`](super::server_alive).
    pub const SERVER: usize = 72;
}

/// Byte offsets in a control slot.
pub mod slot {
    /// `u64`: the window's generation.
    pub const GENERATION: usize = 0;
    /// `u64`: its [`Place`](super::Place).
    pub const PLACE: usize = 8;
    /// `u32`: incarnation of the slot; a handle from another one is stale.
    pub const INCARNATION: usize = 16;
}

/// Bytes per section slot in a client region: one cache line, so that two threads never share one.
pub const SECTION_SLOT: usize = 64;
/// Section slots per client: as many sections and borrows as it can have open at once.
pub const SECTION_SLOTS: usize = 32;
/// Offset in a client region of the dirty bits: words of 64 pages, addressed by the word index in a write hold.
pub const DIRTY: usize = 4096;
/// Byte offsets in a section slot.
pub mod section {
    /// `u64`: the packed [`SectionWord`](super::SectionWord).
    pub const WORD: usize = 0;
    /// `u64`: for a borrow, the word of the place it is of; 0 while that is not known yet.
    pub const NOTE: usize = 8;
}

/// Smallest window in bytes.
pub const MIN_WINDOW: usize = 4096;
/// Window size when nobody asks for another.
pub const DEFAULT_WINDOW: usize = 256 * 1024;

/// Distance between the lanes of a host-cache file, and so the largest object: 1 PiB. A window lies at its own object
/// offset in lane 0; another lane is used only while lane 0 is quarantined for a silent client.
pub const LANE: u64 = 1 << 50;
/// Number of lanes in a host-cache file.
pub const LANES: u64 = 16;

/// The kernel sets this bit in the server word when the owner dies (`FUTEX_OWNER_DIED`).
const OWNER_DIED: u32 = 0x4000_0000;
const TID_MASK: u32 = 0x3fff_ffff;

/// Whether the server word says that the server lives.
#[inline]
pub fn server_alive(word: u32) -> bool {
    word & OWNER_DIED == 0 && word & TID_MASK != 0
}

/// Where a window's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Home {
    /// Nowhere: they are on the drive only.
    None,
    /// In the CMB.
    Cmb,
    /// In the object's host-cache file.
    Host,
}

/// A window's place: its home, the 4 KiB-aligned byte offset there, and the low 16 bits of the device generation under
/// which it is valid. A place from another device generation is no place, which makes a mass revocation one store.
///
/// Bits 0..2: home (0 none, 1 CMB, 2 host cache); bits 2..48: offset / 4096; bits 48..64: device generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place(u64);

impl Place {
    /// No place at all.
    pub const NONE: Self = Self(0);

    /// A place; `None` if `offset` is not 4 KiB-aligned or does not fit 58 bits.
    pub fn new(home: Home, offset: u64, device_generation: u64) -> Option<Self> {
        let kind = match home {
            Home::None => return Some(Self::NONE),
            Home::Cmb => 1,
            Home::Host => 2,
        };
        if offset & 0xfff != 0 || offset >> 58 != 0 {
            return None;
        }
        Some(Self(kind | ((offset >> 12) << 2) | (device_generation << 48)))
    }

    /// From the word in a control slot. Any value is accepted; unknown homes read as [`Home::None`].
    #[inline]
    pub fn from_word(word: u64) -> Self {
        Self(word)
    }

    /// As the word in a control slot.
    #[inline]
    pub fn word(self) -> u64 {
        self.0
    }

    /// Where the bytes are.
    #[inline]
    pub fn home(self) -> Home {
        match self.0 & 3 {
            1 => Home::Cmb,
            2 => Home::Host,
            _ => Home::None,
        }
    }

    /// Byte offset in that home, a multiple of 4 KiB.
    #[inline]
    pub fn offset(self) -> u64 {
        ((self.0 >> 2) & ((1 << 46) - 1)) << 12
    }

    /// Whether this is a place under `device_generation`.
    #[inline]
    pub fn valid_under(self, device_generation: u64) -> bool {
        self.home() != Home::None && self.0 >> 48 == device_generation & 0xffff
    }
}

/// What a section slot says about its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SectionState {
    /// Not in a section.
    Idle,
    /// In a section, or about to find out that it may not be.
    Active,
    /// The section ended and was not fenced.
    Done,
    /// The server gave up waiting: whatever the section still stores is lost, and its owner will be told.
    Fenced,
}

/// What kind of section it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SectionKind {
    /// Stores into the window.
    Write,
    /// Reads the window in place.
    Borrow,
}

/// The word of a section slot. Bits 0..2 state, bit 2 kind, bits 3..31 window (control slot index), bits 31..64 sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SectionWord(u64);

/// Number of windows that a section word can name.
pub const MAX_WINDOWS: u32 = 1 << 28;

impl SectionWord {
    /// Packs a word. `window` below [`MAX_WINDOWS`]; the sequence is cut to 33 bits.
    #[inline]
    pub fn new(state: SectionState, kind: SectionKind, window: u32, sequence: u64) -> Self {
        let k = u64::from(kind == SectionKind::Borrow);
        Self(state as u64 | (k << 2) | (u64::from(window & (MAX_WINDOWS - 1)) << 3) | (sequence << 31))
    }

    /// From the word in a slot. Every value is some section word: hostile ones are merely wrong.
    #[inline]
    pub fn from_word(word: u64) -> Self {
        Self(word)
    }

    /// As the word in a slot.
    #[inline]
    pub fn word(self) -> u64 {
        self.0
    }

    /// The state.
    #[inline]
    pub fn state(self) -> SectionState {
        match self.0 & 3 {
            0 => SectionState::Idle,
            1 => SectionState::Active,
            2 => SectionState::Done,
            _ => SectionState::Fenced,
        }
    }

    /// The kind.
    #[inline]
    pub fn kind(self) -> SectionKind {
        if self.0 & 4 == 0 { SectionKind::Write } else { SectionKind::Borrow }
    }

    /// The control slot index of the window.
    #[inline]
    pub fn window(self) -> u32 {
        (self.0 >> 3) as u32 & (MAX_WINDOWS - 1)
    }

    /// The sequence: raised with every section of this slot.
    #[inline]
    pub fn sequence(self) -> u64 {
        self.0 >> 31
    }

    /// The same section in another state.
    #[inline]
    pub fn with_state(self, state: SectionState) -> Self {
        Self(self.0 & !3 | state as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_survives_packing_and_knows_its_device_generation() {
        let p = Place::new(Home::Cmb, 0x3f_f000, 0x1_0002).unwrap();
        assert_eq!((p.home(), p.offset()), (Home::Cmb, 0x3f_f000));
        assert!(p.valid_under(2) && p.valid_under(0x1_0002) && !p.valid_under(3));
        assert_eq!(Place::new(Home::Host, 17, 0), None);
        assert_eq!(Place::new(Home::Host, 1 << 58, 0), None);
        let top = (1 << 58) - 4096;
        assert_eq!(Place::new(Home::Host, top, u64::MAX).unwrap().offset(), top);
        assert!(!Place::NONE.valid_under(0));
        const { assert!(LANE * LANES <= 1 << 58) };
    }

    #[test]
    fn a_section_word_survives_packing() {
        let w = SectionWord::new(SectionState::Active, SectionKind::Borrow, MAX_WINDOWS - 1, 77);
        assert_eq!((w.window(), w.sequence()), (MAX_WINDOWS - 1, 77));
        assert_eq!((w.state(), w.kind()), (SectionState::Active, SectionKind::Borrow));
        let f = w.with_state(SectionState::Fenced);
        assert_eq!((f.state(), f.window(), f.sequence()), (SectionState::Fenced, MAX_WINDOWS - 1, 77));
    }
}
