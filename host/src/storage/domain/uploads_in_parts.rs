//! Large artifacts: begun, sent part by part, completed. Whatever goes wrong, the server is told
//! once to forget the upload, also when it is simply dropped.

use std::{collections::VecDeque, sync::Arc};

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use http::{Method, StatusCode};
use tokio::runtime::Handle;
use url::Url;

use super::{
    Inner,
    calls::{Call, status_error},
    cid::data_url,
    source::Source,
    upload::{Plan, check_id},
    wire::{CompleteJson, EtagJson, InitiateJson, InitiatedJson, MetadataJson, PartJson},
};
use crate::model::{Coordinates, PortError, PortErrorKind, millis};

/// How often a part is tried.
const TRIES: u32 = 3;

/// An upload the server has begun. Dropped before it is completed, it is aborted.
pub(super) struct PartsUpload {
    target: Arc<Target>,
    /// Bytes of every part but the last.
    pub(super) part_size: u64,
    running: FuturesUnordered<BoxFuture<'static, Result<PartJson, PortError>>>,
    sent: Vec<PartJson>,
    begun: u32,
    total: u64,
    /// Whether the server may still hold it.
    open: bool,
}

/// Where the parts of one upload go.
struct Target {
    inner: Arc<Inner>,
    plan: Arc<Plan>,
    url: Url,
    id: String,
    runtime: Handle,
}

impl PartsUpload {
    /// Begins an upload. `None`: this server does not offer uploads in parts.
    pub(super) async fn begin(
        inner: &Arc<Inner>,
        at: &Coordinates,
        plan: &Arc<Plan>,
        existing: Option<&str>,
        size: Option<u64>,
    ) -> Result<Option<Self>, PortError> {
        let mut url = data_url(&at.server, &at.domain.to_string());
        url.path_segments_mut().expect("an http URL has a path").push("multipart");
        let mut begin = url.clone();
        begin.set_query(Some("uploads"));
        let (name, data_type) = (plan.name.as_str(), plan.data_type.as_str());
        let content_type = Some("application/octet-stream");
        let json = InitiateJson { name, data_type, size, content_type, existing_id: existing };
        let call = Call::new(&plan.what, Method::POST, begin).with_json(&json);
        let response = inner.exchange(&call).await?;
        match response.status() {
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED => {
                inner.excerpt(response).await; // read to the end, so that the connection can be used again
                return Ok(None);
            }
            status if !status.is_success() => {
                let excerpt = inner.excerpt(response).await;
                return Err(status_error(&plan.what, status, &excerpt));
            }
            _ => {}
        }
        let begun: InitiatedJson = inner.decode(&call, response).await?;
        let target = Target {
            inner: Arc::clone(inner),
            plan: Arc::clone(plan),
            url,
            id: begun.upload_id,
            runtime: Handle::current(),
        };
        let upload = Self {
            target: Arc::new(target),
            part_size: u64::try_from(begun.part_size).unwrap_or(0),
            running: FuturesUnordered::new(),
            sent: Vec::new(),
            begun: 0,
            total: 0,
            open: true,
        };
        if upload.part_size == 0 {
            let message = format!("{} failed: part_size is {}, expected more than 0", plan.what, begun.part_size);
            return upload.fail(PortError::new(PortErrorKind::Malformed, message)).await;
        }
        Ok(Some(upload))
    }

    /// Sends a file, its parts read as they are sent, and completes.
    pub(super) async fn send_file(mut self, whole: Source) -> Result<String, PortError> {
        let mut parts = split(whole, self.part_size);
        while let Some(part) = parts.pop_front() {
            if let Err(err) = self.push(part).await {
                return self.fail(err).await;
            }
        }
        self.complete().await
    }

    /// Starts the next part, after waiting until fewer than the allowed number are under way.
    pub(super) async fn push(&mut self, part: Source) -> Result<(), PortError> {
        while self.running.len() >= self.target.inner.config.parallel_parts.max(1) {
            self.arrived().await?;
        }
        self.begun += 1;
        self.total += part.length();
        self.running.push(send_part(Arc::clone(&self.target), self.begun, part).boxed());
        Ok(())
    }

    /// Waits for a part under way; pends while there is none. Dropping this future loses nothing.
    pub(super) async fn arrived(&mut self) -> Result<(), PortError> {
        match self.running.next().await {
            Some(sent) => {
                self.sent.push(sent?);
                Ok(())
            }
            None => std::future::pending().await,
        }
    }

    /// Waits for all parts and makes them one artifact; returns its id.
    pub(super) async fn complete(mut self) -> Result<String, PortError> {
        while !self.running.is_empty() {
            if let Err(err) = self.arrived().await {
                return self.fail(err).await;
            }
        }
        self.sent.sort_by_key(|part| part.part_number);
        let target = Arc::clone(&self.target);
        let call = Call::new(&target.plan.what, Method::POST, target.url_with(None))
            .with_json(&CompleteJson { parts: &self.sent });
        let stored: MetadataJson = match target.inner.json(&call).await {
            Ok(stored) => stored,
            Err(err) => return self.fail(err).await,
        };
        self.open = false;
        let what = &target.plan.what;
        match stored.size {
            Some(size) if size != self.total => {
                let message = format!("{what} failed: {} bytes were sent, the server stored {size}", self.total);
                Err(PortError::new(PortErrorKind::Malformed, message))
            }
            _ => check_id(what, stored.id),
        }
    }

    /// Aborts, waits for that, and returns the reason for it.
    pub(super) async fn fail<T>(mut self, err: PortError) -> Result<T, PortError> {
        if let Some(aborting) = self.abort() {
            // A panic in there was reported by the runtime; the reason for the abort is what counts.
            let _ = aborting.await;
        }
        Err(err)
    }

    /// Ends what is under way and has the server forget the upload, in a task of its own, so that
    /// it is done even if nobody waits.
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
    fn url_with(&self, part: Option<u32>) -> Url {
        let mut url = self.url.clone();
        let mut query = url.query_pairs_mut();
        query.append_pair("uploadId", &self.id);
        if let Some(number) = part {
            query.append_pair("partNumber", &number.to_string());
        }
        drop(query);
        url
    }

    async fn abort(&self) {
        let lost = self.inner.grant.lost();
        let call = Call::new("abort of an upload", Method::DELETE, self.url_with(None));
        let done = tokio::select! {
            biased;
            // The upload may already be somebody else's; the server's own expiry has to do.
            () = lost => return,
            done = self.inner.send(&call) => done,
        };
        if let Err(err) = done {
            tracing::debug!(error = %err, "an upload could not be aborted");
        }
    }
}

/// Sends one part, again if the network or the server failed, each time with the newest bearer.
async fn send_part(target: Arc<Target>, number: u32, part: Source) -> Result<PartJson, PortError> {
    let what = format!("{} (part {number})", target.plan.what);
    let mut tried = 0;
    loop {
        let call = Call::new(&what, Method::PUT, target.url_with(Some(number)))
            .with("application/octet-stream", vec![part.clone()]);
        tried += 1;
        match target.inner.json::<EtagJson>(&call).await {
            Ok(answer) => return Ok(PartJson { part_number: number, etag: answer.etag }),
            Err(err) if tried < TRIES && matches!(err.kind, PortErrorKind::Network | PortErrorKind::Server) => {
                let pause = target.inner.config.part_pause * tried;
                tracing::debug!(error = %err, retry_in_ms = millis(pause), "a part is sent again");
                tokio::time::sleep(pause).await;
            }
            Err(err) => return Err(err),
        }
    }
}

/// Cuts a source into parts. Only ranges are made; nothing is read or copied.
fn split(whole: Source, part_size: u64) -> VecDeque<Source> {
    let total = whole.length();
    let ranges = (0..total.div_ceil(part_size)).map(|n| {
        let at = n * part_size;
        (at, part_size.min(total - at))
    });
    match whole {
        Source::File { file, offset, .. } => {
            ranges.map(|(at, length)| Source::File { file: Arc::clone(&file), offset: offset + at, length }).collect()
        }
        // A range of bytes in memory fits the address space.
        Source::Memory(bytes) => {
            ranges.map(|(at, length)| bytes.slice(at as usize..(at + length) as usize).into()).collect()
        }
    }
}
