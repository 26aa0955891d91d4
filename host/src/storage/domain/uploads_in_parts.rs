//! Uploads in parts: begin, send each part, complete (posemesh.md section 6.7). After any failure, and on drop,
//! the upload is aborted on the server. Only after a lost lease nothing is sent any more.

use std::{sync::Arc, time::Duration};

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use http::{Method, StatusCode};
use tokio::runtime::Handle;
use url::Url;

use super::{
    Inner,
    calls::Call,
    cid::data_url,
    source::Source,
    upload::{Existing, Plan, Stored},
    wire::{CompleteJson, EtagJson, InitiateJson, InitiatedJson, MetadataJson, PartJson},
};
use crate::{
    model::{Coordinates, PortError, PortErrorKind},
    storage::{naming::for_message, runner_file::RunnerFile},
};

/// Most parts of one upload, on any server (posemesh.md section 10.5).
const PARTS_MAX: u64 = 10_000;
/// Longest etag of a part, in bytes (posemesh.md section 10.5).
const ETAG_BYTES_MAX: usize = 1024;
/// Time limit of an abort with its repetitions. The end of the task waits for it.
const ABORT_LIMIT: Duration = Duration::from_secs(5);

/// An upload that the server has begun. On drop it is aborted, unless it is complete.
pub(super) struct PartsUpload {
    target: Arc<Target>,
    /// Bytes of every part except the last.
    pub(super) part_size: u64,
    running: FuturesUnordered<BoxFuture<'static, Result<PartJson, PortError>>>,
    sent: Vec<PartJson>,
    begun: u64,
    total: u64,
    /// Whether the upload may still exist on the server.
    open: bool,
}

/// The target of the parts of one upload.
struct Target {
    inner: Arc<Inner>,
    plan: Arc<Plan>,
    at: Coordinates,
    replaced: Option<Existing>,
    url: Url,
    id: String,
    runtime: Handle,
}

impl PartsUpload {
    /// Begins an upload. `None`: this server does not offer uploads in parts.
    ///
    /// If an answer was lost, a new upload is begun. The first one expires on the server.
    pub(super) async fn begin(
        inner: &Arc<Inner>,
        at: &Coordinates,
        plan: &Arc<Plan>,
        replaced: Option<&Existing>,
        size: Option<u64>,
    ) -> Result<Option<Self>, PortError> {
        let mut url = data_url(&at.server, &at.domain.to_string());
        url.path_segments_mut().expect("an http URL has a path").push("multipart");
        let mut begin = url.clone();
        begin.set_query(Some("uploads"));
        let (name, data_type) = (plan.name.as_str(), plan.data_type.as_str());
        let content_type = Some("application/octet-stream");
        let existing_id = replaced.map(|existing| existing.id.as_str());
        let json = InitiateJson { name, data_type, size, content_type, existing_id };
        let call = Call::new(&plan.what, Method::POST, begin).with_json(&json);
        let mut retries = inner.retries();
        let begun: InitiatedJson = loop {
            let failed = match inner.exchange(&call).await {
                Ok(response) if not_offered(response.status()) => {
                    inner.excerpt(response).await; // reads to the end, so that the connection can be reused
                    return Ok(None);
                }
                Ok(response) => match inner.accepted(&call, response).await {
                    Ok(response) => match inner.decode(&call, response).await {
                        Ok(begun) => break begun,
                        Err(failed) => failed,
                    },
                    Err(failed) => failed,
                },
                Err(err) => err.into(),
            };
            failed.wait(&mut retries).await?;
        };
        let target = Target {
            inner: Arc::clone(inner),
            plan: Arc::clone(plan),
            at: at.clone(),
            replaced: replaced.cloned(),
            url,
            id: begun.upload_id,
            runtime: Handle::current(),
        };
        let upload = Self {
            target: Arc::new(target),
            part_size: begun.part_size.as_u64().unwrap_or(0),
            running: FuturesUnordered::new(),
            sent: Vec::new(),
            begun: 0,
            total: 0,
            open: true,
        };
        if upload.part_size == 0 {
            let found = for_message(&begun.part_size.to_string());
            let message = format!("{} failed: part_size is {found}, expected a whole number above 0", plan.what);
            return upload.fail(PortError::new(PortErrorKind::Malformed, message)).await;
        }
        if let Some(parts) = size.map(|size| size.div_ceil(upload.part_size)).filter(|parts| *parts > PARTS_MAX) {
            let message = format!(
                "{} failed: part_size is {}, which makes {parts} parts of it; at most {PARTS_MAX} are allowed",
                plan.what, upload.part_size
            );
            return upload.fail(PortError::new(PortErrorKind::Malformed, message)).await;
        }
        Ok(Some(upload))
    }

    /// Sends a file, and completes the upload if the file did not change. Parts are read when they are sent. Returns
    /// the stored data and the file's digest.
    pub(super) async fn send_file(mut self, whole: Source, file: RunnerFile) -> Result<(Stored, String), PortError> {
        let sent = async {
            self.push_all(whole).await?;
            self.all_arrived().await
        };
        if let Err(err) = sent.await {
            return self.fail(err).await;
        }
        match file.digest(&self.target.plan.what).await {
            Ok(sha256) => Ok((self.complete().await?, sha256)),
            Err(err) => self.fail(err).await,
        }
    }

    /// Sends a source that cannot change, and completes the upload.
    pub(super) async fn send(mut self, whole: Source) -> Result<Stored, PortError> {
        match self.push_all(whole).await {
            Ok(()) => self.complete().await,
            Err(err) => self.fail(err).await,
        }
    }

    async fn push_all(&mut self, whole: Source) -> Result<(), PortError> {
        for part in split(whole, self.part_size) {
            self.push(part).await?;
        }
        Ok(())
    }

    /// Starts the next part when fewer than the allowed number are in transfer.
    pub(super) async fn push(&mut self, part: Source) -> Result<(), PortError> {
        while self.running.len() >= self.target.inner.config.parallel_parts.max(1) {
            self.arrived().await?;
        }
        if self.begun == PARTS_MAX {
            let what = &self.target.plan.what;
            let message = format!("{what} refused: it is longer than {PARTS_MAX} parts of {} bytes", self.part_size);
            return Err(PortError::new(PortErrorKind::Limit, message));
        }
        self.begun += 1;
        self.total += part.length();
        self.running.push(send_part(Arc::clone(&self.target), self.begun, part).boxed());
        Ok(())
    }

    /// Waits for the end of one part. Pends while none is in transfer. Safe to cancel.
    pub(super) async fn arrived(&mut self) -> Result<(), PortError> {
        match self.running.next().await {
            Some(sent) => {
                self.sent.push(sent?);
                Ok(())
            }
            None => std::future::pending().await,
        }
    }

    async fn all_arrived(&mut self) -> Result<(), PortError> {
        while !self.running.is_empty() {
            self.arrived().await?;
        }
        Ok(())
    }

    /// Waits for all parts and completes the upload.
    pub(super) async fn complete(mut self) -> Result<Stored, PortError> {
        if let Err(err) = self.all_arrived().await {
            return self.fail(err).await;
        }
        self.sent.sort_by_key(|part| part.part_number);
        let target = Arc::clone(&self.target);
        let (plan, replaced) = (&target.plan, target.replaced.as_ref());
        let call =
            Call::new(&plan.what, Method::POST, target.url_with(None)).with_json(&CompleteJson { parts: &self.sent });
        let mut retries = target.inner.retries();
        // Whether an earlier try may have succeeded, although its answer was lost.
        let mut in_doubt = false;
        let stored = loop {
            let failed = match target.inner.try_json::<MetadataJson>(&call).await {
                Ok(stored) => break stored,
                Err(failed) => failed,
            };
            let transient = failed.transient;
            let Err(err) = failed.wait(&mut retries).await else {
                in_doubt = true;
                continue;
            };
            // A complete upload no longer exists, so servers refuse the repetition. Then the stored data shows
            // whether it succeeded.
            if in_doubt || transient {
                match target.inner.happened(&target.at, plan, replaced, self.total).await {
                    Ok(Some(stored)) => break stored,
                    Ok(None) => {}
                    Err(search) => tracing::debug!(error = %search, "an upload's end stays unknown"),
                }
            }
            return self.fail(err).await;
        };
        self.open = false;
        plan.check_stored(stored, self.total, replaced.is_none())
    }

    /// Aborts the upload, waits for the abort, and returns `err`.
    pub(super) async fn fail<T>(mut self, err: PortError) -> Result<T, PortError> {
        if let Some(aborting) = self.abort() {
            // The runtime reports a panic of the abort. The caller needs the reason for the abort.
            let _ = aborting.await;
        }
        Err(err)
    }

    /// Stops the parts in transfer and aborts the upload on the server. A separate task does this, so that it happens
    /// even if no caller waits.
    fn abort(&mut self) -> Option<tokio::task::JoinHandle<()>> {
        if !std::mem::replace(&mut self.open, false) {
            return None;
        }
        self.running.clear();
        let target = Arc::clone(&self.target);
        let aborting = async move { target.abort().await };
        Some(self.target.inner.tracker.spawn_on(aborting, &self.target.runtime))
    }
}

impl Drop for PartsUpload {
    fn drop(&mut self) {
        self.abort();
    }
}

impl Target {
    /// The URL of this upload, or of one of its parts.
    fn url_with(&self, part: Option<u64>) -> Url {
        let mut url = self.url.clone();
        let mut query = url.query_pairs_mut();
        query.append_pair("uploadId", &self.id);
        if let Some(number) = part {
            query.append_pair("partNumber", &number.to_string());
        }
        drop(query);
        url
    }

    /// Aborts the upload on the server, unless the lease is lost. The node sends nothing for a lost lease, so the upload
    /// expires on the server.
    async fn abort(&self) {
        let call = Call::new("abort of an upload", Method::DELETE, self.url_with(None));
        let aborting = async {
            let mut retries = self.inner.retries();
            loop {
                let failed = match self.inner.exchange(&call).await {
                    // The upload no longer exists.
                    Ok(response) if response.status() == StatusCode::NOT_FOUND => return Ok::<(), PortError>(()),
                    Ok(response) => match self.inner.accepted(&call, response).await {
                        Ok(_) => return Ok(()),
                        Err(failed) => failed,
                    },
                    Err(err) => err.into(),
                };
                failed.wait(&mut retries).await?;
            }
        };
        let aborted = tokio::select! {
            biased;
            () = self.inner.held.lost() => return,
            aborted = tokio::time::timeout(ABORT_LIMIT, aborting) => aborted,
        };
        match aborted {
            Ok(Ok(())) => {}
            Ok(Err(err)) if err.kind == PortErrorKind::LeaseOver => {}
            Ok(Err(err)) => {
                tracing::warn!(event = "upload.not_aborted", error = %err, "upload could not be aborted, the server keeps it until it expires")
            }
            Err(_) => tracing::warn!(
                event = "upload.not_aborted",
                "upload could not be aborted in time, the server keeps it until it expires"
            ),
        }
    }
}

fn not_offered(status: StatusCode) -> bool {
    matches!(status, StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED)
}

/// Sends one part until it succeeds or fails permanently. Each try has the newest bearer.
async fn send_part(target: Arc<Target>, number: u64, part: Source) -> Result<PartJson, PortError> {
    let what = format!("{} (part {number})", target.plan.what);
    let call =
        Call::new(&what, Method::PUT, target.url_with(Some(number))).with("application/octet-stream", vec![part]);
    let EtagJson { etag } = target.inner.json(&call).await?;
    if etag.len() > ETAG_BYTES_MAX {
        let message = format!("{what} failed: the etag has {} bytes, expected at most {ETAG_BYTES_MAX}", etag.len());
        return Err(PortError::new(PortErrorKind::Malformed, message));
    }
    Ok(PartJson { part_number: number, etag })
}

/// Splits a source into parts. They are ranges: nothing is read or copied.
fn split(whole: Source, part_size: u64) -> impl Iterator<Item = Source> {
    let total = whole.length();
    (0..total.div_ceil(part_size)).map(move |n| {
        let at = n * part_size;
        let length = part_size.min(total - at);
        match &whole {
            Source::File { file, offset, .. } => Source::File { file: Arc::clone(file), offset: offset + at, length },
            // A range of bytes in memory fits in `usize`.
            Source::Memory(bytes) => bytes.slice(at as usize..(at + length) as usize).into(),
        }
    })
}
