//! Domain data: lists, downloads, single uploads (posemesh.md sections 6.2 to 6.5).

use std::{fmt::Write as _, sync::Arc};

use axum::{
    body::Body,
    extract::{Path, RawQuery, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{
    Answer, Refusal, blocking, drain, empty_object, ok, pairs,
    spool::{Spool, chunks},
};
use crate::{
    dev::{
        Inner,
        store::{Filter, Item, Staged, StoreError, Target, check_name},
        uploads::WriteLock,
    },
    transport::multipart::{Parser, PartHead, PartsError, PartsEvent},
};

/// The metadata of an item, as answers contain it.
pub(super) fn metadata(item: &Item, domain: Uuid) -> Value {
    json!({
        "id": item.id, "domain_id": domain, "name": item.name, "data_type": item.data_type, "size": item.size,
        "created_at": item.created_at, "updated_at": item.updated_at,
    })
}

/// `GET …/data`
pub(super) async fn find(
    State(server): State<Arc<Inner>>,
    Path(domain): Path<String>,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Answer {
    server.caller(&headers, &domain)?;
    let items = server.store.find(&filter(query.as_deref()));
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    if !accept.contains("multipart/form-data") {
        let data: Vec<Value> = items.iter().map(|item| metadata(item, server.domain_id)).collect();
        return ok(&json!({ "data": data }));
    }
    if items.is_empty() {
        return Err(Refusal::new(StatusCode::NOT_FOUND, "no data in this domain matches"));
    }
    Ok(download(&server, items))
}

fn filter(query: Option<&str>) -> Filter {
    let mut filter = Filter::default();
    for (name, value) in pairs(query) {
        match &*name {
            "ids" => {
                let ids = value.split(',').map(str::trim).filter(|id| !id.is_empty()).map(ToOwned::to_owned);
                filter.ids.get_or_insert_default().extend(ids);
            }
            "name" => filter.name = Some(value),
            "data_type" => filter.data_type = Some(value),
            _ => {}
        }
    }
    filter
}

/// All items in one multipart body. Each item is streamed from its file.
fn download(server: &Arc<Inner>, items: Vec<Item>) -> Response {
    let boundary = Uuid::new_v4().simple().to_string();
    let content_type = format!("multipart/form-data; boundary={boundary}");
    let closing = Bytes::from(format!("--{boundary}--\r\n"));
    let domain = server.domain_id;
    let server = server.clone();
    let parts = stream::iter(items).then(move |item| {
        let (server, boundary) = (server.clone(), boundary.clone());
        async move {
            // Reads the current item, because a download may take long. `size` must match the body.
            let (item, file) = match server.store.read(item.id).await {
                Ok(found) => found,
                // The item was deleted meanwhile. Its part was not announced, so it is left out.
                Err(StoreError::NoData(_)) => return Ok(stream::empty().boxed()),
                Err(err) => return Err(std::io::Error::other(err.to_string())),
            };
            let head = Bytes::from(part_head(&boundary, &item, domain));
            let content = chunks(file.into_std().await, 0, item.size);
            let whole = stream::iter([Ok(head)]).chain(content).chain(stream::iter([Ok(Bytes::from_static(b"\r\n"))]));
            Ok(whole.boxed())
        }
    });
    let body = parts.try_flatten().chain(stream::iter([Ok(closing)]));
    ([(header::CONTENT_TYPE, content_type)], Body::from_stream(body)).into_response()
}

/// Writes the head of a part (posemesh.md section 6.3). `size` determines where a body ends, and nothing is escaped.
fn part_head(boundary: &str, item: &Item, domain: Uuid) -> String {
    let mut head = format!("--{boundary}\r\nContent-Type: application/octet-stream\r\n");
    let _ = write!(
        head,
        "Content-Disposition: form-data; name=\"{}\"; data-type=\"{}\"; id=\"{}\"; domain-id=\"{domain}\"; size=\"{}\"; \
         created-at=\"{}\"; updated-at=\"{}\"\r\n\r\n",
        item.name, item.data_type, item.id, item.size, item.created_at, item.updated_at
    );
    head
}

/// `GET …/data/{id}`
pub(super) async fn by_id(
    State(server): State<Arc<Inner>>,
    Path((domain, id)): Path<(String, String)>,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Answer {
    server.caller(&headers, &domain)?;
    let id = data_id(&id)?;
    let raw = pairs(query.as_deref()).iter().any(|(name, value)| name == "raw" && value != "false" && value != "0");
    if !raw {
        let item = server.store.get(id).ok_or_else(|| StoreError::NoData(id.to_string()))?;
        return ok(&metadata(&item, server.domain_id));
    }
    let (item, file) = server.store.read(id).await?;
    // A replaced item has another time, and so another ETag.
    let etag = format!("\"{}-{}\"", item.id.simple(), item.updated_at.as_nanosecond());
    let (status, from, length) = match range(&headers, &etag, item.size) {
        Range::All => (StatusCode::OK, 0, item.size),
        Range::Some { from, to } => (StatusCode::PARTIAL_CONTENT, from, to + 1 - from),
        Range::None => (StatusCode::RANGE_NOT_SATISFIABLE, 0, 0),
    };
    let body = Body::from_stream(chunks(file.into_std().await, from, length));
    let mut response = Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, "application/octet-stream")
        .header(header::CONTENT_LENGTH, length)
        .header(header::ACCEPT_RANGES, "bytes")
        .header(header::ETAG, etag);
    if status == StatusCode::PARTIAL_CONTENT {
        let to = from + length - 1;
        response = response.header(header::CONTENT_RANGE, format!("bytes {from}-{to}/{}", item.size));
    } else if status == StatusCode::RANGE_NOT_SATISFIABLE {
        response = response.header(header::CONTENT_RANGE, format!("bytes */{}", item.size));
    }
    Ok(response.body(body).expect("these headers are valid"))
}

/// The requested range of an item.
#[derive(Debug, PartialEq, Eq)]
enum Range {
    All,
    /// First and last byte, inclusive.
    Some {
        from: u64,
        to: u64,
    },
    /// The range is outside the item.
    None,
}

/// Reads `Range` and `If-Range`. Several ranges, and an invalid value, select the whole item (RFC 9110).
fn range(headers: &HeaderMap, etag: &str, size: u64) -> Range {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    if text(header::IF_RANGE).is_some_and(|wanted| wanted != etag) {
        return Range::All;
    }
    let asked =
        text(header::RANGE).and_then(|range| range.strip_prefix("bytes=")).and_then(|range| range.split_once('-'));
    let Some((from, to)) = asked else { return Range::All };
    let (from, to) = match (from.parse::<u64>(), to.parse::<u64>()) {
        (Ok(from), Ok(to)) if from <= to => (from, to.min(size.saturating_sub(1))),
        (Ok(from), Err(_)) if to.is_empty() => (from, size.saturating_sub(1)),
        (Err(_), Ok(last)) if from.is_empty() => (size.saturating_sub(last), size.saturating_sub(1)),
        _ => return Range::All,
    };
    if from < size { Range::Some { from, to } } else { Range::None }
}

/// `DELETE …/data/{id}`
pub(super) async fn delete(
    State(server): State<Arc<Inner>>,
    Path((domain, id)): Path<(String, String)>,
    headers: HeaderMap,
) -> Answer {
    server.caller(&headers, &domain)?;
    let id = data_id(&id)?;
    let store = server.store.clone();
    blocking(move || store.delete(id)).await?;
    ok(&empty_object())
}

fn data_id(text: &str) -> Result<Uuid, StoreError> {
    Uuid::parse_str(text).map_err(|_| StoreError::NoData(text.chars().take(64).collect()))
}

/// `POST …/data`
pub(super) async fn create(
    State(server): State<Arc<Inner>>,
    Path(domain): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Answer {
    upload(server, &domain, &headers, body, Kind::Create).await
}

/// `PUT …/data`
pub(super) async fn replace(
    State(server): State<Arc<Inner>>,
    Path(domain): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Answer {
    upload(server, &domain, &headers, body, Kind::Replace).await
}

#[derive(Clone, Copy)]
enum Kind {
    Create,
    Replace,
}

async fn upload(server: Arc<Inner>, domain: &str, headers: &HeaderMap, mut body: Body, kind: Kind) -> Answer {
    let received = match server.caller(headers, domain) {
        Ok(()) => receive(&server, headers, &mut body, kind).await,
        Err(refusal) => Err(refusal),
    };
    let batch = match received {
        Ok(batch) => batch,
        Err(refusal) => {
            drain(body).await;
            return Err(refusal);
        }
    };
    let (store, now) = (server.store.clone(), server.now());
    let items = blocking(move || store.commit(batch, now)).await?;
    server.changed();
    let data: Vec<Value> = items.iter().map(|item| metadata(item, server.domain_id)).collect();
    ok(&json!({ "data": data }))
}

/// Streams every part to a staged blob.
async fn receive(
    server: &Inner,
    headers: &HeaderMap,
    body: &mut Body,
    kind: Kind,
) -> Result<Vec<(Target, u64, Staged)>, Refusal> {
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let malformed = |err: PartsError| Refusal::bad(err.to_string());
    let mut parser = Parser::new(content_type).map_err(malformed)?;
    let mut budget = Budget::new(server, headers)?;
    let mut batch: Vec<(Target, u64, Staged)> = Vec::new();
    let mut spool: Option<Spool> = None;
    let mut whole = false;
    while !whole {
        match body.frame().await {
            Some(frame) => {
                let frame = frame.map_err(|_| Refusal::bad("the body broke off"))?;
                let Ok(bytes) = frame.into_data() else { continue };
                budget.request(bytes.len())?;
                parser.feed(bytes);
            }
            None => {
                parser.end();
                whole = true;
            }
        }
        while let Some(event) = parser.next().map_err(malformed)? {
            match event {
                PartsEvent::Part(head) => {
                    let target = target(server, head, kind)?;
                    let staged = server.store.stage();
                    let path = staged.path().to_owned();
                    let file = blocking(move || Ok(std::fs::File::create(path)?)).await?;
                    spool = Some(Spool::new(file, WriteLock::default()));
                    batch.push((target, 0, staged));
                }
                PartsEvent::Data(data) => {
                    let (_, size, _) = batch.last_mut().expect("data follows a head");
                    *size += data.len() as u64;
                    budget.item(*size)?;
                    let spool = spool.as_mut().expect("data follows a head");
                    spool.push(data).await.map_err(StoreError::from)?;
                }
                PartsEvent::PartEnd => {
                    let mut spool = spool.take().expect("an end follows a head");
                    spool.flush().await.map_err(StoreError::from)?;
                }
                // Bytes after the closing delimiter are read and ignored.
                PartsEvent::End => {}
            }
        }
    }
    if batch.is_empty() {
        return Err(Refusal::bad("the body has no part, expected at least one"));
    }
    Ok(batch)
}

/// Checks a part before its bytes are read.
fn target(server: &Inner, head: PartHead, kind: Kind) -> Result<Target, Refusal> {
    match kind {
        Kind::Create => {
            let (name, data_type) = (head.name.unwrap_or_default(), head.data_type.unwrap_or_default());
            check_name("name", &name)?;
            check_name("data-type", &data_type)?;
            let taken = Filter { ids: None, name: Some(name.clone()), data_type: Some(data_type.clone()) };
            if !server.store.find(&taken).is_empty() {
                return Err(crate::dev::store::exists(&name, &data_type).into());
            }
            Ok(Target::New { name, data_type })
        }
        Kind::Replace => {
            let id =
                head.id.ok_or_else(|| Refusal::bad("a part has no id, expected the one of the data to replace"))?;
            let id = data_id(&id)?;
            server.store.get(id).ok_or_else(|| StoreError::NoData(id.to_string()))?;
            Ok(Target::Replace { id })
        }
    }
}

/// Enforces the announced limits.
struct Budget {
    request_max: u64,
    item_max: u64,
    received: u64,
}

impl Budget {
    fn new(server: &Inner, headers: &HeaderMap) -> Result<Self, Refusal> {
        let limit = |bytes: i64| u64::try_from(bytes).ok().filter(|bytes| *bytes > 0).unwrap_or(u64::MAX);
        let budget = Self {
            request_max: limit(server.config.request_max_bytes),
            item_max: limit(server.config.domain_data_max_bytes),
            received: 0,
        };
        let announced =
            headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        if announced.is_some_and(|length| length > budget.request_max) { Err(budget.too_large()) } else { Ok(budget) }
    }

    fn request(&mut self, bytes: usize) -> Result<(), Refusal> {
        self.received += bytes as u64;
        if self.received > self.request_max { Err(self.too_large()) } else { Ok(()) }
    }

    fn item(&self, size: u64) -> Result<(), Refusal> {
        let most = self.item_max;
        if size > most {
            return Err(StoreError::TooLarge(format!("at most {most} bytes are stored as one item")).into());
        }
        Ok(())
    }

    fn too_large(&self) -> Refusal {
        let most = self.request_max;
        StoreError::TooLarge(format!("a request may have {most} bytes; upload in parts")).into()
    }
}
