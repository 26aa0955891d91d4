//! Progress, events, cancellation, token, usage.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Port, PortError, PortErrorKind};
use crate::host_calls::{Answer, Call};

/// Why a task should stop.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CancelReason {
    /// The control plane asked for it.
    Plane,
    /// The lease expired or belongs to another node. Nothing can be published.
    LeaseLost,
    /// The node shuts down.
    Drained,
    /// The run passed its time limit.
    Deadline,
    /// The run used more than its budget, such as its tokens.
    Budget,
    /// The operator stopped the run.
    Operator,
    /// The task has ended: `run` has returned, and this context outlived it.
    TaskOver,
    /// A reason that this version does not know.
    Other(String),
}

impl CancelReason {
    pub(crate) fn from_word(word: &str) -> Self {
        match word {
            "plane" => Self::Plane,
            "lease-lost" => Self::LeaseLost,
            "drained" => Self::Drained,
            "deadline" => Self::Deadline,
            "budget" => Self::Budget,
            "operator" => Self::Operator,
            "task-over" => Self::TaskOver,
            other => Self::Other(other.to_owned()),
        }
    }
}

/// What a run has used since its last report: tokens of a language model, and what they cost.
///
/// ```
/// let usage = runner_sdk::Usage::tokens(1200, 340).usd_cost(0.0031);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
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
    /// Tokens that were sent to a model and that it produced. Without cost.
    #[must_use]
    pub fn tokens(tokens_in: u64, tokens_out: u64) -> Self {
        Self { tokens_in, tokens_out, usd_cost: 0.0 }
    }

    /// Sets the cost in US dollars.
    #[must_use]
    pub fn usd_cost(self, usd_cost: f64) -> Self {
        Self { usd_cost, ..self }
    }
}

/// How long a run may still take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TimeLeft {
    /// Until the lease ends, if no more heartbeat extends it. `None` if the control plane has not sent its end.
    pub lease: Option<Duration>,
    /// Until the run is cancelled because it has reached its time limit. `None` without a limit.
    pub limit: Option<Duration>,
}

impl TimeLeft {
    /// What is left of the lease and of the time limit.
    #[must_use]
    pub fn new(lease: Option<Duration>, limit: Option<Duration>) -> Self {
        Self { lease, limit }
    }
}

/// A task's connection to the control plane. Cheap to clone.
#[derive(Clone)]
pub struct ControlPlane {
    port: Arc<dyn Port>,
}

impl ControlPlane {
    pub(crate) fn new(port: Arc<dyn Port>) -> Self {
        Self { port }
    }

    /// Replaces the task's progress with `value`, any JSON of at most 64 KiB. The next heartbeat
    /// sends the latest value to the control plane. Other values are not sent.
    ///
    /// # Errors
    /// `Limit` when the value is too large, `TaskOver`, or `BadRequest` when it does not serialise.
    pub async fn progress(&self, value: impl Serialize) -> Result<(), PortError> {
        let call = Call::Progress(json(&value)?);
        self.port.call(call).await.map(drop)
    }

    /// Appends an event, any JSON of at most 64 KiB. Events reach the control plane in order, at least once. When too
    /// many wait to be sent, this call waits for a free place.
    ///
    /// # Errors
    /// `Limit` when the event is too large, `TaskOver`, or `BadRequest` when it does not serialise.
    pub async fn log_event(&self, value: impl Serialize) -> Result<(), PortError> {
        let call = Call::Event(json(&value)?);
        self.port.call(call).await.map(drop)
    }

    /// Adds to what the run has used. A Node Runtime control plane gets the sum with the report. If the run has a
    /// budget of tokens and uses more, it is cancelled ([`CancelReason::Budget`]) and fails.
    ///
    /// # Errors
    /// `BadRequest` when the cost is negative or no number, or `TaskOver`.
    pub async fn usage(&self, usage: Usage) -> Result<(), PortError> {
        let call = Call::Usage(json(&usage)?);
        self.port.call(call).await.map(drop)
    }

    /// How long the run may still take, as known now. Heartbeats extend the lease, so ask again later.
    ///
    /// # Errors
    /// `TaskOver`.
    pub async fn time_left(&self) -> Result<TimeLeft, PortError> {
        #[derive(Deserialize)]
        struct Left {
            lease_ms: Option<u64>,
            limit_ms: Option<u64>,
        }
        let Left { lease_ms, limit_ms } = decode(&self.port.call(Call::TimeLeft).await?.data)?;
        let left = |ms: Option<u64>| ms.map(Duration::from_millis);
        Ok(TimeLeft { lease: left(lease_ms), limit: left(limit_ms) })
    }

    /// Whether the task should stop. Also true after the task's end. Only reads a flag, so it is cheap enough
    /// for an inner loop. A loop that only waits would occupy a core: it uses
    /// [`Self::wait_cancelled`] or awaits [`Self::cancelled`].
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.port.stop_signal().is_set()
    }

    /// Blocks the calling thread until the task should stop, at most for `limit`. Returns [`Self::is_cancelled`].
    /// It is for loops on threads, such as one that waits for a child process. Async code awaits
    /// [`Self::cancelled`].
    #[must_use]
    pub fn wait_cancelled(&self, limit: Duration) -> bool {
        Arc::clone(self.port.stop_signal()).wait_for(limit)
    }

    /// Waits until the task should stop, and returns the reason. After the task's end the answer is
    /// [`CancelReason::TaskOver`].
    pub async fn cancelled(&self) -> CancelReason {
        let signal = self.port.stop_signal();
        Arc::clone(signal).wait().await;
        if signal.is_over() {
            return CancelReason::TaskOver;
        }
        match self.port.call(Call::CancelReason).await {
            Ok(word) => CancelReason::from_word(&String::from_utf8_lossy(&word.data)),
            Err(err) if err.kind() == PortErrorKind::TaskOver => CancelReason::TaskOver,
            Err(err) => CancelReason::Other(err.to_string()),
        }
    }

    /// The reason, once [`Self::is_cancelled`] is true.
    pub async fn cancel_reason(&self) -> Option<CancelReason> {
        if self.is_cancelled() { Some(self.cancelled().await) } else { None }
    }

    /// The newest token for the task's domain server. Call it before each use: the token changes during long tasks.
    ///
    /// # Errors
    /// `Unsupported` unless the operator set `grant = ["token"]` for this plugin.
    pub async fn token(&self) -> Result<String, PortError> {
        Ok(self.token_with_expiry().await?.0)
    }

    /// As [`Self::token`], with the time when the token expires, if the control plane sends it.
    ///
    /// # Errors
    /// As [`Self::token`].
    pub async fn token_with_expiry(&self) -> Result<(String, Option<SystemTime>), PortError> {
        let Answer { number, data } = self.port.call(Call::Token).await?;
        let expires = if number == 0 { None } else { UNIX_EPOCH.checked_add(Duration::from_secs(number)) };
        Ok((utf8(data)?, expires))
    }
}

pub(super) fn json(value: &impl Serialize) -> Result<String, PortError> {
    serde_json::to_string(value)
        .map_err(|err| PortError::new(PortErrorKind::BadRequest, format!("value does not serialise to JSON: {err}")))
}

pub(super) fn utf8(text: Bytes) -> Result<String, PortError> {
    String::from_utf8(text.into())
        .map_err(|_| PortError::new(PortErrorKind::Malformed, "the host answered with bytes that are not UTF-8"))
}

/// Decodes an answer that is JSON by contract.
pub(super) fn decode<T: serde::de::DeserializeOwned>(json: &Bytes) -> Result<T, PortError> {
    serde_json::from_slice(json)
        .map_err(|err| PortError::new(PortErrorKind::Malformed, format!("the host's answer does not parse: {err}")))
}
