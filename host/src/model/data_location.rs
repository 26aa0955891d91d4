//! The location of a task's data. The control plane's adapter announces it, and `storage` reads it.

use std::{collections::BTreeMap, fmt, path::PathBuf, sync::Arc};

use bytes::Bytes;
use url::Url;
use uuid::Uuid;

/// Longest part of a URL that an error message contains, in characters.
const SHOWN_CHARS_MAX: usize = 200;

/// A domain and its server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Coordinates {
    /// Base URL of the domain server, `http` or `https`.
    pub server: Url,
    /// The domain.
    pub domain: Uuid,
}

/// The domain servers that the operator allows: a host, or `host:port`, each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DomainHosts(pub Vec<String>);

/// What an empty [`DomainHosts`] means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmptyList {
    /// The control plane may name any server: the node has signed in there.
    AllowsAny,
    /// No server is allowed: anybody may speak for the control plane.
    AllowsNone,
}

impl DomainHosts {
    /// Checks a domain server before it gets a token.
    ///
    /// # Errors
    /// One line about why it must not get one.
    pub fn check(&self, server: &Url, empty: EmptyList) -> Result<(), String> {
        if !server.username().is_empty() || server.password().is_some() {
            return Err("the domain server's URL contains credentials; expected scheme, host and path".to_owned());
        }
        let any = self.0.is_empty() && empty == EmptyList::AllowsAny;
        if any || self.contains(server) {
            return Ok(());
        }
        let host = server.host_str().unwrap_or_default();
        let port = server.port().map(|port| format!(":{port}")).unwrap_or_default();
        Err(format!("domain server {host}{port} is not in DOMAIN_HOSTS; add it there to allow it"))
    }

    fn contains(&self, server: &Url) -> bool {
        let host = server.host_str().unwrap_or_default();
        let with_port = format!("{host}:{}", server.port_or_known_default().unwrap_or_default());
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        self.0.iter().any(|allowed| [host, bare, &with_port].iter().any(|h| h.eq_ignore_ascii_case(allowed)))
    }
}

/// Files on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalFiles {
    /// The inputs, in the order of the lease's inputs. `input-0` is the first.
    pub inputs: Vec<PathBuf>,
    /// Artifacts are written below this folder under their logical paths.
    pub out: PathBuf,
}

/// Inputs that came with the lease. The artifacts travel in the report.
#[derive(Clone, PartialEq, Eq)]
pub struct InlineInputs(pub Arc<BTreeMap<String, Bytes>>);

impl InlineInputs {
    /// The end of a name whose value is base64, in leases and in reports.
    pub const BASE64_SUFFIX: &str = ";base64";
}

/// The bytes of inputs are never printed.
impl fmt::Debug for InlineInputs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} inputs", self.0.len())
    }
}

/// Where a task's data is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DataLocation {
    /// On a domain server.
    DomainServer(Coordinates),
    /// In files on this machine.
    LocalFiles(LocalFiles),
    /// In the lease and in the report.
    Inline(InlineInputs),
    /// The task has no data: every input and output call fails.
    None,
}

/// The parts of the location that a control plane has announced so far. A later answer may add or change parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnnouncedData {
    /// Parts of a domain server's coordinates. `None` is a part that is not known yet.
    DomainServer {
        /// Base URL, exactly as received.
        server: Option<String>,
        /// The domain.
        domain: Option<Uuid>,
    },
    /// Complete from the start.
    Known(DataLocation),
}

impl AnnouncedData {
    /// The known parts of a domain server's coordinates.
    #[must_use]
    pub fn at_server(server: Option<&str>, domain: Option<Uuid>) -> Self {
        Self::DomainServer { server: server.map(str::to_owned), domain }
    }

    /// The domain, if it is known.
    #[must_use]
    pub fn domain(&self) -> Option<Uuid> {
        match self {
            Self::DomainServer { domain, .. } => *domain,
            Self::Known(DataLocation::DomainServer(coordinates)) => Some(coordinates.domain),
            Self::Known(DataLocation::LocalFiles(_) | DataLocation::Inline(_) | DataLocation::None) => None,
        }
    }

    /// Whether no part is missing. A complete location may still be malformed.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        matches!(self, Self::Known(_) | Self::DomainServer { server: Some(_), domain: Some(_) })
    }

    /// Applies a later answer. Parts that the answer does not name stay.
    pub fn update(&mut self, newer: Self) {
        match (&mut *self, newer) {
            (Self::DomainServer { server, domain }, Self::DomainServer { server: new_server, domain: new_domain }) => {
                if new_server.is_some() {
                    *server = new_server;
                }
                *domain = new_domain.or(*domain);
            }
            (_, newer) => *self = newer,
        }
    }

    /// The location.
    ///
    /// # Errors
    /// One line about the missing or malformed part.
    pub fn resolve(&self) -> Result<DataLocation, String> {
        let (server, domain) = match self {
            Self::Known(location) => return Ok(location.clone()),
            Self::DomainServer { server, domain } => (server, domain),
        };
        let server = server.as_deref().filter(|text| !text.trim().is_empty());
        let text = server.ok_or("lease missing domain_server_url")?;
        let domain = domain.ok_or("lease missing domain_id")?;
        match Url::parse(text) {
            Ok(server) if matches!(server.scheme(), "http" | "https") && server.has_host() => {
                Ok(DataLocation::DomainServer(Coordinates { server, domain }))
            }
            _ => {
                let shown: String = text.chars().take(SHOWN_CHARS_MAX).collect();
                Err(format!("domain_server_url {shown:?} is not an absolute http(s) URL"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_names_the_missing_part() {
        let id = Some(Uuid::nil());
        let check = |domain, server: Option<&str>, expected: &str| {
            let announced = AnnouncedData::at_server(server, domain);
            let seen = match announced.resolve() {
                Ok(DataLocation::DomainServer(found)) => found.server.to_string(),
                Ok(other) => format!("{other:?}"),
                Err(text) => text,
            };
            assert_eq!(seen, expected);
        };
        check(id, Some("https://ds.lab.test"), "https://ds.lab.test/");
        check(id, None, "lease missing domain_server_url");
        check(id, Some(" "), "lease missing domain_server_url");
        check(None, None, "lease missing domain_server_url");
        check(None, Some("https://ds.lab.test"), "lease missing domain_id");
        check(id, Some("/relative\n"), "domain_server_url \"/relative\\n\" is not an absolute http(s) URL");
        check(id, Some("ftp://x"), "domain_server_url \"ftp://x\" is not an absolute http(s) URL");
        check(id, Some("http:"), "domain_server_url \"http:\" is not an absolute http(s) URL");
    }

    #[test]
    fn empty_list_allows_any_or_no_server() {
        let check = |hosts: &[&str], server: &str, empty| {
            let hosts = DomainHosts(hosts.iter().map(|host| (*host).to_owned()).collect());
            hosts.check(&Url::parse(server).expect("a URL"), empty).err().unwrap_or_default()
        };
        let refused = "domain server ds.test is not in DOMAIN_HOSTS; add it there to allow it";
        for (hosts, any, none) in [
            (&[][..], "", refused),
            (&["DS.test"], "", ""),
            (&["other.test", "ds.test:443"], "", ""),
            (&["ds.test:8443", "test"], refused, refused),
        ] {
            assert_eq!(check(hosts, "https://ds.test/base", EmptyList::AllowsAny), any, "{hosts:?}");
            assert_eq!(check(hosts, "https://ds.test/base", EmptyList::AllowsNone), none, "{hosts:?}");
        }
        let other_port = check(&["ds.test:8443"], "https://ds.test:9999", EmptyList::AllowsNone);
        assert_eq!(other_port, "domain server ds.test:9999 is not in DOMAIN_HOSTS; add it there to allow it");
        assert_eq!(check(&["::1"], "http://[::1]:8700", EmptyList::AllowsNone), "");
        let with_password = check(&["ds.test"], "https://user:secret@ds.test", EmptyList::AllowsAny);
        assert!(with_password.contains("credentials") && !with_password.contains("secret"), "{with_password}");
    }

    #[test]
    fn later_answer_changes_only_named_parts() {
        let parts =
            |server: Option<&str>, domain| AnnouncedData::DomainServer { server: server.map(str::to_owned), domain };
        let (first, second) = (Some(Uuid::nil()), Some(Uuid::max()));
        let mut announced = parts(None, first);
        assert!(!announced.is_complete());
        announced.update(parts(Some("https://a"), None));
        assert_eq!(announced, parts(Some("https://a"), first));
        announced.update(parts(None, second));
        assert_eq!(announced, parts(Some("https://a"), second));
        assert!(announced.is_complete());
    }
}
