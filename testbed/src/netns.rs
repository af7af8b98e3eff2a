//! Network and mount namespaces that outlive the process that made them: each is kept by a bind mount of its
//! file under the lab's own private mount. They are entered on threads that are thrown away afterwards, so no
//! thread that does anything else is ever in the wrong place; a program started on such a thread stays there.

use std::fs::File;
use std::io::Write;
use std::os::linux::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, setns, unshare};
use nix::unistd::Pid;

/// Where something runs: a network namespace, and for a cell its own view of the file system.
#[derive(Debug, Clone)]
pub struct Place {
    /// The kept network namespace, as seen from the machine's own mount namespace.
    network: PathBuf,
    mount: Option<PathBuf>,
    /// A container's network namespace, which is bound inside its cell's mount namespace only.
    container: Option<PathBuf>,
}

/// A namespace's identity: device and inode of its file.
pub type Id = (u64, u64);

impl Place {
    /// Namespaces that exist already, by the files that keep them.
    pub fn at(network: PathBuf, mount: Option<PathBuf>) -> Self {
        Self { network, mount, container: None }
    }

    /// Makes new namespaces and keeps them under these names, loopback up.
    pub fn create(network: PathBuf, mount: Option<PathBuf>) -> Result<Self> {
        let place = Self::at(network, mount);
        // A mount namespace is kept only within an older one, by its number; and numbers are given out by each
        // processor for itself. One that this process's own namespace was made on gives out higher numbers.
        let mut processors = 0..CpuSet::count();
        while let Err(error) = place.make(processors.next()) {
            if error.downcast_ref() != Some(&Errno::EINVAL) || processors.is_empty() {
                return Err(error);
            }
        }
        place.ip("link set lo up\n")?;
        Ok(place)
    }

    fn make(&self, processor: Option<usize>) -> Result<()> {
        let (made, wait_made) = mpsc::channel();
        let (kept, wait_kept) = mpsc::channel::<()>();
        thread::scope(|scope| {
            let own_mounts = self.mount.is_some();
            scope.spawn(move || {
                let result = new_namespaces(own_mounts, processor).map(|()| nix::unistd::gettid());
                drop(made.send(result));
                // The namespaces live as long as this thread, until they are bound; an error means "now".
                let _ = wait_kept.recv();
            });
            let thread = wait_made.recv().context("make namespaces")??;
            if let Some(mount) = &self.mount {
                bind(&format!("/proc/self/task/{thread}/ns/mnt"), mount)?;
            }
            bind(&format!("/proc/self/task/{thread}/ns/net"), &self.network)?;
            drop(kept);
            Ok(())
        })
    }

    /// A container of this cell, by the file that keeps its network namespace.
    pub fn container(&self, file: &Path) -> Self {
        Self { container: Some(file.to_owned()), ..self.clone() }
    }

    /// Does `work` in this place, on a thread of its own.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        thread::scope(|scope| {
            let thread = scope.spawn(|| self.move_thread().map(|()| work()));
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Moves the calling thread here for good.
    pub fn move_thread(&self) -> Result<()> {
        let open =
            |path: &Path| File::open(path).with_context(|| format!("open namespace {}", path.display()));
        let network = open(&self.network)?;
        if let Some(mount) = &self.mount {
            let mount = open(mount)?;
            // A thread that shares its root and working directory with others may not change mounts.
            unshare(CloneFlags::CLONE_FS).context("leave the shared working directory")?;
            setns(mount, CloneFlags::CLONE_NEWNS).context("enter mount namespace")?;
        }
        setns(network, CloneFlags::CLONE_NEWNET).context("enter network namespace")?;
        if let Some(container) = &self.container {
            setns(open(container)?, CloneFlags::CLONE_NEWNET).context("enter the container's namespace")?;
        }
        Ok(())
    }

    /// Replaces this process by a program that runs here; returns only if that fails.
    pub fn exec(&self, program: &str, args: &[String]) -> Result<()> {
        let directory = std::env::current_dir().ok();
        self.enter(|| {
            let mut command = Command::new(program);
            command.args(args);
            if let Some(directory) = directory.filter(|directory| directory.is_dir()) {
                command.current_dir(directory);
            }
            Err(command.exec()).with_context(|| format!("execute {program}"))
        })?
    }

    /// Runs a program here to its end and returns its standard output; failure carries what it said.
    pub fn run(&self, program: &str, args: &[&str], input: &str) -> Result<String> {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = self.enter(|| {
            let mut child = command.spawn()?;
            // A program that does not read its input tells by its exit status whether it minds.
            drop(child.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes())));
            child.wait_with_output()
        })?;
        let output = output.with_context(|| format!("execute {program}"))?;
        let stdout = String::from_utf8_lossy(&output.stdout);
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "{program} {}: {}\n{stdout}{}",
            args.join(" "),
            output.status,
            stderr.trim()
        );
        Ok(stdout.into_owned())
    }

    /// Applies lines of iproute2's batch language here.
    pub fn ip(&self, batch: &str) -> Result<()> {
        self.run("ip", &["-batch", "-"], batch).map(drop).with_context(|| batch.to_owned())
    }

    /// The namespaces by which processes that run here are recognised.
    pub fn ids(&self) -> Vec<Id> {
        if let Some(container) = &self.container {
            return self.enter(|| id(container)).ok().flatten().into_iter().collect();
        }
        [Some(&self.network), self.mount.as_ref()].into_iter().flatten().filter_map(|path| id(path)).collect()
    }
}

/// The identity of the namespace that a file stands for.
pub fn id(path: &Path) -> Option<Id> {
    std::fs::metadata(path).ok().map(|meta| (meta.st_dev(), meta.st_ino()))
}

/// Binds the calling thread's network namespace, new and empty, to a file: what a container runtime does.
/// Called within the cell.
pub fn create_container(file: &Path) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("make a container's network namespace")?;
    bind("/proc/thread-self/ns/net", file)
}

/// Undoes [`create_container`]; what is not there is no error.
pub fn remove_container(file: &Path) -> Result<()> {
    let _ = umount2(file, MntFlags::MNT_DETACH);
    match std::fs::remove_file(file) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(source).with_context(|| format!("remove {}", file.display()))
        }
        _ => Ok(()),
    }
}

/// Makes the calling thread's namespaces new, on a processor if one is named and there is such a one.
fn new_namespaces(own_mounts: bool, processor: Option<usize>) -> Result<()> {
    let mut processors = CpuSet::new();
    if own_mounts && processor.is_some_and(|processor| processors.set(processor).is_ok()) {
        let _ = sched_setaffinity(Pid::from_raw(0), &processors);
    }
    let mut flags = CloneFlags::CLONE_NEWNET;
    flags.set(CloneFlags::CLONE_NEWNS, own_mounts);
    unshare(flags).context("make namespaces (as root?)")?;
    if own_mounts {
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("keep mounts private")?;
        // The machine's /sys shows the devices of the machine; the cell sees its own.
        mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::MS_NOSUID | MsFlags::MS_RDONLY, none)
            .context("mount the cell's /sys")?;
    }
    Ok(())
}

fn bind(source: &str, target: &Path) -> Result<()> {
    File::create_new(target).with_context(|| format!("create {}", target.display()))?;
    let none: Option<&str> = None;
    let bound = mount(Some(source), target, none, MsFlags::MS_BIND, none);
    bound
        .inspect_err(|_| drop(std::fs::remove_file(target)))
        .with_context(|| format!("bind {source} to {}", target.display()))
}
