//! What the policy server last said, on disk, so that a node that starts while it is away does not start from nothing.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use weft_model::follow::{Ids, Subject};

use crate::kept;

/// Who may talk to whom is for nobody else's eyes.
const MODE: u32 = 0o600;

#[derive(Debug, thiserror::Error)]
#[error("{operation} {path}, which is what the policy server last said")]
pub struct SnapshotError {
    operation: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// An answer, about whom it is, and when the server last confirmed it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved<T> {
    /// Seconds since 1970.
    at: u64,
    pub ids: Arc<Ids>,
    pub value: T,
}

impl<T> Saved<T> {
    pub fn new(at: SystemTime, ids: Arc<Ids>, value: T) -> Self {
        Self { at: at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(), ids, value }
    }

    pub fn at(&self) -> SystemTime {
        UNIX_EPOCH.checked_add(Duration::from_secs(self.at)).unwrap_or(UNIX_EPOCH)
    }
}

fn path(directory: &Path, subject: Subject) -> PathBuf {
    directory.join(match subject {
        Subject::Policies => "policies.json",
        Subject::Groups => "security-groups.json",
        Subject::Router => "ingress-router.json",
    })
}

/// None if there is none.
pub fn load<T: DeserializeOwned>(
    directory: &Path,
    subject: Subject,
) -> Result<Option<Saved<T>>, SnapshotError> {
    let path = path(directory, subject);
    kept::load(&path).map_err(|source| SnapshotError { operation: "read", path, source })
}

pub fn save<T: Serialize>(directory: &Path, subject: Subject, saved: &Saved<T>) -> Result<(), SnapshotError> {
    let path = path(directory, subject);
    kept::save(&path, MODE, saved).map_err(|source| SnapshotError { operation: "write", path, source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use weft_model::asg::group::SecurityGroup;

    #[test]
    fn what_is_saved_is_loaded_and_garbage_is_an_error() {
        let directory = tempfile::tempdir().expect("directory");
        let load = || load::<Vec<SecurityGroup>>(directory.path(), Subject::Groups);
        assert_eq!(load().expect("none"), None);
        let at = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let group = SecurityGroup { guid: "g".into(), ..SecurityGroup::default() };
        let saved = Saved::new(at, Arc::default(), vec![group]);
        fs::write(directory.path().join("security-groups.json.next"), "left behind").expect("write");
        for _ in 0..2 {
            save(directory.path(), Subject::Groups, &saved).expect("save");
            assert_eq!(load().expect("load").as_ref(), Some(&saved));
        }
        assert_eq!(saved.at(), at);
        let path = path(directory.path(), Subject::Groups);
        assert_eq!(fs::metadata(&path).expect("metadata").permissions().mode() & 0o777, 0o600);
        fs::write(&path, "{").expect("write");
        let error = load().expect_err("garbage").to_string();
        assert!(error.contains("security-groups.json"), "{error}");
    }
}
