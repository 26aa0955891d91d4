//! The one task that registers, logs in and renews.
//!
//! Registration and renewal take turns in a single loop, so there is never more than one login
//! under way, and a wallet the service has forgotten is registered again before the next one.

use std::{convert::Infallible, time::Duration};

use tokio::time::Instant;

use super::{Auth, RegistrationState, siwe::Login};
use crate::model::millis;

/// Shortest time between two logins, whatever ratio, lifetime or rejections ask for.
const LOGIN_GAP_MIN: Duration = Duration::from_millis(100);
/// Longest pause between two failed logins, before its jitter.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// From this pause on, users without a token are told of the failure instead of kept waiting.
const TOLD_FROM: Duration = Duration::from_secs(5);
/// A token that lived this long was accepted by the control plane: its rejection is the first.
const TOKEN_PROVEN: Duration = Duration::from_secs(30);

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

/// The pause after failure number `count` in a row: doubling, jittered downwards by up to a half.
fn pause_after(count: u32, draw: f64) -> Duration {
    let grown = Duration::from_millis(250) * (1_u32 << count.saturating_sub(1).min(7));
    grown.min(PAUSE_MAX).mul_f64(1.0 - 0.5 * draw)
}

/// Why the wait for a renewal ended.
enum Due {
    Planned,
    Rejected,
}

impl Auth {
    /// Runs for ever; [`Auth::run`] ends it.
    pub(super) async fn keep(&self) -> Infallible {
        loop {
            self.register().await;
            self.renew().await;
        }
    }

    /// Logs in and renews until the service does not know the wallet any more.
    async fn renew(&self) {
        let mut rejections = 0_u32;
        while let Some(login) = self.log_in().await {
            let got = Instant::now();
            // A lifetime beyond what a clock can hold is as good as a day.
            let ttl = login.ttl.min(Duration::from_secs(24 * 3600));
            let wait = renew_in(ttl, self.config.token_safety_ratio, self.config.token_jitter, rand::random());
            self.desk.hold(login.token, got + ttl);
            tracing::debug!(ttl_ms = millis(ttl), renew_in_ms = millis(wait), "node token renewed");
            let due = tokio::select! {
                () = tokio::time::sleep_until(got + wait) => Due::Planned,
                () = self.desk.rejected() => Due::Rejected,
            };
            match due {
                Due::Planned => rejections = 0,
                Due::Rejected if got.elapsed() >= TOKEN_PROVEN => rejections = 1,
                Due::Rejected => rejections += 1,
            }
            // The first rejection may have any innocent cause. When fresh tokens are rejected
            // too, logging in faster does not help.
            if rejections > 1 {
                let pause = pause_after(rejections - 1, rand::random());
                let error = "the control plane rejects fresh node tokens";
                tracing::warn!(error, retry_in_ms = millis(pause), "node token rejected");
                if pause >= TOLD_FROM {
                    self.desk.failed(error);
                }
                tokio::time::sleep(pause).await;
            }
        }
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
                tracing::warn!(%error, "node is not registered any more");
                self.publish(RegistrationState::Disconnected, Some(error));
                return None;
            }
            failures = failures.saturating_add(1);
            let pause = pause_after(failures, rand::random()).max(refusal.retry_after().unwrap_or_default());
            tracing::warn!(%error, attempt = failures, retry_in_ms = millis(pause), "login failed");
            let error = format!("login failed {failures} times: {error}");
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
    fn a_ratio_or_lifetime_of_nothing_does_not_make_a_flood() {
        assert_eq!(renew_in(millis(100_000), 0.0, millis(500), 0.0), millis(1_000));
        assert_eq!(renew_in(millis(1), 0.75, millis(500), 1.0), LOGIN_GAP_MIN);
    }

    #[test]
    fn pauses_grow_to_their_bound() {
        let grown: Vec<u128> = (1..=9).map(|n| pause_after(n, 0.0).as_millis()).collect();
        assert_eq!(grown, [250, 500, 1000, 2000, 4000, 8000, 16000, 30000, 30000]);
        assert_eq!(pause_after(1, 1.0), millis(125));
        assert_eq!(pause_after(u32::MAX, 1.0), PAUSE_MAX / 2);
    }
}
