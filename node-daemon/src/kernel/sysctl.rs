//! The few settings that have no link attribute, in the network namespace of the calling thread.
//!
//! A daemon under bpm sees /proc/sys read-only. So these are written through a procfs of our own that is mounted
//! nowhere: made once, kept as a descriptor. A file below `sys/net` belongs to the namespace of the thread that opens
//! it, so one descriptor serves the cell and all containers.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
use weft_model::address::DeviceName;

/// None if the kernel refused (it needs CAP_SYS_ADMIN): then the mounted one has to do.
static PROC: OnceLock<Option<OwnedFd>> = OnceLock::new();

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
    let own = PROC.get_or_init(|| {
        mount().inspect_err(|e| tracing::warn!(error = %e, "no procfs of our own, using /proc")).ok()
    });
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
