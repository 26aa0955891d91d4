//! Which requests go through a proxy. The rules are those of curl: one proxy per scheme, one for all schemes, and a list
//! of hosts without a proxy. Loopback never uses a proxy.

use std::sync::Arc;

use http::{HeaderValue, Uri};
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use url::Url;

use super::is_loopback;

/// The configured proxies. The default is none.
#[derive(Clone, Debug, Default)]
pub struct Proxies(Option<Arc<Matcher>>);

impl Proxies {
    /// Creates the proxies from their URLs. `None`: no proxy. `no_proxy` is a list in the form of `NO_PROXY`.
    #[must_use]
    pub fn new(http: Option<&str>, https: Option<&str>, all: Option<&str>, no_proxy: &str) -> Self {
        if http.or(https).or(all).is_none() {
            return Self(None);
        }
        let text = |url: Option<&str>| url.unwrap_or_default().to_owned();
        let matcher = Matcher::builder().http(text(http)).https(text(https)).all(text(all)).no(no_proxy.to_owned());
        Self(Some(Arc::new(matcher.build())))
    }

    /// Whether `url` is a supported proxy. The error must not quote it: it may hold a password.
    ///
    /// # Errors
    /// The expected form.
    pub fn check(url: &str) -> Result<(), &'static str> {
        const EXPECTED: &str = "expected the URL of an http or https proxy, such as http://proxy.example:3128";
        let full = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let parsed = Url::parse(&full).map_err(|_| EXPECTED)?;
        if !matches!(parsed.scheme(), "http" | "https") || parsed.host().is_none() {
            return Err(EXPECTED);
        }
        // The matcher ignores invalid URLs. A configured proxy must never be ignored.
        let any_uri = Uri::from_static("https://example.com");
        let read = Matcher::builder().all(url.to_owned()).build().intercept(&any_uri);
        if read.is_some() { Ok(()) } else { Err(EXPECTED) }
    }

    /// The proxy for a request to `uri`.
    pub(super) fn of(&self, uri: &Uri) -> Option<Intercept> {
        let matcher = self.0.as_ref()?;
        let host = uri.host()?.trim_start_matches('[').trim_end_matches(']');
        if is_loopback(host) { None } else { matcher.intercept(uri) }
    }

    /// The authorization for a proxy that forwards plain requests to `uri`.
    pub(super) fn authorization(&self, uri: &Uri) -> Option<HeaderValue> {
        if uri.scheme() != Some(&http::uri::Scheme::HTTP) {
            return None;
        }
        self.of(uri)?.basic_auth().cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(proxies: &Proxies, uri: &str, expected: Option<&str>) {
        let found = proxies.of(&uri.parse().expect("a URI")).map(|proxy| proxy.uri().to_string());
        assert_eq!(found.as_deref(), expected, "{uri}");
    }

    #[test]
    fn each_scheme_has_its_proxy() {
        let proxies = Proxies::new(Some("http://one:1"), None, Some("two:2"), "inside.example, 10.0.0.0/8,.sub.test");
        check(&proxies, "http://plane.example/v1", Some("http://one:1/"));
        check(&proxies, "https://plane.example/v1", Some("http://two:2/"));
        for uri in ["https://inside.example", "https://a.inside.example", "https://10.1.2.3:8443", "https://x.sub.test"]
        {
            check(&proxies, uri, None);
        }
        for uri in ["http://localhost:1", "https://127.0.0.9", "http://[::1]:8700/v1", "http://a.localhost"] {
            check(&proxies, uri, None);
        }
        check(&Proxies::default(), "https://plane.example", None);
        check(&Proxies::new(None, None, Some("http://p:1"), "*"), "https://plane.example", None);
    }

    #[test]
    fn invalid_proxies_are_refused_without_quoting_them() {
        for good in
            ["http://proxy.example:3128", "proxy.example:3128", "https://me:pass@proxy.example", "http://[::1]:1"]
        {
            assert_eq!(Proxies::check(good), Ok(()), "{good}");
        }
        for bad in ["socks5://proxy.example:1080", "http://", "http://me:secret@", "http://a b", "://", "ftp://x"] {
            let error = Proxies::check(bad).expect_err(bad);
            assert!(!error.contains("secret") && error.starts_with("expected"), "{error}");
        }
    }
}
