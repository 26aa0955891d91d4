//! Reads JSON with the line of each value. Comments and commas before a closing bracket are allowed, as .NET allows them
//! in its files.

use serde::{
    Deserializer as _,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;

use super::file::{Members, Value, line_of, newlines};

/// The depth to which values are read.
const DEPTH_MAX: usize = 8;

/// The members of the object in a file, or the line and the text of a mistake.
pub(super) fn members(text: &str) -> Result<Members, (usize, String)> {
    let text = &plain(text)?;
    let raw: &RawValue = serde_json::from_str(text).map_err(|err| {
        let error = err.to_string();
        let problem = error.split(" at line ").next().unwrap_or_default();
        (err.line().max(1), format!("is not JSON: {problem}"))
    })?;
    let line = line_of(text, text.len() - text.trim_start().len());
    match json_value(raw, line, 0) {
        Value::Table(members) => Ok(members),
        value => Err((1, format!("expected an object, found {}", value.kind()))),
    }
}

/// The text with spaces in the place of comments and of commas before a closing bracket.
fn plain(text: &str) -> Result<String, (usize, String)> {
    let mut plain = text.as_bytes().to_vec();
    let blank = |bytes: &mut [u8]| bytes.iter_mut().filter(|byte| **byte != b'\n').for_each(|byte| *byte = b' ');
    // The last byte that is no space, and where it is.
    let (mut at, mut last) = (0, (b'{', 0));
    while let Some(&byte) = plain.get(at) {
        let rest = &text.as_bytes()[at..];
        match byte {
            b'"' => {
                let mut end = 1;
                while rest.get(end).is_some_and(|byte| *byte != b'"') {
                    end += if rest[end] == b'\\' { 2 } else { 1 };
                }
                last = (byte, at);
                at += end + 1;
            }
            b'/' if rest.starts_with(b"//") => {
                let end = memchr::memchr(b'\n', rest).unwrap_or(rest.len());
                blank(&mut plain[at..at + end]);
                at += end;
            }
            b'/' if rest.starts_with(b"/*") => {
                let Some(end) = memchr::memmem::find(&rest[2..], b"*/") else {
                    return Err((line_of(text, at), "the comment has no end; close it with */".to_owned()));
                };
                blank(&mut plain[at..at + end + 4]);
                at += end + 4;
            }
            _ => {
                if let (b']' | b'}', (b',', comma)) = (byte, last) {
                    plain[comma] = b' ';
                }
                // A comma without a value before it stays a mistake.
                let is_lone = byte == b',' && matches!(last.0, b'{' | b'[' | b',');
                if !byte.is_ascii_whitespace() {
                    last = (if is_lone { b'{' } else { byte }, at);
                }
                at += 1;
            }
        }
    }
    Ok(String::from_utf8(plain).expect("spaces replace whole characters"))
}

/// The value of `raw`, which begins on `line`.
fn json_value(raw: &RawValue, line: usize, depth: usize) -> Value {
    let text = raw.get();
    match text.as_bytes().first() {
        // No setting is nested this deep. Its type is enough for the message.
        Some(b'{') if depth > DEPTH_MAX => Value::Table(Vec::new()),
        Some(b'[') if depth > DEPTH_MAX => Value::List(Vec::new()),
        Some(b'{') => {
            let members = serde_json::Deserializer::from_str(text).deserialize_map(RawMembers).unwrap_or_default();
            let (mut line, mut rest) = (line, text);
            let mut line_of_next = |raw: &RawValue| {
                // Only white space and punctuation precede a name or a value, so the first match is the right one.
                let at = rest.find(raw.get()).unwrap_or_default();
                let (before, from) = rest.split_at(at);
                let start = line + newlines(before.as_bytes());
                line = start + newlines(raw.get().as_bytes());
                rest = &from[raw.get().len()..];
                start
            };
            let member = |(name, value): (&RawValue, &RawValue)| {
                line_of_next(name);
                let line = line_of_next(value);
                let name = serde_json::from_str(name.get()).unwrap_or_default();
                (name, line, json_value(value, line, depth + 1))
            };
            Value::Table(members.into_iter().map(member).collect())
        }
        Some(b'[') => {
            let items: Vec<&RawValue> = serde_json::from_str(text).unwrap_or_default();
            Value::List(items.into_iter().map(|item| json_value(item, line, depth + 1)).collect())
        }
        Some(b'"') => serde_json::from_str(text).map_or(Value::Null, Value::Text),
        Some(b't' | b'f') => Value::Switch(text == "true"),
        Some(b'n') | None => Value::Null,
        Some(_) if text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-') => Value::Whole(text.to_owned()),
        Some(_) => Value::Number(text.to_owned()),
    }
}

/// An object's members in their order, duplicates included.
struct RawMembers;

impl<'de> Visitor<'de> for RawMembers {
    type Value = Vec<(&'de RawValue, &'de RawValue)>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Vec::new();
        while let Some(member) = map.next_entry()? {
            members.push(member);
        }
        Ok(members)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Members {
        members(text).unwrap_or_else(|(line, problem)| panic!("{line}: {problem}"))
    }

    /// Each name with the line of its value, depth first.
    fn lines(members: &Members) -> Vec<(&str, usize)> {
        let mut found = Vec::new();
        for (name, line, value) in members {
            found.push((name.as_str(), *line));
            if let Value::Table(members) = value {
                found.extend(lines(members));
            }
        }
        found
    }

    #[test]
    fn json_values_have_their_own_lines() {
        let text = "\n{\"a\":\n\"a\", \"t\": {\"x\\n\": {\n\n},\n\"1\":1,\n\"1\": [\n1]\n}, \"\": 1,\n\"a\": null\n}";
        let members = read(text);
        let expected = [("a", 3), ("t", 3), ("x\n", 3), ("1", 6), ("1", 7), ("", 9), ("a", 10)];
        assert_eq!(lines(&members), expected);
    }
    #[test]
    fn comments_and_last_commas_are_spaces() {
        let text = "/* a\n*/ { // \"b\": 1\n \"a//b\": \"\\\"/*\", /* ü */ \"c\": [1, 2, /* , */ ], // x\n} // end";
        assert_eq!(lines(&read(text)), [("a//b", 3), ("c", 3)]);
        for (text, line, what) in [
            ("{\n/* a", 2, "no end"),
            ("{,}", 1, "is not JSON"),
            ("{\"a\": 1,,}", 1, "is not JSON"),
            ("{\"a\": [,]}", 1, "is not JSON"),
            ("{\"a\": 1 / 2}", 1, "is not JSON"),
            ("{\"a\\", 1, "is not JSON"),
        ] {
            let Err((at, problem)) = members(text) else { panic!("{text} is read") };
            assert!(at == line && problem.contains(what), "{text}: {at}: {problem}");
        }
    }
}
