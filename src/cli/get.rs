//! `cmbfs get`: a file out of the filesystem.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use clap::Args;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use tempfile::NamedTempFile;

use super::failure::Failure;
use super::place::{At, text};
use super::progress;
use super::store::{Store, last_part, say_where};

/// How names begin that are there for a moment only.
const TEMPORARY: &str = ".cmbfs-get-";

/// Copy a file out of the filesystem
///
/// LOCAL is replaced only once the whole file has been read. Into a directory the file goes under its own name, as with cp.
#[derive(Args, Debug)]
#[command(
    override_usage = "cmbfs get DEVICE PATH LOCAL\n       cmbfs get --socket SOCK PATH LOCAL",
    after_help = "Examples:\n  cmbfs get 'emu:disk.img?cmb=64M' /photo.jpg photo.jpg\n  cmbfs get --socket /tmp/s /photo.jpg ."
)]
pub(crate) struct Get {
    #[command(flatten)]
    at: At,
}

impl Get {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let (place, [path, local]) = self.at.take(["PATH", "LOCAL"])?;
        if local.is_empty() {
            return Err(Failure::usage("LOCAL is empty"));
        }
        let path = text(path, "PATH")?;
        let told = PathBuf::from(local);
        let local = if told.is_dir() {
            told.join(last_part(&path)?)
        } else if told.as_os_str().as_encoded_bytes().ends_with(b"/") {
            return Err(Failure::new(format!("there is no directory {}", told.display())));
        } else {
            told.clone()
        };
        let cannot = |e: io::Error| Failure::from(e).doing(format!("cannot write {}", local.display()));

        let mut store = Store::open(&place)?;
        let size = store.stat(&path)?.size;
        let bar = progress::bar(&path, size);
        // A device node or a pipe is written to; only a plain file is replaced.
        if fs::metadata(&local).is_ok_and(|m| !m.is_file()) {
            let mut out = File::options().write(true).open(&local).map_err(cannot)?;
            store.read_file(&path, &mut |bytes| {
                bar.inc(bytes.len() as u64);
                out.write_all(bytes).map_err(cannot)
            })?;
        } else {
            let mut out = Unfinished::beside(&local).map_err(cannot)?;
            store.read_file(&path, &mut |bytes| {
                bar.inc(bytes.len() as u64);
                out.file().write_all(bytes).map_err(cannot)
            })?;
            out.finish(&local).map_err(cannot)?;
        }
        bar.finish_and_clear();
        store.close()?;
        Ok(say_where(path, told.display(), local.display())?)
    }
}

/// A file that has no name until it is whole: what is killed leaves nothing behind.
enum Unfinished {
    /// Without a name at all.
    Nameless(File, PathBuf),
    /// Under a name that goes with it, where the folder's filesystem has no nameless files.
    Named(NamedTempFile),
}

impl Unfinished {
    fn beside(local: &Path) -> io::Result<Self> {
        let folder = match local.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        match rustix::fs::open(folder, flags, Mode::from_raw_mode(0o666)) {
            Ok(fd) => Ok(Self::Nameless(fd.into(), folder.to_owned())),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
                tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(folder).map(Self::Named)
            }
            Err(e) => Err(e.into()),
        }
    }

    fn file(&mut self) -> &mut File {
        match self {
            Self::Nameless(file, _) => file,
            Self::Named(file) => file.as_file_mut(),
        }
    }

    /// Gives it its name, in place of whatever has it.
    fn finish(self, local: &Path) -> io::Result<()> {
        match self {
            Self::Named(file) => {
                allow_as_created(file.as_file())?;
                file.persist(local).map(drop).map_err(|e| e.error)
            }
            Self::Nameless(file, folder) => {
                let name = format!("/proc/self/fd/{}", file.as_raw_fd());
                let link = |to: &Path| rustix::fs::linkat(CWD, &name, CWD, to, AtFlags::SYMLINK_FOLLOW);
                match link(local) {
                    // A link replaces nothing; a rename does, of a name that is there for a moment.
                    Err(Errno::EXIST) => {}
                    linked => return Ok(linked?),
                }
                let new = tempfile::Builder::new()
                    .prefix(TEMPORARY)
                    .make_in(folder, |path| link(path).map_err(io::Error::from))?;
                new.into_temp_path().persist(local).map_err(|e| e.error)
            }
        }
    }
}

/// Temporary files with names are made private; what `get` leaves has the mode of any other new file.
fn allow_as_created(file: &File) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mask = rustix::process::umask(Mode::empty());
    rustix::process::umask(mask);
    file.set_permissions(fs::Permissions::from_mode(0o666 & !mask.as_raw_mode()))
}
