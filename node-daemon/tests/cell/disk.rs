//! Files that cannot be written: nothing is laid that the journal does not hold, and nothing is lost.

use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;
use weft_model::lease::Lease;
use weft_model::reason::Reason;
use weft_model::walk;

use weft_node::calls::Calls;

use crate::{World, links, namespace, within};

fn lease() -> Option<Lease> {
    Some(Lease::new(walk::underlay(100), "10.255.1.0/24".parse().unwrap()))
}

/// Nothing is laid that the journal does not hold.
#[test]
fn without_a_journal_nothing_is_added() {
    within(async || {
        let world = World::start(lease()).await;
        // Enough records that the file is written anew, which its directory no longer allows.
        let path = world.directory.path().to_owned();
        let next = path.join("containers.jsonl.next");
        fs::create_dir(&next).unwrap();
        let mut refused = None;
        for _ in 0..2_000 {
            match world.add(1, namespace()).await {
                Ok(_) => world.delete(1).await.unwrap(),
                Err(reason) => {
                    refused = Some(reason);
                    break;
                }
            }
        }
        assert!(matches!(refused, Some(Reason::File { .. })), "{refused:?}");
        assert_eq!(links(), 0);
        fs::remove_dir(&next).unwrap();
        world.add(1, namespace()).await.unwrap();
    });
}

/// In a file system of its own, which the rest of this thread's program does not see.
fn small_disk() -> TempDir {
    unshare(CloneFlags::CLONE_NEWNS).expect("unshare a mount namespace: run the tests as root");
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    let directory = tempfile::tempdir().unwrap();
    mount(Some("small"), directory.path(), Some("tmpfs"), MsFlags::empty(), Some("size=256k")).unwrap();
    directory
}

/// To the last page of it.
fn fill(directory: &Path) {
    let mut file = fs::File::create(directory.join("filler")).unwrap();
    while file.write_all(&[0; 4096]).is_ok() {}
}

fn free(directory: &Path) {
    fs::remove_file(directory.join("filler")).unwrap();
}

impl World {
    /// The namespace of a new container.
    async fn added(&self, n: u8) -> OwnedFd {
        let namespace = namespace();
        self.add(n, namespace.try_clone().unwrap()).await.unwrap();
        namespace
    }

    /// Those of containers that are added, from this number on, until one is refused.
    async fn add_until_refused(&self, first: u8) -> Vec<OwnedFd> {
        let mut namespaces = Vec::new();
        for n in first.. {
            let namespace = namespace();
            match self.add(n, namespace.try_clone().unwrap()).await {
                Ok(_) => namespaces.push(namespace),
                Err(Reason::File { why, .. }) => {
                    assert!(why.contains("No space left on device"), "{why}");
                    break;
                }
                Err(other) => panic!("{other}"),
            }
        }
        namespaces
    }

    async fn holds(&self, containers: u8) {
        let status = self.inbox.status().await;
        assert_eq!((status.containers.len(), links()), (usize::from(containers), usize::from(containers)));
        // Addresses that rest are free a second later.
        let wanted = 253 - u32::from(containers);
        for _ in 0..500 {
            if self.inbox.status().await.free_addresses == wanted {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{} addresses are free, not {wanted}", self.inbox.status().await.free_addresses);
    }
}

#[test]
fn on_a_full_disk_nothing_is_added_all_else_works_and_nothing_is_lost() {
    within(async || {
        let directory = small_disk();
        let path = directory.path().to_owned();
        let world = World::start_in(lease(), directory).await;
        let first = world.added(0).await;
        fill(&path);
        // What is left of the last page holds some.
        let others = world.add_until_refused(1).await;
        let mut there = 1 + u8::try_from(others.len()).unwrap();
        world.holds(there).await;
        assert!(matches!(world.inbox.ready().await, Err(Reason::File { .. })), "STATUS says so");
        world.delete(0).await.unwrap();
        there -= 1;
        world.holds(there).await;

        // Killed and started again, still full: what was refused is not there; what was deleted may be, and goes for good.
        let world = world.restart(lease()).await;
        world.delete(0).await.unwrap();
        world.holds(there).await;
        assert!(matches!(world.add(200, namespace()).await, Err(Reason::File { .. })));
        world.delete(1).await.unwrap();
        there -= 1;
        world.holds(there).await;

        free(&path);
        let last = world.added(200).await;
        assert_eq!(world.inbox.ready().await, Ok(()));
        let world = world.restart(lease()).await;
        world.holds(there + 1).await;
        world.delete(200).await.unwrap();
        world.holds(there).await;
        drop((first, others, last));
    });
}
