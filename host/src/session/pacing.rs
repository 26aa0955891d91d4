//! Decides when to renew a held lease. This state machine has no clock, no socket and no random source.
//!
//! The driver passes the event and its time, draws the jitter, and executes the returned step. Start at
//! [`Pacing::on`].

use std::time::Duration;

use crate::model::{Backoff, BootInstant, Jitter, Term, pause_asked};

/// Least time between the starts of two paced heartbeats. It holds for any rate of progress and any time that the
/// plane sends.
pub(super) const GAP_MIN: Duration = Duration::from_millis(100);
/// The assumed term of a lease when the plane does not send one.
pub(super) const TERM_ASSUMED: Duration = Duration::from_secs(60);
/// Longest term that is accepted. A clock cannot hold every time a plane may send.
const TERM_MAX: Duration = Duration::from_secs(24 * 3600);
/// The pauses between two tries after failures.
const PAUSES: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5), Jitter::Half);
/// Least time between two heartbeats that only renew the domain token. The end of that token does not end the lease.
const TOKEN_GAP: Duration = Duration::from_secs(1);

/// How often to renew a lease.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct HeartbeatTiming {
    min_ratio: f64,
    max_ratio: f64,
    coalesce: Duration,
    /// Longest pause between two heartbeats.
    longest: Duration,
}

impl HeartbeatTiming {
    /// Ratios in the wrong order or outside 0..1 are corrected.
    pub(super) fn new(a: f64, b: f64, coalesce: Duration) -> Self {
        let sane = |ratio: f64| if ratio.is_nan() { 0.3 } else { ratio.clamp(0.0, 1.0) };
        let (a, b) = (sane(a), sane(b));
        Self {
            min_ratio: a.min(b),
            max_ratio: a.max(b),
            coalesce: coalesce.min(Duration::from_secs(60)),
            longest: TERM_MAX,
        }
    }

    /// The same timing with no pause longer than `longest`.
    pub(super) fn at_most(self, longest: Option<Duration>) -> Self {
        Self { longest: longest.unwrap_or(self.longest), ..self }
    }

    fn interval(&self, left: Duration, draw: f64) -> Duration {
        left.mul_f64(self.min_ratio + (self.max_ratio - self.min_ratio) * draw).min(self.longest)
    }
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum PacingEvent {
    /// Time passed.
    Tick,
    /// There is progress or an event that no answered heartbeat has carried.
    Dirty,
    /// The heartbeat was answered. `term` is the effect on the lease. `token` is the end of its data token, if the
    /// control plane sent one.
    Answered { term: Term, token: Option<BootInstant>, cancel: bool },
    /// The heartbeat failed in a way that does not end the lease. `retry_after` is the pause that the plane asked for,
    /// if any.
    Failed { retry_after: Option<Duration> },
    /// The control plane refuses the heartbeat: this node no longer holds the lease.
    Refused,
}

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum PacingStep {
    /// Send a heartbeat that must end by `until`. Its result is the next event.
    Heartbeat { until: BootInstant },
    /// Do nothing before `until`.
    Sleep { until: BootInstant },
    /// Publish that the plane asks to stop.
    Cancel,
    /// Publish that the lease is lost.
    Lose,
    /// Do nothing any more.
    Rest,
}

/// The state of the lease.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum State {
    /// Held. The last heartbeat was answered, or none was needed yet.
    Held { expires: BootInstant, next: BootInstant },
    /// Still held until it expires, but heartbeats fail.
    Doubtful { misses: u32, expires: BootInstant, next: BootInstant },
    /// A heartbeat is under way.
    Sending { misses: u32, expires: BootInstant },
    /// The plane asked to stop. No more heartbeats are sent. The lease is lost when it expires.
    Cancelled { expires: BootInstant },
    /// No longer held.
    Lost,
}

/// See the module documentation.
#[derive(Debug)]
pub(super) struct Pacing {
    timing: HeartbeatTiming,
    /// The term that the plane granted last. An answer without a time is assumed to grant it again.
    term: Duration,
    /// When the domain token ends, if the plane has sent that.
    token: Option<BootInstant>,
    last_heartbeat: Option<BootInstant>,
    state: State,
}

impl Pacing {
    /// A new lease that ends at `expires`, with a domain token that ends at `token`. Its first heartbeat is due at
    /// once.
    pub(super) fn new(
        timing: HeartbeatTiming,
        expires: Option<BootInstant>,
        token: Option<BootInstant>,
        now: BootInstant,
    ) -> Self {
        let term = expires.map_or(TERM_ASSUMED, |at| at - now).min(TERM_MAX);
        Self { timing, term, token, last_heartbeat: None, state: State::Held { expires: now + term, next: now } }
    }

    /// A lease that arrived cancelled.
    pub(super) fn cancelled(mut self) -> Self {
        if let State::Held { expires, .. } = self.state {
            self.state = State::Cancelled { expires };
        }
        self
    }

    pub(super) fn state(&self) -> State {
        self.state
    }

    /// The deadline of the lease. It is in the past once the lease is lost.
    pub(super) fn expires(&self) -> Option<BootInstant> {
        match self.state {
            State::Held { expires, .. }
            | State::Doubtful { expires, .. }
            | State::Sending { expires, .. }
            | State::Cancelled { expires } => Some(expires),
            State::Lost => None,
        }
    }

    /// The time left of the lease, while it is held and not cancelled.
    pub(super) fn left(&self, now: BootInstant) -> Option<Duration> {
        match self.state {
            State::Held { expires, .. } | State::Doubtful { expires, .. } | State::Sending { expires, .. } => {
                Some(expires - now).filter(|left| !left.is_zero())
            }
            State::Cancelled { .. } | State::Lost => None,
        }
    }

    /// Handles one event and returns the next step. `draw` is in 0..1 and decides the jitter, if there is any.
    pub(super) fn on(&mut self, event: PacingEvent, now: BootInstant, draw: f64) -> PacingStep {
        match (event, self.state) {
            (PacingEvent::Refused, State::Held { .. } | State::Doubtful { .. } | State::Sending { .. }) => {
                return self.lose();
            }
            (PacingEvent::Answered { term, token, cancel }, State::Sending { expires: old, .. }) => {
                self.token = token.or(self.token);
                return self.answered(term, cancel, old, now, draw);
            }
            (PacingEvent::Failed { retry_after }, State::Sending { misses, expires }) => {
                let misses = misses.saturating_add(1);
                let left = expires - now;
                // The pause that the plane asks for still leaves time for one more try within the lease.
                let own = PAUSES.pause(misses, draw).min(left / 4);
                let pause = pause_asked(own, retry_after, left / 2).max(GAP_MIN);
                self.state = State::Doubtful { misses, expires, next: now + pause };
            }
            (PacingEvent::Dirty, State::Held { expires, next }) => {
                let soon = self.not_before(now + self.timing.coalesce);
                self.state = State::Held { expires, next: next.min(soon) };
            }
            // While heartbeats fail, progress does not make the next one earlier. The next heartbeat carries it.
            _ => {}
        }
        self.tick(now)
    }

    /// Sends one unscheduled heartbeat for the final flush of a task, if the lease is still held.
    pub(super) fn heartbeat_now(&mut self, now: BootInstant) -> PacingStep {
        match self.state {
            State::Held { expires, .. } => self.state = State::Held { expires, next: now },
            State::Doubtful { misses, expires, .. } => self.state = State::Doubtful { misses, expires, next: now },
            State::Sending { .. } | State::Cancelled { .. } | State::Lost => {}
        }
        self.tick(now)
    }

    fn tick(&mut self, now: BootInstant) -> PacingStep {
        let (misses, expires, next) = match self.state {
            State::Held { expires, next } => (0, expires, next),
            State::Doubtful { misses, expires, next } => (misses, expires, next),
            State::Sending { expires, .. } | State::Cancelled { expires } if now < expires => {
                return PacingStep::Sleep { until: expires };
            }
            State::Sending { .. } | State::Cancelled { .. } => return self.lose(),
            State::Lost => return PacingStep::Rest,
        };
        if now >= expires {
            return self.lose();
        }
        if now < next {
            return PacingStep::Sleep { until: next.min(expires) };
        }
        self.last_heartbeat = Some(now);
        self.state = State::Sending { misses, expires };
        PacingStep::Heartbeat { until: now + patience(expires - now) }
    }

    fn answered(&mut self, term: Term, cancel: bool, old: BootInstant, now: BootInstant, draw: f64) -> PacingStep {
        let expires = match term {
            Term::Until(at) => {
                self.term = (at - now).min(TERM_MAX);
                now + self.term
            }
            Term::SameTerm => old.max(self.last_heartbeat.unwrap_or(now) + self.term),
            Term::Unchanged => old,
        };
        // The process was stopped between the answer and now. The answer is about a lease that is over.
        if now >= old || now >= expires {
            return self.lose();
        }
        if cancel {
            self.state = State::Cancelled { expires };
            return PacingStep::Cancel;
        }
        // A fixed end comes nearer with each heartbeat. A share of the time left would then send more and more
        // heartbeats.
        let left = if term == Term::Unchanged { self.term } else { expires - now };
        let mut interval = self.timing.interval(left, draw);
        // The answer should bring a newer domain token before the old one ends.
        if let Some(left) = self.token.map(|token| token - now).filter(|left| !left.is_zero()) {
            interval = interval.min(self.timing.interval(left, draw).max(TOKEN_GAP));
        }
        self.state = State::Held { expires, next: self.not_before(now + interval.max(GAP_MIN)) };
        self.tick(now)
    }

    fn lose(&mut self) -> PacingStep {
        self.state = State::Lost;
        PacingStep::Lose
    }

    fn not_before(&self, wanted: BootInstant) -> BootInstant {
        self.last_heartbeat.map_or(wanted, |last| wanted.max(last + GAP_MIN))
    }
}

/// How long one call may take when `left` remains. An unanswered call must leave time for others.
pub(super) fn patience(left: Duration) -> Duration {
    (left / 3).max(Duration::from_secs(1)).min(left)
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _};

    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// An event in the form that a test writes. The remaining time in an answer counts from the event.
    #[derive(Clone, Copy)]
    enum TestEvent {
        Tick,
        Dirty,
        Failed,
        /// Failed. The plane asked for a retry after this many milliseconds.
        Busy(u64),
        Refused,
        Answered {
            left: Option<Duration>,
            token: Option<Duration>,
            cancel: bool,
        },
    }
    use TestEvent::*;

    impl TestEvent {
        fn at(self, now: BootInstant) -> PacingEvent {
            match self {
                Tick => PacingEvent::Tick,
                Dirty => PacingEvent::Dirty,
                Failed => PacingEvent::Failed { retry_after: None },
                Busy(ms) => PacingEvent::Failed { retry_after: Some(Duration::from_millis(ms)) },
                Refused => PacingEvent::Refused,
                Answered { left, token, cancel } => PacingEvent::Answered {
                    term: left.map_or(Term::SameTerm, |left| Term::Until(now + left)),
                    token: token.map(|left| now + left),
                    cancel,
                },
            }
        }
    }

    fn good(left_ms: u64) -> TestEvent {
        Answered { left: Some(ms(left_ms)), token: None, cancel: false }
    }

    fn pacing(timing: HeartbeatTiming, left: Option<Duration>, start: BootInstant) -> Pacing {
        Pacing::new(timing, left.map(|left| start + left), None, start)
    }

    /// Runs events at their milliseconds against a lease of `left`. The expected text lists the steps, with instants
    /// as milliseconds since the start. Draws are always in the middle.
    #[track_caller]
    fn check(left: Option<u64>, events: &[(u64, TestEvent)], expected: &str) {
        let start = BootInstant::now();
        let mut pacing = pacing(HeartbeatTiming::new(0.35, 0.25, ms(250)), left.map(ms), start);
        let seen: Vec<String> = events
            .iter()
            .map(|(at, event)| {
                let now = start + ms(*at);
                let what = match pacing.on(event.at(now), now, 0.5) {
                    PacingStep::Heartbeat { until } => format!("send({})", (until - now).as_millis()),
                    PacingStep::Sleep { until } => format!("sleep({})", (until - start).as_millis()),
                    PacingStep::Cancel => "cancel".to_owned(),
                    PacingStep::Lose => "lose".to_owned(),
                    PacingStep::Rest => "rest".to_owned(),
                };
                format!("{at} {what}")
            })
            .collect();
        assert_eq!(seen.join(", "), expected);
    }

    #[test]
    fn heartbeats_start_immediately_and_follow_remaining_lease_time() {
        check(
            Some(60_000),
            &[(0, Tick), (40, good(60_000)), (18_039, Tick), (18_040, Tick), (18_100, good(60_000))],
            "0 send(20000), 40 sleep(18040), 18039 sleep(18040), 18040 send(14000), 18100 sleep(36100)",
        );
    }

    #[test]
    fn missed_beats_keep_the_lease_until_it_expires() {
        check(
            Some(3_000),
            &[
                (0, Tick),
                (10, Failed),
                (160, Tick),
                (200, Failed),
                (500, Tick),
                (1_600, Failed),
                (2_000, Tick),
                (3_000, Failed),
                (3_001, Tick),
            ],
            "0 send(1000), 10 sleep(160), 160 send(1000), 200 sleep(500), 500 send(1000), 1600 sleep(1950), 2000 send(1000), \
             3000 lose, 3001 rest",
        );
    }

    #[test]
    fn requested_heartbeat_pause_is_limited_by_lease() {
        check(
            Some(60_000),
            &[(0, Tick), (10, Busy(7_000)), (7_010, Tick)],
            "0 send(20000), 10 sleep(7010), 7010 send(17663)",
        );
        check(
            Some(3_000),
            &[(0, Tick), (10, Busy(7_000)), (1_505, Tick)],
            "0 send(1000), 10 sleep(1505), 1505 send(1000)",
        );
    }

    #[test]
    fn successful_heartbeat_resets_the_failure_pause() {
        check(
            Some(60_000),
            &[(0, Tick), (10, Failed), (160, Tick), (200, good(60_000)), (18_200, Tick), (18_210, Failed)],
            "0 send(20000), 10 sleep(160), 160 send(19946), 200 sleep(18200), 18200 send(14000), 18210 sleep(18360)",
        );
    }

    #[test]
    fn progress_is_gathered_and_then_sent() {
        check(
            Some(60_000),
            &[(0, Tick), (10, good(60_000)), (1_000, Dirty), (1_200, Dirty), (1_250, Dirty), (1_260, good(60_000))],
            "0 send(20000), 10 sleep(18010), 1000 sleep(1250), 1200 sleep(1250), 1250 send(19586), 1260 sleep(19260)",
        );
    }

    #[test]
    fn progress_does_not_advance_heartbeat_after_failure() {
        check(
            Some(60_000),
            &[(0, Tick), (10, Failed), (11, Dirty), (160, Dirty)],
            "0 send(20000), 10 sleep(160), 11 sleep(160), 160 send(19946)",
        );
    }

    #[test]
    fn answer_without_expiry_repeats_last_lease_term() {
        let plain = Answered { left: None, token: None, cancel: false };
        check(
            Some(2_000),
            &[(0, Tick), (100, plain), (1_900, Tick), (1_950, plain), (3_899, Tick), (3_900, Tick)],
            "0 send(1000), 100 sleep(670), 1900 send(100), 1950 sleep(2535), 3899 send(1), 3900 lose",
        );
        check(None, &[(0, Tick), (0, plain)], "0 send(20000), 0 sleep(18000)");
    }

    #[test]
    fn early_token_expiry_advances_heartbeats_within_bounds() {
        let token = |left_ms| Answered { left: Some(ms(60_000)), token: Some(ms(left_ms)), cancel: false };
        check(
            Some(60_000),
            &[
                (0, Tick),
                (0, token(10_000)),
                (3_000, Tick),
                (3_000, good(60_000)),
                (5_100, Tick),
                (5_100, token(1_500)),
            ],
            "0 send(20000), 0 sleep(3000), 3000 send(19000), 3000 sleep(5100), 5100 send(19300), 5100 sleep(6100)",
        );
        check(Some(60_000), &[(0, Tick), (0, token(0))], "0 send(20000), 0 sleep(18000)");
    }

    #[test]
    fn late_answer_does_not_restore_expired_lease() {
        check(Some(2_000), &[(0, Tick), (4_000, good(2_000))], "0 send(1000), 4000 lose");
        let over = Answered { left: Some(ms(0)), token: None, cancel: false };
        check(Some(9_000), &[(0, Tick), (10, over), (11, Tick)], "0 send(3000), 10 lose, 11 rest");
    }

    #[test]
    fn extreme_lease_times_cause_no_heartbeat_flood() {
        let mut events = vec![(0, Tick)];
        events.extend([(1, good(1)), (2, Tick)]);
        check(Some(60_000), &events, "0 send(20000), 1 sleep(2), 2 lose");
        check(Some(0), &[(0, Tick), (1, Tick)], "0 lose, 1 rest");
        check(Some(u64::MAX), &[(0, Tick), (0, good(u64::MAX))], "0 send(28800000), 0 sleep(25920000)");
    }

    #[test]
    fn cancel_stops_heartbeats_but_lease_still_expires() {
        check(
            Some(10_000),
            &[
                (0, Tick),
                (5, Answered { left: None, token: None, cancel: true }),
                (6, Tick),
                (7, Dirty),
                (8, Refused),
                (10_000, Tick),
                (10_001, Tick),
            ],
            "0 send(3333), 5 cancel, 6 sleep(10000), 7 sleep(10000), 8 sleep(10000), 10000 lose, 10001 rest",
        );
    }

    #[test]
    fn lease_loss_answer_stops_heartbeats_immediately() {
        check(Some(10_000), &[(0, Tick), (5, Refused), (6, good(1_000))], "0 send(3333), 5 lose, 6 rest");
    }

    #[test]
    fn final_heartbeat_ignores_the_schedule() {
        let start = BootInstant::now();
        let mut pacing = pacing(HeartbeatTiming::new(0.25, 0.35, ms(250)), Some(ms(9_000)), start);
        assert_eq!(pacing.heartbeat_now(start), PacingStep::Heartbeat { until: start + ms(3_000) });
        pacing.on(PacingEvent::Failed { retry_after: None }, start + ms(1), 0.5);
        assert_eq!(pacing.heartbeat_now(start + ms(2)), PacingStep::Heartbeat { until: start + ms(2) + ms(8_998) / 3 });
        assert_eq!(pacing.heartbeat_now(start + ms(9_000)), PacingStep::Lose);
        assert_eq!(pacing.left(start + ms(9_000)), None);
    }

    #[test]
    fn odd_ratios_are_put_right() {
        assert_eq!(HeartbeatTiming::new(0.35, 0.25, ms(0)), HeartbeatTiming::new(0.25, 0.35, ms(0)));
        assert_eq!(HeartbeatTiming::new(-1.0, f64::INFINITY, ms(0)), HeartbeatTiming::new(0.0, 1.0, ms(0)));
        assert_eq!(HeartbeatTiming::new(f64::NAN, 0.3, ms(0)), HeartbeatTiming::new(0.3, 0.3, ms(0)));
    }

    #[test]
    fn frequent_progress_is_coalesced_into_few_heartbeats() {
        for (coalesce, most) in [(0, 101), (250, 41)] {
            let start = BootInstant::now();
            let mut pacing = pacing(HeartbeatTiming::new(0.25, 0.35, ms(coalesce)), Some(ms(60_000)), start);
            let mut heartbeats = 0;
            for at in 0..10_000 {
                if matches!(pacing.on(PacingEvent::Dirty, start + ms(at), 0.5), PacingStep::Heartbeat { .. }) {
                    heartbeats += 1;
                    let now = start + ms(at);
                    pacing.on(good(60_000).at(now), now, 0.5);
                }
            }
            assert!(heartbeats <= most && heartbeats >= most - 2, "{heartbeats} heartbeats at {coalesce} ms");
        }
    }

    /// A small model runs in parallel with the state machine. It decides who may send a heartbeat, how often, and when it
    /// must end.
    #[test]
    fn random_event_sequences_keep_pacing_invariants() {
        for seed in 0..2_000 {
            let mut chance = rand::rngs::StdRng::seed_from_u64(seed);
            let start = BootInstant::now();
            let left = chance.random_bool(0.8).then(|| ms(chance.random_range(0..5_000)));
            let mut pacing = pacing(
                HeartbeatTiming::new(chance.random(), chance.random(), ms(chance.random_range(0..500))),
                left,
                start,
            );
            let (mut now, mut last_heartbeat, mut sending) = (start, None::<BootInstant>, false);
            let (mut lost, mut cancelled) = (false, false);
            for _ in 0..200 {
                now = now + ms(chance.random_range(0..400));
                let event = match chance.random_range(0..20) {
                    0..4 => Tick,
                    4..10 => Dirty,
                    10..16 => Answered {
                        left: chance.random_bool(0.7).then(|| ms(chance.random_range(0..5_000))),
                        token: chance.random_bool(0.3).then(|| ms(chance.random_range(0..5_000))),
                        cancel: chance.random_bool(0.03),
                    },
                    16..19 => Failed,
                    _ if chance.random_bool(0.2) => Refused,
                    _ => Tick,
                };
                let asked = matches!(event, Answered { cancel: true, .. }) && sending;
                sending &= !matches!(event, Answered { .. } | Failed);
                match pacing.on(event.at(now), now, chance.random()) {
                    PacingStep::Heartbeat { until } => {
                        assert!(!lost && !cancelled && !sending, "seed {seed}");
                        assert!(
                            last_heartbeat.is_none_or(|last| now - last >= GAP_MIN),
                            "seed {seed}: heartbeats too close"
                        );
                        assert!(until > now && Some(until) <= pacing.expires(), "seed {seed}");
                        (last_heartbeat, sending) = (Some(now), true);
                    }
                    PacingStep::Sleep { until } => assert!(until > now && !lost, "seed {seed}: a sleep that spins"),
                    PacingStep::Cancel => {
                        assert!(asked && !cancelled && !lost, "seed {seed}");
                        cancelled = true;
                    }
                    PacingStep::Lose => {
                        assert!(!lost, "seed {seed}: lost twice");
                        lost = true;
                    }
                    PacingStep::Rest => assert!(lost, "seed {seed}"),
                }
                assert_eq!(lost, pacing.state() == State::Lost, "seed {seed}");
            }
        }
    }
}
