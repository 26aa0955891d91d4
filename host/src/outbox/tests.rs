//! Tests the outbox with the real adapter, against a DMS whose answers each test gives.

use serde_json::json;
use tempfile::TempDir;
use uuid::Uuid;

use super::{delivery::PendingReport, *};
use crate::{
    auth::TokenSource,
    leases::dms::{self, Dms},
    model::{AnnouncedData, Artifact, Lease, Outcome, ReportAddress, StatusBoard, TaskId, TaskResult},
    transport::{
        self,
        testing::{Call, Service, assert_clean},
    },
};

const NODE: &str = "0x1a642f0e3c3af545e7acbd38b07251b3990914f1";

fn id(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

fn lease(number: u128) -> Lease {
    lease_of(number, Some(id(900)), Some(Uuid::nil()))
}

fn lease_of(number: u128, job: Option<Uuid>, domain_id: Option<Uuid>) -> Lease {
    let capability = "/lab/echo/v1";
    let address = dms::address(id(number), job, domain_id, capability);
    let data = AnnouncedData::at_server(None, domain_id);
    Lease { job, data, ..Lease::bare(address, capability.parse().expect("a name")) }
}

fn completed() -> TaskResult {
    let artifact = Artifact {
        logical_path: "out/a.bin".into(),
        name: "out_a_bin".into(),
        data_type: "bin_data".into(),
        id: Some("d-1".into()),
        size: Some(3),
        sha256: Some("ab".repeat(32)),
    };
    TaskResult { artifacts: vec![artifact], ..TaskResult::bare(Outcome::Completed) }
}

/// A lease whose task has this name.
fn named(lease: &Lease) -> impl LeaseKeeper + use<> {
    struct Named(ReportAddress);
    impl LeaseKeeper for Named {
        fn address(&self) -> ReportAddress {
            self.0.clone()
        }
    }
    Named(lease.address.clone())
}

fn complete(number: u128) -> String {
    format!("POST /tasks/{}/complete", id(number))
}

/// A control plane, and outboxes that are opened one after the other on one folder.
struct Bench {
    plane: Service,
    state: TempDir,
    events: NodeEvents,
}

impl Bench {
    async fn new() -> Self {
        let events = NodeEvents::new(StatusBoard::new(1, Vec::new()));
        Self { plane: Service::start().await, state: tempfile::tempdir().expect("a folder"), events }
    }

    fn open_as(&self, node: &str, max: usize) -> Outbox {
        let config =
            dms::Config { request_timeout: Duration::from_secs(20), ..dms::Config::new(self.plane.url.clone()) };
        self.open_with(config, node, max)
    }

    fn open_with(&self, config: dms::Config, node: &str, max: usize) -> Outbox {
        let client = transport::Client::new(transport::Config::default());
        let source: Arc<dyn LeaseSource> =
            Arc::new(Dms::with_tokens(config, client, node.into(), TokenSource::holding("node")));
        let state = StateDir::open(self.state.path()).expect("a folder of our own");
        let config = Config { state, planes: vec![source], max, bytes_max: u64::MAX, senders: 2 };
        Outbox::open(config, self.events.clone()).expect("opens")
    }

    fn open(&self) -> Outbox {
        self.open_as(NODE, 100)
    }

    /// Adds a report for each number.
    async fn kept(&self, outbox: &Outbox, numbers: impl IntoIterator<Item = u128>) -> Vec<PendingReport> {
        let mut all = Vec::new();
        for number in numbers {
            let kept = enter(outbox, number);
            kept.ticket().write().await;
            all.push(kept);
        }
        all
    }

    fn status(&self) -> OutboxStatus {
        self.events.board().now().outbox.clone()
    }

    async fn until(&self, wanted: impl Fn(&OutboxStatus) -> bool) {
        let seen = self.events.board().until(|status| wanted(&status.outbox));
        let seen = tokio::time::timeout(Duration::from_secs(20), seen).await;
        assert!(seen.is_ok(), "waited for another status than {:?}", self.status());
    }
}

/// Adds the report of the completed task `number`.
fn enter(outbox: &Outbox, number: u128) -> PendingReport {
    let (plane, lease, task_result) = (outbox.0.planes[0].facts(), &lease(number), &completed());
    outbox.enter(NewReport { plane, lease, task_result, elapsed: Duration::ZERO })
}

/// Ends an outbox without unanswered tries.
async fn finish(outbox: &Outbox, limit: Duration) -> Remaining {
    outbox.finish(limit, UnansweredTries::default()).await
}

/// Runs an outbox until this is dropped.
struct Running(CancellationToken, tokio::task::JoinHandle<UnansweredTries>);

impl Running {
    fn start(outbox: &Outbox) -> Self {
        let (stop, outbox) = (CancellationToken::new(), outbox.clone());
        let stopped = stop.clone();
        Self(stop, tokio::spawn(async move { outbox.run(stopped).await }))
    }

    async fn stop(self) -> UnansweredTries {
        self.0.cancel();
        self.1.await.expect("it ends in order")
    }
}

#[tokio::test]
async fn accepted_report_is_deleted_from_outbox() {
    let mut bench = Bench::new().await;
    let outbox = bench.open();
    let kept = bench.kept(&outbox, [1]).await.remove(0);
    let plane = async {
        let call = bench.plane.expect(&complete(1)).await;
        let job =
            json!({ "task_id": id(1), "job_id": id(900), "domain_id": Uuid::nil(), "capability": "/lab/echo/v1" });
        assert_eq!(call.json()["meta"]["job"], job);
        assert_eq!(call.json()["output_cids"], json!(["d-1"]));
        call.answer(204, "");
    };
    let (sent, ()) = tokio::join!(kept.send(named(&lease(1))), plane);
    assert_eq!(sent, Sent::Accepted);
    assert_eq!(bench.status(), OutboxStatus::default());
    assert_eq!(finish(&outbox, Duration::ZERO).await.reports, 0);
    drop(outbox);
    assert_eq!(OfflineOutbox::open(bench.state.path()).expect("opens").expect("a file").listings(None), []);
}

#[tokio::test]
async fn reports_survive_restart_and_oldest_is_sent_first() {
    let mut bench = Bench::new().await;
    let outbox = bench.open();
    drop(bench.kept(&outbox, [3, 1, 2]).await);
    assert_eq!(bench.status().waiting, 3);
    finish(&outbox, Duration::ZERO).await;
    drop(outbox);
    while bench.plane.waiting().is_some() {}

    let outbox = bench.open();
    assert_eq!(bench.status().waiting, 3);
    let running = Running::start(&outbox);
    bench.plane.expect(&complete(3)).await.ok(json!({}));
    // The control plane accepts reports, so the others arrive concurrently.
    let others = [bench.plane.next().await, bench.plane.next().await];
    let mut paths = others.each_ref().map(|call| call.path.clone());
    paths.sort();
    assert_eq!(paths, [complete(1), complete(2)]);
    others.into_iter().for_each(|call| call.ok(json!({})));
    bench.until(|status| status.waiting == 0).await;
    running.stop().await;
    assert_eq!(finish(&outbox, Duration::ZERO).await.reports, 0);
}

#[tokio::test]
async fn failed_reports_are_retried_with_growing_pauses() {
    let mut bench = Bench::new().await;
    let outbox = bench.open();
    let running = Running::start(&outbox);
    drop(bench.kept(&outbox, 1..=20).await);
    // The control plane is unreachable for all of them. The pauses grow, independent of the tried report.
    let mut at = Vec::new();
    for status in [500, 503, 429] {
        let call: Call = bench.plane.next().await;
        at.push(call.at);
        call.answer(status, "later");
    }
    let gaps: Vec<_> = at.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(gaps[0] >= Duration::from_millis(100) && gaps[1] >= Duration::from_millis(200), "{gaps:?}");
    assert_eq!(bench.status().waiting, 20);
    assert_clean(&bench.status().last_error.expect("the reason"));
    // The control plane answers again. One success ends the pauses of the reports that were not tried.
    for _ in 0..20 {
        bench.plane.next().await.ok(json!({}));
    }
    bench.until(|status| *status == OutboxStatus::default()).await;
    running.stop().await;
}

#[tokio::test]
async fn permanently_refused_report_is_sent_once() {
    for status in [400, 403, 404, 409, 410, 422] {
        let mut bench = Bench::new().await;
        let outbox = bench.open();
        let kept = bench.kept(&outbox, [1]).await.remove(0);
        let (sent, ()) = tokio::join!(kept.send(named(&lease(1))), async {
            bench.plane.expect(&complete(1)).await.answer(status, "no")
        });
        let Sent::Refused(text) = sent else { panic!("{sent:?}") };
        assert_clean(&text);
        assert!(text.contains(&status.to_string()), "{text}");
        assert_eq!(finish(&outbox, Duration::from_secs(5)).await.reports, 0);
        assert!(bench.plane.waiting().is_none());
    }
}

#[tokio::test]
async fn failing_report_does_not_block_other_reports() {
    let mut bench = Bench::new().await;
    let outbox = bench.open();
    let running = Running::start(&outbox);
    drop(bench.kept(&outbox, 1..=4).await);
    let mut done = std::collections::BTreeSet::new();
    while done.len() < 3 {
        let call = bench.plane.next().await;
        if call.path == complete(1) {
            call.answer(500, "this one is too much for me");
        } else {
            done.insert(call.path.clone());
            call.ok(json!({}));
        }
    }
    bench.until(|status| status.waiting == 1).await;
    running.stop().await;
}

#[tokio::test]
async fn operator_retry_ends_the_pause() {
    let mut bench = Bench::new().await;
    let outbox = bench.open();
    let running = Running::start(&outbox);
    drop(bench.kept(&outbox, [1, 2]).await);
    for _ in 0..4 {
        bench.plane.next().await.answer(503, "");
    }
    let failed = |all: &[Listing]| {
        let at_rest = all.iter().all(|report| report.state == ListingState::Waiting);
        at_rest && all.iter().map(|report| report.attempts).sum::<u32>() == 4
    };
    while !failed(&outbox.listings()) {
        tokio::task::yield_now().await;
    }
    // The next pause is at least most of a second.
    outbox.retry(None);
    let began = std::time::Instant::now();
    bench.plane.next().await.ok(json!({}));
    bench.plane.next().await.ok(json!({}));
    assert!(began.elapsed() < Duration::from_millis(700), "{:?}", began.elapsed());
    running.stop().await;
}

#[tokio::test]
async fn reports_are_sent_only_by_their_own_node() {
    let mut bench = Bench::new().await;
    let outbox = bench.open_as("0xsomebody", 100);
    drop(bench.kept(&outbox, [1]).await);
    finish(&outbox, Duration::ZERO).await;
    drop(outbox);
    while bench.plane.waiting().is_some() {}

    let outbox = bench.open();
    let running = Running::start(&outbox);
    assert_eq!((bench.status().waiting, bench.status().foreign), (0, 1));
    outbox.retry(None);
    let kept = bench.kept(&outbox, [2]).await.remove(0);
    let (sent, ()) =
        tokio::join!(kept.send(named(&lease(2))), async { bench.plane.expect(&complete(2)).await.ok(json!({})) });
    assert_eq!(sent, Sent::Accepted);
    running.stop().await;
    assert_eq!(finish(&outbox, Duration::from_secs(5)).await.reports, 0, "what is not ours does not count");
    assert!(bench.plane.waiting().is_none());
    drop(outbox);
    let shelf = OfflineOutbox::open(bench.state.path()).expect("opens").expect("a file");
    assert_eq!(shelf.listings(None).iter().map(|report| report.task_id.clone()).collect::<Vec<_>>(), [id(1).into()]);
}

#[tokio::test]
async fn report_for_another_plane_is_never_sent() {
    let mut bench = Bench::new().await;
    let config = || dms::Config::new(bench.plane.url.clone());
    let other_name = dms::Config { name: PlaneName::parse("other").expect("a name"), ..config() };
    let other_url = dms::Config::new(bench.plane.url.join("other/").expect("a URL"));
    for config in [other_name, other_url] {
        let outbox = bench.open_with(config, NODE, 100);
        drop(bench.kept(&outbox, [1]).await);
        finish(&outbox, Duration::ZERO).await;
        drop(outbox);
        while bench.plane.waiting().is_some() {}

        let outbox = bench.open();
        assert_eq!((bench.status().waiting, bench.status().foreign), (0, 1));
        let running = Running::start(&outbox);
        assert_eq!(outbox.retry(None)[0].state, ListingState::Foreign);
        running.stop().await;
        assert_eq!(finish(&outbox, Duration::from_secs(5)).await.reports, 0);
        assert!(bench.plane.waiting().is_none(), "the foreign report was sent");
        drop(outbox);
        let mut offline = OfflineOutbox::open(bench.state.path()).expect("opens").expect("a file");
        assert_eq!(offline.drop_reports(None).expect("written").len(), 1);
    }
}

#[tokio::test]
async fn full_outbox_has_space_after_reports_are_accepted() {
    let mut bench = Bench::new().await;
    let mut events = bench.events.subscribe();
    let outbox = bench.open_as(NODE, 2);
    let plane = outbox.0.planes[0].facts().name.clone();
    drop(bench.kept(&outbox, [1, 2]).await);
    assert!(!outbox.has_room(&plane) && bench.status().full);
    let running = Running::start(&outbox);
    let (_, ()) = tokio::join!(outbox.until_room(&plane), async {
        bench.plane.expect(&complete(1)).await.ok(json!({}));
    });
    bench.until(|status| !status.full && status.waiting == 1).await;
    bench.plane.expect(&complete(2)).await.answer(400, "no");
    bench.until(|status| status.waiting == 0).await;
    running.stop().await;
    let names: Vec<_> = std::iter::from_fn(|| events.try_recv().ok()).map(|event| event.name()).collect();
    assert_eq!(names, ["outbox.full", "outbox.has_room", "report.delivered", "report.refused"]);
    assert_eq!(bench.events.board().now().unreported, 1);
}

#[tokio::test]
async fn renamed_task_keeps_new_id_after_restart() {
    let bench = Bench::new().await;
    let outbox = bench.open();
    let kept = bench.kept(&outbox, [1]).await.remove(0);
    let renamed = named(&lease_of(7, None, None));
    // No answer arrives: the attempt is dropped.
    assert!(tokio::time::timeout(Duration::from_millis(100), kept.send(renamed)).await.is_err());
    finish(&outbox, Duration::ZERO).await;
    drop(outbox);
    let shelf = OfflineOutbox::open(bench.state.path()).expect("opens").expect("a file");
    let report = shelf.listings(None).remove(0);
    assert_eq!((report.task_id, report.artifacts), (id(7).into(), 1));
}

#[tokio::test]
async fn dropped_and_withdrawn_reports_are_deleted_from_disk() {
    let bench = Bench::new().await;
    let outbox = bench.open();
    let mut kept = bench.kept(&outbox, 1..=4).await;
    kept.pop().expect("the fourth").withdraw();
    drop(kept);
    let gone = outbox.drop_reports(Some(&HashSet::from([id(2).into(), id(99).into()]))).await;
    assert_eq!(gone.iter().map(|report| report.task_id.clone()).collect::<Vec<_>>(), [id(2).into()]);
    finish(&outbox, Duration::ZERO).await;
    drop(outbox);
    let mut shelf = OfflineOutbox::open(bench.state.path()).expect("opens").expect("a file");
    assert_eq!(shelf.listings(None).len(), 2);
    assert_eq!(shelf.drop_reports(Some(&HashSet::from([id(1).into()]))).expect("written").len(), 1);
    assert_eq!(shelf.drop_reports(None).expect("written").len(), 1);
    drop(shelf);
    assert_eq!(OfflineOutbox::open(bench.state.path()).expect("opens").expect("a file").listings(None), []);
}

#[tokio::test]
async fn report_is_sent_despite_write_failure() {
    let mut bench = Bench::new().await;
    let outbox = bench.open();
    outbox.0.writer.close().await.expect("closed");
    let kept = bench.kept(&outbox, [1]).await.remove(0);
    let (sent, ()) =
        tokio::join!(kept.send(named(&lease(1))), async { bench.plane.expect(&complete(1)).await.ok(json!({})) });
    assert_eq!(sent, Sent::Accepted);
}

/// The rows of the file, by task.
fn on_disk(bench: &Bench) -> Vec<TaskId> {
    let rows = store::open_or_set_aside(bench.state.path()).expect("opens").1;
    rows.iter().map(|(_, bytes)| Entry::decode(bytes).expect("ours").0.task().clone()).collect()
}

#[tokio::test]
async fn report_accepted_before_write_is_never_written() {
    let mut bench = Bench::new().await;
    let outbox = bench.open();
    let file = bench.state.path().join(store::FILE);
    let before = std::fs::read(&file).expect("read");
    let kept = enter(&outbox, 1);
    let ticket = kept.ticket();
    let plane = async { bench.plane.expect(&complete(1)).await.answer(204, "") };
    let (sent, ()) = tokio::join!(kept.send(named(&lease(1))), plane);
    assert_eq!(sent, Sent::Accepted);
    ticket.write().await; // too late: the report is accepted
    assert!(std::fs::read(&file).expect("read") == before, "the file was touched");
    finish(&outbox, Duration::ZERO).await;
}

#[tokio::test]
async fn failed_or_dropped_attempt_writes_unwritten_report() {
    let mut bench = Bench::new().await;
    let outbox = bench.open();
    let kept = enter(&outbox, 1);
    drop(enter(&outbox, 2));
    let plane = async { bench.plane.expect(&complete(1)).await.answer(503, "later") };
    let (sent, ()) = tokio::join!(kept.send(named(&lease(1))), plane);
    assert!(matches!(sent, Sent::Waiting(_)), "{sent:?}");
    assert_eq!(finish(&outbox, Duration::ZERO).await.reports, 2);
    drop(outbox);
    assert_eq!(on_disk(&bench), [id(1).into(), id(2).into()]);
}
