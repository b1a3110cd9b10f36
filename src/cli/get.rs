//! `cmbfs get`: a file out of the filesystem.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;

use super::failure::Failure;
use super::place::{At, text};
use super::progress;
use super::store::Store;

/// Copy a file out of the filesystem
///
/// LOCAL is replaced only once the whole file has been read.
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
        let path = text(path, "PATH")?;
        let local = PathBuf::from(local);
        let local = if local.is_dir() { local.join(last_part(&path)?) } else { local };
        let cannot = |e: std::io::Error| Failure::from(e).doing(format!("cannot write {}", local.display()));

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
            let folder = match local.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            };
            let mut out =
                tempfile::Builder::new().prefix(".cmbfs-get-").tempfile_in(folder).map_err(cannot)?;
            store.read_file(&path, &mut |bytes| {
                bar.inc(bytes.len() as u64);
                out.write_all(bytes).map_err(cannot)
            })?;
            allow_as_created(out.as_file()).map_err(cannot)?;
            out.persist(&local).map_err(|e| cannot(e.error))?;
        }
        bar.finish_and_clear();
        store.close()
    }
}

fn last_part(path: &str) -> Result<&str, Failure> {
    match path.rsplit('/').next() {
        Some(name) if !name.is_empty() && name != "." && name != ".." => Ok(name),
        _ => Err(Failure::new(format!("{path} names no file"))),
    }
}

/// Temporary files are made private; what `get` leaves has the mode of any other new file.
fn allow_as_created(file: &File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mask = rustix::process::umask(rustix::fs::Mode::empty());
    rustix::process::umask(mask);
    file.set_permissions(fs::Permissions::from_mode(0o666 & !mask.as_raw_mode()))
}
