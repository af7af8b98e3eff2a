//! How Postgres is reached: one configuration, two libraries' options side by side, and the listening connection.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{BoxStream, StreamExt, poll_fn};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use serde::Deserialize;
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use tokio_postgres::AsyncMessage;
use tokio_postgres_rustls::MakeRustlsConnect;
use tracing::{debug, info, warn};

/// No statement takes milliseconds longer than this unless the database is in trouble.
const STATEMENT: Duration = Duration::from_secs(5);
/// Between attempts to listen again.
const RELISTEN: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PostgresConfig {
    pub host: String,
    #[serde(default = "default_port")]
    pub port: u16,
    pub username: String,
    pub password: Password,
    pub name: String,
    /// TLS, and no connection without it.
    #[serde(default)]
    pub require_ssl: bool,
    /// PEM: the authority of the database's certificate. Needed with `require_ssl`, unless its name is not checked.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// With `require_ssl`: encrypt, but believe any certificate.
    #[serde(default)]
    pub skip_hostname_validation: bool,
    #[serde(default = "default_connections")]
    pub max_open_connections: u32,
}

fn default_port() -> u16 {
    5432
}

fn default_connections() -> u32 {
    10
}

/// A password that no log shows.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Password(pub String);

impl std::fmt::Debug for Password {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(not shown)")
    }
}

impl PostgresConfig {
    /// What the fields say together; the message begins with the field.
    pub fn check(&self) -> Result<(), String> {
        if self.require_ssl && !self.skip_hostname_validation && self.ca_file.is_none() {
            return Err(
                "database.ca_file: is needed with require_ssl, or set skip_hostname_validation".into()
            );
        }
        if self.max_open_connections < 2 {
            return Err("database.max_open_connections: is less than 2".into());
        }
        Ok(())
    }

    pub(super) fn for_sqlx(&self) -> PgConnectOptions {
        let mode = match (self.require_ssl, self.skip_hostname_validation) {
            (false, _) => PgSslMode::Disable,
            (true, true) => PgSslMode::Require,
            (true, false) => PgSslMode::VerifyFull,
        };
        let timeout = STATEMENT.as_millis().to_string();
        let mut options = PgConnectOptions::new_without_pgpass()
            .host(&self.host)
            .port(self.port)
            .username(&self.username)
            .password(&self.password.0)
            .database(&self.name)
            .application_name("weft-controller")
            .ssl_mode(mode)
            .options([("statement_timeout", timeout.as_str()), ("lock_timeout", timeout.as_str())]);
        if let (PgSslMode::VerifyFull, Some(ca)) = (mode, &self.ca_file) {
            options = options.ssl_root_cert(ca);
        }
        options
    }

    fn for_tokio_postgres(&self) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config
            .host(&self.host)
            .port(self.port)
            .user(&self.username)
            .password(&self.password.0)
            .dbname(&self.name)
            .application_name("weft-controller listen")
            .connect_timeout(STATEMENT)
            .ssl_mode(match self.require_ssl {
                true => tokio_postgres::config::SslMode::Require,
                false => tokio_postgres::config::SslMode::Disable,
            });
        config
    }

    fn tls(&self) -> Result<MakeRustlsConnect, ListenError> {
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?;
        let config = match (&self.ca_file, self.skip_hostname_validation) {
            (Some(ca), false) => {
                let mut roots = RootCertStore::empty();
                for certificate in CertificateDer::pem_file_iter(ca)? {
                    roots.add(certificate?)?;
                }
                builder.with_root_certificates(roots).with_no_client_auth()
            }
            _ => builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Any(provider)))
                .with_no_client_auth(),
        };
        Ok(MakeRustlsConnect::new(config))
    }
}

#[derive(Debug, thiserror::Error)]
enum ListenError {
    #[error(transparent)]
    Postgres(#[from] tokio_postgres::Error),
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    #[error(transparent)]
    Pem(#[from] rustls::pki_types::pem::Error),
}

/// A hint for each notification and each new connection, for ever. It is no error if there are none for a while: the
/// head row is read every second all the same.
pub(super) fn listen(config: PostgresConfig, channel: &'static str) -> BoxStream<'static, ()> {
    let (wake, wakes) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        let mut told = false;
        while !wake.is_closed() {
            match follow(&config, channel, &wake).await {
                Ok(()) => info!("listening connection closed"),
                Err(error) if !std::mem::replace(&mut told, true) => {
                    warn!(%error, "cannot listen to the database; changes of others are seen within a second");
                }
                Err(error) => debug!(%error, "cannot listen to the database"),
            }
            tokio::time::sleep(RELISTEN).await;
        }
    });
    tokio_stream::wrappers::ReceiverStream::new(wakes).boxed()
}

async fn follow(
    config: &PostgresConfig,
    channel: &str,
    wake: &tokio::sync::mpsc::Sender<()>,
) -> Result<(), ListenError> {
    let (client, mut connection) = config.for_tokio_postgres().connect(config.tls()?).await?;
    let mut messages = poll_fn(move |cx| connection.poll_message(cx));
    let listen = client.batch_execute(match channel {
        "weft_lease" => "listen weft_lease",
        _ => return Ok(()),
    });
    let mut listen = std::pin::pin!(listen);
    let mut listening = false;
    loop {
        tokio::select! {
            done = &mut listen, if !listening => {
                done?;
                listening = true;
                // Whatever was notified before now was not heard.
                let _ = wake.try_send(());
            }
            message = messages.next() => match message {
                Some(Ok(AsyncMessage::Notification(_))) => { let _ = wake.try_send(()); }
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error.into()),
                None => return Ok(()),
            },
            () = wake.closed() => return Ok(()),
        }
    }
}

/// Believes any certificate, as the operator has asked for.
#[derive(Debug)]
struct Any(Arc<CryptoProvider>);

impl ServerCertVerifier for Any {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
