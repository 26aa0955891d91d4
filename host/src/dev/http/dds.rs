//! Sign-in and registration (posemesh contract 2.1 to 2.5 and 2.8).

use std::sync::Arc;

use axum::{body::Body, extract::State, http::StatusCode};
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::json;

use super::{Answer, IDENTITY_BYTES_MAX, Refusal, ok, read_json};
use crate::{
    dev::{Inner, identity::Denied, siwe},
    model::Capability,
};

/// Most capabilities of one node (contract 10.2).
const CAPABILITIES_MAX: usize = 100;

#[derive(Deserialize)]
struct NonceRequest {
    wallet: String,
}

/// `POST /internal/v1/auth/siwe/request`
pub(super) async fn nonce(State(world): State<Arc<Inner>>, body: Body) -> Answer {
    let request: NonceRequest = read_json(body, IDENTITY_BYTES_MAX).await?;
    let wallet = siwe::address_of(&request.wallet)
        .ok_or_else(|| Refusal::bad("wallet is no address, expected 0x and 40 hex digits"))?;
    let now = world.now();
    let nonce = world.identity().nonce(&wallet, now);
    ok(&json!({
        "nonce": nonce, "domain": world.authority(), "uri": world.base, "version": "1", "chainId": 8453,
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
pub(super) async fn verify(State(world): State<Arc<Inner>>, body: Body) -> Answer {
    let request: VerifyRequest = read_json(body, IDENTITY_BYTES_MAX).await?;
    let now = world.now();
    let wallet = signed_by(&world, &request.message, &request.signature, now)?;
    if siwe::address_of(&request.address).as_deref() != Some(&*wallet) {
        return Err(Refusal::new(StatusCode::UNAUTHORIZED, "address is not the one that signed the message"));
    }
    let (token, expires) = world.identity().login(&wallet, now).map_err(denied)?;
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
pub(super) async fn register(State(world): State<Arc<Inner>>, body: Body) -> Answer {
    let request: RegisterRequest = read_json(body, IDENTITY_BYTES_MAX).await?;
    let now = world.now();
    let wallet = signed_by(&world, &request.message, &request.signature, now)?;
    if world.config.reg_secret.as_ref().is_some_and(|secret| *secret != request.registration_credentials) {
        return Err(Refusal::new(StatusCode::FORBIDDEN, "registration_credentials are not the ones of this world"));
    }
    if request.version.trim().is_empty() {
        return Err(Refusal::bad("version is empty, expected a version such as 1.2.3"));
    }
    let capabilities = capabilities(request.capabilities)?;
    let holds_leases = |node| world.plane().held(node, now) > 0;
    let registered = world.identity().register(&wallet, &request.version, capabilities, holds_leases, now);
    let node = registered.map_err(denied)?;
    tracing::info!(wallet = %wallet, capabilities = node.capabilities.len(), "node registered");
    world.changed();
    ok(&json!({ "ok": true, "node_id": node.id }))
}

/// Sorted and unique, or one line that says which one cannot be.
fn capabilities(named: Vec<String>) -> Result<Vec<Arc<str>>, Refusal> {
    if named.is_empty() || named.len() > CAPABILITIES_MAX {
        let found = named.len();
        return Err(Refusal::bad(format!("capabilities has {found} entries, expected 1 to {CAPABILITIES_MAX}")));
    }
    for name in &named {
        Capability::parse(name).map_err(|err| Refusal::bad(err.to_string()))?;
    }
    let mut names: Vec<Arc<str>> = named.into_iter().map(Arc::from).collect();
    names.sort();
    names.dedup();
    Ok(names)
}

/// Checks message and signature and uses the nonce up; the wallet that signed.
fn signed_by(world: &Inner, text: &str, signature: &str, now: Timestamp) -> Result<String, Refusal> {
    let message = siwe::parse(text).map_err(Refusal::bad)?;
    if message.domain != world.authority() {
        return Err(Refusal::new(StatusCode::UNAUTHORIZED, "the message is for another domain"));
    }
    let signer = siwe::signer(text, signature).map_err(|err| Refusal::new(StatusCode::UNAUTHORIZED, err))?;
    if signer != message.address {
        return Err(Refusal::new(StatusCode::UNAUTHORIZED, "the signature is of another address than the message"));
    }
    world.identity().redeem(&message.nonce, &signer, now).map_err(denied)?;
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
