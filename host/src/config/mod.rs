//! Reads flags and environment into one checked [`HostConfig`]; reports all mistakes at once.
//!
//! Nothing here talks to the network, and nothing talks to the network before this has succeeded.

mod keys;
mod node_url;
mod secrets;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use secrecy::{ExposeSecret, SecretString};
use url::Url;

pub use keys::{KEYS, Key, Layers, Origin, duration};
pub use secrets::{SECRET_VARIABLES, Secrets};

use crate::auth::{Form, NodeKey};

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
    /// Free bytes there under which nothing new is leased; 0: any.
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
        let http_bind = parser.address("HTTP_BIND");
        let built = Self {
            registration: node_url::registration(&mut parser, http_bind, dds.as_ref()),
            sign_in_domain: parser.optional("SIGN_IN_DOMAIN"),
            version: node_version(parser.optional("NODE_VERSION")),
            http_bind,
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
            disk_free_min: parser.value("DISK_FREE_MIN", "a size such as 1GiB, or 0", 0, keys::byte_size),
            scratch_dir: parser.optional("SCRATCH_DIR").map_or_else(default_scratch_dir, PathBuf::from),
            client_id: parser.optional("CLIENT_ID").unwrap_or_else(|| format!("runner-host/{}", uuid::Uuid::new_v4())),
            transfer_stall: parser.value(
                "TRANSFER_STALL_TIMEOUT",
                "a duration above 0 such as 30s",
                Duration::ZERO,
                |text| duration(text).filter(|limit| !limit.is_zero()),
            ),
            transfer_patience: parser.duration("TRANSFER_PATIENCE"),
            memory_budget: parser.bytes("MEMORY_BUDGET"),
            unpack_files_max: parser.number("UNPACK_FILES_MAX", "a number", 0),
            unpack_bytes_max: parser.bytes("UNPACK_BYTES_MAX"),
            unpack_ratio_max: parser.number("UNPACK_RATIO_MAX", "a number", 0),
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
