//! Artifacts: what they are called, what they replace, and the upload in one request.

use std::{fs::File, io, path::Path, sync::Arc};

use bytes::Bytes;
use http::Method;

use super::{Inner, calls::Call, cid::data_url, source::Source, uploads_in_parts::PartsUpload, wire::ListJson};
use crate::{
    model::{Artifact, ArtifactSpec, Coordinates, PortError, PortErrorKind},
    storage::naming::{data_type, distinct_name, logical_path, relative_path, shown, stored_name},
};

/// Up to here an artifact travels in one request, and a stream is held in memory until it is
/// known to be longer.
pub(super) const SINGLE_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// An artifact about to be stored.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) logical_path: String,
    pub(super) name: String,
    pub(super) data_type: String,
    /// Id the runner wants replaced.
    pub(super) existing: Option<String>,
    /// Size the runner promised.
    pub(super) size: Option<u64>,
    /// How errors begin.
    pub(super) what: String,
}

impl Plan {
    pub(super) fn check_size(&self, size: u64) -> Result<(), PortError> {
        match self.size {
            Some(promised) if promised != size => {
                let message = format!("{} refused: {promised} bytes were promised, {size} came", self.what);
                Err(PortError::new(PortErrorKind::BadRequest, message))
            }
            _ => Ok(()),
        }
    }
}

pub(super) async fn put_file(inner: &Arc<Inner>, spec: ArtifactSpec, path: &Path) -> Result<Option<String>, PortError> {
    let plan = Arc::new(inner.plan(spec)?);
    let (file, size) = open_file(path).await.map_err(|err| {
        let message = format!("{} failed: cannot read file {}: {err}", plan.what, path.display());
        PortError::new(PortErrorKind::Local, message)
    })?;
    plan.check_size(size)?;
    let source = Source::File { file, offset: 0, length: size };
    let at = inner.coordinates().await?;
    let existing = inner.existing(&at, &plan).await?;
    let single = size == 0 || (size <= SINGLE_BYTES_MAX && size <= inner.single_bytes_max(&at, &plan).await);
    let in_parts = match single {
        true => None,
        false => PartsUpload::begin(inner, &at, &plan, existing.as_deref(), Some(size)).await?,
    };
    let id = match in_parts {
        Some(upload) => upload.send_file(source).await?,
        None => inner.put_single(&at, &plan, existing.as_deref(), source).await?,
    };
    inner.record(&plan, &id);
    Ok(Some(id))
}

/// Opens a regular file and says how long it is.
async fn open_file(path: &Path) -> io::Result<(Arc<File>, u64)> {
    let path = path.to_owned();
    let opened = tokio::task::spawn_blocking(move || {
        // Asked before opening: opening a pipe would wait for its writer.
        if !std::fs::metadata(&path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "expected a regular file"));
        }
        let file = File::open(&path)?;
        let size = file.metadata()?.len();
        Ok((Arc::new(file), size))
    });
    opened.await.map_err(io::Error::other)?
}

impl Inner {
    /// Names an artifact and takes the name for its path.
    pub(super) fn plan(&self, spec: ArtifactSpec) -> Result<Plan, PortError> {
        let lease = &self.grant.lease;
        let relative = relative_path(&spec.path)?;
        let logical_path = logical_path(lease.outputs_prefix.as_deref(), &relative);
        let what = format!("upload of {}", shown(&logical_path));
        for (field, value) in [("name", &spec.name), ("data type", &spec.data_type), ("id", &spec.existing_id)] {
            if let Some(value) = value {
                check_header_text(&what, field, value)?;
            }
        }
        let explicit = spec.name.is_some();
        let data_type = spec.data_type.unwrap_or_else(|| data_type(&relative));
        let name = spec.name.unwrap_or_else(|| stored_name(&logical_path, lease.task));
        let mut key = (name, data_type);
        let mut books = self.books();
        // Two paths of one task may reduce to one name; the second gets another name instead of
        // replacing the first. What the runner names itself is its own business.
        if !explicit && books.names.get(&key).is_some_and(|path| *path != logical_path) {
            key.0 = distinct_name(&logical_path, lease.task);
        }
        books.names.entry(key.clone()).or_insert_with(|| logical_path.clone());
        let (name, data_type) = key;
        Ok(Plan { logical_path, name, data_type, existing: spec.existing_id, size: spec.size, what })
    }

    /// What an upload replaces: what the runner says, what this task stored at the path before,
    /// or what an earlier attempt stored under the same name.
    pub(super) async fn existing(&self, at: &Coordinates, plan: &Plan) -> Result<Option<String>, PortError> {
        let recorded = || self.books().published.get(&plan.logical_path).and_then(|artifact| artifact.id.clone());
        if let Some(id) = plan.existing.clone().or_else(recorded) {
            return Ok(Some(id));
        }
        let mut url = data_url(&at.server, &at.domain.to_string());
        url.query_pairs_mut().append_pair("name", &plan.name).append_pair("data_type", &plan.data_type);
        let what = format!("looking for an earlier {}", plan.logical_path);
        let list: ListJson = match self.json(&Call::new(&what, Method::GET, url)).await {
            Err(err) if err.kind == PortErrorKind::NotFound => return Ok(None),
            list => list?,
        };
        // Servers may match names partially.
        let same = list.data.into_iter().find(|entry| {
            entry.name.as_deref() == Some(&plan.name) && entry.data_type.as_deref() == Some(&plan.data_type)
        });
        match same {
            Some(found) => check_id(&plan.what, found.id).map(Some),
            None => Ok(None),
        }
    }

    /// The largest payload the server takes in one request, or no limit.
    pub(super) async fn single_bytes_max(&self, at: &Coordinates, plan: &Plan) -> u64 {
        // Boundary, part headers and line ends, generously.
        let around = 512 + plan.name.len() as u64 + plan.data_type.len() as u64;
        self.request_bytes_max(&at.server).await.map_or(u64::MAX, |limit| limit.saturating_sub(around))
    }

    /// Stores an artifact in one request.
    pub(super) async fn put_single(
        &self,
        at: &Coordinates,
        plan: &Plan,
        existing: Option<&str>,
        source: Source,
    ) -> Result<String, PortError> {
        // 128 random bits: no payload holds this boundary, nor can one be made to.
        let boundary = format!("part-{:032x}", rand::random::<u128>());
        let (method, given) = match existing {
            Some(id) => (Method::PUT, format!("id=\"{id}\"")),
            None => (Method::POST, format!("name=\"{}\"; data-type=\"{}\"", plan.name, plan.data_type)),
        };
        let head = format!(
            "--{boundary}\r\nContent-Type: application/octet-stream\r\n\
             Content-Disposition: form-data; {given}\r\n\r\n"
        );
        let tail = format!("\r\n--{boundary}--\r\n");
        let payload = vec![Bytes::from(head).into(), source, Bytes::from(tail).into()];
        let call = Call::new(&plan.what, method, data_url(&at.server, &at.domain.to_string()))
            .with(format!("multipart/form-data; boundary={boundary}"), payload);
        let answer: ListJson = self.json(&call).await?;
        match answer.data.into_iter().next() {
            Some(stored) => check_id(&plan.what, stored.id),
            None => {
                let message = format!("{} failed: the answer lists no data, expected one entry", plan.what);
                Err(PortError::new(PortErrorKind::Malformed, message))
            }
        }
    }

    /// Lists an artifact as published. The last one at a path is the one that counts.
    pub(super) fn record(&self, plan: &Plan, id: &str) {
        let artifact = Artifact {
            logical_path: plan.logical_path.clone(),
            name: plan.name.clone(),
            data_type: plan.data_type.clone(),
            id: Some(id.to_owned()),
            size: None,
            sha256: None,
        };
        tracing::debug!(path = %artifact.logical_path, data_id = id, "artifact published");
        self.books().published.insert(artifact.logical_path.clone(), artifact);
    }
}

/// Whether `value` may stand between quotes in a part's header.
fn check_header_text(what: &str, field: &str, value: &str) -> Result<(), PortError> {
    let why = if value.is_empty() {
        "is empty"
    } else if value.contains(|c: char| c.is_control() || matches!(c, '"' | '\\')) {
        "holds a control character, a quote or a backslash"
    } else {
        return Ok(());
    };
    let message = format!("{what} refused: the {field} {why}; use letters, digits, `-` and `_`");
    Err(PortError::new(PortErrorKind::BadRequest, message))
}

/// An id from the server, which later stands in a header.
pub(super) fn check_id(what: &str, id: String) -> Result<String, PortError> {
    match check_header_text(what, "id", &id) {
        Ok(()) => Ok(id),
        Err(_) => {
            Err(PortError::new(PortErrorKind::Malformed, format!("{what} failed: the answer holds an impossible id")))
        }
    }
}
