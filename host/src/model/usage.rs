//! What a runner has used: tokens of a language model, and what they cost.

use serde::{Deserialize, Serialize};

/// A count of tokens and their cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Usage {
    /// Tokens that were sent to a model.
    pub tokens_in: u64,
    /// Tokens that a model produced.
    pub tokens_out: u64,
    /// The cost in US dollars, 0 or more.
    pub usd_cost: f64,
}

impl Usage {
    /// Adds another usage. The numbers saturate.
    pub fn add(&mut self, more: Self) {
        self.tokens_in = self.tokens_in.saturating_add(more.tokens_in);
        self.tokens_out = self.tokens_out.saturating_add(more.tokens_out);
        self.usd_cost = (self.usd_cost + more.usd_cost).min(f64::MAX);
    }

    /// All tokens. A budget of tokens bounds this number.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.tokens_in.saturating_add(self.tokens_out)
    }

    /// Whether nothing was used.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        *self == Self::default()
    }
}
