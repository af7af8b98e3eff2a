//! Certificates good and bad, and handshakes with them over an in-memory pipe.
#![expect(clippy::unwrap_used, reason = "a failed step of a test is its failure")]

use std::fs;
use std::io::{Read, Write};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{BasicConstraints, Certificate, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tempfile::TempDir;
use weft_daemon::tls::{CertificateNames, Files, names_of};

struct Authority {
    certificate: Certificate,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    /// Certificate and key as PEM; valid in the years `valid`.
    fn issue(&self, names: &[&str], valid: (i32, i32)) -> (String, String) {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.not_before = date_time_ymd(valid.0, 1, 1);
        params.not_after = date_time_ymd(valid.1, 1, 1);
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }
}

fn write(dir: &Path, ca: &str, certificate: &str, key: &str) -> Files {
    let file = |name: &str, text: &str| {
        let path = dir.join(name);
        fs::write(&path, text).unwrap();
        path
    };
    Files { ca: file("ca.pem", ca), certificate: file("node.pem", certificate), key: file("node.key", key) }
}

/// In the year 2030 or so.
fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(60 * 365 * 24 * 3600)
}

fn good(dir: &Path) -> (Authority, Files) {
    good_of("weft", dir)
}

fn good_of(authority: &str, dir: &Path) -> (Authority, Files) {
    let ca = Authority::new(authority);
    let (certificate, key) = ca.issue(&["localhost", "127.0.0.1"], (2020, 2040));
    let files = write(dir, &ca.certificate.pem(), &certificate, &key);
    (ca, files)
}

#[test]
fn each_defect_names_its_file_and_the_remedy() {
    let ca = Authority::new("weft");
    let ca_pem = ca.certificate.pem();
    let (certificate, key) = ca.issue(&["localhost"], (2020, 2040));
    let (_, other_key) = ca.issue(&["localhost"], (2020, 2040));
    let (expired, expired_key) = ca.issue(&["localhost"], (2020, 2021));
    let (early, early_key) = ca.issue(&["localhost"], (2035, 2040));
    let torn = &certificate[..certificate.len() / 2];
    let garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";

    for (ca, certificate, key, file, says) in [
        ("", certificate.as_str(), key.as_str(), "ca.pem", "no certificate in it"),
        (garbage, &certificate, &key, "ca.pem", "certificate 1 in it cannot be used"),
        (&ca_pem, "", &key, "node.pem", "no certificate in it"),
        (&ca_pem, torn, &key, "node.pem", "not PEM as it should be"),
        (&ca_pem, garbage, &key, "node.pem", "certificate 1 in it cannot be used"),
        (&ca_pem, &certificate, "", "node.key", "no private key in it"),
        (&ca_pem, &certificate, &certificate, "node.key", "no private key in it"),
        (&ca_pem, &certificate, &other_key, "node.key", "issued together"),
        (&ca_pem, &expired, &expired_key, "node.pem", "expired on Jan  1"),
        (&ca_pem, &early, &early_key, "node.pem", "valid only from Jan  1"),
    ] {
        let dir = TempDir::new().unwrap();
        let message = write(dir.path(), ca, certificate, key).load(now()).unwrap_err().to_string();
        assert!(message.contains(file), "names {file}: {message}");
        assert!(message.contains(says), "says {says}: {message}");
    }
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let dir = TempDir::new().unwrap();
    let (_, files) = good(dir.path());
    fs::remove_file(&files.key).unwrap();
    let message = files.load(now()).unwrap_err().to_string();
    assert!(message.contains("node.key") && message.contains("No such file"), "{message}");
}

#[test]
fn names_are_read_and_the_key_is_never_shown() {
    let dir = TempDir::new().unwrap();
    let (_, files) = good(dir.path());
    let loaded = files.load(now()).unwrap();
    let expected =
        CertificateNames { dns: vec!["localhost".into()], ips: vec!["127.0.0.1".parse::<IpAddr>().unwrap()] };
    assert_eq!(loaded.names().unwrap(), expected);
    let shown = format!("{:?}", loaded.pem());
    assert_eq!(shown, "Pem { .. }");
    assert!(names_of(b"no certificate").unwrap_err().to_string().contains("peer's certificate"));
}

#[test]
fn changes_are_noticed_once() {
    let dir = TempDir::new().unwrap();
    let (ca, files) = good(dir.path());
    let first = files.fingerprint();
    assert_eq!(files.changed_since(&first), None);

    let (certificate, key) = ca.issue(&["localhost"], (2020, 2041));
    let elsewhere = TempDir::new_in(dir.path()).unwrap();
    let new = write(elsewhere.path(), "", &certificate, &key);
    fs::rename(&new.certificate, &files.certificate).unwrap();
    fs::rename(&new.key, &files.key).unwrap();
    let second = files.changed_since(&first).expect("the files were replaced");
    assert_eq!(files.changed_since(&second), None);
    files.load(now()).unwrap();

    fs::remove_file(&files.ca).unwrap();
    let third = files.changed_since(&second).expect("a file is gone");
    assert_eq!(files.changed_since(&third), None);
}

/// A handshake of our server with a client that trusts `trusts` and shows `shows`, and a byte each way.
fn handshake(server: &Files, trusts: &Files, shows: Option<&Files>, version: Version) -> Result<(), String> {
    let mut server =
        rustls::ServerConnection::new(server.load(now()).unwrap().server_config().unwrap()).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&trusts.ca).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match shows {
        Some(files) => {
            let chain = vec![CertificateDer::from_pem_file(&files.certificate).unwrap()];
            builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(&files.key).unwrap()).unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let mut client =
        rustls::ClientConnection::new(Arc::new(config), ServerName::try_from("localhost").unwrap()).unwrap();

    client.writer().write_all(b"?").unwrap();
    for _ in 0..8 {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        server.read_tls(&mut wire.as_slice()).unwrap();
        server.process_new_packets().map_err(|why| format!("server: {why}"))?;
        let mut wire = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        client.read_tls(&mut wire.as_slice()).unwrap();
        client.process_new_packets().map_err(|why| format!("client: {why}"))?;
    }
    let mut byte = [0];
    server.reader().read_exact(&mut byte).map_err(|why| format!("server: {why}"))?;
    assert_eq!(server.alpn_protocol(), Some(b"h2".as_slice()));
    let shown = server.peer_certificates().expect("client certificates are required");
    assert_eq!(names_of(&shown[0]).unwrap().dns, ["localhost"]);
    Ok(())
}

type Version = &'static rustls::SupportedProtocolVersion;

#[test]
fn the_server_takes_only_clients_with_a_certificate_of_its_authority() {
    let dirs = [TempDir::new().unwrap(), TempDir::new().unwrap()];
    let (ca, ours) = good(dirs[0].path());
    let (_, foreign) = good_of("others", dirs[1].path());
    let stale = TempDir::new_in(dirs[0].path()).unwrap();
    // The server checks a client's certificate against the machine's clock: expired is long ago, for that.
    let (certificate, key) = ca.issue(&["localhost"], (2000, 2001));
    let stale = write(stale.path(), &ca.certificate.pem(), &certificate, &key);

    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        handshake(&ours, &ours, Some(&ours), version).unwrap();
        let none = handshake(&ours, &ours, None, version).unwrap_err();
        assert!(none.contains("no certificates"), "{none}");
        let unknown = handshake(&ours, &ours, Some(&foreign), version).unwrap_err();
        assert!(unknown.contains("invalid peer certificate: UnknownIssuer"), "{unknown}");
        let expired = handshake(&ours, &ours, Some(&stale), version).unwrap_err();
        assert!(expired.contains("xpired"), "{expired}");
        let distrusted = handshake(&ours, &foreign, Some(&ours), version).unwrap_err();
        assert!(distrusted.starts_with("client: invalid peer certificate"), "{distrusted}");
    }
}

#[test]
fn the_client_knows_the_one_suite_that_older_servers_of_the_platform_speak() {
    let dir = TempDir::new().unwrap();
    let (_, files) = good(dir.path());
    let config = files.load(now()).unwrap().client_config().unwrap();
    let suites = &config.crypto_provider().cipher_suites;
    assert!(
        suites
            .iter()
            .any(|suite| suite.suite() == rustls::CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256)
    );
    assert!(config.alpn_protocols.is_empty(), "HTTP/1.1 is not agreed on but taken for granted");
    assert!(config.client_auth_cert_resolver.has_certs());
}
