//! What those who follow a server have in common: a machine's deadline, waited for, and chance.

use std::time::{Duration, Instant};

/// Waits until a machine has to be woken, in its own time; forever if it need not be.
pub(crate) async fn due(origin: Instant, deadline: Option<Duration>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until((origin + deadline).into()).await,
        None => std::future::pending().await,
    }
}

/// Uniform in `0..n`, but for a bias of `n` in 2^32.
pub(crate) fn pick(n: u32) -> u32 {
    getrandom::u32().unwrap_or_default() % n.max(1)
}
