//! Every setting: its name, what it does, its default, how it is checked. `config show`, the help
//! and the parser read this one table.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use url::Url;

/// One setting.
pub struct Key {
    /// Environment variable.
    pub name: &'static str,
    /// Used when unset or blank; `None`: there is none.
    pub default: Option<&'static str>,
    /// The node cannot start without it.
    pub required: bool,
    /// Never printed.
    pub secret: bool,
    /// One line for people.
    pub help: &'static str,
}

const fn key(name: &'static str, default: Option<&'static str>, help: &'static str) -> Key {
    Key { name, default, required: false, secret: false, help }
}

const fn required(name: &'static str, secret: bool, help: &'static str) -> Key {
    Key { name, default: None, required: true, secret, help }
}

/// All settings, in the order they are shown.
pub const KEYS: &[Key] = &[
    required("DMS_BASE_URL", false, "base URL of the task service, such as https://plane.example/v1"),
    required("DDS_BASE_URL", false, "base URL of the sign-in service"),
    required("REG_SECRET", true, "registration secret of this node"),
    required("SECP256K1_PRIVHEX", true, "private key of this node, 32 bytes of hex"),
    key("NODE_URL", None, "URL at which the sign-in service reaches this node's pages; needs HTTP_BIND to serve it"),
    key("REGISTRATION", None, "wallet or callback; callback where NODE_URL is set, else wallet"),
    key("SIGN_IN_DOMAIN", None, "the only domain sign-in messages may be for; that of DDS_BASE_URL where unset"),
    key("NODE_VERSION", None, "version announced at registration; the host's own where unset"),
    key(
        "HTTP_BIND",
        Some("127.0.0.1:8080"),
        "where /health, /ready, /status.json and the registration callback are served",
    ),
    key("MAX_CONCURRENCY", Some("1"), "tasks run at once"),
    key("REQUEST_TIMEOUT_SECS", Some("60"), "limit of one call to the control plane, in seconds"),
    key(
        "REGISTER_INTERVAL_SECS",
        Some("120"),
        "when a registration is repeated, and the pause after a refused one, in seconds",
    ),
    key("REGISTER_MAX_RETRY", Some("-1"), "failed registrations in a row before a full pause; -1: never"),
    key("HEARTBEAT_MIN_RATIO", Some("0.25"), "earliest heartbeat, as a share of the remaining lease"),
    key("HEARTBEAT_MAX_RATIO", Some("0.35"), "latest heartbeat, as a share of the remaining lease"),
    key("HEARTBEAT_JITTER_MS", Some("250"), "how long progress is gathered before a heartbeat, in milliseconds"),
    key("POLL_BACKOFF_MS_MIN", Some("1000"), "shortest pause after an empty poll, in milliseconds"),
    key("POLL_BACKOFF_MS_MAX", Some("30000"), "longest pause after an empty poll, in milliseconds"),
    key("TOKEN_SAFETY_RATIO", Some("0.75"), "share of a node token's life after which it is renewed"),
    key("TOKEN_REAUTH_MAX_RETRIES", Some("3"), "repeats of a failed login before it counts as failed"),
    key("TOKEN_REAUTH_JITTER_MS", Some("500"), "spread of login repeats and renewals, in milliseconds"),
    key("DRAIN_TIMEOUT", Some("30s"), "how long running tasks may go on after the first signal"),
    key("PLUGIN_INIT_TIMEOUT", Some("10s"), "how long a plugin may take to open and initialise"),
    key("CANCEL_GRACE", Some("10s"), "how long a cancelled runner may take to return"),
    key("SCRATCH_DIR", None, "where task directories are made; below the system's temporary folder where unset"),
    key("TRANSFER_STALL_TIMEOUT", Some("30s"), "how long a transfer may be silent before it counts as broken"),
    key("TRANSFER_PATIENCE", Some("2m"), "how long a transfer in which nothing moves is tried again"),
    key("MEMORY_BUDGET", Some("1GiB"), "most bytes of tasks' data in memory at once; objects beyond it are refused"),
    key("UNPACK_FILES_MAX", Some("65536"), "most files and folders a zip input may hold"),
    key("UNPACK_BYTES_MAX", Some("16GiB"), "most bytes a zip input may unpack to"),
    key("UNPACK_RATIO_MAX", Some("200"), "how many times its own size a zip input may unpack to, beyond 16 MiB"),
    key("DISK_FREE_MIN", Some("1GiB"), "free space below SCRATCH_DIR under which nothing new is leased; 0: any"),
    key("CLIENT_ID", None, "identifies this node to domain servers; random per start where unset"),
    key("DOMAIN_HOSTS", None, "domain servers the node may talk to, comma separated; any where unset"),
    key("ALLOW_INSECURE_HTTP", Some("false"), "allow plain http to hosts other than loopback"),
    key("ENABLE_NOOP", Some("false"), "load the packaged noop plugin as if it were listed"),
    key("NOOP_SLEEP_SECS", Some("5"), "how long a noop task takes, in seconds"),
    key("LOG_FORMAT", None, "json or text; json for `run`, text for other commands where unset"),
    key("RUST_LOG", Some("info"), "log filter"),
];

/// Where a value came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A command-line flag.
    Flag,
    /// An environment variable.
    Environment,
    /// Chosen by the command, such as `dev` for its own node.
    Command,
    /// The built-in default.
    Default,
    /// Nowhere: there is no value.
    Unset,
}

impl Origin {
    /// As shown by `config show`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Flag => "flag",
            Self::Environment => "environment",
            Self::Command => "command",
            Self::Default => "default",
            Self::Unset => "unset",
        }
    }
}

/// Raw values by name, each with its origin. Blank is unset.
#[derive(Clone, Default)]
pub struct Layers {
    values: BTreeMap<&'static str, (String, Origin)>,
}

impl Layers {
    /// What the environment says, secrets excepted.
    #[must_use]
    pub fn from_environment() -> Self {
        let mut layers = Self::default();
        for key in KEYS.iter().filter(|key| !key.secret) {
            if let Some(value) = std::env::var_os(key.name) {
                layers.set(key.name, &value.to_string_lossy(), Origin::Environment);
            }
        }
        layers
    }

    /// Sets a value over whatever a lower layer said. Blank changes nothing.
    ///
    /// # Panics
    /// When `name` is not in [`KEYS`].
    pub fn set(&mut self, name: &str, value: &str, origin: Origin) {
        let key = KEYS.iter().find(|key| key.name == name).expect("settings are named in KEYS");
        if !value.trim().is_empty() {
            self.values.insert(key.name, (value.trim().to_owned(), origin));
        }
    }

    /// Sets a value unless a layer has one already.
    pub fn set_default(&mut self, name: &str, value: &str) {
        if !self.values.contains_key(name) {
            self.set(name, value, Origin::Command);
        }
    }

    /// The effective text and where it came from.
    #[must_use]
    pub fn get(&self, key: &Key) -> (Option<&str>, Origin) {
        match (self.values.get(key.name), key.default) {
            (Some((value, origin)), _) => (Some(value), *origin),
            (None, Some(default)) => (Some(default), Origin::Default),
            (None, None) => (None, Origin::Unset),
        }
    }
}

/// Parses values and collects every mistake.
pub(super) struct Parser<'a> {
    pub(super) layers: &'a Layers,
    pub(super) mistakes: Vec<String>,
}

impl Parser<'_> {
    fn text(&self, name: &str) -> Option<&str> {
        let key = KEYS.iter().find(|key| key.name == name).expect("settings are named in KEYS");
        self.layers.get(key).0
    }

    /// The text of a setting that may be unset.
    pub(super) fn optional(&self, name: &str) -> Option<String> {
        self.text(name).map(str::to_owned)
    }

    /// A value `parse` understands; `fallback` stands in after a mistake, which is noted.
    pub(super) fn value<T>(&mut self, name: &str, expected: &str, fallback: T, parse: impl Fn(&str) -> Option<T>) -> T {
        let Some(text) = self.text(name) else { return fallback };
        if let Some(value) = parse(text) {
            return value;
        }
        let mistake = format!("{name}: expected {expected}, found {text:?}");
        self.mistakes.push(mistake);
        fallback
    }

    pub(super) fn number<T: std::str::FromStr + Copy>(&mut self, name: &str, expected: &str, fallback: T) -> T {
        self.value(name, expected, fallback, |text| text.parse().ok())
    }

    /// A ratio, clamped to 0..=1 as the contract says; not a number is a mistake.
    pub(super) fn ratio(&mut self, name: &str) -> f64 {
        let ratio = self.value(name, "a number from 0 to 1", 0.5, |text| {
            text.parse::<f64>().ok().filter(|ratio| ratio.is_finite())
        });
        ratio.clamp(0.0, 1.0)
    }

    /// Notes a mistake.
    pub(super) fn mistake(&mut self, text: String) {
        self.mistakes.push(text);
    }

    pub(super) fn flag(&mut self, name: &str) -> bool {
        self.value(name, "true or false", false, |text| match text {
            "true" => Some(true),
            "false" => Some(false),
            _ => None,
        })
    }

    pub(super) fn url(&mut self, name: &str) -> Option<Url> {
        let text = self.optional(name)?;
        match Url::parse(&text) {
            Ok(url) if matches!(url.scheme(), "http" | "https") && url.host().is_some() => {
                if url.username().is_empty() && url.password().is_none() {
                    return Some(url);
                }
                self.mistakes.push(format!("{name}: expected a URL without user or password"));
                None
            }
            _ => {
                self.mistakes.push(format!("{name}: expected an absolute http or https URL, found {text:?}"));
                None
            }
        }
    }

    pub(super) fn address(&mut self, name: &str) -> SocketAddr {
        let fallback = SocketAddr::from(([127, 0, 0, 1], 0));
        self.value(name, "an address such as 127.0.0.1:8080", fallback, |text| text.parse().ok())
    }

    /// A number of bytes above zero.
    pub(super) fn bytes(&mut self, name: &str) -> u64 {
        self.value(name, "a size above 0 such as 512MiB", 1, |text| byte_size(text).filter(|bytes| *bytes > 0))
    }

    pub(super) fn duration(&mut self, name: &str) -> Duration {
        self.value(name, "a duration such as 30s", Duration::ZERO, duration)
    }
}

/// `512MiB`, `1 GiB`, `20kB` or plain bytes.
pub(super) fn byte_size(text: &str) -> Option<u64> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let unit: u64 = match text[split..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return None,
    };
    text[..split].parse::<u64>().ok()?.checked_mul(unit)
}

/// `30s`, `1m 30s`, `500ms`, or plain seconds.
#[must_use]
pub fn duration(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let parsed: jiff::SignedDuration = text.parse().ok()?;
    Duration::try_from(parsed).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_carry_units_or_are_seconds() {
        assert_eq!(duration("30s"), Some(Duration::from_secs(30)));
        assert_eq!(duration("1m 30s"), Some(Duration::from_secs(90)));
        assert_eq!(duration("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(duration("0"), Some(Duration::ZERO));
        assert_eq!(duration("-1s"), None);
        assert_eq!(duration("soon"), None);
    }

    #[test]
    fn sizes_carry_units_or_are_bytes() {
        assert_eq!(byte_size("512MiB"), Some(512 << 20));
        assert_eq!(byte_size("1 gib"), Some(1 << 30));
        assert_eq!(byte_size("20kB"), Some(20_000));
        assert_eq!(byte_size("7"), Some(7));
        for bad in ["", "MiB", "-1", "1.5GiB", "1 parsec", "99999999999TiB"] {
            assert_eq!(byte_size(bad), None, "{bad}");
        }
    }

    #[test]
    fn blank_is_unset_everywhere() {
        let mut layers = Layers::default();
        for key in KEYS {
            layers.set(key.name, "  ", Origin::Environment);
            assert_eq!(layers.get(key).0, key.default, "{}", key.name);
        }
    }
}
