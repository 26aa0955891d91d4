//! Reads the settings of a Node Runtime control plane: those of a table `[plane.NAME]` with `kind = "node-runtime"`, or
//! those of [`super::appsettings`].

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

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
    transport::{self, Identity, PeerTls, PeerTlsError},
};

/// The keys of the table.
const KEYS: [&str; 10] = [
    "kind",
    "control_plane_url",
    "grpc_url",
    "node_id",
    "max_concurrent_leases",
    "heartbeat_interval_seconds",
    "capacity",
    "metadata",
    "agent_map",
    "tls",
];
const CAPACITY: [&str; 3] = ["slots", "cpu", "memory"];
const TLS: [&str; 6] = ["enabled", "client_certificate", "client_key", "ca", "common_name", "check_host"];
/// The paths of `tls`.
const CERTIFICATE: &str = "tls.client_certificate";
const KEY: &str = "tls.client_key";
const CA: &str = "tls.ca";
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
    /// What cannot be used: every URL that the policy for plain http does not allow, and a file of `tls`. Each with its
    /// key, its origin and the reason.
    pub(super) fn problems(&self, policy: transport::Policy) -> Vec<(&'static str, Origin, String)> {
        let Config { control_plane_url, grpc_url, tls, .. } = &self.config;
        let mut problems = Vec::new();
        for (key, url) in [("control_plane_url", control_plane_url), ("grpc_url", grpc_url)] {
            // `grpc_url` has no row if it is not set.
            let Some(origin) = self.origin(key) else { continue };
            match policy.check(url) {
                Err(err) => problems.push((key, origin, err.to_string())),
                Ok(()) if tls.is_some() && url.scheme() == "http" => {
                    let what =
                        "is a plain http URL, which does not use the settings of tls; use https, or disable them";
                    problems.push((key, origin, what.to_owned()));
                }
                Ok(()) => {}
            }
        }
        if let Some(Err(error)) = tls.as_ref().map(PeerTls::check) {
            let key = match error {
                PeerTlsError::Certificate(_) | PeerTlsError::Expired { .. } => CERTIFICATE,
                PeerTlsError::Key(_) => KEY,
                PeerTlsError::Authorities(_) => CA,
            };
            problems.push((key, self.origin(key).unwrap_or(Origin::Unset), error.to_string()));
        }
        problems
    }

    fn origin(&self, key: &str) -> Option<Origin> {
        self.rows.iter().find(|(given, _, _)| given == key).map(|(_, _, origin)| *origin)
    }

    /// Paths in a file are relative to its folder.
    pub(super) fn make_relative_to(&mut self, folder: &Path) {
        let Some(PeerTls { identity, authorities, .. }) = &mut self.config.tls else { return };
        let (certificate, key) = identity.as_mut().map(|files| (&mut files.certificate, &mut files.key)).unzip();
        for (name, path) in [(CERTIFICATE, certificate), (KEY, key), (CA, authorities.as_mut())] {
            let row = self.rows.iter_mut().find(|(given, _, _)| given == name);
            if let (Some(path), Some((_, shown, Origin::File { .. }))) = (path, row) {
                *path = folder.join(&*path);
                *shown = path.to_string_lossy().into_owned();
            }
        }
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
        tls: None,
    };
    let (mut url, mut grpc, mut tls) = (None, None, Tls::default());
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
            ("tls", Some(part)) => reader.tls(setting, part, &mut tls),
            ("capacity" | "metadata" | "agent_map" | "tls", None) => {
                reader.mistake(setting, format_args!("expected a table, found {}", setting.value.describe()));
            }
            _ => reader.unknown(setting, &setting.key, &KEYS),
        }
    }
    config.tls = reader.end_tls(&config.name, form, origin, tls);
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

/// The settings of `tls`.
#[derive(Default)]
struct Tls {
    /// Without this setting, it is enabled by any other one of our own form.
    enabled: Option<bool>,
    is_given: bool,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    ca: Option<PathBuf>,
    common_name: Option<String>,
    any_host: bool,
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

    fn switch(&mut self, setting: &Setting) -> Option<bool> {
        let found = match &setting.value {
            Value::Switch(on) => Some(*on),
            Value::Text(text) if !setting.typed && text.trim().eq_ignore_ascii_case("true") => Some(true),
            Value::Text(text) if !setting.typed && text.trim().eq_ignore_ascii_case("false") => Some(false),
            _ => None,
        };
        match found {
            Some(on) => self.row(setting, &on.to_string()),
            None => self.mistake(setting, format_args!("expected true or false, found {}", setting.value.describe())),
        }
        found
    }

    /// The text of a path. Blank is unset.
    fn path(&mut self, setting: &Setting) -> Option<PathBuf> {
        let text = self.text(setting)?;
        Some(PathBuf::from(text.trim())).filter(|path| !path.as_os_str().is_empty())
    }

    fn tls(&mut self, setting: &Setting, part: &str, tls: &mut Tls) {
        tls.is_given |= setting.typed;
        match part {
            "enabled" => tls.enabled = self.switch(setting),
            "client_certificate" => tls.certificate = self.path(setting),
            "client_key" => tls.key = self.path(setting),
            "ca" => tls.ca = self.path(setting),
            "common_name" => tls.common_name = self.text(setting).filter(|name| !name.trim().is_empty()),
            "check_host" => tls.any_host = self.switch(setting) == Some(false),
            _ => self.unknown(setting, part, &TLS),
        }
    }

    /// `None` if TLS has no settings of its own, or after a mistake.
    fn end_tls(&mut self, plane: &PlaneName, form: Form, origin: Origin, tls: Tls) -> Option<PeerTls> {
        let Tls { enabled, is_given, certificate, key, ca, common_name, any_host } = tls;
        if !enabled.unwrap_or(is_given) {
            return None;
        }
        let mut missing = |key: &str, what: &str| {
            let place = form.place(plane, key);
            self.mistakes.push(Problem { origin, place, what: format!("is not set; {what}") });
        };
        // The other form has no TLS settings without a client certificate.
        let needs_identity = !matches!(form, Form::Table);
        let identity = match (certificate, key) {
            (Some(certificate), Some(key)) => Some(Identity { certificate, key }),
            (None, None) if !needs_identity => None,
            (certificate, key) => {
                if certificate.is_none() {
                    missing(CERTIFICATE, "give the PEM file of the client certificate");
                }
                if key.is_none() {
                    missing(KEY, "give the PEM file of the private key of the client certificate");
                }
                None
            }
        };
        if any_host && ca.is_none() {
            missing(CA, "a node that does not check the host trusts one authority only; give its PEM file");
        }
        Some(PeerTls { identity, authorities: ca, common_name, any_host })
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
