//! The services for which the node signs a sign-in message (posemesh.md section 9, "Sign-in for another service").
//!
//! DDS chooses the domain and the URI in the text that the node signs. A malicious service could pass on the challenge
//! of another service, and sign in there with the node's signature. So both fields must name the configured service.

use url::{Host, Url};

/// The service names that a message may carry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Audience {
    /// The service is on this machine: a dev server, or the operator's own tunnel. Its name proves nothing.
    Any,
    /// The host of the configured service, or a parent domain of it.
    Service(String),
    /// Only the domain that the operator configured.
    Named(String),
}

impl Audience {
    /// `named` is the setting `SIGN_IN_DOMAIN`.
    pub(super) fn new(dds: &Url, named: Option<&str>) -> Self {
        if let Some(named) = named {
            return Self::Named(named.to_ascii_lowercase());
        }
        let loopback = match dds.host() {
            Some(Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
            Some(Host::Ipv4(ip)) => ip.is_loopback(),
            Some(Host::Ipv6(ip)) => ip.is_loopback(),
            None => false,
        };
        if loopback { Self::Any } else { Self::Service(dds.host_str().unwrap_or_default().to_ascii_lowercase()) }
    }

    /// Checks a challenge. The error says why it is not signed.
    pub(super) fn check(&self, domain: &str, uri: &str) -> Result<(), String> {
        if *self == Self::Any {
            return Ok(());
        }
        let uri_host = Url::parse(uri).ok().and_then(|uri| uri.host_str().map(str::to_ascii_lowercase));
        let named = [("domain", authority_host(domain)), ("uri", uri_host)];
        for (field, host) in named {
            let host = host.ok_or_else(|| format!("field {field} names no host, which is not signed"))?;
            if !self.covers(&host) {
                let (Self::Service(own) | Self::Named(own)) = self else { continue };
                let host: String = host.chars().take(128).collect();
                return Err(format!(
                    "field {field} names {host}, expected {own}; set SIGN_IN_DOMAIN={host} if the service signs in for it"
                ));
            }
        }
        Ok(())
    }

    fn covers(&self, host: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Named(own) => host == own,
            Self::Service(own) => {
                // `dds.example.org` may sign in for `example.org`, not for `org`.
                let above = own.strip_suffix(host).is_some_and(|rest| rest.ends_with('.'));
                host == own || (above && host.contains('.') && own.parse::<std::net::IpAddr>().is_err())
            }
        }
    }
}

/// The host of `host[:port]`, lower case.
fn authority_host(domain: &str) -> Option<String> {
    let url = Url::parse(&format!("https://{domain}")).ok()?;
    let plain = url.path() == "/" && url.query().is_none() && url.fragment().is_none() && url.username().is_empty();
    url.host_str().filter(|_| plain).map(str::to_ascii_lowercase)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(dds: &str, named: Option<&str>, domain: &str, uri: &str, expected: &str) {
        let audience = Audience::new(&Url::parse(dds).expect("a URL"), named);
        let result = audience.check(domain, uri).err().unwrap_or_else(|| "signed".to_owned());
        assert!(result.starts_with(expected), "{dds} {named:?} {domain} {uri}: {result}");
    }

    #[test]
    fn messages_must_name_the_configured_service() {
        let dds = "https://dds.example.org/base";
        check(dds, None, "dds.example.org", "https://dds.example.org", "signed");
        check(dds, None, "DDS.example.org:443", "https://dds.example.org:8443/login", "signed");
        check(dds, None, "example.org", "https://example.org/x", "signed");
        check(dds, None, "bank.example", "https://dds.example.org", "field domain names bank.example, expected dds.");
        check(dds, None, "dds.example.org", "https://bank.example", "field uri names bank.example, expected dds.ex");
        check(dds, None, "org", "https://org", "field domain names org");
        check(dds, None, "s.example.org", "https://s.example.org", "field domain names s.example.org");
        check(dds, None, "evil-dds.example.org", "https://x", "field domain names evil-dds");
        check(dds, None, "dds.example.org/@bank.example", "https://x", "field domain names no host");
        check(dds, None, "bank.example#dds.example.org", "https://x", "field domain names no host");
        check(dds, None, "dds.example.org", "urn:x", "field uri names no host");
        check("https://192.0.2.77", None, "2.77", "https://2.77", "field domain names");
    }

    #[test]
    fn configured_domain_is_the_only_valid_one() {
        let dds = "https://dds.example.org";
        check(dds, Some("Login.example"), "login.example", "https://login.example/x", "signed");
        check(dds, Some("login.example"), "dds.example.org", "https://dds.example.org", "field domain names dds.");
        check(
            "http://127.0.0.1:1",
            Some("login.example"),
            "a.b",
            "https://a.b",
            "field domain names a.b, expected log",
        );
    }

    #[test]
    fn local_service_may_use_any_name() {
        for dds in ["http://127.0.0.1:8700", "http://localhost:1", "http://[::1]:1"] {
            check(dds, None, "dds.test.local", "whatever", "signed");
        }
    }
}
