//! Builds the manifest, a JSON object, at compile time. Thus it can be read from the file without running the file.

/// Optional keys of the manifest, as [`export_runner!`](crate::export_runner) takes them.
pub struct ManifestKeys {
    /// What the plugin cannot work without. A host that does not know a word rejects the plugin.
    pub requires: &'static [&'static str],
    /// What the plugin uses if the host has it. A host ignores words that it does not know.
    pub wants: &'static [&'static str],
    /// The lowest ABI version of a host, as `major.minor`. Empty if any minor version will do.
    pub min_abi: &'static str,
}

impl ManifestKeys {
    /// None of the keys.
    pub const NONE: Self = Self { requires: &[], wants: &[], min_abi: "" };

    /// Stops the compilation if a value is not valid.
    #[must_use]
    pub const fn checked(self) -> Self {
        check_words(self.requires);
        check_words(self.wants);
        assert!(
            self.min_abi.is_empty() || is_version(self.min_abi.as_bytes()),
            "min_abi is not a version of the form major.minor"
        );
        self
    }
}

const fn check_words(words: &[&str]) {
    let mut index = 0;
    while index < words.len() {
        let bytes = words[index].as_bytes();
        assert!(!bytes.is_empty() && bytes.len() <= 128, "a word of requires or wants has no or more than 128 bytes");
        let mut at = 0;
        while at < bytes.len() {
            assert!(is_plain(bytes[at]), "a word of requires or wants holds a space, a quote, a backslash or no ASCII");
            at += 1;
        }
        index += 1;
    }
}

/// Whether `text` is `major.minor`.
const fn is_version(text: &[u8]) -> bool {
    let (mut dots, mut digits, mut at) = (0, 0, 0);
    while at < text.len() {
        match text[at] {
            b'0'..=b'9' if digits < 4 => digits += 1,
            b'.' if dots == 0 && digits > 0 => (dots, digits) = (1, 0),
            _ => return false,
        }
        at += 1;
    }
    dots == 1 && digits > 0
}

/// Length of the manifest with these parts and keys.
#[must_use]
pub const fn manifest_len(parts: &[&str], keys: &ManifestKeys) -> usize {
    write(&mut [], parts, keys)
}

/// The manifest; `N` must be [`manifest_len`] of the same values.
#[must_use]
pub const fn manifest<const N: usize>(parts: &[&str], keys: &ManifestKeys) -> [u8; N] {
    let mut bytes = [0; N];
    write(&mut bytes, parts, keys);
    bytes
}

/// Writes a JSON object that begins with `parts` and returns its length. If `out` is empty it only counts.
const fn write(out: &mut [u8], parts: &[&str], keys: &ManifestKeys) -> usize {
    let (mut at, mut part) = (0, 0);
    while part < parts.len() {
        at = put(out, at, parts[part]);
        part += 1;
    }
    at = put_list(out, at, ",\"requires\":[", keys.requires);
    at = put_list(out, at, ",\"wants\":[", keys.wants);
    if !keys.min_abi.is_empty() {
        at = put(out, at, ",\"min_abi\":\"");
        at = put(out, at, keys.min_abi);
        at = put(out, at, "\"");
    }
    put(out, at, "}")
}

const fn put_list(out: &mut [u8], at: usize, key: &str, words: &[&str]) -> usize {
    if words.is_empty() {
        return at;
    }
    let (mut at, mut index) = (put(out, at, key), 0);
    while index < words.len() {
        at = put(out, at, if index == 0 { "\"" } else { ",\"" });
        at = put(out, at, words[index]);
        at = put(out, at, "\"");
        index += 1;
    }
    put(out, at, "]")
}

const fn put(out: &mut [u8], at: usize, text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut index = 0;
    while index < bytes.len() && !out.is_empty() {
        out[at + index] = bytes[index];
        index += 1;
    }
    at + bytes.len()
}

/// A character that JSON holds as it is.
const fn is_plain(byte: u8) -> bool {
    byte.is_ascii_graphic() && byte != b'"' && byte != b'\\'
}

/// Stops the compilation if `capability` is not a valid name. The host has the same rule. A test there compares
/// both.
#[must_use]
pub const fn checked(capability: &'static str) -> &'static str {
    let bytes = capability.as_bytes();
    assert!(!bytes.is_empty(), "CAPABILITY is empty, expected a name such as /examples/hello/v1");
    assert!(bytes[0] == b'/', "CAPABILITY does not begin with /, expected a name such as /examples/hello/v1");
    assert!(bytes.len() <= 256, "CAPABILITY is longer than 256 bytes");
    let mut at = 0;
    while at < bytes.len() {
        let byte = bytes[at];
        assert!(
            is_plain(byte),
            "CAPABILITY holds a character other than printable ASCII without quotes and backslashes"
        );
        at += 1;
        assert!(
            byte != b'/' || at < bytes.len() && bytes[at] != b'/',
            "CAPABILITY has an empty part between slashes or at its end"
        );
    }
    capability
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARTS: &[&str] = &["{\"name\":\"", "a", "\""];

    #[test]
    fn manifest_holds_only_the_given_keys() {
        const NONE: [u8; manifest_len(PARTS, &ManifestKeys::NONE)] = manifest(PARTS, &ManifestKeys::NONE);
        assert_eq!(NONE.escape_ascii().to_string(), r#"{\"name\":\"a\"}"#);

        const KEYS: ManifestKeys = ManifestKeys { requires: &["b"], wants: &["c", "d"], min_abi: "2.11" }.checked();
        const ALL: [u8; manifest_len(PARTS, &KEYS)] = manifest(PARTS, &KEYS);
        let all: serde_json::Value = serde_json::from_slice(&ALL).expect("JSON");
        assert_eq!(all, serde_json::json!({ "name": "a", "requires": ["b"], "wants": ["c", "d"], "min_abi": "2.11" }));
    }

    // The rules stop the compilation. When they are called at run time, they panic.
    #[test]
    fn values_of_keys_are_checked() {
        for (text, valid) in [
            ("2.1", true),
            ("10.0", true),
            ("2", false),
            ("2.", false),
            (".1", false),
            ("2.1.0", false),
            ("a.b", false),
        ] {
            assert_eq!(is_version(text.as_bytes()), valid, "{text:?}");
        }
        for (words, valid) in
            [(&["token"][..], true), (&[], true), (&[""], false), (&["two words"], false), (&["quote\""], false)]
        {
            let checked = std::panic::catch_unwind(|| check_words(words));
            assert_eq!(checked.is_ok(), valid, "{words:?}");
        }
    }
}
