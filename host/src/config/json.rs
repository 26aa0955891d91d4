//! Reads JSON with the line of each value. Comments and a comma after the last value are allowed, as .NET allows them in
//! its files.

use jsonc_parser::{
    CollectOptions, ParseOptions,
    ast::{self, Object},
    common::Ranged as _,
    parse_to_ast,
};

use super::file::{Members, Value, line_of};

/// What a file may have beyond JSON.
const FORM: ParseOptions = ParseOptions {
    allow_comments: true,
    allow_trailing_commas: true,
    allow_loose_object_property_names: false,
    allow_missing_commas: false,
    allow_single_quoted_strings: false,
    allow_hexadecimal_numbers: false,
    allow_unary_plus_numbers: false,
    allow_bare_decimal_point_numbers: false,
    allow_non_finite_numbers: false,
    allow_extended_string_escapes: false,
};

/// The members of the object in a file, or the line and the text of a mistake.
pub(super) fn members(text: &str) -> Result<Members, (usize, String)> {
    let parsed = parse_to_ast(text, &CollectOptions::default(), &FORM)
        .map_err(|err| (err.line_display(), format!("is not JSON: {}", err.kind().to_string().to_lowercase())))?;
    match parsed.value {
        Some(ast::Value::Object(object)) => Ok(table(text, object)),
        Some(other) => Err((1, format!("expected an object, found {}", value(text, other).kind()))),
        None => Err((1, "expected an object, found nothing".to_owned())),
    }
}

fn table(text: &str, object: Object<'_>) -> Members {
    let member = |property: ast::ObjectProp<'_>| {
        let line = line_of(text, property.value.start());
        (property.name.into_string(), line, value(text, property.value))
    };
    object.properties.into_iter().map(member).collect()
}

fn value(text: &str, value: ast::Value<'_>) -> Value {
    match value {
        ast::Value::StringLit(string) => Value::Text(string.value.into_owned()),
        ast::Value::NumberLit(number) if number.value.contains(['.', 'e', 'E']) => {
            Value::Number(number.value.to_owned())
        }
        ast::Value::NumberLit(number) => Value::Whole(number.value.to_owned()),
        ast::Value::BooleanLit(switch) => Value::Switch(switch.value),
        ast::Value::Object(object) => Value::Table(table(text, object)),
        ast::Value::Array(array) => {
            Value::List(array.elements.into_iter().map(|item| self::value(text, item)).collect())
        }
        ast::Value::NullKeyword(_) => Value::Null,
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
    fn comments_and_last_commas_are_allowed() {
        let text = "/* a\n*/ { // \"b\": 1\n \"a//b\": \"\\\"/*\", /* ü */ \"c\": [1, 2, /* , */ ], // x\n} // end";
        assert_eq!(lines(&read(text)), [("a//b", 3), ("c", 3)]);
        for (text, line, what) in [
            ("{\n/* a", 2, "is not JSON: unterminated comment block"),
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
