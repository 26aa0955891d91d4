//! Requests for the rest of a part by its id, and the check that it belongs to the same data.

use http::{Method, StatusCode, header};
use sha2::{Digest, Sha256};
use url::Url;

use super::{
    super::{calls::Call, cid::data_url, retry::transient, wire::MetadataJson},
    Arrived, Failure, Flow, Skip, Transfer, same_time,
};
use crate::{
    model::PortErrorKind,
    transport::multipart::{DIGEST_HEADERS, parse_digest},
};

impl Transfer {
    /// Requests the rest of the current part, or all of it if its identity cannot be checked.
    pub(super) async fn ask_raw(&mut self, id: &str, size: u64) -> Result<Option<Arrived>, Failure> {
        let part = self.part.as_ref().expect("called only with a current part");
        let (at, etag) = (part.at, part.etag.clone());
        let verifiable = etag.is_some() || part.head.updated_at.is_some();
        let ranged = at > 0 && self.ranges && verifiable;
        let mut url = self.by_id(id);
        url.query_pairs_mut().append_pair("raw", "true");
        let mut call = Call::new(&self.what, Method::GET, url);
        call.accept = "application/octet-stream";
        if ranged {
            call.headers.push((header::RANGE, format!("bytes={at}-")));
            call.headers.extend(etag.clone().map(|etag| (header::IF_RANGE, etag)));
        }
        let response = self.inner.exchange(&call).await?;
        let status = response.status();
        if transient(status) || status == StatusCode::UNAUTHORIZED {
            return Err(self.refused(response).await);
        }
        let text = |name| response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let found = text(header::ETAG).filter(|etag| !etag.starts_with("W/"));
        match status {
            StatusCode::PARTIAL_CONTENT if ranged => {
                if text(header::CONTENT_RANGE).as_deref() != Some(&format!("bytes {at}-{}/{size}", size - 1)) {
                    self.ranges = false; // another range; the whole part will show whether it changed
                    return Ok(None);
                }
                match self.identity(id, size, etag.as_deref(), found.as_deref()).await? {
                    Some(true) => {}
                    Some(false) => return Err(Failure::Final(self.changed())),
                    None => {
                        self.ranges = false;
                        return Ok(None);
                    }
                }
            }
            StatusCode::OK => {
                let length = text(header::CONTENT_LENGTH).and_then(|length| length.parse::<u64>().ok());
                if length.is_some_and(|length| length != size) {
                    return Err(Failure::Final(self.changed()));
                }
            }
            _ => {
                // Not every server has this request. The transfer falls back to the multipart request.
                self.inner.excerpt(response).await;
                self.raw = false;
                return Ok(None);
            }
        }
        let given = DIGEST_HEADERS.iter().filter(|name| status == StatusCode::OK || **name != "content-digest");
        let given =
            given.filter_map(|name| text(header::HeaderName::from_static(name))).find_map(|text| parse_digest(&text));
        let part = self.part.as_mut().expect("the current part is unchanged");
        part.etag = found;
        part.head.sha256 = part.head.sha256.or(given);
        part.skip = (status == StatusCode::OK && at > 0).then(|| Skip { left: at, digest: Sha256::new() });
        self.flow = Flow::Raw { body: response.into_body() };
        Ok(None)
    }

    /// Whether the rest belongs to the current part. `None`: unknown.
    async fn identity(
        &self,
        id: &str,
        size: u64,
        wanted: Option<&str>,
        found: Option<&str>,
    ) -> Result<Option<bool>, Failure> {
        if wanted.is_some() && found.is_some() {
            return Ok(Some(wanted == found));
        }
        let part = self.part.as_ref().expect("called only with a current part");
        let Some(updated) = &part.head.updated_at else { return Ok(None) };
        // Requested after the answer with the rest began, so that an earlier change shows here.
        let call = Call::new(&self.what, Method::GET, self.by_id(id));
        match self.inner.try_json::<MetadataJson>(&call).await {
            Ok(MetadataJson { size: Some(now), updated_at: Some(changed), .. }) => {
                Ok(Some(now == size && same_time(updated, &changed)))
            }
            Ok(_) => Ok(None),
            // Not every server has this request, and some answer with something else.
            Err(failed) if failed.err.kind == PortErrorKind::Malformed => Ok(None),
            Err(failed) if failed.transient => Err(Failure::Transient { err: failed.err, asked: None }),
            Err(_) => Ok(None),
        }
    }

    fn by_id(&self, id: &str) -> Url {
        let domain = self.target.domain.clone().unwrap_or_else(|| self.at.domain.to_string());
        let mut url = data_url(&self.at.server, &domain);
        url.path_segments_mut().expect("an http URL has a path").push(id);
        url
    }
}
