//! The daemon: puts its tasks together, and ends when it is told to.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing::info;
use weft_daemon::http::{self, Health};
use weft_proto::controller::leases_server::LeasesServer;

use crate::config::{Config, DatabaseConfig};
use crate::grpc::Api;
use crate::identity::Roles;
use crate::listen::{Certificates, connections};
use crate::metrics::Metrics;
use crate::store::Store;
use crate::store::postgres::PostgresStore;
use crate::store::sqlite::SqliteStore;
use crate::writer::writer;

/// A cell that does not answer pings for so long is gone; its stream is closed.
const PING: Duration = Duration::from_secs(20);

pub async fn run(config: Config) -> Result<()> {
    match &config.database {
        Some(DatabaseConfig::Postgres(postgres)) => {
            let store = PostgresStore::new(postgres.clone());
            serve(&config, store).await
        }
        Some(DatabaseConfig::Sqlite { path }) => serve(&config, SqliteStore::new(path)).await,
        None => {
            let directory = &config.state_directory;
            std::fs::create_dir_all(directory)
                .with_context(|| format!("state_directory: create {}", directory.display()))?;
            serve(&config, SqliteStore::new(&directory.join("leases.sqlite"))).await
        }
    }
}

async fn serve(config: &Config, store: impl Store) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let rules = config.check()?;
    let certificates = Certificates::load(config.certificates())?;
    let health = http::bind(config.health_address).await.context("health_address")?;
    let listener = TcpListener::bind(config.listen).await;
    let listener = listener.with_context(|| format!("listen: {}", config.listen))?;

    let mut registry = Registry::default();
    let metrics = Arc::new(Metrics::new(&mut registry));
    let (writer, desk) = writer(store, rules, config.reconcile(), Arc::clone(&metrics));
    tokio::spawn(writer.run());
    let state = Arc::clone(&metrics);
    let healthy = move || match state.is_available() {
        true => Health::Healthy,
        false => Health::Unhealthy { why: "the lease database is not available".into() },
    };
    tokio::spawn(http::serve(health, healthy, Arc::new(registry)));

    let api = Api { desk, roles: Roles { cell: config.cell_certificate_name.clone() }, metrics };
    let server = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(PING))
        .http2_keepalive_timeout(Some(PING))
        .add_service(LeasesServer::new(api))
        .serve_with_incoming(connections(listener, certificates));
    info!(listen = %config.listen, network = %config.network, version = env!("CARGO_PKG_VERSION"), "started");
    tokio::select! {
        served = server => served.context("serve")?,
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    // Streams are cut: cells know how to follow another controller. What was not answered is asked again.
    info!("stopped");
    Ok(())
}
