//! Certificates of a daemon: read, checked whole before use, and noticed when they change.
//!
//! Both sides show a certificate and verify the other's against the CAs given. What a certificate's names
//! allow is decided by the programs; here they are only read out.

use std::fmt;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rustls::RootCertStore;
use rustls::crypto::{CryptoProvider, ring};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Where a daemon's certificates are, all PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// Certificates that may sign a peer's, one or more (two while a CA is being replaced).
    pub ca: PathBuf,
    /// Our own certificate first, then intermediate ones.
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// What tells one state of the files from another without reading them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint([Option<(SystemTime, u64, u64)>; 3]);

/// Certificates that were read together and belong together.
#[derive(Debug, Clone)]
pub struct Loaded {
    pem: Pem,
    roots: Arc<RootCertStore>,
    own: Arc<CertifiedKey>,
}

/// The files' bytes as read, for libraries that take PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct Pem {
    pub ca: Vec<u8>,
    pub certificate: Vec<u8>,
    pub key: Vec<u8>,
}

/// The subject alternative names of a certificate.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CertificateNames {
    pub dns: Vec<String>,
    pub ips: Vec<IpAddr>,
}

/// Why certificates cannot be used: which file, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {}: {why}", path.display())]
    Read { path: PathBuf, why: io::Error },
    #[error("{}: not PEM as it should be ({why}); write the file anew", path.display())]
    Pem { path: PathBuf, why: pem::Error },
    #[error("{}: no certificate in it; it must hold at least one BEGIN CERTIFICATE block", path.display())]
    NoCertificate { path: PathBuf },
    #[error("{}: no private key in it; it must hold a BEGIN PRIVATE KEY block, unencrypted", path.display())]
    NoKey { path: PathBuf },
    #[error("{}: certificate {number} in it cannot be used ({why}); issue it anew", path.display())]
    Certificate { path: PathBuf, number: usize, why: String },
    #[error("{}: the private key cannot be used ({why}); give an RSA, ECDSA P-256/P-384 or Ed25519 key", path.display())]
    Key { path: PathBuf, why: rustls::Error },
    #[error("{} is not the key of the certificate in {}; give the two that were issued together", key.display(), certificate.display())]
    Mismatch { key: PathBuf, certificate: PathBuf },
    #[error("{}: the certificate expired on {since}; issue a new one", path.display())]
    Expired { path: PathBuf, since: String },
    #[error("{}: the certificate is valid only from {from}; check this machine's clock, or issue a new one", path.display())]
    NotYetValid { path: PathBuf, from: String },
    #[error("cannot set up TLS: {why}")]
    Setup { why: String },
    #[error("the peer's certificate cannot be read: {why}")]
    Peer { why: String },
}

impl Files {
    /// Reads and checks all three files; nothing is kept of them if one is not good.
    pub fn load(&self, now: SystemTime) -> Result<Loaded, TlsError> {
        let pem = Pem { ca: read(&self.ca)?, certificate: read(&self.certificate)?, key: read(&self.key)? };
        let provider = ring::default_provider();

        let mut roots = RootCertStore::empty();
        let authorities = certificates(&self.ca, &pem.ca)?;
        for (number, authority) in (1..).zip(&authorities) {
            let refused = |why: rustls::Error| TlsError::Certificate {
                path: self.ca.clone(),
                number,
                why: why.to_string(),
            };
            roots.add(authority.clone()).map_err(refused)?;
        }
        // While a CA is being replaced the old one may expire; one that is valid is enough.
        let checked: Vec<_> =
            (1..).zip(&authorities).map(|(number, der)| validity(&self.ca, number, der, now)).collect();
        if !checked.iter().any(Result::is_ok) {
            checked.into_iter().collect::<Result<(), _>>()?;
        }

        let chain = certificates(&self.certificate, &pem.certificate)?;
        for (number, der) in (1..).zip(&chain) {
            validity(&self.certificate, number, der, now)?;
        }
        let own = Arc::new(self.certified_key(chain, &pem.key, &provider)?);
        Ok(Loaded { pem, roots: Arc::new(roots), own })
    }

    /// The files' state now, where it differs from `before`. Files that cannot be looked at count as a state too,
    /// so that a caller who remembers what it last tried reports each bad state once.
    pub fn changed_since(&self, before: &Fingerprint) -> Option<Fingerprint> {
        Some(self.fingerprint()).filter(|now| now != before)
    }

    /// Take it before [`Files::load`]: a change in between is then noticed at the next look.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint([&self.ca, &self.certificate, &self.key].map(|path| {
            let file = fs::metadata(path).ok()?;
            // The inode tells a file that was replaced within the clock's resolution.
            Some((file.modified().ok()?, file.len(), file.ino()))
        }))
    }

    fn certified_key(
        &self,
        chain: Vec<CertificateDer<'static>>,
        pem: &[u8],
        provider: &CryptoProvider,
    ) -> Result<CertifiedKey, TlsError> {
        let key = PrivateKeyDer::from_pem_slice(pem).map_err(|why| match why {
            pem::Error::NoItemsFound => TlsError::NoKey { path: self.key.clone() },
            why => TlsError::Pem { path: self.key.clone(), why },
        })?;
        CertifiedKey::from_der(chain, key, provider).map_err(|why| match why {
            rustls::Error::InconsistentKeys(_) => {
                TlsError::Mismatch { key: self.key.clone(), certificate: self.certificate.clone() }
            }
            why => TlsError::Key { path: self.key.clone(), why },
        })
    }
}

impl Loaded {
    /// For a gRPC server that every client must show a certificate of one of the CAs. TLS 1.2 and 1.3.
    pub fn server_config(&self) -> Result<Arc<rustls::ServerConfig>, TlsError> {
        let refused = |why: String| TlsError::Setup { why };
        let provider = Arc::new(ring::default_provider());
        let clients =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&self.roots), Arc::clone(&provider))
                .build()
                .map_err(|why| refused(why.to_string()))?;
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|why| refused(why.to_string()))?
            .with_client_cert_verifier(clients)
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&self.own))));
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }

    /// For a client that shows our certificate, and speaks HTTP/1.1 if no more is agreed. TLS 1.2 and 1.3.
    pub fn client_config(&self) -> Result<Arc<rustls::ClientConfig>, TlsError> {
        let config = rustls::ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|why| TlsError::Setup { why: why.to_string() })?
            .with_root_certificates(Arc::clone(&self.roots))
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&self.own))));
        Ok(Arc::new(config))
    }

    pub fn pem(&self) -> &Pem {
        &self.pem
    }

    /// The names in our own certificate.
    pub fn names(&self) -> Result<CertificateNames, TlsError> {
        names_of(&self.own.cert[0])
    }
}

/// The names that a peer's certificate (DER), verified before, speaks for.
pub fn names_of(certificate: &[u8]) -> Result<CertificateNames, TlsError> {
    let refused = |why: String| TlsError::Peer { why };
    let (_, parsed) = X509Certificate::from_der(certificate).map_err(|why| refused(why.to_string()))?;
    let mut names = CertificateNames::default();
    let Some(extension) = parsed.subject_alternative_name().map_err(|why| refused(why.to_string()))? else {
        return Ok(names);
    };
    for name in &extension.value.general_names {
        match name {
            GeneralName::DNSName(dns) => names.dns.push((*dns).to_owned()),
            GeneralName::IPAddress(bytes) => {
                let ip = <[u8; 4]>::try_from(*bytes)
                    .map(IpAddr::from)
                    .or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from))
                    .map_err(|_| refused(format!("an address of {} bytes in it", bytes.len())))?;
                names.ips.push(ip);
            }
            _ => (),
        }
    }
    Ok(names)
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|why| TlsError::Read { path: path.to_owned(), why })
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|why| TlsError::Pem { path: path.to_owned(), why })?;
    match found.is_empty() {
        true => Err(TlsError::NoCertificate { path: path.to_owned() }),
        false => Ok(found),
    }
}

fn validity(path: &Path, number: usize, der: &[u8], now: SystemTime) -> Result<(), TlsError> {
    let path = path.to_owned();
    let (_, certificate) = match X509Certificate::from_der(der) {
        Ok(parsed) => parsed,
        Err(why) => return Err(TlsError::Certificate { path, number, why: why.to_string() }),
    };
    let now = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let now = i64::try_from(now).unwrap_or(i64::MAX);
    let valid = certificate.validity();
    if now < valid.not_before.timestamp() {
        return Err(TlsError::NotYetValid { path, from: valid.not_before.to_string() });
    }
    if now > valid.not_after.timestamp() {
        return Err(TlsError::Expired { path, since: valid.not_after.to_string() });
    }
    Ok(())
}

impl fmt::Debug for Pem {
    /// Never the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pem").finish_non_exhaustive()
    }
}
