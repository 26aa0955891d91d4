//! The used part of the domain server's JSON. Unknown fields are ignored.

use serde::{Deserialize, Serialize};

use crate::model::FoundData;

/// An entry of a list, or the result of an upload.
#[derive(Debug, Deserialize)]
pub(super) struct MetadataJson {
    pub(super) id: String,
    #[serde(default)]
    pub(super) name: Option<String>,
    #[serde(default)]
    pub(super) data_type: Option<String>,
    #[serde(default)]
    pub(super) size: Option<u64>,
    #[serde(default)]
    pub(super) domain_id: Option<String>,
    #[serde(default)]
    pub(super) created_at: Option<String>,
    /// Only compared, never parsed.
    #[serde(default)]
    pub(super) updated_at: Option<String>,
}

impl From<MetadataJson> for FoundData {
    fn from(entry: MetadataJson) -> Self {
        let MetadataJson { id, name, data_type, size, domain_id, created_at, updated_at } = entry;
        Self { id, name, data_type, size, domain_id, created_at, updated_at }
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct ListJson {
    pub(super) data: Vec<MetadataJson>,
}

#[derive(Debug, Serialize)]
pub(super) struct InitiateJson<'a> {
    pub(super) name: &'a str,
    pub(super) data_type: &'a str,
    pub(super) size: Option<u64>,
    pub(super) content_type: Option<&'a str>,
    pub(super) existing_id: Option<&'a str>,
}

#[derive(Debug, Deserialize)]
pub(super) struct InitiatedJson {
    pub(super) upload_id: String,
    /// Expected to be a number above 0. Any value is decoded, because an abort needs the id.
    #[serde(default)]
    pub(super) part_size: serde_json::Value,
}

#[derive(Debug, Deserialize)]
pub(super) struct EtagJson {
    pub(super) etag: String,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct PartJson {
    pub(super) part_number: u64,
    pub(super) etag: String,
}

#[derive(Debug, Serialize)]
pub(super) struct CompleteJson<'a> {
    pub(super) parts: &'a [PartJson],
}

#[derive(Debug, Deserialize)]
pub(super) struct InfoJson {
    pub(super) upload: UploadInfoJson,
}

/// Older servers send only the first field and whether there are uploads in parts (posemesh.md sections 6.6
/// and 10.5).
#[derive(Debug, Deserialize)]
pub(super) struct UploadInfoJson {
    pub(super) request_max_bytes: i64,
    #[serde(default)]
    pub(super) domain_data_max_bytes: Option<i64>,
    #[serde(default)]
    pub(super) multipart: Option<PartsInfoJson>,
}

#[derive(Debug, Deserialize)]
pub(super) struct PartsInfoJson {
    #[serde(default)]
    pub(super) enabled: Option<bool>,
    #[serde(default)]
    pub(super) part_size_bytes: Option<i64>,
}
