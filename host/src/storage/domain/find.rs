//! Queries of a domain's data.
//!
//! The answer of the server becomes lines of JSON while it arrives (posemesh.md section 6.2). If it breaks off, the
//! request is repeated, and the entries that were already taken are skipped. Their ids must be the same as before.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
};

use async_trait::async_trait;
use bytes::Bytes;
use http::{Method, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use sha2::{Digest, Sha256};

use super::{
    Inner,
    calls::{Call, Failed},
    cid::Target,
    list_parser::{ListError, ListParser, VALUE_BYTES_MAX},
    retry::Retries,
    transfer::read_to_end,
};
use crate::{
    model::{Charge, Coordinates, DataQuery, FoundData, InputMeta, InputStream, PortError, PortErrorKind},
    transport::innermost,
};

/// Most ids of one request (posemesh.md section 10.5).
const IDS_MAX: usize = 100;
/// A piece of the stream ends after so many bytes.
const PIECE_BYTES: usize = 64 * 1024;
/// The beginning of errors.
const WHAT: &str = "query of the domain's data";

pub(super) async fn find(inner: &Arc<Inner>, query: DataQuery) -> Result<Box<dyn InputStream>, PortError> {
    query.check()?;
    let mut search = Search {
        inner: Arc::clone(inner),
        at: inner.coordinates().await?,
        requests: split(query),
        answer: None,
        taken: Taken::default(),
        retries: inner.retries(),
        _charge: inner.config.budget.count((PIECE_BYTES + VALUE_BYTES_MAX) as u64),
    };
    // A refusal is the answer to this call, not to the first read.
    let first = search.next().await?;
    Ok(Box::new(Found { inner: Arc::clone(inner), meta: InputMeta::default(), first, state: Ok(search) }))
}

/// One query for each request.
fn split(query: DataQuery) -> VecDeque<DataQuery> {
    let Some(ids) = &query.ids else { return [query].into() };
    let mut known = HashSet::new();
    let distinct: Vec<String> =
        ids.iter().map(|id| id.trim().to_owned()).filter(|id| known.insert(id.clone())).collect();
    distinct.chunks(IDS_MAX).map(|ids| DataQuery { ids: Some(ids.to_vec()), ..query.clone() }).collect()
}

/// The lines as a stream.
struct Found {
    inner: Arc<Inner>,
    meta: InputMeta,
    first: Option<Bytes>,
    /// The error of the first failure. Every later call returns it, so that a failure never looks like an end.
    state: Result<Search, PortError>,
}

#[async_trait]
impl InputStream for Found {
    fn meta(&self) -> &InputMeta {
        &self.meta
    }

    async fn next(&mut self) -> Result<Option<Bytes>, PortError> {
        let (first, state) = (&mut self.first, &mut self.state);
        let next = async {
            if let Some(lines) = first.take() {
                return Ok(Some(lines));
            }
            let search = state.as_mut().map_err(|err| err.clone())?;
            let next = search.next().await;
            if let Err(err) = &next {
                *state = Err(err.clone());
            }
            next
        };
        self.inner.guarded(next).await
    }
}

/// The requests of a query, one after the other.
struct Search {
    inner: Arc<Inner>,
    at: Coordinates,
    /// The first one is in progress.
    requests: VecDeque<DataQuery>,
    answer: Option<Answer>,
    /// The entries of the current request.
    taken: Taken,
    retries: Retries,
    /// For the bytes of the piece and of the parser.
    _charge: Charge,
}

/// An answer that is being read.
struct Answer {
    body: Incoming,
    parser: ListParser,
    /// The entries that were taken from an earlier answer to the same request.
    skipped: Taken,
}

/// Entries in their order: how many, and a digest of their ids.
#[derive(Clone, Default)]
struct Taken {
    count: u64,
    ids: Sha256,
}

impl Taken {
    fn add(&mut self, id: &str) {
        self.count += 1;
        self.ids.update((id.len() as u64).to_le_bytes());
        self.ids.update(id);
    }

    fn same(&self, other: &Self) -> bool {
        self.ids.clone().finalize() == other.ids.clone().finalize()
    }
}

impl Search {
    /// The next lines, never empty. `None`: everything was found.
    async fn next(&mut self) -> Result<Option<Bytes>, PortError> {
        while let Some(query) = self.requests.front() {
            let step = match &mut self.answer {
                None => self.ask().await,
                Some(answer) => match lines(answer, query, &mut self.taken, &mut self.retries) {
                    Ok(lines) if !lines.is_empty() => return Ok(Some(lines.into())),
                    Ok(_) if answer.parser.is_complete() => {
                        self.end_request().await;
                        Ok(())
                    }
                    Ok(_) => self.read().await,
                    Err(failed) => Err(failed),
                },
            };
            if let Err(failed) = step {
                self.answer = None;
                failed.wait(&mut self.retries).await?;
            }
        }
        Ok(None)
    }

    /// Sends the current request.
    async fn ask(&mut self) -> Result<(), Failed> {
        let DataQuery { name, data_type, ids } = self.requests[0].clone();
        let target = Target { domain: None, ids: ids.unwrap_or_default(), name, data_type };
        let call = Call::new(WHAT, Method::GET, target.url(&self.at));
        let response = self.inner.exchange(&call).await?;
        let response = match self.inner.accepted(&call, response).await {
            Err(failed) if failed.err.kind == PortErrorKind::NotFound => None,
            accepted => Some(accepted?).filter(|response| response.status() != StatusCode::NO_CONTENT),
        };
        match response {
            Some(response) => {
                let body = response.into_body();
                self.answer = Some(Answer { body, parser: ListParser::default(), skipped: Taken::default() });
            }
            None if self.taken.count > 0 => return Err(changed()),
            None => self.end_request().await,
        }
        Ok(())
    }

    /// Waits for the next bytes of the answer.
    async fn read(&mut self) -> Result<(), Failed> {
        let Some(Answer { body, parser, .. }) = &mut self.answer else { return Ok(()) };
        let stall = self.inner.config.stall;
        match tokio::time::timeout(stall, body.frame()).await {
            Ok(Some(Ok(frame))) => {
                if let Ok(data) = frame.into_data() {
                    parser.feed(&data);
                }
                Ok(())
            }
            Ok(None) => {
                parser.end();
                Ok(())
            }
            Ok(Some(Err(err))) => Err(broken(format!("the answer broke off: {}", innermost(&err)))),
            Err(_) => Err(broken(format!("nothing arrived for {stall:?}"))),
        }
    }

    /// Goes on with the next request.
    async fn end_request(&mut self) {
        if let Some(mut answer) = self.answer.take() {
            read_to_end(&mut answer.body).await;
        }
        self.taken = Taken::default();
        self.requests.pop_front();
    }
}

/// The lines of the entries that have arrived, up to the size of a piece.
fn lines(answer: &mut Answer, query: &DataQuery, taken: &mut Taken, retries: &mut Retries) -> Result<Vec<u8>, Failed> {
    let mut lines = Vec::new();
    while lines.len() < PIECE_BYTES {
        let entry = match answer.parser.next() {
            Ok(Some(entry)) => FoundData::from(entry),
            Ok(None) => break,
            // The parser returns the error again. The lines go first, because their entries count as taken.
            Err(_) if !lines.is_empty() => break,
            Err(err @ ListError::Truncated) => return Err(broken(err.to_string())),
            // Something between the node and the server may have answered.
            Err(err) => {
                let err = PortError::new(PortErrorKind::Malformed, format!("{WHAT} failed: {err}"));
                return Err(Failed::unknown_result(err));
            }
        };
        if answer.skipped.count < taken.count {
            answer.skipped.add(&entry.id);
            if answer.skipped.count == taken.count && !answer.skipped.same(taken) {
                return Err(changed());
            }
            continue;
        }
        taken.add(&entry.id);
        answer.skipped.count += 1;
        retries.progress();
        // Servers may match names partially.
        if query.matches(&entry) {
            entry.write_line(&mut lines);
        }
    }
    if lines.is_empty() && answer.parser.is_complete() && answer.skipped.count < taken.count {
        return Err(changed());
    }
    Ok(lines)
}

fn broken(why: String) -> Failed {
    PortError::new(PortErrorKind::Network, format!("{WHAT} failed: {why}")).into()
}

/// A repeated request had another answer.
fn changed() -> Failed {
    let message = format!("{WHAT} failed: the data was changed on the server meanwhile; query it again");
    Failed::permanent(PortError::new(PortErrorKind::Network, message))
}
