//! Sign-in and registration (posemesh.md sections 2.1 to 2.5, 2.8 and 2.9).

use std::sync::Arc;

use axum::{Extension, body::Body, extract::State, http::StatusCode};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::json;

use super::{Answer, IDENTITY_BYTES_MAX, Refusal, ok, read_json};
use crate::{
    dev::{
        Inner, calls,
        identity::{Denied, Entry, Peer},
        siwe,
    },
    model::Capability,
};

/// Maximum difference between the timestamp of a registration by URL and the current time, in seconds.
const TIMESTAMP_WINDOW: i64 = 300;
/// Maximum number of capabilities of one node (posemesh.md section 10.2).
const CAPABILITIES_MAX: usize = 100;

#[derive(Deserialize)]
struct NonceRequest {
    wallet: String,
}

/// `POST /internal/v1/auth/siwe/request`
pub(super) async fn nonce(State(server): State<Arc<Inner>>, body: Body) -> Answer {
    let request: NonceRequest = read_json(body, IDENTITY_BYTES_MAX).await?;
    let wallet = siwe::address_of(&request.wallet)
        .ok_or_else(|| Refusal::bad("wallet is not an address, expected 0x and 40 hex digits"))?;
    let now = server.now();
    let nonce = server.identity().nonce(&wallet, now);
    ok(&json!({
        "nonce": nonce, "domain": server.authority(), "uri": server.base, "version": "1", "chainId": 8453,
        "issuedAt": now,
    }))
}

#[derive(Deserialize)]
struct VerifyRequest {
    address: String,
    message: String,
    signature: String,
}

/// `POST /internal/v1/auth/siwe/verify`
pub(super) async fn verify(State(server): State<Arc<Inner>>, Extension(peer): Extension<Peer>, body: Body) -> Answer {
    let request: VerifyRequest = read_json(body, IDENTITY_BYTES_MAX).await?;
    let now = server.now();
    let wallet = signed_by(&server, &request.message, &request.signature, now)?;
    if siwe::address_of(&request.address).as_deref() != Some(&*wallet) {
        return Err(Refusal::new(StatusCode::UNAUTHORIZED, "address is not the one that signed the message"));
    }
    let (token, expires) = server.identity().login(&wallet, now).map_err(denied)?;
    peer.is(server.identity().id_of(&wallet));
    ok(&json!({ "access_token": token, "access_expires_at": expires }))
}

#[derive(Deserialize)]
struct RegisterRequest {
    message: String,
    signature: String,
    registration_credentials: String,
    capabilities: Vec<String>,
    version: String,
}

/// `POST /internal/v1/nodes/register-wallet`
pub(super) async fn register(State(server): State<Arc<Inner>>, Extension(peer): Extension<Peer>, body: Body) -> Answer {
    let request: RegisterRequest = read_json(body, IDENTITY_BYTES_MAX).await?;
    let now = server.now();
    let wallet = signed_by(&server, &request.message, &request.signature, now)?;
    credentials(&server, &[&request.registration_credentials])?;
    let capabilities = capabilities(request.capabilities, 1)?;
    let id = server.identity().id_of(&wallet);
    enter(&server, Entry { id, wallet: &wallet, version: &request.version, capabilities, url: None, peer: &peer })
}

#[derive(Deserialize)]
struct UrlRequest {
    url: String,
    version: String,
    registration_credentials: String,
    signature: String,
    timestamp: String,
    public_key: String,
    capabilities: Vec<String>,
}

/// `POST /internal/v1/nodes/register`: registration with a URL. The node is called back before this answers.
pub(super) async fn register_url(
    State(server): State<Arc<Inner>>,
    Extension(peer): Extension<Peer>,
    body: Body,
) -> Answer {
    let request: UrlRequest = read_json(body, IDENTITY_BYTES_MAX).await?;
    let unauthorized = |text: String| Refusal::new(StatusCode::UNAUTHORIZED, text);
    let wallet = siwe::url_signer(&request.url, &request.timestamp, &request.signature, &request.public_key);
    let wallet = wallet.map_err(unauthorized)?;
    let stamp: Timestamp = request.timestamp.parse().map_err(|_| Refusal::bad("timestamp is not an RFC 3339 time"))?;
    let age = server.now().duration_since(stamp).as_secs();
    if age.abs() > TIMESTAMP_WINDOW {
        let text = format!("timestamp is {age} s in the past, expected at most {TIMESTAMP_WINDOW} to either side");
        return Err(unauthorized(text));
    }
    // Nodes of the first version send the secret as Base64.
    let plain = BASE64.decode(&request.registration_credentials).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    credentials(&server, &[&request.registration_credentials, plain.as_deref().unwrap_or_default()])?;
    let capabilities = capabilities(request.capabilities, 0)?;
    let reached = |url: &str| calls::NodeUrl::parse(url).map_err(Refusal::bad);
    let url = reached(&request.url)?;
    let other = server.identity().other_url(&wallet, &request.url);
    if let Some(other) = other
        && reached(&other)?.healthy(&server).await.is_ok()
    {
        return Err(Refusal::new(StatusCode::CONFLICT, format!("a node with this identity is online at {other}")));
    }
    let id = server.identity().id_of(&wallet);
    if let Err(why) = url.call_back(&server, id).await {
        let text = format!("the node cannot be reached at its url: {why}");
        return Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, text));
    }
    let url = Some(request.url.as_str());
    enter(&server, Entry { id, wallet: &wallet, version: &request.version, capabilities, url, peer: &peer })
}

/// Compares the registration secret. A request may contain it in several encodings.
fn credentials(server: &Inner, found: &[&str]) -> Result<(), Refusal> {
    match &server.config.reg_secret {
        Some(secret) if !found.contains(&secret.as_str()) => {
            Err(Refusal::new(StatusCode::FORBIDDEN, "registration_credentials are not the ones of this dev server"))
        }
        _ => Ok(()),
    }
}

fn enter(server: &Inner, entry: Entry<'_>) -> Answer {
    if entry.version.trim().is_empty() {
        return Err(Refusal::bad("version is empty, expected a version such as 1.2.3"));
    }
    let now = server.now();
    let holds_leases = |node| server.plane().held(node, now) > 0;
    let node = server.identity().register(entry, holds_leases, now).map_err(denied)?;
    tracing::info!(event = "registration.accepted", wallet = %node.wallet, capabilities = node.capabilities.len(), "node registered");
    server.changed();
    ok(&json!({ "ok": true, "node_id": node.id }))
}

/// Returns the capabilities sorted and without duplicates. The error is one line that names the invalid capability.
fn capabilities(named: Vec<String>, least: usize) -> Result<Vec<Arc<str>>, Refusal> {
    if !(least..=CAPABILITIES_MAX).contains(&named.len()) {
        let found = named.len();
        return Err(Refusal::bad(format!("capabilities has {found} entries, expected {least} to {CAPABILITIES_MAX}")));
    }
    for name in &named {
        Capability::from_wire(name).map_err(|err| Refusal::bad(err.to_string()))?;
    }
    let mut names: Vec<Arc<str>> = named.into_iter().map(Arc::from).collect();
    names.sort();
    names.dedup();
    Ok(names)
}

/// Checks message and signature and consumes the nonce. Returns the wallet that signed.
fn signed_by(server: &Inner, text: &str, signature: &str, now: Timestamp) -> Result<String, Refusal> {
    let message = siwe::parse(text).map_err(Refusal::bad)?;
    if message.domain != server.authority() {
        return Err(Refusal::new(StatusCode::UNAUTHORIZED, "the message is for another domain"));
    }
    let signer = siwe::signer(text, signature).map_err(|err| Refusal::new(StatusCode::UNAUTHORIZED, err))?;
    if signer != message.address {
        return Err(Refusal::new(
            StatusCode::UNAUTHORIZED,
            "the signature is from another address than the message names",
        ));
    }
    server.identity().redeem(&message.nonce, &signer, now).map_err(denied)?;
    Ok(signer)
}

fn denied(denied: Denied) -> Refusal {
    match denied {
        Denied::Nonce => {
            Refusal::new(StatusCode::UNAUTHORIZED, "the nonce is unknown, used, expired or of another wallet")
        }
        Denied::NotRegistered => Refusal::new(StatusCode::FORBIDDEN, "the wallet is not registered"),
        Denied::Conflict => Refusal::new(StatusCode::CONFLICT, "another node with this identity is online"),
    }
}
