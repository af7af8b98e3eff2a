//! The way into the cell's task: a bounded queue of requests, each answered once.
//!
//! [`Calls`] is implemented here by the sending end: a call becomes a request, waits for its answer no longer than
//! its deadline, and is undone by the cell's task if the caller has gone by then.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use weft_model::address::{DeviceName, OverlayAddr};
use weft_model::cell::Wanted;
use weft_model::container::Handle;
use weft_model::firewall::Size;
use weft_model::firewall::explain::{Explanation, Probe};
use weft_model::link::LinkSpec;
use weft_model::reason::Reason;
use weft_proto::node::StatusResponse;

use crate::calls::{Calls, Remembered, Valid};

/// Requests that wait; a call beyond them is answered `Busy`. A cell has some 250 containers.
const QUEUE: usize = 1024;
/// For one call, from the queue to its answer.
const DEADLINE: Duration = Duration::from_secs(30);

/// Gives the answer to a call; nobody may be there to hear it.
pub type Reply<T> = oneshot::Sender<Result<T, Reason>>;

#[derive(Debug)]
pub enum Request {
    Add {
        wanted: Box<Wanted>,
        namespace: Arc<OwnedFd>,
        reply: Reply<LinkSpec>,
    },
    Check(Check),
    Delete {
        handle: Handle,
        interface: DeviceName,
        reply: Reply<()>,
    },
    Collect {
        valid: Valid,
        reply: Reply<()>,
    },
    Ready {
        reply: Reply<()>,
    },
    Explain {
        question: Question,
        reply: Reply<Explanation>,
    },
    Status {
        reply: Reply<StatusResponse>,
    },
    /// Switches the log of what is between containers, if anything is to be set; answered with what holds then.
    LogC2c {
        set: Option<bool>,
        reply: Reply<bool>,
    },
    /// How large the firewall's program is.
    Measure {
        reply: Reply<Size>,
    },
    /// The connections of these addresses are gone.
    Forgotten(BTreeSet<OverlayAddr>),
    /// They could not be looked for; they are tried again later.
    NotForgotten(Reason),
    /// Containers' ends of links that were given another MTU, each with how that went.
    Fitted(Vec<(LinkSpec, Result<(), Reason>)>),
}

#[derive(Debug, Clone)]
pub enum Sender {
    Container(Handle),
    Addr(Ipv4Addr),
}

/// What becomes of a packet?
#[derive(Debug, Clone)]
pub struct Question {
    pub from: Sender,
    pub to: Ipv4Addr,
    pub probe: Probe,
}

#[derive(Debug)]
pub struct Check {
    pub remembered: Remembered,
    pub namespace: OwnedFd,
    pub reply: Reply<()>,
}

#[derive(Debug, Clone)]
pub struct Inbox(mpsc::Sender<Request>);

/// The receiving end, held by the cell's task.
#[derive(Debug)]
pub struct Waiting(mpsc::Receiver<Request>);

pub fn inbox() -> (Inbox, Waiting) {
    let (inbox, waiting) = mpsc::channel(QUEUE);
    (Inbox(inbox), Waiting(waiting))
}

impl Waiting {
    /// The next request; none when every caller is gone for good.
    pub async fn next(&mut self) -> Option<Request> {
        self.0.recv().await
    }

    /// All others that wait now.
    pub fn rest(&mut self) -> Vec<Request> {
        std::iter::from_fn(|| self.0.try_recv().ok()).collect()
    }
}

impl Inbox {
    /// For the daemon's own tasks, which may wait for a place.
    pub async fn tell(&self, request: Request) {
        // The cell's task is gone only at the end of the daemon.
        drop(self.0.send(request).await);
    }

    /// Whether what is between containers is logged: as it is in the kernel when this is done.
    pub async fn log_c2c(&self, set: Option<bool>) -> Result<bool, Reason> {
        self.ask("switching the log", |reply| Request::LogC2c { set, reply }).await
    }

    pub async fn measure(&self) -> Result<Size, Reason> {
        self.ask("measuring the firewall", |reply| Request::Measure { reply }).await
    }

    async fn ask<T>(&self, operation: &str, request: impl FnOnce(Reply<T>) -> Request) -> Result<T, Reason> {
        let (reply, answer) = oneshot::channel();
        self.0.try_send(request(reply)).map_err(|full| match full {
            mpsc::error::TrySendError::Full(_) => Reason::Busy,
            mpsc::error::TrySendError::Closed(_) => Reason::Starting,
        })?;
        match tokio::time::timeout(DEADLINE, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(Reason::Starting),
            Err(_) => Err(Reason::Deadline { operation: operation.into() }),
        }
    }
}

impl Calls for Inbox {
    async fn add(&self, wanted: Wanted, namespace: OwnedFd) -> Result<LinkSpec, Reason> {
        let namespace = Arc::new(namespace);
        let wanted = Box::new(wanted);
        self.ask("ADD", |reply| Request::Add { wanted, namespace, reply }).await
    }

    async fn check(&self, remembered: Remembered, namespace: OwnedFd) -> Result<(), Reason> {
        self.ask("CHECK", |reply| Request::Check(Check { remembered, namespace, reply })).await
    }

    async fn delete(&self, handle: Handle, interface: DeviceName) -> Result<(), Reason> {
        self.ask("DEL", |reply| Request::Delete { handle, interface, reply }).await
    }

    async fn collect(&self, valid: Valid) -> Result<(), Reason> {
        self.ask("GC", |reply| Request::Collect { valid, reply }).await
    }

    async fn ready(&self) -> Result<(), Reason> {
        self.ask("STATUS", |reply| Request::Ready { reply }).await
    }

    async fn explain(&self, question: Question) -> Result<Explanation, Reason> {
        self.ask("explain", |reply| Request::Explain { question, reply }).await
    }

    async fn status(&self) -> StatusResponse {
        let answer = self.ask("status", |reply| Request::Status { reply }).await;
        answer.unwrap_or_else(|why| StatusResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            not_ready: why.to_string(),
            ..StatusResponse::default()
        })
    }
}
