//! The queue of reports: which are being sent and which is next. A state machine without clock, socket or disk.
//!
//! A report is *fresh* while the attempt that made it sends it for the first time. After a failure it waits.
//! Waiting reports are sent again. The oldest one whose pause is over comes first.
//!
//! While the control plane accepts reports, several are sent concurrently, at most one of each task. A failure
//! stops the reports of that control plane for a growing pause. Then only one report is tried, so an unreachable
//! control plane gets one request per pause. A success ends the pause of the control plane.
//! A report that the control plane answers and does not accept has a pause of its own, and is set aside after a day.
//! Each control plane has its own lane, so an unreachable one does not stop the reports of another.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

use super::entry::{Entry, Listing, ListingState, Tries};
use crate::model::{Backoff, Jitter, LeaseKeeper, PlaneName, TaskId, pause_asked};

/// Longest pause before its jitter. Also the longest pause that a control plane may ask for.
const PAUSE_MAX: Duration = Duration::from_secs(300);
/// The pauses between failures in a row.
pub(super) const PAUSES: Backoff = Backoff::new(Duration::from_millis(200), PAUSE_MAX, Jitter::Half);
/// Most waiting reports sent concurrently to a control plane that accepts them.
const ABREAST: usize = 8;
/// A report that a control plane answers and does not accept is set aside after this time.
pub(super) const NOT_ACCEPTED_MAX: SignedDuration = SignedDuration::from_hours(24);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Fresh,
    Waiting {
        due: Instant,
    },
    Sending,
    Foreign,
    /// It was not accepted for too long. A retry of an operator, or a new lease of its task, puts it among the waiting.
    SetAside,
}

struct Held {
    entry: Arc<Entry>,
    /// The name of its task when it ended. The status board shows the ended task by this name.
    ended_as: TaskId,
    tries: Tries,
    place: Place,
    /// Failures in a row when it was sent last.
    failures: u32,
    /// It is in the file, or a write is ordered.
    written: bool,
    /// About how many bytes of memory it takes.
    size: usize,
    /// Keeps the lease of its task. None after a restart, until the control plane leases the task to this node again.
    lease_kept: Option<Box<dyn LeaseKeeper>>,
}

/// Why a report was not accepted yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failure<'a> {
    /// The failure, in one line.
    pub(super) error: &'a str,
    /// The pause that the control plane asks for, limited to [`PAUSE_MAX`].
    pub(super) retry_after: Option<Duration>,
    /// The control plane works, and does not accept this report. It may accept others.
    pub(super) only_this: bool,
}

/// The result of [`ReportQueue::failed`].
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Failed {
    pub(super) tries: Tries,
    /// The pause before the next try.
    pub(super) pause: Duration,
    /// It is the first failure after a success, or the first time that this report was not accepted.
    pub(super) first: bool,
    /// See [`Held::ended_as`].
    pub(super) ended_as: TaskId,
}

/// A report that was removed from the queue.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Gone {
    pub(super) entry: Arc<Entry>,
    /// See [`Held::ended_as`].
    pub(super) ended_as: TaskId,
    /// It must be removed from the file too.
    pub(super) written: bool,
}

/// The next step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum NextReport {
    /// Send this one: see [`ReportQueue::begin`].
    Send(u64),
    /// No pause ends before this time.
    At(Instant),
    /// No report waits for a time. The next step follows an answer or a new report.
    Idle,
}

/// The reports of one control plane.
#[derive(Default)]
struct Lane {
    /// Waiting reports whose pause is over. The oldest has the lowest number.
    ready: BTreeSet<u64>,
    /// Waiting reports in their pause, and when it ends.
    paused: BTreeSet<(Instant, u64)>,
    /// Waiting reports that are being sent.
    sending: usize,
    /// Failures in a row, of any report.
    failures: u32,
    quiet_until: Option<Instant>,
    /// The last answer accepted or refused a report.
    flows: bool,
    /// All its reports.
    held: Amount,
}

/// An amount of reports, or its limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Amount {
    pub(super) reports: usize,
    /// About how much memory they take.
    pub(super) bytes: usize,
}

impl Amount {
    /// Whether the limit is reached.
    fn reaches(self, limit: Self) -> bool {
        self.reports >= limit.reports || self.bytes >= limit.bytes
    }
}

impl Lane {
    /// How many waiting reports may be sent concurrently.
    fn abreast(&self) -> usize {
        if self.flows { ABREAST } else { 1 }
    }

    /// Counts a report that was put at `place`.
    fn arrived(&mut self, number: u64, place: Place) {
        match place {
            Place::Waiting { due } => drop(self.paused.insert((due, number))),
            Place::Sending => self.sending += 1,
            Place::Fresh | Place::Foreign | Place::SetAside => {}
        }
    }

    /// Counts a report that has left `place`.
    fn left(&mut self, number: u64, place: Place) {
        match place {
            Place::Waiting { due } => {
                self.ready.remove(&number);
                self.paused.remove(&(due, number));
            }
            Place::Sending => self.sending -= 1,
            Place::Fresh | Place::Foreign | Place::SetAside => {}
        }
    }

    /// The next step. `busy` tells whether another report about the same task is being sent.
    fn next(&mut self, now: Instant, busy: impl Fn(u64) -> bool) -> NextReport {
        if self.sending >= self.abreast() {
            return NextReport::Idle;
        }
        while let Some((_, number)) = self.paused.first().filter(|(due, _)| *due <= now) {
            self.ready.insert(*number);
            self.paused.pop_first();
        }
        let quiet = self.quiet_until.filter(|until| *until > now);
        match (self.ready.iter().find(|number| !busy(**number)), quiet) {
            (Some(number), None) => NextReport::Send(*number),
            (Some(_), Some(until)) => NextReport::At(until),
            (None, quiet) => match self.paused.iter().find(|(_, number)| !busy(*number)) {
                Some((due, _)) => NextReport::At(quiet.map_or(*due, |until| until.max(*due))),
                None => NextReport::Idle,
            },
        }
    }
}

/// See the module documentation.
#[derive(Default)]
pub(super) struct ReportQueue {
    held: BTreeMap<u64, Held>,
    /// Reports that will be sent, by task. Each new lease asks for a report of its task.
    by_task: BTreeSet<(PlaneName, TaskId, u64)>,
    lanes: BTreeMap<PlaneName, Lane>,
    /// How many of them have failed so far, or were found at the start.
    waiting: usize,
    /// How many of them are set aside.
    set_aside: usize,
    next: u64,
    last_error: Option<String>,
}

impl ReportQueue {
    /// Adds a report that was found at the start. A report of this node is due at once, unless it was set aside.
    pub(super) fn found(&mut self, number: u64, entry: Entry, tries: Tries, ours: bool, now: Instant) {
        let place = match ours {
            false => Place::Foreign,
            true if tries.set_aside => Place::SetAside,
            true => Place::Waiting { due: now },
        };
        self.insert(number, Held { tries, written: true, ..Held::new(Arc::new(entry), place) });
        self.skip(number);
    }

    /// Reserves this number: no other report gets it.
    pub(super) fn skip(&mut self, number: u64) {
        self.next = self.next.max(number.saturating_add(1));
    }

    /// Adds a report that its attempt will send. It is in no file yet.
    pub(super) fn add(&mut self, entry: Arc<Entry>) -> u64 {
        let number = self.next;
        self.next += 1;
        self.insert(number, Held::new(entry, Place::Fresh));
        number
    }

    /// Adds a report from another file under a new number. Returns the number.
    pub(super) fn take_up(&mut self, entry: Entry, tries: Tries, ours: bool, now: Instant) -> u64 {
        let number = self.next;
        self.found(number, entry, tries, ours, now);
        number
    }

    /// All reports.
    pub(super) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.held.values().map(|held| &*held.entry)
    }

    fn insert(&mut self, number: u64, held: Held) {
        if held.place != Place::Foreign {
            self.by_task.insert(held.key(number));
            let lane = self.lanes.entry(held.entry.plane.clone()).or_default();
            lane.arrived(number, held.place);
            lane.held.reports += 1;
            lane.held.bytes += held.size;
        }
        self.waiting += usize::from(held.waits());
        self.set_aside += usize::from(held.place == Place::SetAside);
        self.held.insert(number, held);
    }

    /// Moves a report of this node to another place. `None`: it is gone.
    fn place(&mut self, number: u64, place: Place) -> Option<&mut Held> {
        let held = self.held.get_mut(&number)?;
        self.waiting -= usize::from(held.waits());
        let before = std::mem::replace(&mut held.place, place);
        self.waiting += usize::from(held.waits());
        self.set_aside -= usize::from(before == Place::SetAside);
        self.set_aside += usize::from(place == Place::SetAside);
        if let Some(lane) = self.lanes.get_mut(&held.entry.plane) {
            lane.left(number, before);
            lane.arrived(number, place);
        }
        Some(held)
    }

    /// The lane of a report that will be sent.
    fn lane(&mut self, number: u64) -> Option<&mut Lane> {
        self.lanes.get_mut(&self.held.get(&number)?.entry.plane)
    }

    /// The reports about `task` that will be sent.
    fn about(&self, plane: &PlaneName, task: &TaskId) -> impl DoubleEndedIterator<Item = u64> {
        about(&self.by_task, plane, task)
    }

    /// The content of a report to write. The report counts as written from now on.
    pub(super) fn write(&mut self, number: u64) -> Option<(Arc<Entry>, Tries)> {
        let held = self.held.get_mut(&number)?;
        held.written = true;
        Some((Arc::clone(&held.entry), held.tries.clone()))
    }

    /// Whether it counts as written.
    pub(super) fn is_written(&self, number: u64) -> bool {
        self.held.get(&number).is_some_and(|held| held.written)
    }

    /// Holds `lease` until the report leaves the queue.
    pub(super) fn hold(&mut self, number: u64, lease: Box<dyn LeaseKeeper>) {
        if let Some(held) = self.held.get_mut(&number) {
            held.lease_kept = Some(lease);
        }
    }

    /// The newest report about `task` that will be sent.
    pub(super) fn newest_of(&self, plane: &PlaneName, task: &TaskId) -> Option<u64> {
        self.about(plane, task).next_back()
    }

    /// Drops all held leases, because the process ends.
    pub(super) fn let_go(&mut self) {
        for held in self.held.values_mut() {
            held.lease_kept = None;
        }
    }

    /// Updates the address of a report from its lease. `true`: the change must be written.
    pub(super) fn rename(&mut self, number: u64) -> bool {
        let Some(held) = self.held.get_mut(&number) else { return false };
        let Some(address) = held.lease_kept.as_ref().map(|lease| lease.address()) else { return false };
        if address == held.entry.address {
            return false;
        }
        self.by_task.remove(&held.key(number));
        held.entry = Arc::new(held.entry.moved(address));
        self.by_task.insert(held.key(number));
        held.written
    }

    /// How many waiting reports may be sent concurrently to the control plane of this report.
    pub(super) fn abreast(&mut self, number: u64) -> usize {
        self.lane(number).map_or(1, |lane| lane.abreast())
    }

    /// The next step.
    pub(super) fn next(&mut self, now: Instant) -> NextReport {
        let Self { held, by_task, lanes, .. } = self;
        let busy = |number: u64| held.get(&number).is_some_and(|report| is_busy(held, by_task, &report.entry));
        let mut next = NextReport::Idle;
        for lane in lanes.values_mut() {
            match (lane.next(now, busy), next) {
                (NextReport::Send(number), _) => return NextReport::Send(number),
                (NextReport::At(due), NextReport::At(other)) => next = NextReport::At(due.min(other)),
                (NextReport::At(due), _) => next = NextReport::At(due),
                (NextReport::Idle, _) => {}
            }
        }
        next
    }

    /// Begins a try and counts it. `None` if nothing can be sent: the report is gone, foreign or set aside, or a report
    /// of its task is being sent.
    pub(super) fn begin(&mut self, number: u64, at: Timestamp) -> Option<(Arc<Entry>, Tries)> {
        let Held { entry, place, .. } = self.held.get(&number)?;
        let busy = || is_busy(&self.held, &self.by_task, entry);
        let place = match place {
            Place::Fresh => Place::Fresh,
            Place::Waiting { .. } if !busy() => Place::Sending,
            Place::Waiting { .. } | Place::Sending | Place::Foreign | Place::SetAside => return None,
        };
        let failures = self.lane(number)?.failures;
        let held = self.place(number, place)?;
        held.failures = failures;
        let tries = &mut held.tries;
        tries.count = tries.count.saturating_add(1);
        tries.first.get_or_insert(at);
        tries.last = Some(at);
        Some((Arc::clone(&held.entry), tries.clone()))
    }

    /// Removes a report that the control plane accepted or refused permanently. The answer ends the pause of the lane.
    pub(super) fn answered(&mut self, number: u64) -> Option<Gone> {
        let lane = self.lane(number)?;
        lane.failures = 0;
        lane.quiet_until = None;
        lane.flows = true;
        self.remove(number)
    }

    /// Removes a report in any state.
    pub(super) fn remove(&mut self, number: u64) -> Option<Gone> {
        let held = self.held.remove(&number)?;
        if self.by_task.remove(&held.key(number))
            && let Some(lane) = self.lanes.get_mut(&held.entry.plane)
        {
            lane.left(number, held.place);
            lane.held.reports -= 1;
            lane.held.bytes -= held.size;
        }
        self.waiting -= usize::from(held.waits());
        self.set_aside -= usize::from(held.place == Place::SetAside);
        if self.waiting == 0 {
            self.last_error = None;
        }
        Some(Gone { entry: held.entry, ended_as: held.ended_as, written: held.written })
    }

    /// Counts a failed try. The caller writes the result. `None` if the report was dropped during the try.
    pub(super) fn failed(&mut self, number: u64, failure: Failure<'_>, now: Instant, draw: f64) -> Option<Failed> {
        let Failure { error, retry_after, only_this } = failure;
        let held = self.held.get_mut(&number)?;
        let lane = self.lanes.get_mut(&held.entry.plane)?;
        lane.flows = false;
        held.tries.error = Some(error.to_owned());
        held.written = true;
        // Twice the pause of the lane: a report that alone fails must not be the next one every time.
        let own = pause_asked(PAUSES.pause(held.tries.count.saturating_add(1), draw), retry_after, PAUSE_MAX);
        let (mut pause, mut place) = (own, Place::Waiting { due: now + own });
        let first = if only_this {
            let first = held.tries.not_accepted_since.is_none();
            let since = *held.tries.not_accepted_since.get_or_insert(held.tries.last?);
            if held.tries.last?.duration_since(since) >= NOT_ACCEPTED_MAX {
                held.tries.set_aside = true;
                place = Place::SetAside;
            }
            first
        } else {
            // Reports that are sent concurrently fail together. That counts as one failure.
            let news = held.failures == lane.failures;
            lane.failures = lane.failures.saturating_add(u32::from(news));
            let all = pause_asked(PAUSES.pause(lane.failures, draw), retry_after, PAUSE_MAX);
            lane.quiet_until = lane.quiet_until.max(Some(now + all));
            pause = own.max(all);
            news && lane.failures == 1
        };
        self.last_error = Some(error.to_owned());
        let held = self.place(number, place)?;
        Some(Failed { tries: held.tries.clone(), pause, first, ended_as: held.ended_as.clone() })
    }

    /// Ends a try without an answer, because its sender ended. The caller writes the result.
    pub(super) fn broken_off(&mut self, number: u64, why: &str, now: Instant) -> Option<(Arc<Entry>, Tries)> {
        let held = self.place(number, Place::Waiting { due: now })?;
        held.tries.error = Some(why.to_owned());
        held.written = true;
        Some((Arc::clone(&held.entry), held.tries.clone()))
    }

    /// Puts a report that its attempt could not send among the waiting ones. It is due now.
    pub(super) fn hand_over(&mut self, number: u64, now: Instant) {
        self.place(number, Place::Waiting { due: now });
    }

    /// Ends all pauses, or those of some tasks. Reports that were set aside are sent again.
    pub(super) fn hurry(&mut self, tasks: Option<&HashSet<TaskId>>, now: Instant) -> Vec<Listing> {
        let numbers = self.numbers(tasks);
        numbers.iter().for_each(|number| self.hurry_one(*number, now));
        numbers.into_iter().filter_map(|number| self.listing(number)).collect()
    }

    /// Ends the pause of a report, and that of its control plane.
    pub(super) fn hurry_one(&mut self, number: u64, now: Instant) {
        let Some(held) = self.held.get_mut(&number).filter(|held| held.place != Place::Foreign) else { return };
        if matches!(held.place, Place::Waiting { .. } | Place::SetAside) {
            held.tries.take_back();
            self.place(number, Place::Waiting { due: now });
        }
        if let Some(lane) = self.lane(number) {
            lane.quiet_until = None;
        }
    }

    /// Ends the pause of a control plane that has answered another call. `false`: there was no pause, or no report
    /// waits.
    pub(super) fn plane_answers(&mut self, plane: &PlaneName) -> bool {
        let Some(lane) = self.lanes.get_mut(plane) else { return false };
        let waits = lane.sending > 0 || !lane.ready.is_empty() || !lane.paused.is_empty();
        lane.quiet_until.take().is_some() && waits
    }

    /// The numbers of all reports of these tasks, or of all.
    pub(super) fn numbers(&self, tasks: Option<&HashSet<TaskId>>) -> Vec<u64> {
        self.held.iter().filter(|(_, held)| wanted(&held.entry, tasks)).map(|(number, _)| *number).collect()
    }

    /// Every report, the oldest first.
    pub(super) fn listings(&self) -> Vec<Listing> {
        self.held.values().map(Held::listing).collect()
    }

    pub(super) fn listing(&self, number: u64) -> Option<Listing> {
        self.held.get(&number).map(Held::listing)
    }

    /// The numbers of the reports that will be sent to this control plane.
    pub(super) fn numbers_of(&self, plane: &PlaneName) -> Vec<u64> {
        let of_plane = |held: &Held| held.will_be_sent() && held.entry.plane == *plane;
        self.held.iter().filter(|(_, held)| of_plane(held)).map(|(number, _)| *number).collect()
    }

    /// The reports for this control plane that are not accepted yet.
    pub(super) fn held_of(&self, plane: &PlaneName) -> Amount {
        self.lanes.get(plane).map(|lane| lane.held).unwrap_or_default()
    }

    /// Whether the reports for this control plane reach the limit.
    pub(super) fn is_full(&self, plane: &PlaneName, limit: Amount) -> bool {
        self.held_of(plane).reaches(limit)
    }

    /// The control planes whose reports reach the limit.
    pub(super) fn full_planes(&self, limit: Amount) -> Vec<PlaneName> {
        let full = self.lanes.iter().filter(|(_, lane)| lane.held.reaches(limit));
        full.map(|(plane, _)| plane.clone()).collect()
    }

    /// About how much memory the reports take.
    pub(super) fn bytes(&self) -> usize {
        self.lanes.values().map(|lane| lane.held.bytes).sum()
    }

    /// Reports of this node that are not accepted yet and not set aside.
    pub(super) fn ours(&self) -> usize {
        self.by_task.len() - self.set_aside
    }

    pub(super) fn foreign(&self) -> usize {
        self.held.len() - self.by_task.len()
    }

    pub(super) fn set_aside(&self) -> usize {
        self.set_aside
    }

    /// Reports that have failed so far, or were found at the start.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// The oldest report that will be sent: when its task ended, and how often the report was sent.
    pub(super) fn oldest(&self) -> Option<(Timestamp, u32)> {
        let oldest = self.held.values().find(|held| held.will_be_sent())?;
        Some((oldest.entry.ended_at, oldest.tries.count))
    }

    pub(super) fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }
}

impl Held {
    /// A report that was never sent or written.
    fn new(entry: Arc<Entry>, place: Place) -> Self {
        let (ended_as, size) = (entry.task().clone(), entry.size());
        Self { entry, ended_as, size, tries: Tries::default(), place, failures: 0, written: false, lease_kept: None }
    }

    fn key(&self, number: u64) -> (PlaneName, TaskId, u64) {
        (self.entry.plane.clone(), self.entry.task().clone(), number)
    }

    /// It is being sent, or its attempt is about to send it.
    fn is_sent(&self) -> bool {
        matches!(self.place, Place::Fresh | Place::Sending)
    }

    fn will_be_sent(&self) -> bool {
        !matches!(self.place, Place::Foreign | Place::SetAside)
    }

    fn waits(&self) -> bool {
        matches!(self.place, Place::Waiting { .. } | Place::Sending)
    }

    fn listing(&self) -> Listing {
        let state = match self.place {
            Place::Fresh | Place::Sending => ListingState::Sending,
            Place::Waiting { .. } => ListingState::Waiting,
            Place::Foreign => ListingState::Foreign,
            Place::SetAside => ListingState::SetAside,
        };
        Listing::new(&self.entry, &self.tries, state)
    }
}

fn about(
    by_task: &BTreeSet<(PlaneName, TaskId, u64)>,
    plane: &PlaneName,
    task: &TaskId,
) -> impl DoubleEndedIterator<Item = u64> {
    let key = |number| (plane.clone(), task.clone(), number);
    by_task.range(key(0)..=key(u64::MAX)).map(|(_, _, number)| *number)
}

/// Whether a report about the same task is being sent.
fn is_busy(held: &BTreeMap<u64, Held>, by_task: &BTreeSet<(PlaneName, TaskId, u64)>, entry: &Entry) -> bool {
    about(by_task, &entry.plane, entry.task()).any(|number| held.get(&number).is_some_and(Held::is_sent))
}

fn wanted(entry: &Entry, tasks: Option<&HashSet<TaskId>>) -> bool {
    tasks.is_none_or(|tasks| tasks.contains(entry.task()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Outcome, ReportAddress, TaskResult};

    fn task(number: u128) -> TaskId {
        TaskId::parse(&number.to_string()).expect("an id")
    }

    fn entry(number: u128) -> Entry {
        Entry {
            plane: PlaneName::parse("p").expect("a name"),
            base_url: "u".into(),
            node: "n".into(),
            address: task(number).into(),
            job_id: None,
            domain_id: None,
            capability: "/lab/echo/v1".into(),
            task_result: TaskResult::bare(Outcome::Completed),
            ended_at: Timestamp::UNIX_EPOCH,
        }
    }

    fn plane(name: &str) -> PlaneName {
        PlaneName::parse(name).expect("a name")
    }

    fn entry_of(name: &str, number: u128) -> Entry {
        Entry { plane: plane(name), ..entry(number) }
    }

    /// The next step for one control plane, found by a walk over all reports.
    fn walked(queue: &ReportQueue, name: &str, now: Instant) -> NextReport {
        let of_plane = || queue.held.iter().filter(|(_, held)| held.entry.plane.as_str() == name);
        let Some(lane) = queue.lanes.get(&plane(name)) else { return NextReport::Idle };
        if of_plane().filter(|(_, held)| held.place == Place::Sending).count() >= lane.abreast() {
            return NextReport::Idle;
        }
        let sent = |task: &TaskId| of_plane().any(|(_, held)| held.is_sent() && held.entry.task() == task);
        let free = of_plane().filter(|(_, held)| !sent(held.entry.task()));
        let waiting = free.filter_map(|(number, held)| match held.place {
            Place::Waiting { due } => Some((*number, due)),
            _ => None,
        });
        let waiting: Vec<_> = waiting.collect();
        let quiet = lane.quiet_until.filter(|until| *until > now);
        match (waiting.iter().find(|(_, due)| *due <= now), quiet) {
            (Some((number, _)), None) => NextReport::Send(*number),
            (Some(_), Some(until)) => NextReport::At(until),
            (None, quiet) => match waiting.iter().map(|(_, due)| *due).min() {
                Some(due) => NextReport::At(quiet.map_or(due, |until| until.max(due))),
                None => NextReport::Idle,
            },
        }
    }

    #[test]
    fn unreachable_plane_does_not_stop_another() {
        let (mut queue, now) = (ReportQueue::default(), Instant::now());
        for number in 0..4 {
            let name = if number < 2 { "a" } else { "b" };
            queue.found(number, entry_of(name, u128::from(number)), Tries::default(), true, now);
        }
        assert_eq!(next(&mut queue, now), NextReport::Send(0));
        queue.failed(0, refused(None), now, 1.0);
        assert_eq!(next(&mut queue, now), NextReport::Send(2));
        queue.answered(2);
        assert_eq!(next(&mut queue, now), NextReport::Send(3));
        queue.answered(3);
        // The success of the other control plane ended no pause here.
        assert_eq!(queue.next(now), NextReport::At(now + PAUSES.grown(1)));
        assert!(!queue.plane_answers(&plane("b")));
        assert!(queue.plane_answers(&plane("a")));
        assert_eq!(next(&mut queue, now), NextReport::Send(1));
    }

    fn refused(retry_after: Option<Duration>) -> Failure<'static> {
        Failure { error: "no", retry_after, only_this: false }
    }

    fn begin(queue: &mut ReportQueue, number: u64) {
        queue.begin(number, Timestamp::UNIX_EPOCH).expect("there to be sent");
    }

    /// Begins to send the next report and returns its number.
    fn next(queue: &mut ReportQueue, now: Instant) -> NextReport {
        let next = queue.next(now);
        if let NextReport::Send(number) = next {
            begin(queue, number);
        }
        next
    }

    /// Simulates a control plane for `count` waiting reports, for at most `limit`. Returns when each was sent, in
    /// milliseconds, with its number. A `!` marks a failure.
    fn play(count: u64, limit: Duration, fails: impl Fn(u64, Duration) -> bool) -> Vec<(u128, String)> {
        let (mut queue, start) = (ReportQueue::default(), Instant::now());
        for number in 0..count {
            queue.found(number, entry(u128::from(number)), Tries::default(), true, start);
        }
        let (mut now, mut seen) = (start, Vec::new());
        loop {
            match next(&mut queue, now) {
                NextReport::Send(number) => {
                    let at = now - start;
                    let failed = fails(number, at);
                    seen.push((at.as_millis(), format!("{number}{}", if failed { "!" } else { "" })));
                    if failed {
                        queue.failed(number, refused(None), now, 1.0);
                    } else {
                        queue.answered(number);
                    }
                }
                NextReport::At(due) if due <= start + limit => now = due,
                NextReport::At(_) | NextReport::Idle => return seen,
            }
        }
    }

    fn check(seen: &[(u128, String)], expected: &str) {
        let seen: Vec<String> = seen.iter().map(|(at, what)| format!("{at} {what}")).collect();
        assert_eq!(seen.join(", "), expected);
    }

    #[test]
    fn reports_go_out_oldest_first() {
        check(&play(3, Duration::ZERO, |_, _| false), "0 0, 0 1, 0 2");
    }

    #[test]
    fn outage_costs_one_request_per_pause_until_recovery() {
        let back = Duration::from_secs(2);
        let seen = play(4, Duration::from_secs(20), |_, at| at < back);
        check(&seen, "0 0!, 200 1!, 600 0!, 1400 0!, 3000 0, 3000 1, 3000 2, 3000 3");
    }

    #[test]
    fn failing_report_does_not_block_other_reports() {
        let seen = play(3, Duration::from_secs(3), |number, _| number == 0);
        check(&seen, "0 0!, 200 1, 200 2, 400 0!, 1200 0!, 2800 0!");
    }

    #[test]
    fn long_outage_causes_few_requests() {
        let seen = play(1000, Duration::from_secs(3600), |_, _| true);
        assert!((20..=40).contains(&seen.len()), "{} requests in an hour", seen.len());
    }

    #[test]
    fn retry_pauses_double_up_to_limit_with_jitter() {
        let pauses: Vec<u128> = (1..=4).map(|count| PAUSES.pause(count, 1.0).as_millis()).collect();
        assert_eq!(pauses, [200, 400, 800, 1600]);
        assert_eq!(PAUSES.pause(u32::MAX, 1.0), PAUSE_MAX);
        assert_eq!(PAUSES.pause(1, 0.0).as_millis(), 100);
    }

    #[test]
    fn requested_retry_pause_is_obeyed_within_bounds() {
        for (asked, pause) in [(Some(7), 7000), (Some(3600), 300_000), (Some(0), 400), (None, 400)] {
            let (mut queue, start) = (ReportQueue::default(), Instant::now());
            for number in 0..2 {
                queue.found(number, entry(u128::from(number)), Tries::default(), true, start);
            }
            assert_eq!(next(&mut queue, start), NextReport::Send(0));
            queue.failed(0, refused(asked.map(Duration::from_secs)), start, 1.0);
            // The other report waits as long, or for the pause of the lane, which is half as long.
            let all = if pause == 400 { 200 } else { pause };
            assert_eq!(queue.next(start), NextReport::At(start + Duration::from_millis(all)));
            // An answered poll ends the pause of the lane. It does not end the pause of the failed report.
            assert!(queue.plane_answers(&plane("p")));
            assert_eq!(next(&mut queue, start), NextReport::Send(1));
            assert_eq!(queue.next(start), NextReport::Idle, "one alone, as the plane has not taken any");
            queue.answered(1);
            assert_eq!(queue.next(start), NextReport::At(start + Duration::from_millis(pause)));
        }
    }

    #[test]
    fn new_and_foreign_reports_are_not_scheduled() {
        let (mut queue, now) = (ReportQueue::default(), Instant::now());
        queue.found(4, entry(4), Tries::default(), false, now);
        let fresh = queue.add(Arc::new(entry(5)));
        assert_eq!((fresh, queue.next(now)), (5, NextReport::Idle));
        assert_eq!((queue.ours(), queue.foreign(), queue.waiting()), (1, 1, 0));
        queue.hurry(None, now);
        assert_eq!(queue.next(now), NextReport::Idle);
        queue.hand_over(fresh, now);
        assert_eq!(next(&mut queue, now), NextReport::Send(fresh));
        assert_eq!(queue.next(now), NextReport::Idle, "it is being sent");
    }

    #[test]
    fn reports_are_sent_concurrently_only_after_a_success() {
        let (mut queue, now) = (ReportQueue::default(), Instant::now());
        for number in 0..20 {
            queue.found(number, entry(u128::from(number)), Tries::default(), true, now);
        }
        let round = |queue: &mut ReportQueue, now| -> Vec<u64> {
            std::iter::from_fn(|| if let NextReport::Send(number) = next(queue, now) { Some(number) } else { None })
                .collect()
        };
        assert_eq!(round(&mut queue, now), [0]);
        queue.answered(0);
        assert_eq!(round(&mut queue, now), (1..9).collect::<Vec<_>>());
        queue.answered(5);
        assert_eq!(round(&mut queue, now), [9]);
        // The control plane becomes unreachable. Eight concurrent failures count as one, and cause the pause of one.
        let mut first = 0;
        for number in [1, 2, 3, 4, 6, 7, 8, 9] {
            let failed = queue.failed(number, refused(None), now, 1.0).expect("still there");
            first += u32::from(failed.first);
        }
        assert_eq!((first, queue.next(now)), (1, NextReport::At(now + PAUSES.grown(1))));
        assert_eq!(round(&mut queue, now + PAUSES.grown(1)), [10]);
    }

    #[test]
    fn of_one_task_one_report_is_under_way() {
        let (mut queue, now) = (ReportQueue::default(), Instant::now());
        for (number, task) in [(0, 8), (1, 7), (2, 7), (3, 9)] {
            queue.found(number, entry(task), Tries::default(), true, now);
        }
        begin(&mut queue, 0);
        queue.answered(0);
        assert_eq!((next(&mut queue, now), next(&mut queue, now)), (NextReport::Send(1), NextReport::Send(3)));
        assert_eq!((queue.next(now), queue.begin(2, Timestamp::UNIX_EPOCH)), (NextReport::Idle, None));
        queue.answered(1);
        assert_eq!(queue.next(now), NextReport::Send(2));
    }

    struct Named(u128);

    impl LeaseKeeper for Named {
        fn address(&self) -> ReportAddress {
            task(self.0).into()
        }
    }

    #[test]
    fn queue_matches_a_walk_over_all_reports() {
        let (mut queue, mut now) = (ReportQueue::default(), Instant::now());
        let mut state = 7_u32;
        let mut draw = |below: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) % below
        };
        let mut set_aside = 0;
        for step in 0..20_000 {
            // Few tasks and few numbers, so that some repeat.
            let name = ["p", "q"][usize::from(draw(2) == 0)];
            let (task, number) = (u128::from(draw(5)), u64::from(draw(12)) + queue.next.saturating_sub(10));
            let foreign = queue.held.get(&number).is_some_and(|held| held.place == Place::Foreign);
            now += Duration::from_millis(u64::from(draw(100)));
            let at = Timestamp::UNIX_EPOCH + SignedDuration::from_hours(24 * step);
            match draw(12) {
                // A report for another control plane is never sent, so it gets no answer.
                2..=8 if foreign => assert_eq!(queue.begin(number, Timestamp::UNIX_EPOCH), None),
                0 => drop(queue.add(Arc::new(entry_of(name, task)))),
                1 if !queue.held.contains_key(&number) => {
                    queue.found(number, entry_of(name, task), Tries::default(), draw(2) == 0, now);
                }
                2 => queue.hold(number, Box::new(Named(task))),
                3 => drop(queue.rename(number)),
                4 | 5 => drop(queue.begin(number, at)),
                6 => {
                    drop(queue.begin(number, at));
                    let failure = Failure { only_this: draw(4) > 0, ..refused(None) };
                    set_aside +=
                        u32::from(queue.failed(number, failure, now, 1.0).is_some_and(|now| now.tries.set_aside));
                }
                7 => drop(queue.broken_off(number, "stopped", now)),
                8 => queue.hand_over(number, now),
                9 => drop(queue.hurry(Some(&HashSet::from([super::tests::task(task)])), now)),
                10 => drop(queue.plane_answers(&plane(name))),
                _ => drop(queue.answered(number)),
            }
            let all = || queue.held.iter().filter(|(_, held)| held.place != Place::Foreign);
            let waiting = all().filter(|(_, held)| held.waits()).count();
            let aside = all().filter(|(_, held)| held.place == Place::SetAside).count();
            let counts = (queue.ours(), queue.waiting(), queue.set_aside());
            assert_eq!(counts, (all().count() - aside, waiting, aside), "step {step}");
            assert_eq!(queue.foreign(), queue.held.len() - all().count());
            for name in ["p", "q"].map(plane) {
                let of_plane = all().filter(|(_, held)| held.entry.plane == name);
                let bytes = of_plane.clone().map(|(_, held)| held.size).sum();
                assert_eq!(queue.held_of(&name), Amount { reports: of_plane.count(), bytes }, "step {step}");
            }
            for (name, task) in (0..5).flat_map(|task| ["p", "q"].map(|name| (name, super::tests::task(task)))) {
                let newest = all().rfind(|(_, held)| *held.entry.plane.as_str() == *name && *held.entry.task() == task);
                assert_eq!(queue.newest_of(&plane(name), &task), newest.map(|(number, _)| *number), "step {step}");
            }
            let walked = ["p", "q"].map(|name| walked(&queue, name, now));
            let due =
                walked.iter().filter_map(|next| if let NextReport::At(due) = next { Some(*due) } else { None }).min();
            let sent = walked.into_iter().find(|next| matches!(next, NextReport::Send(_)));
            let wanted = sent.or(due.map(NextReport::At)).unwrap_or(NextReport::Idle);
            assert_eq!(queue.next(now), wanted, "step {step}");
        }
        assert!(set_aside > 0, "no report was set aside");
    }

    #[test]
    fn report_that_alone_fails_is_overtaken_and_set_aside() {
        let (mut queue, now) = (ReportQueue::default(), Instant::now());
        for number in [0, 1] {
            queue.found(number, entry(u128::from(number)), Tries::default(), true, now);
        }
        let alone = Failure { only_this: true, ..refused(None) };
        let fail = |queue: &mut ReportQueue, hour, now| {
            queue.begin(0, Timestamp::UNIX_EPOCH + SignedDuration::from_hours(hour)).expect("there to be sent");
            queue.failed(0, alone, now, 1.0).expect("still there")
        };
        let first = fail(&mut queue, 0, now);
        assert!(first.first && !first.tries.set_aside);
        assert_eq!(queue.next(now), NextReport::Send(1), "the other report does not wait");
        queue.answered(1);
        queue.hurry(None, now);
        let later = fail(&mut queue, 23, now);
        assert!(!later.first && !later.tries.set_aside);
        queue.hurry(None, now);
        let Failed { tries, .. } = fail(&mut queue, 24, now);
        assert!(tries.set_aside);
        assert_eq!((queue.next(now), queue.ours(), queue.set_aside()), (NextReport::Idle, 0, 1));
        assert_eq!(queue.listing(0).map(|listing| listing.state), Some(ListingState::SetAside));
        // It stays set aside after a restart, until an operator retries it.
        let mut queue = ReportQueue::default();
        queue.found(0, entry(0), tries, true, now);
        assert_eq!((queue.next(now), queue.newest_of(&plane("p"), &task(0))), (NextReport::Idle, Some(0)));
        queue.hurry(None, now);
        assert_eq!(queue.next(now), NextReport::Send(0));
        assert!(!fail(&mut queue, 30, now).tries.set_aside, "the time begins again");
    }

    #[test]
    fn attempt_counts_from_start_even_if_interrupted() {
        let (mut queue, now) = (ReportQueue::default(), Instant::now());
        let number = queue.add(Arc::new(entry(1)));
        assert_eq!(queue.oldest(), Some((Timestamp::UNIX_EPOCH, 0)));
        begin(&mut queue, number);
        assert_eq!(queue.oldest(), Some((Timestamp::UNIX_EPOCH, 1)));
        let (_, tries) = queue.broken_off(number, "the node stopped", now).expect("there");
        assert_eq!((tries.count, tries.error.as_deref()), (1, Some("the node stopped")));
        assert_eq!(queue.next(now), NextReport::Send(number));
    }
}
