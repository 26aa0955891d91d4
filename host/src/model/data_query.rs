//! A query of a domain's data, and one line of its answer.

use serde::{Deserialize, Serialize};

use super::{PortError, PortErrorKind, in_a_line};

/// Longest part of an id that an error message contains, in characters.
const SHOWN_CHARS_MAX: usize = 100;

/// Which data of a domain a runner looks for. Each given part must match exactly. Without any part it means all data.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataQuery {
    /// The name.
    pub name: Option<String>,
    /// The data type.
    pub data_type: Option<String>,
    /// One of these ids. An empty list finds nothing.
    pub ids: Option<Vec<String>>,
}

impl DataQuery {
    /// Reads the JSON form of a query.
    ///
    /// # Errors
    /// One line about what is wrong.
    pub fn parse(json: &[u8]) -> Result<Self, PortError> {
        let query: Self = serde_json::from_slice(json).map_err(|err| {
            bad(format!(
                "the query is not an object with optional name, data_type and ids: {}",
                in_a_line(&err.to_string())
            ))
        })?;
        query.check()?;
        Ok(query)
    }

    /// Refuses parts that a store would read as something else: an empty text as no condition, a comma as two ids.
    ///
    /// # Errors
    /// One line about the part.
    pub fn check(&self) -> Result<(), PortError> {
        let empty = |text: &Option<String>| text.as_ref().is_some_and(String::is_empty);
        if empty(&self.name) || empty(&self.data_type) {
            return Err(bad("the query has an empty name or data_type; leave it out, or give a text".to_owned()));
        }
        match self.ids.iter().flatten().find(|id| id.trim().is_empty() || id.contains(',')) {
            Some(id) => {
                let shown: String = id.chars().take(SHOWN_CHARS_MAX).collect();
                Err(bad(format!("the query has the id {shown:?}; expected an id that is not empty and has no comma")))
            }
            None => Ok(()),
        }
    }

    /// Whether this data matches.
    #[must_use]
    pub fn matches(&self, found: &FoundData) -> bool {
        let same = |wanted: &Option<String>, text: &Option<String>| wanted.is_none() || wanted == text;
        // Ids are UUIDs, which have two spellings.
        let listed = |ids: &Vec<String>| ids.iter().any(|id| id.trim().eq_ignore_ascii_case(&found.id));
        same(&self.name, &found.name) && same(&self.data_type, &found.data_type) && self.ids.as_ref().is_none_or(listed)
    }
}

fn bad(message: String) -> PortError {
    PortError::new(PortErrorKind::BadRequest, message)
}

/// The store's metadata of found data. As an input, its name is `id`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct FoundData {
    /// The store's id.
    pub id: String,
    /// Stored name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Stored data type.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_type: Option<String>,
    /// Size in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// The domain of the data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain_id: Option<String>,
    /// When it was created, in the words of the store.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_at: Option<String>,
    /// When it was last changed, in the words of the store.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub updated_at: Option<String>,
}

impl FoundData {
    /// Appends it to `lines` as one line of JSON.
    pub fn write_line(&self, lines: &mut Vec<u8>) {
        serde_json::to_writer(&mut *lines, self).expect("a struct of texts is JSON");
        lines.push(b'\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(id: &str, name: &str, data_type: &str) -> FoundData {
        let text = |text: &str| Some(text.to_owned());
        FoundData { id: id.to_owned(), name: text(name), data_type: text(data_type), ..FoundData::default() }
    }

    #[test]
    fn each_part_of_a_query_must_match() {
        let check = |json: &str, expected: bool| {
            let query = DataQuery::parse(json.as_bytes()).expect(json);
            assert_eq!(query.matches(&found("aB-1", "scan", "ply")), expected, "{json}");
        };
        check("{}", true);
        check(r#"{"name":null}"#, true);
        check(r#"{"name":"scan","data_type":"ply","ids":["x"," Ab-1 "]}"#, true);
        check(r#"{"name":"sca"}"#, false);
        check(r#"{"name":"scan","data_type":"obj"}"#, false);
        check(r#"{"name":"scan","ids":["x"]}"#, false);
        check(r#"{"ids":[]}"#, false);
    }

    #[test]
    fn queries_with_mistakes_are_refused() {
        for (json, expected) in [
            ("[]", "not an object"),
            ("{\n\"nmae\":\"x\"}", "unknown field `nmae`"),
            (r#"{"name":7}"#, "invalid type"),
            (r#"{"name":""}"#, "empty name or data_type"),
            (r#"{"data_type":""}"#, "empty name or data_type"),
            (r#"{"ids":["a","b,c"]}"#, "\"b,c\""),
            (r#"{"ids":[" "]}"#, "\" \""),
        ] {
            let err = DataQuery::parse(json.as_bytes()).expect_err(json);
            assert_eq!(err.kind, PortErrorKind::BadRequest);
            assert!(err.message.contains(expected) && !err.message.contains('\n'), "{err}");
        }
    }

    #[test]
    fn found_data_is_one_line_of_json() {
        let mut lines = Vec::new();
        FoundData { size: Some(3), ..found("1", "a\n\"b\"", "ply") }.write_line(&mut lines);
        FoundData { id: "2".to_owned(), ..FoundData::default() }.write_line(&mut lines);
        let expected = "{\"id\":\"1\",\"name\":\"a\\n\\\"b\\\"\",\"data_type\":\"ply\",\"size\":3}\n{\"id\":\"2\"}\n";
        assert_eq!(String::from_utf8(lines).expect("text"), expected);
    }
}
