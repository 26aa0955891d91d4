//! Builds the manifest, a JSON object, at compile time. Thus it can be read from the file without running the file.

/// Length of `parts` joined.
#[must_use]
pub const fn joined_len(parts: &[&str]) -> usize {
    let mut len = 0;
    let mut part = 0;
    while part < parts.len() {
        len += parts[part].len();
        part += 1;
    }
    len
}

/// `parts` joined; `N` must be [`joined_len`] of them.
#[must_use]
pub const fn joined<const N: usize>(parts: &[&str]) -> [u8; N] {
    let mut bytes = [0; N];
    let (mut at, mut part) = (0, 0);
    while part < parts.len() {
        let text = parts[part].as_bytes();
        let mut index = 0;
        while index < text.len() {
            bytes[at] = text[index];
            at += 1;
            index += 1;
        }
        part += 1;
    }
    bytes
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
            byte.is_ascii_graphic() && byte != b'"' && byte != b'\\',
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
