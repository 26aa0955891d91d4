//! A runner that waits and completes. It serves to measure and test the rest of the system.

use std::time::Duration;

use runner_sdk::{Error, Runner, TaskCtx, export_runner};
use serde::Deserialize;
use serde_json::json;

/// Serves `/examples/noop/v1`.
pub struct Noop {
    sleep: Duration,
    fetch_inputs: bool,
}

/// The plugin's config.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The duration of a task in seconds. Fractions are allowed.
    #[serde(default = "five_seconds")]
    sleep_secs: f64,
    /// Whether a task downloads its inputs to disk before the wait, one after the other.
    #[serde(default)]
    fetch_inputs: bool,
}

fn five_seconds() -> f64 {
    5.0
}

impl Noop {
    /// Creates the runner from its config.
    ///
    /// # Errors
    /// When `sleep_secs` is negative or not a number of seconds.
    pub fn new(config: Config) -> Result<Self, Error> {
        let sleep = Duration::try_from_secs_f64(config.sleep_secs)
            .map_err(|err| Error::msg(format!("config: sleep_secs = {}: {err}", config.sleep_secs)))?;
        Ok(Self { sleep, fetch_inputs: config.fetch_inputs })
    }
}

impl Runner for Noop {
    const CAPABILITY: &'static str = "/examples/noop/v1";

    async fn run(&self, ctx: TaskCtx) -> Result<(), Error> {
        if self.fetch_inputs {
            for cid in &ctx.lease.task.inputs_cids {
                ctx.input.materialize_cid_to_temp(cid).await?;
            }
        }
        if self.sleep.is_zero() {
            // Even a sleep of zero waits for the timer's next millisecond.
            return Ok(());
        }
        tokio::select! {
            () = tokio::time::sleep(self.sleep) => Ok(()),
            reason = ctx.ctrl.cancelled() => Err(Error::msg(format!("cancelled: {reason:?}")).details(json!({ "slept": false }))),
        }
    }
}

export_runner!(Noop: Noop::new);

#[cfg(test)]
mod tests {
    use runner_sdk::{CancelReason, testing::TestHost};

    use super::*;

    fn noop(sleep_secs: f64) -> Result<Noop, Error> {
        Noop::new(Config { sleep_secs, fetch_inputs: false })
    }

    #[test]
    fn noop_completes_without_artifacts() {
        let ended = TestHost::new().run_blocking(&noop(0.0).expect("a config"));
        assert!(ended.is_ok() && ended.outputs().is_empty());
    }

    #[test]
    fn noop_stops_on_cancel() {
        let host = TestHost::new();
        host.cancel(CancelReason::Plane);
        let ended = host.run_blocking(&noop(3600.0).expect("a config"));
        assert_eq!(ended.error().chain(), "cancelled: Plane");
    }

    #[test]
    fn config_makes_noop_fetch_inputs() {
        let runs = |fetch_inputs, host: TestHost| {
            let noop = Noop::new(Config { sleep_secs: 0.0, fetch_inputs }).expect("a config");
            host.run_blocking(&noop).is_ok()
        };
        let missing = || TestHost::new().lease(|lease| lease.task.inputs_cids.push("d-1".to_owned()));
        assert!(runs(true, TestHost::new().input("d-1", b"some")));
        assert!(!runs(true, missing()), "an input that is not there is noticed");
        assert!(runs(false, missing()));
    }

    #[test]
    fn negative_sleep_is_refused() {
        assert!(noop(-1.0).is_err_and(|err| err.chain().contains("sleep_secs = -1")));
    }
}
