//! Reads flags, environment and file into one checked [`HostConfig`]. Reports all mistakes at once.
//!
//! This module does not use the network. The node uses the network only after this module has succeeded.

mod appsettings;
mod file;
mod folders_and_hosts;
mod json;
mod keys;
mod layers;
#[cfg(feature = "grpc")]
mod node_runtime;
mod node_url;
mod parser;
mod secrets;

use std::path::{Path, PathBuf};

use tokio::sync::mpsc;
use url::Url;

pub use folders_and_hosts::{folder_problem, host_problem, kernel_problem};
pub use keys::{KEYS, Key, Kind};
pub use layers::{Layers, Origin};
pub use parser::Remark;
pub use secrets::Secrets;

use file::{MIN_SLOTS, PlaneEntry, PlaneKind};

#[cfg(feature = "grpc")]
use crate::leases::node_runtime::Config as NodeRuntimeConfig;
use crate::{
    auth::{self, NodeKey},
    engine,
    leases::{
        dms,
        local::{self, LocalEvent},
    },
    model::{PlaneName, ReadyWhen},
    observe::{self, StatusPage},
    outbox, plugins, session, storage,
    transport::{self, Proxies, Roots},
};
use parser::Parser;

/// The whole configuration of the node. Each module owns its part.
pub struct HostConfig {
    /// The node's identity, registration and sign-in.
    pub auth: auth::Config,
    /// The control planes that the node serves, each under its own name. At most one is [`PlaneChoice::Posemesh`], and
    /// it is the first one.
    pub planes: Vec<PlaneChoice>,
    /// The posemesh task service.
    pub dms: dms::Config,
    /// When heartbeats are sent.
    pub session: session::Config,
    /// How many tasks run, and how they end.
    pub engine: engine::Config,
    /// The directories of tasks, and the transfer of their data.
    pub storage: storage::Config,
    /// The outbox of reports.
    pub outbox: outbox::Options,
    /// The settings for all plugins.
    pub plugins: plugins::Options,
    /// The node's pages.
    pub observe: observe::Config,
    /// Access to the network.
    pub transport: transport::Config,
    /// Settings that work but should be changed, one line each.
    pub warnings: Vec<String>,
}

/// A control plane of a node.
#[derive(Clone, Debug)]
pub enum PlaneChoice {
    /// The posemesh services: `auth` and `dms`.
    Posemesh,
    /// A folder of job files.
    Local {
        /// The name of the control plane.
        name: PlaneName,
        /// The folder.
        folder: PathBuf,
        /// Receives the events of the jobs.
        observer: Option<mpsc::UnboundedSender<LocalEvent>>,
    },
    /// A Node Runtime control plane.
    #[cfg(feature = "grpc")]
    NodeRuntime(Box<NodeRuntimeConfig>),
}

/// Every mistake in the configuration, one line each.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct Mistakes(pub Vec<String>);

impl HostConfig {
    /// Checks the layers and builds the configuration.
    ///
    /// # Errors
    /// All mistakes at once. None contains the value of a secret.
    pub fn build(layers: &Layers, secrets: &Secrets) -> Result<Self, Mistakes> {
        let (mut built, parser) = Self::build_and_check(layers, secrets);
        built.warnings = parser::lines(&parser.warnings);
        // A placeholder remains only if a mistake was noted.
        parser.end(built)
    }

    /// Checks the settings of some tables of the file, such as `plugins`. Everything else has a placeholder.
    ///
    /// # Errors
    /// All mistakes in these settings.
    pub fn some(layers: &Layers, tables: &[&str]) -> Result<Self, Mistakes> {
        let mut parser = Parser::new(layers);
        let mut built = Self::blank();
        for key in KEYS.iter().filter(|key| key.file.split('.').next().is_some_and(|table| tables.contains(&table))) {
            (key.fill)(&mut built, &mut parser, key.name);
        }
        parser.end(built)
    }

    /// Defaults, and placeholders where there is no default.
    fn blank() -> Self {
        Self {
            auth: auth::Config::new(placeholder(), NodeKey::generate().0),
            planes: vec![PlaneChoice::Posemesh],
            dms: dms::Config::new(placeholder()),
            session: session::Config::default(),
            engine: engine::Config::default(),
            storage: storage::Config::new(default_scratch_dir()),
            outbox: outbox::Options::default(),
            plugins: plugins::Options::default(),
            observe: observe::Config::default(),
            transport: transport::Config::default(),
            warnings: Vec::new(),
        }
    }

    /// A configuration with placeholders for unusable values, with its mistakes and warnings.
    fn build_and_check<'a>(layers: &'a Layers, secrets: &Secrets) -> (Self, Parser<'a>) {
        let posemesh = layers.needs_posemesh();
        let mut parser = Parser::new(layers);
        parser.mistakes = layers.mistakes.iter().map(Remark::plain).collect();
        parser.warnings = layers.warnings.iter().map(Remark::plain).collect();
        for key in KEYS {
            let present = if key.is_secret() {
                match secrets.find(key, layers) {
                    Ok(found) => found.is_some_and(|found| parser.secrets.insert(key.name, found).is_none()),
                    // An unreadable secret is not reported as missing too.
                    Err(problem) => {
                        parser.mistakes.push(Remark::at(key.name, "", problem));
                        true
                    }
                }
            } else {
                layers.get(key).0.is_some()
            };
            if key.required && !present && posemesh {
                parser.mistakes.push(Remark::plain(format!("{} is not set: {}", key.name, key.help)));
            }
        }
        let mut built = Self::blank();
        for key in KEYS {
            (key.fill)(&mut built, &mut parser, key.name);
        }
        if !layers.planes().is_empty() {
            built.planes = parser.planes(&mut built.engine, &built.transport);
            if let Some(plane) = layers.planes().iter().find(|plane| plane.kind == PlaneKind::Posemesh) {
                built.dms.name = plane.name.clone();
            }
        }
        parser.floors(&mut built.engine);
        if !posemesh {
            return (built, parser);
        }
        let policy = transport::Policy { allow_insecure_http: built.transport.allow_insecure_http };
        for (name, url) in [("DMS_BASE_URL", &built.dms.base), ("DDS_BASE_URL", &built.auth.dds)] {
            parser.check_base_url(name, url, policy);
        }
        built.observe.node_host = parser.optional("NODE_URL").and_then(node_url::host);
        built.auth.form = match built.observe.status_page {
            StatusPage::Enabled { listen } => node_url::registration(&mut parser, listen, &built.auth.dds),
            StatusPage::Disabled => auth::Form::Wallet,
        };
        (built, parser)
    }
}

/// Mistakes and warnings about single values, for `config show`.
#[must_use]
pub fn remarks(layers: &Layers, secrets: &Secrets) -> (Vec<Remark>, Vec<Remark>) {
    let (_, parser) = HostConfig::build_and_check(layers, secrets);
    let mut mistakes = parser.mistakes;
    mistakes.extend(folder_remarks(layers));
    (mistakes, parser.warnings)
}

/// The warnings, one line each, also of a configuration with mistakes: a misspelled name can explain a missing value.
#[must_use]
pub fn warnings(layers: &Layers, secrets: &Secrets) -> Vec<String> {
    parser::lines(&remarks(layers, secrets).1)
}

/// Mistakes in the current folders of a node, one line each. [`HostConfig::build`] does not check them,
/// because a running node has created them.
#[must_use]
pub fn folder_mistakes(layers: &Layers) -> Vec<String> {
    parser::lines(&folder_remarks(layers))
}

fn folder_remarks(layers: &Layers) -> Vec<Remark> {
    let mut parser = Parser::new(layers);
    let (scratch, state) = (parser.scratch_dir(), parser.state_dir());
    let named = parser.mistakes.is_empty();
    // A folder without a name is reported elsewhere.
    parser.mistakes.clear();
    parser.check_folder("SCRATCH_DIR", &scratch);
    parser.check_default_folder();
    for PlaneEntry { name, kind, .. } in layers.planes() {
        let PlaneKind::Local { folder, line } = kind else { continue };
        let problem = local::folders(folder).iter().find_map(|folder| folder_problem(folder));
        let place = format!("{}: plane.{name}.folder", layers.describe(Origin::File { line: *line }));
        parser.mistakes.extend(problem.map(|problem| Remark::elsewhere(place, problem)));
    }
    // A folder that the command chose for its own node needs no check.
    if named && parser.origin("STATE_DIR") != Origin::Command {
        parser.check_folder("STATE_DIR", &state);
        if let Some(problem) = folders_and_hosts::conflict(&scratch, &state) {
            parser.mistake("STATE_DIR", problem);
        }
    }
    parser.mistakes
}

impl Parser<'_> {
    /// The control planes of the file. One of them may determine the number of slots.
    fn planes(&mut self, engine: &mut engine::Config, transport: &transport::Config) -> Vec<PlaneChoice> {
        #[cfg(feature = "grpc")]
        self.slots_of_planes(engine);
        #[cfg(not(feature = "grpc"))]
        let _ = (engine, transport);
        let mut planes = Vec::new();
        for PlaneEntry { name, kind, .. } in self.layers.planes() {
            match kind {
                // The status shows its registration as that of the node.
                PlaneKind::Posemesh => planes.insert(0, PlaneChoice::Posemesh),
                PlaneKind::Local { folder, .. } => {
                    planes.push(PlaneChoice::Local { name: name.clone(), folder: folder.clone(), observer: None });
                }
                #[cfg(feature = "grpc")]
                PlaneKind::NodeRuntime(table) => {
                    let policy = transport::Policy { allow_insecure_http: transport.allow_insecure_http };
                    for (key, origin, problem) in table.problems(policy) {
                        let place = format!("{}: plane.{name}.{key}", self.layers.describe(origin));
                        self.mistakes.push(Remark::elsewhere(place, problem));
                    }
                    let mut config = table.config.clone();
                    let slots = &mut config.capacity.slots;
                    if *slots == 0 {
                        *slots = u32::try_from(engine.slots).unwrap_or(u32::MAX);
                    }
                    planes.push(PlaneChoice::NodeRuntime(Box::new(config)));
                }
            }
        }
        planes
    }

    /// Without `MAX_CONCURRENCY`, the largest `capacity.slots` is the number of slots.
    #[cfg(feature = "grpc")]
    fn slots_of_planes(&self, engine: &mut engine::Config) {
        let slots = self.layers.planes().iter().filter_map(|plane| match &plane.kind {
            PlaneKind::NodeRuntime(table) => Some(table.config.capacity.slots).filter(|slots| *slots > 0),
            _ => None,
        });
        if let (Some(slots), Origin::Default) = (slots.max(), self.origin("MAX_CONCURRENCY")) {
            engine.slots = usize::try_from(slots).unwrap_or(engine::SLOTS_MAX);
        }
    }

    /// The slots that are kept free for each control plane.
    fn floors(&mut self, engine: &mut engine::Config) {
        let mut sum = 0;
        for PlaneEntry { name, min_slots, .. } in self.layers.planes() {
            let Some((slots, line)) = *min_slots else { continue };
            engine.floors.insert(name.clone(), slots);
            let before = sum;
            sum += slots;
            if before <= engine.slots && sum > engine.slots {
                let place = format!("{}: plane.{name}.{MIN_SLOTS}", self.layers.describe(Origin::File { line }));
                let what = format!(
                    "the control planes reserve {sum} slots, but the node has {}; raise MAX_CONCURRENCY or lower {MIN_SLOTS}",
                    engine.slots
                );
                self.mistakes.push(Remark::elsewhere(place, what));
            }
        }
    }

    fn state_dir(&mut self) -> PathBuf {
        if let Some(dir) = self.optional("STATE_DIR") {
            return PathBuf::from(dir);
        }
        // By its specification, an empty or relative path counts as unset.
        let xdg = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
        let base = xdg.or_else(|| {
            let home = std::env::home_dir().filter(|path| path.is_absolute());
            home.map(|home| home.join(".local/state"))
        });
        base.map(|base| base.join("runner-host")).unwrap_or_else(|| {
            self.mistake("STATE_DIR", "it is not set, and there is no home folder to put its default in");
            PathBuf::new()
        })
    }

    /// Notes a base URL that is not allowed, or to which paths cannot be added.
    fn check_base_url(&mut self, name: &str, url: &Url, policy: transport::Policy) {
        if let Err(err) = policy.check(url) {
            self.mistake(name, err);
        }
        if url.query().is_some() || url.fragment().is_some() {
            self.mistake(name, "expected a base URL without query or fragment: paths are added at its end");
        }
    }

    fn ready_when(&mut self, name: &str) -> ReadyWhen {
        self.value(name, "any or all", ReadyWhen::Any, |text| match text {
            "any" => Some(ReadyWhen::Any),
            "all" => Some(ReadyWhen::All),
            _ => None,
        })
    }

    /// The system's certificate authorities, and those of a PEM file.
    fn roots(&mut self, name: &str) -> Roots {
        let Some(path) = self.optional(name) else { return Roots::default() };
        Roots::with_bundle(Path::new(path)).unwrap_or_else(|why| {
            self.mistake(name, format_args!("{path}: {why}"));
            Roots::default()
        })
    }

    /// The rules for proxies, from four settings.
    fn proxies(&mut self) -> Proxies {
        let [http, https, all] = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"].map(|name| {
            let url = self.optional(name)?;
            let problem =
                Proxies::check(url).map_err(str::to_owned).err().or_else(|| folders_and_hosts::proxy_problem(url));
            match problem {
                None => Some(url),
                Some(problem) => {
                    self.mistake(name, problem);
                    None
                }
            }
        });
        if http.or(https).or(all).is_some() {
            self.check_no_proxy("NO_PROXY");
        }
        Proxies::new(http, https, all, self.optional("NO_PROXY").unwrap_or_default())
    }
}

fn placeholder() -> Url {
    Url::parse("http://127.0.0.1").expect("a constant URL")
}

/// A folder per user below the system's temporary folder. Other users must not be able to claim it, see
/// [`own_scratch_dir`].
#[must_use]
pub fn default_scratch_dir() -> PathBuf {
    #[cfg(unix)]
    let user = rustix::process::geteuid().as_raw().to_string();
    #[cfg(not(unix))]
    let user = std::env::var("USERNAME").unwrap_or_else(|_| "user".to_owned());
    std::env::temp_dir().join(format!("runner-host-{user}"))
}

/// [`default_scratch_dir`], created for this user only. Afterwards no other user can replace it, because the
/// temporary folder has the sticky bit.
///
/// # Errors
/// One line if another user owns the folder.
pub fn own_scratch_dir() -> Result<PathBuf, Mistakes> {
    let dir = default_scratch_dir();
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    // It may exist. Any other error is reported when the folder is used.
    let _ = builder.create(&dir);
    match folders_and_hosts::foreign_problem(&dir) {
        Some(problem) => Err(Mistakes(vec![format!("SCRATCH_DIR: {problem}")])),
        None => Ok(dir),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_of_table_and_modules_agree() {
        let values = |config: &HostConfig| {
            let HostConfig { auth, dms, session, engine, storage, outbox, plugins, observe, transport, .. } = config;
            format!(
                "{:#?}",
                (auth, dms, session, engine, storage, (outbox.max, outbox.bytes_max), plugins, observe, transport)
            )
        };
        let layers = Layers::default();
        let mut parser = Parser::new(&layers);
        let (mut config, before) = (HostConfig::blank(), HostConfig::blank());
        config.storage.domain.client_id.clone_from(&before.storage.domain.client_id);
        config.auth.key = before.auth.key.clone();
        for key in KEYS {
            (key.fill)(&mut config, &mut parser, key.name);
        }
        assert_eq!(values(&config), values(&before));
    }
}
