//! Where a file's blocks are: an ordered map from file block to a run of disk blocks.
//!
//! Most files have one extent: it lives in the map itself, without an allocation.

use std::collections::BTreeMap;

use crate::past::Past;

/// Adjoining disk blocks behind adjoining file blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) disk: u64,
    pub(crate) len: u32,
    /// Unwritten blocks read as zeros, whatever the disk holds.
    pub(crate) written: bool,
}

/// A run at its place in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) file: u64,
    pub(crate) run: Run,
}

impl Piece {
    pub(crate) fn end(&self) -> u64 {
        self.file + u64::from(self.run.len)
    }

    /// The part inside `first..end`, if any.
    pub(crate) fn within(&self, first: u64, end: u64) -> Option<Self> {
        (self.file < end && self.end() > first).then(|| self.clip(first, end))
    }

    /// The part inside `first..end`; the two must overlap.
    fn clip(&self, first: u64, end: u64) -> Self {
        let from = self.file.max(first);
        let to = self.end().min(end);
        let len = u32::try_from(to - from).unwrap_or(u32::MAX);
        Self { file: from, run: Run { disk: self.run.disk + (from - self.file), len, ..self.run } }
    }
}

/// All extents of one file.
#[derive(Clone, Debug)]
pub(crate) enum ExtentMap {
    One(Option<Piece>),
    Many(BTreeMap<u64, Run>),
    /// While a checkpoint is gathered that has not saved all of it yet.
    Saving(BTreeMap<u64, Run>, Box<Past<u64, Run>>),
}

impl Default for ExtentMap {
    fn default() -> Self {
        Self::One(None)
    }
}

impl ExtentMap {
    /// Number of extents.
    pub(crate) fn count(&self) -> usize {
        match self {
            Self::One(one) => usize::from(one.is_some()),
            Self::Many(map) | Self::Saving(map, _) => map.len(),
        }
    }

    /// The extent that holds `block`, whole.
    pub(crate) fn at(&self, block: u64) -> Option<Piece> {
        let piece = match self {
            Self::One(one) => (*one)?,
            Self::Many(map) | Self::Saving(map, _) => {
                let (&file, &run) = map.range(..=block).next_back()?;
                Piece { file, run }
            }
        };
        (piece.file <= block && block < piece.end()).then_some(piece)
    }

    /// The extents in `first..end`, clipped to it, in order.
    pub(crate) fn range(&self, first: u64, end: u64) -> impl Iterator<Item = Piece> {
        let (one, many) = match self {
            Self::One(one) => (one.filter(|p| p.file < end && p.end() > first), None),
            Self::Many(map) | Self::Saving(map, _) => {
                let from = self.at(first).map_or(first, |p| p.file);
                (None, Some(map.range(from..end.max(from))))
            }
        };
        let many = many.into_iter().flatten().map(|(&file, &run)| Piece { file, run });
        one.into_iter().chain(many).map(move |p| p.clip(first, end))
    }

    /// Every extent in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Piece> {
        self.range(0, u64::MAX)
    }

    /// The last extent that begins before `block`.
    pub(crate) fn before(&self, block: u64) -> Option<Piece> {
        match self {
            Self::One(one) => one.filter(|p| p.file < block),
            Self::Many(map) | Self::Saving(map, _) => {
                map.range(..block).next_back().map(|(&file, &run)| Piece { file, run })
            }
        }
    }

    fn put(&mut self, piece: Piece) {
        match self {
            Self::One(slot @ None) => *slot = Some(piece),
            Self::One(Some(old)) => {
                *self = Self::Many(BTreeMap::from([(old.file, old.run), (piece.file, piece.run)]));
            }
            Self::Many(map) => {
                map.insert(piece.file, piece.run);
            }
            Self::Saving(map, past) => {
                let was = map.insert(piece.file, piece.run);
                past.note(piece.file, was);
            }
        }
    }

    fn cut(&mut self, file: u64) {
        match self {
            Self::One(one) => *one = one.filter(|p| p.file != file),
            Self::Many(map) => {
                map.remove(&file);
                if map.is_empty() {
                    *self = Self::default();
                }
            }
            Self::Saving(map, past) => {
                let was = map.remove(&file);
                past.note(file, was);
            }
        }
    }

    /// Maps a range that is a hole now, adjoining neighbours that continue it.
    pub(crate) fn insert(&mut self, mut piece: Piece) {
        if let Some(before) = piece.file.checked_sub(1).and_then(|b| self.at(b))
            && before.run.written == piece.run.written
            && before.run.disk + u64::from(before.run.len) == piece.run.disk
            && let Some(len) = before.run.len.checked_add(piece.run.len)
        {
            self.cut(before.file);
            piece = Piece { file: before.file, run: Run { len, ..before.run } };
        }
        if let Some(after) = self.at(piece.end())
            && after.run.written == piece.run.written
            && piece.run.disk + u64::from(piece.run.len) == after.run.disk
            && let Some(len) = after.run.len.checked_add(piece.run.len)
        {
            self.cut(after.file);
            piece.run.len = len;
        }
        self.put(piece);
    }

    /// Makes `first..end` a hole; what was mapped there goes to `removed`.
    pub(crate) fn remove(&mut self, first: u64, end: u64, removed: &mut Vec<Piece>) {
        while let Some(piece) = self.first_in(first, end) {
            self.cut(piece.file);
            if piece.file < first {
                self.put(piece.clip(piece.file, first));
            }
            if piece.end() > end {
                self.put(piece.clip(end, piece.end()));
            }
            removed.push(piece.clip(first, end));
        }
    }

    fn first_in(&self, first: u64, end: u64) -> Option<Piece> {
        if first >= end {
            return None;
        }
        self.at(first).or_else(|| match self {
            Self::One(one) => one.filter(|p| p.file >= first && p.file < end),
            Self::Many(map) | Self::Saving(map, _) => {
                map.range(first..end).next().map(|(&file, &run)| Piece { file, run })
            }
        })
    }

    /// From here on it remembers what it was, until `past_part` has handed out all of that.
    pub(crate) fn begin_past(&mut self) {
        if let Self::Many(map) = self {
            *self = Self::Saving(std::mem::take(map), Box::new(Past::begin()));
        }
    }

    /// The next `most` extents of what it was when `begin_past` was called, and whether more are left.
    pub(crate) fn past_part(&mut self, most: usize) -> (Vec<Piece>, bool) {
        let Self::Saving(map, past) = self else { return (Vec::new(), false) };
        let part: Vec<_> = past.rest(map).take(most).map(|(&file, run)| Piece { file, run }).collect();
        if let Some(last) = part.last() {
            past.skip(last.file);
        }
        let more = past.rest(map).next().is_some();
        if !more {
            let map = std::mem::take(map);
            *self = if map.is_empty() { Self::default() } else { Self::Many(map) };
        }
        (part, more)
    }

    /// Turns `first..end` from unwritten to written. Returns false if part of it is a hole.
    pub(crate) fn set_written(&mut self, first: u64, end: u64) -> bool {
        let covered: u64 = self.range(first, end).map(|p| u64::from(p.run.len)).sum();
        if covered != end.saturating_sub(first) {
            return false;
        }
        let mut pieces = Vec::new();
        self.remove(first, end, &mut pieces);
        for mut piece in pieces {
            piece.run.written = true;
            self.insert(piece);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(file: u64, disk: u64, len: u32, written: bool) -> Piece {
        Piece { file, run: Run { disk, len, written } }
    }

    #[test]
    fn splits_merges_and_converts() {
        let mut map = ExtentMap::default();
        map.insert(piece(10, 100, 5, false));
        map.insert(piece(15, 105, 5, false));
        assert_eq!(map.iter().collect::<Vec<_>>(), [piece(10, 100, 10, false)]);
        assert!(map.set_written(12, 14));
        assert_eq!(map.count(), 3);
        assert!(!map.set_written(9, 14));
        let mut removed = Vec::new();
        map.remove(13, 17, &mut removed);
        assert_eq!(removed, [piece(13, 103, 1, true), piece(14, 104, 3, false)]);
        map.insert(piece(13, 103, 1, true));
        assert!(map.set_written(10, 14));
        assert!(map.set_written(17, 20));
        assert_eq!(map.iter().collect::<Vec<_>>(), [piece(10, 100, 4, true), piece(17, 107, 3, true)]);
        assert_eq!(map.range(12, 18).collect::<Vec<_>>(), [piece(12, 102, 2, true), piece(17, 107, 1, true)]);
        assert_eq!(map.before(17), Some(piece(10, 100, 4, true)));
        map.remove(0, u64::MAX, &mut removed);
        assert_eq!(map.count(), 0);
    }
}
