//! The leases on disk, so that a node starts while no controller answers. Survives reboots: a lease is for machines.

use std::io;
use std::path::{Path, PathBuf};

use weft_model::keeper::Snapshot;

use crate::kept;

/// Leases are no secret.
const MODE: u32 = 0o666;

#[derive(Debug, thiserror::Error)]
#[error("{operation} the snapshot of leases {path}")]
pub struct SnapshotError {
    operation: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

fn path(directory: &Path) -> PathBuf {
    directory.join("leases.json")
}

/// None if there is none. A file that cannot be read is an error: starting without it could take another subnet.
pub fn load(directory: &Path) -> Result<Option<Snapshot>, SnapshotError> {
    let path = path(directory);
    kept::load(&path).map_err(|source| SnapshotError { operation: "read", path, source })
}

pub fn save(directory: &Path, snapshot: &Snapshot) -> Result<(), SnapshotError> {
    let path = path(directory);
    kept::save(&path, MODE, snapshot).map_err(|source| SnapshotError { operation: "write", path, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use weft_model::lease::Lease;
    use weft_model::walk;

    #[test]
    fn what_is_saved_is_loaded_and_garbage_is_an_error() {
        let directory = tempfile::tempdir().expect("directory");
        assert_eq!(load(directory.path()).expect("none"), None);
        let lease = |n| Lease::new(walk::underlay(n), walk::subnet(n));
        let peers = [2, 3].map(|n| (walk::underlay(n), lease(n))).into();
        let snapshot = Snapshot { lease: lease(1), peers, cursor: None, fenced: None };
        save(directory.path(), &snapshot).expect("save");
        assert_eq!(load(directory.path()).expect("load"), Some(snapshot));
        fs::write(path(directory.path()), "{").expect("write");
        let error = load(directory.path()).expect_err("garbage").to_string();
        assert!(error.contains("leases.json"), "{error}");
    }
}
