//! `cmbfs put`: a file into the filesystem.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use clap::Args;

use super::failure::Failure;
use super::place::{At, text};
use super::progress;
use super::store::{Store, say_where};

/// Copy a file into the filesystem
///
/// PATH is replaced in one step once everything is durable: a put that is killed leaves what was there before.
/// Into a directory the file goes under its own name, as with cp.
#[derive(Args, Debug)]
#[command(
    override_usage = "cmbfs put DEVICE LOCAL PATH\n       cmbfs put --socket SOCK LOCAL PATH",
    after_help = "Examples:\n  cmbfs put 'emu:disk.img?cmb=64M' photo.jpg /photo.jpg\n  cmbfs put --socket /tmp/s photo.jpg /"
)]
pub(crate) struct Put {
    #[command(flatten)]
    at: At,
}

impl Put {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let (place, [local, path]) = self.at.take(["LOCAL", "PATH"])?;
        if local.is_empty() {
            return Err(Failure::usage("LOCAL is empty"));
        }
        let path = text(path, "PATH")?;
        let local = PathBuf::from(local);
        let cannot = |e: std::io::Error| Failure::from(e).doing(format!("cannot read {}", local.display()));
        let mut from = File::open(&local).map_err(cannot)?;
        let meta = from.metadata().map_err(cannot)?;
        if meta.is_dir() {
            return Err(
                Failure::new(format!("{} is a directory", local.display())).hint("put copies one file")
            );
        }
        let mut store = Store::open(&place)?;
        let told = path;
        let path = store.destination(&told, local.file_name().and_then(OsStr::to_str))?;
        let bar = progress::bar(&path, meta.len());
        let result = store
            .write_file(&path, meta.permissions().mode() & 0o777, &mut from, &mut |bytes| bar.inc(bytes));
        bar.finish_and_clear();
        result.map_err(|f| f.doing(format!("cannot put {} as {path}", local.display())))?;
        store.close()?;
        Ok(say_where(local.display(), told, path)?)
    }
}
