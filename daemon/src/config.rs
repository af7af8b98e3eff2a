//! The configuration file: one JSON document, read once at start into the program's own type.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Why a configuration file was not accepted. The message is complete: file, property and what is wrong with it.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration file {}: {why}", path.display())]
    Read { path: PathBuf, why: io::Error },
    #[error("{}: {why}", path.display())]
    Json { path: PathBuf, why: serde_json::Error },
    #[error("{}: property {property}: {why}", path.display())]
    Property { path: PathBuf, property: String, why: serde_json::Error },
}

/// Reads `path` as JSON. Unknown properties are errors where `T` says so by `deny_unknown_fields`.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let path = path.to_owned();
    match fs::read(&path) {
        Ok(bytes) => parse(path, &bytes),
        Err(why) => Err(ConfigError::Read { path, why }),
    }
}

fn parse<T: DeserializeOwned>(path: PathBuf, bytes: &[u8]) -> Result<T, ConfigError> {
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = match serde_path_to_error::deserialize(&mut json) {
        Ok(value) => value,
        Err(error) => {
            let property = error.path().to_string();
            let why = error.into_inner();
            // At the top level the path is ".": a missing property, which serde names in its own message.
            return Err(match property.as_str() {
                "." => ConfigError::Json { path, why },
                _ => ConfigError::Property { path, property, why },
            });
        }
    };
    match json.end() {
        Ok(()) => Ok(value),
        Err(why) => Err(ConfigError::Json { path, why }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[derive(Debug, PartialEq, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Config {
        underlay_ip: Ipv4Addr,
        #[serde(default)]
        tls: Option<Tls>,
    }

    #[derive(Debug, PartialEq, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Tls {
        ca: PathBuf,
    }

    fn refused(json: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.json");
        fs::write(&path, json).unwrap();
        let message = load::<Config>(&path).unwrap_err().to_string();
        assert!(message.starts_with(&path.display().to_string()), "names the file: {message}");
        message
    }

    #[test]
    fn reads_a_good_file() {
        let config: Config =
            parse("x".into(), br#"{"underlay_ip": "10.0.0.1", "tls": {"ca": "/ca"}}"#).unwrap();
        assert_eq!(config.underlay_ip, Ipv4Addr::new(10, 0, 0, 1));
        assert_eq!(config.tls, Some(Tls { ca: "/ca".into() }));
    }

    #[test]
    fn names_the_property_and_why() {
        for (json, expected) in [
            ("", "EOF while parsing"),
            ("not json", "expected ident at line 1 column 2"),
            (r#"{"underlay_ip": "10.0.0.1"} {}"#, "trailing characters"),
            ("{}", "missing field `underlay_ip`"),
            (r#"{"underlay_ip": "10.0.0"}"#, "property underlay_ip: invalid IPv4 address syntax"),
            (r#"{"underlay_ip": 7}"#, "property underlay_ip: invalid type: integer `7`"),
            (r#"{"underlay_ip": "10.0.0.1", "vtep": "x"}"#, "property vtep: unknown field `vtep`"),
            (r#"{"underlay_ip": "10.0.0.1", "tls": {}}"#, "property tls: missing field `ca`"),
            (r#"{"underlay_ip": "10.0.0.1", "tls": {"ca": 1}}"#, "property tls.ca: invalid type"),
            (r#"{"underlay_ip": "10.0.0.1", "tls": {"cb": "/"}}"#, "property tls.cb: unknown field `cb`"),
        ] {
            let message = refused(json);
            assert!(message.contains(expected), "{json}: {message}");
        }
    }

    #[test]
    fn names_a_file_that_is_not_there() {
        let message = load::<Config>(Path::new("/nonexistent/node.json")).unwrap_err().to_string();
        assert!(message.contains("/nonexistent/node.json"), "{message}");
        assert!(message.contains("No such file"), "{message}");
    }
}
