//! Every host of this major version of the ABI runs every plugin of it: older and newer minor versions, Rust and C,
//! debug and release builds, another tokio.
//!
//! The other hosts and plugins are builds of `host/tests/fixtures/rust/variants`, whose SDK has changed tables. An entry
//! works if both sides have it. Otherwise the side that has it sees that the other one lacks it.

use std::{path::PathBuf, process::Command};

use runner_host::plugins::{self, Places, PluginState, Plugins, PluginsFile};
use runner_sdk::abi;
use serde_json::{Value, json};

use crate::harness::{EVENT_LIMIT, TestServer, fixtures, folder::Folder, within};

/// The features of a later SDK: one more entry in each table. With the first one, the request of `start` has one more
/// field.
const HOST_ENTRY: &str = "--features=host-entry";
const MODULE_ENTRY: &str = "--features=module-entry";
const BOTH_ENTRIES: &str = "--features=host-entry,module-entry";

/// A plugin of the matrix.
struct Plugin {
    name: &'static str,
    file: PathBuf,
    rust: bool,
    /// It has one more entry. It knows one more entry of the host and one more field of a request.
    newer: bool,
}

fn plugins() -> Vec<Plugin> {
    let rust = |name, newer, words: &[&str]| {
        let file = fixtures::variant(name, "variant", words);
        Plugin { name, file, rust: true, newer }
    };
    let c = |name, newer, defines: &[&str]| Plugin { name, file: fixtures::c("variant", defines), rust: false, newer };
    let later = format!("ABI_TEXT=\"{}.{}\"", abi::ABI_MAJOR, abi::ABI_MINOR + 1);
    vec![
        rust("same", false, &[]),
        rust("same-release", false, &["--release"]),
        rust("older", false, &["--features=older"]),
        rust("newer", true, &[BOTH_ENTRIES]),
        Plugin { name: "independent", file: fixtures::independent(), rust: true, newer: false },
        c("c-same", false, &[]),
        c("c-older", false, &["OLDER"]),
        c("c-newer", true, &["NEWER", &later]),
    ]
}

impl Plugin {
    fn capability(&self) -> String {
        format!("/fixtures/{}/v1", self.name)
    }

    /// Path and text of its artifact for the input "a letter". `host_entry`: the host has the appended entry and field.
    fn artifact(&self, host_entry: bool) -> (&'static str, String) {
        if self.name == "independent" {
            return ("independent.txt", "an independent plugin read: a letter".to_owned());
        }
        let (weight, measure) = if host_entry && self.newer { ("9", "77") } else { ("none", "Unsupported") };
        ("seen.txt", format!("a letter, run 1, weight {weight}, measure {measure}"))
    }
}

/// A host of another version runs each plugin. `host_entry` and `module_entry`: which entries it has in addition.
fn check(host: &str, words: &[&str], host_entry: bool, module_entry: bool) {
    let program = fixtures::variant(host, "variant-host", words);
    for plugin in plugins() {
        let cell = format!("{} on the host {host}", plugin.name);
        let output = Command::new(&program).arg(&plugin.file).arg(plugin.capability()).output();
        let output = output.unwrap_or_else(|err| panic!("{cell}: {err}"));
        assert!(output.status.success(), "{cell}: {}", String::from_utf8_lossy(&output.stderr));
        let seen: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|err| panic!("{cell}: {err}"));
        let (path, written) = plugin.artifact(host_entry);
        assert_eq!((&seen["path"], &seen["written"]), (&json!(path), &json!(written)), "{cell}");
        let progress = if plugin.name == "independent" { "" } else { r#"{"run":1}"# };
        assert_eq!(seen["progress"], progress, "{cell}: progress");
        assert_eq!(seen["layout"], json!(plugin.rust.then_some("Layout")), "{cell}: layout");
        assert_eq!(seen["measured"], json!((module_entry && plugin.newer).then_some(true)), "{cell}: module entry");
    }
}

#[tokio::test]
async fn this_host_runs_plugins_of_every_version() {
    for plugin in plugins() {
        let cell = format!("{} on this host", plugin.name);
        let folder = Folder::new();
        folder.put("libplugin.so", &plugin.file);
        std::fs::write(folder.root().join("in.txt"), "a letter").expect("the folder is writable");
        let ended = folder.invoke(&plugin.capability(), &["--input", "in.txt"]).await;
        assert_eq!(ended.code, 0, "{cell}: {}", ended.stderr);
        let (path, text) = plugin.artifact(false);
        assert_eq!(String::from_utf8_lossy(&folder.output(path)), text, "{cell}");
    }
}

/// `log_level` is the one optional entry of a module. Tables without it have something else in its place, or NULL.
#[tokio::test]
async fn missing_module_entry_is_never_called() {
    let plugins = plugins();
    let files: Vec<PathBuf> = plugins.iter().map(|plugin| plugin.file.clone()).collect();
    let loaded = Plugins::load(&plugins::Config {
        places: Places::from_arguments(&files).expect("the fixtures exist"),
        file: PluginsFile::default(),
        max_concurrency: 1,
        log_level: 0,
        init_limit: EVENT_LIMIT,
        allow_writable: true,
    });
    let loaded = loaded.expect("files need no listing");
    loaded.set_log_level(5);
    // Calls of an instance are made in order, so this waits for the last one. A wrong call aborts this process.
    within("the end of the plugins", String::new, loaded.shutdown(EVENT_LIMIT)).await;
    for (plugin, listing) in plugins.iter().zip(loaded.listings()) {
        assert_eq!(listing.state, PluginState::Loaded, "{}: {:?}", plugin.name, listing.reason);
        assert_eq!(listing.hanging_calls, 0, "{}", plugin.name);
    }
}

#[test]
fn host_with_another_host_entry_runs_every_plugin() {
    check("host-entry", &[HOST_ENTRY], true, false);
}

#[test]
fn host_with_another_module_entry_runs_every_plugin() {
    check("module-entry", &[MODULE_ENTRY], false, true);
}

#[test]
fn release_host_runs_every_plugin() {
    check("release", &["--release"], false, false);
}

#[tokio::test]
async fn plugins_with_equal_symbols_keep_their_state() {
    let test_server = TestServer::start().await;
    let c = ["one", "two"].map(|name| fixtures::c("twin", &[&format!("WHO=\"{name}\"")]));
    let rust = ["same", "twin"].map(|name| fixtures::variant(name, "variant", &[]));
    let node = test_server.joined(&[c, rust].concat()).await;
    let input = test_server.put("in", b"a letter").await;
    let progress = async |name: &str| {
        let job = test_server.task(&format!("/fixtures/{name}/v1")).inputs(&[input]).submit();
        let ended = test_server.ended(&node, job).await;
        ended.completed().task()["meta"]["progress"].clone()
    };
    for run in 1..=2 {
        for name in ["one", "two"] {
            let seen = progress(&format!("twin-{name}")).await;
            assert_eq!(seen, json!({ "name": name, "run": run }), "C plugin {name}");
        }
        for name in ["same", "twin"] {
            assert_eq!(progress(name).await, json!({ "run": run }), "Rust plugin {name}");
        }
    }
    node.stop().await;
}

/// Every order of `items`.
fn orders<T: Copy>(items: &[T]) -> Vec<Vec<T>> {
    if items.is_empty() {
        return vec![Vec::new()];
    }
    let beginning_with = |index: usize| {
        let mut others = items.to_vec();
        let first = others.remove(index);
        orders(&others).into_iter().map(move |others| [vec![first], others].concat())
    };
    (0..items.len()).flat_map(beginning_with).collect()
}

/// The plugins have appended different entries. An accepted one must not affect the next ones.
#[tokio::test]
async fn plugins_load_in_every_order() {
    let changed = "its tables are not this host's";
    let cases = [
        (fixtures::variant("newer", "variant", &[BOTH_ENTRIES]), "/fixtures/newer/v1"),
        (fixtures::variant("other", "variant", &["--features=other-entry"]), "/fixtures/other/v1"),
        (fixtures::variant("older", "variant", &["--features=older"]), "/fixtures/older/v1"),
        (fixtures::changed_struct(), changed),
    ];
    for order in orders(&[0, 1, 2, 3]) {
        let folder = Folder::new();
        for (name, case) in ["a.so", "b.so", "c.so", "d.so"].iter().zip(&order) {
            folder.put(name, &cases[*case].0);
        }
        let rows = folder.rows(0).await;
        assert_eq!(rows.len(), cases.len());
        for (row, case) in rows.iter().zip(&order) {
            assert!(row.contains(cases[*case].1), "{} is missing in {rows:#?}", cases[*case].1);
        }
    }
}
