//! The data of runs on a domain server that their metadata name. The real binary works with a control plane of the
//! tests and the domain server of the dev server.

use http::StatusCode;
use runner_host::leases::node_runtime::lease::Lease;
use serde_json::{Value, json};
use tonic::{Code, Status};

use crate::harness::{
    TestServer, fixtures,
    node::{Cli, NodeSetup, TestNode},
    node_plane::{Answer, Call, NodePlane, domain_lease, result},
};

const ECHO: &str = "/examples/echo-file/v1";
const NO_TOKEN: &str = "no-token-of-any-domain-server";

/// A control plane and a domain server that do not know each other.
struct Services {
    plane: NodePlane,
    domain: TestServer,
}

impl Services {
    async fn start() -> Self {
        Self { plane: NodePlane::start().await, domain: TestServer::start().await }
    }

    fn host(&self) -> String {
        self.domain.dev_server.address().to_string()
    }

    /// A node with the most verbose log that may use the domain server. Its output and files are searched for tokens
    /// on drop ([`crate::harness::hygiene`]).
    fn node(&self, plugins: &[std::path::PathBuf]) -> NodeSetup {
        let setup = self.plane.node(plugins, "heartbeat_interval_seconds = 1");
        setup.set("DOMAIN_HOSTS", self.host()).set("RUST_LOG", "trace")
    }

    fn lease(&self, run: &str, capability: &str, inputs: &[(&str, &str)], changes: &[(&str, Option<&str>)]) -> Lease {
        domain_lease(&self.domain, run, capability, inputs, changes)
    }

    async fn artifact(&self, node: &TestNode, run: &str, path: &str) -> Vec<u8> {
        let sent = self.plane.completed(node, run).await;
        self.domain.read(result(&sent)[path]).await
    }

    fn data_requests(&self) -> usize {
        let journal = self.domain.dev_server.journal();
        journal.iter().filter(|entry| entry.path.starts_with("/api/v1/")).count()
    }
}

#[tokio::test]
async fn inputs_and_artifacts_pass_through_the_domain_server() {
    let services = Services::start().await;
    let node = services.node(&[fixtures::echo(), fixtures::zoo()]).leasing().await;
    // More than a report can carry.
    let large: Vec<u8> = (0..5_000_000_u32).map(|n| (n % 251) as u8).collect();
    let first = services.domain.put("scan", &large).await.to_string();
    let second = services.domain.put("notes", b"some text").await.to_string();
    let inputs = [("z-last", second.as_str()), ("a-first", first.as_str())];
    services.plane.send(&node, services.lease("run", ECHO, &inputs, &[])).await;
    assert!(services.artifact(&node, "run", "echo-0.bin").await == large, "the names have the order of the inputs");
    assert_eq!(services.artifact(&node, "run", "echo-1.bin").await, b"some text");
    let ended = node.says_ended("accepted").await;
    let domain = services.domain.dev_server.domain_id().to_string();
    assert_eq!(ended["domain_id"], domain.as_str(), "{ended}");

    let more = [("voxel;json", Some("0.5")), ("Other_Token", Some(NO_TOKEN))];
    services.plane.send(&node, services.lease("meta", "/fixtures/echo-meta/v1", &inputs, &more)).await;
    let document: Value =
        serde_json::from_slice(&services.artifact(&node, "meta", "lease.json").await).expect("a lease");
    let budgets = json!({ "max_tokens": 4000, "max_duration_seconds": 60 });
    let meta = json!({ "capability": "/fixtures/echo-meta/v1", "voxel": 0.5, "budgets": budgets });
    assert_eq!(document["task"]["meta"], meta, "{document:#}");
    assert_eq!(document["task"]["inputs_cids"], json!([first, second]));
    assert_eq!(document["domain_id"], domain.as_str());
    assert_eq!(document["domain_server_url"], services.domain.dev_server.domain_server_url().as_str());
    node.stop().await;
}

#[tokio::test]
async fn token_of_a_run_is_in_no_log_and_no_file() {
    let services = Services::start().await;
    let granted = "[[plugin]]\nfile = \"zoo\"\ngrant = [\"token\"]\n";
    let node = services.node(&[fixtures::zoo(), fixtures::hello()]).plugins_file(granted).leasing().await;
    services.plane.answer_reports(Answer::NotAccepted);
    services.plane.send(&node, services.lease("waits", "/examples/hello/v1", &[], &[])).await;
    services.plane.completed(&node, "waits").await;
    node.says("report.waiting").await;
    services.plane.send(&node, services.lease("says", "/fixtures/says-token/v1", &[], &[])).await;
    let sent = services.plane.failed(&node, "says").await;
    assert!(sent.error_message.starts_with("refused with (token) at "), "{sent:?}");
    // The domain server refuses this one.
    let inputs = [("a", "00000000-0000-0000-0000-000000000000")];
    let refused = services.lease("refused", "/examples/hello/v1", &inputs, &[("access_token", Some(NO_TOKEN))]);
    services.plane.send(&node, refused).await;
    let sent = services.plane.failed(&node, "refused").await;
    assert!(sent.error_message.contains("unauthorized (401)"), "{sent:?}");
    // The other token has a form that the search knows.
    assert!(!node.log().contains(NO_TOKEN), "the log has the token");
    let calls = format!("{:?}", services.plane.calls());
    assert!(!calls.contains(NO_TOKEN) && !calls.contains(".eyJ"), "a call has a token");
    services.plane.answer_reports(Answer::Accept);
    node.says("report.delivered").await;
    node.stop().await;
}

#[tokio::test]
async fn token_that_a_control_plane_repeats_is_not_shown() {
    let services = Services::start().await;
    let plane = &services.plane;
    let node = services.node(&[fixtures::zoo()]).leasing().await;
    let tokens = [services.domain.dev_server.grant(), NO_TOKEN.to_owned()];
    let repeated = tokens.join(", ");
    plane.answer_reports(Answer::NotAccepted);
    for (run, token) in ["first", "second"].into_iter().zip(&tokens) {
        let changes = [("access_token", Some(token.as_str()))];
        plane.send(&node, services.lease(run, "/fixtures/ok/v1", &[], &changes)).await;
        plane.completed(&node, run).await;
    }
    // Only now: a text is a token for the node when a lease has brought it.
    plane.repeat(&repeated);
    let redacted = |line: &Value| line["error"].as_str().is_some_and(|error| error.ends_with("(token), (token)"));
    let repeats = |calls: &[Call]| calls.iter().filter(|call| matches!(call, Call::Complete(_))).count();
    plane.until(&node, "more tries", |calls| (repeats(calls) >= 6).then_some(())).await;
    node.line(|line| line["message"] == "report failed" && redacted(line)).await;
    let shows_error = |page: &(u16, Value)| page.1.to_string().contains("(token), (token)");
    let (_, status) = node.page_until("/status.json", shows_error).await;
    let listed = Cli::new(&["outbox", "list", "--state-dir"]).arg(node.state_dir()).run().await.expect(0);
    let file = std::fs::read(node.state_dir().join("outbox.redb")).expect("there");
    let file = String::from_utf8_lossy(&file);
    for shown in [status.to_string(), listed.stdout, file.into_owned()] {
        assert!(shown.contains("(token), (token)"), "{shown}");
        assert!(!tokens.iter().any(|token| shown.contains(token)), "{shown}");
    }
    plane.answer_reports(Answer::Accept);
    for run in ["first", "second"] {
        node.line(|line| line["event"] == "report.delivered" && line["task_id"] == run).await;
    }

    plane.answer_reports(Answer::Status(Code::InvalidArgument));
    plane.send(&node, services.lease("refused", "/fixtures/ok/v1", &[], &[])).await;
    node.line(|line| line["event"] == "task.ended" && line["report"] == "refused").await;
    let returned = services.lease("returned", "/fixtures/ok/v1", &[], &[("domain_id", None)]);
    plane.send(&node, returned).await;
    assert!(redacted(&node.says("lease.not_rejected").await));
    assert!(node.said("lease.not_acknowledged").iter().any(redacted));
    for _ in 1..=2 {
        plane.end_stream(&node, Some(Status::unavailable(format!("hey {repeated}")))).await;
    }
    node.page_until("/ready", shows_error).await;
    assert!(node.said("stream.ended").iter().any(redacted), "{}", node.log());
    plane.answer_registrations(StatusCode::INTERNAL_SERVER_ERROR);
    plane.knows_node(false);
    assert!(redacted(&node.says("registration.failed").await));
    node.page_until("/ready", shows_error).await;
    node.stop().await;
    for token in &tokens {
        let log = node.log();
        let shown: Vec<&str> = log.lines().filter(|line| line.contains(token)).collect();
        assert!(shown.is_empty(), "the log has a token: {shown:#?}");
    }
}

#[tokio::test]
async fn restarted_node_reports_the_ids_of_artifacts() {
    let services = Services::start().await;
    let first = services.node(&[fixtures::hello()]).leasing().await;
    services.plane.answer_reports(Answer::NotAccepted);
    services.plane.send(&first, services.lease("run", "/examples/hello/v1", &[], &[])).await;
    let sent = services.plane.completed(&first, "run").await;
    first.says("report.waiting").await;
    first.kill();
    first.wait().await;
    let before = services.plane.count(|call| matches!(call, Call::Complete(_)));
    services.plane.answer_reports(Answer::Accept);
    let second = services.node(&[fixtures::hello()]).after(&first).leasing().await;
    let again = |calls: &[Call]| calls.iter().filter(|call| matches!(call, Call::Complete(_))).nth(before).cloned();
    let again = services.plane.until(&second, "the report of the first node", again).await;
    assert_eq!(again, Call::Complete(sent.clone()));
    assert!(!services.domain.read(result(&sent)["outputs/hello.bin"]).await.is_empty());
    second.stop().await;
}

#[tokio::test]
async fn incomplete_or_unusable_domain_data_fails_the_run() {
    let services = Services::start().await;
    let node = services.node(&[fixtures::hello()]).leasing().await;
    let token = services.domain.dev_server.grant();
    for (key, value, text) in [
        ("domain_id", None, "its metadata have no domain_id; data on a domain server needs domain_id, "),
        ("domain_server_url", None, "its metadata have no domain_server_url; "),
        ("access_token", None, "its metadata have no access_token; "),
        ("domain_id", Some("lab 7"), "its metadata domain_id \"lab 7\" is not a UUID"),
        ("domain_id", Some(token.as_str()), "its metadata domain_id \"(token)\" is not a UUID"),
        ("domain_server_url", Some("data.example"), "\"data.example\" is not an absolute http(s) URL"),
        ("domain_server_url", Some("http://data.example"), "plain http"),
        ("domain_server_url", Some("https://user:word@data.example"), "contains credentials"),
        (
            "domain_server_url",
            Some("https://data.example"),
            "domain server data.example is not in DOMAIN_HOSTS; add it there to allow it",
        ),
        ("access_token", Some(" "), "access_token is empty or has characters that no token has"),
        ("access_token", Some("two\nlines"), "access_token is empty or has characters that no token has"),
    ] {
        let run = uuid::Uuid::new_v4().to_string();
        services.plane.send(&node, services.lease(&run, "/examples/hello/v1", &[], &[(key, value)])).await;
        let sent = services.plane.failed(&node, &run).await;
        assert!(!sent.retryable && sent.error_message.contains(text), "{text}: {sent:?}");
    }
    assert!(node.said("task.started").is_empty(), "{}", node.log());
    assert_eq!(services.data_requests(), 0);
    // The node goes on.
    services.plane.send(&node, services.lease("next", "/examples/hello/v1", &[], &[])).await;
    services.plane.completed(&node, "next").await;
    node.stop().await;
}

#[tokio::test]
async fn unset_domain_hosts_refuses_every_domain_server() {
    let services = Services::start().await;
    let node = services.plane.node(&[fixtures::hello()], "").leasing().await;
    services.plane.send(&node, services.lease("run", "/examples/hello/v1", &[], &[])).await;
    let sent = services.plane.failed(&node, "run").await;
    let expected = format!("domain server {} is not in DOMAIN_HOSTS; add it there to allow it", services.host());
    assert!(!sent.retryable && sent.error_message == expected, "{sent:?}");
    assert_eq!(services.data_requests(), 0);
    node.stop().await;
}

#[tokio::test]
async fn new_lease_brings_a_new_token() {
    let services = Services::start().await;
    let granted = "[[plugin]]\nfile = \"zoo\"\ngrant = [\"token\"]\n";
    let node = services.node(&[fixtures::zoo()]).set("MAX_CONCURRENCY", "2").plugins_file(granted).leasing().await;
    let run = |lease_id: &str, changes: &[(&str, Option<&str>)]| {
        let mut run = services.lease("run", "/fixtures/renewed-token/v1", &[], changes);
        run.lease_id = lease_id.to_owned();
        run
    };
    services.plane.send(&node, run("first", &[("access_token", Some(NO_TOKEN))])).await;
    // Its runner has read the first token by then.
    let has_progress = |page: &(u16, Value)| {
        let tasks = page.1["tasks"].as_object().into_iter().flatten();
        tasks.into_iter().any(|(_, task)| task["progress_at"].is_string())
    };
    node.page_until("/status.json", has_progress).await;
    services.plane.send(&node, run("second", &[])).await;
    // Only the second token is accepted there.
    let asked = services.artifact(&node, "run", "renewed.json").await;
    assert!(asked.starts_with(b"{\"asked\":"), "{}", String::from_utf8_lossy(&asked));
    assert_eq!(services.plane.completed(&node, "run").await.lease_id, "second");
    node.stop().await;
}
