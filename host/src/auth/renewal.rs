//! The one task that registers, logs in and renews.
//!
//! Registration and renewal take turns in a single loop, so there is never more than one login
//! under way, and a wallet the service has forgotten is registered again before the next one.

use std::{convert::Infallible, time::Duration};

use tokio::time::Instant;

use super::{
    Auth, RegistrationState,
    dds::Login,
    pauses::{TakenTokens, after_login},
};
use crate::{
    model::{millis, pause_asked},
    transport::RETRY_AFTER_MAX,
};

/// Shortest time between two logins, whatever ratio, lifetime or rejections ask for.
const LOGIN_GAP_MIN: Duration = Duration::from_millis(100);
/// From this pause on, users without a token are told of the failure instead of kept waiting.
const TOLD_FROM: Duration = Duration::from_secs(5);
/// At which fresh token rejected in a row the registration itself is doubted, and how often again.
const DOUBTED_FROM: u32 = 3;
const DOUBTED_EVERY: u32 = 16;
/// A token that lived this long was good: its rejection is the first.
const TOKEN_PROVEN: Duration = Duration::from_secs(30);

const REJECTED_FRESH: &str = "the control plane rejects fresh node tokens";
const REJECTED_SOON: &str =
    "the control plane rejects node tokens soon after it took them, as when another node signs in with the same key";

/// When to renew a token got now with `ttl` to live. The answer is never beyond `ttl`, except
/// that two logins keep their distance. `draw` lies in 0..1.
fn renew_in(ttl: Duration, ratio: f64, jitter: Duration, draw: f64) -> Duration {
    let ratio = if ratio.is_finite() { ratio.clamp(0.0, 1.0) } else { 0.75 };
    let middle = ttl.as_secs_f64() * ratio;
    let spread = jitter.as_secs_f64() * (2.0 * draw - 1.0);
    let wanted = Duration::try_from_secs_f64((middle + spread).max(0.0)).unwrap_or(ttl);
    let floor = (ttl / 10).clamp(LOGIN_GAP_MIN, Duration::from_secs(1));
    wanted.min(ttl).max(floor)
}

/// Why the wait for a renewal ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Due {
    Planned,
    Rejected { taken: bool },
}

/// Tokens rejected in a row before their time.
#[derive(Default)]
struct Rejections {
    /// That were never taken, and one before them.
    fresh: u32,
    /// That had been taken.
    soon: u32,
    taken: TakenTokens,
}

/// What to do before the next login.
#[derive(Debug, PartialEq)]
struct Pause {
    length: Duration,
    error: &'static str,
}

impl Rejections {
    /// Counts one more. Returns the pause and its cause; the first rejection of a token that was taken may
    /// have any innocent cause and is not told.
    fn count(&mut self, taken: bool, lived: Duration, jitter: Duration, draw: f64) -> Option<Pause> {
        let proven = lived >= TOKEN_PROVEN;
        if taken || proven {
            self.fresh = 1;
            self.soon = if proven { u32::from(taken) } else { self.soon.saturating_add(1) };
            let length = self.taken.rejected(lived, draw);
            return (self.soon > 1 || !length.is_zero()).then_some(Pause { length, error: REJECTED_SOON });
        }
        self.fresh = self.fresh.saturating_add(1);
        let length = after_login(jitter).pause(self.fresh - 1, draw);
        (self.fresh > 1).then_some(Pause { length, error: REJECTED_FRESH })
    }
}

impl Auth {
    /// Runs for ever; [`Auth::run`] ends it.
    pub(super) async fn keep(&self) -> Infallible {
        let registered = async {
            let mut forgotten = 0_u32;
            loop {
                let served = self.register().await;
                let logged_in = tokio::select! {
                    logged_in = self.renew() => logged_in,
                    never = self.refresh(served) => match never {},
                };
                forgotten = if logged_in { 1 } else { forgotten.saturating_add(1) };
                // A service that takes every registration and knows nobody is not asked without pause.
                if forgotten > 1 {
                    let pause = after_login(self.config.token_jitter).pause(forgotten - 1, rand::random());
                    if pause >= TOLD_FROM {
                        self.desk.failed("the sign-in service registers this node and then does not know it");
                    }
                    tokio::time::sleep(pause).await;
                }
            }
        };
        tokio::select! {
            never = registered => never,
            never = self.show_probes() => never,
        }
    }

    /// Logs in and renews until the service does not know the wallet any more; whether it ever did.
    async fn renew(&self) -> bool {
        let mut logged_in = false;
        let mut rejections = Rejections::default();
        while let Some(login) = self.log_in().await {
            let got = Instant::now();
            logged_in = true;
            // A lifetime beyond what a clock can hold is as good as a day.
            let ttl = login.ttl.min(Duration::from_secs(24 * 3600));
            let wait = renew_in(ttl, self.config.token_safety_ratio, self.config.token_jitter, rand::random());
            self.desk.hold(login.token, got + ttl);
            self.status.send_modify(|now| {
                now.token_expires_at = jiff::Timestamp::now().checked_add(ttl).ok();
                now.login_error = None;
            });
            tracing::debug!(ttl_ms = millis(ttl), renew_in_ms = millis(wait), "node token renewed");
            let due = tokio::select! {
                () = tokio::time::sleep_until(got + wait) => Due::Planned,
                taken = self.desk.rejected() => Due::Rejected { taken },
            };
            let Due::Rejected { taken } = due else {
                rejections = Rejections::default();
                continue;
            };
            self.status.send_modify(|now| now.token_expires_at = None);
            let jitter = self.config.token_jitter;
            // A token that was taken is replaced at once. Where fresh ones are rejected, a faster login does not help.
            if let Some(Pause { length, error }) = rejections.count(taken, got.elapsed(), jitter, rand::random()) {
                self.status.send_modify(|now| now.login_error = Some(error.to_owned()));
                tracing::warn!(event = "token.rejected", error, retry_in_ms = millis(length), "node token rejected");
                // The control plane may reject tokens because it does not know this node: a repeated
                // registration tells it. Once at first, then once every few minutes.
                if rejections.fresh % DOUBTED_EVERY == DOUBTED_FROM {
                    self.doubted.notify_one();
                }
                if length >= TOLD_FROM {
                    self.desk.failed(error);
                }
                tokio::time::sleep(length).await;
            }
        }
        logged_in
    }

    /// Attempts until a login works. `None`: the wallet is unknown and must be registered first.
    async fn log_in(&self) -> Option<Login> {
        let mut failures = 0_u32;
        self.desk.working();
        loop {
            let refusal = match self.dds.login().await {
                Ok(login) => return Some(login),
                Err(refusal) => refusal,
            };
            let error = refusal.to_string();
            if refusal.unknown_wallet() {
                tracing::warn!(event = "registration.lost", %error, "node is not registered any more");
                self.publish(RegistrationState::Disconnected, Some(error));
                return None;
            }
            failures = failures.saturating_add(1);
            let own = after_login(self.config.token_jitter).pause(failures, rand::random());
            let pause = pause_asked(own, refusal.retry_after(), RETRY_AFTER_MAX);
            tracing::warn!(event = "login.failed", %error, attempt = failures, retry_in_ms = millis(pause), "login failed");
            let error = format!("login failed {failures} times: {error}");
            self.status.send_modify(|now| now.login_error = Some(error.clone()));
            // Short pauses pass unseen. Beyond them users are told at once, and keep being told
            // while the service is asked again: nobody hangs on a service that is away.
            if failures > self.config.token_max_retries || pause >= TOLD_FROM {
                self.desk.failed(&error);
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                never = self.tell_the_rejected(&error) => match never {},
            }
        }
    }

    /// A token rejected while logins fail leaves nothing to wait for soon.
    async fn tell_the_rejected(&self, error: &str) -> Infallible {
        loop {
            self.desk.rejected().await;
            self.desk.failed(error);
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
    fn renewal_comes_at_the_ratio_within_its_jitter_and_never_after_the_end() {
        assert_eq!(renew_in(millis(100_000), 0.75, millis(0), 0.9), millis(75_000));
        assert_eq!(renew_in(millis(100_000), 0.75, millis(500), 0.0), millis(74_500));
        assert_eq!(renew_in(millis(100_000), 0.75, millis(500), 1.0), millis(75_500));
        assert_eq!(renew_in(millis(100_000), 7.0, millis(500), 1.0), millis(100_000));
        assert_eq!(renew_in(millis(100_000), f64::NAN, millis(0), 0.5), millis(75_000));
    }

    #[test]
    fn taken_tokens_are_replaced_at_once_and_fresh_ones_ever_later() {
        let (soon, long) = (millis(500), TOKEN_PROVEN);
        let mut rejections = Rejections::default();
        let mut pauses = |tokens: &[(bool, Duration)]| -> Vec<Option<u128>> {
            let pause = |(taken, lived): &(bool, Duration)| {
                rejections.count(*taken, *lived, millis(500), 1.0).map(|pause| pause.length.as_millis())
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
    fn a_ratio_or_lifetime_of_nothing_does_not_make_a_flood() {
        assert_eq!(renew_in(millis(100_000), 0.0, millis(500), 0.0), millis(1_000));
        assert_eq!(renew_in(millis(1), 0.75, millis(500), 1.0), LOGIN_GAP_MIN);
    }
}
