//! JSON that is kept on disk and replaced as a whole: a reader finds the old file or the new one.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// None if there is none.
pub(crate) fn load<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(io::Error::from),
        Err(absent) if absent.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(other) => Err(other),
    }
}

/// Replaces the file at once, and only by one that is on disk. `mode`: its permissions, less the process's mask.
pub(crate) fn save<T: Serialize>(path: &Path, mode: u32, value: &T) -> io::Result<()> {
    let next = path.with_extension("json.next");
    // One that a crash left behind may have another mode.
    fs::remove_file(&next).or_else(|why| (why.kind() == io::ErrorKind::NotFound).then_some(()).ok_or(why))?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&next)?;
    file.write_all(&serde_json::to_vec(value)?)?;
    file.sync_all()?;
    fs::rename(&next, path)
}
