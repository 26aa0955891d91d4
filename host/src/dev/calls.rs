//! Calls to nodes that registered with a URL (posemesh.md sections 2.7 and 2.9).
//!
//! The dev server calls a node back while it answers the registration. Later it requests the node's health at
//! intervals. It serves one machine, so it makes no call to another machine.

use std::{sync::Arc, time::Duration};

use http::{Request, header};
use serde_json::json;
use url::Url;
use uuid::Uuid;

use super::{Inner, siwe};
use crate::transport::{self, Client};

/// How long a node may take to answer.
const LIMIT: Duration = Duration::from_secs(5);
/// The `User-Agent` by which a node recognises the service (posemesh.md section 2.7).
const AGENT: &str = concat!("DDS v", env!("CARGO_PKG_VERSION"));

/// The URL of a node.
pub(super) struct NodeUrl(String);

impl NodeUrl {
    /// Parses a base URL. The error is one clause.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let url = Url::parse(text).map_err(|err| format!("url {text:?} is not a URL: {err}"))?;
        transport::Policy::default().check(&url).map_err(|err| format!("url: {err}"))?;
        if url.scheme() != "http" || url.query().is_some() || url.fragment().is_some() {
            return Err(format!("url {text:?}: the dev server calls http URLs on loopback only"));
        }
        Ok(Self(text.trim_end_matches('/').to_owned()))
    }

    /// Sends the node its id and secret.
    pub(super) async fn call_back(&self, server: &Inner, id: Uuid) -> Result<(), String> {
        // The prefix makes a leaked secret detectable in a log.
        let secret = format!("dev-callback-secret-{}", siwe::hex(&rand::random::<[u8; 32]>()));
        let body = json!({
            "id": id, "secret": secret, "organization_id": server.org, "lighthouses_in_domains": [], "domains": [],
        });
        let request = Request::post(format!("{}/internal/v1/registrations", self.0));
        let request = request.header(header::CONTENT_TYPE, "application/json").body(transport::full(body.to_string()));
        self.call(server, request).await
    }

    /// Succeeds if the node answers.
    pub(super) async fn healthy(&self, server: &Inner) -> Result<(), String> {
        self.call(server, Request::get(format!("{}/health", self.0)).body(transport::full(""))).await
    }

    async fn call(&self, server: &Inner, request: http::Result<Request<transport::Body>>) -> Result<(), String> {
        let mut request = request.map_err(|err| err.to_string())?;
        request.headers_mut().insert(header::USER_AGENT, header::HeaderValue::from_static(AGENT));
        let client = server.client.get_or_init(|| Client::new(transport::Config::default()));
        let answer = client.call_for_status(request, LIMIT).await.map_err(|err| err.to_string())?;
        if answer.status.is_success() { Ok(()) } else { Err(format!("it answered {}", answer.status)) }
    }
}

/// Requests the health of one node and records the answer.
pub(super) async fn probe(server: Arc<Inner>, url: Arc<str>) {
    let asked = match NodeUrl::parse(&url) {
        Ok(node) => node.healthy(&server).await,
        Err(why) => Err(why),
    };
    match asked {
        Ok(()) => tracing::debug!(url = %url, "node is healthy"),
        Err(why) => {
            tracing::warn!(event = "dev.node_silent", url = %url, error = %why, "node did not answer the health check")
        }
    }
    server.changed();
}
