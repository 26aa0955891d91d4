//! Makes texts of plugins bounded and readable, whatever bytes they contain.

use serde_json::{Map, Value};

/// Maximum size of the text of a log line, in bytes.
pub(super) const LOG_TEXT_BYTES_MAX: usize = 16 << 10;
/// Maximum size of a log target, in bytes.
pub(super) const LOG_TARGET_BYTES_MAX: usize = 256;
/// Maximum size of the fields of a log line, in bytes. The host reads no more than this.
pub(super) const LOG_FIELDS_BYTES_MAX: usize = 64 << 10;
pub(super) const LOG_FIELDS_READ_BYTES_MAX: usize = 1 << 20;
/// Maximum size of one field, in bytes, when all fields together are too long.
const FIELD_BYTES_MAX: usize = 16 << 10;
/// Maximum size of a failure reason, in bytes.
pub(super) const REASON_BYTES_MAX: usize = 16 << 10;
/// Maximum size of the details of a failure, in bytes. The details are JSON.
pub(super) const DETAILS_BYTES_MAX: usize = 1 << 20;

/// Returns at most `max` bytes of a plugin's text. A longer text is cut and its whole length is added. Bytes that
/// are not UTF-8 become U+FFFD.
pub(super) fn lossy(bytes: &[u8], max: usize) -> String {
    if bytes.len() <= max {
        return String::from_utf8_lossy(bytes).into_owned();
    }
    // The cut must not be inside a character.
    let is_inside = |at: usize| bytes[at] & 0b1100_0000 == 0b1000_0000;
    let end = (max.saturating_sub(3)..=max).rev().find(|at| !is_inside(*at)).unwrap_or(max);
    format!("{}… ({} bytes in all)", String::from_utf8_lossy(&bytes[..end]), bytes.len())
}

/// Limits the fields of a log line to `max` bytes. It cuts long texts first, then it omits whole fields.
pub(super) fn bounded_fields(fields: String, max: usize) -> String {
    if fields.len() <= max {
        return fields;
    }
    let Ok(members) = serde_json::from_str::<Map<String, Value>>(&fields) else {
        return lossy(fields.as_bytes(), FIELD_BYTES_MAX);
    };
    let (mut kept, mut left_out, mut used) = (Map::new(), 0_u64, 0);
    for (name, value) in members {
        let value = match value {
            Value::String(text) => Value::String(lossy(text.as_bytes(), FIELD_BYTES_MAX)),
            other => other,
        };
        let size = name.len() + value.to_string().len() + 4;
        if used + size <= max {
            used += size;
            kept.insert(name, value);
        } else {
            left_out += 1;
        }
    }
    if left_out > 0 {
        kept.insert("fields_left_out".to_owned(), left_out.into());
    }
    Value::Object(kept).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!(lossy(b"caf\xe9", 100), "caf\u{fffd}");
        assert_eq!(lossy("caf\u{e9}s".as_bytes(), 4), "caf… (6 bytes in all)");
        assert_eq!(lossy("caf\u{e9}s".as_bytes(), 5), "caf\u{e9}… (6 bytes in all)");
        assert_eq!(lossy(&[0x80; 9], 5), format!("{}… (9 bytes in all)", "\u{fffd}".repeat(5)));
        assert_eq!(lossy(b"", 0), "");
    }

    #[test]
    fn long_fields_are_cut_and_short_ones_stay() {
        let fields =
            |big: usize| serde_json::json!({ "a": "x".repeat(big), "place": "src/lib.rs:1", "z": vec!["y"; 9000] });
        let short = fields(10).to_string();
        assert_eq!(bounded_fields(short.clone(), 1 << 20), short);
        let bounded: Value = serde_json::from_str(&bounded_fields(fields(40_000).to_string(), 30_000)).expect("JSON");
        assert_eq!(bounded["place"], "src/lib.rs:1");
        assert!(bounded["a"].as_str().is_some_and(|text| text.ends_with("… (40000 bytes in all)")), "{bounded}");
        assert_eq!(bounded["fields_left_out"], 1);
        assert!(bounded_fields("x".repeat(100_000), 30_000).len() < 17_000);
    }
}
