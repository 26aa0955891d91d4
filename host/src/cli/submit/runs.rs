//! The Node Runtime control plane of a dev server as an author's client sees it (docs/protocols/node-runtime.md).
//! Inputs and results are inline. If an input is stored already, or the inputs are too large, both pass through the
//! domain server of the dev server, which gives the node a token. A run is shown to the rest of the command in the form
//! of a job with one task.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use http::{Method, Request, header};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::{
    Args,
    artifacts::{Artifact, Source},
    inputs::Input,
    notes::Notes,
    plane::{self, CALL_LIMIT, JSON, Plane, PlaneError, retrying},
};
use crate::{
    model::{Capability, InlineInputs, JSON_SUFFIX},
    transport::{Client, full, read_capped},
};

/// Most bytes of all inputs that are sent inline.
const INLINE_BYTES_MAX: u64 = 1 << 20;
/// The name of the metadata that names the domain server of a run.
const DOMAIN_SERVER: &str = "domain_server_url";
/// Largest description of a run that is read: its inputs, and a result of 4 MiB, both as JSON text.
const RUN_BYTES_MAX: usize = 32 * 1024 * 1024;

/// See the module documentation.
pub(super) struct RunPlane {
    client: Client,
    dev: String,
    /// The domain server of the dev server.
    store: Plane,
}

/// The fields of a run that are read.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Run {
    run_id: Uuid,
    status: String,
    attempts: u64,
    #[serde(default)]
    metadata: BTreeMap<String, String>,
    result: Option<BTreeMap<String, String>>,
    error_info: Option<ErrorInfo>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ErrorInfo {
    error_message: Option<String>,
}

impl RunPlane {
    /// The dev server that listens at `url`.
    pub(super) async fn of_dev(client: Client, url: &url::Url) -> Result<Self, PlaneError> {
        let store = Plane::of_dev(client.clone(), url, plane::NODE_RUNTIME).await?;
        let dev = store.dev().expect("it is the one of a dev server").to_owned();
        Ok(Self { client, dev, store })
    }

    /// Its domain server.
    pub(super) fn store(&self) -> &Plane {
        &self.store
    }

    /// Creates a run. A repeat after a lost answer creates no second one.
    pub(super) async fn create(&self, run: &Value, notes: &mut Notes) -> Result<Uuid, PlaneError> {
        let (key, run) = (Uuid::new_v4().to_string(), run.to_string());
        let create = async |_: &mut Notes| {
            let request = self.request(Method::POST, "").header("idempotency-key", &key);
            let request = request.header(header::CONTENT_TYPE, JSON).body(full(run.clone()));
            Ok(self.call(request.expect("a valid request"), "the run").await?.run_id)
        };
        retrying(notes, PlaneError::is_temporary, create).await
    }

    pub(super) async fn cancel(&self, id: Uuid, notes: &mut Notes) -> Result<(), PlaneError> {
        let cancel = async |_: &mut Notes| {
            let request = self.request(Method::POST, &format!("/{id}:cancel")).header(header::CONTENT_TYPE, JSON);
            let body = full(json!({ "reason": "cancelled with runner-host submit" }).to_string());
            self.call(request.body(body).expect("a valid request"), "the cancellation").await.map(drop)
        };
        retrying(notes, PlaneError::is_temporary, cancel).await
    }

    /// A run in the form of a job.
    pub(super) async fn job(&self, id: Uuid) -> Result<Value, PlaneError> {
        let request = self.request(Method::GET, &format!("/{id}")).body(full("")).expect("a valid request");
        Ok(as_job(self.call(request, "the question about the run").await?))
    }

    fn request(&self, method: Method, rest: &str) -> http::request::Builder {
        let request = Request::builder().method(method).uri(format!("{}/v1/runs{rest}", self.dev));
        request.header(header::ACCEPT, JSON).header(plane::CLIENT_ID, plane::CLIENT)
    }

    async fn call(&self, request: Request<crate::transport::Body>, what: &str) -> Result<Run, PlaneError> {
        let host = request.uri().host().unwrap_or_default().to_owned();
        let response = self.client.send(request, CALL_LIMIT).await?;
        let (head, body) = response.into_parts();
        let body = plane::in_time(&host, read_capped(body, RUN_BYTES_MAX, &host)).await?;
        if !head.status.is_success() {
            return Err(plane::refused(what, head.status, &head.headers, crate::transport::excerpt(&body)));
        }
        serde_json::from_slice(&body)
            .map_err(|_| plane::not_json(host, body.len(), "expected a description of the run"))
    }
}

/// Checks what this wire cannot take.
///
/// # Errors
/// One line about it.
pub(super) fn check(args: &Args, inputs: &[Input]) -> Result<(), String> {
    if !args.meta.is_object() {
        return Err("--meta: expected an object, because node-runtime has named parameters only".to_owned());
    }
    let mut names = HashSet::new();
    match args.inputs.iter().zip(inputs).find(|(_, input)| !names.insert(input.name())) {
        Some((argument, Input::File(_))) => {
            Err(format!("--input {}: another input has this file name; rename one of them", argument.display()))
        }
        Some((argument, Input::Stored(_))) => {
            Err(format!("--input {}: it is given twice, but inputs have different names here", argument.display()))
        }
        None => Ok(()),
    }
}

/// The body that creates a run of this capability, with these inputs by their names. If there is a `store`, they are
/// data of it.
pub(super) fn describe(
    args: &Args,
    capability: &Capability,
    store: Option<&Plane>,
    inputs: HashMap<String, String>,
) -> Value {
    let meta = args.meta.as_object().into_iter().flatten();
    let mut metadata: Map<String, Value> = meta.map(|(name, value)| as_text(name, value)).collect();
    metadata.insert("capability".to_owned(), capability.as_str().into());
    if let Some(store) = store {
        metadata.insert("domain_id".to_owned(), store.domain().to_string().into());
        metadata.insert(DOMAIN_SERVER.to_owned(), store.server().into());
    }
    json!({
        "agentId": capability.as_str(), "inputRef": inputs, "metadata": metadata, "maxAttempts": args.attempts,
        // The time of a run is not limited, as on other control planes.
        "budgets": { "maxTokens": 0, "maxDurationSeconds": 0 },
    })
}

/// The metadata of this wire are texts. The name says which of them are JSON.
fn as_text(name: &str, value: &Value) -> (String, Value) {
    match value {
        Value::String(_) => (name.to_owned(), value.clone()),
        value => (format!("{name}{JSON_SUFFIX}"), value.to_string().into()),
    }
}

/// The inputs by their names, if they can be sent inline: text as it is, other bytes as base64.
///
/// # Errors
/// One line about an input that cannot be read.
pub(super) fn inline<'a>(inputs: &'a [Input]) -> Result<Option<HashMap<String, String>>, String> {
    let file = |input: &'a Input| match input {
        Input::File(file) => Some(file),
        Input::Stored(_) => None,
    };
    let Some(files) = inputs.iter().map(file).collect::<Option<Vec<_>>>() else { return Ok(None) };
    let size = |file: &&PathBuf| std::fs::metadata(file).map_or(0, |data| data.len());
    if files.iter().map(size).sum::<u64>() > INLINE_BYTES_MAX {
        return Ok(None);
    }
    let mut values = HashMap::new();
    for (input, file) in inputs.iter().zip(files) {
        let bytes = std::fs::read(file).map_err(|err| format!("--input {}: {err}", file.display()))?;
        let (name, suffix) = (input.name(), InlineInputs::BASE64_SUFFIX);
        let (key, value) = match String::from_utf8(bytes) {
            Ok(text) if !name.ends_with(suffix) => (name, text),
            Ok(text) => (format!("{name}{suffix}"), BASE64.encode(text)),
            Err(err) => (format!("{name}{suffix}"), BASE64.encode(err.as_bytes())),
        };
        values.insert(key, value);
    }
    Ok(Some(values))
}

fn as_job(run: Run) -> Value {
    let status = match &*run.status {
        "pending" => "queued",
        "assigned" => "running",
        "cancelled" => "canceled",
        other => other,
    };
    let id = run.run_id;
    let reason = run.error_info.and_then(|info| info.error_message);
    json!({
        "job": { "id": id, "status": if status == "queued" { "pending" } else { status } },
        "tasks": [{ "id": id, "status": status, "attempts": run.attempts }],
        "tasks_summary": { status: 1 },
        "receipts": [{ "task_id": id, "meta": { "reason": reason } }],
        "result": run.result,
        "stored": run.metadata.contains_key(DOMAIN_SERVER),
    })
}

/// The artifacts in the result of a run.
pub(super) fn artifacts(job: &Value) -> Vec<Artifact> {
    let result = job["result"].as_object().into_iter().flatten();
    result
        .filter_map(|(key, value)| {
            let value = value.as_str()?;
            if job["stored"] == true {
                let source = Source::Domain(Some(value.to_owned()));
                return Some(Artifact { logical_path: key.clone(), source, path: None });
            }
            let decoded = key
                .strip_suffix(InlineInputs::BASE64_SUFFIX)
                .and_then(|path| Some((path.to_owned(), Bytes::from(BASE64.decode(value).ok()?))));
            let (logical_path, content) = decoded.unwrap_or_else(|| (key.clone(), value.to_owned().into()));
            Some(Artifact { logical_path, source: Source::Inline(content), path: None })
        })
        .collect()
}

/// Writes an inline artifact. The file appears only when it is complete.
pub(super) async fn store(content: Bytes, path: &Path) -> Result<(), PlaneError> {
    let to = path.to_owned();
    let write = move || -> std::io::Result<()> {
        let folder = to.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder)?;
        let mut file = plane::new_file(folder)?;
        std::io::Write::write_all(&mut file, &content)?;
        file.persist(&to).map(drop).map_err(|err| err.error)
    };
    let written = tokio::task::spawn_blocking(write).await.expect("storing a file does not panic");
    written.map_err(|err| PlaneError::file(path, &err))
}
