//! What a runner publishes.

use serde::{Deserialize, Serialize};

/// What a runner asks to have stored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArtifactSpec {
    /// Path relative to the task's outputs prefix.
    pub path: String,
    /// Stored name; derived from the path when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Data type; derived from the extension when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_type: Option<String>,
    /// Id of stored data to replace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub existing_id: Option<String>,
    /// Exact size in bytes where the runner knows it beforehand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

/// One published artifact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    /// Outputs prefix and relative path, joined.
    pub logical_path: String,
    /// The name it is stored under.
    pub name: String,
    /// The data type it is stored as.
    pub data_type: String,
    /// The id the store gave it.
    pub id: Option<String>,
    /// How many bytes were stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// SHA-256 of what was stored, 64 lower-case hex digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}
