//! Artifacts: their names, the data they replace, and the upload in one request (posemesh.md sections 6.4, 6.8,
//! 6.11, 6.12).

use std::{path::Path, sync::Arc};

use bytes::Bytes;
use http::Method;
use url::Url;

use super::{
    Inner, Published,
    calls::{Call, Failed},
    cid::data_url,
    source::Source,
    uploads_in_parts::PartsUpload,
    wire::{ListJson, MetadataJson},
};
use crate::{
    model::{Artifact, ArtifactSpec, Coordinates, PortError, PortErrorKind, holds_token},
    storage::{
        naming::{data_type, for_message, logical_path, marked_name, relative_path, stored_name},
        runner_file::RunnerFile,
    },
};

/// An artifact that will be stored.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) logical_path: String,
    pub(super) name: String,
    pub(super) data_type: String,
    /// Whether the name comes from the path, not from the runner.
    pub(super) inferred: bool,
    /// Id of the data that the runner wants to replace.
    pub(super) existing: Option<String>,
    /// Size that the runner promised.
    pub(super) size: Option<u64>,
    /// The beginning of errors.
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

    /// Name and type identify stored data.
    fn key(&self) -> (String, String) {
        (self.name.clone(), self.data_type.clone())
    }

    /// Compares the facts in the server's answer with what was sent.
    pub(super) fn check_stored(&self, stored: MetadataJson, size: u64, created: bool) -> Result<Stored, PortError> {
        let what = &self.what;
        let malformed = |message: String| Err(PortError::new(PortErrorKind::Malformed, message));
        let id = check_id(what, stored.id)?;
        match (stored.size, stored.name, stored.data_type) {
            (Some(stored), ..) if stored != size => {
                malformed(format!("{what} failed: {size} bytes were sent, the server stored {stored}"))
            }
            (_, Some(name), _) if created && name != self.name => {
                malformed(format!("{what} failed: the server stored it under the name {}", for_message(&name)))
            }
            (_, _, Some(data_type)) if created && data_type != self.data_type => {
                malformed(format!("{what} failed: the server stored it as the type {}", for_message(&data_type)))
            }
            _ => Ok(Stored { id, updated_at: stored.updated_at }),
        }
    }
}

/// Data on the server that an upload replaces.
#[derive(Clone, Debug)]
pub(super) struct Existing {
    pub(super) id: String,
    /// The time of its last change, as the server states it.
    pub(super) updated_at: Option<String>,
}

/// The result of an upload in one request.
pub(super) enum Whole {
    Stored(Stored),
    /// It is too large for one request. This upload in parts was begun instead.
    InParts(PartsUpload),
}

/// Data on the server that an upload made.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) id: String,
    pub(super) updated_at: Option<String>,
}

pub(super) async fn put_file(inner: &Arc<Inner>, spec: ArtifactSpec, path: &Path) -> Result<Option<String>, PortError> {
    let mut plan = inner.plan(spec)?;
    let file = RunnerFile::open(&plan.what, path, &inner.dir).await?;
    let size = file.size();
    plan.check_size(size)?;
    let source = Source::File { file: file.handle(), offset: 0, length: size };
    let at = inner.coordinates().await?;
    let existing = inner.existing(&at, &mut plan).await?;
    let limits = inner.limits(&at.server).await;
    limits.check(&plan, size)?;
    let plan = Arc::new(plan);
    let parts_first = limits.parts && size > limits.single_file_bytes_max(&plan);
    let begun = match parts_first {
        true => PartsUpload::begin(inner, &at, &plan, existing.as_ref(), Some(size)).await?,
        false => None,
    };
    let whole = match begun {
        Some(upload) => Whole::InParts(upload),
        None => inner.put_whole(&at, &plan, existing, source.clone(), !parts_first).await?,
    };
    let (stored, sha256) = match whole {
        // The upload is completed only if the file did not change during the transfer.
        Whole::InParts(upload) => upload.send_file(source, file).await?,
        Whole::Stored(stored) => (stored, file.digest(&plan.what).await?),
    };
    Ok(Some(inner.add_published(&plan, stored, size, sha256)))
}

impl Inner {
    /// Names an artifact and reserves the name for its path.
    pub(super) fn plan(&self, spec: ArtifactSpec) -> Result<Plan, PortError> {
        let lease = &self.held.lease;
        let relative = relative_path(&spec.path)?;
        let logical_path = logical_path(lease.outputs_prefix.as_deref(), &relative);
        // Paths and names are stored, listed and logged, so they must not contain a secret.
        let texts = [Some(&logical_path), spec.name.as_ref(), spec.data_type.as_ref()];
        if texts.into_iter().flatten().any(|text| holds_token(text, &self.held.tokens())) {
            let why = "the path, name or data type of an artifact contains the task's token; use one without it";
            return Err(PortError::new(PortErrorKind::InvalidPath, why.to_owned()));
        }
        let what = format!("upload of {}", for_message(&logical_path));
        for (field, value) in [("name", &spec.name), ("data type", &spec.data_type), ("id", &spec.existing_id)] {
            if let Some(value) = value {
                check_header_text(&what, field, value)?;
            }
        }
        let inferred = spec.name.is_none();
        let data_type = spec.data_type.unwrap_or_else(|| data_type(&relative));
        let name = spec.name.unwrap_or_else(|| stored_name(&logical_path, lease.task()));
        let mut plan =
            Plan { logical_path, name, data_type, inferred, existing: spec.existing_id, size: spec.size, what };
        let mut record = self.record();
        // Two paths of one task may reduce to one name. The second then gets another name, so that it does not
        // replace the first. Names that the runner gives are not changed.
        if inferred && record.names.get(&plan.key()).is_some_and(|path| *path != plan.logical_path) {
            plan.name = marked_name(&plan.logical_path, lease.task());
        }
        record.names.entry(plan.key()).or_insert_with(|| plan.logical_path.clone());
        Ok(plan)
    }

    /// The data that an upload replaces. The id from the runner has priority. The data that this task stored earlier at
    /// the path is second. The data of an earlier attempt with the same name is third.
    pub(super) async fn existing(&self, at: &Coordinates, plan: &mut Plan) -> Result<Option<Existing>, PortError> {
        if let Some(id) = plan.existing.clone() {
            return Ok(Some(Existing { id, updated_at: None }));
        }
        if let Some(Published { artifact, updated_at }) = self.record().published.get(&plan.logical_path)
            && let Some(id) = artifact.id.clone()
        {
            return Ok(Some(Existing { id, updated_at: updated_at.clone() }));
        }
        let found = self.find(at, plan).await?;
        let marked = marked_name(&plan.logical_path, self.held.lease.task());
        if found.is_none() || !plan.inferred || plan.name == marked {
            return Ok(found);
        }
        // An earlier attempt stored data under this name. If it also stored data under the marked name, the plain
        // name was for another path. Both paths then keep their names, whichever is stored first this time.
        let plain = std::mem::replace(&mut plan.name, marked);
        let own = self.find(at, plan).await?;
        let mut record = self.record();
        if own.is_none() {
            plan.name = plain;
            return Ok(found);
        }
        record.names.retain(|(name, _), path| *path != plan.logical_path || *name != plain);
        record.names.insert(plan.key(), plan.logical_path.clone());
        Ok(own)
    }

    /// The stored data with the plan's name and type.
    async fn find(&self, at: &Coordinates, plan: &Plan) -> Result<Option<Existing>, PortError> {
        let Some(found) = self.entry(at, plan).await? else { return Ok(None) };
        Ok(Some(Existing { id: check_id(&plan.what, found.id)?, updated_at: found.updated_at }))
    }

    async fn entry(&self, at: &Coordinates, plan: &Plan) -> Result<Option<MetadataJson>, PortError> {
        let mut url = data_url(&at.server, &at.domain.to_string());
        url.query_pairs_mut().append_pair("name", &plan.name).append_pair("data_type", &plan.data_type);
        // Servers may match names partially.
        let same = |entry: &MetadataJson| {
            entry.name.as_deref() == Some(&plan.name) && entry.data_type.as_deref() == Some(&plan.data_type)
        };
        Ok(self.list(plan, url).await?.into_iter().find(same))
    }

    /// The entries of a list. "Not found" is an empty list.
    async fn list(&self, plan: &Plan, url: Url) -> Result<Vec<MetadataJson>, PortError> {
        let what = format!("looking for an earlier {}", plan.logical_path);
        match self.json::<ListJson>(&Call::new(&what, Method::GET, url)).await {
            Err(err) if err.kind == PortErrorKind::NotFound => Ok(Vec::new()),
            list => Ok(list?.data),
        }
    }

    /// Looks for the result of an upload whose answer was lost: data of `size` bytes. `None`: it is not known whether
    /// the upload was done.
    pub(super) async fn happened(
        &self,
        at: &Coordinates,
        plan: &Plan,
        replaced: Option<&Existing>,
        size: u64,
    ) -> Result<Option<MetadataJson>, PortError> {
        let found = match replaced {
            Some(Existing { id, updated_at: Some(before) }) => {
                let mut url = data_url(&at.server, &at.domain.to_string());
                url.query_pairs_mut().append_pair("ids", id);
                let found = self.list(plan, url).await?.into_iter().find(|entry| entry.id == *id);
                found.filter(|entry| entry.updated_at.as_ref().is_some_and(|now| now != before))
            }
            // Without a time to compare, the old data cannot be distinguished from the new.
            Some(Existing { updated_at: None, .. }) => None,
            None => self.entry(at, plan).await?,
        };
        Ok(found.filter(|entry| entry.size == Some(size)))
    }

    /// Stores an artifact in one request. If the server refuses its size, an upload in parts is begun, if `try_parts`
    /// allows it.
    pub(super) async fn put_whole(
        self: &Arc<Self>,
        at: &Coordinates,
        plan: &Arc<Plan>,
        mut existing: Option<Existing>,
        source: Source,
        try_parts: bool,
    ) -> Result<Whole, PortError> {
        let size = source.length();
        let failed = match self.put_single(at, plan, &mut existing, source).await {
            Ok(stored) => return Ok(Whole::Stored(stored)),
            Err(failed) => failed,
        };
        if !(failed.too_large && try_parts && size > 0) {
            return Err(failed.err);
        }
        let begun = PartsUpload::begin(self, at, plan, existing.as_ref(), Some(size)).await?;
        begun.map(Whole::InParts).ok_or(failed.err)
    }

    /// Stores an artifact in one request, repeated after transient failures.
    ///
    /// A create whose answer was lost may have been done. Its data is then found by its name, and the repetition
    /// replaces that data, so that there is no duplicate.
    async fn put_single(
        &self,
        at: &Coordinates,
        plan: &Plan,
        existing: &mut Option<Existing>,
        source: Source,
    ) -> Result<Stored, Failed> {
        let size = source.length();
        let mut retries = self.retries();
        let mut in_doubt = false;
        loop {
            let call = single(at, plan, existing.as_ref(), source.clone());
            let mut failed = match self.try_json::<ListJson>(&call).await {
                Ok(list) => match list.data.into_iter().next() {
                    Some(stored) => return Ok(plan.check_stored(stored, size, existing.is_none())?),
                    None => {
                        let message = format!("{} failed: the answer lists no data, expected one entry", plan.what);
                        Failed::unknown_result(PortError::new(PortErrorKind::Malformed, message))
                    }
                },
                Err(failed) => failed,
            };
            let created = existing.is_none();
            // The conflict is with the data of an earlier try that the search did not show yet.
            failed.transient |= in_doubt && created && failed.err.kind == PortErrorKind::Conflict;
            if !failed.transient {
                return Err(failed);
            }
            failed.wait(&mut retries).await?;
            if created {
                in_doubt = true;
                *existing = self.find(at, plan).await?;
            }
        }
    }

    /// Lists an artifact as published and returns its id. At one path, the last artifact replaces the earlier ones.
    pub(super) fn add_published(&self, plan: &Plan, stored: Stored, size: u64, sha256: String) -> String {
        let Stored { id, updated_at } = stored;
        let artifact = Artifact {
            logical_path: plan.logical_path.clone(),
            name: plan.name.clone(),
            data_type: plan.data_type.clone(),
            id: Some(id.clone()),
            size: Some(size),
            sha256: Some(sha256.clone()),
        };
        tracing::debug!(path = %artifact.logical_path, data_id = id, "artifact published");
        let mut record = self.record();
        // A runner may give two paths one name. Both then refer to the data that is stored now.
        for other in record.published.values_mut().filter(|other| other.artifact.id.as_ref() == Some(&id)) {
            (other.artifact.size, other.artifact.sha256) = (Some(size), Some(sha256.clone()));
            other.updated_at.clone_from(&updated_at);
        }
        record.published.insert(artifact.logical_path.clone(), Published { artifact, updated_at });
        id
    }
}

/// A create, or an update of `existing`, in one request (posemesh.md section 6.4).
fn single<'a>(at: &Coordinates, plan: &'a Plan, existing: Option<&Existing>, source: Source) -> Call<'a> {
    // 128 random bits, so no payload contains this boundary, not even on purpose.
    let boundary = format!("part-{:032x}", rand::random::<u128>());
    let (method, given) = match existing {
        Some(Existing { id, .. }) => (Method::PUT, format!("id=\"{id}\"")),
        None => (Method::POST, format!("name=\"{}\"; data-type=\"{}\"", plan.name, plan.data_type)),
    };
    let head = format!(
        "--{boundary}\r\nContent-Type: application/octet-stream\r\n\
         Content-Disposition: form-data; {given}\r\n\r\n"
    );
    let tail = format!("\r\n--{boundary}--\r\n");
    let payload = vec![Bytes::from(head).into(), source, Bytes::from(tail).into()];
    Call::new(&plan.what, method, data_url(&at.server, &at.domain.to_string()))
        .with(format!("multipart/form-data; boundary={boundary}"), payload)
}

/// Checks that `value` can be quoted in a part's header.
fn check_header_text(what: &str, field: &str, value: &str) -> Result<(), PortError> {
    let why = if value.is_empty() {
        "is empty"
    } else if value.contains(|c: char| c.is_control() || matches!(c, '"' | '\\' | ';')) {
        // This wire has no escape for them. The name would be cut, or continue in the next header.
        "contains a control character, a quote, a backslash or a semicolon"
    } else {
        return Ok(());
    };
    let message = format!("{what} refused: the {field} {why}; use letters, digits, `-` and `_`");
    Err(PortError::new(PortErrorKind::BadRequest, message))
}

/// Checks an id from the server, because a later request has it in a header.
pub(super) fn check_id(what: &str, id: String) -> Result<String, PortError> {
    match check_header_text(what, "id", &id) {
        Ok(()) => Ok(id),
        Err(_) => {
            Err(PortError::new(PortErrorKind::Malformed, format!("{what} failed: the answer contains an invalid id")))
        }
    }
}
