//! Each event with its log line and its effect on the status.

use std::collections::BTreeSet;

use tracing::Level;
use tracing_subscriber::layer::SubscriberExt as _;

use super::{testing::LogCodes, *};
use crate::model::{CancelReason, Lease, Outcome, TaskResult};

fn task() -> TaskId {
    TaskId::parse("one").expect("a task id")
}

fn plane() -> PlaneName {
    PlaneName::parse("test").expect("a name")
}

fn capability() -> Capability {
    Capability::parse("/lab/echo/v1").expect("a capability")
}

fn task_ended(board: &StatusBoard, report: ReportState, outcome: Outcome) -> NodeEvent {
    let lease = Lease::bare(task(), capability());
    let held_lease = crate::model::HeldLease::new(lease, crate::model::Setup::Pending).0;
    let held = board.began(&held_lease, None, None);
    let reason = outcome.reason();
    let record = TaskRecord::new(&plane(), &held_lease.lease, None, &TaskResult::bare(outcome), Duration::ZERO, report);
    let report_reason = Some(CancelReason::Plane.as_str().to_owned());
    NodeEvent::TaskEnded { held, record: Arc::new(record), reason, report_reason }
}

/// Each event. An event that is logged in several ways is here several times.
fn all(board: &StatusBoard) -> Vec<NodeEvent> {
    let (path, disk, error) = (PathBuf::from("/"), DiskStatus::default(), "why".to_owned());
    let failed = || Outcome::HostFault { message: "why".to_owned() };
    let (plugin, pause, outcome): (Arc<str>, _, _) = ("echo".into(), Duration::ZERO, OutcomeWord::Completed);
    let refused = |state, registered, repeated| NodeEvent::RegistrationFailed {
        error: "why".to_owned(),
        state,
        registered,
        pause,
        repeated,
    };
    vec![
        NodeEvent::NodeStarted { address: None, planes: vec![plane()] },
        NodeEvent::NodeLeasing,
        NodeEvent::DiskFull { path: path.clone(), disk },
        NodeEvent::DiskHasRoom { path, disk },
        refused(RegistrationState::Conflict, false, false),
        NodeEvent::RegistrationAccepted { address: "0x".to_owned(), form: RegistrationForm::Wallet, capabilities: 1 },
        refused(RegistrationState::Registering, true, true),
        NodeEvent::RegistrationRepeated { cause: RepeatCause::Age, capabilities: 1 },
        NodeEvent::RegistrationRepeated { cause: RepeatCause::Rejections, capabilities: 1 },
        NodeEvent::LoginFailed { error: error.clone(), failures: 2, pause },
        NodeEvent::TokenRejected { error: "why", pause },
        NodeEvent::TokenRenewed { lifetime: pause, renew_in: pause },
        NodeEvent::RegistrationLost { error: error.clone() },
        NodeEvent::PluginCallsHang { plugin: Arc::clone(&plugin), calls: 1, call: "start", longest: pause },
        NodeEvent::PluginCallsReturned { plugin: Arc::clone(&plugin) },
        NodeEvent::RunnerStuck { task: task(), plugin: Arc::clone(&plugin), grace: pause, strikes: 3 },
        NodeEvent::PluginOutOfService { plugin, reason: error.clone(), capabilities: vec![capability()] },
        NodeEvent::PlaneNotReady { plane: plane(), error: error.clone() },
        NodeEvent::PlaneReady { plane: plane() },
        NodeEvent::PollFailed { error: error.clone(), pause },
        NodeEvent::LeaseUnreadable { task: task(), error: error.clone() },
        NodeEvent::LeaseSkipped { task: task(), reason: SkipReason::Cancelled },
        NodeEvent::LeaseSkipped { task: task(), reason: SkipReason::Expired },
        NodeEvent::LeaseTakenElsewhere { task: task(), error: error.clone() },
        NodeEvent::LeaseLost { task: task() },
        NodeEvent::TaskLeasedAgain { task: task() },
        NodeEvent::TaskStarted { task: task() },
        NodeEvent::TaskCancelled { task: task() },
        NodeEvent::TaskCancelledByOperator { plane: plane(), task: task() },
        NodeEvent::TaskRenamed { task: task(), formerly: task() },
        task_ended(board, ReportState::Accepted, Outcome::Completed),
        task_ended(board, ReportState::Accepted, failed()),
        task_ended(board, ReportState::Refused, failed()),
        task_ended(board, ReportState::Waiting, failed()),
        task_ended(board, ReportState::Dropped, failed()),
        task_ended(board, ReportState::None, Outcome::Cancelled),
        NodeEvent::ReportWaiting { task: task(), error: error.clone(), pause },
        NodeEvent::ReportDelivered { task: task(), ended_as: task(), outcome, tries: 2, waited: pause },
        NodeEvent::ReportRefused { task: task(), ended_as: task(), outcome, tries: 2, error: error.clone() },
        NodeEvent::ReportSetAside { task: task(), ended_as: task(), outcome, tries: 2, error: error.clone() },
        NodeEvent::ReportDropped { task: task(), ended_as: task(), outcome },
        NodeEvent::OutboxFull { planes: vec![plane()], waiting: 1, limit: 1, bytes: 1 },
        NodeEvent::OutboxHasRoom { waiting: 0 },
        NodeEvent::OutboxNotWritable { error: error.clone() },
        NodeEvent::OutboxWritable,
        NodeEvent::HeartbeatFailed { task: task(), error: error.clone(), repeated: true },
        NodeEvent::HeartbeatFailed { task: task(), error: error.clone(), repeated: false },
        NodeEvent::HeartbeatRecovered { task: task() },
        NodeEvent::HeartbeatRefused { task: task(), error: error.clone(), ended: true },
        NodeEvent::HeartbeatRefused { task: task(), error, ended: false },
        NodeEvent::NodeDraining { tasks: 1, limit: Duration::ZERO },
        NodeEvent::NodeStopped { cut_short: false },
    ]
}

#[test]
fn every_event_is_named_like_its_log_line() {
    let codes = LogCodes::up_to(Level::DEBUG);
    let board = StatusBoard::new(1, vec![capability().to_string()]);
    let events = NodeEvents::new(board.clone());
    let all = all(&board);
    let captured = crate::model::test_log::capture(tracing_subscriber::registry().with(codes.clone()));
    for event in &all {
        events.emit(event.clone());
        assert_eq!(codes.take(), [event.name()], "{event:?}");
    }
    drop(captured);
    // Without this check, a new variant could miss in the list above.
    let arms =
        include_str!("mod.rs").lines().filter_map(|line| line.trim().strip_prefix("Self::")?.split_once(" => \""));
    let names = arms.filter_map(|(_, name)| name.strip_suffix("\",")).filter(|name| name.contains('.'));
    assert_eq!(all.iter().map(NodeEvent::name).collect::<BTreeSet<_>>(), names.collect());

    let status = board.now();
    assert_eq!((status.phase, status.planes.first().polls.failed, status.recent.len()), (Phase::Stopped, 1, 6));
    let reports: Vec<_> = status.recent.iter().map(|record| record.report).collect();
    use ReportState::{Accepted, Dropped, None, Refused};
    assert_eq!(reports, [Accepted, Accepted, Refused, Accepted, Dropped, None], "the waiting report was delivered");
    assert_eq!(status.unreported, 2);
    assert_eq!(
        (status.planes.first().registration, status.planes.first().registration_error.as_deref()),
        (RegistrationState::Disconnected, Some("why"))
    );
    assert!(status.planes.first().login_error.is_none() && status.planes.first().token_expires_at.is_some());
    assert_eq!(
        (&status.capabilities[..], &status.degraded[..]),
        (&[][..], &["plugin echo is out of service: why".to_owned()][..])
    );
}

#[test]
fn registered_node_leaves_its_state_only_after_conflict() {
    use RegistrationState::{Conflict, Disconnected, Registered, Registering};
    let events = NodeEvents::new(StatusBoard::new(1, Vec::new()));
    let failed = |state, registered| NodeEvent::RegistrationFailed {
        error: state_error(state),
        state,
        registered,
        pause: Duration::ZERO,
        repeated: false,
    };
    let accepted =
        NodeEvent::RegistrationAccepted { address: String::new(), form: RegistrationForm::Wallet, capabilities: 1 };
    let repeated = NodeEvent::RegistrationRepeated { cause: RepeatCause::Age, capabilities: 1 };
    let steps = [
        (failed(Disconnected, false), Disconnected, Some(Disconnected)),
        (failed(Registering, false), Registering, Some(Registering)),
        (accepted, Registered, None),
        (failed(Disconnected, true), Registered, Some(Disconnected)),
        (failed(Conflict, true), Conflict, Some(Conflict)),
        (failed(Registering, true), Conflict, Some(Registering)),
        (repeated, Registered, None),
    ];
    for (event, state, error) in steps {
        events.emit(event.clone());
        let now = events.board().now();
        let status = now.planes.first();
        assert_eq!((status.registration, &status.registration_error), (state, &error.map(state_error)), "{event:?}");
    }
}

fn state_error(state: RegistrationState) -> String {
    format!("{state} because of the test")
}

#[test]
fn late_subscribers_lose_only_the_oldest_events() {
    let events = NodeEvents::new(StatusBoard::new(1, Vec::new()));
    events.emit(NodeEvent::NodeLeasing); // nobody is subscribed
    let mut subscriber = events.subscribe();
    for _ in 0..=STORED_MAX {
        events.emit(NodeEvent::TaskStarted { task: task() });
    }
    assert!(matches!(subscriber.try_recv(), Err(broadcast::error::TryRecvError::Lagged(1))));
    assert_eq!(std::iter::from_fn(|| subscriber.try_recv().ok()).count(), STORED_MAX);
    drop(subscriber);
    events.emit(NodeEvent::NodeLeasing); // nobody is subscribed any more
}
