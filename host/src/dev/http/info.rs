//! What the dev server reports about itself. Any client may read the upload limits. Only clients on this machine may
//! read the rest.

use std::sync::Arc;

use axum::{
    extract::{RawQuery, State},
    http::{HeaderMap, StatusCode, header},
};
use serde_json::{Value, json};

use super::{Answer, Refusal, ok, pairs};
use crate::dev::{Inner, WireForm};

/// `GET /api/v1/info` (posemesh.md sections 6.6 and 10.6)
pub(super) async fn uploads(State(server): State<Arc<Inner>>) -> Answer {
    if server.form() == WireForm::Old {
        return Err(Refusal::new(StatusCode::NOT_FOUND, "no such path"));
    }
    let config = &server.config;
    ok(&json!({
        "upload": {
            "request_max_bytes": config.request_max_bytes,
            "domain_data_max_bytes": config.domain_data_max_bytes,
            "multipart": { "enabled": config.multipart, "part_size_bytes": config.part_size },
        },
    }))
}

/// `GET /dev/v1/world`: everything that `runner-host submit` needs, including a fresh grant.
pub(super) async fn description(State(server): State<Arc<Inner>>, headers: HeaderMap) -> Answer {
    from_this_machine(&headers)?;
    let now = server.now();
    let nodes: Vec<Value> = server
        .nodes_online()
        .into_iter()
        .map(|node| {
            json!({
                "id": node.id, "wallet": &*node.wallet, "version": &*node.version, "seen_at": node.seen_at,
                "capabilities": node.capabilities.iter().map(|name| &**name).collect::<Vec<_>>(),
                "leases": server.plane().held(node.id, now),
            })
        })
        .collect();
    ok(&json!({
        "dds": server.base, "dms": server.dms(), "domain_server": server.base, "domain_id": server.domain_id,
        "grant": server.grant(), "data_survives": server.config.data.is_some(), "nodes": nodes,
        "planes": server.config.wires.names(),
    }))
}

/// `GET /dev/v1/requests?since=N`: the journal from request number N.
pub(super) async fn requests(
    State(server): State<Arc<Inner>>,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Answer {
    from_this_machine(&headers)?;
    let query = pairs(query.as_deref());
    let since = query.iter().find(|(name, _)| name == "since").map_or(Ok(0), |(_, value)| value.parse());
    let since = since.map_err(|_| Refusal::bad("since is not a number"))?;
    let (next, requests) = server.journal().since(since);
    ok(&json!({ "next": next, "requests": requests }))
}

/// The answers contain a grant. The dev server listens on loopback only. A web page in a browser may still reach it
/// under another host name. The `Host` header of that request shows it.
pub(in crate::dev) fn from_this_machine(headers: &HeaderMap) -> Result<(), Refusal> {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let loopback = url::Url::parse(&format!("http://{host}")).ok().is_some_and(|url| match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost",
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        None => false,
    });
    if loopback { Ok(()) } else { Err(Refusal::new(StatusCode::FORBIDDEN, "send this request to a loopback address")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grant_is_given_only_to_loopback_hosts() {
        let is_allowed = |host: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, host.parse().expect("a header"));
            from_this_machine(&headers).is_ok()
        };
        assert!(is_allowed("127.0.0.1:8700") && is_allowed("localhost:1") && is_allowed("[::1]:8700"));
        assert!(!is_allowed("rebound.example:8700") && !is_allowed("") && !is_allowed("127.0.0.1.example"));
    }
}
