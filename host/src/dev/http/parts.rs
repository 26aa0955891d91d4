//! Uploads in parts (posemesh.md section 6.7).

use std::{
    fs,
    io::{Seek, SeekFrom},
    sync::Arc,
};

use axum::{
    body::Body,
    extract::{Path, RawQuery, State},
    http::{HeaderMap, StatusCode},
};
use http_body_util::BodyExt;
use serde::Deserialize;
use serde_json::json;

use super::{
    Answer, REPORT_BYTES_MAX, Refusal, blocking, data::metadata, drain, empty_object, ok, pairs, read_json,
    spool::Spool,
};
use crate::dev::{
    Inner, WireForm,
    store::StoreError,
    uploads::{ListedPart, Writing},
};

#[derive(Deserialize)]
struct Completion {
    parts: Vec<ListedPart>,
}

/// `POST …/data/multipart`: `?uploads` begins, `?uploadId=` completes.
pub(super) async fn post(
    State(server): State<Arc<Inner>>,
    Path(domain): Path<String>,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
    body: Body,
) -> Answer {
    server.caller(&headers, &domain)?;
    offered(&server)?;
    let query = pairs(query.as_deref());
    if query.iter().any(|(name, _)| name == "uploads") {
        let request = read_json(body, REPORT_BYTES_MAX).await?;
        let begun = server.store.initiate(request, server.now())?;
        return ok(&json!({
            "upload_id": begun.upload_id, "data_id": begun.data_id, "part_size": server.config.part_size,
            "expires_at": begun.expires,
        }));
    }
    let upload = upload_id(&query)?.to_owned();
    let request: Completion = read_json(body, REPORT_BYTES_MAX).await?;
    let (store, now) = (server.store.clone(), server.now());
    let item = blocking(move || store.complete_upload(&upload, &request.parts, now)).await?;
    server.changed();
    ok(&metadata(&item, server.domain_id))
}

/// `PUT …/data/multipart?uploadId=&partNumber=`
pub(super) async fn put(
    State(server): State<Arc<Inner>>,
    Path(domain): Path<String>,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
    mut body: Body,
) -> Answer {
    let begun = server.caller(&headers, &domain).and_then(|()| {
        offered(&server)?;
        let query = pairs(query.as_deref());
        let number = query.iter().find(|(name, _)| name == "partNumber").and_then(|(_, value)| value.parse().ok());
        let number = number.ok_or_else(|| Refusal::bad("partNumber is missing or not a number"))?;
        Ok(server.store.begin_part(upload_id(&query)?, number, server.now())?)
    });
    let written = match begun {
        Ok(writing) => write(&server, writing, &mut body).await,
        Err(refusal) => Err(refusal),
    };
    match written {
        Ok(etag) => ok(&json!({ "etag": etag })),
        Err(refusal) => {
            drain(body).await;
            Err(refusal)
        }
    }
}

/// Streams a part to its position in the upload's file.
async fn write(server: &Inner, writing: Writing, body: &mut Body) -> Result<String, Refusal> {
    let most = server.config.part_size;
    let (path, offset) = (writing.path.clone(), writing.offset);
    let open = move || {
        let mut file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        file.seek(SeekFrom::Start(offset))?;
        Ok(file)
    };
    let mut spool = Spool::new(blocking(open).await?, writing.write_lock.clone());
    let mut size = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| Refusal::bad("the part broke off"))?;
        let Ok(bytes) = frame.into_data() else { continue };
        size += bytes.len() as u64;
        if size > most {
            return Err(Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, format!("a part has at most {most} bytes")));
        }
        spool.push(bytes).await.map_err(StoreError::from)?;
    }
    if size == 0 {
        return Err(Refusal::bad("the part is empty"));
    }
    spool.flush().await.map_err(StoreError::from)?;
    Ok(writing.finish(size)?)
}

/// `DELETE …/data/multipart?uploadId=`
pub(super) async fn abort(
    State(server): State<Arc<Inner>>,
    Path(domain): Path<String>,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Answer {
    server.caller(&headers, &domain)?;
    let upload = upload_id(&pairs(query.as_deref()))?.to_owned();
    let (store, now) = (server.store.clone(), server.now());
    blocking(move || store.abort_upload(&upload, now)).await?;
    ok(&empty_object())
}

/// A server without multipart answers 404. Writers then fall back to one request.
fn offered(server: &Inner) -> Result<(), Refusal> {
    if server.config.multipart && server.form() == WireForm::New {
        Ok(())
    } else {
        Err(Refusal::new(StatusCode::NOT_FOUND, "no uploads in parts here"))
    }
}

fn upload_id(query: &[(String, String)]) -> Result<&str, Refusal> {
    let id = query.iter().find(|(name, _)| name == "uploadId").map(|(_, value)| &**value);
    id.ok_or_else(|| Refusal::bad("uploadId is missing"))
}
