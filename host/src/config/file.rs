//! Reads the configuration file, in TOML or JSON. It may contain the places of [`KEYS`] and tables `[plane.NAME]`.
//!
//! Both forms become a list of entries with their lines. Types are strict: a number in quotes is a mistake. No
//! message repeats a secret. A file with a section `NodeRuntime` has the form of [`super::appsettings`].

use std::{
    collections::BTreeSet,
    io::Read as _,
    path::{Path, PathBuf},
};

use toml::de::{DeTable, DeValue};

#[cfg(feature = "grpc")]
use super::node_runtime::{self, NodeRuntimeTable};
use super::{
    appsettings::{self, Appsettings, Form, Variables},
    json,
    keys::{KEYS, Key, Kind},
    layers::Origin,
};
use crate::{
    engine::SLOTS_MAX,
    model::{PlaneName, nearest},
};

/// Limit of the file size. It is far more than all settings need.
const BYTES_MAX: u64 = 1024 * 1024;

/// The byte order mark. Some editors write it before UTF-8 text.
const BYTE_ORDER_MARK: char = '\u{feff}';

/// The `kind` of a Node Runtime control plane.
const NODE_RUNTIME: &str = "node-runtime";

/// The key for the slots that are kept free for a control plane.
pub(super) const MIN_SLOTS: &str = "min_slots";

/// The tables in a table of this kind.
const INNER_TABLES: [&str; 4] = ["capacity", "metadata", "agent_map", "tls"];

/// The content of one file.
#[derive(Default)]
pub(super) struct Read {
    pub(super) entries: Vec<Entry>,
    pub(super) planes: Vec<PlaneEntry>,
    /// Whether a table `[plane.NAME]` cannot be used.
    pub(super) has_bad_plane: bool,
    /// Whether a control plane has taken the environment variables of its form.
    pub(super) used_variables: bool,
    /// The log levels of a file in the form of .NET, as a filter.
    pub(super) log_filter: Option<(String, Origin)>,
    pub(super) mistakes: Vec<String>,
    pub(super) warnings: Vec<String>,
}

/// One table `[plane.NAME]`.
#[derive(Clone, Debug)]
pub(super) struct PlaneEntry {
    pub(super) name: PlaneName,
    /// Where it begins.
    pub(super) origin: Origin,
    /// The line of its `kind`.
    pub(super) kind_line: usize,
    pub(super) kind: PlaneKind,
    /// The slots that are kept free for this control plane, and the line of this number.
    pub(super) min_slots: Option<(usize, usize)>,
}

impl PlaneEntry {
    /// Why one node cannot serve both control planes.
    pub(super) fn conflict_with(&self, earlier: &Self) -> Option<String> {
        if self.name == earlier.name {
            return Some("is given twice; keep one".to_owned());
        }
        match (&self.kind, &earlier.kind) {
            (PlaneKind::Posemesh, PlaneKind::Posemesh) => Some(format!(
                "a node serves one control plane of kind \"posemesh\", found {} too; keep one",
                earlier.name
            )),
            #[cfg(feature = "grpc")]
            (PlaneKind::NodeRuntime(one), PlaneKind::NodeRuntime(other)) => {
                let (one, other) = (&one.config, &other.config);
                let same = one.node_id == other.node_id && one.control_plane_url == other.control_plane_url;
                same.then(|| format!("has the control_plane_url and the node_id of {}; keep one", earlier.name))
            }
            _ => None,
        }
    }
}

/// A kind of control plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum PlaneKind {
    /// The posemesh services. Their settings are those of the other tables.
    Posemesh,
    /// A folder of job files, as it is written in the file.
    Local { folder: PathBuf, line: usize },
    /// A Node Runtime control plane.
    #[cfg(feature = "grpc")]
    NodeRuntime(Box<NodeRuntimeTable>),
}

/// One setting in a file.
pub(super) struct Entry {
    pub(super) key: &'static Key,
    /// Counted from 1.
    pub(super) line: usize,
    pub(super) text: String,
}

/// One setting of a Node Runtime control plane.
#[derive(Clone)]
pub(super) struct Setting {
    /// Its key in a table `[plane.NAME]`. A dot follows the name of an inner table.
    pub(super) key: String,
    /// Its name as the operator wrote it.
    pub(super) place: String,
    pub(super) origin: Origin,
    pub(super) value: Value,
    /// Whether a number in quotes is a text.
    #[cfg_attr(not(feature = "grpc"), expect(dead_code, reason = "only the control plane reads it"))]
    pub(super) typed: bool,
}

/// A mistake in such a setting.
#[derive(Debug)]
pub(super) struct Problem {
    pub(super) origin: Origin,
    pub(super) place: String,
    pub(super) what: String,
}

impl Problem {
    /// A mistake outside the file.
    pub(super) fn line(&self) -> String {
        format!("{}: {}", self.place, self.what)
    }
}

/// A value of either form.
#[derive(Clone)]
pub(super) enum Value {
    Text(String),
    Whole(String),
    Number(String),
    Switch(bool),
    List(Vec<Value>),
    Null,
    Date,
    Table(Members),
}

/// A table's keys in the file's order, each with its line.
pub(super) type Members = Vec<(String, usize, Value)>;

/// Reads a file whole. The variables have priority over the settings of a Node Runtime control plane in it.
///
/// # Errors
/// One line when the file cannot be read, or has neither form.
pub(super) fn read(path: &Path, variables: &Variables) -> Result<Read, String> {
    let text = read_text(path, BYTES_MAX).map_err(|problem| format!("--config {problem}"))?;
    // Some editors write it before UTF-8 text.
    let text = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&text);
    let is_json = match path.extension().and_then(|extension| extension.to_str()) {
        Some("json") => true,
        Some("toml") => false,
        _ => text.trim_start().starts_with(['{', '/']),
    };
    let members = if is_json { json::members(text) } else { toml(text) };
    let mut members = members.map_err(|(line, problem)| format!("{}:{line}: {problem}", path.display()))?;
    let appsettings = appsettings::take(&mut members);
    let taker = taker(appsettings.is_some(), &members);
    let mut found = Walk { path, seen: BTreeSet::new(), variables, taker, read: Read::default() };
    if let Some(appsettings) = appsettings {
        found.appsettings(appsettings);
    }
    found.table("", members);
    Ok(found.read)
}

/// The control plane that takes the environment variables: the one in the form of .NET, the only one of this kind, or
/// the one that is named so.
fn taker(is_appsettings: bool, members: &Members) -> Option<String> {
    let named = || Some(appsettings::PLANE.to_owned());
    if is_appsettings {
        return named();
    }
    let planes = members.iter().filter(|(name, _, _)| name == "plane").filter_map(|(_, _, value)| match value {
        Value::Table(planes) => Some(planes),
        _ => None,
    });
    let of_kind = planes.flatten().filter(|(_, _, value)| {
        let Value::Table(members) = value else { return false };
        kind(members).is_some_and(|(kind, _)| kind == NODE_RUNTIME)
    });
    let names: Vec<&String> = of_kind.map(|(name, _, _)| name).collect();
    match names[..] {
        [] => None,
        [only] => Some(only.clone()),
        _ => named(),
    }
}

/// The kind of a control plane and its line.
fn kind(members: &Members) -> Option<(&str, usize)> {
    members.iter().find_map(|(key, line, value)| match value {
        Value::Text(text) if key == "kind" => Some((text.as_str(), *line)),
        _ => None,
    })
}

/// The settings of a table `[plane.NAME]`.
fn settings(place: &str, members: Members) -> Vec<Setting> {
    let mut found = Vec::new();
    let mut add = |key: String, line, value| {
        let place = format!("{place}.{key}");
        found.push(Setting { key, place, origin: Origin::File { line }, value, typed: true });
    };
    for (key, line, value) in members {
        match value {
            Value::Table(inner) if INNER_TABLES.contains(&&*key) => {
                for (part, line, value) in inner {
                    add(format!("{key}.{part}"), line, value);
                }
            }
            value => add(key, line, value),
        }
    }
    found
}

/// A Node Runtime control plane with these settings.
#[cfg(feature = "grpc")]
pub(super) fn node_runtime(
    name: &PlaneName,
    form: Form,
    origin: Origin,
    settings: Vec<Setting>,
) -> Result<PlaneKind, Vec<Problem>> {
    let table = node_runtime::read(name.clone(), form, origin, settings)?;
    Ok(PlaneKind::NodeRuntime(Box::new(table)))
}

/// This binary has no such control plane.
#[cfg(not(feature = "grpc"))]
pub(super) fn node_runtime(
    name: &PlaneName,
    form: Form,
    origin: Origin,
    _: Vec<Setting>,
) -> Result<PlaneKind, Vec<Problem>> {
    let what = "this binary was built without gRPC, which \"node-runtime\" needs; build it with the feature grpc";
    Err(vec![Problem { origin, place: form.place(name, "control_plane_url"), what: what.to_owned() }])
}

/// Reads a text file of at most `most` bytes. A mistake is one line that names the file.
pub(super) fn read_text(path: &Path, most: u64) -> Result<String, String> {
    let fail = |problem: &str| Err(format!("{}: {problem}", path.display()));
    let opened = std::fs::File::open(path).and_then(|file| Ok((file.metadata()?, file)));
    let (facts, file) = match opened {
        Ok(opened) => opened,
        Err(err) => return fail(&err.to_string()),
    };
    if facts.is_dir() {
        return fail("expected a file, found a folder");
    }
    let mut bytes = Vec::new();
    if let Err(err) = file.take(most + 1).read_to_end(&mut bytes) {
        return fail(&err.to_string());
    }
    if bytes.len() as u64 > most {
        return fail(&format!("expected at most {most} bytes, found more"));
    }
    String::from_utf8(bytes).or_else(|_| fail("expected UTF-8 text, found other bytes"))
}

/// Whether other users of this machine may read the file.
pub(super) fn others_can_read(path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt as _;
        std::fs::metadata(path).is_ok_and(|facts| facts.mode() & 0o044 != 0)
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        false
    }
}

/// Reads the tables of a file.
struct Walk<'a> {
    path: &'a Path,
    seen: BTreeSet<&'static str>,
    variables: &'a Variables,
    /// The control plane that takes the variables.
    taker: Option<String>,
    read: Read,
}

impl Walk<'_> {
    fn mistake(&mut self, line: usize, place: &str, what: &str) {
        self.read.mistakes.push(format!("{}:{line}: {place}: {what}", self.path.display()));
    }

    fn table(&mut self, prefix: &str, members: Members) {
        for (name, line, value) in members {
            if prefix.is_empty() && name == "plane" {
                self.planes(line, value);
                continue;
            }
            let place = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
            if let Some(key) = KEYS.iter().find(|key| key.file == place) {
                self.leaf(key, line, value);
                continue;
            }
            let is_table =
                KEYS.iter().any(|key| key.file.strip_prefix(&place).is_some_and(|rest| rest.starts_with('.')));
            match value {
                Value::Table(members) if is_table => self.table(&place, members),
                value if is_table => {
                    self.mistake(line, &place, &format!("expected a table, found {}", value.describe()));
                }
                _ => self.mistake(line, &place, &format!("there is no such key{}", suggestion(&place))),
            }
        }
    }

    /// Reads the tables `[plane.NAME]`.
    fn planes(&mut self, line: usize, value: Value) {
        let Value::Table(planes) = value else {
            self.read.has_bad_plane = true;
            return self.mistake(line, "plane", "expected a table for each control plane, such as [plane.jobs]");
        };
        for (name, line, value) in planes {
            match self.plane(line, &name, value) {
                Some(plane) => self.read.planes.push(plane),
                None => self.read.has_bad_plane = true,
            }
        }
    }

    fn plane(&mut self, line: usize, name: &str, value: Value) -> Option<PlaneEntry> {
        let place = &format!("plane.{name}");
        let name = match PlaneName::parse(name) {
            Ok(name) => name,
            Err(err) => {
                self.mistake(line, place, &err.to_string());
                return None;
            }
        };
        let Value::Table(mut members) = value else {
            self.mistake(line, place, &format!("expected a table, found {}", value.describe()));
            return None;
        };
        let min_slots = self.min_slots(place, &mut members);
        let origin = Origin::File { line };
        let entry = |name, kind_line, kind| PlaneEntry { name, origin, kind_line, kind, min_slots };
        if let Some((NODE_RUNTIME, kind_line)) = kind(&members) {
            let settings = settings(place, members);
            let kind = self.node_runtime(&name, Form::Table, line, settings)?;
            return Some(entry(name, kind_line, kind));
        }
        let (mut kind, mut folder) = (None, None);
        for (key, line, value) in members {
            match (key.as_str(), value) {
                ("kind", Value::Text(text)) => kind = Some((line, text)),
                ("folder", Value::Text(text)) => folder = Some((line, text)),
                ("kind" | "folder", other) => {
                    let found = other.describe();
                    self.mistake(line, &format!("{place}.{key}"), &format!("expected a text in quotes, found {found}"));
                    return None;
                }
                _ => {
                    self.mistake(
                        line,
                        &format!("{place}.{key}"),
                        "there is no such key; there are kind, folder and min_slots",
                    );
                    return None;
                }
            }
        }
        match (kind, folder) {
            (None, _) => {
                self.mistake(line, place, "has no kind; expected kind = \"posemesh\", \"local\" or \"node-runtime\"")
            }
            (Some((kind_line, kind)), None) if kind == "posemesh" => {
                return Some(entry(name, kind_line, PlaneKind::Posemesh));
            }
            (Some((_, kind)), Some((line, _))) if kind == "posemesh" => {
                self.mistake(line, &format!("{place}.folder"), "a posemesh plane has no folder; remove this key");
            }
            (Some((kind_line, kind)), Some((folder_line, folder))) if kind == "local" && !folder.trim().is_empty() => {
                let kind = PlaneKind::Local { folder: PathBuf::from(folder.trim()), line: folder_line };
                return Some(entry(name, kind_line, kind));
            }
            (Some((line, kind)), _) if kind == "local" => {
                self.mistake(
                    line,
                    place,
                    "has no folder; give the folder of the jobs, such as folder = \"/var/spool/jobs\"",
                );
            }
            (Some((line, kind)), _) => {
                self.mistake(
                    line,
                    &format!("{place}.kind"),
                    &format!("expected \"posemesh\", \"local\" or \"node-runtime\", found {kind:?}"),
                );
            }
        }
        None
    }

    /// Takes the slots that are kept free for a control plane from its table. Every kind has this key.
    fn min_slots(&mut self, place: &str, members: &mut Members) -> Option<(usize, usize)> {
        let at = members.iter().position(|(key, _, _)| key == MIN_SLOTS)?;
        let (_, line, value) = members.remove(at);
        let found = value.describe();
        if let Value::Whole(text) = value
            && let Some(slots) = text.parse().ok().filter(|slots| *slots <= SLOTS_MAX)
        {
            return Some((slots, line));
        }
        let what = format!("expected a whole number from 0 to {SLOTS_MAX}, found {found}");
        self.mistake(line, &format!("{place}.{MIN_SLOTS}"), &what);
        None
    }

    /// A Node Runtime control plane that begins on `line`.
    fn node_runtime(
        &mut self,
        name: &PlaneName,
        form: Form,
        line: usize,
        mut settings: Vec<Setting>,
    ) -> Option<PlaneKind> {
        if self.taker.as_deref() == Some(name.as_str()) {
            self.variables.replace(&mut settings);
            self.read.used_variables = true;
        }
        match appsettings::log_filter(&mut settings) {
            Ok(filter) => self.read.log_filter = filter.or(self.read.log_filter.take()),
            Err(problem) => self.problem(problem),
        }
        let read = node_runtime(name, form, Origin::File { line }, settings);
        read.map_err(|problems| problems.into_iter().for_each(|problem| self.problem(problem))).ok()
    }

    fn problem(&mut self, problem: Problem) {
        match problem.origin {
            Origin::File { line } => self.mistake(line, &problem.place, &problem.what),
            _ => self.read.mistakes.push(problem.line()),
        }
    }

    /// A file in the form of .NET. It names one control plane.
    fn appsettings(&mut self, found: Appsettings) {
        let Appsettings { line, settings, unused, mistakes } = found;
        self.read.has_bad_plane = !mistakes.is_empty();
        // Without its section, every setting would be reported as missing.
        let is_unusable = settings.is_empty() && !mistakes.is_empty();
        mistakes.into_iter().for_each(|mistake| self.problem(mistake));
        if !unused.is_empty() {
            let (path, unused) = (self.path.display(), unused.join(", "));
            let warning = format!(
                "{path}: {unused} have no effect in this node; remove them unless another program reads this file"
            );
            self.read.warnings.push(warning);
        }
        if is_unusable {
            return;
        }
        let name = PlaneName::parse(appsettings::PLANE).expect("a constant name");
        match self.node_runtime(&name, Form::Section, line, settings) {
            Some(kind) => {
                let origin = Origin::File { line };
                self.read.planes.push(PlaneEntry { name, origin, kind_line: line, kind, min_slots: None });
            }
            None => self.read.has_bad_plane = true,
        }
    }

    fn leaf(&mut self, key: &'static Key, line: usize, value: Value) {
        if !self.seen.insert(key.file) {
            return self.mistake(line, key.file, "is given twice; keep one");
        }
        let found = if key.is_secret() { value.kind().to_owned() } else { value.describe() };
        let text = match (key.kind, value) {
            (_, Value::Null) => return,
            (Kind::Whole | Kind::Number | Kind::Size, Value::Whole(text)) | (Kind::Number, Value::Number(text)) => {
                Some(text)
            }
            (Kind::Switch, Value::Switch(on)) => Some(on.to_string()),
            (Kind::List, Value::List(words)) => {
                words.into_iter().map(Value::into_text).collect::<Option<Vec<_>>>().map(|words| words.join(","))
            }
            (Kind::Whole | Kind::Number | Kind::Switch, _) => None,
            (_, Value::Text(text)) => Some(text),
            _ => None,
        };
        match text {
            Some(text) => self.read.entries.push(Entry { key, line, text }),
            None => self.mistake(line, key.file, &format!("expected {}, found {found}", expected(key.kind))),
        }
    }
}

fn expected(kind: Kind) -> &'static str {
    match kind {
        Kind::Whole => "a whole number",
        Kind::Number => "a number",
        Kind::Switch => "true or false",
        Kind::Size => "a number of bytes, or a size in quotes, such as \"1GiB\"",
        Kind::Duration => "a duration in quotes, such as \"30s\"",
        Kind::List => "an array of texts",
        Kind::Secret | Kind::Text | Kind::Url | Kind::Proxy | Kind::Address | Kind::Path => "a text in quotes",
    }
}

/// The key that was probably meant: the same name in another table, a similar key, or the key of a similar variable.
fn suggestion(place: &str) -> String {
    let last = |text: &str| text.rsplit('.').next().unwrap_or_default().to_owned();
    let keys = || KEYS.iter().filter(|key| !key.weakens_security());
    let moved = keys().find(|key| last(place) == last(key.file)).map(|key| key.file);
    let near = moved.or_else(|| nearest(place, keys().map(|key| key.file)));
    let near = near.or_else(|| nearest(place, Key::suggested_names()).and_then(Key::find).map(|key| key.file));
    near.map_or_else(String::new, |near| format!(", did you mean {near}?"))
}

impl Value {
    fn into_text(self) -> Option<String> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    /// The kind of the value.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) => "a text",
            Self::Whole(_) | Self::Number(_) => "a number",
            Self::Switch(_) => "true or false",
            Self::List(_) => "an array",
            Self::Null => "nothing",
            Self::Date => "a date",
            Self::Table(_) => "a table",
        }
    }

    /// The kind and the value.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Text(text) => format!("{text:?}"),
            Self::Whole(text) | Self::Number(text) => text.clone(),
            Self::Switch(on) => on.to_string(),
            _ => self.kind().to_owned(),
        }
    }
}

pub(super) fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes()[..at.min(text.len())].iter().filter(|byte| **byte == b'\n').count() + 1
}

fn toml(text: &str) -> Result<Members, (usize, String)> {
    let table = DeTable::parse(text).map_err(|err| {
        let at = err.span().map_or(0, |span| span.start);
        (line_of(text, at), err.message().replace('\n', ", "))
    })?;
    Ok(toml_table(text, table.into_inner()))
}

fn toml_table(text: &str, table: DeTable<'_>) -> Members {
    let members = table.into_iter().map(|(name, value)| {
        let line = line_of(text, name.span().start);
        (name.into_inner().into_owned(), line, toml_value(text, value.into_inner()))
    });
    let mut members: Vec<_> = members.collect();
    members.sort_by_key(|(_, line, _)| *line);
    members
}

fn toml_value(text: &str, value: DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::Text(text.into_owned()),
        DeValue::Integer(number) => match i128::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => Value::Whole(number.to_string()),
            Err(_) => Value::Number(number.to_string()),
        },
        DeValue::Float(number) => Value::Number(number.to_string()),
        DeValue::Boolean(on) => Value::Switch(on),
        DeValue::Datetime(_) => Value::Date,
        DeValue::Array(items) => {
            Value::List(items.into_iter().map(|item| toml_value(text, item.into_inner())).collect())
        }
        DeValue::Table(table) => Value::Table(toml_table(text, table)),
    }
}
