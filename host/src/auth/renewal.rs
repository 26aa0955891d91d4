//! The one task that registers, logs in and renews.
//!
//! Registration and renewal alternate in one loop. So at most one login is in progress. A wallet that the service has
//! lost is registered again before the next login.

use std::{convert::Infallible, time::Duration};

use tokio::time::Instant;

use super::{
    Auth,
    dds::Login,
    pauses::{AcceptedTokens, after_login},
};
use crate::{model::pause_asked, node_event::NodeEvent, transport::RETRY_AFTER_MAX};

/// The least time between two logins, for any ratio, lifetime or number of rejections.
const LOGIN_GAP_MIN: Duration = Duration::from_millis(100);
/// From this pause on, callers without a token get an error instead of waiting.
const FAIL_CALLERS_FROM: Duration = Duration::from_secs(5);
/// The number of consecutive rejected fresh tokens at which the node registers again, and the period after that.
const REREGISTER_FROM: u32 = 3;
const REREGISTER_EVERY: u32 = 16;
/// A token that was valid for this long restarts the counts: its rejection is the first one.
const TOKEN_PROVEN: Duration = Duration::from_secs(30);

const REJECTED_FRESH: &str = "the control plane rejects fresh node tokens";
const REJECTED_SOON: &str =
    "the control plane rejects node tokens soon after it accepted them; check that no other node uses the same key";

/// Returns when to renew a token that was issued now for `ttl`. The result exceeds `ttl` only to keep the least time
/// between two logins. `draw` is in 0..1.
fn renew_in(ttl: Duration, ratio: f64, jitter: Duration, draw: f64) -> Duration {
    let ratio = if ratio.is_finite() { ratio.clamp(0.0, 1.0) } else { 0.75 };
    let middle = ttl.as_secs_f64() * ratio;
    let spread = jitter.as_secs_f64() * (2.0 * draw - 1.0);
    let wanted = Duration::try_from_secs_f64((middle + spread).max(0.0)).unwrap_or(ttl);
    let floor = (ttl / 10).clamp(LOGIN_GAP_MIN, Duration::from_secs(1));
    wanted.min(ttl).max(floor)
}

/// Why a renewal is due.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Due {
    Planned,
    Rejected { accepted: bool },
}

/// Counts consecutive tokens that were rejected before their expiry.
#[derive(Default)]
struct Rejections {
    /// Those that were never accepted. The count starts at one after an accepted token.
    fresh: u32,
    /// Those that were accepted before.
    soon: u32,
    accepted: AcceptedTokens,
}

/// The pause before the next login, and its cause.
#[derive(Debug, PartialEq)]
struct Pause {
    length: Duration,
    error: &'static str,
}

impl Rejections {
    /// Counts one rejection. Returns the pause and its cause. The first rejection of an accepted token may be harmless
    /// and is not reported.
    fn count(&mut self, accepted: bool, lived: Duration, jitter: Duration, draw: f64) -> Option<Pause> {
        let proven = lived >= TOKEN_PROVEN;
        if accepted || proven {
            self.fresh = 1;
            self.soon = if proven { u32::from(accepted) } else { self.soon.saturating_add(1) };
            let length = self.accepted.rejected(lived, draw);
            return (self.soon > 1 || !length.is_zero()).then_some(Pause { length, error: REJECTED_SOON });
        }
        self.fresh = self.fresh.saturating_add(1);
        let length = after_login(jitter).pause(self.fresh - 1, draw);
        (self.fresh > 1).then_some(Pause { length, error: REJECTED_FRESH })
    }
}

impl Auth {
    /// Runs until [`Auth::run`] drops it.
    pub(super) async fn sign_in_loop(&self) -> Infallible {
        let mut unknown = 0_u32;
        loop {
            let served = self.register().await;
            let logged_in = tokio::select! {
                logged_in = self.renew() => logged_in,
                never = self.refresh(served) => match never {},
            };
            unknown = if logged_in { 1 } else { unknown.saturating_add(1) };
            // The service may accept every registration and still not know the wallet. Then the attempts need pauses.
            if unknown > 1 {
                let pause = after_login(self.config.token_jitter).pause(unknown - 1, rand::random());
                if pause >= FAIL_CALLERS_FROM {
                    self.issuer.failed("the sign-in service registers this node and then does not know it");
                }
                tokio::time::sleep(pause).await;
            }
        }
    }

    /// Logs in and renews until the service does not know the wallet. Returns whether a login succeeded.
    async fn renew(&self) -> bool {
        let mut logged_in = false;
        let mut rejections = Rejections::default();
        while let Some(login) = self.log_in().await {
            let got = Instant::now();
            logged_in = true;
            // A longer lifetime could overflow the clock.
            let ttl = login.ttl.min(Duration::from_secs(24 * 3600));
            let wait = renew_in(ttl, self.config.token_safety_ratio, self.config.token_jitter, rand::random());
            // First: the node starts to lease as soon as it holds a token.
            self.events.emit(NodeEvent::TokenRenewed { lifetime: ttl, renew_in: wait });
            self.issuer.hold(login.token, got + ttl);
            let due = tokio::select! {
                () = tokio::time::sleep_until(got + wait) => Due::Planned,
                accepted = self.issuer.rejected() => Due::Rejected { accepted },
            };
            let Due::Rejected { accepted } = due else {
                rejections = Rejections::default();
                continue;
            };
            self.events.board().change_plane(|status| status.token_expires_at = None);
            let jitter = self.config.token_jitter;
            // An accepted token is replaced at once. When fresh tokens are rejected, a faster login does not help.
            if let Some(Pause { length, error }) = rejections.count(accepted, got.elapsed(), jitter, rand::random()) {
                self.events.emit(NodeEvent::TokenRejected { error, pause: length });
                // The control plane may reject tokens because it does not know this node. A repeated registration fixes
                // that: once at first, then once every few minutes.
                if rejections.fresh % REREGISTER_EVERY == REREGISTER_FROM {
                    self.reregister.notify_one();
                }
                if length >= FAIL_CALLERS_FROM {
                    self.issuer.failed(error);
                }
                tokio::time::sleep(length).await;
            }
        }
        logged_in
    }

    /// Tries until a login succeeds. `None`: the wallet is unknown and must be registered first.
    async fn log_in(&self) -> Option<Login> {
        let mut failures = 0_u32;
        self.issuer.working();
        loop {
            let refusal = match self.dds.login().await {
                Ok(login) => return Some(login),
                Err(refusal) => refusal,
            };
            let error = refusal.to_string();
            if refusal.unknown_wallet() {
                self.events.emit(NodeEvent::RegistrationLost { error });
                return None;
            }
            failures = failures.saturating_add(1);
            let own = after_login(self.config.token_jitter).pause(failures, rand::random());
            let pause = pause_asked(own, refusal.retry_after(), RETRY_AFTER_MAX);
            self.events.emit(NodeEvent::LoginFailed { error: error.clone(), failures, pause });
            let error = format!("login failed {failures} times: {error}");
            // Callers wait through short pauses. After that they get the error at once, also during later attempts:
            // no caller may wait for an unavailable service.
            if failures > self.config.token_max_retries || pause >= FAIL_CALLERS_FROM {
                self.issuer.failed(&error);
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                never = self.fail_rejected_tokens(&error) => match never {},
            }
        }
    }

    /// Fails callers at once when the token is rejected while logins fail.
    async fn fail_rejected_tokens(&self, error: &str) -> Infallible {
        loop {
            self.issuer.rejected().await;
            self.issuer.failed(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn millis(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn renewal_follows_the_ratio_within_the_lifetime() {
        assert_eq!(renew_in(millis(100_000), 0.75, millis(0), 0.9), millis(75_000));
        assert_eq!(renew_in(millis(100_000), 0.75, millis(500), 0.0), millis(74_500));
        assert_eq!(renew_in(millis(100_000), 0.75, millis(500), 1.0), millis(75_500));
        assert_eq!(renew_in(millis(100_000), 7.0, millis(500), 1.0), millis(100_000));
        assert_eq!(renew_in(millis(100_000), f64::NAN, millis(0), 0.5), millis(75_000));
    }

    #[test]
    fn rejected_fresh_tokens_are_replaced_with_growing_pauses() {
        let (soon, long) = (millis(500), TOKEN_PROVEN);
        let mut rejections = Rejections::default();
        let mut pauses = |tokens: &[(bool, Duration)]| -> Vec<Option<u128>> {
            let pause = |(accepted, lived): &(bool, Duration)| {
                rejections.count(*accepted, *lived, millis(500), 1.0).map(|pause| pause.length.as_millis())
            };
            tokens.iter().map(pause).collect()
        };
        assert_eq!(pauses(&[(true, soon); 4]), [None, Some(0), Some(0), Some(0)]);
        assert_eq!(pauses(&[(false, soon); 4]), [Some(250), Some(500), Some(1000), Some(2000)]);
        assert_eq!(pauses(&[(true, soon), (true, long), (true, soon)]), [Some(0), None, Some(0)]);
        assert_eq!(pauses(&[(false, long), (false, soon), (false, soon)]), [None, Some(250), Some(500)]);
        assert_eq!(pauses(&[(true, long), (true, millis(0)), (true, millis(0))]), [None, Some(100), Some(200)]);
    }

    #[test]
    fn zero_ratio_or_lifetime_causes_no_login_storm() {
        assert_eq!(renew_in(millis(100_000), 0.0, millis(500), 0.0), millis(1_000));
        assert_eq!(renew_in(millis(1), 0.75, millis(500), 1.0), LOGIN_GAP_MIN);
    }
}
