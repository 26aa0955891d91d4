//! The download of one input, resumed after broken connections.
//!
//! [`Transfer`] returns parts and their bytes, each byte once. It begins with the multipart request, which every
//! server of this wire answers (posemesh.md section 6.2). If the answer breaks off, it requests only the rest of
//! the current part, as raw content by id (posemesh.md sections 6.5, 10.5).
//!
//! It checks that the rest belongs to the same data. If the server sends only the rest, it compares the entity
//! tag or the time of the last change. If the server sends the whole part again, it compares the SHA-256 of the
//! bytes that were already returned.
//!
//! `resume` has the requests for a rest. [`super::retry`] has the pauses and the time limit.

mod resume;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Response, StatusCode, header};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use jiff::Timestamp;
use sha2::{Digest, Sha256};

use super::{
    Inner,
    calls::{Call, status_error},
    cid::{Target, resolve},
    retry::{Retries, transient},
};
use crate::{
    model::{Charge, Coordinates, Fetched, PortError, PortErrorKind},
    storage::{
        digest::{Digester, hex},
        file::BLOCK_BYTES,
        naming::for_message,
    },
    transport::{
        self, innermost,
        multipart::{Parser, PartHead, PartsError, PartsEvent},
    },
};

/// Most bytes after the closing delimiter. With more, the connection is closed instead of reused.
const EPILOGUE_BYTES_MAX: usize = 64 * 1024;
/// How long to wait for these bytes.
const EPILOGUE_WAIT: Duration = Duration::from_millis(200);

/// Most bytes of a transfer in memory: the same four blocks wait for disk and digest.
const TRANSFER_BYTES: u64 = 4 * BLOCK_BYTES as u64;

/// One step of a download.
pub(super) enum Arrived {
    /// A part begins.
    Part(PartHead),
    /// The next bytes of its body, never empty.
    Data(Bytes),
    /// The part is complete and listed as fetched.
    PartEnd,
    /// There are no more parts.
    End,
}

/// See the module documentation.
pub(super) struct Transfer {
    inner: Arc<Inner>,
    what: String,
    cid: String,
    at: Coordinates,
    target: Target,
    flow: Flow,
    /// The current part.
    part: Option<Part>,
    /// Parts that were returned completely.
    done: Vec<PartHead>,
    /// Whether to request raw content, and ranges of it. `false` after the server did not support it.
    raw: bool,
    ranges: bool,
    retries: Retries,
    /// For the bytes that wait for disk and digest.
    _charge: Charge,
}

/// The current source of bytes.
enum Flow {
    /// None. The next step sends a request.
    Closed,
    Form {
        body: Incoming,
        parser: Box<Parser>,
        /// The current part of the answer is a repetition of a complete one.
        again: bool,
    },
    Raw {
        body: Incoming,
    },
}

/// The part that is being returned.
struct Part {
    head: PartHead,
    /// Bytes that were returned.
    at: u64,
    digester: Digester,
    /// Entity tag of its raw content, if the server gave a strong one.
    etag: Option<String>,
    skip: Option<Skip>,
}

/// Bytes that the server sends again.
struct Skip {
    left: u64,
    digest: Sha256,
}

/// Why a step failed.
enum Failure {
    /// A repetition does not help.
    Final(PortError),
    /// A repetition may help.
    Transient { err: PortError, asked: Option<Duration> },
}

impl From<PortError> for Failure {
    fn from(err: PortError) -> Self {
        match err.kind {
            PortErrorKind::Network => Self::Transient { err, asked: None },
            _ => Self::Final(err),
        }
    }
}

impl Transfer {
    /// Requests an input and waits for the head of its first part.
    pub(super) async fn begin(inner: &Arc<Inner>, cid: &str) -> Result<(Self, PartHead), PortError> {
        let at = inner.coordinates().await?;
        let target = resolve(cid, &at.server)?;
        let mut transfer = Self {
            inner: Arc::clone(inner),
            what: format!("download of input {}", for_message(cid.trim())),
            cid: cid.to_owned(),
            at,
            target,
            flow: Flow::Closed,
            part: None,
            done: Vec::new(),
            raw: true,
            ranges: true,
            _charge: inner.config.budget.count(TRANSFER_BYTES),
            retries: Retries::new(inner.config.part_pause, inner.config.retry_limit),
        };
        match transfer.next().await? {
            Arrived::Part(head) => Ok((transfer, head)),
            _ => {
                transfer.read_to_end().await;
                Err(transfer.not_found())
            }
        }
    }

    /// The next step. Do not call it again after [`Arrived::End`].
    pub(super) async fn next(&mut self) -> Result<Arrived, PortError> {
        loop {
            match self.step().await {
                Ok(Some(arrived)) => {
                    self.retries.progress();
                    return Ok(arrived);
                }
                Ok(None) => {}
                Err(Failure::Final(err)) => return Err(err),
                Err(Failure::Transient { err, asked }) => {
                    self.flow = Flow::Closed;
                    self.retries.pause(err, asked).await?;
                }
            }
        }
    }

    /// Reads the bytes after the end, so that the connection can be reused.
    pub(super) async fn read_to_end(&mut self) {
        if let Flow::Form { body, .. } | Flow::Raw { body } = &mut self.flow {
            read_to_end(body).await;
        }
    }

    /// One step. `None`: nothing arrived yet.
    async fn step(&mut self) -> Result<Option<Arrived>, Failure> {
        match &mut self.flow {
            Flow::Closed => self.connect().await,
            Flow::Form { parser, again, .. } => {
                let event = match parser.next() {
                    Ok(event) => event,
                    Err(err) => return Err(self.malformed(&err)),
                };
                match event {
                    Some(PartsEvent::Part(head)) => {
                        *again = self.done.iter().any(|done| same(done, &head));
                        if *again {
                            return Ok(None);
                        }
                        if self.part.is_some() {
                            return self.same_part(&head);
                        }
                        let part = Part { head, at: 0, digester: Digester::new(), etag: None, skip: None };
                        let head = self.part.insert(part).head.clone();
                        Ok(Some(Arrived::Part(head)))
                    }
                    Some(PartsEvent::Data(_) | PartsEvent::PartEnd) if *again => Ok(None),
                    Some(PartsEvent::Data(data)) => self.take(data).await,
                    Some(PartsEvent::PartEnd) => self.end_part().await.map(Some),
                    // The answer lacks the current part, so it was changed or removed.
                    Some(PartsEvent::End) if self.part.is_some() => Err(Failure::Final(self.changed())),
                    Some(PartsEvent::End) => Ok(Some(Arrived::End)),
                    None => self.read().await,
                }
            }
            Flow::Raw { .. } => {
                let part = self.part.as_ref().expect("raw content is requested only with a current part");
                if part.skip.is_none() && Some(part.at) == part.head.size {
                    let ended = self.end_part().await?;
                    self.flow = Flow::Closed;
                    return Ok(Some(ended));
                }
                self.read().await
            }
        }
    }

    /// Waits for the next frame of the body.
    async fn read(&mut self) -> Result<Option<Arrived>, Failure> {
        let stall = self.inner.config.stall;
        let (Flow::Form { body, .. } | Flow::Raw { body }) = &mut self.flow else { return Ok(None) };
        let frame = match tokio::time::timeout(stall, body.frame()).await {
            Ok(frame) => frame,
            Err(_) => return Err(self.broken(&format!("nothing arrived for {stall:?}"))),
        };
        match (frame, &mut self.flow) {
            (Some(Ok(frame)), flow) => match (frame.into_data(), flow) {
                (Ok(data), Flow::Form { parser, .. }) => {
                    parser.feed(data);
                    Ok(None)
                }
                (Ok(data), _) if !data.is_empty() => self.take(data).await,
                _ => Ok(None),
            },
            (Some(Err(err)), _) => Err(self.broken(&format!("the answer broke off: {}", innermost(&err)))),
            (None, Flow::Form { parser, .. }) => {
                parser.end();
                match parser.next() {
                    // An answer without a single part.
                    Ok(None) if self.part.is_none() => Ok(Some(Arrived::End)),
                    Ok(None) => Err(self.broken("the answer ended before the current part")),
                    Ok(Some(PartsEvent::Data(data))) => self.take(data).await,
                    Ok(Some(_)) => Ok(None),
                    Err(err) => Err(self.malformed(&err)),
                }
            }
            (None, _) => Err(self.broken("the answer ended before its last byte")),
        }
    }

    /// Returns bytes of the current part, without those that were already returned.
    async fn take(&mut self, mut data: Bytes) -> Result<Option<Arrived>, Failure> {
        let part = self.part.as_mut().expect("bytes belong to a part");
        if let Some(skip) = &mut part.skip {
            let known = usize::try_from(skip.left).unwrap_or(usize::MAX).min(data.len());
            skip.digest.update(data.split_to(known));
            skip.left -= known as u64;
            if skip.left > 0 {
                return Ok(None);
            }
            let again: [u8; 32] = skip.digest.clone().finalize().into();
            part.skip = None;
            let passed_on = part.digester.so_far().await.map_err(|err| self.local(&err))?;
            if again != passed_on {
                return Err(Failure::Final(self.changed()));
            }
        }
        let part = self.part.as_mut().expect("bytes belong to a part");
        if data.is_empty() {
            return Ok(None);
        }
        part.at += data.len() as u64;
        if part.head.size.is_some_and(|size| part.at > size) {
            let size = part.head.size.unwrap_or_default();
            return Err(self.malformed(&PartsError::LongerThanSize(size)));
        }
        part.digester.push(data.clone()).await.map_err(|err| self.local(&err))?;
        Ok(Some(Arrived::Data(data)))
    }

    /// Ends the current part: compares its digest if the server gave one, and lists it as fetched.
    async fn end_part(&mut self) -> Result<Arrived, Failure> {
        let mut part = self.part.take().expect("an end follows a head");
        if part.skip.as_ref().is_some_and(|skip| skip.left > 0) {
            return Err(Failure::Final(self.changed()));
        }
        let digest = part.digester.so_far().await.map_err(|err| self.local(&err))?;
        if let Some(given) = part.head.sha256.filter(|given| *given != digest) {
            let (given, found) = (hex(&given), hex(&digest));
            let message = format!("{} failed: the server says its SHA-256 is {given}, found {found}", self.what);
            return Err(Failure::Final(PortError::new(PortErrorKind::Malformed, message)));
        }
        let (cid, name) = (self.cid.trim().to_owned(), part.head.name.clone());
        self.inner.record().add_fetched(Fetched { cid, name, size: part.at, sha256: hex(&digest) });
        self.done.push(part.head);
        Ok(Arrived::PartEnd)
    }

    /// Requests the rest of the current part, or the missing parts.
    async fn connect(&mut self) -> Result<Option<Arrived>, Failure> {
        let Some(part) = &mut self.part else { return self.ask(self.remaining()).await };
        part.skip = None;
        let id = part.head.id.clone();
        match (id, part.head.size) {
            // The connection broke after the last byte.
            (_, Some(size)) if part.at == size => self.end_part().await.map(Some),
            (Some(id), Some(size)) if self.raw => self.ask_raw(&id, size).await,
            (Some(id), _) => {
                self.ask(Some(Target { domain: self.target.domain.clone(), ids: vec![id], ..Target::default() })).await
            }
            (None, _) => self.ask(self.remaining()).await,
        }
    }

    /// The target without the ids that are complete. `None`: nothing is left. Repeated parts are skipped.
    fn remaining(&self) -> Option<Target> {
        let mut target = self.target.clone();
        if !target.ids.is_empty() {
            target.ids.retain(|id| !self.done.iter().any(|done| done.id.as_deref() == Some(id)));
            if target.ids.is_empty() {
                return None;
            }
        }
        Some(target)
    }

    /// Requests parts.
    async fn ask(&mut self, target: Option<Target>) -> Result<Option<Arrived>, Failure> {
        let Some(target) = target else { return Ok(Some(Arrived::End)) };
        let mut call = Call::new(&self.what, Method::GET, target.url(&self.at));
        call.accept = "multipart/form-data";
        let response = match self.inner.exchange(&call).await? {
            response if response.status() == StatusCode::NOT_FOUND => {
                self.inner.excerpt(response).await; // reads to the end, so that the connection can be reused
                return match (&self.part, self.done.is_empty()) {
                    (Some(_), _) => Err(Failure::Final(self.changed())),
                    (None, true) => Err(Failure::Final(self.not_found())),
                    (None, false) => Ok(Some(Arrived::End)),
                };
            }
            response if response.status().is_success() => response,
            response => return Err(self.refused(response).await),
        };
        let kind = response.headers().get(header::CONTENT_TYPE).map(|value| String::from_utf8_lossy(value.as_bytes()));
        match Parser::new(&kind.unwrap_or_default()) {
            Ok(parser) => {
                self.flow = Flow::Form { body: response.into_body(), parser: Box::new(parser), again: false };
                Ok(None)
            }
            Err(_) if response.status() == StatusCode::NO_CONTENT => Ok(Some(Arrived::End)),
            Err(err) => Err(self.malformed(&err)),
        }
    }

    /// The head of a part arrived while there is a current part. It must be the same part.
    fn same_part(&mut self, head: &PartHead) -> Result<Option<Arrived>, Failure> {
        let changed = self.changed();
        let part = self.part.as_mut().expect("called only with a current part");
        if !same(&part.head, head) {
            return Err(Failure::Final(changed));
        }
        part.skip = (part.at > 0).then(|| Skip { left: part.at, digest: Sha256::new() });
        Ok(None)
    }

    /// The failure for an answer without data.
    async fn refused(&self, response: Response<Incoming>) -> Failure {
        let (status, asked) = (response.status(), transport::retry_after(response.headers()));
        let err = status_error(&self.what, status, &self.inner.excerpt(response).await);
        match transient(status) {
            true => Failure::Transient { err, asked },
            false => Failure::Final(err),
        }
    }

    fn broken(&self, why: &str) -> Failure {
        let err = PortError::new(PortErrorKind::Network, format!("{} failed: {why}", self.what));
        Failure::Transient { err, asked: None }
    }

    fn malformed(&self, err: &PartsError) -> Failure {
        match err {
            PartsError::Truncated(_) => self.broken(&err.to_string()),
            // Something between the node and the server has answered, such as a gateway with its own page.
            PartsError::ContentType(_) => {
                let err = PortError::new(PortErrorKind::Malformed, format!("{} failed: {err}", self.what));
                Failure::Transient { err, asked: None }
            }
            _ => Failure::Final(PortError::new(PortErrorKind::Malformed, format!("{} failed: {err}", self.what))),
        }
    }

    fn changed(&self) -> PortError {
        let message = format!("{} failed: the data was changed on the server meanwhile", self.what);
        PortError::new(PortErrorKind::Network, message)
    }

    fn local(&self, err: &std::io::Error) -> PortError {
        PortError::new(PortErrorKind::Local, format!("{} failed: {err}", self.what))
    }

    fn not_found(&self) -> PortError {
        status_error(&self.what, StatusCode::NOT_FOUND, "no such data")
    }
}

/// Reads the bytes after the end of an answer, so that the connection can be reused.
pub(super) async fn read_to_end(body: &mut Incoming) {
    let mut left = EPILOGUE_BYTES_MAX;
    let rest = async {
        while let Some(Ok(frame)) = body.frame().await {
            let length = frame.data_ref().map_or(0, Bytes::len);
            if length > left {
                return;
            }
            left -= length;
        }
    };
    let _ = tokio::time::timeout(EPILOGUE_WAIT, rest).await;
}

/// Whether two heads describe the same state of the same data.
fn same(one: &PartHead, other: &PartHead) -> bool {
    let times = match (&one.updated_at, &other.updated_at) {
        (Some(one), Some(other)) => same_time(one, other),
        (one, other) => one == other,
    };
    (&one.id, &one.name, &one.data_type, one.size) == (&other.id, &other.name, &other.data_type, other.size) && times
}

/// Whether two texts name the same time. Servers write it in different forms.
fn same_time(one: &str, other: &str) -> bool {
    let read = |text: &str| text.parse::<Timestamp>().ok();
    one == other || read(one).is_some_and(|one| Some(one) == read(other))
}
