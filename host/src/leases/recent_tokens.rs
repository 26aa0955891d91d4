//! The tokens of the latest leases of a control plane. It may repeat one in an answer.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

use crate::{
    model::{Token, redact},
    transport,
};

/// Most tokens that are kept.
const TOKENS_MAX: usize = 256;
/// Longest part of an answer that is searched, in bytes. It is much longer than an excerpt.
const SEARCHED_BYTES_MAX: usize = 64 * 1024;

/// See the module documentation. The latest is the last.
#[derive(Default)]
pub(super) struct RecentTokens(Mutex<VecDeque<Token>>);

impl RecentTokens {
    /// Keeps a token until this many others are newer.
    pub(super) fn remember(&self, token: &Token) {
        let mut tokens = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Tokens begin alike and end differently. To compare all of them whole costs 5 % of a no-op task.
        let end = |token: &Token| token.expose().as_bytes().last_chunk::<8>().copied();
        let new_end = end(token);
        if let Some(at) = tokens.iter().rposition(|known| end(known) == new_end && known == token) {
            tokens.remove(at);
        } else if tokens.len() == TOKENS_MAX {
            tokens.pop_front();
        }
        tokens.push_back(token.clone());
    }

    /// The beginning of an answer on one line, without these tokens, `secrets` and bearer tokens.
    pub(super) fn excerpt(&self, answer: &[u8], secrets: &[&str]) -> String {
        let mut text = String::from_utf8_lossy(&answer[..answer.len().min(SEARCHED_BYTES_MAX)]).into_owned();
        redact(&mut text, self.0.lock().unwrap_or_else(PoisonError::into_inner).make_contiguous());
        transport::excerpt_without(text.as_bytes(), secrets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_latest_tokens_are_kept() {
        let tokens = RecentTokens::default();
        let token = |n: usize| Token::new(format!("a-token-with-a-common-beginning-{n:05}"));
        (0..=TOKENS_MAX).for_each(|n| {
            tokens.remember(&token(n));
            tokens.remember(&token(1)); // still in use
        });
        let seen = |n: usize| tokens.excerpt(token(n).expose().as_bytes(), &[]);
        assert_eq!([seen(1), seen(3), seen(TOKENS_MAX)].map(|text| text == "(token)"), [true; 3]);
        assert_eq!(seen(0), "(token)0", "of an old token only the common part is known");
        let far = format!("{} {}", "-".repeat(500), token(1).expose());
        assert!(!tokens.excerpt(far.as_bytes(), &[]).contains("a-token"), "cut by the end of the excerpt");
    }
}
