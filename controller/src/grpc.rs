//! The API of `controller.proto`: messages to requests, answers to messages.

use std::pin::Pin;
use std::sync::Arc;

use futures::stream::{Stream, StreamExt};
use tonic::{Request, Response, Status};
use weft_model::lease::{Cell, Row};
use weft_model::ledger::{self, Answer};
use weft_model::reason::Reason;
use weft_proto::controller::leases_server::Leases;
use weft_proto::controller::{
    AcquireRequest, AcquireResponse, ListRequest, ListResponse, ReleaseRequest, ReleaseResponse,
    RenewRequest, RenewResponse, WatchRequest, WatchResponse,
};
use weft_proto::convert::{cell_from, cursor_from, cursor_to, lease_from, lease_to, listed_to, required};
use weft_proto::status::to_status;

use crate::editions::stream;
use crate::identity::Roles;
use crate::metrics::{Metrics, Open};
use crate::writer::{Desk, Follower};

#[derive(Debug)]
pub struct Api {
    pub desk: Desk,
    pub roles: Roles,
    pub metrics: Arc<Metrics>,
}

impl Api {
    /// The cell that the request speaks for, if its certificate allows it to.
    fn cell<T>(
        &self,
        request: &Request<T>,
        cell: Option<weft_proto::controller::Cell>,
    ) -> Result<Cell, Reason> {
        let cell = cell_from(required("cell", cell)?)?;
        self.roles.check(request, cell.underlay)?;
        Ok(cell)
    }

    fn answer<T>(&self, method: &'static str, answer: Result<T, Reason>) -> Result<Response<T>, Status> {
        self.metrics.request(method, answer.as_ref().err());
        answer.map(Response::new).map_err(|reason| {
            tracing::debug!(method, %reason, "request refused");
            to_status(&reason)
        })
    }

    async fn acquired(&self, request: Request<AcquireRequest>) -> Result<AcquireResponse, Reason> {
        let cell = self.cell(&request, request.get_ref().cell.clone())?;
        match self.desk.ask(ledger::Request::Acquire(cell)).await? {
            Answer::Lease(lease) => Ok(AcquireResponse { lease: Some(lease_to(&lease)) }),
            Answer::Done => Err(Reason::Bug { invariant: "an acquire is answered with a lease".into() }),
        }
    }

    async fn claim(&self, cell: Cell, lease: &weft_proto::controller::Lease) -> Result<(), Reason> {
        let lease = lease_from(cell.underlay, lease)?;
        self.desk.ask(ledger::Request::Claim(cell, lease)).await.map(drop)
    }

    async fn renewed(&self, request: Request<RenewRequest>) -> Result<RenewResponse, Reason> {
        let cell = self.cell(&request, request.get_ref().cell.clone())?;
        self.claim(cell, &required("lease", request.into_inner().lease)?).await?;
        Ok(RenewResponse {})
    }

    async fn released(&self, request: Request<ReleaseRequest>) -> Result<ReleaseResponse, Reason> {
        let cell = self.cell(&request, request.get_ref().cell.clone())?;
        self.desk.ask(ledger::Request::Release(cell)).await?;
        Ok(ReleaseResponse {})
    }

    async fn watched(&self, request: Request<WatchRequest>) -> Result<Watched, Reason> {
        let cell = self.cell(&request, request.get_ref().cell.clone())?;
        let WatchRequest { held, since, .. } = request.into_inner();
        let underlay = cell.underlay;
        let mut kept = None;
        if let Some(held) = held {
            self.claim(cell, &held).await?;
            kept = Some(self.desk.follow(underlay));
        }
        let open = (kept, self.metrics.opened());
        let answers = stream(self.desk.editions(), since.map(cursor_from));
        // The follower lives as long as its stream.
        Ok(Box::pin(answers.map(move |answer| {
            let _: &(Option<Follower>, Open) = &open;
            Ok(answer)
        })))
    }

    fn listed(&self) -> Result<ListResponse, Reason> {
        let edition = self.desk.editions().borrow().clone().ok_or(Reason::StoreUnavailable)?;
        let leases = edition.ledger().rows().map(|row: &Row| listed_to(row)).collect();
        let head = edition.head();
        Ok(ListResponse { leases, at: Some(cursor_to(head.cursor)), service_time: head.service_time.0 })
    }
}

type Watched = Pin<Box<dyn Stream<Item = Result<WatchResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Leases for Api {
    type WatchStream = Watched;

    async fn acquire(&self, request: Request<AcquireRequest>) -> Result<Response<AcquireResponse>, Status> {
        self.answer("acquire", self.acquired(request).await)
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<RenewResponse>, Status> {
        self.answer("renew", self.renewed(request).await)
    }

    async fn release(&self, request: Request<ReleaseRequest>) -> Result<Response<ReleaseResponse>, Status> {
        self.answer("release", self.released(request).await)
    }

    async fn list(&self, _: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        self.answer("list", self.listed())
    }

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Watched>, Status> {
        self.answer("watch", self.watched(request).await)
    }
}
