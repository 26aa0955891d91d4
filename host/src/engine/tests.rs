//! Tests of the engine with a control plane that leases one task, and without plugins.

use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use tracing_subscriber::layer::SubscriberExt as _;

use super::*;
use crate::{
    leases::{PlaneFacts, PlaneReadiness, Renewal},
    model::{OutcomeWord, Pending, PlaneName, ReportState, StatusBoard, TaskId, TaskResult},
    node_event::testing::LogCodes,
    outbox::{self, StateDir},
    plugins::{self, Places, PluginsFile},
    session,
    storage::{self, Disk, DomainStorage, LocalStorage, Scratch},
    transport,
};

/// Leases one task whose capability no plugin serves, and accepts its report.
struct OneLease {
    facts: PlaneFacts,
    leased: AtomicBool,
}

#[async_trait]
impl LeaseSource for OneLease {
    fn facts(&self) -> &PlaneFacts {
        &self.facts
    }

    async fn run(&self, stop: CancellationToken) {
        stop.cancelled().await;
    }

    fn readiness(&self) -> PlaneReadiness {
        PlaneReadiness::Ready
    }

    async fn until_ready(&self) -> bool {
        true
    }

    async fn poll(&self) -> Result<Option<Lease>, LeaseError> {
        let lease = || Lease::bare(task(), "/lab/unknown/v1".parse().expect("a capability"));
        Ok((!self.leased.swap(true, Ordering::Relaxed)).then(lease))
    }

    async fn heartbeat(&self, _: &ReportAddress, _: &Pending, _: BootInstant) -> Result<Renewal, LeaseError> {
        Ok(Renewal::default())
    }

    async fn report(&self, _: &ReportAddress, _: &TaskResult) -> Result<(), LeaseError> {
        Ok(())
    }

    async fn reject(&self, _: &ReportAddress, _: &Outcome) -> Result<(), LeaseError> {
        Ok(())
    }
}

fn task() -> TaskId {
    TaskId::parse("one").expect("a task id")
}

async fn engine(dir: &std::path::Path, events: NodeEvents) -> Engine {
    let name = PlaneName::parse("test").expect("a name");
    let facts = PlaneFacts {
        name,
        base_url: "https://plane.test".into(),
        node: "node".into(),
        admission: Admission::SlotFirst,
        heartbeat_every: None,
    };
    let plane: Arc<dyn LeaseSource> = Arc::new(OneLease { facts, leased: AtomicBool::new(false) });
    let config = outbox::Config {
        state: StateDir::claim(&dir.join("state"), Duration::ZERO).await.expect("a state folder"),
        planes: vec![Arc::clone(&plane)],
        max: 10,
        bytes_max: u64::MAX,
        senders: 1,
    };
    let outbox = Outbox::open(config, events.clone()).expect("opens");
    let storage = storage::Config::new(dir.join("scratch")).domain;
    let client = transport::Client::new(transport::Config::default());
    let plugins = plugins::Config {
        places: Places::default(),
        file: PluginsFile::default(),
        max_concurrency: 1,
        log_level: 0,
        init_limit: Duration::from_secs(1),
        allow_writable: false,
    };
    let modules = Modules {
        sessions: Sessions::new(session::Config::default(), Handle::current(), events.clone()),
        planes: vec![plane],
        storage: Stores::new(
            Scratch::open(dir.join("scratch")).expect("a scratch folder"),
            Disk::new(dir.to_owned(), 0),
            LocalStorage::new(storage.budget.clone(), storage.unpack.clone()),
            DomainStorage::new(client, storage),
        ),
        outbox,
        plugins: Arc::new(Plugins::load(&plugins).expect("no plugins")),
        events,
        workers: Handle::current(),
    };
    Engine::new(modules, Config::default())
}

#[tokio::test]
async fn subscribers_see_a_task_as_the_log_does() {
    let codes = LogCodes::up_to(tracing::Level::INFO);
    let _log = crate::model::test_log::capture(tracing_subscriber::registry().with(codes.clone()));
    let dir = tempfile::tempdir().expect("a folder");
    let events = NodeEvents::new(StatusBoard::new(1, Vec::new()));
    let mut subscriber = events.subscribe();
    let stops = StopSignals::default();
    let running = tokio::spawn(engine(dir.path(), events.clone()).await.run(stops.clone()));
    let mut seen = Vec::new();
    while seen.last().is_none_or(|event: &NodeEvent| event.name() != "task.ended") {
        let next = tokio::time::timeout(Duration::from_secs(20), subscriber.recv()).await;
        seen.push(next.expect("an event in time").expect("no event is lost"));
    }
    stops.drain.cancel();
    assert_eq!(running.await.expect("no panic"), Ended::Drained);
    seen.extend(std::iter::from_fn(|| subscriber.try_recv().ok()));

    let names: Vec<&str> = seen.iter().map(NodeEvent::name).collect();
    assert_eq!(names, ["task.started", "task.ended", "node.draining"]);
    assert_eq!(codes.take(), names);
    assert!(seen[..2].iter().all(|event| event.task() == Some(&task())), "{seen:?}");
    let NodeEvent::TaskEnded { record, reason, .. } = &seen[1] else { panic!("{seen:?}") };
    assert_eq!((record.outcome, record.report), (OutcomeWord::HostFault, ReportState::Accepted));
    assert_eq!(reason.as_deref(), Some("no runner registered for this capability"));
    assert_eq!(events.board().now().recent.back(), Some(record));
    assert_eq!(events.board().now().phase, crate::model::Phase::Draining);
}
