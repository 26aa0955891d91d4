//! The lease service over gRPC.
//!
//! As in the original, `success = false` answers every call that has no effect. A gRPC status answers only Pull.

use std::{pin::pin, sync::Arc};

use async_trait::async_trait;
use futures_util::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use jiff::Timestamp;
use serde_json::json;
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
pub(super) struct Leases(pub(super) Arc<Inner>);

/// An open stream of leases.
struct Puller {
    server: Arc<Inner>,
    node: Arc<str>,
    key: Uuid,
    max: usize,
}

impl Puller {
    /// Waits for the next lease, or for the end of the stream.
    async fn next(&self) -> Result<Lease, Status> {
        loop {
            // Subscribe before the look, so that no change between the two is missed.
            let mut changed = pin!(self.server.changed.notified());
            changed.as_mut().enable();
            let schedulable = self.server.nodes().schedulable(&self.node);
            match schedulable {
                Schedulable::Unknown => return Err(Status::not_found("the node is not registered")),
                Schedulable::No => {}
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
                () = self.server.stop.cancelled() => return Err(Status::unavailable("the dev server stops")),
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
        if self.0.nodes().schedulable(&node_id) == Schedulable::Unknown {
            // The original ends the stream here without an error, which lets its workers loop.
            return Err(Status::not_found("the node is not registered"));
        }
        let puller = Puller { server: self.0.clone(), key: nodes::key(&node_id), node: node_id.into(), max };
        let leases = stream::unfold(Some(puller), |puller| async {
            let puller = puller?;
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
        let answer = named(&lease_id, None, &node_id).ok_or(CallRefusal::Unknown);
        let answer = answer.and_then(|(run, by)| self.0.plane().acknowledge(run, by, self.0.now()));
        self.0.changed();
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
        let answer = named(&lease_id, Some(&run_id), &node_id).ok_or(CallRefusal::Unknown);
        let answer = answer.and_then(|(run, by)| self.0.plane().complete_run(run, by, report, bytes, self.0.now()));
        self.0.changed();
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
        let answer = named(&lease_id, Some(&run_id), &node_id).ok_or(CallRefusal::Unknown);
        let answer = answer.and_then(|(run, by)| {
            let mut plane = self.0.plane();
            plane.fail(run, by, report, retryable, self.0.now())?;
            Ok(plane.is_queued(run))
        });
        self.0.changed();
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
