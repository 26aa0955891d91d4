//! A live view of a held lease for everything that works on its task.
//!
//! The session owns the [`HeldLeaseWriter`] and publishes changes from the control plane through it. Runners, ports and
//! the engine hold clones of the [`HeldLease`] and only read.

use std::{
    fmt,
    future::poll_fn,
    ops::Deref,
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::Poll,
    time::Duration,
};

use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;

use super::{
    BootInstant, DataLocation, Lease, PortError, PortErrorKind, ProgressQueue, ReportAddress, TimeLimit, Usage,
    watched::Watched,
};

/// A bearer token. It is never printed, and is compared only to detect a change.
#[derive(Clone)]
pub struct Token(Arc<SecretString>);

impl Token {
    /// Wraps the bearer text.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(Arc::new(SecretString::from(text.into())))
    }

    /// The bearer text, for an `Authorization` header or a runner with the `token` grant.
    #[must_use]
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }
}

impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.expose() == other.expose()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// Why a task is asked to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CancelReason {
    /// The control plane asked for it.
    Plane,
    /// The lease expired or belongs to another node. Nothing more may be uploaded or reported.
    LeaseLost,
    /// The node is shutting down and the drain timeout has passed.
    Drained,
    /// The run passed its hard deadline.
    Deadline,
    /// The run took longer than this limit.
    TimeLimit(TimeLimit),
    /// The run used more tokens than it may.
    TokenLimit {
        /// When this was noticed.
        used: u64,
        /// How many it may use.
        max: u64,
    },
    /// An operator cancelled the task.
    Operator,
}

impl CancelReason {
    /// A stable word for logs and runners.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Plane => "plane",
            Self::LeaseLost => "lease-lost",
            Self::Drained => "drained",
            Self::Deadline | Self::TimeLimit(_) => "deadline",
            Self::TokenLimit { .. } => "budget",
            Self::Operator => "operator",
        }
    }
}

/// Signals once that a task should stop, and why. The first reason stays. Only a lost lease overrides it, because it
/// forbids more.
#[derive(Debug, Default)]
pub struct CancelSignal(Watched<Option<CancelReason>>);

impl CancelSignal {
    /// Cancels for `reason`. Later calls change nothing unless the reason is `LeaseLost`.
    pub fn cancel(&self, reason: CancelReason) {
        self.0.change(|now| {
            let change = now.is_none() || (reason == CancelReason::LeaseLost && *now != Some(reason));
            if change {
                *now = Some(reason);
            }
            change
        });
    }

    /// The reason, if there is one. Never blocks.
    #[must_use]
    pub fn reason(&self) -> Option<CancelReason> {
        *self.0.lock()
    }

    /// Waits for the first reason.
    pub async fn cancelled(&self) -> CancelReason {
        self.0.until(|reason| *reason).await
    }

    /// Waits until the lease is lost. Other reasons do not end the wait.
    pub async fn lost(&self) {
        self.0.until(|reason| (*reason == Some(CancelReason::LeaseLost)).then_some(())).await;
    }
}

/// The state of the set-up heartbeat. The runner's first input, output or token call waits for it.
#[derive(Clone, Debug, PartialEq)]
pub enum Setup {
    /// Not answered yet.
    Pending,
    /// Answered, or not needed. `Err` says in one line which part of the location is missing or malformed.
    Ready(Result<DataLocation, String>),
    /// The control plane refused permanently. The text is its status and contains no secret.
    Refused(String),
}

/// The parts of a lease that the control plane may change.
pub struct LeaseUpdates {
    /// The newest bearer. [`HeldLeaseWriter::renew`] changes it and stores the previous one.
    pub token: Option<Token>,
    /// When that bearer ends, if the control plane has sent it.
    token_expires_at: Option<BootInstant>,
    /// The answer to the set-up heartbeat.
    pub setup: Setup,
    /// When the run must have ended.
    hard_deadline: Option<BootInstant>,
    /// The session has ended: nothing changes any more.
    over: bool,
}

/// The end of the time in which this node holds a lease. Everything that works on the task shares it. Only the session
/// moves it.
#[derive(Debug)]
pub struct Deadline(AtomicU64);

impl Deadline {
    fn new(until: BootInstant) -> Self {
        Self(AtomicU64::new(until.to_bits()))
    }

    /// The instant from which on nothing may be sent for the lease.
    #[must_use]
    pub fn until(&self) -> BootInstant {
        BootInstant::from_bits(self.0.load(Ordering::Acquire))
    }

    /// Moves the deadline: the control plane has extended or shortened the lease.
    pub fn set(&self, until: BootInstant) {
        self.0.store(until.to_bits(), Ordering::Release);
    }
}

/// How long a task may still run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimeLeft {
    /// Until the lease ends. Heartbeats usually extend it. `None`: no end is known.
    pub lease: Option<Duration>,
    /// Until the run must have ended, for any term of the lease. `None`: there is no limit.
    pub run: Option<Duration>,
}

/// A live, read-only view of a held lease. Cheap to clone.
#[derive(Clone)]
pub struct HeldLease(Arc<HeldLeaseState>);

/// The data behind a [`HeldLease`].
pub struct HeldLeaseState {
    /// The lease as it was received.
    pub lease: Lease,
    /// When and why to stop.
    pub cancel: CancelSignal,
    /// Progress and events that wait for the next heartbeat.
    pub progress: ProgressQueue,
    deadline: Deadline,
    /// The end of the run's own time limit.
    run_end: Deadline,
    missed: Mutex<MissedHeartbeats>,
    replaced: Mutex<Vec<Token>>,
    usage: Mutex<Usage>,
    /// Where the report goes, if a heartbeat has changed that.
    renamed: Mutex<Option<ReportAddress>>,
    updates: Watched<LeaseUpdates>,
}

impl Deref for HeldLease {
    type Target = HeldLeaseState;

    fn deref(&self) -> &HeldLeaseState {
        &self.0
    }
}

/// Heartbeats in a row that got no answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MissedHeartbeats {
    /// How many, so far.
    pub count: u32,
    /// Why the last one got no answer, in one line.
    pub error: String,
}

/// The writing side of a [`HeldLease`]. Only the session holds it.
pub struct HeldLeaseWriter(Arc<HeldLeaseState>);

impl Drop for HeldLeaseWriter {
    fn drop(&mut self) {
        self.publish(|now| now.over = true);
    }
}

/// Most replaced bearers that are stored for one lease. At one a minute, they cover a working day.
const REPLACED_MAX: usize = 512;

impl HeldLeaseWriter {
    /// The deadline of the lease, for the session to move. It starts at [`BootInstant::NEVER`].
    #[must_use]
    pub fn deadline(&self) -> &Deadline {
        &self.0.deadline
    }

    /// Records a heartbeat that got no answer.
    pub fn missed(&self, error: String) {
        let mut missed = self.0.missed.lock().unwrap_or_else(PoisonError::into_inner);
        *missed = MissedHeartbeats { count: missed.count.saturating_add(1), error };
    }

    /// Records that heartbeats are answered again.
    pub fn answered(&self) {
        *self.0.missed.lock().unwrap_or_else(PoisonError::into_inner) = MissedHeartbeats::default();
    }

    /// Moves the hard deadline of the run: it was leased again.
    pub fn move_hard_deadline(&self, deadline: BootInstant) {
        self.0.updates.change(|now| now.hard_deadline.replace(deadline) != Some(deadline));
    }

    /// Publishes the new address of the report.
    pub fn rename(&self, address: ReportAddress) {
        *self.0.renamed.lock().unwrap_or_else(PoisonError::into_inner) = Some(address);
    }

    /// Publishes a change from the control plane.
    pub fn publish(&self, change: impl FnOnce(&mut LeaseUpdates)) {
        self.0.updates.change(|now| {
            change(now);
            true
        });
    }

    /// Publishes a newer bearer, and when the newest one ends. Returns `false` if the bearer is already known.
    pub fn renew(&self, token: Option<Token>, expires_at: Option<BootInstant>) -> bool {
        let mut old = None;
        let newer = self.0.updates.change(|now| {
            let newer = token.is_some() && now.token != token;
            if newer {
                old = std::mem::replace(&mut now.token, token);
            }
            // The end of the old bearer is not the end of a new one.
            if newer || expires_at.is_some() {
                now.token_expires_at = expires_at;
            }
            newer
        });
        if let Some(old) = old {
            let mut replaced = self.0.replaced.lock().unwrap_or_else(PoisonError::into_inner);
            if replaced.len() >= REPLACED_MAX {
                replaced.remove(0);
            }
            replaced.push(old);
        }
        newer
    }

    /// Publishes the state of the set-up, if `change` changes it.
    pub fn set_up(&self, change: impl FnOnce(&mut Setup) -> bool) {
        self.0.updates.change(|now| change(&mut now.setup));
    }
}

impl HeldLease {
    /// Creates the view of `lease` and its writer. Pass `Pending` as `setup` if a control plane will answer, and
    /// `Ready` for local runs.
    #[must_use]
    pub fn new(lease: Lease, setup: Setup) -> (Self, HeldLeaseWriter) {
        let updates = Watched::new(LeaseUpdates {
            token: lease.token.clone(),
            token_expires_at: lease.token_expires_at,
            setup,
            hard_deadline: lease.hard_deadline,
            over: false,
        });
        let state = Arc::new(HeldLeaseState {
            deadline: Deadline::new(BootInstant::NEVER),
            run_end: Deadline::new(BootInstant::NEVER),
            lease,
            cancel: CancelSignal::default(),
            progress: ProgressQueue::default(),
            missed: Mutex::default(),
            replaced: Mutex::default(),
            usage: Mutex::default(),
            renamed: Mutex::default(),
            updates,
        });
        (Self(Arc::clone(&state)), HeldLeaseWriter(state))
    }

    /// Adds to what the runner has used. Cancels a task that is over its budget of tokens.
    pub fn add_usage(&self, more: Usage) {
        let mut usage = self.usage.lock().unwrap_or_else(PoisonError::into_inner);
        usage.add(more);
        let used = usage.tokens();
        if let Some(max) = self.lease.tokens_max.filter(|max| used > *max) {
            self.cancel.cancel(CancelReason::TokenLimit { used, max });
        }
    }

    /// When the run must have ended, for any term of the lease.
    #[must_use]
    pub fn hard_deadline(&self) -> Option<BootInstant> {
        self.updates.lock().hard_deadline
    }

    /// Waits until the hard deadline is another than `known`.
    pub async fn hard_deadline_moved(&self, known: Option<BootInstant>) {
        self.updates.until(|now| (now.hard_deadline != known).then_some(())).await;
    }

    /// What the runner has used so far.
    #[must_use]
    pub fn usage(&self) -> Usage {
        *self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every bearer that the runner may have received, the newest last. Above the limit, the oldest are dropped.
    #[must_use]
    pub fn tokens(&self) -> Vec<Token> {
        let mut tokens = self.replaced.lock().unwrap_or_else(PoisonError::into_inner).clone();
        tokens.extend(self.token());
        tokens
    }

    /// Where the report goes, according to the control plane so far.
    #[must_use]
    pub fn address(&self) -> ReportAddress {
        let renamed = self.renamed.lock().unwrap_or_else(PoisonError::into_inner);
        renamed.as_ref().unwrap_or(&self.lease.address).clone()
    }

    /// Whether this node holds the lease now. Has no effect: see [`Self::check_deadline`].
    #[must_use]
    pub fn is_ours(&self) -> bool {
        !self.deadline.until().has_passed() && self.cancel.reason() != Some(CancelReason::LeaseLost)
    }

    /// Returns whether this node holds the lease. Cancels the task if its deadline has passed. Call it immediately
    /// before anything is sent for the lease. After a process was stopped, the lease may have expired before the
    /// session could report it.
    pub fn check_deadline(&self) -> bool {
        if self.deadline.until().has_passed() {
            self.cancel.cancel(CancelReason::LeaseLost);
        }
        self.is_ours()
    }

    /// Waits until this node no longer holds the lease. It reads the clock each time it is woken together with the
    /// futures of its `select`. None of them then continues after a stop of the process.
    pub async fn lost(&self) {
        let mut lost = pin!(self.cancel.lost());
        poll_fn(|context| if self.check_deadline() { lost.as_mut().poll(context) } else { Poll::Ready(()) }).await;
    }

    /// How many heartbeats in a row got no answer so far.
    #[must_use]
    pub fn missed(&self) -> MissedHeartbeats {
        self.missed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The deadline of the lease, according to the control plane so far.
    #[must_use]
    pub fn deadline(&self) -> &Deadline {
        &self.deadline
    }

    /// The end of the run's own time limit, for the engine to set when the run begins. Until then it is
    /// [`BootInstant::NEVER`].
    #[must_use]
    pub fn run_end(&self) -> &Deadline {
        &self.run_end
    }

    /// How long the task may still run, as known now. Heartbeats change it.
    #[must_use]
    pub fn time_left(&self) -> TimeLeft {
        let left = |end: BootInstant| (end != BootInstant::NEVER).then(|| end.left());
        let lease = if self.is_ours() { left(self.deadline.until()) } else { Some(Duration::ZERO) };
        let hard = self.hard_deadline().unwrap_or(BootInstant::NEVER);
        TimeLeft { lease, run: left(hard.min(self.run_end.until())) }
    }

    /// Appends an event. Waits while too many events wait for heartbeats. A cancel ends the wait: a runner must not
    /// miss it because the control plane is slow or unreachable.
    ///
    /// # Errors
    /// `Limit` if the event is too large. `LeaseOver` if there is no space, and the task is cancelled or over.
    pub async fn event(&self, value: Value) -> Result<(), PortError> {
        let over = async {
            let session_ended = self.updates.until(|now| now.over.then_some(()));
            tokio::select! {
                _ = self.cancel.cancelled() => {}
                () = session_ended => {}
            }
        };
        tokio::select! {
            biased;
            appended = self.progress.event(value) => {
                appended.map_err(|err| PortError::new(PortErrorKind::Limit, err.to_string()))
            }
            () = over => {
                let message = "the event is dropped: too many events wait, and the task is cancelled or over";
                Err(PortError::new(PortErrorKind::LeaseOver, message))
            }
        }
    }

    /// The newest bearer for the domain server. Call this again for each request.
    #[must_use]
    pub fn token(&self) -> Option<Token> {
        self.updates.lock().token.clone()
    }

    /// When the newest bearer ends, if the control plane has sent it.
    #[must_use]
    pub fn token_expires_at(&self) -> Option<BootInstant> {
        self.updates.lock().token_expires_at
    }

    /// The newest bearer, and when it ends in seconds since 1970, if the control plane has sent that.
    #[must_use]
    pub fn token_with_expiry(&self) -> Option<(Token, Option<i64>)> {
        let (token, expires_at) = {
            let now = self.updates.lock();
            (now.token.clone()?, now.token_expires_at)
        };
        Some((token, expires_at.and_then(BootInstant::on_calendar).map(|at| at.as_second())))
    }

    /// Waits up to `limit` for a bearer other than `old` (after a 401), then returns the newest. It requests a
    /// heartbeat, whose answer should bring a newer bearer (posemesh.md section 10.3).
    pub async fn newer_token(&self, old: Option<&Token>, limit: std::time::Duration) -> Option<Token> {
        if self.updates.lock().token.as_ref() == old {
            self.progress.ask();
        }
        let newer = self.updates.until(|now| (now.over || now.token.as_ref() != old).then_some(()));
        let _ = tokio::time::timeout(limit, newer).await;
        self.token()
    }

    /// The current state of the set-up heartbeat.
    #[must_use]
    pub fn setup_now(&self) -> Setup {
        self.updates.lock().setup.clone()
    }

    /// Whether the control plane refused the set-up, or named an unusable data location.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        matches!(self.updates.lock().setup, Setup::Refused(_) | Setup::Ready(Err(_)))
    }

    /// Waits for the answer to the set-up heartbeat. Never returns [`Setup::Pending`]. Returns `Refused` early when
    /// the session has ended.
    pub async fn setup(&self) -> Setup {
        let answered = |now: &LeaseUpdates| match &now.setup {
            Setup::Pending if now.over => {
                let message = "the lease ended before its set-up heartbeat was answered";
                Some(Setup::Refused(message.to_owned()))
            }
            Setup::Pending => None,
            setup => Some(setup.clone()),
        };
        self.updates.until(answered).await
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{super::progress_queue::EVENTS_MAX, *};

    fn lease() -> Lease {
        Lease::bare(super::super::TaskId::from(uuid::Uuid::nil()), "/a/v1".parse().expect("a capability"))
    }

    #[test]
    fn time_left_follows_the_earlier_limits() {
        const MINUTE: Duration = Duration::from_secs(60);
        let now = BootInstant::now();
        let (held, writer) = HeldLease::new(lease(), Setup::Pending);
        assert_eq!(held.time_left(), TimeLeft { lease: None, run: None });
        let about = |left: Option<Duration>, end: Duration| left.is_some_and(|left| left <= end && left + MINUTE > end);
        writer.deadline().set(now + 2 * MINUTE);
        held.run_end().set(now + 10 * MINUTE);
        assert!(about(held.time_left().lease, 2 * MINUTE) && about(held.time_left().run, 10 * MINUTE));
        writer.deadline().set(now + 20 * MINUTE);
        writer.move_hard_deadline(now + 5 * MINUTE);
        assert!(about(held.time_left().lease, 20 * MINUTE) && about(held.time_left().run, 5 * MINUTE));
        writer.move_hard_deadline(now.back(MINUTE));
        assert_eq!(held.time_left().run, Some(Duration::ZERO));
        held.cancel.cancel(CancelReason::LeaseLost);
        assert_eq!(held.time_left().lease, Some(Duration::ZERO));
    }

    #[test]
    fn each_token_has_its_own_expiry() {
        let seconds = |held: &HeldLease| {
            let (token, expires_at) = held.token_with_expiry().expect("a token");
            let now = jiff::Timestamp::now().as_second();
            (token.expose().to_owned(), expires_at.map(|at| (at - now + 30).div_euclid(60)))
        };
        let minutes = |minutes: u64| Some(BootInstant::now() + Duration::from_secs(60 * minutes));
        let first = Lease { token: Some(Token::new("a")), token_expires_at: minutes(10), ..lease() };
        let (held, writer) = HeldLease::new(first, Setup::Pending);
        assert_eq!(seconds(&held), ("a".to_owned(), Some(10)));
        assert!(!writer.renew(Some(Token::new("a")), minutes(20)));
        assert_eq!(seconds(&held), ("a".to_owned(), Some(20)));
        assert!(!writer.renew(None, None));
        assert_eq!(seconds(&held), ("a".to_owned(), Some(20)));
        assert!(writer.renew(Some(Token::new("b")), minutes(30)));
        assert_eq!(seconds(&held), ("b".to_owned(), Some(30)));
        assert!(writer.renew(Some(Token::new("c")), None));
        assert_eq!(seconds(&held), ("c".to_owned(), None));
        assert!(HeldLease::new(lease(), Setup::Pending).0.token_with_expiry().is_none());
    }

    #[tokio::test]
    async fn waiting_event_ends_with_a_cancel() {
        let full = async || {
            let (held, writer) = HeldLease::new(lease(), Setup::Pending);
            for _ in 0..EVENTS_MAX {
                held.event(Value::Null).await.expect("there is space");
            }
            (held, writer)
        };
        let ends: [fn(HeldLease, HeldLeaseWriter); 3] = [
            |held, _| held.cancel.cancel(CancelReason::Drained),
            |held, _| held.cancel.cancel(CancelReason::LeaseLost),
            |_, writer| drop(writer),
        ];
        for end in ends {
            let (held, writer) = full().await;
            let mut event = std::pin::pin!(held.event(Value::Null));
            assert!(futures_util::poll!(&mut event).is_pending());
            end(held.clone(), writer);
            assert_eq!(event.await.expect_err("no space").kind, PortErrorKind::LeaseOver);
        }
        let (held, _writer) = full().await;
        let (event, ()) = tokio::join!(held.event(Value::Null), async {
            held.progress.acknowledge(&held.progress.pending());
        });
        event.expect("there is space");
        held.cancel.cancel(CancelReason::Drained);
        held.event(Value::Null).await.expect("the events of a cancelled task are sent too");
    }

    #[test]
    fn only_check_deadline_cancels_a_task() {
        let (held, writer) = HeldLease::new(lease(), Setup::Pending);
        assert!(held.is_ours() && held.check_deadline());
        writer.deadline().set(BootInstant::now().back(Duration::from_secs(1)));
        assert!(!held.is_ours());
        assert_eq!(held.cancel.reason(), None);
        assert!(!held.check_deadline());
        assert_eq!(held.cancel.reason(), Some(CancelReason::LeaseLost));
    }
}
