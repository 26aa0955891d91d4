//! Reads flags and environment into one checked [`HostConfig`]; reports all mistakes at once.
//!
//! Nothing here talks to the network, and nothing talks to the network before this has succeeded.

mod keys;
mod secrets;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use secrecy::{ExposeSecret, SecretString};
use url::Url;

pub use keys::{KEYS, Key, Layers, Origin, duration};
pub use secrets::{SECRET_VARIABLES, Secrets};

use crate::auth::NodeKey;

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
    /// `NODE_URL` is set; callback registration does not exist yet.
    pub node_url: Option<Url>,
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
    /// Identifies the node to domain servers.
    pub client_id: String,
    /// Domain servers the node may talk to; empty: any.
    pub domain_hosts: Vec<String>,
    /// Plain http beyond loopback.
    pub allow_insecure_http: bool,
    /// Load the packaged noop plugin, with its sleep in seconds.
    pub noop: Option<f64>,
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
        let mut parser = keys::Parser { layers, mistakes: Vec::new() };
        for key in KEYS.iter().filter(|key| key.required) {
            let missing = if key.secret { secrets.get(key.name).is_none() } else { layers.get(key).0.is_none() };
            if missing {
                parser.mistakes.push(format!("{} is not set: {}", key.name, key.help));
            }
        }
        let (dms, dds) = (parser.url("DMS_BASE_URL"), parser.url("DDS_BASE_URL"));
        let allow_insecure_http = parser.flag("ALLOW_INSECURE_HTTP");
        let client = crate::transport::Policy { allow_insecure_http };
        for (name, url) in [("DMS_BASE_URL", &dms), ("DDS_BASE_URL", &dds)] {
            if let Some(Err(err)) = url.as_ref().map(|url| client.check(url)) {
                parser.mistakes.push(format!("{name}: {err}"));
            }
        }
        let key = secrets.get("SECP256K1_PRIVHEX").map(|hex| NodeKey::from_hex(hex.expose_secret().trim()));
        if let Some(Err(err)) = &key {
            parser.mistakes.push(format!("SECP256K1_PRIVHEX: {err}"));
        }
        let reg_secret = secrets.get("REG_SECRET").map(|secret| secret.expose_secret().trim().to_owned());
        let (low, high) = (parser.ratio("HEARTBEAT_MIN_RATIO"), parser.ratio("HEARTBEAT_MAX_RATIO"));
        let poll_min = parser.number("POLL_BACKOFF_MS_MIN", "milliseconds", 0);
        let poll_max = parser.number("POLL_BACKOFF_MS_MAX", "milliseconds", 0);
        let noop_sleep = parser.value("NOOP_SLEEP_SECS", "seconds", 0.0, |text| {
            text.parse::<f64>().ok().filter(|secs| Duration::try_from_secs_f64(*secs).is_ok())
        });
        let built = Self {
            node_url: parser.url("NODE_URL"),
            version: node_version(parser.optional("NODE_VERSION")),
            http_bind: parser.address("HTTP_BIND"),
            max_concurrency: parser.value("MAX_CONCURRENCY", "a number above 0", 1, |text| {
                text.parse().ok().filter(|count| (1..=65_536).contains(count))
            }),
            request_timeout: Duration::from_secs(parser.number("REQUEST_TIMEOUT_SECS", "seconds", 60_u64).max(1)),
            register_interval: Duration::from_secs(parser.number("REGISTER_INTERVAL_SECS", "seconds", 120_u64).max(1)),
            register_max_retry: parser.value("REGISTER_MAX_RETRY", "-1 or a number of attempts", -1, |text| {
                text.parse().ok().filter(|retries| *retries >= -1)
            }),
            heartbeat_ratios: (low.min(high), low.max(high)),
            heartbeat_coalesce: Duration::from_millis(parser.number("HEARTBEAT_JITTER_MS", "milliseconds", 250)),
            poll_backoff: (
                Duration::from_millis(u64::min(poll_min, poll_max)),
                Duration::from_millis(u64::max(poll_min, poll_max)),
            ),
            token_safety_ratio: parser.ratio("TOKEN_SAFETY_RATIO"),
            token_max_retries: parser.number("TOKEN_REAUTH_MAX_RETRIES", "a number of repeats", 3),
            token_jitter: Duration::from_millis(parser.number("TOKEN_REAUTH_JITTER_MS", "milliseconds", 500)),
            drain_timeout: parser.duration("DRAIN_TIMEOUT"),
            plugin_init_timeout: parser.duration("PLUGIN_INIT_TIMEOUT"),
            cancel_grace: parser.duration("CANCEL_GRACE"),
            scratch_dir: parser.optional("SCRATCH_DIR").map_or_else(default_scratch_dir, PathBuf::from),
            state_dir: parser.state_dir(),
            outbox_max: parser.value("OUTBOX_MAX", "a number above 0", 1, |text| {
                text.parse().ok().filter(|count| (1..=1_000_000).contains(count))
            }),
            client_id: parser.optional("CLIENT_ID").unwrap_or_else(|| format!("runner-host/{}", uuid::Uuid::new_v4())),
            domain_hosts: host_list(parser.optional("DOMAIN_HOSTS")),
            allow_insecure_http,
            noop: parser.flag("ENABLE_NOOP").then_some(noop_sleep),
            dms: dms.unwrap_or_else(placeholder),
            dds: dds.unwrap_or_else(placeholder),
            reg_secret: SecretString::from(reg_secret.unwrap_or_default()),
            key: match key {
                Some(Ok(key)) => key,
                _ => NodeKey::generate().0,
            },
        };
        // The placeholders above stand only where a mistake was noted.
        if parser.mistakes.is_empty() { Ok(built) } else { Err(Mistakes(parser.mistakes)) }
    }
}

/// `PLUGIN_INIT_TIMEOUT` alone, for commands that load plugins without a node's configuration.
///
/// # Errors
/// One line when its value is no duration.
pub fn plugin_init_timeout(layers: &Layers) -> Result<Duration, Mistakes> {
    let mut parser = keys::Parser { layers, mistakes: Vec::new() };
    let limit = parser.duration("PLUGIN_INIT_TIMEOUT");
    if parser.mistakes.is_empty() { Ok(limit) } else { Err(Mistakes(parser.mistakes)) }
}

/// `STATE_DIR` alone, for commands that look at a node's state without its configuration.
///
/// # Errors
/// One line when it is unset and there is no home folder.
pub fn state_dir(layers: &Layers) -> Result<PathBuf, Mistakes> {
    let mut parser = keys::Parser { layers, mistakes: Vec::new() };
    let dir = parser.state_dir();
    if parser.mistakes.is_empty() { Ok(dir) } else { Err(Mistakes(parser.mistakes)) }
}

impl keys::Parser<'_> {
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
            self.mistakes.push("STATE_DIR is not set, and there is no home folder to put its default in".to_owned());
            PathBuf::new()
        })
    }
}

fn placeholder() -> Url {
    Url::parse("http://127.0.0.1").expect("a constant URL")
}

/// `v1.2.3` becomes `1.2.3`; what is no version becomes the host's own.
fn node_version(text: Option<String>) -> String {
    let own = env!("CARGO_PKG_VERSION").to_owned();
    let Some(text) = text else { return own };
    let bare = text.strip_prefix(['v', 'V']).unwrap_or(&text);
    if semver::Version::parse(bare).is_ok() {
        return bare.to_owned();
    }
    tracing::warn!(found = %text, using = %own, "NODE_VERSION is not a semantic version");
    own
}

fn host_list(text: Option<String>) -> Vec<String> {
    let text = text.unwrap_or_default();
    text.split(',').map(|host| host.trim().to_ascii_lowercase()).filter(|host| !host.is_empty()).collect()
}

/// Below the system's temporary folder, a folder per user: others must not be able to claim it.
#[must_use]
pub fn default_scratch_dir() -> PathBuf {
    #[cfg(unix)]
    let user = rustix::process::geteuid().as_raw().to_string();
    #[cfg(not(unix))]
    let user = std::env::var("USERNAME").unwrap_or_else(|_| "user".to_owned());
    std::env::temp_dir().join(format!("runner-host-{user}"))
}
