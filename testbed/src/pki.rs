//! Certificates for worlds: an authority, what controllers and cells present, and certificates that must be
//! refused. Valid from 1975 to 4096 unless said otherwise: no test fails because a day has passed.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, date_time_ymd,
};

use crate::policy_server;

/// The name in a controller's certificate.
pub const CONTROLLER_NAME: &str = "weft-controller";
/// The name in a cell's certificate.
pub const NODE_NAME: &str = "weft-node";

/// A certificate authority. It may live in memory only: what needs its certificate reads [`Authority::pem`].
#[derive(Debug)]
pub struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate with its key, PEM.
#[derive(Debug, Clone)]
pub struct Identity {
    pub certificate: String,
    pub key: String,
}

/// Where an identity was written.
#[derive(Debug, Clone)]
pub struct IdentityFiles {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Authority {
    /// A new authority. Two of the same name are still strangers: that makes the "wrong CA" of tests.
    pub fn new(name: &str) -> Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { pem, issuer: Issuer::new(params, key) })
    }

    pub fn pem(&self) -> &str {
        &self.pem
    }

    pub fn write(&self, file: &Path) -> Result<()> {
        fs::write(file, &self.pem).with_context(|| format!("write {}", file.display()))
    }

    /// For `weft-controller`, reached at `address`.
    pub fn controller(&self, address: IpAddr) -> Result<Identity> {
        self.issue(params(CONTROLLER_NAME, Some(address))?)
    }

    /// For `weft-node`.
    pub fn node(&self) -> Result<Identity> {
        self.issue(params(NODE_NAME, None)?)
    }

    /// For a policy server, reached by its name or at `address`.
    pub fn policy_server(&self, address: IpAddr) -> Result<Identity> {
        self.certify(KeyPair::from_pem(policy_server::KEY)?, params(policy_server::NAME, Some(address))?)
    }

    /// For any name.
    pub fn named(&self, name: &str) -> Result<Identity> {
        self.issue(params(name, None)?)
    }

    /// For any name, valid only in the year 2000.
    pub fn expired(&self, name: &str, address: Option<IpAddr>) -> Result<Identity> {
        let mut params = params(name, address)?;
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(2001, 1, 1);
        self.issue(params)
    }

    fn issue(&self, params: CertificateParams) -> Result<Identity> {
        self.certify(KeyPair::generate()?, params)
    }

    fn certify(&self, key: KeyPair, params: CertificateParams) -> Result<Identity> {
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Identity { certificate, key: key.serialize_pem() })
    }
}

impl Identity {
    /// Writes `<stem>.pem` and `<stem>.key`, each replaced as a whole, the key readable by its owner only.
    pub fn write(&self, directory: &Path, stem: &str) -> Result<IdentityFiles> {
        let files = IdentityFiles {
            certificate: directory.join(format!("{stem}.pem")),
            key: directory.join(format!("{stem}.key")),
        };
        for (file, text) in [(&files.key, &self.key), (&files.certificate, &self.certificate)] {
            let new = file.with_extension("new");
            drop(fs::remove_file(&new));
            let mut options = fs::OpenOptions::new();
            options.write(true).create_new(true).mode(0o600);
            let mut opened = options.open(&new).with_context(|| format!("create {}", new.display()))?;
            std::io::Write::write_all(&mut opened, text.as_bytes())?;
            fs::rename(&new, file).with_context(|| format!("replace {}", file.display()))?;
        }
        Ok(files)
    }
}

fn params(name: &str, address: Option<IpAddr>) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(vec![name.to_owned()])?;
    params.subject_alt_names.extend(address.map(SanType::IpAddress));
    params.distinguished_name.push(DnType::CommonName, name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}
