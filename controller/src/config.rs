//! The configuration file, parsed into values that cannot be wrong.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use weft_daemon::log::Format;
use weft_daemon::tls::Files;
use weft_model::ledger::Rules;
use weft_model::subnet::{OverlayNetwork, Pool};

use crate::store::postgres::connect::PostgresConfig;

/// One JSON object. docs/operating.md describes the fields for people.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// PEM: the authority of the cells' certificates.
    pub ca_file: PathBuf,
    /// PEM: the controller's certificate, and its key.
    pub certificate_file: PathBuf,
    pub key_file: PathBuf,

    /// Where cells connect to.
    #[serde(default = "default::listen")]
    pub listen: SocketAddr,
    /// The overlay.
    #[serde(default = "default::network")]
    pub network: OverlayNetwork,
    /// Bits; each cell gets a block of this length.
    #[serde(default = "default::subnet_prefix_length")]
    pub subnet_prefix_length: u8,
    /// A lease that nobody claimed for so long may be given to another cell. The clock stands still while no
    /// controller runs.
    #[serde(default = "default::subnet_lease_expiration_hours")]
    pub subnet_lease_expiration_hours: u32,
    /// Absent: a file in `state_directory`.
    #[serde(default)]
    pub database: Option<DatabaseConfig>,
    #[serde(default = "default::state_directory")]
    pub state_directory: PathBuf,
    /// The DNS name that certificates of cells carry.
    #[serde(default = "default::cell_certificate_name")]
    pub cell_certificate_name: String,
    /// Seconds for which a new or restored table takes in cells' claims before it gives out new subnets.
    #[serde(default = "default::reconcile_seconds")]
    pub reconcile_seconds: u32,
    /// Health and metrics, plain HTTP on loopback.
    #[serde(default = "default::health_address")]
    pub health_address: SocketAddr,
    #[serde(default = "default::log_level")]
    pub log_level: String,
    #[serde(default)]
    pub log_format: Format,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum DatabaseConfig {
    Sqlite { path: PathBuf },
    Postgres(PostgresConfig),
}

mod default {
    use super::{OverlayNetwork, PathBuf, SocketAddr};

    pub(super) fn listen() -> SocketAddr {
        ([0, 0, 0, 0], 4103).into()
    }

    pub(super) fn network() -> OverlayNetwork {
        "10.255.0.0/16".parse().unwrap_or_else(|_| unreachable!("a network"))
    }

    pub(super) fn subnet_prefix_length() -> u8 {
        24
    }

    pub(super) fn subnet_lease_expiration_hours() -> u32 {
        168
    }

    pub(super) fn state_directory() -> PathBuf {
        "/var/vcap/data/weft-controller".into()
    }

    pub(super) fn cell_certificate_name() -> String {
        "weft-node".into()
    }

    pub(super) fn reconcile_seconds() -> u32 {
        30
    }

    pub(super) fn health_address() -> SocketAddr {
        ([127, 0, 0, 1], 19683).into()
    }

    pub(super) fn log_level() -> String {
        "info".into()
    }
}

/// What the fields say together; begins with the field's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("subnet_prefix_length: {0}")]
    Pool(weft_model::address::NotValid),
    #[error("subnet_lease_expiration_hours: must be at least 1")]
    Expiry,
    #[error("{0}")]
    Database(String),
}

impl Config {
    /// The rules of the table.
    pub fn check(&self) -> Result<Rules, Refused> {
        let pool = Pool::new(self.network, self.subnet_prefix_length).map_err(Refused::Pool)?;
        if self.subnet_lease_expiration_hours == 0 {
            return Err(Refused::Expiry);
        }
        if let Some(DatabaseConfig::Postgres(postgres)) = &self.database {
            postgres.check().map_err(Refused::Database)?;
        }
        let hours = |hours: u32| Duration::from_secs(u64::from(hours) * 3600);
        Ok(Rules {
            pool,
            expiry: hours(self.subnet_lease_expiration_hours),
            keep_tombstones: hours(7 * 24),
            // Who was seen is noted every 20 s and read every 60 s.
            holder_grace: Duration::from_secs(180),
        })
    }

    pub fn certificates(&self) -> Files {
        Files {
            ca: self.ca_file.clone(),
            certificate: self.certificate_file.clone(),
            key: self.key_file.clone(),
        }
    }

    pub fn reconcile(&self) -> Duration {
        Duration::from_secs(self.reconcile_seconds.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn load(config: &Value) -> Result<Config, String> {
        let directory = tempfile::tempdir().expect("directory");
        let file = directory.path().join("weft-controller.json");
        std::fs::write(&file, config.to_string()).expect("write");
        let config: Config = weft_daemon::config::load(&file).map_err(|error| error.to_string())?;
        config.check().map_err(|error| error.to_string())?;
        Ok(config)
    }

    fn minimal() -> Value {
        json!({"ca_file": "ca", "certificate_file": "crt", "key_file": "key"})
    }

    #[test]
    fn the_shortest_configuration_is_complete() {
        let config = load(&minimal()).expect("valid");
        assert_eq!((config.subnet_prefix_length, config.database), (24, None));
    }

    #[test]
    fn an_error_names_the_field() {
        let postgres = |more: Value| {
            let mut database =
                json!({"type": "postgres", "host": "h", "username": "u", "password": "secret", "name": "n"});
            for (key, value) in more.as_object().expect("object") {
                database[key] = value.clone();
            }
            database
        };
        for (field, value) in [
            ("network", json!("10.255.0.1/16")),
            ("subnet_prefix_length", json!(16)),
            ("subnet_prefix_length", json!(31)),
            ("subnet_lease_expiration_hours", json!(0)),
            ("listen", json!("everywhere")),
            ("database", json!({"type": "oracle"})),
            ("database", postgres(json!({"port": "x"}))),
            ("database.ca_file", postgres(json!({"require_ssl": true}))),
            ("database.max_open_connections", postgres(json!({"max_open_connections": 1}))),
            ("no_such_field", json!(1)),
        ] {
            let mut config = minimal();
            config[field.split('.').next().expect("name")] = value;
            let error = load(&config).expect_err(field);
            assert!(error.contains(field), "{field}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_password_is_not_shown() {
        let config =
            json!({"type": "postgres", "host": "h", "username": "u", "password": "secret", "name": "n"});
        let config: DatabaseConfig = serde_json::from_value(config).expect("valid");
        assert!(!format!("{config:?}").contains("secret"));
    }

    /// The error for an unknown field lists all that are known.
    #[test]
    fn the_page_for_operators_names_every_field() {
        let error = serde_json::from_value::<Config>(json!({"?": 1})).expect_err("unknown").to_string();
        let page = include_str!("../../docs/operating.md");
        let (_, section) = page.split_once("\n## weft-controller\n").expect("section");
        let (section, _) = section.split_once("\n## ").expect("another section");
        let fields: Vec<&str> = error.split('`').skip(3).step_by(2).collect();
        assert!(fields.len() > 10, "{error}");
        for field in fields {
            assert!(section.contains(&format!("`{field}`")), "{field} is missing in docs/operating.md");
        }
    }
}
