//! Makes untrusted text safe for a line that people read.

/// Returns `text` in a form that is safe in a line for people. It replaces line breaks, terminal control characters
/// and characters that change the direction of text with U+FFFD. JSON output keeps the text unchanged.
#[must_use]
pub fn in_a_line(text: &str) -> String {
    let commands = |c: char| c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    text.replace(commands, "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_in_line_are_replaced() {
        assert_eq!(
            in_a_line("a\nb\r\u{1b}[31m\u{9b}2J\u{202e}c\t\u{7f}"),
            "a\u{fffd}b\u{fffd}\u{fffd}[31m\u{fffd}2J\u{fffd}c\u{fffd}\u{fffd}"
        );
        assert_eq!(in_a_line("h\u{e9}llo \u{4e16}\u{754c}"), "h\u{e9}llo \u{4e16}\u{754c}");
    }
}
