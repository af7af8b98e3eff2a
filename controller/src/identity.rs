//! Who is asking: what a client's certificate entitles it to.

use std::net::IpAddr;

use tonic::Request;
use weft_daemon::tls::{CertificateNames, names_of};
use weft_model::address::UnderlayAddr;
use weft_model::reason::Reason;

/// The rule for cells.
#[derive(Debug, Clone)]
pub struct Roles {
    /// The DNS name that a cell's certificate must carry.
    pub cell: String,
}

impl Roles {
    /// Whether the client may speak for the cell at `claimed`. A certificate that names addresses speaks for those
    /// only; one that names none is shared by all cells.
    pub fn check<T>(&self, request: &Request<T>, claimed: UnderlayAddr) -> Result<(), Reason> {
        let certificates = request.peer_certs();
        let own = certificates.as_deref().and_then(|chain| chain.first());
        let names = own.and_then(|certificate| names_of(certificate).ok()).unwrap_or_default();
        self.check_names(&names, claimed)
    }

    fn check_names(&self, names: &CertificateNames, claimed: UnderlayAddr) -> Result<(), Reason> {
        if !names.dns.contains(&self.cell) {
            return Err(Reason::WrongRole { wanted: self.cell.clone() });
        }
        if !names.ips.is_empty() && !names.ips.contains(&IpAddr::V4(claimed.get())) {
            let seen = names.ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            return Err(Reason::NotYours { claimed: claimed.to_string(), seen });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_speaks_for_its_role_and_its_addresses() {
        let roles = Roles { cell: "weft-node".into() };
        let claimed: UnderlayAddr = "10.0.0.1".parse().expect("address");
        let names = |dns: &[&str], ips: &[&str]| CertificateNames {
            dns: dns.iter().map(ToString::to_string).collect(),
            ips: ips.iter().map(|ip| ip.parse().expect("address")).collect(),
        };
        assert_eq!(roles.check_names(&names(&["weft-node"], &[]), claimed), Ok(()));
        assert_eq!(
            roles.check_names(&names(&["x", "weft-node"], &["10.0.0.9", "10.0.0.1"]), claimed),
            Ok(())
        );
        let stranger = roles.check_names(&names(&["weft-controller"], &["10.0.0.1"]), claimed);
        assert!(matches!(stranger, Err(Reason::WrongRole { .. })), "{stranger:?}");
        let other = roles.check_names(&names(&["weft-node"], &["10.0.0.2"]), claimed);
        assert!(matches!(other, Err(Reason::NotYours { .. })), "{other:?}");
    }
}
