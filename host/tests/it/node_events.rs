//! The stream of events of a node that runs inside another program.

use std::{collections::HashSet, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use runner_host::{
    app::Node,
    auth::NodeKey,
    config::{HostConfig, Layers, Origin, Secrets},
    engine::{Ended, StopSignals},
    model::{RegistrationState, ReportState},
    node_event::NodeEvent,
    plugins::{self, Places, Plugins, PluginsFile},
};

use crate::harness::{
    TestServer,
    fault_proxy::{Bad, FaultProxy},
    fixtures, within,
};

const COMPLETE: &str = "POST /v1/tasks/*/complete";

fn load_hello() -> Plugins {
    let config = plugins::Config {
        places: Places::from_arguments(&[fixtures::hello()]).expect("the fixture exists"),
        file: PluginsFile::default(),
        max_concurrency: 1,
        log_level: 0,
        init_limit: Duration::from_secs(20),
        allow_writable: true,
    };
    Plugins::load(&config).expect("the folder can be listed")
}

/// A node of this process that joins the services at `address`. Its folders are in `dir`.
async fn node(address: SocketAddr, dir: &Path) -> Node {
    let path = |name: &str| dir.join(name).to_string_lossy().into_owned();
    let mut layers = Layers::default();
    for (name, value) in [
        ("DDS_BASE_URL", format!("http://{address}")),
        ("DMS_BASE_URL", format!("http://{address}/v1")),
        ("HTTP_BIND", "127.0.0.1:0".to_owned()),
        ("STATE_DIR", path("state")),
        ("SCRATCH_DIR", path("scratch")),
        ("MAX_CONCURRENCY", "1".to_owned()),
    ] {
        layers.set(name, &value, Origin::Command);
    }
    let (_, key) = NodeKey::generate();
    let secrets = Secrets::from_pairs([("REG_SECRET", "dev"), ("SECP256K1_PRIVHEX", key.as_str())]);
    let config = HostConfig::build(&layers, &secrets).expect("a configuration");
    Node::build(config, Arc::new(load_hello())).await.expect("a node")
}

/// Waits for the event with this name.
async fn seen(events: &mut tokio::sync::broadcast::Receiver<NodeEvent>, name: &str) {
    while events.recv().await.expect("no event is lost").name() != name {}
}

/// The copies of `libhello` in the memory of this process.
#[cfg(target_os = "linux")]
fn mapped() -> HashSet<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("Linux has it");
    let of_hello = maps.lines().filter(|line| line.contains("libhello"));
    of_hello.filter_map(|line| line.split_whitespace().nth(4).map(str::to_owned)).collect()
}

#[tokio::test]
async fn two_nodes_of_a_process_share_a_plugin_file() {
    let test_server = TestServer::start().await;
    let dir = tempfile::tempdir().expect("a folder");
    let mut nodes = Vec::new();
    for name in ["first", "second"] {
        let node = node(test_server.dev_server.address(), &dir.path().join(name)).await;
        let (events, stops) = (node.events().subscribe(), StopSignals::default());
        nodes.push((events, stops.clone(), tokio::spawn(node.run(stops))));
    }
    #[cfg(target_os = "linux")]
    assert_eq!(mapped().len(), 1, "the library is opened once");
    // One after the other leaves. The one that stays runs the tasks.
    let mut ran = 0;
    while let Some((mut events, stops, running)) = nodes.pop() {
        if nodes.is_empty() {
            test_server.task("/examples/hello/v1").submit();
            within("a task of the last node", String::new, seen(&mut events, "task.ended")).await;
            ran += 1;
        } else {
            within("the node to lease", String::new, seen(&mut events, "node.leasing")).await;
        }
        stops.drain.cancel();
        assert_eq!(running.await.expect("no panic"), Ended::Drained);
    }
    assert_eq!(ran, 1);
}

#[tokio::test]
async fn subscriber_sees_registration_task_and_report_in_order() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    proxy.answer(COMPLETE, usize::MAX, Bad::Status(503, "later"));
    let dir = tempfile::tempdir().expect("a folder");
    let node = node(proxy.address(), dir.path()).await;
    let (board, mut events) = (node.board(), node.events().subscribe());
    let stops = StopSignals::default();
    let running = tokio::spawn(node.run(stops.clone()));

    test_server.task("/examples/hello/v1").submit();
    let mut seen: Vec<NodeEvent> = Vec::new();
    let next = async {
        while seen.last().is_none_or(|event| event.name() != "node.stopped") {
            seen.push(events.recv().await.expect("no event is lost"));
            let status = board.now();
            match seen.last().expect("it was just added") {
                NodeEvent::RegistrationAccepted { .. } => {
                    assert_eq!(status.planes.first().registration, RegistrationState::Registered)
                }
                NodeEvent::TokenRenewed { .. } => assert!(status.planes.first().token_expires_at.is_some()),
                NodeEvent::TaskEnded { record, .. } => {
                    assert_eq!(record.report, ReportState::Waiting);
                    proxy.heal();
                }
                NodeEvent::ReportDelivered { .. } => {
                    assert_eq!(status.recent.back().expect("one task has ended").report, ReportState::Accepted);
                    stops.drain.cancel();
                }
                _ => {}
            }
        }
    };
    within("the end of the node", String::new, next).await;
    assert_eq!(running.await.expect("no panic"), Ended::Drained);

    let names: Vec<&str> = seen.iter().map(NodeEvent::name).collect();
    assert_eq!(
        names,
        [
            "node.started",
            "registration.accepted",
            "token.renewed",
            "node.leasing",
            "task.started",
            "report.waiting",
            "task.ended",
            "report.delivered",
            "node.draining",
            "node.stopped",
        ]
    );
    let tasks: HashSet<_> = seen[4..8].iter().map(|event| event.task().expect("an event of a task")).collect();
    assert_eq!(tasks.len(), 1, "{seen:?}");
}
