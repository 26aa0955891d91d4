//! Finds, checks, opens and runs plugins. No other module knows that plugins are shared libraries.
//!
//! Start at [`Plugins::load`]. [`Plugins::run`] runs one task in the plugin that serves it. Calls across the
//! boundary are in `ffi`. Opening is in `open`. Every reason to reject a library is an [`InstallError`]. One bad
//! plugin never stops the others.

mod backend;
mod config;
mod discover;
mod dispatch;
mod ended;
mod error;
mod executor;
mod ffi;
mod handles;
mod held_bytes;
mod inspect;
mod instance;
mod load;
mod open;
mod run;
mod scaffold;
mod stuck;
mod text;
mod threads;
mod writable;

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::{Serialize, Serializer};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

pub use config::{ConfigError, Entry, PluginsFile, Settings};
pub use discover::{PlaceError, Places};
pub use ended::{exit_process, watch_exit};
pub use error::InstallError;
pub use inspect::{Facts, Manifest};
pub use run::{Folder, Job};
pub use scaffold::{ScaffoldError, create};

use crate::{
    model::{Capability, Outcome, PluginId, in_a_line, millis},
    node_event::{NodeEvent, NodeEvents},
};
use load::Verified;
use run::Plugin;

/// Interval at which the calls into plugins are checked. The end of a task checks the calls of its plugin.
const CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// The operator's settings for all plugins, outside the plugins file.
#[derive(Clone, Debug)]
pub struct Options {
    /// Time limit for a plugin to open and initialise.
    pub init_timeout: Duration,
    /// Load libraries that everyone may write to.
    pub allow_writable: bool,
    /// Load the packaged noop plugin as if it were listed.
    pub noop: bool,
    /// The duration of a noop task.
    pub noop_sleep_secs: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self { init_timeout: Duration::from_secs(10), allow_writable: false, noop: false, noop_sleep_secs: 5.0 }
    }
}

/// What to load.
#[derive(Clone, Debug)]
pub struct Config {
    /// The places to search for libraries.
    pub places: Places,
    /// The operator's settings for the libraries.
    pub file: PluginsFile,
    /// Maximum number of concurrent tasks in a plugin whose settings do not limit them.
    pub max_concurrency: usize,
    /// The most verbose level that plugins should send: 1 is error, 5 is trace, 0 is none.
    pub log_level: u32,
    /// Time limit for a plugin to open and initialise, both together.
    pub init_limit: Duration,
    /// Load libraries that everyone may write to.
    pub allow_writable: bool,
}

/// One library as `plugins list` and the status page show it.
#[derive(Clone, Debug, Serialize)]
pub struct Listing {
    /// The file.
    #[serde(serialize_with = "lossy")]
    pub file: PathBuf,
    /// The name that the operator gave it, else the name in its manifest, if the manifest is readable.
    pub name: Option<String>,
    /// The operator gave it a name. One file may then have several listings.
    #[serde(skip)]
    pub is_named: bool,
    /// The version in its manifest.
    pub version: Option<String>,
    /// The SHA-256 of the bytes that were opened.
    pub sha256: Option<String>,
    /// The capabilities it serves in this node.
    pub capabilities: Vec<String>,
    /// The longest time of a run, in milliseconds, by capability. Only limits of the plugins file.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub time_limits_ms: BTreeMap<String, u64>,
    /// The state of the library.
    pub state: PluginState,
    /// Number of its runners that ignored their cancellation.
    #[serde(skip_serializing_if = "is_zero")]
    pub stuck_runners: u32,
    /// Number of calls into it that have not returned. Each keeps a thread.
    #[serde(skip_serializing_if = "is_none")]
    pub hanging_calls: usize,
    /// The reason why a thread for its calls cannot be created.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_thread: Option<String>,
    /// Bytes that its ended tasks received or supplied and that are not released.
    pub unreleased_bytes: u64,
    /// The reason why it was rejected, or why it no longer serves anything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// It may load later, see [`InstallError::is_temporary`].
    #[serde(skip)]
    pub temporary: bool,
}

/// The state of a library.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PluginState {
    /// It serves.
    Loaded,
    /// It was not opened, or it was opened and then rejected.
    Refused,
    /// It serves nothing any more, because too many of its runners ignored their cancellation.
    OutOfService,
}

impl std::fmt::Display for PluginState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Loaded => "loaded",
            Self::Refused => "refused",
            Self::OutOfService => "out-of-service",
        })
    }
}

/// All loaded plugins.
pub struct Plugins {
    by_capability: BTreeMap<Capability, Arc<Plugin>>,
    /// The plugin of each capability, for status pages.
    ids: BTreeMap<Capability, PluginId>,
    /// The longest time of a run, for capabilities with such a limit in the plugins file.
    time_limits: BTreeMap<Capability, Duration>,
    /// Each plugin, with the index of its listing.
    loaded: Vec<(usize, Arc<Plugin>)>,
    listings: Vec<Listing>,
    /// Every capability that is served, sorted.
    serving: watch::Sender<Vec<Capability>>,
}

impl Plugins {
    /// Loads what `config` names. Rejected libraries are listed, logged and skipped.
    ///
    /// # Errors
    ///
    /// Only when a folder cannot be listed.
    pub fn load(config: &Config) -> Result<Self, PlaceError> {
        let found = discover::discover(&config.places, &config.file)?;
        let mut listings: Vec<Listing> =
            found.iter().map(|found| Listing::new(&found.file, found.settings.name.as_deref())).collect();
        // All libraries are read before the first one is opened.
        let mut verified: Vec<Option<Verified>> = Vec::new();
        for (listing, checked) in listings.iter_mut().zip(load::verify_all(found, config.allow_writable)) {
            match checked {
                Ok(plugin) => {
                    listing.describe(&plugin);
                    verified.push(Some(plugin));
                }
                Err((_, err)) => {
                    listing.refuse(&err);
                    verified.push(None);
                }
            }
        }
        assign_capabilities(&mut verified, &mut listings);
        let (mut loaded, mut by_capability, mut ids) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
        let mut time_limits = BTreeMap::new();
        let mut hanging = None;
        for (number, (listing, plugin)) in listings.iter_mut().zip(verified).enumerate() {
            let Some(plugin) = plugin else { continue };
            if let Some(file) = &hanging {
                // It holds the linker's lock and never releases it. No other library can be opened.
                let reason = format!("{file} hangs while it is opened; remove it");
                listing.refuse(&InstallError::Open { reason });
                continue;
            }
            let name = listing.name.clone().unwrap_or_default();
            let capabilities = plugin.capabilities.clone();
            let settings = plugin.settings.clone();
            let sha256: Arc<str> = plugin.sha256.as_str().into();
            ended::opening(&name, &listing.file);
            match load::open(plugin, config.init_limit, config.log_level) {
                Ok(opened) => {
                    let slots = settings.max_concurrency.unwrap_or(config.max_concurrency);
                    let plugin = Arc::new(Plugin::new(opened, settings.grant_token, slots));
                    for capability in &capabilities {
                        by_capability.insert(capability.clone(), Arc::clone(&plugin));
                        ids.insert(capability.clone(), PluginId { name: plugin.name(), sha256: Arc::clone(&sha256) });
                        time_limits.extend(settings.time_limit(capability).map(|limit| (capability.clone(), limit)));
                    }
                    let capabilities: Vec<&str> = capabilities.iter().map(Capability::as_str).collect();
                    let (file, capabilities) = (listing.file.display(), capabilities.join(" "));
                    info!(event = "plugin.loaded", plugin = %name, file = %file, capabilities, "plugin loaded");
                    loaded.push((number, plugin));
                }
                Err(err) => {
                    if matches!(err, InstallError::OpenHung { .. }) {
                        hanging = Some(listing.file.display().to_string());
                    }
                    listing.refuse(&err);
                }
            }
        }
        ended::opened();
        for listing in &listings {
            if let Some(reason) = &listing.reason {
                warn!(event = "plugin.refused", file = %listing.file.display(), reason, "plugin refused");
            }
        }
        let serving = watch::Sender::new(by_capability.keys().cloned().collect());
        Ok(Self { by_capability, ids, time_limits, loaded, listings, serving })
    }

    /// Every capability that is served, sorted.
    #[must_use]
    pub fn capabilities(&self) -> Vec<Capability> {
        self.serving.borrow().clone()
    }

    /// A live view of [`Plugins::capabilities`]. It shrinks when a plugin goes out of service.
    #[must_use]
    pub fn serving(&self) -> watch::Receiver<Vec<Capability>> {
        self.serving.subscribe()
    }

    /// Checks the calls into all plugins at intervals, until `over`.
    pub async fn watch(&self, events: NodeEvents, over: CancellationToken) {
        let mut interval = tokio::time::interval(CHECK_INTERVAL);
        loop {
            tokio::select! {
                () = over.cancelled() => return,
                _ = interval.tick() => {}
            }
            for (_, plugin) in &self.loaded {
                plugin.retry_thread();
                self.review(plugin, &events);
            }
        }
    }

    /// Checks the calls into one plugin.
    fn review(&self, plugin: &Arc<Plugin>, events: &NodeEvents) {
        let changes = plugin.review(events);
        if changes.no_thread {
            let no_thread = self.loaded.iter().find_map(|(_, plugin)| plugin.no_thread());
            events.board().change(|status| status.no_thread = no_thread);
        }
        if changes.out_of_service {
            let served = self.by_capability.iter().filter(|(_, of)| Arc::ptr_eq(of, plugin));
            events.emit(NodeEvent::PluginOutOfService {
                plugin: plugin.name(),
                reason: plugin.faults().out_of_service().unwrap_or_default().to_owned(),
                capabilities: served.map(|(capability, _)| capability.clone()).collect(),
            });
            self.serving.send_modify(|serving| *serving = self.in_service());
        }
    }

    fn in_service(&self) -> Vec<Capability> {
        let serves = |plugin: &Plugin| plugin.faults().out_of_service().is_none();
        self.by_capability.iter().filter(|(_, plugin)| serves(plugin)).map(|(name, _)| name.clone()).collect()
    }

    /// The reason why a task for `capability` cannot run here, as its outcome. `None` if it can run.
    #[must_use]
    pub fn refusal(&self, capability: &Capability) -> Option<Outcome> {
        self.plugin(capability).map_or(Some(Outcome::NoRunner), |plugin| plugin.refusal())
    }

    /// The plugin that serves `capability`.
    #[must_use]
    pub fn id_of(&self, capability: &Capability) -> Option<&PluginId> {
        self.ids.get(capability)
    }

    /// The longest time of a run of `capability`, if the plugins file limits it.
    #[must_use]
    pub fn time_limit(&self, capability: &Capability) -> Option<Duration> {
        self.time_limits.get(capability).copied()
    }

    /// Every library that was considered, in order.
    #[must_use]
    pub fn listings(&self) -> Vec<Listing> {
        let mut listings = self.listings.clone();
        for (number, plugin) in &self.loaded {
            let listing = &mut listings[*number];
            listing.stuck_runners = plugin.faults().strikes();
            listing.hanging_calls = plugin.hanging_calls();
            listing.no_thread = plugin.no_thread();
            listing.unreleased_bytes = plugin.unreleased_bytes();
            if let Some(reason) = plugin.faults().out_of_service() {
                listing.state = PluginState::OutOfService;
                listing.reason = Some(reason.to_owned());
            }
        }
        listings
    }

    /// Number of calls that named a task which was over or never existed.
    #[must_use]
    pub fn stale_calls(&self) -> u64 {
        self.loaded.iter().map(|(_, plugin)| plugin.stale_calls()).sum()
    }

    /// Number of runners that ignored their cancellation.
    #[must_use]
    pub fn stuck_runners(&self) -> u64 {
        self.loaded.iter().map(|(_, plugin)| u64::from(plugin.faults().strikes())).sum()
    }

    /// Changes the most verbose level that plugins should send: 1 is error, 5 is trace, 0 is none.
    pub fn set_log_level(&self, level: u32) {
        for (_, plugin) in &self.loaded {
            plugin.set_log_level(level);
        }
    }

    /// Notifies every plugin that the process ends within `deadline`, and waits that long for all of them together.
    pub async fn shutdown(&self, deadline: Duration) {
        let waits: Vec<_> = self.loaded.iter().map(|(_, plugin)| plugin.shutdown(deadline)).collect();
        let all = async {
            for wait in waits {
                wait.await;
            }
        };
        // A plugin that hangs uses up the deadline.
        let _ = tokio::time::timeout(deadline, all).await;
    }

    fn plugin(&self, capability: &Capability) -> Option<&Arc<Plugin>> {
        self.by_capability.get(capability)
    }
}

/// Reads the facts about a library without running any of its code.
pub fn inspect_file(file: &Path) -> Result<(String, Facts), InstallError> {
    use sha2::{Digest, Sha256};
    let bytes = load::read(file)?;
    let facts = inspect::inspect(&bytes)?;
    Ok((base16ct::lower::encode_string(&Sha256::digest(&bytes)), facts))
}

/// Assigns every capability to one plugin, in order. Plugins with `override` come first, then the others. A plugin
/// is rejected in two cases. No capability is left for it, or another plugin serves one of them and `override` does
/// not decide between the two. The next plugins can serve the capabilities of a rejected plugin.
fn assign_capabilities(verified: &mut [Option<Verified>], listings: &mut [Listing]) {
    let mut owners: HashMap<Capability, (usize, bool)> = HashMap::new();
    for overriding in [true, false] {
        for index in 0..verified.len() {
            let Some(plugin) = verified[index].as_mut().filter(|plugin| plugin.settings.overrides == overriding) else {
                continue;
            };
            let all = std::mem::take(&mut plugin.capabilities);
            let (taken, free): (Vec<_>, Vec<_>) = all.into_iter().partition(|name| owners.contains_key(name));
            let overridden = |name: &Capability| !overriding && owners[name].1;
            let contested = match taken.iter().find(|name| !overridden(name)) {
                None if free.is_empty() => taken.first(),
                contested => contested,
            };
            if let Some(contested) = contested {
                let other = listings[owners[contested].0].to_string();
                listings[index].refuse(&InstallError::Duplicate { capability: contested.to_string(), other });
                verified[index] = None;
                continue;
            }
            owners.extend(free.iter().map(|name| (name.clone(), (index, overriding))));
            plugin.capabilities = free;
            listings[index].describe(plugin);
        }
    }
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(count: &u32) -> bool {
    *count == 0
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_none(count: &usize) -> bool {
    *count == 0
}

/// JSON has no bytes type. Bytes in a path that are not UTF-8 are shown as �.
fn lossy<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

/// Names the library in a line for the operator.
impl std::fmt::Display for Listing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.name.as_ref().filter(|_| self.is_named) {
            Some(name) => write!(f, "{} ({name})", self.file.display()),
            None => write!(f, "{}", self.file.display()),
        }
    }
}

impl Listing {
    fn new(file: &Path, name: Option<&str>) -> Self {
        Self {
            file: file.to_owned(),
            name: name.map(str::to_owned),
            is_named: name.is_some(),
            version: None,
            sha256: None,
            capabilities: Vec::new(),
            time_limits_ms: BTreeMap::new(),
            state: PluginState::Loaded,
            stuck_runners: 0,
            hanging_calls: 0,
            no_thread: None,
            unreleased_bytes: 0,
            reason: None,
            temporary: false,
        }
    }

    fn describe(&mut self, plugin: &Verified) {
        debug_assert_eq!(self.file, plugin.file);
        self.name.get_or_insert_with(|| plugin.facts.manifest.name.clone());
        self.version = Some(plugin.facts.manifest.version.clone());
        self.sha256 = Some(plugin.sha256.clone());
        self.capabilities = plugin.capabilities.iter().map(ToString::to_string).collect();
        let limit = |name: &Capability| Some((name.to_string(), millis(plugin.settings.time_limit(name)?)));
        self.time_limits_ms = plugin.capabilities.iter().filter_map(limit).collect();
    }

    fn refuse(&mut self, err: &InstallError) {
        self.state = PluginState::Refused;
        self.temporary = err.is_temporary();
        // A path in the reason may contain any character. The reason must stay one line.
        self.reason = Some(in_a_line(&err.to_string()));
    }
}
