//! The wallet's registration: what is visible of it, and the pauses between its attempts
//! (posemesh contract 2.5 and 2.6).

use std::{fmt, time::Duration};

use jiff::Timestamp;
use serde::Serialize;

use super::{
    Auth,
    siwe::{Class, Refusal},
};
use crate::model::millis;

/// Longest pause after a transient failure, before its jitter.
const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// How often a registration that cannot succeed by itself is worth a warning.
const WARN_EVERY: Duration = Duration::from_secs(180);

/// Where the registration stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RegistrationState {
    /// Not registered; the last attempt was refused, or none was made.
    #[default]
    Disconnected,
    /// Being registered, or tried again soon.
    Registering,
    /// Registered.
    Registered,
    /// Another node with this wallet is online.
    Conflict,
}

impl fmt::Display for RegistrationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disconnected => "disconnected",
            Self::Registering => "registering",
            Self::Registered => "registered",
            Self::Conflict => "conflict",
        })
    }
}

/// The registration for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Registration {
    /// Where it stands.
    pub state: RegistrationState,
    /// Since when.
    pub since: Timestamp,
    /// Why the last attempt failed, one line; `None` while all is well.
    pub error: Option<String>,
}

impl Default for Registration {
    fn default() -> Self {
        Self { state: RegistrationState::default(), since: Timestamp::now(), error: None }
    }
}

/// The pauses between attempts. Pure: the draw of the jitter is passed in.
#[derive(Debug)]
struct Pauses {
    interval: Duration,
    cap: i32,
    transient: u32,
}

impl Pauses {
    /// The pause after a failure of `class`. `draw` lies in 0..1.
    fn after(&mut self, class: Class, draw: f64) -> Duration {
        if class != Class::Transient {
            self.transient = 0;
            return self.interval;
        }
        self.transient += 1;
        if u32::try_from(self.cap).is_ok_and(|cap| self.transient >= cap) {
            self.transient = 0;
            return self.interval;
        }
        let grown = Duration::from_secs(1 << self.transient.min(6)).min(BACKOFF_MAX);
        grown.mul_f64(0.8 + 0.4 * draw)
    }
}

impl Auth {
    /// Attempts until the wallet is registered.
    pub(super) async fn register(&self) {
        let mut pauses = Pauses {
            interval: self.config.register_interval.max(Duration::from_secs(1)),
            cap: self.config.register_max_retry,
            transient: 0,
        };
        let names: Vec<String> = self.config.capabilities.iter().map(ToString::to_string).collect();
        let mut warned: Option<tokio::time::Instant> = None;
        self.desk.working();
        loop {
            self.publish(RegistrationState::Registering, None);
            let failed = if names.is_empty() {
                (Class::Slow, None, "there is no capability to register; load a plugin".to_owned())
            } else {
                match self.dds.register(&names, &self.config.version).await {
                    Ok(()) => {
                        self.publish(RegistrationState::Registered, None);
                        tracing::info!(
                            address = self.config.key.address(),
                            capabilities = names.len(),
                            "node registered"
                        );
                        return;
                    }
                    Err(refusal) => (refusal.class(), refusal.retry_after(), describe(&refusal)),
                }
            };
            let (class, retry_after, error) = failed;
            let pause = pauses.after(class, rand::random()).max(retry_after.unwrap_or_default());
            let state = match class {
                Class::Conflict => RegistrationState::Conflict,
                Class::Transient => RegistrationState::Registering,
                Class::Slow => RegistrationState::Disconnected,
            };
            let loud = class == Class::Transient || warned.is_none_or(|at| at.elapsed() >= WARN_EVERY);
            if loud {
                warned = (class != Class::Transient).then(tokio::time::Instant::now);
                tracing::warn!(%error, %state, retry_in_ms = millis(pause), "registration failed");
            } else {
                tracing::debug!(%error, %state, retry_in_ms = millis(pause), "registration failed");
            }
            self.desk.failed(&format!("not registered: {error}"));
            self.publish(state, Some(error));
            tokio::time::sleep(pause).await;
        }
    }

    pub(super) fn publish(&self, state: RegistrationState, error: Option<String>) {
        self.status.send_modify(|now| {
            if now.state != state {
                now.since = Timestamp::now();
                now.state = state;
            }
            // While an attempt is under way the last failure is still the news.
            if error.is_some() || state == RegistrationState::Registered {
                now.error = error;
            }
        });
    }
}

fn describe(refusal: &Refusal) -> String {
    match refusal.class() {
        Class::Conflict => format!("another node with this wallet is online; {refusal}"),
        _ => refusal.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(cap: i32, failures: &str, expected: &str) {
        let mut pauses = Pauses { interval: Duration::from_secs(120), cap, transient: 0 };
        let seen: Vec<String> = failures
            .chars()
            .map(|letter| {
                let class = match letter {
                    't' => Class::Transient,
                    'c' => Class::Conflict,
                    _ => Class::Slow,
                };
                pauses.after(class, 0.5).as_secs().to_string()
            })
            .collect();
        assert_eq!(seen.join(" "), expected, "cap {cap}, failures {failures}");
    }

    #[test]
    fn transient_failures_grow_and_others_wait_the_interval() {
        check(-1, "ttttttttt", "2 4 8 16 32 60 60 60 60");
        check(-1, "ttstct", "2 4 120 2 120 2");
        check(0, "ttt", "120 120 120");
        check(3, "tttttt", "2 4 120 2 4 120");
    }

    #[test]
    fn the_jitter_stays_within_a_fifth() {
        for (draw, expected) in [(0.0, 1.6), (1.0, 2.4)] {
            let mut pauses = Pauses { interval: Duration::from_secs(120), cap: -1, transient: 0 };
            assert!((pauses.after(Class::Transient, draw).as_secs_f64() - expected).abs() < 1e-9);
        }
    }
}
