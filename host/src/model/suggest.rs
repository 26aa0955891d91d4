//! The only "did you mean" suggestion: finds the known word for a mistyped one.

/// Returns the candidate that `word` most likely means, if one is similar. Letter case does not count.
///
/// One mistake is allowed: a letter missing, added or wrong, or two letters swapped. Long words may have one more
/// mistake for each 6 letters. Words of one or two letters have no suggestion.
#[must_use]
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_ascii_lowercase();
    let len = word.chars().count();
    if len < 3 {
        return None;
    }
    let edits_max = (len / 6).max(1);
    let scored = candidates.into_iter().map(|candidate| {
        let other = candidate.to_ascii_lowercase();
        (strsim::osa_distance(&word, &other), -strsim::jaro_winkler(&word, &other), candidate)
    });
    let near = scored.filter(|(edits, _, candidate)| *edits <= edits_max && candidate.len() > 2);
    near.min_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))).map(|(_, _, candidate)| candidate)
}

/// Formats [`nearest`] as the end of a sentence: `, did you mean run?`, or nothing.
#[must_use]
pub fn did_you_mean<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    nearest(word, candidates).map_or_else(String::new, |near| format!(", did you mean {near}?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_similar_words_are_suggested() {
        let check = |word, candidates: &[&'static str], expected| {
            assert_eq!(nearest(word, candidates.iter().copied()), expected, "{word}");
        };
        check("rnu", &["dev", "run", "submit"], Some("run"));
        check("RUN", &["dev", "run"], Some("run"));
        check("MAX_CONCURENCY", &["OUTBOX_MAX", "MAX_CONCURRENCY"], Some("MAX_CONCURRENCY"));
        check("OUTBOXMAX", &["OUTBOX_MAX"], Some("OUTBOX_MAX"));
        check("/exmaples/hello/v2", &["/examples/echo/v1", "/examples/hello/v1"], Some("/examples/hello/v1"));
        check("HTTPS_PROXI", &["HTTP_PROXY", "HTTPS_PROXY"], Some("HTTPS_PROXY"));
        check("FTP_PROXY", &["HTTP_PROXY"], None);
        check("NODE_ENV", &["NODE_URL"], None);
        check("start", &["run", "dev"], None);
        check("ab", &["abc"], None);
    }
}
