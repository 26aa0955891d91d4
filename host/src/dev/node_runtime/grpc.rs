//! The lease service over gRPC.
//!
//! As in the original, `success = false` answers every call that has no effect. A gRPC status answers only Pull.
//! `Config::origin` selects the other behaviour of the original.

use std::{pin::pin, sync::Arc};

use async_trait::async_trait;
use futures_util::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use jiff::Timestamp;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::{
    nodes::{self, Schedulable},
    runs::Description,
};
use crate::{
    dev::{
        Inner,
        plane::{CallRefusal, Holder, runs::Offer},
    },
    leases::node_runtime::lease::{
        AckRequest, AckResponse, CompleteRequest, CompleteResponse, CostInfo, FailRequest, FailResponse, Lease,
        PullRequest, TimingInfo, lease_service_server::LeaseService,
    },
};

/// See the module documentation.
pub(super) struct Leases {
    pub(super) server: Arc<Inner>,
    /// Ends the connection of the call.
    pub(super) close: CancellationToken,
    pub(super) fault: CallFault,
}

/// What a fault rule changes in a call.
#[derive(Default)]
pub(in crate::dev) struct CallFault {
    pub(in crate::dev) before: Option<BeforeCall>,
    pub(in crate::dev) limit: Option<LeaseLimit>,
}

/// What happens to the run or the node that the call names, before the call is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::dev) enum BeforeCall {
    /// The run is queued again.
    SecondLease,
    /// Another node holds the run.
    StealLease,
    /// The node is not registered any more.
    ForgetNode,
}

/// A stream offers no lease after `count` leases.
#[derive(Clone)]
pub(in crate::dev) struct LeaseLimit {
    pub(in crate::dev) count: u64,
    /// Cancelled after the last of them.
    pub(in crate::dev) reached: CancellationToken,
}

/// An open stream of leases.
struct Puller {
    server: Arc<Inner>,
    node: Arc<str>,
    key: Uuid,
    max: usize,
    close: CancellationToken,
    limit: Option<LeaseLimit>,
}

impl Puller {
    /// Waits for the next lease, or for the end of the stream.
    async fn next(&mut self) -> Result<Lease, Status> {
        if let Some(limit) = &mut self.limit {
            if limit.count == 0 {
                limit.reached.cancel();
                std::future::pending::<()>().await;
            }
            limit.count -= 1;
        }
        loop {
            // Subscribe before the look, so that no change between the two is missed.
            let mut changed = pin!(self.server.changed.notified());
            changed.as_mut().enable();
            let schedulable = self.server.nodes().schedulable(&self.node);
            match schedulable {
                Schedulable::Unknown if !self.server.config.origin => {
                    return Err(Status::not_found("the node is not registered"));
                }
                Schedulable::Unknown | Schedulable::No => {}
                Schedulable::Yes => {
                    let now = self.server.now();
                    let offer = self.server.plane().offer(self.key, &self.node, self.max, now);
                    if let Some(offer) = offer {
                        tracing::debug!(task_id = %offer.run, "offered");
                        return Ok(self.lease(&offer, now));
                    }
                }
            }
            tokio::select! {
                () = changed => {}
                () = self.close.cancelled() => return Err(match self.server.config.origin {
                    true => Status::cancelled("Request was cancelled"),
                    false => Status::unavailable("the connection ends"),
                }),
            }
        }
    }

    fn lease(&self, offer: &Offer, now: Timestamp) -> Lease {
        let mut description = Description::of(offer.fields());
        description.add_token(&self.server, || self.server.task_token(offer.run, &offer.token, self.key, now));
        Lease {
            lease_id: format!("{}{}", lease_prefix(offer.run), offer.lease.simple()),
            run_id: offer.run.to_string(),
            trace_id: description.trace_id(),
            run_spec: Some(description.into_spec()),
            deadline_unix_ms: offer.deadline.as_millisecond(),
        }
    }
}

fn lease_prefix(run: Uuid) -> String {
    format!("lease-{run}-")
}

/// The run and the holder that a call names.
fn named(lease: &str, run: Option<&str>, node: &str) -> Option<(Uuid, Holder)> {
    let run = match run {
        Some(run) => Uuid::parse_str(run).ok()?,
        None => Uuid::parse_str(lease.strip_prefix("lease-")?.get(..36)?).ok()?,
    };
    let lease = Uuid::parse_str(lease.strip_prefix(&lease_prefix(run))?).ok()?;
    Some((run, Holder { node: nodes::key(node), lease: Some(lease) }))
}

/// The first of these fields that is blank.
fn blank(fields: &[(&str, &str)]) -> Option<String> {
    let (name, _) = fields.iter().find(|(_, value)| value.trim().is_empty())?;
    Some(format!("{name} is required"))
}

/// Why a report has no effect, in the words of the original and ours.
fn refusal(what: &str, refusal: &CallRefusal) -> String {
    match refusal {
        CallRefusal::Unknown => format!("{what}: there is no such run"),
        CallRefusal::NotHeld => format!("{what}: the lease has ended, or belongs to another node"),
    }
}

impl Leases {
    /// The run and the holder that a call names.
    fn named(&self, lease: &str, run: Option<&str>, node: &str) -> Result<(Uuid, Holder), CallRefusal> {
        let (run, by) = match run {
            // The original compares only the node.
            Some(run) if self.server.config.origin => {
                let run = Uuid::parse_str(run).map_err(|_| CallRefusal::Unknown)?;
                (run, Holder::from(nodes::key(node)))
            }
            run => named(lease, run, node).ok_or(CallRefusal::Unknown)?,
        };
        match self.fault.before {
            Some(BeforeCall::SecondLease) => self.server.plane().queue_again(run, self.server.now()),
            Some(BeforeCall::StealLease) => self.server.plane().steal(run, self.server.now()),
            Some(BeforeCall::ForgetNode) | None => {}
        }
        Ok((run, by))
    }
}

#[async_trait]
impl LeaseService for Leases {
    type PullStream = BoxStream<'static, Result<Lease, Status>>;

    async fn pull(&self, request: Request<PullRequest>) -> Result<Response<Self::PullStream>, Status> {
        let PullRequest { node_id, max_leases } = request.into_inner();
        if let Some(message) = blank(&[("NodeId", &node_id)]) {
            return Err(Status::invalid_argument(message));
        }
        let max = usize::try_from(max_leases).ok().filter(|max| *max > 0);
        let max = max.ok_or_else(|| Status::invalid_argument("MaxLeases must be greater than 0"))?;
        if self.fault.before == Some(BeforeCall::ForgetNode) {
            self.server.nodes().remove(&node_id);
        }
        if self.server.nodes().schedulable(&node_id) == Schedulable::Unknown {
            if self.server.config.origin {
                return Ok(Response::new(stream::empty().boxed()));
            }
            return Err(Status::not_found("the node is not registered"));
        }
        let puller = Puller {
            server: self.server.clone(),
            key: nodes::key(&node_id),
            node: node_id.into(),
            max,
            close: self.close.clone(),
            limit: self.fault.limit.clone(),
        };
        let leases = stream::unfold(Some(puller), |puller| async {
            let mut puller = puller?;
            let next = puller.next().await;
            let rest = next.is_ok().then_some(puller);
            Some((next, rest))
        });
        Ok(Response::new(leases.boxed()))
    }

    async fn ack(&self, request: Request<AckRequest>) -> Result<Response<AckResponse>, Status> {
        let AckRequest { lease_id, node_id, .. } = request.into_inner();
        if let Some(message) = blank(&[("LeaseId", &lease_id), ("NodeId", &node_id)]) {
            return Ok(Response::new(AckResponse { success: false, message }));
        }
        let answer = self.named(&lease_id, None, &node_id);
        let answer = match self.server.config.origin {
            true => Ok(()),
            false => answer.and_then(|(run, by)| self.server.plane().acknowledge(run, by, self.server.now())),
        };
        self.server.changed();
        Ok(Response::new(match answer {
            Ok(()) => AckResponse { success: true, message: "Lease acknowledged".to_owned() },
            Err(err) => AckResponse { success: false, message: refusal("Lease not acknowledged", &err) },
        }))
    }

    async fn complete(&self, request: Request<CompleteRequest>) -> Result<Response<CompleteResponse>, Status> {
        let CompleteRequest { lease_id, run_id, node_id, result, timings, costs } = request.into_inner();
        if let Some(message) = blank(&[("LeaseId", &lease_id), ("RunId", &run_id), ("NodeId", &node_id)]) {
            return Ok(Response::new(CompleteResponse { success: false, message }));
        }
        let bytes = result.iter().map(|(name, value)| name.len() + value.len()).sum();
        let report = json!({ "result": result, "timings": times(timings), "costs": spent(costs) });
        let answer = self.named(&lease_id, Some(&run_id), &node_id);
        let answer =
            answer.and_then(|(run, by)| self.server.plane().complete_run(run, by, report, bytes, self.server.now()));
        self.server.changed();
        Ok(Response::new(match answer {
            Ok(()) => CompleteResponse { success: true, message: "Run completed successfully".to_owned() },
            Err(err) => CompleteResponse { success: false, message: refusal("Failed to complete run", &err) },
        }))
    }

    async fn fail(&self, request: Request<FailRequest>) -> Result<Response<FailResponse>, Status> {
        let FailRequest { lease_id, run_id, node_id, error_message, error_details, timings, retryable } =
            request.into_inner();
        if let Some(message) = blank(&[("LeaseId", &lease_id), ("RunId", &run_id), ("NodeId", &node_id)]) {
            return Ok(Response::new(FailResponse { success: false, message, should_retry: false }));
        }
        let report = json!({ "reason": error_message, "details": error_details, "timings": times(timings) });
        let answer = self.named(&lease_id, Some(&run_id), &node_id);
        let answer = answer.and_then(|(run, by)| {
            let (mut plane, origin) = (self.server.plane(), self.server.config.origin);
            plane.fail(run, by, report, retryable && !origin, self.server.now())?;
            Ok(if origin { retryable } else { plane.is_queued(run) })
        });
        self.server.changed();
        Ok(Response::new(match answer {
            Ok(should_retry) => {
                FailResponse { success: true, message: "Run failure processed".to_owned(), should_retry }
            }
            Err(err) => {
                let message = refusal("Failed to process run failure", &err);
                FailResponse { success: false, message, should_retry: false }
            }
        }))
    }
}

fn times(timings: Option<TimingInfo>) -> serde_json::Value {
    let TimingInfo { duration_ms, queue_time_ms, execution_time_ms } = timings.unwrap_or_default();
    json!({ "duration_ms": duration_ms, "queue_time_ms": queue_time_ms, "execution_time_ms": execution_time_ms })
}

fn spent(costs: Option<CostInfo>) -> serde_json::Value {
    let CostInfo { tokens_in, tokens_out, usd_cost } = costs.unwrap_or_default();
    json!({ "tokens_in": tokens_in, "tokens_out": tokens_out, "usd_cost": usd_cost })
}
