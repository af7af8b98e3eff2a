//! The few settings that have no link attribute, in the network namespace of the calling thread.
//!
//! A daemon under bpm sees /proc/sys read-only. So these are written through a procfs of our own that is mounted
//! nowhere and kept as a descriptor. A file below `sys/net` belongs to the namespace of the thread that opens it, so one
//! descriptor serves the cell and all containers.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
use weft_model::address::DeviceName;

/// A procfs serves so many switches. All namespaces' files of one name are in one place of it, and each is compared until
/// the right one is found (proc_sys_compare): the 250th container's `eth0` would take 50 µs instead of 15.
const SERVES: u32 = 32;

static PROC: Mutex<Proc> = Mutex::new(Proc { own: None, served: 0 });

struct Proc {
    /// None if the kernel refused (it needs CAP_SYS_ADMIN): then the mounted one has to do.
    own: Option<Arc<OwnedFd>>,
    served: u32,
}

impl Proc {
    /// What to use, and what nobody is to use any more.
    fn serve(&mut self) -> [Option<Arc<OwnedFd>>; 2] {
        let mut old = None;
        if self.served.is_multiple_of(SERVES) {
            match mount() {
                Ok(fresh) => old = self.own.replace(Arc::new(fresh)),
                Err(e) if self.served == 0 => tracing::warn!(error = %e, "no procfs of our own, using /proc"),
                Err(_) => {}
            }
        }
        self.served = self.served.checked_add(1).unwrap_or(SERVES);
        [self.own.clone(), old]
    }
}

/// Forwarding of what comes in by a device. Not by link attribute where the device may be hardware: only this way
/// the kernel also stops it from merging received packets, which must not be forwarded (`dev_disable_lro`).
pub(super) fn forward_from(device: &DeviceName) -> io::Result<()> {
    write(&format!("net/ipv4/conf/{device}/forwarding"))
}

/// No IPv6 on a device: nothing that arrives is looked at, no address can be given to it.
pub(super) fn ipv6_off(device: &DeviceName) -> io::Result<()> {
    match write(&format!("net/ipv6/conf/{device}/disable_ipv6")) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()), // this kernel has no IPv6
        result => result,
    }
}

/// Sets a switch to 1.
fn write(switch: &str) -> io::Result<()> {
    // The old one is closed when the file is, and holds nobody up.
    let [own, _old] = PROC.lock().unwrap_or_else(PoisonError::into_inner).serve();
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = match own {
        Some(proc) => openat(proc, format!("sys/{switch}"), flags, Mode::empty())?,
        None => openat(CWD, format!("/proc/sys/{switch}"), flags, Mode::empty())?,
    };
    rustix::io::write(file, b"1")?;
    Ok(())
}

fn mount() -> io::Result<OwnedFd> {
    let procfs = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&procfs)?;
    Ok(fsmount(&procfs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?)
}
