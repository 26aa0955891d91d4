//! The settings of a Node Runtime control plane in the form of .NET: `appsettings.json`, and environment variables such
//! as `NodeRuntime__NodeId` (docs/protocols/node-runtime.md).

use std::path::PathBuf;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{
    fixtures,
    node::{Cli, Finished, NodeSetup, TestNode},
    node_plane::{Call, NodePlane, lease, result},
};

const ECHO: &str = "/examples/echo-file/v1";

/// The file as the other node ships it.
const SHIPPED: &str = r#"{
  "Logging": {
    "LogLevel": {
      "Default": "Information",
      "Microsoft.Hosting.Lifetime": "Information"
    }
  },
  "NodeRuntime": {
    "NodeId": "node-1",
    "ControlPlaneUrl": "http://localhost:5109",
    "MaxConcurrentLeases": 5,
    "HeartbeatIntervalSeconds": 30,
    "Capacity": {
      "Slots": 8,
      "Cpu": "4",
      "Memory": "8Gi"
    },
    "Metadata": {
      "Region": "us-east-1",
      "Environment": "development"
    }
  },
  "AgentRuntime": {
    "DefaultModel": "gpt-4o-mini",
    "DefaultTemperature": 0.7,
    "MaxTokens": 4000,
    "MaxDurationSeconds": 60,
    "AzureAIFoundry": {
      "Endpoint": "https://your-resource.example/",
      "ApiKey": "your-api-key",
      "DeploymentName": "gpt-4o-mini",
      "UseManagedIdentity": false
    }
  },
  "MTls": {
    "Enabled": false,
    "ClientCertificatePath": "/etc/bpa/certs/node-cert.pem",
    "ClientKeyPath": "/etc/bpa/certs/node-key.pem",
    "ServerCaCertificatePath": "/etc/bpa/certs/ca-cert.pem",
    "ExpectedServerCertificateSubject": "control-plane",
    "ValidateCertificateChain": true
  },
  "ServiceBusConnector": { "ConnectionString": "", "QueueName": "", "PrefetchCount": 16 },
  "OpenTelemetry": {
    "ServiceName": "Node.Runtime",
    "ServiceVersion": "1.0.0",
    "OtlpExporter": { "Endpoint": "http://localhost:4317", "Protocol": "grpc" },
    "ConsoleExporter": { "Enabled": false },
    "Traces": { "Enabled": true, "SamplingRatio": 1.0 },
    "Metrics": { "Enabled": true, "ExportIntervalMilliseconds": 60000 }
  }
}
"#;

/// The settings without which nothing starts.
const URL_AND_ID: [(&str, &str); 2] =
    [("NodeRuntime__ControlPlaneUrl", "http://127.0.0.1:9"), ("NodeRuntime__NodeId", "n")];

/// A configuration file in its own folder.
struct File {
    path: PathBuf,
    _folder: TempDir,
}

impl File {
    fn new(name: &str, text: impl AsRef<[u8]>) -> Self {
        let folder = tempfile::tempdir().expect("a folder below the system's temporary one");
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("the folder is writable");
        Self { path, _folder: folder }
    }

    fn at(&self, line: usize) -> String {
        format!("{}:{line}", self.path.display())
    }

    /// A command on this file. The environment sets no log level.
    fn cli(&self, command: &str) -> Cli {
        Cli::new(&["config", command, "--config"]).arg(&self.path).set("RUST_LOG", "")
    }

    /// The mistakes of `config check`.
    async fn mistakes(&self) -> String {
        self.cli("check").run().await.expect(78).stderr
    }
}

/// `config show -o json`.
async fn shown(cli: Cli) -> Value {
    let Finished { stdout, .. } = cli.arg("-o").arg("json").run().await.expect(0);
    serde_json::from_str(&stdout).unwrap_or_else(|err| panic!("{err}: {stdout}"))
}

fn registered(calls: &[Call]) -> Option<Value> {
    calls.iter().find_map(|call| match call {
        Call::Register(body) => Some(body.clone()),
        _ => None,
    })
}

/// The first heartbeat: the node in its path, and its status.
async fn first_heartbeat(plane: &NodePlane, node: &TestNode) -> (String, Value) {
    let found = |call: &Call| match call {
        Call::Heartbeat(node, body) => Some((node.clone(), body["status"].clone())),
        _ => None,
    };
    plane.until(node, "a heartbeat", |calls| calls.iter().find_map(found)).await
}

async fn max_leases(plane: &NodePlane, node: &TestNode) -> i32 {
    let found = |call: &Call| match call {
        Call::Pull(request) => Some(request.max_leases),
        _ => None,
    };
    plane.until(node, "a stream", |calls| calls.iter().find_map(found)).await
}

#[tokio::test]
async fn shipped_file_loads_unchanged() {
    let file = File::new("appsettings.json", SHIPPED);
    let ended = file.cli("check").run().await.expect(0);
    assert_eq!(ended.stdout, "the configuration is complete");
    let wanted = format!(
        "warning: {}: Logging:LogLevel:Microsoft.Hosting.Lifetime, AgentRuntime, ServiceBusConnector, OpenTelemetry have \
         no effect in this node; remove them unless another program reads this file",
        file.path.display()
    );
    assert_eq!(ended.stderr, wanted);
    let rows = shown(file.cli("show")).await;
    for (key, value, line) in [
        ("kind", "node-runtime", 8),
        ("node_id", "node-1", 9),
        ("control_plane_url", "http://localhost:5109", 10),
        ("max_concurrent_leases", "5", 11),
        ("heartbeat_interval_seconds", "30", 12),
        ("capacity.slots", "8", 14),
        ("capacity.cpu", "4", 15),
        ("capacity.memory", "8Gi", 16),
        ("metadata.Region", "us-east-1", 19),
        ("metadata.Environment", "development", 20),
    ] {
        assert_eq!(
            rows[format!("plane.node-runtime.{key}")],
            json!({ "value": value, "origin": file.at(line) }),
            "{key}"
        );
    }
    assert_eq!(rows["RUST_LOG"], json!({ "value": "info", "origin": file.at(4) }));
}

#[tokio::test]
async fn node_runs_with_the_shipped_file() {
    let plane = NodePlane::start().await;
    let setup = NodeSetup::with_file("appsettings.json", SHIPPED, &[fixtures::echo()]);
    let node = setup.set("NodeRuntime__ControlPlaneUrl", plane.url()).leasing().await;
    plane.send(&node, lease("run", ECHO, &[("a", "x")], &[])).await;
    assert_eq!(result(&plane.completed(&node, "run").await)["echo-0.bin"], "x");
    let metadata = json!({ "Region": "us-east-1", "region": "us-east-1", "Environment": "development",
        "environment": "development" });
    let capacity = json!({ "slots": 8, "cpu": "4", "memory": "8Gi" });
    let register = json!({ "nodeId": "node-1", "metadata": metadata, "capacity": capacity });
    assert_eq!(registered(&plane.calls()), Some(register));
    let (_, status) = first_heartbeat(&plane, &node).await;
    assert_eq!(status, json!({ "state": "active", "activeRuns": 0, "availableSlots": 5 }));
    assert_eq!(max_leases(&plane, &node).await, 5);
    assert_eq!(node.said("setting.warning").len(), 1, "{}", node.log());
    node.stop().await;
}

#[tokio::test]
async fn names_comments_and_values_are_read_as_dotnet_does() {
    let text = "\u{feff}// the node\n{ /* two\nlines */ \"noderuntime\": {\n\"NODEID\": \"n\", // \"x\"\n\
        \"ControlPlaneUrl\": \"http://localhost:5109//\",\n\"maxConcurrentLeases\": \"7\",\n\
        \"Capacity\": { \"Cpu\": 4, \"Memory\": null, },\n\"Metadata\": { \"Gpu\": true, \"Rack\": 7, \"a/b\": \"\", },\n},\n\
        \"NodeRuntime:AgentMap\": { \"Summarizer\": \"/agents/s/v1\" },\n\"engine\": { \"max_concurrency\": 3 },\n}\n";
    for name in ["appsettings.json", "settings"] {
        let file = File::new(name, text);
        let ended = file.cli("check").run().await.expect(0);
        assert_eq!((&*ended.stdout, &*ended.stderr), ("the configuration is complete", ""));
        let rows = shown(file.cli("show")).await;
        for (key, value, line) in [
            ("node_id", "n", 4),
            ("control_plane_url", "http://localhost:5109//", 5),
            ("max_concurrent_leases", "7", 6),
            ("capacity.cpu", "4", 7),
            ("metadata.Gpu", "True", 8),
            ("metadata.Rack", "7", 8),
            ("metadata.a/b", "", 8),
            ("agent_map.Summarizer", "/agents/s/v1", 10),
        ] {
            let row = &rows[format!("plane.node-runtime.{key}")];
            assert_eq!(row, &json!({ "value": value, "origin": file.at(line) }), "{key}");
        }
        assert_eq!(rows["plane.node-runtime.capacity.memory"], Value::Null);
        assert_eq!(rows["MAX_CONCURRENCY"], json!({ "value": "3", "origin": file.at(11) }));
    }
}

#[tokio::test]
async fn mistakes_name_the_key_as_it_is_written() {
    let section = |more: &str| {
        format!("{{ \"NodeRuntime\": {{ \"ControlPlaneUrl\": \"http://localhost:1\", \"NodeId\": \"n\",\n{more} }} }}")
    };
    let blank = "is blank; give this node a name that no other node has";
    let number = "expected a whole number from 1 to";
    for (text, wanted) in [
        (
            "{\n\"NodeRuntime\": { \"NodeId\": \" \", \"ControlPlaneUrl\": \"http://localhost:1\" } }".to_owned(),
            format!(":2: NodeRuntime:NodeId: {blank}"),
        ),
        (
            "{ \"NodeRuntime\": {\n\"ControlPlaneUrl\": \"http://localhost:1\" } }".to_owned(),
            ":1: NodeRuntime:NodeId: is not set; give this node a name that no other node has".to_owned(),
        ),
        (
            "{ \"NodeRuntime\": {\n\"nodeId\": \"n\" } }".to_owned(),
            ":1: NodeRuntime:ControlPlaneUrl: is not set; give the URL of the control plane".to_owned(),
        ),
        (
            "{ \"NodeRuntime\": {\n\"nodeId\": \"n\", \"controlPlaneUrl\": \"here\" } }".to_owned(),
            ":2: NodeRuntime:controlPlaneUrl: expected an http or https URL".to_owned(),
        ),
        (
            section("\"MaxConcurrentLeases\": \"many\""),
            format!(":2: NodeRuntime:MaxConcurrentLeases: {number} 65536, found \"many\""),
        ),
        (
            section("\"HeartbeatIntervalSeconds\": 0"),
            format!(":2: NodeRuntime:HeartbeatIntervalSeconds: {number} 3600, found 0"),
        ),
        (section("\"Capacity\": 8"), ":2: NodeRuntime:Capacity: expected a table, found 8".to_owned()),
        (
            section("\"Metadata\": { \"a\": [1] }"),
            ":2: NodeRuntime:Metadata:a: expected a text in quotes, found an array".to_owned(),
        ),
        (section("\"NODEID\": \"m\""), ":2: NodeRuntime:NODEID: is given twice; keep one".to_owned()),
        (section("\"NodeId\": /* n"), ":2: is not JSON: unterminated comment block".to_owned()),
        ("{ \"NodeRuntime\": 5 }".to_owned(), ":1: NodeRuntime: expected a table, found 5".to_owned()),
        // Our own tables keep their rules, and so do files without the section.
        (
            section("}, \"engine\": { \"max_concurency\": 1"),
            ":2: engine.max_concurency: there is no such key".to_owned(),
        ),
        (
            section("}, \"plane\": { \"node-runtime\": { \"kind\": \"local\", \"folder\": \"x\" }"),
            ":2: plane.node-runtime: is given twice; keep one".to_owned(),
        ),
        (
            "{ \"AgentRuntime\": 1, \"plane\": { \"a\": { \"kind\": \"local\", \"folder\": \"x\" } } }".to_owned(),
            ":1: AgentRuntime: there is no such key".to_owned(),
        ),
    ] {
        let file = File::new("appsettings.json", &text);
        let start = format!("error: {}{wanted}", file.path.display());
        let stderr = file.mistakes().await;
        assert!(stderr.starts_with(&start) && stderr.lines().count() == 1, "{text}\n{start}\n{stderr}");
    }
}

#[tokio::test]
async fn unknown_names_give_one_warning() {
    let text = "{ \"NodeRuntime\": { \"ControlPlaneUrl\": \"http://localhost:1\", \"NodeId\": \"n\", \"NodeName\": 1,\n\
        \"MaxConcurentLeases\": 9, \
        \"Capacity\": { \"Gpu\": { \"Count\": 1 } } }, \"AllowedHosts\": \"*\", \"Connectors\": { \"A\": 1, \"B\": [] } }";
    let file = File::new("appsettings.json", text);
    let ended = file.cli("check").run().await.expect(0);
    let names = "NodeRuntime:NodeName, \
        NodeRuntime:MaxConcurentLeases (did you mean NodeRuntime:MaxConcurrentLeases?), NodeRuntime:Capacity:Gpu:Count, AllowedHosts, Connectors";
    assert!(ended.stderr.contains(&format!("{}: {names} have no effect", file.path.display())), "{}", ended.stderr);
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
}

#[tokio::test]
async fn environment_names_override_the_file() {
    let file = File::new("appsettings.json", SHIPPED);
    let toml = "[plane.runs]\nkind = \"node-runtime\"\ncontrol_plane_url = \"http://localhost:1\"\nnode_id = \"a\"\n\
        metadata = { Region = \"r\" }\n";
    let toml = File::new("node.toml", toml);
    for (file, plane) in [(&file, "node-runtime"), (&toml, "runs")] {
        let cli = file.cli("show").set("NodeRuntime__NodeId", "n-2").set("NODERUNTIME__CAPACITY__SLOTS", "3");
        let cli = cli.set("NodeRuntime__Metadata__region", "eu").set("NodeRuntime__Metadata__rack", "7");
        let cli = cli.set("NodeRuntime__HeartbeatIntervalSeconds", " ");
        let rows = shown(cli).await;
        let row = |key: &str| &rows[format!("plane.{plane}.{key}")];
        for (key, value) in
            [("node_id", "n-2"), ("capacity.slots", "3"), ("metadata.Region", "eu"), ("metadata.rack", "7")]
        {
            assert_eq!(row(key), &json!({ "value": value, "origin": "environment" }), "{key}");
        }
        assert_eq!(row("metadata.region"), &Value::Null, "a name has one value");
        assert!(
            row("control_plane_url")["origin"]
                .as_str()
                .is_some_and(|origin| origin.starts_with(&*file.path.to_string_lossy()))
        );
    }
    let cli = toml.cli("check").set("NodeRuntime__MaxConcurrentLeases", "0");
    let wanted = "error: NodeRuntime__MaxConcurrentLeases: expected a whole number from 1 to 65536, found \"0\"";
    assert_eq!(cli.run().await.expect(78).stderr, wanted);
}

#[tokio::test]
async fn environment_names_work_without_a_file() {
    let plane = NodePlane::start().await;
    let setup = NodeSetup::bare(&[fixtures::echo()]).set("NODERUNTIME__CONTROLPLANEURL", plane.url());
    let setup = setup.set("NodeRuntime__NodeId", "n-3").set("NodeRuntime__Capacity__Slots", "2");
    let node = setup.set("NodeRuntime__Metadata__region", "eu").set("NodeRuntime__MaxConcurrentLeases", "9");
    let node = node.leasing().await;
    let register = json!({ "nodeId": "n-3", "metadata": { "region": "eu" }, "capacity": { "slots": 2 } });
    assert_eq!(registered(&plane.calls()), Some(register));
    assert_eq!(max_leases(&plane, &node).await, 9);
    assert!(node.said("setting.warning").is_empty(), "{}", node.log());
    node.stop().await;
}

#[tokio::test]
async fn posemesh_needs_its_own_table_beside_environment_names() {
    let check = || URL_AND_ID.iter().fold(Cli::new(&["config", "check"]), |cli, (name, value)| cli.set(name, *value));
    let ended = check().set("DMS_BASE_URL", "http://127.0.0.1:9/v1").run().await.expect(0);
    let wanted = "warning: DMS_BASE_URL has no effect: no control plane has kind = \"posemesh\"; add a table \
        [plane.posemesh] to serve it too";
    assert_eq!(ended.stderr, wanted);
    let file = File::new("node.toml", "[plane.posemesh]\nkind = \"posemesh\"\n");
    let cli = URL_AND_ID.iter().fold(file.cli("show"), |cli, (name, value)| cli.set(name, *value));
    let rows = shown(cli).await;
    assert_eq!(rows["plane.posemesh.kind"]["value"], "posemesh");
    assert_eq!(rows["plane.node-runtime.kind"], json!({ "value": "node-runtime", "origin": "environment" }));
    let file = File::new("node.toml", "[plane.node-runtime]\nkind = \"local\"\nfolder = \"jobs\"\n");
    let cli = URL_AND_ID.iter().fold(file.cli("check"), |cli, (name, value)| cli.set(name, *value));
    let stderr = cli.run().await.expect(78).stderr;
    assert_eq!(stderr, "error: environment: plane.node-runtime: is given twice; keep one");
}

#[tokio::test]
async fn incomplete_or_misspelt_environment_names_are_reported() {
    let check = || Cli::new(&["config", "check"]);
    let ended = check().set("NodeRuntime__ControlPlaneUrl", "http://127.0.0.1:9").run().await.expect(78);
    let wanted = "error: NodeRuntime__NodeId: is not set; give this node a name that no other node has";
    assert_eq!(ended.stderr, wanted);
    let ended = check().set("NodeRuntime__NodeId", "n").run().await.expect(78);
    let wanted = "warning: environment variable NodeRuntime__NodeId has no effect: there is no Node Runtime control plane; \
        set NodeRuntime__ControlPlaneUrl too";
    assert!(ended.stderr.lines().any(|line| line == wanted), "{}", ended.stderr);
    let all = || URL_AND_ID.iter().fold(check(), |cli, (name, value)| cli.set(name, *value));
    let ended =
        all().set("NodeRuntime__NodeIdd", "x").set("NodeRuntime__Capacity__Slots__a", "x").run().await.expect(0);
    let lines: Vec<&str> = ended.stderr.lines().collect();
    assert!(lines.len() == 2 && lines[1].ends_with("no effect, did you mean NodeRuntime__NodeId?"), "{lines:?}");
    let ended = all().set("noderuntime__nodeid", "m").run().await.expect(78);
    assert_eq!(ended.stderr, "error: noderuntime__nodeid: is the same setting as NodeRuntime__NodeId; keep one");
}

#[tokio::test]
async fn blank_or_missing_node_id_exits_78() {
    let plane = NodePlane::start().await;
    for (id, text) in [("", "is not set"), ("\"NodeId\": \"\",", "is blank"), ("\"NodeId\": \" \\t\",", "is blank")] {
        let text_of_file = format!("{{ \"NodeRuntime\": {{ {id} \"ControlPlaneUrl\": \"{}\" }} }}", plane.url());
        let ended =
            NodeSetup::with_file("appsettings.json", &text_of_file, &[fixtures::echo()]).refused().await.expect(78);
        assert!(ended.stderr.contains(&format!("NodeRuntime:NodeId: {text}")), "{}", ended.stderr);
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    }
    assert!(plane.calls().is_empty(), "nothing is sent");
}

#[tokio::test]
async fn node_id_keeps_slashes_and_other_letters() {
    let plane = NodePlane::start().await;
    let id = "größe/節点 07?#%";
    let encoded = "gr%C3%B6%C3%9Fe%2F%E7%AF%80%E7%82%B9%2007%3F%23%25";
    let text = json!({ "NodeRuntime": { "NodeId": id, "ControlPlaneUrl": plane.url() } }).to_string();
    let node = NodeSetup::with_file("appsettings.json", &text, &[fixtures::echo()]).leasing().await;
    plane.send(&node, lease("run", ECHO, &[("a", "x")], &[])).await;
    assert_eq!(plane.completed(&node, "run").await.node_id, id);
    assert_eq!(registered(&plane.calls()).expect("a registration")["nodeId"], id);
    assert_eq!(first_heartbeat(&plane, &node).await.0, encoded);
    let ids = |call: &Call| match call {
        Call::Pull(request) => Some(request.node_id.clone()),
        Call::Ack(request) => Some(request.node_id.clone()),
        _ => None,
    };
    assert_eq!(plane.calls().iter().filter_map(ids).collect::<Vec<_>>(), [id, id]);
    assert_eq!(node.page("/status.json").await.1["node"], id);
    node.says_ended("accepted").await;
    node.stop().await;
    assert!(plane.calls().contains(&Call::Remove(encoded.to_owned())), "{:#?}", plane.calls());
}

#[tokio::test]
async fn slots_come_from_max_concurrency_then_capacity() {
    let plane = NodePlane::start().await;
    // MAX_CONCURRENCY, Capacity:Slots, MaxConcurrentLeases; free slots, slots of the registration.
    for (concurrency, slots, leases, free, sent) in [
        (Some("2"), Some(8), 5, 2, 8),
        (None, Some(3), 5, 3, 3),
        (None, None, 5, 1, 1),
        (Some("4"), None, 5, 4, 4),
        (Some("4"), Some(8), 3, 3, 8),
    ] {
        let mut section = json!({ "NodeId": "n", "ControlPlaneUrl": plane.url(), "MaxConcurrentLeases": leases });
        if let Some(slots) = slots {
            section["Capacity"] = json!({ "Slots": slots });
        }
        let text = json!({ "NodeRuntime": section }).to_string();
        let setup = NodeSetup::with_file("appsettings.json", &text, &[fixtures::echo()]);
        let setup = concurrency.into_iter().fold(setup, |setup, value| setup.set("MAX_CONCURRENCY", value));
        let before = plane.calls().len();
        let node = setup.leasing().await;
        let calls = plane.until(&node, "a stream", |calls| {
            let new = &calls[before..];
            new.iter().any(|call| matches!(call, Call::Pull(_))).then(|| new.to_vec())
        });
        let calls = calls.await;
        assert_eq!(registered(&calls).expect("a registration")["capacity"]["slots"], sent);
        let status = calls.iter().find_map(|call| match call {
            Call::Heartbeat(_, body) => Some(body["status"]["availableSlots"].clone()),
            _ => None,
        });
        assert_eq!(status, Some(free.into()), "{concurrency:?} {slots:?} {leases}");
        assert!(calls.iter().any(|call| matches!(call, Call::Pull(request) if request.max_leases == leases)));
        node.stop().await;
    }
}

#[tokio::test]
async fn log_levels_of_the_file_set_the_filter() {
    let plane = NodePlane::start().await;
    let text = |level: &str| {
        json!({ "Logging": { "LogLevel": { "Default": "Warning", "Grpc": level } },
            "NodeRuntime": { "NodeId": "n", "ControlPlaneUrl": plane.url() } })
    };
    let file = File::new("appsettings.json", text("Debug").to_string());
    let filter =
        "warn,runner_host::leases::node_runtime=debug,runner_host::transport::http2=debug,tonic=debug,h2=debug";
    let rows = shown(file.cli("show")).await;
    assert_eq!(rows["RUST_LOG"], json!({ "value": filter, "origin": file.at(1) }));
    assert_eq!(shown(file.cli("show").set("RUST_LOG", "error")).await["RUST_LOG"]["value"], "error");
    let rows = shown(file.cli("show").set("Logging__LogLevel__Grpc", "none")).await;
    assert!(rows["RUST_LOG"]["value"].as_str().is_some_and(|filter| filter.ends_with("h2=off")), "{rows}");
    let wrong = File::new("appsettings.json", text("Loud").to_string()).mistakes().await;
    let wanted = ":1: Logging:LogLevel:Grpc: expected one of Trace, Debug, Information, Warning, Error, Critical, None, \
        found \"Loud\"";
    assert!(wrong.ends_with(wanted), "{wrong}");

    let setup = NodeSetup::with_file("appsettings.json", &text("Debug").to_string(), &[fixtures::echo()]);
    let node = setup.set("RUST_LOG", "").begun();
    node.line(|line| line["target"].as_str().is_some_and(|target| target.starts_with("h2::"))).await;
    plane.send(&node, lease("run", ECHO, &[("a", "some secret input")], &[])).await;
    plane.completed(&node, "run").await;
    assert!(node.lines().iter().all(|line| line["level"] != "INFO"), "{}", node.log());
    assert!(!node.log().contains("secret input"), "frames are logged without their content");
    node.stop().await;
}
