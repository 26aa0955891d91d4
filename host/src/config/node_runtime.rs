//! Reads the settings of a Node Runtime control plane: those of a table `[plane.NAME]` with `kind = "node-runtime"`, or
//! those of [`super::appsettings`].

use std::{collections::BTreeMap, time::Duration};

use url::Url;

use super::{
    appsettings::Form,
    file::{Problem, Setting, Value},
    folders_and_hosts::host_problem,
    layers::Origin,
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
const CAPACITY: [&str; 3] = ["slots", "cpu", "memory"];
const LEASES_MAX: u32 = 65_536;
const HEARTBEAT_SECS_MAX: u32 = 3600;

/// A table that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NodeRuntimeTable {
    /// Without `capacity.slots`, they have the placeholder 0.
    pub(super) config: Config,
    /// Key, value and origin of each setting.
    pub(super) rows: Vec<(String, String, Origin)>,
}

impl NodeRuntimeTable {
    /// Every URL that the policy for plain http does not allow: its key, its origin and the reason.
    pub(super) fn url_problems(&self, policy: transport::Policy) -> Vec<(&'static str, Origin, String)> {
        let Config { control_plane_url, grpc_url, .. } = &self.config;
        let urls = [("control_plane_url", control_plane_url), ("grpc_url", grpc_url)];
        let checked = urls.into_iter().filter_map(|(key, url)| {
            // `grpc_url` has no row if it is not set.
            let (_, _, origin) = self.rows.iter().find(|(given, _, _)| given == key)?;
            Some((key, *origin, policy.check(url).err()?.to_string()))
        });
        checked.collect()
    }
}

/// Reads the settings of a table, which the operator wrote in this form.
pub(super) fn read(
    name: PlaneName,
    form: Form,
    origin: Origin,
    settings: Vec<Setting>,
) -> Result<NodeRuntimeTable, Vec<Problem>> {
    let mut reader = Reader { mistakes: Vec::new(), rows: Vec::new() };
    if !matches!(form, Form::Table) {
        reader.rows.push(("kind".to_owned(), "node-runtime".to_owned(), origin));
    }
    for (key, remedy) in [
        ("control_plane_url", "give the URL of the control plane, such as \"http://localhost:5109\""),
        ("node_id", "give this node a name that no other node has"),
    ] {
        if !settings.iter().any(|setting| setting.key == key) {
            let (place, what) = (form.place(&name, key), format!("is not set; {remedy}"));
            reader.mistakes.push(Problem { origin, place, what });
        }
    }
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
    for setting in &settings {
        match setting.key.split_once('.').map_or((&*setting.key, None), |(table, part)| (table, Some(part))) {
            ("kind", None) => drop(reader.text(setting)),
            ("control_plane_url", None) => url = reader.url(setting),
            ("grpc_url", None) => grpc = reader.url(setting),
            ("node_id", None) => match reader.text(setting) {
                Some(text) if text.trim().is_empty() => {
                    reader.mistake(setting, "is blank; give this node a name that no other node has");
                }
                Some(text) => text.trim().clone_into(&mut config.node_id),
                None => {}
            },
            ("max_concurrent_leases", None) => config.max_concurrent_leases = reader.number(setting, LEASES_MAX),
            ("heartbeat_interval_seconds", None) => {
                let secs = reader.number(setting, HEARTBEAT_SECS_MAX);
                config.heartbeat_interval = Duration::from_secs(secs.into());
            }
            ("capacity", Some("slots")) => config.capacity.slots = reader.number(setting, LEASES_MAX),
            ("capacity", Some("cpu")) => config.capacity.cpu = reader.text(setting),
            ("capacity", Some("memory")) => config.capacity.memory = reader.text(setting),
            ("capacity", Some(part)) => reader.unknown(setting, part, &CAPACITY),
            ("metadata", Some(part)) => {
                if let Some(text) = reader.text(setting) {
                    config.metadata.insert(part.to_owned(), text);
                }
            }
            ("agent_map", Some(part)) => {
                let Some(text) = reader.text(setting) else { continue };
                match Capability::parse(&text) {
                    Ok(capability) => drop(config.agent_map.insert(part.to_owned(), capability)),
                    Err(err) => reader.mistake(setting, err),
                }
            }
            ("capacity" | "metadata" | "agent_map", None) => {
                reader.mistake(setting, format_args!("expected a table, found {}", setting.value.describe()));
            }
            _ => reader.unknown(setting, &setting.key, &KEYS),
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
    mistakes: Vec<Problem>,
    rows: Vec<(String, String, Origin)>,
}

impl Reader {
    fn mistake(&mut self, setting: &Setting, what: impl std::fmt::Display) {
        self.mistakes.push(Problem { origin: setting.origin, place: setting.place.clone(), what: what.to_string() });
    }

    fn unknown(&mut self, setting: &Setting, part: &str, known: &[&'static str]) {
        let near =
            nearest(part, known.iter().copied()).map_or_else(String::new, |near| format!(", did you mean {near}?"));
        self.mistake(setting, format_args!("there is no such key{near}"));
    }

    fn row(&mut self, setting: &Setting, text: &str) {
        self.rows.push((setting.key.clone(), text.to_owned(), setting.origin));
    }

    fn text(&mut self, setting: &Setting) -> Option<String> {
        let text = match &setting.value {
            Value::Text(text) => text.clone(),
            Value::Whole(text) | Value::Number(text) if !setting.typed => text.clone(),
            // The spelling of .NET.
            Value::Switch(on) if !setting.typed => if *on { "True" } else { "False" }.to_owned(),
            other => {
                self.mistake(setting, format_args!("expected a text in quotes, found {}", other.describe()));
                return None;
            }
        };
        self.row(setting, &text);
        Some(text)
    }

    /// A number from 1 to `most`.
    fn number(&mut self, setting: &Setting, most: u32) -> u32 {
        let text = match &setting.value {
            Value::Whole(text) => text,
            Value::Text(text) if !setting.typed => text.trim(),
            _ => "",
        };
        if let Ok(number) = text.parse()
            && (1..=most).contains(&number)
        {
            self.row(setting, text);
            return number;
        }
        let found = setting.value.describe();
        self.mistake(setting, format_args!("expected a whole number from 1 to {most}, found {found}"));
        1
    }

    fn url(&mut self, setting: &Setting) -> Option<Url> {
        let text = self.text(setting)?;
        // A URL with a password is not printed.
        let refuse = |what: &str| Err(format!("expected an http or https URL {what}"));
        let url = match Url::parse(text.trim()) {
            Ok(url) if !matches!(url.scheme(), "http" | "https") || !url.has_host() => refuse("with a host"),
            Ok(url) if !url.username().is_empty() || url.password().is_some() => refuse("without user or password"),
            Ok(url) if url.query().is_some() || url.fragment().is_some() => refuse("without query or fragment"),
            Ok(url) => host_problem(&url).map_or(Ok(url), Err),
            Err(_) => refuse("such as \"http://localhost:5109\""),
        };
        url.map_err(|problem| self.mistake(setting, problem)).ok()
    }
}
