//! Who may make or remove the lab of a name: the holder of a lock that the kernel frees when its process ends,
//! however it ends. A lab that nobody holds and that was not left standing on purpose is a leftover.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::os::linux::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::{netns, process};

const ROOT: &str = "/run/weft-lab";
/// How long a lab may be held by a process that only removes it.
const HELD: Duration = Duration::from_secs(3);
/// Present in a lab that was left standing.
const STANDING: &str = "standing";

/// The right to make or remove one lab.
#[derive(Debug)]
pub(super) struct Claim {
    pub(super) directory: PathBuf,
    lock_file: PathBuf,
    _lock: File,
}

impl Claim {
    /// `None`: another process holds it, and not merely to remove it.
    pub(super) fn take(name: &str) -> Result<Option<Self>> {
        Self::wait_for(name, true, HELD)
    }

    /// `None`: there is nothing, or another process holds it.
    fn take_leftover(name: &str) -> Result<Option<Self>> {
        Self::wait_for(name, false, Duration::ZERO)
    }

    fn wait_for(name: &str, create: bool, patience: Duration) -> Result<Option<Self>> {
        ensure!(
            !name.is_empty()
                && name.len() <= 32
                && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'),
            "a lab's name is at most 32 letters, digits and `-`, not `{name}`"
        );
        let deadline = Instant::now() + patience;
        let lock_file = Path::new(ROOT).join(format!("{name}.lock"));
        loop {
            if create {
                fs::create_dir_all(ROOT).with_context(|| format!("create {ROOT} (as root?)"))?;
            }
            let lock = match File::options().create(create).append(true).open(&lock_file) {
                Err(source) if source.kind() == ErrorKind::NotFound && !create => return Ok(None),
                // Another lab's end took the directory away between the two calls.
                Err(source) if source.kind() == ErrorKind::NotFound => continue,
                opened => opened.with_context(|| format!("open {} (as root?)", lock_file.display()))?,
            };
            match lock.try_lock() {
                Err(TryLockError::WouldBlock) if Instant::now() > deadline => return Ok(None),
                Err(TryLockError::WouldBlock) => {
                    thread::sleep(Duration::from_millis(10));
                    continue;
                }
                Err(TryLockError::Error(source)) => return Err(source).context("lock the lab"),
                Ok(()) => {}
            }
            // The former holder may have removed the file that we opened before it let go of it.
            if netns::id(&lock_file) == lock.metadata().ok().map(|meta| (meta.st_dev(), meta.st_ino())) {
                return Ok(Some(Self { directory: directory(name), lock_file, _lock: lock }));
            }
        }
    }

    /// Mounts the lab's own file system: what is bound there is seen nowhere else, and goes with it.
    pub(super) fn mount(&self) -> Result<()> {
        fs::create_dir(&self.directory).with_context(|| format!("create {}", self.directory.display()))?;
        let none: Option<&str> = None;
        mount(Some("weft-lab"), &self.directory, Some("tmpfs"), MsFlags::empty(), Some("mode=0755"))
            .context("mount the lab's file system (as root?)")?;
        mount(none, &self.directory, none, MsFlags::MS_PRIVATE, none).context("keep its mounts private")
    }

    /// Removes the lab and gives up its name.
    pub(super) fn remove(&self) -> Result<()> {
        self.clear()?;
        drop(fs::remove_file(&self.lock_file));
        // Fails as long as there are other labs.
        drop(fs::remove_dir(ROOT));
        Ok(())
    }

    /// Ends every process of the lab and removes everything it made. What is not there is no error.
    pub(super) fn clear(&self) -> Result<()> {
        let kept = fs::read_dir(self.directory.join("namespaces")).into_iter().flatten().flatten();
        let namespaces: Vec<netns::Id> = kept.filter_map(|entry| netns::id(&entry.path())).collect();
        // A file that a crash left unbound lies on the lab's own file system: no process is "in" it.
        process::end_all_in(&namespaces, Duration::from_secs(5))?;
        if self.directory.is_dir() {
            // Takes along everything that is mounted below.
            while umount2(&self.directory, MntFlags::MNT_DETACH).is_ok() {}
            fs::remove_dir(&self.directory)
                .with_context(|| format!("remove {}", self.directory.display()))?;
        }
        Ok(())
    }

    pub(super) fn leave_standing(&self) -> Result<()> {
        fs::write(self.directory.join(STANDING), "").context("mark the lab as standing")
    }
}

pub(super) fn directory(name: &str) -> PathBuf {
    Path::new(ROOT).join(name)
}

pub(super) fn is_standing(name: &str) -> bool {
    directory(name).join(STANDING).exists()
}

/// All names in use, standing or not.
pub fn names() -> Vec<String> {
    let entries = fs::read_dir(ROOT).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| Some(entry.file_name().to_str()?.trim_end_matches(".lock").to_owned()))
        .collect();
    names.sort();
    names.dedup();
    names
}

/// Removes what crashed or killed processes left behind; returns the names.
pub(super) fn sweep() -> Result<Vec<String>> {
    let mut swept = Vec::new();
    for name in names() {
        if is_standing(&name) {
            continue;
        }
        if let Ok(Some(claim)) = Claim::take_leftover(&name) {
            // Looked at again under the lock: an `up` may just have completed.
            if !is_standing(&name) {
                claim.remove().with_context(|| format!("clean up the leftovers of lab {name}"))?;
                swept.push(name);
            }
        }
    }
    Ok(swept)
}
