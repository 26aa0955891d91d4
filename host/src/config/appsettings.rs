//! The settings of a Node Runtime control plane in the form of .NET: a file with a section `NodeRuntime`, such as
//! `appsettings.json`, and environment variables such as `NodeRuntime__NodeId`.
//!
//! A colon separates the parts of a name, in a variable two underscores do. The case of letters has no meaning. Values
//! have no types: `"5"` is a number too. Both forms become the [`Setting`]s of a table `[plane.NAME]`.

use std::ffi::OsString;

use super::{
    file::{Members, Problem, Setting, Value},
    keys::KEYS,
    layers::Origin,
};
use crate::model::{PlaneName, nearest};

/// The name of the control plane that has no table `[plane.NAME]`.
pub(super) const PLANE: &str = "node-runtime";

/// The section of the control plane.
const SECTION: &str = "NodeRuntime";

/// The keys of a table `[plane.NAME]` and their names in this form. A name with a colon at its end is a free map.
const NAMES: [(&str, &str); 19] = [
    ("control_plane_url", "NodeRuntime:ControlPlaneUrl"),
    ("grpc_url", "NodeRuntime:GrpcUrl"),
    ("node_id", "NodeRuntime:NodeId"),
    ("max_concurrent_leases", "NodeRuntime:MaxConcurrentLeases"),
    ("heartbeat_interval_seconds", "NodeRuntime:HeartbeatIntervalSeconds"),
    ("capacity", "NodeRuntime:Capacity"),
    ("capacity.slots", "NodeRuntime:Capacity:Slots"),
    ("capacity.cpu", "NodeRuntime:Capacity:Cpu"),
    ("capacity.memory", "NodeRuntime:Capacity:Memory"),
    ("metadata", "NodeRuntime:Metadata"),
    ("metadata.", "NodeRuntime:Metadata:"),
    ("agent_map", "NodeRuntime:AgentMap"),
    ("agent_map.", "NodeRuntime:AgentMap:"),
    ("tls.enabled", "MTls:Enabled"),
    ("tls.client_certificate", "MTls:ClientCertificatePath"),
    ("tls.client_key", "MTls:ClientKeyPath"),
    ("tls.ca", "MTls:ServerCaCertificatePath"),
    ("tls.common_name", "MTls:ExpectedServerCertificateSubject"),
    ("tls.check_host", "MTls:ValidateCertificateChain"),
];

/// Names with an effect of their own.
const LOG_DEFAULT: &str = "Logging:LogLevel:Default";
const LOG_GRPC: &str = "Logging:LogLevel:Grpc";
const MTLS: &str = "MTls";

/// The code that `Logging:LogLevel:Grpc` is about. Frames are logged without their content.
const GRPC_TARGETS: [&str; 4] = ["runner_host::leases::node_runtime", "runner_host::transport::http2", "tonic", "h2"];

/// The levels of .NET and those of the log.
const LEVELS: [(&str, &str); 7] = [
    ("Trace", "trace"),
    ("Debug", "debug"),
    ("Information", "info"),
    ("Warning", "warn"),
    ("Error", "error"),
    ("Critical", "error"),
    ("None", "off"),
];

/// How the operator wrote the settings of a control plane.
#[derive(Clone, Copy, Debug)]
pub(super) enum Form {
    /// A table `[plane.NAME]`.
    Table,
    /// The section of a file.
    Section,
    /// Environment variables only.
    Variables,
}

impl Form {
    /// The place of a key that was not given.
    pub(super) fn place(self, plane: &PlaneName, key: &str) -> String {
        let name = NAMES.iter().find(|(known, _)| *known == key).map(|(_, name)| *name);
        match (self, name) {
            (Self::Section, Some(name)) => name.to_owned(),
            (Self::Variables, Some(name)) => variable(name),
            _ => format!("plane.{plane}.{key}"),
        }
    }
}

/// A file in this form.
pub(super) struct Appsettings {
    /// The line on which the section begins.
    pub(super) line: usize,
    pub(super) settings: Vec<Setting>,
    /// Names without an effect.
    pub(super) unused: Vec<String>,
    pub(super) mistakes: Vec<Problem>,
}

/// Takes the members that belong to this form out of a file with a section `NodeRuntime`. The tables of our own form
/// stay.
pub(super) fn take(members: &mut Members) -> Option<Appsettings> {
    let line = members.iter().find(|(name, _, _)| is_below(name, SECTION)).map(|(_, line, _)| *line)?;
    let mut found = Appsettings { line, settings: Vec::new(), unused: Vec::new(), mistakes: Vec::new() };
    for (name, line, value) in std::mem::take(members) {
        let own = name == "plane" || KEYS.iter().any(|key| key.file.split('.').next() == Some(&*name));
        if own {
            members.push((name, line, value));
        } else {
            found.add(&name, line, value);
        }
    }
    Some(found)
}

impl Appsettings {
    fn add(&mut self, name: &str, line: usize, value: Value) {
        match value {
            Value::Table(members) => {
                for (part, line, value) in members {
                    self.add(&format!("{name}:{part}"), line, value);
                }
            }
            // As an unset value.
            Value::Null => {}
            value => self.leaf(name, line, value),
        }
    }

    fn leaf(&mut self, name: &str, line: usize, value: Value) {
        let Some(key) = key_of(name) else {
            if name.eq_ignore_ascii_case(SECTION) {
                return self.mistake(name, line, &format!("expected a table, found {}", value.describe()));
            }
            // A foreign section is named as a whole.
            let known = [SECTION, MTLS, "Logging"].iter().any(|section| is_below(name, section));
            let unused = match known {
                true => match nearest(name, NAMES.iter().map(|(_, name)| name.trim_end_matches(':'))) {
                    Some(near) => format!("{name} (did you mean {near}?)"),
                    None => name.to_owned(),
                },
                false => name.split(':').next().unwrap_or(name).to_owned(),
            };
            if !self.unused.contains(&unused) {
                self.unused.push(unused);
            }
            return;
        };
        if self.settings.iter().any(|setting| setting.key.eq_ignore_ascii_case(&key)) {
            return self.mistake(name, line, "is given twice; keep one");
        }
        if !is_unset(&key, &value) {
            let origin = Origin::File { line };
            self.settings.push(Setting { key, place: name.to_owned(), origin, value, typed: false });
        }
    }

    fn mistake(&mut self, name: &str, line: usize, what: &str) {
        let (origin, place) = (Origin::File { line }, name.to_owned());
        self.mistakes.push(Problem { origin, place, what: what.to_owned() });
    }
}

/// The settings in environment variables. They have priority over a file.
#[derive(Clone, Default)]
pub(super) struct Variables {
    settings: Vec<Setting>,
    /// Names that look like settings.
    pub(super) warnings: Vec<String>,
    pub(super) mistakes: Vec<String>,
}

impl Variables {
    pub(super) fn read(variables: impl Iterator<Item = (OsString, OsString)>) -> Self {
        let mut found = Self::default();
        let mut variables: Vec<_> =
            variables.filter_map(|(name, value)| Some((name.into_string().ok()?, value))).collect();
        // The environment has no order, and messages name the first one.
        variables.sort();
        for (name, value) in variables {
            if is_variable(&name) {
                found.add(name, value);
            }
        }
        found
    }

    fn add(&mut self, name: String, value: OsString) {
        let path = name.replace("__", ":");
        let Some(key) = key_of(&path) else {
            if is_variable(&name) {
                let known: Vec<String> = NAMES.iter().map(|(_, name)| variable(name)).collect();
                let near = nearest(&name, known.iter().map(String::as_str));
                let near = near.map_or_else(String::new, |near| format!(", did you mean {near}?"));
                self.warnings.push(format!("environment variable {name} is not a setting and has no effect{near}"));
            }
            return;
        };
        let Some(value) = value.to_str() else {
            return self.mistakes.push(format!("{name}: expected UTF-8, found other bytes"));
        };
        if value.trim().is_empty() {
            return;
        }
        if let Some(other) = self.settings.iter().find(|other| other.key.eq_ignore_ascii_case(&key)) {
            return self.mistakes.push(format!("{name}: is the same setting as {}; keep one", other.place));
        }
        let value = Value::Text(value.to_owned());
        self.settings.push(Setting { key, place: name, origin: Origin::Environment, value, typed: false });
    }

    /// The first variable of a control plane.
    pub(super) fn first(&self) -> Option<&str> {
        let of_section = |setting: &&Setting| is_below(&setting.place.replace("__", ":"), SECTION);
        self.settings.iter().find(of_section).map(|setting| &*setting.place)
    }

    /// Whether the variables name a control plane by themselves.
    pub(super) fn name_a_plane(&self) -> bool {
        self.settings.iter().any(|setting| setting.key == "control_plane_url")
    }

    /// Replaces the settings of a file.
    pub(super) fn replace(&self, settings: &mut Vec<Setting>) {
        for variable in &self.settings {
            let same = |setting: &Setting| setting.key.eq_ignore_ascii_case(&variable.key);
            let at = settings.iter().position(same).unwrap_or(settings.len());
            // The spelling of a free key in the file stays.
            let key = settings.get(at).map_or(&variable.key, |setting| &setting.key).clone();
            settings.retain(|setting| !same(setting));
            settings.insert(at, Setting { key, ..variable.clone() });
        }
    }
}

/// Whether an environment variable belongs to this form.
pub(super) fn is_variable(name: &str) -> bool {
    let path = name.replace("__", ":");
    path.contains(':') && (is_below(&path, SECTION) || is_below(&path, MTLS) || is_log_level(&path))
}

/// Takes the log levels out of the settings. Returns the filter for the log, and the origin of its last part.
///
/// # Errors
/// A level that does not exist.
pub(super) fn log_filter(settings: &mut Vec<Setting>) -> Result<Option<(String, Origin)>, Problem> {
    let mut levels = [None, None];
    let mut last = None;
    for setting in settings.extract_if(.., |setting| is_log_level(&setting.key)) {
        let level = match &setting.value {
            Value::Text(text) => LEVELS.iter().find(|(name, _)| name.eq_ignore_ascii_case(text.trim())),
            _ => None,
        };
        let Some((_, level)) = level else {
            let names = LEVELS.map(|(name, _)| name).join(", ");
            let what = format!("expected one of {names}, found {}", setting.value.describe());
            return Err(Problem { origin: setting.origin, place: setting.place, what });
        };
        levels[usize::from(setting.key == LOG_GRPC)] = Some(*level);
        last = Some(setting.origin);
    }
    let [default, grpc] = levels;
    let mut filter = default.unwrap_or("info").to_owned();
    if let Some(level) = grpc {
        // A frame at trace would be logged with its headers.
        let frames = if level == "trace" { "debug" } else { level };
        for target in GRPC_TARGETS {
            let level = if target.starts_with("runner_host") { level } else { frames };
            filter.push_str(&format!(",{target}={level}"));
        }
    }
    Ok(last.map(|origin| (filter, origin)))
}

/// The key of a setting with this name.
fn key_of(name: &str) -> Option<String> {
    for (key, known) in NAMES {
        let Some(rest) = strip_prefix(name, known) else { continue };
        match known.ends_with(':') {
            true if !rest.is_empty() && !rest.contains(':') => return Some(format!("{key}{rest}")),
            false if rest.is_empty() => return Some(key.to_owned()),
            _ => {}
        }
    }
    [LOG_DEFAULT, LOG_GRPC].into_iter().find(|level| name.eq_ignore_ascii_case(level)).map(str::to_owned)
}

fn is_log_level(name: &str) -> bool {
    [LOG_DEFAULT, LOG_GRPC].iter().any(|level| name.eq_ignore_ascii_case(level))
}

/// Whether a name is that of a section, or of one of its members.
fn is_below(name: &str, section: &str) -> bool {
    strip_prefix(name, section).is_some_and(|rest| rest.is_empty() || rest.starts_with(':'))
}

fn strip_prefix<'a>(name: &'a str, prefix: &str) -> Option<&'a str> {
    let (start, rest) = name.split_at_checked(prefix.len())?;
    start.eq_ignore_ascii_case(prefix).then_some(rest)
}

/// Blank is unset, but a control plane needs these two, and a property may be blank.
fn is_unset(key: &str, value: &Value) -> bool {
    let keeps_blank = matches!(key, "node_id" | "control_plane_url") || key.starts_with("metadata.");
    matches!(value, Value::Text(text) if text.trim().is_empty() && !keeps_blank)
}

/// The environment variable of a name.
fn variable(name: &str) -> String {
    name.replace(':', "__")
}
