//! Ctrl-C, SIGTERM and SIGHUP become a flag that every long step looks at, so that whatever is half made is
//! taken down by the same code that takes down what is whole.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{SignalKind, signal};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// From now on the signals set the flag instead of ending the process.
pub fn watch() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
    let (ready, wait_ready) = std::sync::mpsc::channel();
    thread::spawn(move || {
        runtime.block_on(async {
            let streams: std::io::Result<Vec<_>> = kinds.into_iter().map(signal).collect();
            let (failed, mut streams) = match streams {
                Ok(streams) => (None, streams),
                Err(error) => (Some(error), Vec::new()),
            };
            drop(ready.send(failed));
            loop {
                std::future::poll_fn(|context| {
                    let any = streams.iter_mut().any(|stream| stream.poll_recv(context).is_ready());
                    if any { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
                })
                .await;
                REQUESTED.store(true, Ordering::Relaxed);
            }
        });
    });
    wait_ready.recv().context("watch signals")?.map_or(Ok(()), Err).context("watch signals")
}

/// Fails once a signal has arrived.
pub fn check() -> Result<()> {
    if REQUESTED.load(Ordering::Relaxed) { bail!("interrupted") } else { Ok(()) }
}
