//! The data that a runner publishes.

use serde::{Deserialize, Serialize};

/// One published artifact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    /// The outputs prefix joined with the relative path.
    pub logical_path: String,
    /// The stored name.
    pub name: String,
    /// The stored data type.
    pub data_type: String,
    /// The id that the store assigned.
    pub id: Option<String>,
    /// How many bytes were stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// SHA-256 of the stored bytes, 64 lower-case hex digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}
