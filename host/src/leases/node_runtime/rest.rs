//! The REST half of the control plane: the node registers, shows that it lives, and leaves.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
    time::Duration,
};

use http::{Method, Request, StatusCode, header};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Serialize;
use url::Url;

use super::Config;
use crate::{
    leases::recent_tokens::RecentTokens,
    transport::{self, Answer, Client},
};

/// What is encoded in the id of the node, so that it is one segment of a path.
const IN_A_PATH: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
/// How long a call may take.
const LIMIT: Duration = Duration::from_secs(10);

/// What the node offers. It is sent when the node registers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Capacity {
    /// Tasks at once.
    pub slots: u32,
    /// Processors, as the operator writes them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    /// Memory, as the operator writes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Register<'a> {
    node_id: &'a str,
    metadata: &'a BTreeMap<String, String>,
    capacity: &'a Capacity,
}

#[derive(Serialize)]
struct Heartbeat {
    status: Status,
}

#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Status {
    pub(super) state: &'static str,
    pub(super) active_runs: usize,
    pub(super) available_slots: usize,
}

/// The result of a registration.
pub(super) enum Registered {
    Yes,
    /// The control plane may know the node already: its database refuses a second registration with a 500.
    Maybe(String),
}

/// Whether the control plane knows the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    Yes,
    No,
}

/// The calls.
pub(super) struct Rest {
    client: Client,
    base: String,
    /// The node in a path.
    node: String,
    register: Vec<u8>,
    tokens: Arc<RecentTokens>,
}

impl Rest {
    pub(super) fn new(config: &Config, client: Client, tokens: Arc<RecentTokens>) -> Self {
        let Config { control_plane_url, node_id, metadata, capacity, .. } = config;
        let metadata = with_scheduler_keys(metadata.clone());
        let register = Register { node_id, metadata: &metadata, capacity };
        Self {
            client,
            base: base(control_plane_url),
            node: utf8_percent_encode(node_id, IN_A_PATH).to_string(),
            register: serde_json::to_vec(&register).expect("texts and numbers are JSON"),
            tokens,
        }
    }

    pub(super) async fn register(&self) -> Result<Registered, String> {
        let path = format!("{}/v1/nodes:register", self.base);
        let answer = self.call(Method::POST, path, self.register.clone()).await?;
        let status = answer.status;
        if status == StatusCode::INTERNAL_SERVER_ERROR {
            return Ok(Registered::Maybe(self.problem(&answer)));
        }
        // A page of a gateway with status 200 is no registration.
        let is_page = answer.body.trim_ascii_start().starts_with(b"<");
        if status.is_success() && !is_page { Ok(Registered::Yes) } else { Err(self.problem(&answer)) }
    }

    pub(super) async fn heartbeat(&self, status: Status) -> Result<Known, String> {
        let body = serde_json::to_vec(&Heartbeat { status }).expect("texts and numbers are JSON");
        let answer = self.call(Method::POST, format!("{}/v1/nodes/{}:heartbeat", self.base, self.node), body).await?;
        match answer.status {
            StatusCode::NOT_FOUND => Ok(Known::No),
            status if status.is_success() => Ok(Known::Yes),
            _ => Err(self.problem(&answer)),
        }
    }

    /// Removes the node from the control plane.
    pub(super) async fn remove(&self) -> Result<(), String> {
        let answer = self.call(Method::DELETE, format!("{}/v1/nodes/{}", self.base, self.node), Vec::new()).await?;
        let gone = answer.status.is_success() || answer.status == StatusCode::NOT_FOUND;
        if gone { Ok(()) } else { Err(self.problem(&answer)) }
    }

    async fn call(&self, method: Method, url: String, body: Vec<u8>) -> Result<Answer, String> {
        let mut request = Request::builder().method(method).uri(url);
        if !body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request = request.body(transport::full(body)).map_err(|err| err.to_string())?;
        self.client.call(request, LIMIT).await.map_err(|err| err.to_string())
    }

    fn problem(&self, answer: &Answer) -> String {
        let (status, excerpt) = (answer.status.as_u16(), self.tokens.excerpt(&answer.body, &[]));
        if excerpt.is_empty() {
            format!("control plane answered {status}")
        } else {
            format!("control plane answered {status}: {excerpt}")
        }
    }
}

/// The URL without a slash at its end.
pub(super) fn base(url: &Url) -> String {
    url.as_str().trim_end_matches('/').to_owned()
}

/// The scheduler of the control plane compares these keys in lower case.
fn with_scheduler_keys(mut metadata: BTreeMap<String, String>) -> BTreeMap<String, String> {
    for key in ["region", "environment"] {
        let value = metadata.iter().find(|(name, _)| name.eq_ignore_ascii_case(key)).map(|(_, value)| value.clone());
        if let (Some(value), Entry::Vacant(entry)) = (value, metadata.entry(key.to_owned())) {
            entry.insert(value);
        }
    }
    metadata
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_id_is_one_path_segment() {
        let encoded = |id| utf8_percent_encode(id, IN_A_PATH).to_string();
        assert_eq!(encoded("w-07.lab_a~"), "w-07.lab_a~");
        assert_eq!(encoded("a/b:c é%"), "a%2Fb%3Ac%20%C3%A9%25");
    }

    #[test]
    fn scheduler_keys_are_added_in_lower_case() {
        let map = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
        };
        let sent = with_scheduler_keys(map(&[("Region", "a"), ("environment", "b"), ("Environment", "c")]));
        assert_eq!(sent, map(&[("Region", "a"), ("region", "a"), ("environment", "b"), ("Environment", "c")]));
    }
}
