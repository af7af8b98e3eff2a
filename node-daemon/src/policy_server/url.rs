//! Where the policy server is, and how ids are written into its URLs.

use std::fmt;
use std::str::FromStr;

use hyper::Uri;
use rustls::pki_types::ServerName;

/// Proxies and servers that refuse longer request lines are not rare; silk's own server would take a megabyte.
const LONGEST: usize = 8 << 10;

/// `https://name[:port]`, and nothing after it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(try_from = "String")]
pub struct ServerUrl {
    host: String,
    port: u16,
    /// What the server's certificate must speak for.
    name: ServerName<'static>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not the URL of a policy server: it must be https://, a host, and perhaps a port")]
pub struct NotAUrl(String);

impl ServerUrl {
    pub(super) fn endpoint(&self) -> (&str, u16) {
        (&self.host, self.port)
    }

    pub(super) fn name(&self) -> ServerName<'static> {
        self.name.clone()
    }

    /// As the `Host` header has it.
    pub(super) fn authority(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }
}

impl TryFrom<String> for ServerUrl {
    type Error = NotAUrl;

    fn try_from(text: String) -> Result<Self, NotAUrl> {
        text.parse()
    }
}

impl FromStr for ServerUrl {
    type Err = NotAUrl;

    fn from_str(text: &str) -> Result<Self, NotAUrl> {
        let wrong = || NotAUrl(text.to_owned());
        let uri: Uri = text.parse().map_err(|_| wrong())?;
        let bare = matches!(uri.path(), "" | "/") && uri.query().is_none();
        let user = uri.authority().is_some_and(|authority| authority.as_str().contains('@'));
        if uri.scheme_str() != Some("https") || !bare || user {
            return Err(wrong());
        }
        let host = uri.host().ok_or_else(wrong)?.trim_matches(['[', ']']).to_owned();
        let name = ServerName::try_from(host.clone()).map_err(|_| wrong())?;
        // A port that is there and is no port would be taken for none.
        let port = match uri.port() {
            Some(port) => port.as_u16(),
            None if uri.authority().is_some_and(|authority| authority.as_str().ends_with(':')) => {
                return Err(wrong());
            }
            None => 443,
        };
        Ok(Self { host, port, name })
    }
}

impl fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "https://{}", self.authority())
    }
}

/// Comma lists, each as long as a request with `rest` bytes besides has room for.
pub(super) fn lists<'a>(ids: impl IntoIterator<Item = &'a str>, rest: usize) -> Vec<String> {
    let room = LONGEST.saturating_sub(rest);
    let mut lists: Vec<String> = Vec::new();
    for id in ids {
        let id = escaped(id);
        match lists.last_mut() {
            Some(list) if list.len() + 1 + id.len() <= room => {
                list.push(',');
                list.push_str(&id);
            }
            _ => lists.push(id),
        }
    }
    lists
}

/// RFC 3986 §2.3: all but unreserved characters are escaped, the comma that parts ids among them.
fn escaped(id: &str) -> String {
    let mut escaped = String::with_capacity(id.len());
    for byte in id.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn urls_are_taken_or_refused_whole() {
        for (text, shown) in [
            (
                "https://policy-server.service.cf.internal:4003",
                "https://policy-server.service.cf.internal:4003",
            ),
            ("https://10.0.0.1/", "https://10.0.0.1:443"),
            ("https://[::1]:4003", "https://[::1]:4003"),
        ] {
            assert_eq!(text.parse::<ServerUrl>().expect(text).to_string(), shown);
        }
        for text in
            ["", "policy-server", "http://a", "https://a/b", "https://a?b", "https://u@a", "https://a:"]
        {
            text.parse::<ServerUrl>().expect_err(text);
        }
    }

    proptest! {
        #[test]
        fn every_id_is_in_one_list_and_no_list_is_too_long(
            ids in prop::collection::vec("\\PC{1,60}", 0..400),
            rest in 0usize..500,
        ) {
            let lists = lists(ids.iter().map(String::as_str), rest);
            prop_assert!(lists.iter().all(|list| list.len() + rest <= LONGEST));
            prop_assert!(lists.iter().all(|list| list.bytes().all(|byte| byte.is_ascii_graphic())));
            let listed: Vec<_> = lists.iter().flat_map(|list| list.split(',')).map(str::to_owned).collect();
            prop_assert_eq!(listed, ids.iter().map(|id| escaped(id)).collect::<Vec<_>>());
            // No list could have taken the first of the next one.
            for pair in lists.windows(2) {
                let first = pair[1].split(',').next().unwrap_or_default();
                prop_assert!(pair[0].len() + 1 + first.len() + rest > LONGEST);
            }
        }
    }
}
