//! Configuration errors of operators. All errors are reported at once and by name, before the first network call.

use serde_json::Value;

use crate::harness::{
    TestServer,
    fault_proxy::FaultProxy,
    fixtures,
    node::{Cli, Finished, NodeSetup, can_mount},
};

/// A node whose dev server must get no connection.
struct Silence {
    proxy: FaultProxy,
    _lab: TestServer,
}

impl Silence {
    async fn new() -> Self {
        let test_server = TestServer::start().await;
        Self { proxy: FaultProxy::before(&test_server).await, _lab: test_server }
    }

    fn node(&self) -> NodeSetup {
        self.proxy.node(&[fixtures::hello()])
    }

    /// The node ends with `code` and has made no connection.
    async fn refuses(&self, node: NodeSetup, code: i32) -> Finished {
        let ended = node.refused().await.expect(code);
        assert_eq!(self.proxy.connections(), 0, "{}", ended.stderr);
        ended
    }
}

/// The errors that `ended` printed, as text or as log lines.
fn errors(ended: &Finished) -> Vec<String> {
    let error = |line: &str| match line.strip_prefix("error: ") {
        Some(error) => Some(error.to_owned()),
        None => {
            let line = serde_json::from_str::<Value>(line).ok()?;
            (line["event"] == "node.failed").then(|| line["error"].as_str().unwrap_or_default().to_owned())
        }
    };
    ended.stderr.lines().filter_map(error).collect()
}

#[tokio::test]
async fn every_missing_variable_is_named_at_once() {
    let ended = Cli::new(&["run"]).run().await.expect(78);
    let errors = errors(&ended);
    assert_eq!(errors.len(), 4, "{errors:#?}");
    for name in ["DMS_BASE_URL", "DDS_BASE_URL", "REG_SECRET", "SECP256K1_PRIVHEX"] {
        let wanted = format!("{name} is not set: ");
        assert!(errors.iter().any(|error| error.starts_with(&wanted)), "{name}: {errors:#?}");
    }
    let silence = Silence::new().await;
    let ended = silence.refuses(silence.node().set("REG_SECRET", "  \t").set("DMS_BASE_URL", ""), 78).await;
    assert_eq!(self::errors(&ended).len(), 2, "blank counts as unset: {}", ended.stderr);
}

#[tokio::test]
async fn base_url_with_query_or_fragment_is_refused() {
    let silence = Silence::new().await;
    let node = silence.node().set("DMS_BASE_URL", "http://127.0.0.1:9/v1?x=top-secret");
    let ended = silence.refuses(node.set("DDS_BASE_URL", "http://127.0.0.1:9/#here"), 78).await;
    let wanted = "expected a base URL without query or fragment: paths are added at its end";
    assert_eq!(errors(&ended), ["DMS_BASE_URL", "DDS_BASE_URL"].map(|name| format!("{name}: {wanted}")));
}

#[tokio::test]
async fn flag_mistakes_are_reported_with_all_others() {
    let flags = ["--set", "OUTBOXMAX=1", "--set", "REG_SECRET=x", "--set", "DRAIN_TIMEOUT"];
    let mistakes = [
        "--set OUTBOXMAX: there is no such setting, did you mean OUTBOX_MAX?",
        "--set REG_SECRET: a secret on the command line is visible to others; use the environment or REG_SECRET_FILE",
        "--set DRAIN_TIMEOUT: expected NAME=VALUE",
    ];
    for command in [&["run"][..], &["config", "check"]] {
        let ended = flags.iter().fold(Cli::new(command), |cli, flag| cli.arg(*flag)).run().await.expect(78);
        let errors = errors(&ended);
        assert_eq!(errors[..3], mistakes);
        assert_eq!(errors.len(), 7, "the four that are missing too: {errors:#?}");
    }
    let shown = flags.iter().fold(Cli::new(&["config", "show"]), |cli, flag| cli.arg(*flag)).run().await.expect(78);
    assert_eq!(errors(&shown), mistakes);
    assert!(shown.stdout.contains("OUTBOX_MAX                 1000 "), "{}", shown.stdout);
}

#[tokio::test]
async fn invalid_private_key_is_refused_and_never_printed() {
    let silence = Silence::new().await;
    for (key, wanted) in [
        ("c0ffee", "private key has 6 characters, expected 64 hex digits, with or without a leading 0x"),
        (&"zz".repeat(32), "private key has a character that is not a hex digit, expected 64 of 0-9 a-f"),
        (
            &"00".repeat(32),
            "private key is not a valid secp256k1 scalar, expected a number between 1 and the order of the curve",
        ),
        (&"ab".repeat(33), "private key has 66 characters, expected 64 hex digits, with or without a leading 0x"),
    ] {
        let ended = silence.refuses(silence.node().set("SECP256K1_PRIVHEX", key), 78).await;
        assert_eq!(errors(&ended), [format!("SECP256K1_PRIVHEX: {wanted}")]);
        assert!(!ended.stderr.contains(key), "{}", ended.stderr);
    }
}

#[tokio::test]
async fn unreadable_values_are_reported_together() {
    let silence = Silence::new().await;
    let wrong = [
        ("MAX_CONCURRENCY", "65537", "a number from 1 to 65536"),
        ("POLL_BACKOFF_MS_MIN", "soon", "whole milliseconds, at most 316224000000"),
        ("REQUEST_TIMEOUT_SECS", "-1", "whole seconds, at most 316224000"),
        ("REGISTER_MAX_RETRY", "-2", "-1 or a number of attempts"),
        ("HEARTBEAT_MIN_RATIO", "NaN", "a number from 0 to 1"),
        ("DRAIN_TIMEOUT", "tomorrow", "a duration such as 30s"),
        ("TASK_TIME_LIMIT", "0", "a duration above 0 such as 30s, at most 316224000 seconds"),
        ("HTTP_BIND", "everywhere", "an address such as 127.0.0.1:8080"),
        ("ALLOW_INSECURE_HTTP", "yes", "true or false"),
        ("DDS_BASE_URL", "dds.example", "an absolute http or https URL"),
    ];
    let node = wrong.iter().fold(silence.node(), |node, (name, value, _)| node.set(name, *value));
    let ended = silence.refuses(node, 78).await;
    let errors = errors(&ended);
    assert_eq!(errors.len(), wrong.len(), "{errors:#?}");
    for (name, value, expected) in wrong {
        let wanted = format!("{name}: expected {expected}, found {value:?}");
        assert!(errors.contains(&wanted), "{wanted} is not in {errors:#?}");
    }
}

#[tokio::test]
async fn plain_http_is_allowed_to_loopback_only() {
    let silence = Silence::new().await;
    let node = silence.node().set("DMS_BASE_URL", "http://plane.example/v1");
    let ended = silence.refuses(node, 78).await;
    let wanted = "DMS_BASE_URL: http://plane.example: plain http is allowed to loopback only; use https, or set \
                  ALLOW_INSECURE_HTTP=true";
    assert_eq!(errors(&ended), [wanted]);
    let ended = silence.refuses(silence.node().set("DDS_BASE_URL", "https://me:pass-word@dds.example"), 78).await;
    assert_eq!(errors(&ended), ["DDS_BASE_URL: expected a URL without user or password"]);
    assert!(!ended.stderr.contains("pass-word"));
}

#[tokio::test]
async fn unservable_node_url_is_refused() {
    let silence = Silence::new().await;
    for (url, bind, wanted) in [
        ("node.example", "127.0.0.1:8080", "expected an absolute http or https URL, found \"node.example\""),
        (
            "http://0.0.0.0:8080",
            "0.0.0.0:8080",
            "no node can be reached there; use the host and port that others connect to",
        ),
        ("http://127.0.0.1:8080", "127.0.0.1:0", "HTTP_BIND 127.0.0.1:0 uses any free port; set the port of this URL"),
        (
            "http://node.example:8080",
            "127.0.0.1:8080",
            "HTTP_BIND 127.0.0.1:8080 is not reached from other machines; set HTTP_BIND=0.0.0.0:8080, or give the https \
             URL of a proxy in front of this node",
        ),
        (
            "http://127.0.0.1:8081/",
            "127.0.0.1:8080",
            "HTTP_BIND 127.0.0.1:8080 listens on another port; make them the same",
        ),
    ] {
        let ended = silence.refuses(silence.node().set("NODE_URL", url).set("HTTP_BIND", bind), 78).await;
        let output = errors(&ended);
        assert!(output.len() == 1 && output[0].starts_with("NODE_URL") && output[0].ends_with(wanted), "{output:#?}");
    }
    let away = silence.node().set("NODE_URL", "https://127.0.0.1").set("DDS_BASE_URL", "https://dds.example");
    let wanted = "NODE_URL https://127.0.0.1: a sign-in service on another machine cannot reach loopback; name this \
                  machine's address";
    let ended = silence.refuses(away.set("HTTP_BIND", "127.0.0.1:8080"), 78).await;
    assert_eq!(errors(&ended), [wanted]);
    let ended = silence.refuses(silence.node().set("REGISTRATION", "callback"), 78).await;
    assert_eq!(errors(&ended), ["NODE_URL is not set: REGISTRATION=callback needs the URL of this node"]);
    let ended = silence.refuses(silence.node().set("REGISTRATION", "carrier pigeon"), 78).await;
    assert_eq!(errors(&ended), ["REGISTRATION: expected wallet or callback, found \"carrier pigeon\""]);
}

/// Checks how a node with these plugin arguments ends.
async fn plugins_refused(silence: &Silence, arguments: &[&str], code: i32) -> String {
    let libraries = [];
    let node = arguments.iter().fold(silence.proxy.node(&libraries), |node, argument| node.arg(*argument));
    let ended = silence.refuses(node, code).await;
    let errors = errors(&ended);
    assert_eq!(errors.len(), 1, "{}", ended.stderr);
    errors[0].to_owned()
}

#[tokio::test]
async fn missing_and_empty_plugin_folders_are_reported() {
    let silence = Silence::new().await;
    let text = plugins_refused(&silence, &["--plugins", "/no/such/folder"], 78).await;
    assert_eq!(text, "plugins folder /no/such/folder does not exist; create it, or name another with --plugins");
    let text = plugins_refused(&silence, &[], 78).await;
    assert_eq!(text, "no plugin was found; put a library into the plugins folder or name one with --plugins");

    let folder = tempfile::tempdir().expect("a folder");
    let directory = folder.path().join("x.so");
    std::fs::create_dir(&directory).expect("the folder is writable");
    let folder_text = folder.path().to_string_lossy().into_owned();
    let text = plugins_refused(&silence, &["--plugins", &folder_text], 4).await;
    let wanted = "is a directory, expected a library file; folders are not searched recursively";
    assert_eq!(text, format!("plugin {}: {wanted}", directory.display()));
}

#[tokio::test]
async fn refused_plugin_files_do_not_stop_other_plugins() {
    let test_server = TestServer::start().await;
    let setup = test_server.node(&[fixtures::hello()]);
    std::fs::create_dir(setup.plugins().join("x.so")).expect("the folder is writable");
    std::fs::write(setup.plugins().join("y.so"), "no library").expect("the folder is writable");
    std::fs::write(setup.plugins().join("notes.txt"), "passed over").expect("the folder is writable");
    let node = setup.leasing().await;
    let refused = node.said("plugin.refused");
    assert_eq!(refused.len(), 2, "{refused:?}");
    assert!(refused.iter().any(|line| line["reason"].as_str().is_some_and(|text| text.starts_with("is a directory"))));
    test_server.run(&node, "/examples/hello/v1", serde_json::json!({})).await.completed();
}

#[tokio::test]
async fn mistakes_in_plugins_toml_name_place_and_remedy() {
    let silence = Silence::new().await;
    for (text, wanted) in [
        (
            "[[plugin]]\nfile = \"hello\"\nmax_concurency = 3\n",
            "[[plugin]] \"hello\" unknown key \"max_concurency\", did you mean \"max_concurrency\"?",
        ),
        ("[trust]\nunlisted = \"maybe\"\n", "[trust] unlisted: expected \"allow\" or \"refuse\", found \"maybe\""),
        (
            "[[plugin]]\nfile = \"hello\"\nenabled = \"yes\"\n",
            "[[plugin]] \"hello\" enabled: expected true or false, found \"yes\"",
        ),
        (
            "[[plugin]]\nfile = \"hello\"\nmax_concurrency = \"3\"\n",
            "[[plugin]] \"hello\" max_concurrency: expected a number above 0, found \"3\"",
        ),
        ("[[plugin]]\nenabled = true\n", "[[plugin]] 1: the key \"file\" is missing"),
        ("[defaults\n", "line 1: "),
    ] {
        let node = silence.node().plugins_file(text);
        let file = node.plugins().join("plugins.toml");
        let ended = silence.refuses(node, 78).await;
        let errors = errors(&ended);
        assert!(errors.len() == 1 && errors[0].starts_with(&format!("{}: {wanted}", file.display())), "{errors:#?}");
    }
    let ended = silence.refuses(silence.node().arg("--plugins-file").arg("/no/such/plugins.toml"), 78).await;
    assert!(errors(&ended)[0].starts_with("--plugins-file /no/such/plugins.toml: No such file"), "{}", ended.stderr);
}

#[tokio::test]
async fn key_without_effect_refuses_its_plugin() {
    let silence = Silence::new().await;
    let node = silence.node().plugins_file("[[plugin]]\nfile = \"hello\"\nisolation = \"process\"\n");
    let ended = silence.refuses(node, 4).await;
    let text = errors(&ended)[0].to_owned();
    assert!(text.ends_with("isolation = \"process\" is not available in this version; remove it"), "{text}");
}

#[tokio::test]
async fn unusable_address_or_folder_is_reported() {
    let silence = Silence::new().await;
    let taken = silence.proxy.address().to_string();
    let state = tempfile::tempdir().expect("a folder");
    let node = silence.node().set("HTTP_BIND", taken.as_str()).set("STATE_DIR", state.path().to_string_lossy());
    let ended = silence.refuses(node, 75).await;
    assert!(!state.path().join("control.sock").exists(), "a node that does not start takes its socket with it");
    let text = errors(&ended)[0].to_owned();
    assert!(text.starts_with(&format!("HTTP_BIND {taken} cannot be bound: Address already in use")), "{text}");
    // No machine has this address by default, because it is reserved for documentation.
    let ended = silence.refuses(silence.node().set("HTTP_BIND", "192.0.2.1:8080"), 78).await;
    let text = errors(&ended)[0].to_owned();
    assert!(text.starts_with("HTTP_BIND 192.0.2.1:8080 cannot be bound: "), "{text}");
    let file = tempfile::NamedTempFile::new().expect("a file");
    let ended = silence.refuses(silence.node().set("SCRATCH_DIR", file.path().to_string_lossy()), 78).await;
    assert_eq!(errors(&ended), [format!("SCRATCH_DIR: expected a folder, found a file at {}", file.path().display())]);
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn full_disk_at_start_exits_75() {
    if !can_mount() {
        return;
    }
    let silence = Silence::new().await;
    let folder = tempfile::tempdir().expect("a folder");
    let node = silence.node().set("STATE_DIR", folder.path().to_string_lossy()).full_disk(folder.path());
    let ended = silence.refuses(node, 75).await;
    let lock = folder.path().join("lock").display().to_string();
    let wanted = format!("STATE_DIR cannot be used: cannot write {lock}: No space left on device (os error 28)");
    assert_eq!(errors(&ended), [wanted]);
}

#[tokio::test]
async fn run_dev_and_check_report_the_same_folder_mistakes() {
    let silence = Silence::new().await;
    let folder = tempfile::tempdir().expect("a folder");
    let at = |inside: &str| folder.path().join(inside).to_string_lossy().into_owned();
    std::fs::write(at("file"), "").expect("the folder is writable");
    std::os::unix::fs::symlink("/proc", at("link")).expect("the folder is writable");
    std::os::unix::fs::symlink(at("scratch"), at("same")).expect("the folder is writable");
    std::fs::create_dir(at("scratch")).expect("the folder is writable");
    let (link, same, scratch, swept) = (at("link/x"), at("same/"), at("scratch"), at("scratch/node-7/state"));
    let kernels = |shown: &str, below: &str| {
        format!("expected a folder for files, found {shown}; name one that is not below {below}")
    };
    for (scratch_dir, state_dir, wanted) in [
        (
            &*at("file/below"),
            "/proc/x",
            vec![
                format!("SCRATCH_DIR: expected a folder, found a file at {}", at("file")),
                format!("STATE_DIR: {}", kernels("/proc/x", "/proc")),
            ],
        ),
        (
            "/sys/x",
            &*link,
            vec![
                format!("SCRATCH_DIR: {}", kernels("/sys/x", "/sys")),
                format!("STATE_DIR: {}", kernels(&format!("{link}, which is /proc/x"), "/proc")),
            ],
        ),
        ("/dev/x", "/dev/shm", vec![format!("SCRATCH_DIR: {}", kernels("/dev/x", "/dev"))]),
        (
            &*scratch,
            &*same,
            vec![format!(
                "STATE_DIR: expected another folder than SCRATCH_DIR, which is {scratch}, found {same}; name two folders"
            )],
        ),
        (
            &*scratch,
            &*swept,
            vec![format!(
                "STATE_DIR: expected a folder that stays, found {swept}: node-… in SCRATCH_DIR {scratch} is removed at a \
                 start; name another"
            )],
        ),
    ] {
        let set = |node: NodeSetup| node.set("SCRATCH_DIR", scratch_dir).set("STATE_DIR", state_dir);
        // A library that would cause an error if it were read.
        let node = set(silence.node());
        std::fs::write(node.plugins().join("y.so"), "no library").expect("the folder is writable");
        let ended = silence.refuses(node, 78).await;
        assert_eq!(errors(&ended), wanted);
        assert_eq!(ended.stderr.lines().count(), wanted.len(), "{}", ended.stderr);
        let check = Cli::new(&["config", "check"])
            .set("DMS_BASE_URL", "https://plane.example/v1")
            .set("DDS_BASE_URL", "https://dds.example")
            .set("REG_SECRET", "s")
            .set("SECP256K1_PRIVHEX", "ab".repeat(32));
        let ended = check.set("SCRATCH_DIR", scratch_dir).set("STATE_DIR", state_dir).run().await.expect(78);
        assert_eq!(errors(&ended), wanted);
        // The node of `dev` has its state in the data folder of the dev server.
        let wanted: Vec<&String> = wanted.iter().filter(|line| line.starts_with("SCRATCH_DIR")).collect();
        if !wanted.is_empty() {
            let dev = Cli::new(&["dev", "--port", "0", "--plugins"]).arg(folder.path());
            let ended = dev.set("SCRATCH_DIR", scratch_dir).run().await.expect(78);
            assert_eq!(errors(&ended).iter().collect::<Vec<_>>(), wanted);
        }
    }
    let ended = Cli::new(&["dev", "--port", "0", "--no-node", "--data", "/proc/x"]).run().await.expect(78);
    assert_eq!(errors(&ended), [format!("--data /proc/x: {}", kernels("/proc/x", "/proc"))]);
}

#[cfg(unix)]
#[tokio::test]
async fn folder_of_local_plane_is_checked() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().expect("a folder");
    let at = |inside: &str| dir.path().join(inside).display().to_string();
    std::fs::write(at("file"), "").expect("the folder is writable");
    std::os::unix::fs::symlink("nothing", at("link")).expect("the folder is writable");
    std::fs::create_dir_all(at("part/running")).expect("the folder is writable");
    std::fs::write(at("part/done"), "").expect("the folder is writable");
    std::fs::create_dir(at("closed")).expect("the folder is writable");
    std::fs::set_permissions(at("closed"), std::fs::Permissions::from_mode(0o500)).expect("ours");
    let file = at("node.toml");
    for (folder, wanted) in [
        ("file", format!("expected a folder, found a file at {}", at("file"))),
        ("file/below", format!("expected a folder, found a file at {}", at("file"))),
        ("link", format!("expected a folder, found a broken link at {}", at("link"))),
        ("part", format!("expected a folder, found a file at {}", at("part/done"))),
        ("closed", format!("expected a folder this user can write to, found {}: ", at("closed"))),
        ("closed/missing", format!("expected a folder this user can write to, found {}: ", at("closed"))),
    ] {
        let text = format!("[plane.jobs]\nkind = \"local\"\nfolder = {:?}\n", at(folder));
        std::fs::write(&file, text).expect("the folder is writable");
        let place = format!("{file}:3: plane.jobs.folder: ");
        for command in [&["run", "--config"][..], &["config", "check", "--config"]] {
            let ended = Cli::new(command).arg(&file).dir(dir.path()).obeys_permissions().run().await.expect(78);
            let errors = errors(&ended);
            assert!(errors[0].starts_with(&format!("{place}{wanted}")), "{folder}: {errors:#?}");
        }
        let show = Cli::new(&["config", "show", "-o", "json", "--config"]).arg(&file).dir(dir.path());
        let shown: Value = serde_json::from_str(&show.obeys_permissions().run().await.stdout).expect("JSON");
        let mistake = shown["plane.jobs.folder"]["mistake"].as_str().expect("a mistake");
        assert!(mistake.starts_with(&wanted), "{folder}: {mistake}");
    }
    // A node creates a missing folder.
    std::fs::write(&file, format!("[plane.jobs]\nkind = \"local\"\nfolder = {:?}\n", at("new/jobs"))).expect("written");
    std::fs::create_dir(at("plugins")).expect("the folder is writable");
    let check = Cli::new(&["config", "check", "--plugins", "plugins", "--config"]).arg(&file).dir(dir.path());
    check.run().await.expect(0);
}

#[tokio::test]
async fn invalid_plugin_folder_is_reported_with_all_others() {
    let silence = Silence::new().await;
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("plugins"), "").expect("the folder is writable");
    let wanted = "plugins folder plugins: expected a folder, found a file; name it with --plugins if it is a library";
    for command in [&["run"][..], &["config", "check"], &["dev"], &["plugins", "list"], &["invoke", "/a"]] {
        let ended = Cli::new(command).dir(folder.path()).run().await.expect(78);
        let output = errors(&ended);
        assert_eq!(output.last().map(|output| output.replace("./", "")).as_deref(), Some(wanted), "{command:?}");
    }
    let node = silence.node().set("MAX_CONCURRENCY", "0").set("SCRATCH_DIR", "/proc/x").arg("--plugins").arg("/sys");
    let ended = silence.refuses(node.arg("--plugins-file").arg("/no/such"), 78).await;
    let starts = ["MAX_CONCURRENCY: ", "SCRATCH_DIR: ", "--plugins-file /no/such: No such file", "plugins folder: "];
    let output = errors(&ended);
    assert!(
        output.len() == 4 && output.iter().zip(starts).all(|(output, start)| output.starts_with(start)),
        "{output:#?}"
    );
}

#[tokio::test]
async fn invalid_host_names_are_refused() {
    let silence = Silence::new().await;
    let long = "a".repeat(64);
    for host in ["a..b", "-x", ".a.example", &long] {
        let url = format!("https://{host}/v1");
        let node = silence.node().set("DMS_BASE_URL", &*url).set("DDS_BASE_URL", &*url).set("NODE_URL", &*url);
        let ended = silence.refuses(node.set("HTTPS_PROXY", &*url).set("DOMAIN_HOSTS", host), 78).await;
        let expected =
            "expected a host of names with 1 to 63 characters between dots, none with a hyphen at its start or end";
        let urls = ["DMS_BASE_URL", "DDS_BASE_URL", "NODE_URL"];
        for name in urls {
            let wanted = format!("{name}: {expected}, found {host:?}; correct the host");
            assert!(errors(&ended).contains(&wanted), "{wanted}: {}", ended.stderr);
        }
        let wanted = format!("HTTPS_PROXY: {expected}; correct the host of the proxy");
        assert!(errors(&ended).contains(&wanted), "{}", ended.stderr);
        assert!(errors(&ended).iter().any(|output| output.starts_with("DOMAIN_HOSTS: expected hosts such as ")));
        assert_eq!(errors(&ended).len(), 5, "{}", ended.stderr);
    }
}

#[tokio::test]
async fn last_line_follows_the_log_format() {
    let silence = Silence::new().await;
    let libraries = [fixtures::c("refused", &["NO_ENTRY"])];
    for (format, is_json) in [("", true), ("json", true), ("text", false)] {
        let ended = silence.refuses(silence.proxy.node(&libraries).set("LOG_FORMAT", format), 4).await;
        let lines = ended.stderr.lines();
        let json: Vec<bool> = lines.map(|line| serde_json::from_str::<Value>(line).is_ok()).collect();
        assert!(json.len() >= 2 && json.iter().all(|json| *json == is_json), "{format}: {}", ended.stderr);
        assert_eq!(errors(&ended).len(), 1, "{}", ended.stderr);
    }
}

fn complete(args: &[&str]) -> Cli {
    let cli = Cli::new(args).set("DMS_BASE_URL", "https://plane.example/v1").set("DDS_BASE_URL", "https://dds.example");
    cli.set("REG_SECRET", "s").set("SECP256K1_PRIVHEX", "ab".repeat(32))
}

#[tokio::test]
async fn config_check_prints_text_whatever_the_log_format() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("node.toml");
    std::fs::write(&file, "[telemetry]\nlog_format = \"json\"\n").expect("written");
    let check = || Cli::new(&["config", "check", "--config"]).arg(&file).set("LOG_FORMAT", "json");
    let ended = check().run().await.expect(78);
    assert!(ended.stderr.lines().count() >= 4, "{}", ended.stderr);
    assert!(ended.stderr.lines().all(|line| line.starts_with("error: ")), "{}", ended.stderr);
    let ended = check().arg("-o").arg("json").run().await.expect(78);
    let report: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    assert_eq!((&report["complete"], ended.stderr.as_str()), (&Value::Bool(false), ""));
    assert_eq!(report["mistakes"].as_array().map(Vec::len), Some(4), "{report}");
    let missing = Cli::new(&["config", "check", "-o", "json", "--config", "/no/such"]).run().await.expect(78);
    let report: Value = serde_json::from_str(&missing.stdout).expect("JSON");
    assert!(report["mistakes"][0].as_str().is_some_and(|text| text.starts_with("--config /no/such: ")), "{report}");
}

#[tokio::test]
async fn config_check_strict_exits_78_on_warnings() {
    let warned = |args: &[&str]| complete(args).set("TOKEN_SAFETY_RATIO", "7");
    warned(&["config", "check"]).run().await.expect(0);
    let ended = warned(&["config", "check", "--strict"]).run().await.expect(78);
    assert!(ended.stderr.starts_with("warning: TOKEN_SAFETY_RATIO: 7 is outside"), "{}", ended.stderr);
    let ended = warned(&["config", "check", "--strict", "-o", "json"]).run().await.expect(78);
    let report: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    assert_eq!((&report["complete"], report["warnings"].as_array().map(Vec::len)), (&Value::Bool(true), Some(1)));
    complete(&["config", "check", "--strict"]).run().await.expect(0);
}

#[tokio::test]
async fn mistyped_environment_variables_are_warned_of() {
    let cli = complete(&["config", "check"]).set("MAX_CONCURENCY", "3").set("ALLOW_INSECURE_HTP", "true");
    let ended = cli.set("FTP_PROXY", "x").set("NODE_ENV", "x").set("http_proxy", "http://127.0.0.1:9").run().await;
    let ended = ended.expect(0);
    let wanted = "warning: environment variable MAX_CONCURENCY is not a setting and has no effect, did you mean \
                  MAX_CONCURRENCY?";
    assert_eq!(ended.stderr, wanted);
    // Beside mistakes too: the name can explain a missing value.
    let check = || Cli::new(&["config", "check"]).set("RUST_LOG", "").set("DMS_BASE_UR", "http://127.0.0.1:1/v1");
    let ended = check().run().await.expect(78);
    assert!(ended.stderr.contains("did you mean DMS_BASE_URL?"), "{}", ended.stderr);
    let ended = check().arg("-o").arg("json").run().await.expect(78);
    let report: Value = serde_json::from_str(&ended.stdout).expect("JSON");
    assert_eq!(report["warnings"].as_array().map(Vec::len), Some(1), "{report}");
    let ended = Cli::new(&["run"]).set("DMS_BASE_UR", "http://127.0.0.1:1/v1").run().await.expect(78);
    assert!(ended.stderr.contains("did you mean DMS_BASE_URL?"), "{}", ended.stderr);
    for name in ["ALLOW_INSECURE_HTP=true", "ALLOWINSECURE_HTTP=true"] {
        let ended = complete(&["config", "check", "--set", name]).run().await.expect(78);
        assert!(!ended.stderr.contains("did you mean"), "{}", ended.stderr);
    }
}

#[tokio::test]
async fn json_with_byte_order_mark_is_read() {
    let dir = tempfile::tempdir().expect("a folder");
    for name in ["node.json", "node"] {
        let file = dir.path().join(name);
        std::fs::write(&file, "\u{feff}{ \"engine\": 1 }").expect("written");
        let ended = Cli::new(&["config", "check", "--config"]).arg(&file).run().await.expect(78);
        let wanted = format!("{}:1: engine: expected a table, found 1", file.display());
        assert_eq!(errors(&ended)[0], wanted);
    }
}

#[tokio::test]
async fn too_few_open_files_exit_75() {
    let silence = Silence::new().await;
    for limit in [10, 14, 18, 31] {
        let ended = silence.refuses(silence.node().open_files(limit, limit), 75).await;
        let errors = errors(&ended);
        let wanted = format!(
            "only {limit} files may be open, the node needs at least 32; raise the limit (ulimit -n, LimitNOFILE= of a service)"
        );
        assert_eq!(errors, [wanted]);
    }
    // The soft limit is raised before plugins are opened.
    let node = silence.node().open_files(12, 4096).set("HTTP_BIND", "192.0.2.1:8080");
    let ended = silence.refuses(node, 78).await;
    assert!(errors(&ended)[0].starts_with("HTTP_BIND"), "{}", ended.stderr);
}
