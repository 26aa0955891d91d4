//! Reads the entries of `inputs_cids`. Pure: it makes no requests.
//!
//! An entry is a bare id, an absolute URL, or a path on the domain server. Requests go only to the lease's
//! domain server, so a URL of another host is refused.

use url::Url;

use crate::{
    model::{Coordinates, PortError, PortErrorKind},
    storage::naming::for_message,
};

/// The data an input names: at least one id or filter, never a whole domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Target {
    /// Domain of the data, if the entry names one.
    pub(crate) domain: Option<String>,
    pub(crate) ids: Vec<String>,
    pub(crate) name: Option<String>,
    pub(crate) data_type: Option<String>,
}

impl Target {
    /// The list URL that fetches this target.
    pub(crate) fn url(&self, at: &Coordinates) -> Url {
        let domain = self.domain.clone().unwrap_or_else(|| at.domain.to_string());
        let mut url = data_url(&at.server, &domain);
        let mut query = url.query_pairs_mut();
        if !self.ids.is_empty() {
            query.append_pair("ids", &self.ids.join(","));
        }
        if let Some(name) = &self.name {
            query.append_pair("name", name);
        }
        if let Some(data_type) = &self.data_type {
            query.append_pair("data_type", data_type);
        }
        drop(query);
        url
    }
}

/// `{server}/api/v1/domains/{domain}/data`.
pub(crate) fn data_url(server: &Url, domain: &str) -> Url {
    api_url(server, &["domains", domain, "data"])
}

/// `{server}/api/v1/…`, for any number of slashes at the end of the server's URL.
pub(crate) fn api_url(server: &Url, segments: &[&str]) -> Url {
    let mut url = server.clone();
    url.set_query(None);
    url.set_fragment(None);
    let path = format!("{}/", url.path().trim_end_matches('/'));
    url.set_path(&path);
    let mut path = url.path_segments_mut().expect("coordinates hold http and https URLs, which have a path");
    path.pop_if_empty().extend(["api", "v1"]).extend(segments);
    drop(path);
    url
}

/// Reads an entry.
pub(crate) fn resolve(cid: &str, server: &Url) -> Result<Target, PortError> {
    let bad = |message: String| PortError::new(PortErrorKind::BadRequest, message);
    let cid = cid.trim();
    if cid.is_empty() {
        return Err(bad("the input id is empty; expected an id, a URL or a path".to_owned()));
    }
    let url = if cid.contains("://") {
        Url::parse(cid).map_err(|err| bad(format!("input {} is not a URL: {err}", for_message(cid))))?
    } else if cid.starts_with('/') {
        // A path that begins with two slashes names a host. The check below finds it.
        server.join(cid).map_err(|err| bad(format!("input {} is not a path: {err}", for_message(cid))))?
    } else {
        return Ok(Target { ids: vec![cid.to_owned()], ..Target::default() });
    };
    if url.origin() != server.origin() || url.host().is_none() {
        let (named, expected) = (url.origin().ascii_serialization(), server.origin().ascii_serialization());
        let named = if url.host().is_none() { for_message(cid) } else { named };
        return Err(bad(format!(
            "input names {named}, but the lease's domain server is {expected}; use its URL or an id"
        )));
    }
    let mut target = Target::default();
    for (key, value) in url.query_pairs() {
        match &*key {
            "ids" => target.ids.extend(value.split(',').map(str::trim).filter(|id| !id.is_empty()).map(str::to_owned)),
            "name" if target.name.is_none() && !value.is_empty() => target.name = Some(value.into_owned()),
            "data_type" if target.data_type.is_none() && !value.is_empty() => {
                target.data_type = Some(value.into_owned());
            }
            _ => {}
        }
    }
    let segments: Vec<String> = url.path_segments().into_iter().flatten().map(decoded).collect();
    let domains_at = segments.windows(3).position(|w| w[0] == "domains" && !w[1].is_empty() && w[2] == "data");
    if let Some(at) = domains_at {
        let domain = &segments[at + 1];
        // A segment that decodes to dots would change the path of the request.
        if matches!(domain.as_str(), "." | "..") {
            return Err(bad(format!("input {} names no domain", for_message(cid))));
        }
        target.domain = Some(domain.clone());
        if let Some(id) = segments.get(at + 3).filter(|id| !id.is_empty()) {
            target.ids = vec![id.clone()];
        }
    }
    if target.ids.is_empty() && target.name.is_none() && target.data_type.is_none() {
        return Err(bad(format!(
            "input {} names neither an id nor a filter, which would fetch a whole domain; \
             expected …/domains/<domain>/data/<id> or ?ids=, ?name=, ?data_type=",
            for_message(cid)
        )));
    }
    Ok(target)
}

/// A percent-decoded path segment. A plus sign in a path is literal.
fn decoded(segment: &str) -> String {
    let digit = |byte: Option<&u8>| byte.and_then(|byte| (*byte as char).to_digit(16));
    let bytes = segment.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        match (byte, digit(bytes.get(at + 1)), digit(bytes.get(at + 2))) {
            (b'%', Some(high), Some(low)) => {
                plain.push((high * 16 + low) as u8);
                at += 3;
            }
            _ => {
                plain.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn server() -> Url {
        Url::parse("https://ds.example/base//").expect("a URL")
    }

    /// The request for an entry, without the common part of all requests, or the refusal.
    fn request(cid: &str) -> String {
        match resolve(cid, &server()) {
            Ok(target) => {
                let url = target.url(&Coordinates { server: server(), domain: Uuid::nil() }).to_string();
                let url = url.replace("https://ds.example/base/api/v1/domains/", "");
                url.replace("00000000-0000-0000-0000-000000000000", "LEASE")
            }
            Err(err) => {
                assert_eq!(err.kind, PortErrorKind::BadRequest);
                err.message
            }
        }
    }

    #[test]
    fn each_form_of_entry_is_one_list_request() {
        for (cid, expected) in [
            ("  d-7\n", "LEASE/data?ids=d-7"),
            ("a b&c=d", "LEASE/data?ids=a+b%26c%3Dd"),
            ("refined/scan", "LEASE/data?ids=refined%2Fscan"),
            ("https://ds.example/api/v1/domains/dom/data/d-7", "dom/data?ids=d-7"),
            ("HTTPS://DS.example:443/api/v1/domains/dom/data/d-7?raw=true", "dom/data?ids=d-7"),
            ("https://ds.example/x/domains/dom/data/d%2F7?ids=a,b", "dom/data?ids=d%2F7"),
            ("/api/v1/domains/dom/data/d-7", "dom/data?ids=d-7"),
            ("/api/v1/domains/do%2Fm/data/d+7", "do%2Fm/data?ids=d%2B7"),
            ("/api/v1/domains/dom/data?ids=a,b&name=n%20m", "dom/data?ids=a%2Cb&name=n+m"),
            ("/api/v1/domains/dom/data/?data_type=ply&name=x&name=y&junk=1", "dom/data?name=x&data_type=ply"),
            ("/anything?ids=a", "LEASE/data?ids=a"),
            ("https://ds.example?name=a%26b", "LEASE/data?name=a%26b"),
        ] {
            assert_eq!(request(cid), expected, "{cid}");
        }
    }

    #[test]
    fn urls_of_other_servers_are_refused() {
        for (cid, named) in [
            ("https://evil.example/api/v1/domains/dom/data/d-7", "https://evil.example"),
            ("http://ds.example/api/v1/domains/dom/data/d-7", "http://ds.example"),
            ("https://ds.example:444/api/v1/domains/dom/data/d-7", "https://ds.example:444"),
            ("//evil.example/api/v1/domains/dom/data/d-7", "https://evil.example"),
            ("https://ds.example@evil.example/domains/dom/data/d-7", "https://evil.example"),
            ("file:///etc/passwd", "file:///etc/passwd"),
        ] {
            let refusal = request(cid);
            assert!(refusal.contains(named), "{cid}: {refusal}");
            assert!(refusal.contains("https://ds.example;"), "{cid}: {refusal}");
        }
    }

    #[test]
    fn entries_for_a_whole_domain_are_refused() {
        for cid in [
            "/",
            "https://ds.example",
            "https://ds.example/api/v1/domains/dom/data",
            "/api/v1/domains/dom/data/",
            "/api/v1/domains/dom/data?ids=,&name=",
        ] {
            assert!(request(cid).contains("neither an id nor a filter"), "{cid}");
        }
        assert!(request(" ").contains("empty"));
        assert!(request("http://").contains("not a URL"));
    }
}
