//! One input on its way, however often the connection breaks.
//!
//! [`Transfer`] passes on parts and their bytes, each byte once. It begins with the multipart
//! request every server of this wire answers (posemesh.md section 6.2). When that breaks, the part
//! under way is asked for alone, as raw content by id (posemesh.md sections 6.5, 10.5), from the byte it
//! stopped at. Whether those bytes belong to the same data is not believed but checked: by the
//! entity tag or the time of the last change where only the rest comes, by the SHA-256 of what was
//! passed on already where a server sends all of it again.
//!
//! That second half is in `resume`. Pauses and their end are [`super::retry`]'s; where bytes go is the caller's.

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
    retry::{Patience, passing},
};
use crate::{
    model::{Charge, Coordinates, Fetched, PortError, PortErrorKind},
    storage::{
        digest::{Digester, hex},
        file::BLOCK_BYTES,
        naming::shown,
    },
    transport::{
        self, innermost,
        multipart::{Parser, PartHead, PartsError, PartsEvent},
    },
};

/// How much may follow the closing delimiter before the connection is given up instead of reused.
const EPILOGUE_BYTES_MAX: usize = 64 * 1024;
/// How long it is waited for.
const EPILOGUE_WAIT: Duration = Duration::from_millis(200);

/// What a transfer may hold in memory: the same four blocks wait for disk and digest.
const TRANSFER_BYTES: u64 = 4 * BLOCK_BYTES as u64;

/// What has arrived.
pub(super) enum Arrived {
    /// A part begins.
    Part(PartHead),
    /// The next bytes of its body, never empty.
    Data(Bytes),
    /// It is complete and noted as fetched.
    PartEnd,
    /// There are no more parts.
    End,
}

/// See the module's text.
pub(super) struct Transfer {
    inner: Arc<Inner>,
    what: String,
    cid: String,
    at: Coordinates,
    target: Target,
    flow: Flow,
    /// The part under way.
    part: Option<Part>,
    /// Parts that were passed on whole.
    done: Vec<PartHead>,
    /// Whether raw content is worth asking for, and a range of it.
    raw: bool,
    ranges: bool,
    patience: Patience,
    /// What waits for disk and digest.
    _charge: Charge,
}

/// Where bytes come from at the moment.
enum Flow {
    /// Nowhere; the next step asks.
    Closed,
    Form {
        body: Incoming,
        parser: Box<Parser>,
        /// A part that was passed on before and came once more.
        again: bool,
    },
    Raw {
        body: Incoming,
    },
}

/// The part under way.
struct Part {
    head: PartHead,
    /// How much of it was passed on.
    at: u64,
    digester: Digester,
    /// Entity tag of its raw content, once a server has given a strong one.
    etag: Option<String>,
    skip: Option<Skip>,
}

/// Bytes that come once more.
struct Skip {
    left: u64,
    digest: Sha256,
}

/// Why a step did not succeed.
enum Trouble {
    /// Trying again will not help.
    Final(PortError),
    /// It may.
    Passing { err: PortError, asked: Option<Duration> },
}

impl From<PortError> for Trouble {
    fn from(err: PortError) -> Self {
        match err.kind {
            PortErrorKind::Network => Self::Passing { err, asked: None },
            _ => Self::Final(err),
        }
    }
}

impl Transfer {
    /// Asks for an input and waits for the head of its first part.
    pub(super) async fn begin(inner: &Arc<Inner>, cid: &str) -> Result<(Self, PartHead), PortError> {
        let at = inner.coordinates().await?;
        let target = resolve(cid, &at.server)?;
        let mut transfer = Self {
            inner: Arc::clone(inner),
            what: format!("download of input {}", shown(cid.trim())),
            cid: cid.to_owned(),
            at,
            target,
            flow: Flow::Closed,
            part: None,
            done: Vec::new(),
            raw: true,
            ranges: true,
            _charge: inner.config.budget.count(TRANSFER_BYTES),
            patience: Patience::new(inner.config.part_pause, inner.config.patience),
        };
        match transfer.next().await? {
            Arrived::Part(head) => Ok((transfer, head)),
            _ => {
                transfer.leave().await;
                Err(transfer.not_found())
            }
        }
    }

    /// What comes next. After [`Arrived::End`] there is nothing more to ask for.
    pub(super) async fn next(&mut self) -> Result<Arrived, PortError> {
        loop {
            match self.step().await {
                Ok(Some(arrived)) => {
                    self.patience.progress();
                    return Ok(arrived);
                }
                Ok(None) => {}
                Err(Trouble::Final(err)) => return Err(err),
                Err(Trouble::Passing { err, asked }) => {
                    self.flow = Flow::Closed;
                    self.patience.pause(err, asked).await?;
                }
            }
        }
    }

    /// Reads the little that may follow, so that the connection can be used again.
    pub(super) async fn leave(&mut self) {
        let (Flow::Form { body, .. } | Flow::Raw { body }) = &mut self.flow else { return };
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

    /// One thing that arrives, or a move that brings nothing yet.
    async fn step(&mut self) -> Result<Option<Arrived>, Trouble> {
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
                    // The part under way did not come once more: it was changed or removed.
                    Some(PartsEvent::End) if self.part.is_some() => Err(Trouble::Final(self.changed())),
                    Some(PartsEvent::End) => Ok(Some(Arrived::End)),
                    None => self.read().await,
                }
            }
            Flow::Raw { .. } => {
                let part = self.part.as_ref().expect("raw content is asked for a part under way");
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
    async fn read(&mut self) -> Result<Option<Arrived>, Trouble> {
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
                    Ok(None) => Err(self.broken("the answer ended before the part under way")),
                    Ok(Some(PartsEvent::Data(data))) => self.take(data).await,
                    Ok(Some(_)) => Ok(None),
                    Err(err) => Err(self.malformed(&err)),
                }
            }
            (None, _) => Err(self.broken("the answer ended before its last byte")),
        }
    }

    /// Passes bytes of the part under way on, unless they were passed on before.
    async fn take(&mut self, mut data: Bytes) -> Result<Option<Arrived>, Trouble> {
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
                return Err(Trouble::Final(self.changed()));
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

    /// The part under way is whole: notes its digest, and compares it where the server gave one.
    async fn end_part(&mut self) -> Result<Arrived, Trouble> {
        let mut part = self.part.take().expect("an end follows a head");
        if part.skip.as_ref().is_some_and(|skip| skip.left > 0) {
            return Err(Trouble::Final(self.changed()));
        }
        let digest = part.digester.so_far().await.map_err(|err| self.local(&err))?;
        if let Some(given) = part.head.sha256.filter(|given| *given != digest) {
            let (given, found) = (hex(&given), hex(&digest));
            let message = format!("{} failed: the server says its SHA-256 is {given}, found {found}", self.what);
            return Err(Trouble::Final(PortError::new(PortErrorKind::Malformed, message)));
        }
        let (cid, name) = (self.cid.trim().to_owned(), part.head.name.clone());
        self.inner.books().fetch(Fetched { cid, name, size: part.at, sha256: hex(&digest) });
        self.done.push(part.head);
        Ok(Arrived::PartEnd)
    }

    /// Asks: for what is left of the part under way, or for the parts that have not come.
    async fn connect(&mut self) -> Result<Option<Arrived>, Trouble> {
        let Some(part) = &mut self.part else { return self.ask(self.remaining()).await };
        part.skip = None;
        let id = part.head.id.clone();
        match (id, part.head.size) {
            // It broke behind the last byte.
            (_, Some(size)) if part.at == size => self.end_part().await.map(Some),
            (Some(id), Some(size)) if self.raw => self.ask_raw(&id, size).await,
            (Some(id), _) => {
                self.ask(Some(Target { domain: self.target.domain.clone(), ids: vec![id], ..Target::default() })).await
            }
            (None, _) => self.ask(self.remaining()).await,
        }
    }

    /// What of the target has not come; `None`: nothing is left. Parts that come once more are passed over.
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

    /// Asks for parts.
    async fn ask(&mut self, target: Option<Target>) -> Result<Option<Arrived>, Trouble> {
        let Some(target) = target else { return Ok(Some(Arrived::End)) };
        let mut call = Call::new(&self.what, Method::GET, target.url(&self.at));
        call.accept = "multipart/form-data";
        let response = match self.inner.exchange(&call).await? {
            response if response.status() == StatusCode::NOT_FOUND => {
                self.inner.excerpt(response).await; // read to the end, so that the connection can be used again
                return match (&self.part, self.done.is_empty()) {
                    (Some(_), _) => Err(Trouble::Final(self.changed())),
                    (None, true) => Err(Trouble::Final(self.not_found())),
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

    /// A part came while one is under way: it must be that one, from its beginning.
    fn same_part(&mut self, head: &PartHead) -> Result<Option<Arrived>, Trouble> {
        let changed = self.changed();
        let part = self.part.as_mut().expect("asked only with a part under way");
        if !same(&part.head, head) {
            return Err(Trouble::Final(changed));
        }
        part.skip = (part.at > 0).then(|| Skip { left: part.at, digest: Sha256::new() });
        Ok(None)
    }

    /// An answer that is no data.
    async fn refused(&self, response: Response<Incoming>) -> Trouble {
        let (status, asked) = (response.status(), transport::retry_after(response.headers()));
        let err = status_error(&self.what, status, &self.inner.excerpt(response).await);
        match passing(status) {
            true => Trouble::Passing { err, asked },
            false => Trouble::Final(err),
        }
    }

    fn broken(&self, why: &str) -> Trouble {
        let err = PortError::new(PortErrorKind::Network, format!("{} failed: {why}", self.what));
        Trouble::Passing { err, asked: None }
    }

    fn malformed(&self, err: &PartsError) -> Trouble {
        match err {
            PartsError::Truncated(_) => self.broken(&err.to_string()),
            // Something between the node and the server has answered, such as a gateway with a page of its own.
            PartsError::ContentType(_) => {
                let err = PortError::new(PortErrorKind::Malformed, format!("{} failed: {err}", self.what));
                Trouble::Passing { err, asked: None }
            }
            _ => Trouble::Final(PortError::new(PortErrorKind::Malformed, format!("{} failed: {err}", self.what))),
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

/// Whether two heads are of the same state of the same data.
fn same(one: &PartHead, other: &PartHead) -> bool {
    let times = match (&one.updated_at, &other.updated_at) {
        (Some(one), Some(other)) => same_time(one, other),
        (one, other) => one == other,
    };
    (&one.id, &one.name, &one.data_type, one.size) == (&other.id, &other.name, &other.data_type, other.size) && times
}

/// Whether two texts name one moment; servers do not write it the same everywhere.
fn same_time(one: &str, other: &str) -> bool {
    let read = |text: &str| text.parse::<Timestamp>().ok();
    one == other || read(one).is_some_and(|one| Some(one) == read(other))
}
