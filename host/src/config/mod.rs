//! Reads flags, environment and file into one checked [`HostConfig`]; reports all mistakes at once.
//!
//! Nothing here talks to the network, and nothing talks to the network before this has succeeded.

mod file;
mod keys;
mod layers;
mod node_url;
mod parser;
mod places;
mod secrets;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use secrecy::{ExposeSecret, SecretString};
use url::Url;

pub use keys::{KEYS, Key, Kind};
pub use layers::{Layers, Origin};
pub use parser::{Remark, duration};
pub use places::{folder_trouble, host_trouble, kernel_trouble};
pub use secrets::Secrets;

use crate::{
    auth::{Form, NodeKey},
    transport::{self, Proxies, Roots},
};
use parser::Parser;

/// Everything the node needs to know.
pub struct HostConfig {
    /// Base URL of the task service.
    pub dms: Url,
    /// Base URL of the sign-in service.
    pub dds: Url,
    /// Registration secret.
    pub reg_secret: SecretString,
    /// Who the node is.
    pub key: NodeKey,
    /// How the node registers.
    pub registration: Form,
    /// The only domain sign-in messages may be for; absent: that of the service.
    pub sign_in_domain: Option<String>,
    /// Version announced at registration.
    pub version: String,
    /// Where the node serves its own pages.
    pub http_bind: SocketAddr,
    /// Tasks at once.
    pub max_concurrency: usize,
    /// Limit of one call to the control plane.
    pub request_timeout: Duration,
    /// Pause after a refused registration.
    pub register_interval: Duration,
    /// Failures in a row before a full pause; -1: never.
    pub register_max_retry: i32,
    /// Earliest and latest heartbeat as a share of the remaining lease.
    pub heartbeat_ratios: (f64, f64),
    /// How long progress is gathered.
    pub heartbeat_coalesce: Duration,
    /// Bounds of the pause after an empty poll.
    pub poll_backoff: (Duration, Duration),
    /// Share of a token's life after which it is renewed.
    pub token_safety_ratio: f64,
    /// Repeats of a failed login.
    pub token_max_retries: u32,
    /// Spread of login repeats and renewals.
    pub token_jitter: Duration,
    /// How long running tasks may go on after the first signal.
    pub drain_timeout: Duration,
    /// How long a plugin may take to open and initialise.
    pub plugin_init_timeout: Duration,
    /// How long a cancelled runner may take.
    pub cancel_grace: Duration,
    /// Where task directories are made.
    pub scratch_dir: PathBuf,
    /// Where reports are kept until they are accepted; one node at a time.
    pub state_dir: PathBuf,
    /// Reports not yet accepted from which on nothing new is leased.
    pub outbox_max: usize,
    /// Free bytes below `scratch_dir` under which nothing new is leased; 0: any.
    pub disk_free_min: u64,
    /// Identifies the node to domain servers.
    pub client_id: String,
    /// How long a transfer may be silent.
    pub transfer_stall: Duration,
    /// How long a transfer in which nothing moves is tried again.
    pub transfer_patience: Duration,
    /// Most bytes of tasks' data in memory at once.
    pub memory_budget: u64,
    /// Most files and folders in a zip input.
    pub unpack_files_max: u64,
    /// Most bytes a zip input may unpack to.
    pub unpack_bytes_max: u64,
    /// How many times its own size that may be.
    pub unpack_ratio_max: u64,
    /// Domain servers the node may talk to; empty: any.
    pub domain_hosts: Vec<String>,
    /// What may be spoken to, whom to believe, what goes through a proxy.
    pub transport: transport::Config,
    /// Load the packaged noop plugin, with its sleep in seconds.
    pub noop: Option<f64>,
    /// What works but should not stay so, a line each.
    pub warnings: Vec<String>,
}

/// Every mistake in the configuration, a line each.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct Mistakes(pub Vec<String>);

impl HostConfig {
    /// Checks the layers and builds the configuration.
    ///
    /// # Errors
    /// With all mistakes at once. A secret's value is in none of them.
    pub fn build(layers: &Layers, secrets: &Secrets) -> Result<Self, Mistakes> {
        let (mut built, parser) = Self::examine(layers, secrets);
        built.warnings = parser::lines(&parser.warnings);
        // The placeholders stand only where a mistake was noted.
        parser.end(built)
    }

    /// A configuration with placeholders for what cannot be used, and what there is to say about it.
    fn examine<'a>(layers: &'a Layers, secrets: &Secrets) -> (Self, Parser<'a>) {
        let mut parser = Parser::new(layers);
        parser.mistakes = layers.mistakes.iter().map(Remark::plain).collect();
        parser.warnings = layers.warnings.iter().map(Remark::plain).collect();
        let mut given = BTreeMap::new();
        for key in KEYS {
            let present = if key.is_secret() {
                match secrets.find(key, layers) {
                    Ok(found) => found.is_some_and(|found| given.insert(key.name, found).is_none()),
                    // What cannot be read is not missing as well.
                    Err(problem) => {
                        parser.mistakes.push(Remark::at(key.name, "", problem));
                        true
                    }
                }
            } else {
                layers.get(key).0.is_some()
            };
            if key.required && !present {
                parser.mistakes.push(Remark::plain(format!("{} is not set: {}", key.name, key.help)));
            }
        }
        let (dms, dds) = (parser.url("DMS_BASE_URL"), parser.url("DDS_BASE_URL"));
        let transport = transport(&mut parser);
        let client = transport::Policy { allow_insecure_http: transport.allow_insecure_http };
        for (name, url) in [("DMS_BASE_URL", &dms), ("DDS_BASE_URL", &dds)] {
            if let Some(Err(err)) = url.as_ref().map(|url| client.check(url)) {
                parser.mistake(name, err);
            }
            if url.as_ref().is_some_and(|url| url.query().is_some() || url.fragment().is_some()) {
                parser.mistake(name, "expected a base URL without query or fragment: paths are added at its end");
            }
        }
        let key = given.remove("SECP256K1_PRIVHEX").and_then(|(hex, place)| {
            let read = NodeKey::from_hex(hex.expose_secret());
            read.map_err(|err| {
                let place = match place.as_str() {
                    "environment" => "SECP256K1_PRIVHEX".to_owned(),
                    _ => format!("SECP256K1_PRIVHEX ({place})"),
                };
                parser.mistakes.push(Remark::at("SECP256K1_PRIVHEX", place, err));
            })
            .ok()
        });
        let (low, high) = (parser.ratio("HEARTBEAT_MIN_RATIO"), parser.ratio("HEARTBEAT_MAX_RATIO"));
        let (poll_min, poll_max) =
            (parser.milliseconds("POLL_BACKOFF_MS_MIN"), parser.milliseconds("POLL_BACKOFF_MS_MAX"));
        let noop_sleep = parser.fractional_seconds("NOOP_SLEEP_SECS");
        let http_bind = parser.address("HTTP_BIND");
        parser.look_at_log_format();
        let built = Self {
            registration: node_url::registration(&mut parser, http_bind, dds.as_ref()),
            sign_in_domain: parser.optional("SIGN_IN_DOMAIN").map(str::to_owned),
            version: parser.version("NODE_VERSION"),
            http_bind,
            max_concurrency: parser.value("MAX_CONCURRENCY", "a number from 1 to 65536", 1, |text| {
                text.parse().ok().filter(|count| (1..=65_536).contains(count))
            }),
            request_timeout: parser.seconds("REQUEST_TIMEOUT_SECS"),
            register_interval: parser.seconds("REGISTER_INTERVAL_SECS"),
            register_max_retry: parser.value("REGISTER_MAX_RETRY", "-1 or a number of attempts", -1, |text| {
                text.parse().ok().filter(|retries| *retries >= -1)
            }),
            heartbeat_ratios: (low.min(high), low.max(high)),
            heartbeat_coalesce: parser.milliseconds("HEARTBEAT_JITTER_MS"),
            poll_backoff: (poll_min.min(poll_max), poll_min.max(poll_max)),
            token_safety_ratio: parser.ratio("TOKEN_SAFETY_RATIO"),
            token_max_retries: parser.number("TOKEN_REAUTH_MAX_RETRIES", "a number of repeats", 3),
            token_jitter: parser.milliseconds("TOKEN_REAUTH_JITTER_MS"),
            drain_timeout: parser.duration("DRAIN_TIMEOUT"),
            plugin_init_timeout: parser.duration_above_zero("PLUGIN_INIT_TIMEOUT"),
            cancel_grace: parser.duration("CANCEL_GRACE"),
            disk_free_min: parser.size("DISK_FREE_MIN"),
            scratch_dir: parser.scratch_dir(),
            state_dir: parser.state_dir(),
            outbox_max: parser.value("OUTBOX_MAX", "a number from 1 to 1000000", 1, |text| {
                text.parse().ok().filter(|count| (1..=1_000_000).contains(count))
            }),
            client_id: parser
                .header_text("CLIENT_ID")
                .unwrap_or_else(|| format!("runner-host/{}", uuid::Uuid::new_v4())),
            transfer_stall: parser.duration_above_zero("TRANSFER_STALL_TIMEOUT"),
            transfer_patience: parser.duration("TRANSFER_PATIENCE"),
            memory_budget: parser.size_above_zero("MEMORY_BUDGET"),
            unpack_files_max: parser.number("UNPACK_FILES_MAX", "a whole number", 0),
            unpack_bytes_max: parser.size_above_zero("UNPACK_BYTES_MAX"),
            unpack_ratio_max: parser.number("UNPACK_RATIO_MAX", "a whole number", 0),
            domain_hosts: parser.hosts("DOMAIN_HOSTS"),
            transport,
            noop: parser.flag("ENABLE_NOOP").then_some(noop_sleep),
            dms: dms.unwrap_or_else(placeholder),
            dds: dds.unwrap_or_else(placeholder),
            reg_secret: given.remove("REG_SECRET").map(|(secret, _)| secret).unwrap_or_default(),
            key: key.unwrap_or_else(|| NodeKey::generate().0),
            warnings: Vec::new(),
        };
        (built, parser)
    }
}

/// What is wrong with single values, and what counts in the place of others, for who shows them all.
#[must_use]
pub fn remarks(layers: &Layers, secrets: &Secrets) -> (Vec<Remark>, Vec<Remark>) {
    let (_, parser) = HostConfig::examine(layers, secrets);
    let mut mistakes = parser.mistakes;
    mistakes.extend(folder_remarks(layers));
    (mistakes, parser.warnings)
}

/// `PLUGIN_INIT_TIMEOUT` alone, for commands that load plugins without a node's configuration.
///
/// # Errors
/// One line when its value is no duration.
pub fn plugin_init_timeout(layers: &Layers) -> Result<Duration, Mistakes> {
    let mut parser = Parser::new(layers);
    let limit = parser.duration_above_zero("PLUGIN_INIT_TIMEOUT");
    parser.end(limit)
}

/// What is wrong with the folders of a node as they are now, a line each. What [`HostConfig::build`] cannot
/// know: they are another matter once a node has made them.
#[must_use]
pub fn folder_mistakes(layers: &Layers) -> Vec<String> {
    parser::lines(&folder_remarks(layers))
}

fn folder_remarks(layers: &Layers) -> Vec<Remark> {
    let mut parser = Parser::new(layers);
    let (scratch, state) = (parser.scratch_dir(), parser.state_dir());
    let named = parser.mistakes.is_empty();
    // One that cannot even be named is a mistake already.
    parser.mistakes.clear();
    parser.look_at_folder("SCRATCH_DIR", &scratch);
    parser.look_at_own_folder();
    // What a command has chosen for its own node is its own business.
    if named && parser.origin("STATE_DIR") != Origin::Command {
        parser.look_at_folder("STATE_DIR", &state);
        if let Some(trouble) = places::clash(&scratch, &state) {
            parser.mistake("STATE_DIR", trouble);
        }
    }
    parser.mistakes
}

/// `STATE_DIR` alone, for commands that look at a node's state without its configuration.
///
/// # Errors
/// One line when it is unset and there is no home folder.
pub fn state_dir(layers: &Layers) -> Result<PathBuf, Mistakes> {
    let mut parser = Parser::new(layers);
    let dir = parser.state_dir();
    parser.end(dir)
}

impl Parser<'_> {
    fn state_dir(&mut self) -> PathBuf {
        if let Some(dir) = self.optional("STATE_DIR") {
            return PathBuf::from(dir);
        }
        // An empty or relative one counts as unset, as its specification says.
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
}

/// How the network is reached, for commands that need no more of the configuration.
///
/// # Errors
/// With all mistakes in these settings.
pub fn transport_settings(layers: &Layers) -> Result<transport::Config, Mistakes> {
    let mut parser = Parser::new(layers);
    let config = transport(&mut parser);
    parser.end(config)
}

fn transport(parser: &mut Parser<'_>) -> transport::Config {
    let roots = parser.optional("CA_BUNDLE").map(|path| (path, Roots::with_bundle(Path::new(path))));
    let roots = match roots {
        Some((_, Ok(roots))) => roots,
        Some((path, Err(why))) => {
            parser.mistake("CA_BUNDLE", format_args!("{path}: {why}"));
            Roots::default()
        }
        None => Roots::default(),
    };
    let mut proxy = |name: &str| {
        let url = parser.optional(name)?;
        let trouble = Proxies::check(url).map_err(str::to_owned).err().or_else(|| places::proxy_trouble(url));
        match trouble {
            None => Some(url),
            Some(trouble) => {
                parser.mistake(name, trouble);
                None
            }
        }
    };
    let (http, https, all) = (proxy("HTTP_PROXY"), proxy("HTTPS_PROXY"), proxy("ALL_PROXY"));
    if http.or(https).or(all).is_some() {
        parser.look_at_unproxied("NO_PROXY");
    }
    let proxies = Proxies::new(http, https, all, parser.optional("NO_PROXY").unwrap_or_default());
    let allow_insecure_http = parser.flag("ALLOW_INSECURE_HTTP");
    transport::Config { allow_insecure_http, roots, proxies, ..transport::Config::default() }
}

fn placeholder() -> Url {
    Url::parse("http://127.0.0.1").expect("a constant URL")
}

/// Below the system's temporary folder, a folder per user: others must not be able to claim it, see
/// [`own_scratch_dir`].
#[must_use]
pub fn default_scratch_dir() -> PathBuf {
    #[cfg(unix)]
    let user = rustix::process::geteuid().as_raw().to_string();
    #[cfg(not(unix))]
    let user = std::env::var("USERNAME").unwrap_or_else(|_| "user".to_owned());
    std::env::temp_dir().join(format!("runner-host-{user}"))
}

/// [`default_scratch_dir`], made for this user alone. Once it is ours, nobody can put another in its place: that is
/// what the sticky bit of a temporary folder is for.
///
/// # Errors
/// One line when somebody else was quicker.
pub fn own_scratch_dir() -> Result<PathBuf, Mistakes> {
    let dir = default_scratch_dir();
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    // It may be there; why it cannot be made is told when it is used.
    let _ = builder.create(&dir);
    match places::foreign_trouble(&dir) {
        Some(trouble) => Err(Mistakes(vec![format!("SCRATCH_DIR: {trouble}")])),
        None => Ok(dir),
    }
}
