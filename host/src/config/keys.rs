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
    key("NODE_URL", None, "public URL of this node (callback registration comes in a later version)"),
    key("NODE_VERSION", None, "version announced at registration; the host's own where unset"),
    key("HTTP_BIND", Some("127.0.0.1:8080"), "where /health, /ready and /status.json are served"),
    key("MAX_CONCURRENCY", Some("1"), "tasks run at once"),
    key("REQUEST_TIMEOUT_SECS", Some("60"), "limit of one call to the control plane, in seconds"),
    key("REGISTER_INTERVAL_SECS", Some("120"), "pause between registration attempts after a refusal, in seconds"),
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
    key(
        "STATE_DIR",
        None,
        "what must survive a restart; runner-host below $XDG_STATE_HOME or ~/.local/state where unset",
    ),
    key("OUTBOX_MAX", Some("1000"), "reports not yet accepted from which on nothing new is leased"),
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

    pub(super) fn duration(&mut self, name: &str) -> Duration {
        self.value(name, "a duration such as 30s", Duration::ZERO, duration)
    }
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
    fn blank_is_unset_everywhere() {
        let mut layers = Layers::default();
        for key in KEYS {
            layers.set(key.name, "  ", Origin::Environment);
            assert_eq!(layers.get(key).0, key.default, "{}", key.name);
        }
    }
}
