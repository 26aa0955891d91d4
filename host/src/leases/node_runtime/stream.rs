//! The stream of leases: opened again after each end, and read only while this node accepts another lease.

use std::{pin::pin, sync::Arc, time::Duration};

use jiff::Timestamp;
use serde_json::json;
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, oneshot},
    task::JoinSet,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};
use tracing::{Instrument as _, debug, info, warn};
use url::Url;

use super::{
    Shared,
    domain_data::DomainData,
    incoming::{self, Ids, Unusable},
    lease::{self, AckRequest, PullRequest},
    outstanding::{Adopted, Next},
    report,
};
use crate::model::{Backoff, EmptyList, Jitter, Lease, Timings, millis};

/// A stream that lived this long was not a failure.
const ALIVE: Duration = Duration::from_secs(30);
/// Fewer ends in a row do not affect readiness.
const FAILURES_SHOWN: u32 = 2;
/// A stream without a lease for this long is opened again: the control plane may have forgotten it.
const IDLE_MAX: Duration = Duration::from_secs(600);
/// Longest pause before the stream is opened again, without jitter.
const PAUSE_SECS_MAX: u64 = 60;
/// How long leases are still read after the node has said that it drains.
const LAST_READS: Duration = Duration::from_secs(2);
/// The last reads end when nothing has arrived for this long.
const LAST_READS_IDLE: Duration = Duration::from_millis(250);
/// The pause after a lease without usable ids.
const WITHOUT_IDS_PAUSE: Duration = Duration::from_millis(100);
/// How often the failure of a run that did not start is sent.
const FAILURES_MAX: u32 = 3;
/// The pauses between these tries.
const FAILURE_PAUSES: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(1), Jitter::Fifth);
/// Most calls about leases that are under way.
const CALLS_MAX: usize = 64;
/// Why an expired lease is returned.
const EXPIRED: &str = "the deadline had passed when the lease arrived";
/// Why a lease is returned after the node has said that it drains.
const DRAINS: &str = "the node stops";
/// How long a cancelled stream may take to tell the control plane.
const CANCEL_TIME: Duration = Duration::from_millis(50);

/// How a stream ended.
enum End {
    /// The node drains or stops.
    Quiet,
    /// The control plane may not know the node: it said so, or ended the stream without an error. One line.
    Unknown(String),
    /// Nothing arrived for a long time.
    Idle,
    /// It failed. One line.
    Broken(String),
}

/// The permissions to read one more lease.
struct Room<'a> {
    permit: OwnedSemaphorePermit,
    place: mpsc::Permit<'a, Lease>,
}

/// A lease whose run does not start here.
struct Returned {
    ids: Ids,
    /// Why, one line.
    reason: String,
    retryable: bool,
    /// It counts as accepted until the control plane knows.
    permit: Option<OwnedSemaphorePermit>,
}

impl Returned {
    fn new(ids: Ids, reason: impl Into<String>, retryable: bool) -> Self {
        Self { ids, reason: reason.into(), retryable, permit: None }
    }
}

impl Shared {
    /// Keeps the stream open until the node drains or stops.
    pub(super) async fn keep_stream(self: &Arc<Self>, stop: &CancellationToken) {
        let (mut calls, mut failures) = (JoinSet::new(), 0_u32);
        loop {
            let (began, mut received) = (Instant::now(), false);
            let end = tokio::select! {
                // A stop follows a drain. This one ends a node that never began to lease.
                () = stop.cancelled(), if !self.quiet.is_cancelled() => End::Quiet,
                end = self.pull(&mut calls, &mut received) => end,
            };
            if received || began.elapsed() >= ALIVE {
                failures = 0;
            }
            let (error, unknown) = match end {
                End::Quiet => break,
                End::Idle => {
                    debug!("stream of leases was idle, it is opened again");
                    continue;
                }
                End::Unknown(error) => (error, true),
                End::Broken(error) => (error, false),
            };
            failures = failures.saturating_add(1);
            if failures >= FAILURES_SHOWN {
                let problem = format!("the stream of leases ended {failures} times: {error}");
                self.change_problems(|problems| problems.stream = Some(problem));
            }
            let pause = pause(failures, rand::random());
            warn!(
                event = "stream.ended",
                error,
                retry_in_ms = millis(pause),
                "stream of leases ended, it is opened again"
            );
            let again = async {
                if unknown {
                    self.register().await;
                }
                // A heartbeat may find out that the node is unknown, and register it.
                let _ = timeout(pause, self.registrations.subscribe().changed()).await;
            };
            tokio::select! {
                () = stop.cancelled() => break,
                () = self.quiet.cancelled() => break,
                () = again => {}
            }
        }
        if self.quiet.is_cancelled() {
            self.return_waiting(&mut calls).await;
        }
        // The calls give up by themselves, but a stop is not that patient.
        let ended = timeout(LAST_READS, async { while calls.join_next().await.is_some() {} }).await;
        if ended.is_err() {
            debug!(calls = calls.len(), "calls about leases were not answered in time");
        }
    }

    /// Reads one stream to its end.
    async fn pull(self: &Arc<Self>, calls: &mut JoinSet<()>, received: &mut bool) -> End {
        let opened = tokio::select! {
            biased;
            () = self.quiet.cancelled() => return End::Quiet,
            opened = self.connect() => opened,
        };
        let (connection, mut wire) = match opened {
            Ok(opened) => opened,
            Err(error) => return End::Broken(error),
        };
        let max_leases = i32::try_from(self.config.max_concurrent_leases).unwrap_or(i32::MAX);
        let mut opening = Box::pin(wire.pull(PullRequest { node_id: self.config.node_id.clone(), max_leases }));
        // Some servers send the head of the answer with the first lease only.
        let opened = {
            let mut patient = pin!(timeout(IDLE_MAX, &mut opening));
            tokio::select! {
                opened = &mut patient => Some(opened),
                () = self.quiet.cancelled() => None,
                () = async {
                    sleep(ALIVE).await;
                    self.stream_lives();
                    std::future::pending().await
                } => None,
            }
        };
        let opened = match opened {
            Some(opened) => opened,
            None => timeout(LAST_READS_IDLE, &mut opening).await,
        };
        drop(opening);
        let mut stream = match opened {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => return self.ended(&status),
            Err(_) if self.quiet.is_cancelled() => return cancelled(connection).await,
            Err(_) => return End::Idle,
        };
        self.stream_lives();
        loop {
            let room = tokio::select! {
                biased;
                () = self.quiet.cancelled() => break,
                room = self.room() => room,
            };
            let message = tokio::select! {
                biased;
                () = self.quiet.cancelled() => break,
                message = timeout(IDLE_MAX, stream.message()) => message,
            };
            match message {
                Ok(Ok(Some(lease))) => {
                    *received = true;
                    self.receive(lease, room, calls).await;
                }
                Ok(Ok(None)) => return End::Unknown("control plane ended the stream".to_owned()),
                Ok(Err(status)) => return self.ended(&status),
                Err(_) => return End::Idle,
            }
        }
        self.last_reads(&mut stream, calls).await;
        drop(stream);
        cancelled(connection).await
    }

    fn ended(&self, status: &Status) -> End {
        let error = self.refused(status).to_string();
        if status.code() == Code::NotFound { End::Unknown(error) } else { End::Broken(error) }
    }

    /// The stream is no reason for a missing lease any more.
    fn stream_lives(&self) {
        self.change_problems(|problems| problems.stream = None);
    }

    /// Waits until this node accepts another lease, and the last one was polled.
    async fn room(&self) -> Room<'_> {
        let _ = self.no_runner.paused().wait_for(|paused| !*paused).await;
        let permit = self.outstanding.permit().await;
        let place = self.sender.reserve().await.expect("the receiver lives as long as the sender");
        Room { permit, place }
    }

    async fn receive(self: &Arc<Self>, wire: lease::Lease, room: Room<'_>, calls: &mut JoinSet<()>) {
        let Some(ids) = self.read_ids(&wire) else {
            // Otherwise a control plane that sends many of them fills the log.
            return sleep(WITHOUT_IDS_PAUSE).await;
        };
        self.acknowledge(&ids, calls).await;
        match self.adopt(&ids, &wire) {
            Adopted::Continues => {
                info!(event = "lease.replaced", task_id = %ids.task, "run is leased again, it continues with the new lease");
            }
            Adopted::AfterEnd(next) => {
                info!(event = "lease.waits", task_id = %ids.task, "run is leased again while it is cancelled, it starts again after its end");
                let shared = Arc::clone(self);
                spawn(calls, async move { shared.start_after(next, ids, wire).await }).await;
            }
            Adopted::Unknown => {
                if let Err(returned) = self.start(ids, wire, room) {
                    spawn(calls, Arc::clone(self).give_back(returned)).await;
                }
            }
        }
    }

    /// Starts a run again after it has ended.
    async fn start_after(self: Arc<Self>, next: oneshot::Receiver<Next>, ids: Ids, wire: lease::Lease) {
        let next = tokio::select! {
            next = next => next,
            // The report of the run that ends has the id of this lease.
            () = self.quiet.cancelled() => return,
        };
        if next != Ok(Next::Start) {
            return;
        }
        let started = tokio::select! {
            room = self.room() => self.start(ids, wire, room),
            () = self.quiet.cancelled() => Err(Returned::new(ids, DRAINS, true)),
        };
        if let Err(returned) = started {
            self.give_back(returned).await;
        }
    }

    /// Gives a run to the engine.
    fn start(&self, ids: Ids, wire: lease::Lease, room: Room<'_>) -> Result<(), Returned> {
        let now = self.client.now_at(&self.facts.base_url);
        let read = incoming::lease(&ids, wire, &self.config.agent_map, |server| self.check_domain_server(server), now);
        let (reason, retryable) = match read {
            Ok(mut lease) => {
                let domain = DomainData::of(&lease);
                lease.hold =
                    Some(self.outstanding.add(&ids.task, &ids.lease, lease.hard_deadline, domain, room.permit));
                room.place.send(lease);
                return Ok(());
            }
            Err(Unusable::Expired) => (EXPIRED.to_owned(), true),
            Err(Unusable::Malformed(reason)) => (reason, false),
        };
        Err(Returned { permit: Some(room.permit), ..Returned::new(ids, reason, retryable) })
    }

    /// Refuses a domain server that must not get a token. The wire needs no authentication: anybody may speak
    /// for the control plane.
    fn check_domain_server(&self, server: &Url) -> Result<(), String> {
        self.client.check(server).map_err(|err| format!("domain server {err}"))?;
        self.domain_hosts.check(server, EmptyList::AllowsNone)
    }

    /// Returns the leases that still arrive after the node has said that it drains.
    async fn last_reads(self: &Arc<Self>, stream: &mut Streaming<lease::Lease>, calls: &mut JoinSet<()>) {
        let end = Instant::now() + LAST_READS;
        while let Ok(Ok(Ok(Some(wire)))) = timeout_at(end, timeout(LAST_READS_IDLE, stream.message())).await {
            let Some(ids) = self.read_ids(&wire) else { continue };
            self.acknowledge(&ids, calls).await;
            // The report of a run that this node has gets the id of this lease.
            if matches!(self.adopt(&ids, &wire), Adopted::Unknown) {
                spawn(calls, Arc::clone(self).give_back(Returned::new(ids, DRAINS, true))).await;
            }
        }
    }

    /// Returns the lease that arrived and was not polled before the drain.
    async fn return_waiting(self: &Arc<Self>, calls: &mut JoinSet<()>) {
        let mut receiver = self.receiver.lock().await;
        while let Ok(lease) = receiver.try_recv() {
            if let Ok(at) = self.newest(&lease.address) {
                let ids = Ids { task: lease.address.task.clone(), lease: at.lease, run: at.run };
                spawn(calls, Arc::clone(self).give_back(Returned::new(ids, DRAINS, true))).await;
            }
        }
    }

    /// Gives a run that this node has the new lease, its deadline and its token.
    fn adopt(&self, ids: &Ids, wire: &lease::Lease) -> Adopted {
        let now = self.client.now_at(&self.facts.base_url);
        let deadline = incoming::deadline(wire, now).ok();
        self.outstanding.adopt(&ids.task, &ids.lease, deadline, || incoming::domain_data(wire))
    }

    fn read_ids(&self, wire: &lease::Lease) -> Option<Ids> {
        if let Some(token) = incoming::token(wire) {
            self.tokens.remember(&token);
        }
        let ids = Ids::read(&self.facts.name, wire);
        if let Err(error) = &ids {
            // Without usable ids nothing can be reported.
            warn!(event = "lease.without_ids", error, "lease cannot be used or reported, it is skipped");
        }
        ids.ok()
    }

    /// Tells the control plane that the lease has arrived. Nothing depends on the answer.
    async fn acknowledge(self: &Arc<Self>, ids: &Ids, calls: &mut JoinSet<()>) {
        let request = AckRequest {
            lease_id: ids.lease.clone(),
            node_id: self.config.node_id.clone(),
            ack_timestamp_unix_ms: Timestamp::now().as_millisecond(),
        };
        let (shared, task) = (Arc::clone(self), ids.task.clone());
        spawn(calls, async move {
            let answer = shared.call(|mut wire| async move { wire.ack(request).await }).await;
            let done = answer.and_then(|answer| shared.accepted(answer.success, &answer.message));
            if let Err(error) = done {
                warn!(event = "lease.not_acknowledged", task_id = %task, %error, "lease could not be acknowledged, its task runs anyway");
            }
        })
        .await;
    }

    /// Fails a run that does not start here.
    async fn give_back(self: Arc<Self>, returned: Returned) {
        let Returned { ids, reason, retryable, permit: _permit } = returned;
        let task = &ids.task;
        if retryable {
            info!(event = "lease.returned", task_id = %task, reason, retryable, "lease is returned, its run does not start here");
        } else {
            warn!(event = "lease.returned", task_id = %task, reason, retryable, "lease is returned, its run does not start here");
        }
        let details =
            json!({ "outcome": "host-fault", "code": if retryable { "not_started" } else { "start_session" } });
        let request = report::fail(&ids.at(), &self.config.node_id, &reason, &details, retryable, Timings::default());
        for tries in 1..=FAILURES_MAX {
            let Err(error) = self.send_failure(request.clone()).await else { return };
            warn!(event = "lease.not_rejected", task_id = %task, %error, tries, "lease could not be rejected");
            if !error.advice().may_retry() {
                return;
            }
            sleep(FAILURE_PAUSES.pause(tries, rand::random())).await;
        }
    }
}

/// Runs a call beside the stream. Waits while too many are under way.
async fn spawn(calls: &mut JoinSet<()>, call: impl Future<Output = ()> + Send + 'static) {
    while calls.try_join_next().is_some() {}
    while calls.len() >= CALLS_MAX {
        calls.join_next().await;
    }
    calls.spawn(call.in_current_span());
}

/// The stream was dropped. Its connection lives until the control plane was told.
async fn cancelled(connection: super::Connection) -> End {
    sleep(CANCEL_TIME).await;
    drop(connection);
    End::Quiet
}

/// The pause before the stream is opened again: whole seconds, doubled with each failure, and up to 2 s more.
fn pause(failures: u32, draw: f64) -> Duration {
    let secs = 1_u64.checked_shl(failures).unwrap_or(u64::MAX).min(PAUSE_SECS_MAX);
    Duration::from_secs(secs) + Duration::from_secs(2).mul_f64(draw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_minute() {
        let secs = [1, 2, 5, 6, 64, u32::MAX].map(|failures| pause(failures, 0.0).as_secs());
        assert_eq!(secs, [2, 4, 32, 60, 60, 60]);
        assert_eq!(pause(1, 0.5), Duration::from_secs(3));
    }
}
