//! `plugins.toml`: which libraries to load, and how. The reference is the commented file at the root of the
//! repository.
//!
//! A mistake in the file itself is a [`ConfigError`]. Some keys have no effect in this version. Such a key rejects
//! only the plugin that uses it. Thus the host never accepts a key and ignores it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Map, Value};
use toml::{Table, Value as Toml};

use crate::model::{Capability, nearest, parse_duration};

/// The content of a plugins file.
#[derive(Clone, Debug, Default)]
pub struct PluginsFile {
    /// Reject libraries that have no entry.
    pub refuse_unlisted: bool,
    /// Entries in the file's order.
    pub entries: Vec<Entry>,
    /// The settings of a library without an entry.
    pub defaults: Settings,
    /// The folder that contains the file, for relative paths.
    pub folder: PathBuf,
}

/// One `[[plugin]]`.
#[derive(Clone, Debug)]
pub struct Entry {
    /// A path, or a bare name.
    pub file: String,
    /// Its settings, with the defaults filled in.
    pub settings: Settings,
}

/// The operator's settings for a plugin.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Its name in the node. The name in its manifest if it is absent.
    pub name: Option<String>,
    /// `false`: do not load it.
    pub enabled: bool,
    /// Expected SHA-256 of the file, lower-case hex.
    pub sha256: Option<String>,
    /// Serve only these capabilities.
    pub capabilities: Option<BTreeSet<Capability>>,
    /// Maximum number of concurrent tasks.
    pub max_concurrency: Option<usize>,
    /// The plugin takes its capabilities from other plugins that also claim them.
    pub overrides: bool,
    /// The runner may read the storage token.
    pub grant_token: bool,
    /// The plugin gets this as JSON.
    pub config: Map<String, Value>,
    /// Longest time of a run.
    pub wall_time: Option<Duration>,
    /// Longest time of a run of these capabilities, instead of `wall_time`.
    pub capability_wall_times: BTreeMap<Capability, Duration>,
    /// Keys, with their values, that have no effect in this version.
    pub unavailable: Vec<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            name: None,
            enabled: true,
            sha256: None,
            capabilities: None,
            max_concurrency: None,
            overrides: false,
            grant_token: false,
            config: Map::new(),
            wall_time: None,
            capability_wall_times: BTreeMap::new(),
            unavailable: Vec::new(),
        }
    }
}

impl Settings {
    /// The longest time of a run of this capability.
    pub(super) fn time_limit(&self, capability: &Capability) -> Option<Duration> {
        self.capability_wall_times.get(capability).copied().or(self.wall_time)
    }
}

/// A mistake in a plugins file, in one line.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", file.display())]
pub struct ConfigError {
    /// The file.
    pub file: PathBuf,
    /// The location in the file, what was expected and what was found.
    pub problem: String,
}

const SETTINGS_KEYS: &[&str] = &[
    "enabled",
    "sha256",
    "capabilities",
    "max_concurrency",
    "override",
    "grant",
    "config",
    "isolation",
    "limits",
    "per_task",
    "shared",
];

/// Limits of single capabilities. Only an entry has them, because a capability belongs to one plugin.
const CAPABILITY_LIMITS: &str = "capability_limits";

const LIMITS_KEYS: &[&str] = &["memory", "wall_time", "cpu_time", "scratch", "open_files", "network"];

/// The longest time limit. Longer ones could overflow clocks.
const WALL_TIME_MAX: Duration = Duration::from_secs(10 * 366 * 24 * 60 * 60);

impl PluginsFile {
    /// Reads and checks a plugins file.
    pub fn read(file: &Path) -> Result<Self, ConfigError> {
        let fail = |problem: String| ConfigError { file: file.to_owned(), problem };
        let text = std::fs::read_to_string(file).map_err(|err| fail(err.to_string()))?;
        let folder = file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Self::parse(&text, folder).map_err(fail)
    }

    /// Adds the packaged noop plugin with this sleep, in seconds, unless the file has an entry for it.
    pub fn list_noop(&mut self, sleep_secs: f64) {
        if self.entries.iter().any(|entry| entry.file == "noop") {
            return;
        }
        let mut settings = self.defaults.clone();
        settings.config = Map::from_iter([("sleep_secs".to_owned(), sleep_secs.into())]);
        self.entries.push(Entry { file: "noop".to_owned(), settings });
    }

    fn parse(text: &str, folder: &Path) -> Result<Self, String> {
        let table: Table = text.parse().map_err(|err: toml::de::Error| {
            let line = err.span().map_or(1, |span| text[..span.start.min(text.len())].lines().count().max(1));
            format!("line {line}: {}", err.message().replace('\n', " "))
        })?;
        known_keys("", &table, &["defaults", "trust", "plugin"])?;
        let mut file = Self { folder: folder.to_owned(), ..Self::default() };
        if let Some(defaults) = table.get("defaults") {
            let defaults = section("defaults", defaults)?;
            if defaults.contains_key(CAPABILITY_LIMITS) {
                return Err(format!(
                    "[defaults] {CAPABILITY_LIMITS}: move it to the [[plugin]] that has the capability"
                ));
            }
            known_keys("[defaults] ", defaults, SETTINGS_KEYS)?;
            file.defaults = settings("[defaults] ", defaults, Settings::default())?;
        }
        if let Some(trust) = table.get("trust") {
            let unavailable = file.trust(section("trust", trust)?)?;
            file.defaults.unavailable.extend(unavailable);
        }
        if let Some(plugins) = table.get("plugin") {
            let plugins = plugins.as_array().ok_or("expected [[plugin]] tables, found `plugin` as something else")?;
            for (index, plugin) in plugins.iter().enumerate() {
                let entry = file.entry(index, plugin)?;
                file.entries.push(entry);
            }
        }
        Ok(file)
    }

    fn trust(&mut self, trust: &Table) -> Result<Vec<String>, String> {
        known_keys("[trust] ", trust, &["unlisted", "require_pin", "signers"])?;
        match trust.get("unlisted") {
            None => {}
            Some(Toml::String(word)) if word == "allow" => {}
            Some(Toml::String(word)) if word == "refuse" => self.refuse_unlisted = true,
            Some(other) => return Err(format!("[trust] unlisted: expected \"allow\" or \"refuse\", found {other}")),
        }
        let mut unavailable = Vec::new();
        match trust.get("require_pin") {
            None | Some(Toml::Boolean(false)) => {}
            Some(Toml::Boolean(true)) => unavailable.push("require_pin = true".to_owned()),
            Some(other) => return Err(format!("[trust] require_pin: expected true or false, found {other}")),
        }
        match trust.get("signers") {
            None => {}
            Some(Toml::Array(keys)) if keys.is_empty() => {}
            Some(Toml::Array(_)) => unavailable.push("signers".to_owned()),
            Some(other) => return Err(format!("[trust] signers: expected an array of hex keys, found {other}")),
        }
        Ok(unavailable)
    }

    fn entry(&self, index: usize, plugin: &Toml) -> Result<Entry, String> {
        let number = index + 1;
        let plugin = plugin.as_table().ok_or_else(|| format!("[[plugin]] {number}: expected a table"))?;
        let file = match plugin.get("file") {
            Some(Toml::String(file)) if !file.trim().is_empty() => file.clone(),
            Some(other) => return Err(format!("[[plugin]] {number} file: expected a path or a name, found {other}")),
            None => return Err(format!("[[plugin]] {number}: the key \"file\" is missing")),
        };
        let location = format!("[[plugin]] {file:?} ");
        let mut keys = SETTINGS_KEYS.to_vec();
        keys.extend(["file", "name", CAPABILITY_LIMITS]);
        known_keys(&location, plugin, &keys)?;
        let settings = settings(&location, plugin, self.defaults.clone())?;
        let same_name = |entry: &&Entry| entry.settings.name == settings.name;
        let mut alike = self.entries.iter().filter(same_name);
        match alike.clone().find(|entry| entry.file == file).or_else(|| alike.next()) {
            Some(other) if other.file == file && settings.name.is_none() => {
                return Err(format!("{location}is listed twice; keep one entry, or give each its own name"));
            }
            Some(other) if settings.name.is_some() => {
                return Err(format!("{location}name: {:?} has this name already; choose another", other.file));
            }
            _ => {}
        }
        Ok(Entry { file, settings })
    }
}

fn section<'a>(name: &str, value: &'a Toml) -> Result<&'a Table, String> {
    value.as_table().ok_or_else(|| format!("expected [{name}] as a table, found {value}"))
}

fn known_keys(location: &str, table: &Table, known: &[&str]) -> Result<(), String> {
    let Some(key) = table.keys().find(|key| !known.contains(&key.as_str())) else { return Ok(()) };
    match nearest(key, known.iter().copied()) {
        Some(near) => Err(format!("{location}unknown key {key:?}, did you mean {near:?}?")),
        None => Err(format!("{location}unknown key {key:?}, expected one of {}", known.join(", "))),
    }
}

/// The rule of names in manifests.
fn is_name(name: &str) -> bool {
    !name.trim().is_empty() && name.chars().count() <= 128 && !name.chars().any(char::is_control)
}

fn settings(location: &str, table: &Table, defaults: Settings) -> Result<Settings, String> {
    let mut settings = defaults;
    for (key, value) in table {
        let wrong = |expected: &str| Err(format!("{location}{key}: expected {expected}, found {value}"));
        match (key.as_str(), value) {
            ("file", _) => {}
            ("name", Toml::String(name)) if is_name(name) => settings.name = Some(name.clone()),
            ("name", _) => return wrong("a text of 1 to 128 characters, without control characters"),
            ("enabled", Toml::Boolean(enabled)) => settings.enabled = *enabled,
            ("enabled" | "override", other) if !other.is_bool() => return wrong("true or false"),
            ("override", Toml::Boolean(overrides)) => settings.overrides = *overrides,
            ("sha256", Toml::String(hex)) if hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()) => {
                settings.sha256 = Some(hex.to_ascii_lowercase());
            }
            ("sha256", _) => return wrong("64 hex digits"),
            ("max_concurrency", Toml::Integer(count)) if *count > 0 => {
                settings.max_concurrency = Some(usize::try_from(*count).unwrap_or(usize::MAX));
            }
            ("max_concurrency", _) => return wrong("a number above 0"),
            ("capabilities", Toml::Array(names)) => {
                let parsed: Result<BTreeSet<_>, String> = names
                    .iter()
                    .map(|name| match name.as_str() {
                        Some(name) => Capability::parse(name).map_err(|err| format!("{location}capabilities: {err}")),
                        None => Err(format!("{location}capabilities: expected names, found {name}")),
                    })
                    .collect();
                settings.capabilities = Some(parsed?);
            }
            ("capabilities", _) => return wrong("an array of names"),
            ("grant", Toml::Array(grants)) => {
                settings.grant_token = false;
                for grant in grants {
                    match grant.as_str() {
                        Some("token") => settings.grant_token = true,
                        _ => return Err(format!("{location}grant: expected \"token\", found {grant}")),
                    }
                }
            }
            ("grant", _) => return wrong("an array such as [\"token\"]"),
            ("config", Toml::Table(config)) => match serde_json::to_value(config) {
                Ok(Value::Object(config)) => settings.config = config,
                _ => return wrong("a table that JSON can express"),
            },
            ("config", _) => return wrong("a table"),
            ("isolation", Toml::String(word)) if word == "in-process" => {
                settings.unavailable.retain(|key| !key.starts_with("isolation"));
            }
            ("isolation", Toml::String(word)) if word == "process" => {
                settings.unavailable.push("isolation = \"process\"".to_owned());
            }
            ("isolation", _) => return wrong("\"in-process\" or \"process\""),
            ("limits", Toml::Table(limits)) => {
                settings.unavailable.retain(|key| !key.starts_with("limits."));
                settings.wall_time = wall_time(&format!("{location}limits"), limits)?;
                settings.unavailable.extend(unavailable_limits("limits", limits));
            }
            (CAPABILITY_LIMITS, Toml::Table(capabilities)) => {
                for (name, limits) in capabilities {
                    let place = format!("{location}{CAPABILITY_LIMITS} {name:?}");
                    let name = Capability::parse(name).map_err(|err| format!("{place}: {err}"))?;
                    let limits =
                        limits.as_table().ok_or_else(|| format!("{place}: expected a table, found {limits}"))?;
                    if let Some(time) = wall_time(&place, limits)? {
                        settings.capability_wall_times.insert(name, time);
                    }
                    settings.unavailable.extend(unavailable_limits(CAPABILITY_LIMITS, limits));
                }
            }
            ("limits" | CAPABILITY_LIMITS, _) => return wrong("a table"),
            ("per_task" | "shared", Toml::Boolean(false)) => {
                settings.unavailable.retain(|unavailable| !unavailable.starts_with(key.as_str()));
            }
            ("per_task" | "shared", Toml::Boolean(true)) => settings.unavailable.push(format!("{key} = true")),
            _ => return wrong("true or false"),
        }
    }
    Ok(settings)
}

/// Checks the keys of a table of limits, and reads its `wall_time`.
fn wall_time(location: &str, limits: &Table) -> Result<Option<Duration>, String> {
    known_keys(&format!("{location} "), limits, LIMITS_KEYS)?;
    let Some(value) = limits.get("wall_time") else { return Ok(None) };
    let valid = |time: &Duration| !time.is_zero() && *time <= WALL_TIME_MAX;
    let time = value.as_str().and_then(parse_duration).filter(valid);
    time.map(Some).ok_or_else(|| {
        let most = WALL_TIME_MAX.as_secs();
        format!(
            "{location} wall_time: expected a duration above 0 such as \"15m\", at most {most} seconds, found {value}"
        )
    })
}

/// The limits in a table that have no effect in this version.
fn unavailable_limits(key: &str, limits: &Table) -> impl Iterator<Item = String> {
    limits.keys().filter(|limit| *limit != "wall_time").map(move |limit| format!("{key}.{limit}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(text: &str) -> String {
        PluginsFile::parse(text, Path::new(".")).expect_err("a mistake")
    }

    #[test]
    fn unknown_key_gets_a_suggestion() {
        let text = problem("[[plugin]]\nfile = \"hello\"\nsha265 = \"\"");
        assert_eq!(text, "[[plugin]] \"hello\" unknown key \"sha265\", did you mean \"sha256\"?");
        assert_eq!(problem("[trust]\nunlsted = 1"), "[trust] unknown key \"unlsted\", did you mean \"unlisted\"?");
        assert_eq!(
            problem("[[plugin]]\nfile = \"a\"\nlimits = { memroy = 1 }"),
            "[[plugin]] \"a\" limits unknown key \"memroy\", did you mean \"memory\"?"
        );
        assert!(problem("zzz = 1").contains("expected one of defaults, trust, plugin"));
    }

    #[test]
    fn wrong_type_errors_name_the_expected_type() {
        assert!(problem("[[plugin]]\nfile = 3").contains("file: expected a path or a name, found 3"));
        assert!(
            problem("[[plugin]]\nfile = \"a\"\nenabled = \"yes\"").contains("expected true or false, found \"yes\"")
        );
        assert!(
            problem("[[plugin]]\nfile = \"a\"\nmax_concurrency = 0").contains("expected a number above 0, found 0")
        );
        assert!(problem("[[plugin]]\nfile = \"a\"\nsha256 = \"12\"").contains("expected 64 hex digits"));
        assert!(problem("[[plugin]]\nenabled = true").contains("\"file\" is missing"));
        assert!(problem("a = \n").starts_with("line 1: "));
    }

    #[test]
    fn unavailable_keys_are_recorded() {
        let file = PluginsFile::parse(
            "[defaults]\nisolation = \"process\"\n[trust]\nrequire_pin = true\n[[plugin]]\nfile = \"a\"\nisolation = \"in-process\"\nlimits = { memory = \"2GiB\" }",
            Path::new("."),
        )
        .expect("known keys");
        assert_eq!(file.entries[0].settings.unavailable, ["require_pin = true", "limits.memory"]);
        assert_eq!(file.defaults.unavailable, ["isolation = \"process\"", "require_pin = true"]);
    }

    #[test]
    fn wall_time_is_read_and_other_limits_refused() {
        let file = PluginsFile::parse(
            "[defaults]\nlimits = { wall_time = \"15m\" }\n[[plugin]]\nfile = \"a\"\n[[plugin]]\nfile = \"b\"\n\
             limits = { wall_time = \"1h30m\" }\ncapability_limits = { \"/b/v1\" = { wall_time = \"90s\", memory = 1 } }",
            Path::new("."),
        )
        .expect("valid");
        let [a, b] = &file.entries[..] else { panic!("two entries") };
        assert_eq!(a.settings.wall_time, Some(Duration::from_secs(900)));
        assert_eq!(b.settings.wall_time, Some(Duration::from_secs(5400)));
        let of_capability = b.settings.capability_wall_times.iter().map(|(name, time)| (name.as_str(), time.as_secs()));
        assert_eq!(of_capability.collect::<Vec<_>>(), [("/b/v1", 90)]);
        assert_eq!(b.settings.unavailable, ["capability_limits.memory"]);
    }

    #[test]
    fn unusable_wall_times_are_mistakes() {
        let entry = |keys: &str| problem(&format!("[[plugin]]\nfile = \"a\"\n{keys}"));
        for value in ["0", "\"0s\"", "\"-1s\"", "\"soon\"", "\"100000h\"", "15"] {
            let text = entry(&format!("limits = {{ wall_time = {value} }}"));
            let start = "[[plugin]] \"a\" limits wall_time: expected a duration above 0 such as \"15m\", at most";
            assert!(text.starts_with(start) && text.ends_with(&format!("found {value}")), "{text}");
        }
        let text = entry("capability_limits = { \"/b/v1\" = { wall_tim = \"1s\" } }");
        let expected =
            "[[plugin]] \"a\" capability_limits \"/b/v1\" unknown key \"wall_tim\", did you mean \"wall_time\"?";
        assert_eq!(text, expected);
        assert!(entry("capability_limits = { b = {} }").starts_with("[[plugin]] \"a\" capability_limits \"b\": "));
        assert!(entry("capability_limits = { \"/b/v1\" = 1 }").ends_with("\"/b/v1\": expected a table, found 1"));
        let text = problem("[defaults]\ncapability_limits = {}");
        assert_eq!(text, "[defaults] capability_limits: move it to the [[plugin]] that has the capability");
    }

    #[test]
    fn entries_of_one_file_need_different_names() {
        let twice = |first: &str, second: &str| {
            let text = format!("[[plugin]]\nfile = \"a\"\n{first}\n[[plugin]]\nfile = \"a\"\n{second}");
            PluginsFile::parse(&text, Path::new("."))
        };
        let same = "[[plugin]] \"a\" is listed twice; keep one entry, or give each its own name";
        assert_eq!(twice("", "").expect_err("a mistake"), same);
        let taken = "[[plugin]] \"a\" name: \"a\" has this name already; choose another";
        assert_eq!(twice("name = \"x\"", "name = \"x\"").expect_err("a mistake"), taken);
        assert_eq!(twice("", "name = \"x\"").expect("different names").entries.len(), 2);
        let other = problem("[[plugin]]\nfile = \"a\"\nname = \"x\"\n[[plugin]]\nfile = \"b\"\nname = \"x\"");
        assert_eq!(other, "[[plugin]] \"b\" name: \"a\" has this name already; choose another");
        assert!(problem("[[plugin]]\nfile = \"a\"\nname = \" \"").contains("name: expected a text of 1 to 128"));
        assert!(problem("[defaults]\nname = \"a\"").contains("[defaults] unknown key \"name\""));
    }

    #[test]
    fn defaults_apply_to_every_entry() {
        let file = PluginsFile::parse(
            "[defaults]\nmax_concurrency = 4\n[[plugin]]\nfile = \"a\"\n[[plugin]]\nfile = \"b\"\nmax_concurrency = 1\ngrant = [\"token\"]",
            Path::new("."),
        )
        .expect("valid");
        assert_eq!(file.entries[0].settings.max_concurrency, Some(4));
        assert_eq!(file.entries[1].settings.max_concurrency, Some(1));
        assert!(file.entries[1].settings.grant_token && !file.entries[0].settings.grant_token);
    }

    #[test]
    fn entry_overrides_defaults_with_empty_values_too() {
        let file = PluginsFile::parse(
            "[defaults]\ngrant = [\"token\"]\nlimits = { memory = \"2GiB\" }\n[[plugin]]\nfile = \"a\"\ngrant = []\nlimits = {}",
            Path::new("."),
        )
        .expect("valid");
        assert!(file.defaults.grant_token && !file.entries[0].settings.grant_token);
        assert_eq!(file.entries[0].settings.unavailable, Vec::<String>::new());
    }
}
