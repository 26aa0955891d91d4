//! The layers of values. Flags have priority over the environment, then the file, then defaults.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use secrecy::SecretString;

use super::{
    Mistakes,
    appsettings::{self, Form, Variables},
    file::{self, Entry, MIN_SLOTS, PlaneEntry, PlaneKind},
    keys::{KEYS, Key, Kind},
};
use crate::{
    leases::dms,
    model::{PlaneName, nearest},
};

/// The origin of a value. A later variant has priority over an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// Nowhere: there is no value.
    Unset,
    /// The built-in default.
    Default,
    /// The configuration file.
    File {
        /// Counted from 1.
        line: usize,
    },
    /// An environment variable.
    Environment,
    /// Chosen by the command, such as `dev` for its own node.
    Command,
    /// A command-line flag.
    Flag,
}

/// Raw values by name, each with its origin. Blank is unset.
#[derive(Clone, Default)]
pub struct Layers {
    values: BTreeMap<&'static str, (String, Origin)>,
    /// Secrets in the file, with their lines.
    secrets: BTreeMap<&'static str, (SecretString, usize)>,
    file: Option<PathBuf>,
    /// The control planes that the file names.
    planes: Vec<PlaneEntry>,
    /// Whether a control plane in the file cannot be used.
    has_bad_plane: bool,
    /// The environment variables of a Node Runtime control plane.
    variables: Variables,
    /// Whether a control plane in the file has taken them.
    used_variables: bool,
    /// Mistakes in single values that are already known. They are reported with all others.
    pub(super) mistakes: Vec<String>,
    /// Settings that work but should be changed.
    pub(super) warnings: Vec<String>,
}

impl Layers {
    /// The values of the environment, without secrets.
    #[must_use]
    pub fn from_environment() -> Self {
        let mut layers = Self::default();
        for key in KEYS.iter().filter(|key| !key.is_secret()) {
            for name in [Some(key.name.to_owned()), key.lower_case()].into_iter().flatten() {
                let Some(value) = std::env::var_os(&name) else { continue };
                match value.to_str() {
                    Some(value) => layers.set_below(key, value, Origin::Environment),
                    None => layers.mistakes.push(format!("{name}: expected UTF-8, found other bytes")),
                }
            }
        }
        layers.warnings.extend(std::env::vars_os().filter_map(|(name, _)| near_miss(name.to_str()?)));
        layers.variables = Variables::read(std::env::vars_os());
        layers
    }

    /// Adds a configuration file below the values that are already set. Mistakes in single values are kept for
    /// [`HostConfig::build`](super::HostConfig::build), which reports all of them at once.
    ///
    /// # Errors
    /// One line when the file as a whole cannot be used.
    pub fn read_file(&mut self, path: &Path) -> Result<(), Mistakes> {
        let read = file::read(path, &self.variables).map_err(|problem| Mistakes(vec![problem]))?;
        self.file = Some(path.to_owned());
        self.mistakes.extend(read.mistakes);
        self.warnings.extend(read.warnings);
        self.used_variables = read.used_variables;
        self.has_bad_plane = read.has_bad_plane;
        self.planes.clear();
        read.planes.into_iter().for_each(|plane| self.add_plane(plane));
        // A path in a file is relative to the folder of the file.
        let folder = path.parent().unwrap_or(Path::new(""));
        for plane in &mut self.planes {
            match &mut plane.kind {
                PlaneKind::Posemesh => {}
                PlaneKind::Local { folder: jobs, .. } => *jobs = folder.join(&*jobs),
                #[cfg(feature = "grpc")]
                PlaneKind::NodeRuntime(table) => table.make_relative_to(folder),
            }
        }
        for Entry { key, line, text } in read.entries {
            match key.kind {
                Kind::Secret if text.trim().is_empty() => {}
                Kind::Secret => {
                    self.secrets.insert(key.name, (SecretString::from(text), line));
                }
                Kind::Path if !text.trim().is_empty() => {
                    self.set_below(key, &folder.join(text.trim()).to_string_lossy(), Origin::File { line });
                }
                _ => self.set_below(key, &text, Origin::File { line }),
            }
        }
        if !self.secrets.is_empty() && file::others_can_read(path) {
            let path = path.display();
            self.warnings.push(format!("{path} holds a secret and can be read by others; chmod 600 {path}"));
        }
        if let Some((filter, origin)) = read.log_filter {
            self.set_log_filter(&filter, origin);
        }
        Ok(())
    }

    /// Ends the choice of control planes, after [`Layers::read_file`]: adds the one that only environment variables such
    /// as `NodeRuntime__NodeId` name.
    pub fn end_planes(&mut self) {
        self.add_plane_of_environment();
        if !self.needs_posemesh() && !self.has_bad_plane && self.text("DMS_BASE_URL").is_some() {
            let what =
                "has no effect: no control plane has kind = \"posemesh\"; add a table [plane.posemesh] to serve it too";
            self.warnings.push(format!("DMS_BASE_URL {what}"));
        }
    }

    /// Drops the control planes that the file names, after [`Layers::read_file`]: the node of `dev` serves its dev server
    /// only.
    pub fn ignore_planes(&mut self) {
        for plane in std::mem::take(&mut self.planes) {
            let place = self.describe(plane.origin);
            let what = "has no effect: the node of dev serves its dev server only; use run for other control planes";
            self.warnings.push(format!("{place}: control plane {} {what}", plane.name));
        }
    }

    fn add_plane_of_environment(&mut self) {
        let Variables { warnings, mistakes, .. } = &self.variables;
        self.warnings.extend_from_slice(warnings);
        self.mistakes.extend_from_slice(mistakes);
        let Some(first) = self.variables.first().filter(|_| !self.used_variables) else { return };
        if !self.variables.name_a_plane() {
            let what = "has no effect: there is no Node Runtime control plane; set NodeRuntime__ControlPlaneUrl too";
            return self.warnings.push(format!("environment variable {first} {what}"));
        }
        let mut settings = Vec::new();
        self.variables.replace(&mut settings);
        match appsettings::log_filter(&mut settings) {
            Ok(Some((filter, origin))) => self.set_log_filter(&filter, origin),
            Ok(None) => {}
            Err(problem) => self.mistakes.push(problem.line()),
        }
        let name = PlaneName::parse(appsettings::PLANE).expect("a constant name");
        let origin = Origin::Environment;
        match file::node_runtime(&name, Form::Variables, origin, settings) {
            Ok(kind) => self.add_plane(PlaneEntry { name, origin, kind_line: 0, kind, min_slots: None }),
            Err(problems) => {
                self.has_bad_plane = true;
                self.mistakes.extend(problems.iter().map(file::Problem::line));
            }
        }
    }

    fn add_plane(&mut self, plane: PlaneEntry) {
        if let Some(what) = self.planes.iter().find_map(|earlier| plane.conflict_with(earlier)) {
            self.mistakes.push(format!("{}: plane.{}: {what}", self.describe(plane.origin), plane.name));
        }
        self.planes.push(plane);
    }

    /// `RUST_LOG` and `telemetry.log_filter` have priority.
    fn set_log_filter(&mut self, filter: &str, origin: Origin) {
        self.set_below(Key::find("RUST_LOG").expect("settings are named in KEYS"), filter, origin);
    }

    /// The control planes that the file and the environment name, in this order. Without one the node serves the posemesh services.
    pub(super) fn planes(&self) -> &[PlaneEntry] {
        &self.planes
    }

    /// Whether the node serves the posemesh services, so that their settings are required.
    pub(super) fn needs_posemesh(&self) -> bool {
        let named = self.planes.iter().any(|plane| plane.kind == PlaneKind::Posemesh);
        named || (self.planes.is_empty() && !self.has_bad_plane)
    }

    /// The settings in the file for the control planes: key, value and origin. If the file names none, the default.
    #[must_use]
    pub fn plane_rows(&self) -> Vec<(String, String, Origin)> {
        if self.planes.is_empty() {
            return vec![(format!("plane.{}.kind", dms::DEFAULT_NAME), "posemesh".to_owned(), Origin::Default)];
        }
        let rows = self.planes.iter().flat_map(|plane| {
            let row = |key: &str, value: String, origin| (format!("plane.{}.{key}", plane.name), value, origin);
            let kind = |kind: &str| row("kind", kind.to_owned(), Origin::File { line: plane.kind_line });
            let mut rows = match &plane.kind {
                PlaneKind::Posemesh => vec![kind("posemesh")],
                PlaneKind::Local { folder, line } => vec![
                    kind("local"),
                    row("folder", folder.to_string_lossy().into_owned(), Origin::File { line: *line }),
                ],
                #[cfg(feature = "grpc")]
                PlaneKind::NodeRuntime(table) => {
                    table.rows.iter().map(|(key, value, origin)| row(key, value.clone(), *origin)).collect()
                }
            };
            let min = plane.min_slots.map(|(slots, line)| row(MIN_SLOTS, slots.to_string(), Origin::File { line }));
            rows.extend(min);
            rows
        });
        rows.collect()
    }

    /// Sets a value above the lower layers. Blank changes nothing.
    ///
    /// # Panics
    /// When `name` is not in [`KEYS`].
    pub fn set(&mut self, name: &str, value: &str, origin: Origin) {
        let key = Key::find(name).expect("settings are named in KEYS");
        if !value.trim().is_empty() {
            self.values.insert(key.name, (value.trim().to_owned(), origin));
        }
    }

    /// Notes a mistake. It is reported with all others.
    pub fn mistake(&mut self, text: String) {
        self.mistakes.push(text);
    }

    /// Mistakes that belong to no value of a layer.
    #[must_use]
    pub fn mistakes(&self) -> &[String] {
        &self.mistakes
    }

    /// Sets a value if no layer has one yet.
    ///
    /// # Panics
    /// When `name` is not in [`KEYS`].
    pub fn set_default(&mut self, name: &str, value: &str) {
        self.set_below(Key::find(name).expect("settings are named in KEYS"), value, Origin::Command);
    }

    fn set_below(&mut self, key: &'static Key, value: &str, origin: Origin) {
        if !self.values.contains_key(key.name) {
            self.set(key.name, value, origin);
        }
    }

    /// The effective text and its origin.
    #[must_use]
    pub fn get(&self, key: &Key) -> (Option<&str>, Origin) {
        match (self.values.get(key.name), key.default) {
            (Some((value, origin)), _) => (Some(value), *origin),
            (None, Some(default)) => (Some(default), Origin::Default),
            (None, None) => (None, Origin::Unset),
        }
    }

    /// The effective text of the setting with this name.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<&str> {
        Key::find(name).and_then(|key| self.get(key).0)
    }

    /// A secret in the file itself.
    pub(super) fn secret(&self, key: &Key) -> Option<(&SecretString, Origin)> {
        self.secrets.get(key.name).map(|(secret, line)| (secret, Origin::File { line: *line }))
    }

    /// The beginning of a mistake in this setting: its name as the operator wrote it.
    #[must_use]
    pub fn place(&self, key: &Key, origin: Origin) -> String {
        match (origin, &self.file) {
            (Origin::File { line }, Some(file)) => format!("{}:{line}: {}", file.display(), key.file),
            _ => key.name.to_owned(),
        }
    }

    /// An origin as text for people.
    #[must_use]
    pub fn describe(&self, origin: Origin) -> String {
        match (origin, &self.file) {
            (Origin::File { line }, Some(file)) => format!("{}:{line}", file.display()),
            (Origin::File { .. }, None) => "file".to_owned(),
            (Origin::Unset, _) => "unset".to_owned(),
            (Origin::Default, _) => "default".to_owned(),
            (Origin::Environment, _) => "environment".to_owned(),
            (Origin::Command, _) => "command".to_owned(),
            (Origin::Flag, _) => "flag".to_owned(),
        }
    }
}

/// The warning about an environment variable whose name is similar to a setting.
fn near_miss(name: &str) -> Option<String> {
    let is_setting = |key: &Key| key.name == name || key.lower_case().as_deref() == Some(name);
    if KEYS.iter().any(is_setting) || appsettings::is_variable(name) {
        return None;
    }
    let near = nearest(name, Key::suggested_names())?;
    Some(format!("environment variable {name} is not a setting and has no effect, did you mean {near}?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blank_is_unset_everywhere() {
        let mut layers = Layers::default();
        for key in KEYS {
            layers.set(key.name, "  ", Origin::Environment);
            assert_eq!(layers.get(key).0, key.default, "{}", key.name);
        }
    }
}
