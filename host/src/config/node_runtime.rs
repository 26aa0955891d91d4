//! Reads a table `[plane.NAME]` with `kind = "node-runtime"`.

use std::{collections::BTreeMap, time::Duration};

use url::Url;

use super::{
    file::{Members, Value},
    folders_and_hosts::host_problem,
};
use crate::{
    leases::node_runtime::{Capacity, Config},
    model::{Capability, PlaneName, nearest},
    transport,
};

/// The keys of the table.
const KEYS: [&str; 9] = [
    "kind",
    "control_plane_url",
    "grpc_url",
    "node_id",
    "max_concurrent_leases",
    "heartbeat_interval_seconds",
    "capacity",
    "metadata",
    "agent_map",
];
const LEASES_MAX: u32 = 65_536;
const HEARTBEAT_SECS_MAX: u32 = 3600;

/// A table that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NodeRuntimeTable {
    /// Without `capacity.slots`, they have the placeholder 0.
    pub(super) config: Config,
    /// Key, value and line of each setting in the file.
    pub(super) rows: Vec<(String, String, usize)>,
}

impl NodeRuntimeTable {
    /// Every URL that the policy for plain http does not allow: its key and the reason.
    pub(super) fn url_problems(&self, policy: transport::Policy) -> Vec<(&'static str, String)> {
        let Config { control_plane_url, grpc_url, .. } = &self.config;
        let mut urls = vec![("control_plane_url", control_plane_url)];
        if grpc_url != control_plane_url {
            urls.push(("grpc_url", grpc_url));
        }
        let checked = urls.into_iter().map(|(key, url)| (key, policy.check(url)));
        checked.filter_map(|(key, checked)| Some((key, checked.err()?.to_string()))).collect()
    }
}

/// The mistakes in a table: line, key, text.
pub(super) type Mistakes = Vec<(usize, String, String)>;

/// Reads the members of the table, which begins at `line`.
pub(super) fn read(name: PlaneName, line: usize, members: Members) -> Result<NodeRuntimeTable, Mistakes> {
    let mut reader = Reader { mistakes: Vec::new(), rows: Vec::new() };
    let mut config = Config {
        name,
        control_plane_url: placeholder(),
        grpc_url: placeholder(),
        node_id: String::new(),
        max_concurrent_leases: 5,
        heartbeat_interval: Duration::from_secs(30),
        capacity: Capacity::default(),
        metadata: BTreeMap::new(),
        agent_map: BTreeMap::new(),
    };
    let (mut url, mut grpc) = (None, None);
    for (key, line, value) in members {
        match key.as_str() {
            "kind" => drop(reader.text(&key, line, value)),
            "control_plane_url" => url = reader.url(&key, line, value),
            "grpc_url" => grpc = reader.url(&key, line, value),
            "node_id" => match reader.text(&key, line, value) {
                Some(text) if text.trim().is_empty() => {
                    reader.mistake(line, &key, "is blank; give this node a name that no other node has".to_owned());
                }
                Some(text) => text.trim().clone_into(&mut config.node_id),
                None => {}
            },
            "max_concurrent_leases" => {
                config.max_concurrent_leases = reader.number(&key, line, value, LEASES_MAX);
            }
            "heartbeat_interval_seconds" => {
                let secs = reader.number(&key, line, value, HEARTBEAT_SECS_MAX);
                config.heartbeat_interval = Duration::from_secs(secs.into());
            }
            "capacity" => {
                for (part, line, value) in reader.table(&key, line, value) {
                    let key = format!("capacity.{part}");
                    match part.as_str() {
                        "slots" => config.capacity.slots = reader.number(&key, line, value, LEASES_MAX),
                        "cpu" => config.capacity.cpu = reader.text(&key, line, value),
                        "memory" => config.capacity.memory = reader.text(&key, line, value),
                        _ => reader.unknown(line, &key, &part, &["slots", "cpu", "memory"]),
                    }
                }
            }
            "metadata" => {
                for (part, line, value) in reader.table(&key, line, value) {
                    if let Some(text) = reader.text(&format!("metadata.{part}"), line, value) {
                        config.metadata.insert(part, text);
                    }
                }
            }
            "agent_map" => {
                for (part, line, value) in reader.table(&key, line, value) {
                    let key = format!("agent_map.{part}");
                    let Some(text) = reader.text(&key, line, value) else { continue };
                    match Capability::parse(&text) {
                        Ok(capability) => drop(config.agent_map.insert(part, capability)),
                        Err(err) => reader.mistake(line, &key, err.to_string()),
                    }
                }
            }
            _ => reader.unknown(line, &key, &key, &KEYS),
        }
    }
    let given = |key: &str| reader.rows.iter().any(|(given, _, _)| given == key);
    let missing: Vec<_> = [
        ("control_plane_url", "give the URL of the control plane, such as \"http://localhost:5109\""),
        ("node_id", "give this node a name that no other node has"),
    ]
    .into_iter()
    .filter(|(key, _)| !given(key))
    .collect();
    for (key, remedy) in missing {
        // A value of the wrong type is reported already.
        if !reader.mistakes.iter().any(|(_, known, _)| known == key) {
            reader.mistakes.push((line, key.to_owned(), format!("is not set; {remedy}")));
        }
    }
    if !reader.mistakes.is_empty() {
        return Err(reader.mistakes);
    }
    config.control_plane_url = url.unwrap_or(config.control_plane_url);
    config.grpc_url = grpc.unwrap_or_else(|| config.control_plane_url.clone());
    Ok(NodeRuntimeTable { config, rows: reader.rows })
}

fn placeholder() -> Url {
    Url::parse("http://127.0.0.1").expect("a constant URL")
}

struct Reader {
    mistakes: Mistakes,
    rows: Vec<(String, String, usize)>,
}

impl Reader {
    fn mistake(&mut self, line: usize, key: &str, text: String) {
        self.mistakes.push((line, key.to_owned(), text));
    }

    fn unknown(&mut self, line: usize, key: &str, part: &str, known: &[&'static str]) {
        let near =
            nearest(part, known.iter().copied()).map_or_else(String::new, |near| format!(", did you mean {near}?"));
        self.mistake(line, key, format!("there is no such key{near}"));
    }

    fn text(&mut self, key: &str, line: usize, value: Value) -> Option<String> {
        match value {
            Value::Text(text) => {
                self.rows.push((key.to_owned(), text.clone(), line));
                Some(text)
            }
            other => {
                self.mistake(line, key, format!("expected a text in quotes, found {}", other.describe()));
                None
            }
        }
    }

    /// A number from 1 to `most`.
    fn number(&mut self, key: &str, line: usize, value: Value, most: u32) -> u32 {
        let found = value.describe();
        if let Value::Whole(text) = value
            && let Ok(number) = text.parse()
            && (1..=most).contains(&number)
        {
            self.rows.push((key.to_owned(), text, line));
            return number;
        }
        self.mistake(line, key, format!("expected a whole number from 1 to {most}, found {found}"));
        1
    }

    fn table(&mut self, key: &str, line: usize, value: Value) -> Members {
        match value {
            Value::Table(members) => members,
            other => {
                self.mistake(line, key, format!("expected a table, found {}", other.describe()));
                Members::new()
            }
        }
    }

    fn url(&mut self, key: &str, line: usize, value: Value) -> Option<Url> {
        let text = self.text(key, line, value)?;
        // A URL with a password is not printed.
        let refuse = |what: &str| Err(format!("expected an http or https URL {what}"));
        let url = match Url::parse(text.trim()) {
            Ok(url) if !matches!(url.scheme(), "http" | "https") || !url.has_host() => refuse("with a host"),
            Ok(url) if !url.username().is_empty() || url.password().is_some() => refuse("without user or password"),
            Ok(url) if url.query().is_some() || url.fragment().is_some() => refuse("without query or fragment"),
            Ok(url) => host_problem(&url).map_or(Ok(url), Err),
            Err(_) => refuse("such as \"http://localhost:5109\""),
        };
        url.map_err(|problem| self.mistake(line, key, problem)).ok()
    }
}
