//! Configuration files, secrets from files, and every variable of posemesh.md section 7.1.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{
    TestServer,
    fault_proxy::FaultProxy,
    fixtures,
    node::{Cli, Finished},
    within,
};

const KEY: &str = "1111111111111111111111111111111111111111111111111111111111111111";

/// The required settings, as environment.
const NEEDED: [(&str, &str); 4] = [
    ("DMS_BASE_URL", "https://plane.example/v1"),
    ("DDS_BASE_URL", "https://dds.example"),
    ("REG_SECRET", "a-registration-secret"),
    ("SECP256K1_PRIVHEX", KEY),
];

/// A folder for the files of one test.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder below the system's temporary one"))
    }

    /// A file that only its owner can read.
    fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, text).expect("the folder is writable");
        self.mode(name, 0o600);
        path
    }

    fn mode(&self, name: &str, mode: u32) {
        use std::os::unix::fs::PermissionsExt as _;
        let path = self.0.path().join(name);
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("our own file");
    }
}

fn whole(command: &str) -> Cli {
    NEEDED.iter().fold(Cli::new(&["config", command]), |cli, (name, value)| cli.set(name, *value))
}

fn with_file(command: &str, file: &Path) -> Cli {
    Cli::new(&["config", command]).arg("--config").arg(file)
}

/// `config show -o json`.
async fn shown(cli: Cli) -> Value {
    let Finished { stdout, .. } = cli.arg("-o").arg("json").run().await.expect(0);
    serde_json::from_str(&stdout).unwrap_or_else(|err| panic!("{err}: {stdout}"))
}

const TOML: &str = r#"
[source.dms]
base_url = "https://plane.example/v1"
request_timeout_secs = 7
poll_backoff_ms = { min = 5, max = 6 }
[dds]
base_url = "https://dds.example"
reg_secret = "a-secret-of-the-file"
secp256k1_privhex_file = "key.hex"
token.safety_ratio = 0.5
[engine]
max_concurrency = 3
drain_timeout = "2m"
[storage]
domain_hosts = ["a.example", "b.example"]
[noop]
enabled = false
[heartbeat]
coalesce_ms = 0
"#;

const JSON: &str = r#"{
  "source": { "dms": { "base_url": "https://plane.example/v1", "request_timeout_secs": 7,
    "poll_backoff_ms": { "min": 5, "max": 6 } } },
  "dds": { "base_url": "https://dds.example", "reg_secret": "a-secret-of-the-file",
    "secp256k1_privhex_file": "key.hex", "token": { "safety_ratio": 0.5 } },
  "engine": { "max_concurrency": 3, "drain_timeout": "2m" },
  "storage": { "domain_hosts": ["a.example", "b.example"], "client_id": null },
  "noop": { "enabled": false }, "heartbeat": { "coalesce_ms": 0 }
}"#;

#[tokio::test]
async fn toml_and_json_files_are_equivalent() {
    let files = Files::new();
    files.write("key.hex", format!("0x{KEY}\n"));
    // The format is chosen by the extension, and otherwise by the content.
    for (name, text, line) in [("a.toml", TOML, 4), ("b.json", JSON, 2), ("c.conf", TOML, 4), ("d.conf", JSON, 2)] {
        let file = files.write(name, text);
        let ended = with_file("check", &file).run().await.expect(0);
        assert_eq!((&*ended.stdout, &*ended.stderr), ("the configuration is complete", ""));
        let all =
            shown(with_file("show", &file).set("MAX_CONCURRENCY", "9").arg("--set").arg("NODE_VERSION=v1.2.3")).await;
        let of_file =
            |value: &str, line: usize| json!({ "value": value, "origin": format!("{}:{line}", file.display()) });
        assert_eq!(all["REQUEST_TIMEOUT_SECS"], of_file("7", line), "{name}");
        assert_eq!(all["MAX_CONCURRENCY"], json!({ "value": "9", "origin": "environment" }));
        assert_eq!(all["NODE_VERSION"], json!({ "value": "v1.2.3", "origin": "flag" }));
        assert_eq!(all["CLIENT_ID"], json!({ "value": null, "origin": "unset" }));
        assert_eq!(all["CANCEL_GRACE"], json!({ "value": "10s", "origin": "default" }));
        assert_eq!(all["DOMAIN_HOSTS"]["value"], "a.example,b.example");
        assert_eq!(all["POLL_BACKOFF_MS_MAX"]["value"], "6");
        assert_eq!(all["HEARTBEAT_JITTER_MS"]["value"], "0");
        assert_eq!(all["DRAIN_TIMEOUT"]["value"], "2m");
        assert_eq!(all["TOKEN_SAFETY_RATIO"]["value"], "0.5");
        assert_eq!(all["REG_SECRET"]["value"], "********");
        let key = files.0.path().join("key.hex");
        assert_eq!(all["SECP256K1_PRIVHEX"], json!({ "value": "********", "origin": key.to_string_lossy() }));
        let with = with_file("show", &file).set("NODE_URL", "https://user:word@node.example/in?key=word");
        assert_eq!(shown(with).await["NODE_URL"]["value"], "********@node.example/in?********");
        assert!(!all.to_string().contains("secret-of-the-file") && !all.to_string().contains(KEY), "{all}");
    }
}

#[tokio::test]
async fn file_and_environment_mistakes_are_reported_together() {
    let files = Files::new();
    let file = files.write(
        "node.toml",
        r#"max_concurrency = 4
[engine]
max_concurency = 4
max_concurrency = "4"
drain_timeout = 30
[dds]
reg_secret = 17
secp256k1_privhex = "c0ffee"
token = "x"
[source.dms]
base_url = "plane.example"
request_timeout_secs = 1.5
[storage]
domain_hosts = [1]
[noop]
enabled = "true"
[weather]
MAX_CONCURRENCY = 1
"#,
    );
    let ended = with_file("check", &file).set("HTTP_BIND", "x").run().await.expect(78);
    let at = file.display();
    let wanted = [
        format!("{at}:1: max_concurrency: there is no such key, did you mean engine.max_concurrency?"),
        format!("{at}:3: engine.max_concurency: there is no such key, did you mean engine.max_concurrency?"),
        format!("{at}:4: engine.max_concurrency: expected a whole number, found \"4\""),
        format!("{at}:5: engine.drain_timeout: expected a duration in quotes, such as \"30s\", found 30"),
        format!("{at}:7: dds.reg_secret: expected a text in quotes, found a number"),
        format!("{at}:9: dds.token: expected a table, found \"x\""),
        format!("{at}:12: source.dms.request_timeout_secs: expected a whole number, found 1.5"),
        format!("{at}:14: storage.domain_hosts: expected an array of texts, found an array"),
        format!("{at}:16: noop.enabled: expected true or false, found \"true\""),
        format!("{at}:17: weather: there is no such key"),
        format!("{at}:11: source.dms.base_url: expected an absolute http or https URL, found \"plane.example\""),
        "DDS_BASE_URL is not set: base URL of the sign-in service".to_owned(),
        "HTTP_BIND: expected an address such as 127.0.0.1:8080, found \"x\"".to_owned(),
        format!("SECP256K1_PRIVHEX ({at}:8): private key has 6 characters"),
    ];
    for wanted in &wanted {
        let result = ended.stderr.lines().any(|line| line.starts_with(&format!("error: {wanted}")));
        assert!(result, "{wanted} is not in\n{}", ended.stderr);
    }
    // A registration secret of a wrong type is missing too.
    assert_eq!(ended.stderr.lines().count(), wanted.len() + 1, "{}", ended.stderr);
    assert!(!ended.stderr.contains("c0ffee"), "{}", ended.stderr);
}

#[tokio::test]
async fn unusable_file_is_reported_in_one_line() {
    let files = Files::new();
    let deep = format!("{}1{}", "{\"engine\":".repeat(100), "}".repeat(100));
    for (name, text, wanted) in [
        ("a.toml", "[engine", ":1: "),
        ("b.toml", "\n\nx = = 1", ":3: "),
        ("c.json", "{\n\"engine\": }", ":2: is not JSON: unexpected close brace"),
        ("d.json", "[]", ":1: expected an object, found an array"),
        ("e.json", "", ":1: expected an object, found nothing"),
        ("f.toml", "[engine]\nmax_concurrency=1\nmax_concurrency=2", ":3: "),
        ("g.json", "{\"noop\":{\"enabled\":true,\"enabled\":false}}", ":1: noop.enabled: is given twice; keep one"),
        ("h.json", &deep, ":1: engine.engine: there is no such key"),
        ("i.toml", "x = \"\0\"", ":1: "),
    ] {
        let file = files.write(name, text);
        let ended = whole("check").arg("--config").arg(&file).run().await.expect(78);
        let start = format!("error: {}{wanted}", file.display());
        assert!(ended.stderr.starts_with(&start) && ended.stderr.lines().count() == 1, "{start}\n{}", ended.stderr);
    }
    let bytes = files.write("bytes.toml", [0xff, 0xfe]);
    let huge = files.write("huge.toml", vec![b'#'; 1024 * 1024 + 1]);
    for (file, wanted) in [
        (files.0.path().to_owned(), "expected a file, found a folder"),
        (files.0.path().join("none.toml"), "No such file"),
        (bytes, "expected UTF-8 text, found other bytes"),
        (huge, "expected at most 1048576 bytes, found more"),
    ] {
        for command in [&["config", "check"][..], &["config", "show"], &["run"], &["dev"]] {
            let ended = Cli::new(command).arg("--config").arg(&file).run().await.expect(78);
            let start = format!("error: --config {}: {wanted}", file.display());
            assert!(ended.stderr.starts_with(&start) && ended.stderr.lines().count() == 1, "{start}\n{}", ended.stderr);
        }
    }
}

#[tokio::test]
async fn secrets_come_from_exactly_one_source() {
    let files = Files::new();
    let secret = files.write("secret", "  a-secret-with-an-end\r\n");
    let key = files.write("key", format!("{KEY}\n"));
    let test_server = TestServer::with(|config| config.reg_secret = Some("a-secret-with-an-end".to_owned())).await;
    let node = test_server.node(&[fixtures::hello()]);
    let blank = node.set("REG_SECRET", " ").set("SECP256K1_PRIVHEX", "");
    let node =
        blank.set("REG_SECRET_FILE", secret.to_string_lossy()).set("SECP256K1_PRIVHEX_FILE", key.to_string_lossy());
    node.leasing().await.stop().await;

    let text = |path: &Path| path.to_string_lossy().into_owned();
    let ended = whole("check").set("REG_SECRET_FILE", text(&secret)).run().await.expect(78);
    assert_eq!(ended.stderr, "error: REG_SECRET and REG_SECRET_FILE are both set; keep one");
    let both = files.write("both.toml", "[dds]\nreg_secret = \"a\"\nreg_secret_file = \"secret\"\n");
    let without = NEEDED.iter().filter(|(name, _)| *name != "REG_SECRET");
    let cli = without.clone().fold(with_file("check", &both), |cli, (name, value)| cli.set(name, *value));
    let ended = cli.run().await.expect(78);
    let at = both.display();
    assert_eq!(
        ended.stderr,
        format!("error: {at}:2: dds.reg_secret and {at}:3: dds.reg_secret_file are both set; keep one")
    );
    // The environment has priority over the file, for both variables.
    let one = files.write("one.toml", "[dds]\nreg_secret_file = \"none\"\n");
    whole("check").arg("--config").arg(one).run().await.expect(0);

    let empty = files.write("empty", " \n");
    let two = files.write("two", "one\ntwo\n");
    let huge = files.write("huge", vec![b'x'; 16 * 1024 + 1]);
    let bytes = files.write("bytes", [0xff]);
    for (path, wanted) in [
        (empty, "expected a secret, found nothing"),
        (two, "expected one line, found 2"),
        (huge, "expected at most 16384 bytes, found more"),
        (bytes, "expected UTF-8 text, found other bytes"),
        (files.0.path().to_owned(), "expected a file, found a folder"),
        (files.0.path().join("none"), "No such file or directory (os error 2)"),
    ] {
        let cli = without.clone().fold(Cli::new(&["config", "check"]), |cli, (name, value)| cli.set(name, *value));
        let ended = cli.set("REG_SECRET_FILE", text(&path)).run().await.expect(78);
        assert_eq!(ended.stderr, format!("error: REG_SECRET_FILE: {}: {wanted}", path.display()));
    }
}

#[tokio::test]
async fn readable_secret_file_gets_a_warning() {
    let files = Files::new();
    files.write("key.hex", KEY);
    let file = files.write("node.toml", TOML);
    files.mode("node.toml", 0o644);
    let ended = with_file("check", &file).run().await.expect(0);
    let at = file.display();
    assert_eq!(ended.stderr, format!("warning: {at} holds a secret and can be read by others; chmod 600 {at}"));
}

/// A variable of posemesh.md section 7.1, with valid values, their warnings from `check`, and invalid values.
struct Variable {
    name: &'static str,
    good: &'static [&'static str],
    warned: &'static [&'static str],
    bad: &'static [&'static str],
}

const HUGE: &str = "99999999999999999999999999";

const VARIABLES: &[Variable] = &[
    Variable {
        name: "DMS_BASE_URL",
        good: &["https://a.example", " https://a.example/v1/ "],
        warned: &[],
        bad: &["a.example", "ftp://a.example", "https://"],
    },
    Variable { name: "DDS_BASE_URL", good: &["http://127.0.0.1:1"], warned: &[], bad: &["/x", "http://a.example"] },
    Variable {
        name: "REQUEST_TIMEOUT_SECS",
        good: &["1", " 60 "],
        warned: &["0"],
        bad: &["-1", "1.5", "60s", HUGE, "316224001"],
    },
    Variable { name: "NODE_VERSION", good: &["1.2.3", "v1.2.3-rc.1", "V0.1.0+b"], warned: &["1.2", "new"], bad: &[] },
    Variable { name: "REGISTER_INTERVAL_SECS", good: &["1", "120"], warned: &["0"], bad: &["-1", "soon", HUGE] },
    Variable {
        name: "REGISTER_MAX_RETRY",
        good: &["-1", "0", "2147483647"],
        warned: &[],
        bad: &["-2", "2147483648", "x"],
    },
    Variable {
        name: "HEARTBEAT_MIN_RATIO",
        good: &["0", "0.9", "1", "1e-3"],
        warned: &["1.5", "-0.5"],
        bad: &["NaN", "inf", "-inf", "1e999", "a"],
    },
    Variable { name: "HEARTBEAT_MAX_RATIO", good: &["0.1"], warned: &["2"], bad: &["infinity", "nan", ","] },
    Variable { name: "HEARTBEAT_JITTER_MS", good: &["0", " 250"], warned: &[], bad: &["-1", "0.5", HUGE] },
    Variable { name: "POLL_BACKOFF_MS_MIN", good: &["0", "50000"], warned: &[], bad: &["-1", "1s", HUGE] },
    Variable { name: "POLL_BACKOFF_MS_MAX", good: &["1"], warned: &[], bad: &["-1", HUGE] },
    Variable { name: "TOKEN_SAFETY_RATIO", good: &["0", "0.75"], warned: &["-1", "7"], bad: &["NaN", "inf", "x"] },
    Variable {
        name: "TOKEN_REAUTH_MAX_RETRIES",
        good: &["0", "4294967295"],
        warned: &[],
        bad: &["-1", "4294967296", "1.0"],
    },
    Variable { name: "TOKEN_REAUTH_JITTER_MS", good: &["0", "500"], warned: &[], bad: &["-1", HUGE, "x"] },
    Variable { name: "MAX_CONCURRENCY", good: &["1", "65536"], warned: &[], bad: &["0", "-1", "65537", "many", HUGE] },
    Variable { name: "LOG_FORMAT", good: &["json", "text", "TEXT"], warned: &["xml"], bad: &[] },
    Variable { name: "ENABLE_NOOP", good: &["true", "false", " true "], warned: &[], bad: &["1", "yes", "TRUE"] },
    Variable { name: "NOOP_SLEEP_SECS", good: &["0", "5", "0.25"], warned: &[], bad: &["-1", "NaN", "inf", HUGE] },
    Variable {
        name: "DOMAIN_HOSTS",
        good: &["a.example", "a.example:8443, [::1]"],
        warned: &[],
        bad: &["https://a.example", "*.example, a/b"],
    },
    Variable { name: "CLIENT_ID", good: &["node-7", " a b "], warned: &[], bad: &["a\tb", "é"] },
];

#[tokio::test]
async fn every_variable_accepts_only_valid_values() {
    for Variable { name, good, warned, bad } in VARIABLES {
        let wanted = NEEDED.iter().any(|(needed, _)| needed == name);
        for (value, code, lines) in (good.iter().map(|value| (*value, 0, 0)))
            .chain(warned.iter().map(|value| (*value, 0, 1)))
            .chain(bad.iter().map(|value| (*value, 78, 1)))
            .chain([("  ", if wanted { 78 } else { 0 }, usize::from(wanted))])
        {
            let ended = whole("check").set(name, value).set("RUST_LOG", "warn").run().await;
            assert_eq!((ended.code, ended.stderr.lines().count()), (code, lines), "{name}={value:?}: {}", ended.stderr);
            assert!(ended.stderr.lines().all(|line| line.contains(name)), "{name}={value:?}: {}", ended.stderr);
            let all = shown(whole("show").set(name, value)).await;
            let (output, origin) = (&all[*name]["value"], &all[*name]["origin"]);
            if value.trim().is_empty() {
                assert_ne!(origin, "environment", "blank is unset: {name}");
            } else {
                assert_eq!((output, origin), (&json!(value.trim()), &json!("environment")), "{name}");
            }
            let marked = [(78, "mistake"), (0, "warning")]
                .map(|(with, word)| code == with && lines == 1 && all[*name][word].is_string());
            let none = all[*name]["mistake"].is_null() && all[*name]["warning"].is_null();
            let missing = value.trim().is_empty();
            assert_eq!(marked.contains(&true), lines == 1 && !missing, "{name}={value:?}: {}", all[*name]);
            assert_eq!(none, lines == 0 || missing, "{name}={value:?}: {}", all[*name]);
        }
    }
}

#[tokio::test]
async fn config_show_marks_unusable_values() {
    let files = Files::new();
    let file = files.write("node.toml", "[engine]\nmax_concurrency = 0\n");
    let show = || {
        let show = whole("show").set("LOG_FORMAT", "xml").set("SCRATCH_DIR", "/proc/x").set("RUST_LOG", "a=loud");
        let show = show.set("SECP256K1_PRIVHEX", "c0ffee").set("NODE_URL", "node.example?key=not-shown");
        show.arg("--config").arg(&file)
    };
    let Finished { stdout: text, stderr, .. } = show().run().await.expect(0);
    let row = |name: &str| {
        let row = text.lines().find(|line| line.split_whitespace().next() == Some(name));
        row.unwrap_or_else(|| panic!("{name} is not in\n{text}"))
    };
    let ends = |name: &str, end: &str| assert!(row(name).ends_with(end), "{}", row(name));
    ends("MAX_CONCURRENCY", &format!("{}:2  mistake: expected a number from 1 to 65536, found \"0\"", file.display()));
    ends("LOG_FORMAT", "environment  warning: expected json or text, found \"xml\", using json");
    ends("SCRATCH_DIR", "mistake: expected a folder for files, found /proc/x; name one that is not below /proc");
    ends("RUST_LOG", ", using info");
    ends(
        "SECP256K1_PRIVHEX",
        "mistake: private key has 6 characters, expected 64 hex digits, with or without a leading 0x",
    );
    ends("NODE_URL", "mistake: expected an absolute http or https URL, found \"node.example?********\"");
    ends("DRAIN_TIMEOUT", "default");
    let all = shown(show()).await;
    assert_eq!(text.lines().count(), all.as_object().expect("an object").len());
    assert_eq!(all["MAX_CONCURRENCY"]["mistake"], "expected a number from 1 to 65536, found \"0\"");
    assert_eq!(all["DRAIN_TIMEOUT"], json!({ "value": "30s", "origin": "default" }));
    for output in [&text, &stderr, &all.to_string()] {
        assert!(!output.contains("c0ffee") && !output.contains("not-shown"), "{output}");
    }
}

#[tokio::test]
async fn config_check_reports_folders_hosts_and_plugins_together() {
    let files = Files::new();
    let errors = |text: &str| -> Vec<String> {
        text.lines().filter(|line| line.starts_with("error")).map(str::to_owned).collect()
    };
    let file = files.write("file", "");
    let plugins = files.write("plugins.toml", "[[plugin]]\nenabled = true\n");
    let (at, toml) = (file.display(), plugins.display());
    let check = || whole("check").set("HTTPS_PROXY", "http://proxy.example:3128");
    let check = || check().set("NO_PROXY", "a.example, *.example, 10.0.0.0/33");
    let below = file.join("below");
    let ended = check().set("SCRATCH_DIR", file.to_string_lossy()).set("STATE_DIR", below.to_string_lossy());
    let ended = ended.set("DOMAIN_HOSTS", "a.example, https://b.example").set("MAX_CONCURRENCY", "0");
    let ended = ended.arg("--plugins").arg("/no/such").arg("--plugins-file").arg(&plugins).run().await.expect(78);
    let wanted = [
        "error: MAX_CONCURRENCY: expected a number from 1 to 65536, found \"0\"".to_owned(),
        "error: DOMAIN_HOSTS: expected hosts such as data.example or data.example:8443, found \"https://b.example\""
            .to_owned(),
        format!("error: SCRATCH_DIR: expected a folder, found a file at {at}"),
        format!("error: STATE_DIR: expected a folder, found a file at {at}"),
        format!("error: {toml}: [[plugin]] 1: the key \"file\" is missing"),
        "error: plugins folder /no/such does not exist; create it, or name another with --plugins".to_owned(),
    ];
    assert_eq!(errors(&ended.stderr), wanted);

    let ended = check().set("DOMAIN_HOSTS", ", ,").run().await.expect(78);
    let output = "error: DOMAIN_HOSTS: expected hosts such as data.example or data.example:8443, found \", ,\"";
    assert_eq!(errors(&ended.stderr), [output], "an empty list allows no host");

    let later = files.0.path().join("later");
    let ended = check().set("SCRATCH_DIR", later.to_string_lossy()).run().await.expect(0);
    let warned =
        |entry: &str| format!("warning: NO_PROXY: \"{entry}\" is not a host, domain or network and has no effect");
    assert_eq!(ended.stderr.lines().collect::<Vec<_>>(), [warned("*.example"), warned("10.0.0.0/33")]);
    assert!(!later.exists(), "a check creates nothing");
}

#[tokio::test]
async fn invalid_config_file_causes_no_connection() {
    let test_server = TestServer::start().await;
    let proxy = FaultProxy::before(&test_server).await;
    let files = Files::new();
    let file = files.write("node.toml", "[engine]\nmax_concurrency = true\n");
    let ended = proxy.node(&[fixtures::hello()]).arg("--config").arg(&file).refused().await.expect(78);
    let wanted = format!("error: {}:2: engine.max_concurrency: expected a whole number, found true", file.display());
    assert_eq!(ended.stderr, wanted);
    assert_eq!(proxy.connections(), 0);
}

#[tokio::test]
async fn node_runs_with_only_a_configuration_file() {
    let test_server = TestServer::start().await;
    let files = Files::new();
    files.write("key.hex", KEY);
    files.write("secret", "any");
    let plugins = fixtures::plugins_dir(&[fixtures::noop()]);
    let file = files.write(
        "node.toml",
        format!(
            "source.dms = {{ base_url = \"{}\", poll_backoff_ms = {{ min = 10, max = 50 }} }}\n\
             dds = {{ base_url = \"{}\", reg_secret_file = \"secret\", secp256k1_privhex_file = \"key.hex\" }}\n\
             http.bind = \"127.0.0.1:0\"\nstorage.scratch_dir = \"scratch\"\n\
             noop = {{ enabled = true, sleep_secs = 0.01 }}\ntelemetry.log_format = \"text\"\n",
            test_server.dev_server.dms_url(),
            test_server.dev_server.dds_url(),
        ),
    );
    let cli = Cli::new(&["run", "--plugins"]).arg(plugins.path()).arg("--config").arg(&file).dir(plugins.path());
    let node = cli.start();
    let started = node.stderr_line(|line| line.contains("node started")).await;
    assert!(!started.starts_with('{'), "text, as the file says: {started}");
    let job = test_server.dev_server.create_job(json!({ "label": "it", "tasks": [
        { "label": "one", "stage": "one", "capability": "/examples/noop/v1", "max_attempts": 1 }
    ] }));
    let job = job.expect("a job the dev server takes");
    let done = test_server.dev_server.job_until(job, |view| view["job"]["status"] == "completed");
    within("the end of a job", || node.log(), done).await;
    assert!(files.0.path().join("scratch").is_dir(), "paths in a file are relative to its folder");
    node.signal(rustix::process::Signal::TERM);
    assert_eq!(node.wait().await, 0);
}

#[tokio::test]
async fn wrong_control_plane_tables_are_reported_with_lines() {
    let files = Files::new();
    let local = "kind = \"local\"\nfolder = \"jobs\"\n";
    let floors = format!("[plane.a]\n{local}min_slots = 1\n[plane.b]\n{local}min_slots = 2\n");
    let twice = "{\"plane\": {\"a\": {\"kind\": \"local\", \"folder\": \"x\"},\n\"a\": {\"kind\": \"local\", \"folder\": \"y\"}}}";
    for (text, wanted) in [
        (
            &*floors,
            ":8: plane.b.min_slots: the control planes reserve 3 slots, but the node has 1; raise MAX_CONCURRENCY or \
             lower min_slots",
        ),
        (
            "[plane.a]\nmin_slots = -1\nkind = \"local\"\nfolder = \"x\"",
            ":2: plane.a.min_slots: expected a whole number from 0 to 65536, found -1",
        ),
        (twice, ":2: plane.a: is given twice; keep one"),
        (
            "[plane.a]\nkind = \"lcoal\"",
            ":2: plane.a.kind: expected \"posemesh\", \"local\" or \"node-runtime\", found \"lcoal\"",
        ),
        ("[plane.a]\nkind = \"local\"", ":2: plane.a: has no folder; give the folder of the jobs"),
        ("\n[plane.a]", ":2: plane.a: has no kind; expected kind = \"posemesh\", \"local\" or \"node-runtime\""),
        ("[plane.a]\nkind = 1", ":2: plane.a.kind: expected a text in quotes, found 1"),
        ("[plane.a]\nkind = \"posemesh\"\nfolder = \"x\"", ":3: plane.a.folder: a posemesh plane has no folder"),
        ("[plane.a]\nterm = 1", ":2: plane.a.term: there is no such key; there are kind, folder and min_slots"),
        ("[plane]\na = 1", ":2: plane.a: expected a table, found 1"),
        ("plane = 1", ":1: plane: expected a table for each control plane, such as [plane.jobs]"),
        ("[plane.A]\nkind = \"local\"", ":1: plane.A: "),
    ] {
        let file = files.write(if text.starts_with('{') { "node.json" } else { "node.toml" }, text);
        let ended = with_file("check", &file).run().await.expect(78);
        let start = format!("error: {}{wanted}", file.display());
        // The settings of the posemesh services are not reported as missing.
        assert!(ended.stderr.starts_with(&start) && ended.stderr.lines().count() == 1, "{start}\n{}", ended.stderr);
    }
}

#[tokio::test]
async fn one_posemesh_plane_and_several_others_are_allowed() {
    let files = Files::new();
    let check = async |text: &str| {
        let file = files.write("node.toml", text);
        (file.display().to_string(), with_file("check", &file).run().await.expect(78).stderr)
    };
    let posemesh = |name: &str| format!("[plane.{name}]\nkind = \"posemesh\"\n");
    let (file, found) = check(&(posemesh("a") + &posemesh("b"))).await;
    let wanted =
        format!("{file}:3: plane.b: a node serves one control plane of kind \"posemesh\", found a too; keep one");
    assert!(found.contains(&wanted), "{found}");
    let local = "[plane.jobs]\nkind = \"local\"\nfolder = \"jobs\"\n";
    let (_, found) = check(&(local.to_owned() + &posemesh("a"))).await;
    let lines: Vec<&str> = found.lines().collect();
    assert!(lines.len() == 4 && lines.iter().all(|line| line.contains(" is not set: ")), "{found}");
}

#[tokio::test]
async fn config_show_names_the_control_plane() {
    let files = Files::new();
    let file = files.write("node.toml", "[plane.jobs]\nkind = \"local\"\nfolder = \"jobs\"\n");
    let ended = with_file("check", &file).run().await.expect(0);
    assert_eq!(ended.stdout, "the configuration is complete", "a local plane needs no posemesh settings");
    let rows = shown(with_file("show", &file)).await;
    let at = |line: usize| format!("{}:{line}", file.display());
    assert_eq!(rows["plane.jobs.kind"], json!({ "value": "local", "origin": at(2) }));
    let folder = files.0.path().join("jobs");
    assert_eq!(rows["plane.jobs.folder"], json!({ "value": folder, "origin": at(3) }));
    let rows = shown(Cli::new(&["config", "show"])).await;
    assert_eq!(rows["plane.posemesh.kind"], json!({ "value": "posemesh", "origin": "default" }));
    let text = with_file("show", &file).run().await.expect(0).stdout;
    let first = text.lines().next().expect("a row");
    assert_eq!(first.split_whitespace().collect::<Vec<_>>(), ["plane.jobs.kind", "local", &at(2)]);
}
