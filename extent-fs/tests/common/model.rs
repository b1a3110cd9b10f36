//! What a filesystem should do, in the simplest way: a tree of maps.

use std::collections::BTreeMap;
use std::sync::Arc;

use extent_fs::{Filesystem, Kind, ROOT};
use nvme_driver::disk::Disk;

pub type Id = u64;
pub type Errno = i32;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    File { data: Arc<Vec<u8>>, links: u32 },
    Dir { entries: BTreeMap<String, Id> },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    pub nodes: BTreeMap<Id, Node>,
    /// Those that have one; the root's is the filesystem's.
    placements: BTreeMap<Id, u8>,
    next: Id,
    /// The file that is held open.
    pub open: Option<Id>,
}

impl Default for Model {
    fn default() -> Self {
        let root = Node::Dir { entries: BTreeMap::new() };
        Self { nodes: BTreeMap::from([(0, root)]), placements: BTreeMap::new(), next: 1, open: None }
    }
}

type Res<T = ()> = Result<T, Errno>;

const ENOENT: Errno = 2;
const EEXIST: Errno = 17;
const ENOTDIR: Errno = 20;
const EISDIR: Errno = 21;
const EINVAL: Errno = 22;
const ENOTEMPTY: Errno = 39;

impl Model {
    pub fn lookup(&self, path: &str) -> Res<Id> {
        path.split('/')
            .filter(|n| !n.is_empty())
            .try_fold(0, |at, name| self.dir(at)?.get(name).copied().ok_or(ENOENT))
    }

    fn dir(&self, id: Id) -> Res<&BTreeMap<String, Id>> {
        match self.nodes.get(&id) {
            Some(Node::Dir { entries }) => Ok(entries),
            _ => Err(ENOTDIR),
        }
    }

    fn dir_mut(&mut self, id: Id) -> &mut BTreeMap<String, Id> {
        match self.nodes.get_mut(&id) {
            Some(Node::Dir { entries }) => entries,
            _ => panic!("no directory"),
        }
    }

    fn parent<'p>(&self, path: &'p str) -> Res<(Id, &'p str)> {
        let (dir, name) = path.rsplit_once('/').unwrap();
        let id = self.lookup(dir)?;
        self.dir(id)?;
        Ok((id, name))
    }

    fn is_dir(&self, id: Id) -> bool {
        matches!(self.nodes.get(&id), Some(Node::Dir { .. }))
    }

    fn add(&mut self, path: &str, node: Node) -> Res {
        let (dir, name) = self.parent(path)?;
        if self.dir(dir)?.contains_key(name) {
            return Err(EEXIST);
        }
        let id = self.next;
        self.next += 1;
        self.nodes.insert(id, node);
        self.dir_mut(dir).insert(name.to_owned(), id);
        Ok(())
    }

    pub fn create(&mut self, path: &str) -> Res {
        self.add(path, Node::File { data: Arc::default(), links: 1 })
    }

    pub fn mkdir(&mut self, path: &str) -> Res {
        self.add(path, Node::Dir { entries: BTreeMap::new() })
    }

    fn drop_link(&mut self, id: Id) {
        let gone = match self.nodes.get_mut(&id) {
            Some(Node::File { links, .. }) => {
                *links -= 1;
                *links == 0 && self.open != Some(id)
            }
            _ => true,
        };
        if gone {
            self.nodes.remove(&id);
        }
    }

    pub fn unlink(&mut self, path: &str) -> Res {
        let (dir, name) = self.parent(path)?;
        let id = *self.dir(dir)?.get(name).ok_or(ENOENT)?;
        if self.is_dir(id) {
            return Err(EISDIR);
        }
        self.dir_mut(dir).remove(name);
        self.drop_link(id);
        Ok(())
    }

    pub fn rmdir(&mut self, path: &str) -> Res {
        let (dir, name) = self.parent(path)?;
        let id = *self.dir(dir)?.get(name).ok_or(ENOENT)?;
        if !self.dir(id)?.is_empty() {
            return Err(ENOTEMPTY);
        }
        self.dir_mut(dir).remove(name);
        self.nodes.remove(&id);
        Ok(())
    }

    pub fn link(&mut self, old: &str, new: &str) -> Res {
        let id = self.lookup(old)?;
        let (dir, name) = self.parent(new)?;
        if self.is_dir(id) {
            return Err(EISDIR);
        }
        if self.dir(dir)?.contains_key(name) {
            return Err(EEXIST);
        }
        self.dir_mut(dir).insert(name.to_owned(), id);
        if let Some(Node::File { links, .. }) = self.nodes.get_mut(&id) {
            *links += 1;
        }
        Ok(())
    }

    fn is_inside(&self, id: Id, top: Id) -> bool {
        id == top || self.dir(top).is_ok_and(|d| d.values().any(|&c| self.is_dir(c) && self.is_inside(id, c)))
    }

    pub fn rename(&mut self, old: &str, new: &str) -> Res {
        let (from, old) = self.parent(old)?;
        let (to, new) = self.parent(new)?;
        let id = *self.dir(from)?.get(old).ok_or(ENOENT)?;
        let there = self.dir(to)?.get(new).copied();
        if there == Some(id) {
            return Ok(());
        }
        if self.is_dir(id) && self.is_inside(to, id) {
            return Err(EINVAL);
        }
        if let Some(there) = there {
            match (self.is_dir(id), self.is_dir(there)) {
                (false, true) => return Err(EISDIR),
                (true, false) => return Err(ENOTDIR),
                (true, true) if !self.dir(there)?.is_empty() => return Err(ENOTEMPTY),
                _ => {}
            }
            self.dir_mut(to).remove(new);
            self.drop_link(there);
        }
        self.dir_mut(from).remove(old);
        self.dir_mut(to).insert(new.to_owned(), id);
        Ok(())
    }

    /// The bytes of a file.
    pub fn data(&mut self, id: Id) -> Res<&mut Vec<u8>> {
        match self.nodes.get_mut(&id) {
            Some(Node::File { data, .. }) => Ok(Arc::make_mut(data)),
            _ => Err(EISDIR),
        }
    }

    pub fn file(&self, id: Id) -> Option<&[u8]> {
        match self.nodes.get(&id) {
            Some(Node::File { data, .. }) => Some(data),
            _ => None,
        }
    }

    pub fn place(&mut self, path: &str, placement: u8) -> Res {
        let id = self.lookup(path)?;
        if id != 0 && self.is_dir(id) {
            return Err(EISDIR);
        }
        self.placements.insert(id, placement);
        Ok(())
    }

    pub fn placement(&self, id: Id) -> u8 {
        self.placements.get(&id).copied().unwrap_or(0)
    }

    pub fn close(&mut self) {
        if let Some(id) = self.open.take()
            && matches!(self.nodes.get(&id), Some(Node::File { links: 0, .. }))
        {
            self.nodes.remove(&id);
        }
    }

    /// Every path, with what it names; the root's is empty.
    pub fn tree(&self) -> Vec<(String, Id)> {
        let mut out = vec![(String::new(), 0)];
        self.walk(0, "", &mut out);
        out
    }

    fn walk(&self, id: Id, path: &str, out: &mut Vec<(String, Id)>) {
        if let Some(Node::Dir { entries }) = self.nodes.get(&id) {
            for (name, &child) in entries {
                let path = format!("{path}/{name}");
                out.push((path.clone(), child));
                self.walk(child, &path, out);
            }
        }
    }
}

/// What a real filesystem holds: path -> contents (`None`: a directory), number of links and placement.
pub type Found = Vec<(String, Option<Vec<u8>>, u32, u8)>;

/// Reads everything below the root.
pub fn read_all<D: Disk>(fs: &mut Filesystem<D>) -> Found {
    let mut out = Vec::new();
    let mut todo = vec![(String::new(), ROOT)];
    while let Some((path, dir)) = todo.pop() {
        for e in fs.readdir(dir).unwrap() {
            let path = format!("{path}/{}", String::from_utf8_lossy(&e.name));
            let stat = fs.stat(e.ino).unwrap();
            if e.kind == Kind::Directory {
                out.push((path.clone(), None, stat.nlink, stat.placement));
                todo.push((path, e.ino));
            } else {
                let mut bytes = vec![0xaa; stat.size as usize];
                assert_eq!(fs.read_at(e.ino, 0, &mut bytes).unwrap(), bytes.len());
                out.push((path, Some(bytes), stat.nlink, stat.placement));
            }
        }
    }
    out.sort();
    out
}

/// The same and the root itself.
pub fn read_whole<D: Disk>(fs: &mut Filesystem<D>) -> Found {
    let root = fs.stat(ROOT).unwrap();
    let mut out = vec![(String::new(), None, root.nlink, root.placement)];
    out.append(&mut read_all(fs));
    out
}
