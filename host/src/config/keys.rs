//! The table of all settings: names, description, default, and the place of the value.
//!
//! The parser, the configuration file, `config show`, the help and the documents read this table. A new setting is
//! one row here, and one field in the `Config` of the module that uses it.

use super::{HostConfig, parser::Parser};
use crate::{engine, model::Budget, observe::StatusPage, outbox};

/// Reads the setting of this name and stores its value in the part of the module that uses it.
type Fill = fn(&mut HostConfig, &mut Parser<'_>, &str);

/// One setting.
pub struct Key {
    /// Environment variable.
    pub name: &'static str,
    /// Its place in a configuration file. Dots separate tables.
    pub file: &'static str,
    /// The kind of its value.
    pub kind: Kind,
    /// The default, used if the setting is unset or blank. `None`: there is none.
    pub default: Option<&'static str>,
    /// Whether the node needs it to start.
    pub required: bool,
    /// One line for people.
    pub help: &'static str,
    /// Reads it. Runs in the order of the table.
    pub(super) fill: Fill,
}

/// The kind of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Any text on one line.
    Text,
    /// Text that is never printed and never accepted on the command line.
    Secret,
    /// An absolute http or https URL.
    Url,
    /// The URL of a proxy. A user and password in it are never printed.
    Proxy,
    /// An IP address with a port.
    Address,
    /// A file or folder.
    Path,
    /// An integer.
    Whole,
    /// A finite number.
    Number,
    /// `true` or `false`.
    Switch,
    /// A time with its unit.
    Duration,
    /// A number of bytes with its unit.
    Size,
    /// Comma-separated words. In a file, an array.
    List,
}

impl Kind {
    /// Its name in the documents.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Secret => "secret",
            Self::Url | Self::Proxy => "URL",
            Self::Address => "address",
            Self::Path => "path",
            Self::Whole => "whole number",
            Self::Number => "number",
            Self::Switch => "true or false",
            Self::Duration => "duration",
            Self::Size => "size",
            Self::List => "list",
        }
    }
}

impl Key {
    /// Whether its value is never printed.
    #[must_use]
    pub fn is_secret(&self) -> bool {
        self.kind == Kind::Secret
    }

    /// The setting of this environment variable.
    #[must_use]
    pub fn find(name: &str) -> Option<&'static Self> {
        KEYS.iter().find(|key| key.name == name)
    }

    /// Whether it disables a protection. Such a setting is never suggested.
    #[must_use]
    pub fn weakens_security(&self) -> bool {
        self.name.starts_with("ALLOW_")
    }

    /// The names that may be suggested for a mistyped one.
    pub fn suggested_names() -> impl Iterator<Item = &'static str> {
        KEYS.iter().filter(|key| !key.weakens_security()).map(|key| key.name)
    }

    /// The setting that names a file with this secret.
    #[must_use]
    pub fn file_variant(&self) -> Option<&'static Self> {
        KEYS.iter().find(|key| key.name.strip_suffix("_FILE") == Some(self.name))
    }

    /// The same setting under a name that other programs use, such as `https_proxy`.
    #[must_use]
    pub fn lower_case(&self) -> Option<String> {
        self.name.ends_with("_PROXY").then(|| self.name.to_ascii_lowercase())
    }
}

const fn key(
    name: &'static str,
    file: &'static str,
    kind: Kind,
    default: Option<&'static str>,
    help: &'static str,
    fill: Fill,
) -> Key {
    Key { name, file, kind, default, required: false, help, fill }
}

const fn required(name: &'static str, file: &'static str, kind: Kind, help: &'static str, fill: Fill) -> Key {
    Key { name, file, kind, default: None, required: true, help, fill }
}

/// For a setting that is read together with another one, or before the node's configuration.
const ELSEWHERE: Fill = |_, _, _| {};

use Kind::{Address, Duration, List, Number, Path, Proxy, Secret, Size, Switch, Text, Url, Whole};

/// All settings, in the order of display.
#[rustfmt::skip] // a row is two lines: the description, and the place of the value
pub const KEYS: &[Key] = &[
    required("DMS_BASE_URL", "source.dms.base_url", Url, "base URL of the task service, such as https://plane.example/v1",
        |c, p, name| c.dms.base = p.url(name).unwrap_or_else(super::placeholder)),
    required("DDS_BASE_URL", "dds.base_url", Url, "base URL of the sign-in service",
        |c, p, name| c.auth.dds = p.url(name).unwrap_or_else(super::placeholder)),
    required("REG_SECRET", "dds.reg_secret", Secret, "registration secret of this node",
        |c, p, name| c.auth.reg_secret = p.secret(name)),
    key("REG_SECRET_FILE", "dds.reg_secret_file", Path, None, "file that contains the registration secret",
        ELSEWHERE),
    required("SECP256K1_PRIVHEX", "dds.secp256k1_privhex", Secret, "private key of this node, 32 bytes of hex",
        |c, p, name| p.node_key(name, &mut c.auth.key)),
    key("SECP256K1_PRIVHEX_FILE", "dds.secp256k1_privhex_file", Path, None, "file that contains the private key",
        ELSEWHERE),
    key("NODE_URL", "node.url", Url, None, "URL at which the sign-in service calls this node's pages; HTTP_BIND must serve it",
        ELSEWHERE),
    key("REGISTRATION", "dds.registration", Text, None, "wallet or callback; if unset: callback with NODE_URL, otherwise wallet",
        ELSEWHERE),
    key("SIGN_IN_DOMAIN", "dds.sign_in_domain", Text, None, "the only domain that sign-in messages may name; if unset: the domain of DDS_BASE_URL",
        |c, p, name| c.auth.sign_in_domain = p.optional(name).map(str::to_owned)),
    key("NODE_VERSION", "node.version", Text, None, "version announced at registration; if unset: the version of the host",
        |c, p, name| c.auth.version = p.version(name)),
    key("HTTP_BIND", "http.bind", Address, Some("127.0.0.1:8080"), "address that serves /health, /ready, /status.json and the registration callback",
        |c, p, name| c.observe.status_page = StatusPage::Enabled { listen: p.address(name) }),
    key("READY", "http.ready", Text, Some("any"), "any: /ready is 200 while one control plane can give work; all: while every one can",
        |c, p, name| c.observe.ready_when = p.ready_when(name)),
    key("MAX_CONCURRENCY", "engine.max_concurrency", Whole, Some("1"), "number of concurrent tasks",
        |c, p, name| c.engine.slots = p.count(name, engine::SLOTS_MAX)),
    key("REQUEST_TIMEOUT_SECS", "source.dms.request_timeout_secs", Whole, Some("60"), "time limit of one call to the control plane, in seconds; at least 1",
        |c, p, name| {
            c.dms.request_timeout = p.seconds(name);
            c.auth.request_timeout = c.dms.request_timeout;
        }),
    key("REGISTER_INTERVAL_SECS", "dds.register_interval_secs", Whole, Some("120"), "interval of registrations, and the pause after a refused one, in seconds; at least 1",
        |c, p, name| c.auth.register_interval = p.seconds(name)),
    key("REGISTER_MAX_RETRY", "dds.register_max_retry", Whole, Some("-1"), "consecutive failed registrations before a pause of one interval; -1: never",
        |c, p, name| c.auth.register_max_retry = p.retries(name)),
    key("HEARTBEAT_MIN_RATIO", "heartbeat.min_ratio", Number, Some("0.25"), "earliest heartbeat, as a share of the remaining lease",
        |c, p, name| c.session.min_ratio = p.ratio(name)),
    key("HEARTBEAT_MAX_RATIO", "heartbeat.max_ratio", Number, Some("0.35"), "latest heartbeat, as a share of the remaining lease",
        |c, p, name| c.session.max_ratio = p.ratio(name)),
    key("HEARTBEAT_JITTER_MS", "heartbeat.coalesce_ms", Whole, Some("250"), "time that progress waits for more progress before a heartbeat, in milliseconds",
        |c, p, name| c.session.coalesce = p.milliseconds(name)),
    key("POLL_BACKOFF_MS_MIN", "source.dms.poll_backoff_ms.min", Whole, Some("1000"), "shortest pause after an empty poll, in milliseconds",
        |c, p, name| c.engine.poll_backoff.0 = p.milliseconds(name)),
    key("POLL_BACKOFF_MS_MAX", "source.dms.poll_backoff_ms.max", Whole, Some("30000"), "longest pause after an empty poll, in milliseconds",
        |c, p, name| c.engine.poll_backoff.1 = p.milliseconds(name)),
    key("TOKEN_SAFETY_RATIO", "dds.token.safety_ratio", Number, Some("0.75"), "share of a node token's lifetime after which it is renewed",
        |c, p, name| c.auth.token_safety_ratio = p.ratio(name)),
    key("TOKEN_REAUTH_MAX_RETRIES", "dds.token.max_retries", Whole, Some("3"), "retries of a failed login before callers get an error",
        |c, p, name| c.auth.token_max_retries = p.number(name, "a number of repeats", 3)),
    key("TOKEN_REAUTH_JITTER_MS", "dds.token.jitter_ms", Whole, Some("500"), "jitter of login retries and renewals, in milliseconds",
        |c, p, name| c.auth.token_jitter = p.milliseconds(name)),
    key("DRAIN_TIMEOUT", "engine.drain_timeout", Duration, Some("30s"), "time that running tasks may continue after the first signal",
        |c, p, name| c.engine.drain_timeout = p.duration(name)),
    key("PLUGIN_INIT_TIMEOUT", "plugins.init_timeout", Duration, Some("10s"), "time limit for a plugin to open and initialise",
        |c, p, name| c.plugins.init_timeout = p.duration_above_zero(name)),
    key("CANCEL_GRACE", "engine.cancel_grace", Duration, Some("10s"), "time limit for a cancelled runner to return",
        |c, p, name| c.engine.cancel_grace = p.duration(name)),
    key("TASK_TIME_LIMIT", "engine.task_time_limit", Duration, None, "longest time of a run, if plugins.toml sets none for its capability; if unset: no limit",
        |c, p, name| c.engine.time_limit = p.optional_duration(name)),
    key("SCRATCH_DIR", "storage.scratch_dir", Path, None, "folder of the task directories; if unset: a folder below the system's temporary folder",
        |c, p, _| c.storage.scratch_dir = p.scratch_dir()),
    key("DISK_FREE_MIN", "storage.disk_free_min", Size, Some("1GiB"), "minimum free space below SCRATCH_DIR; with less, nothing new is leased; 0: no minimum",
        |c, p, name| c.storage.disk_free_min = p.size(name)),
    key("STATE_DIR", "state.dir", Path, None, "folder of the data that must survive a restart, one per node; if unset: runner-host below $XDG_STATE_HOME or ~/.local/state",
        |c, p, _| c.outbox.state_dir = p.state_dir()),
    key("OUTBOX_MAX", "outbox.max", Whole, Some("1000"), "number of waiting reports of one control plane at which nothing new is leased from it",
        |c, p, name| c.outbox.max = p.count(name, outbox::REPORTS_MAX)),
    key("OUTBOX_BYTES_MAX", "outbox.bytes_max", Size, Some("256MiB"), "size of the waiting reports of one control plane at which nothing new is leased from it",
        |c, p, name| c.outbox.bytes_max = p.size_above_zero(name)),
    key("TRANSFER_STALL_TIMEOUT", "storage.stall_timeout", Duration, Some("30s"), "time without progress after which a transfer counts as broken",
        |c, p, name| {
            c.storage.domain.stall = p.duration_above_zero(name);
            // A missing answer is a stall too.
            c.storage.domain.request_timeout = c.storage.domain.stall;
        }),
    key("TRANSFER_PATIENCE", "storage.patience", Duration, Some("2m"), "retry limit for a transfer without progress",
        |c, p, name| c.storage.domain.retry_limit = p.duration(name)),
    key("MEMORY_BUDGET", "storage.memory_budget", Size, Some("1GiB"), "maximum bytes of task data in memory; a larger object is refused",
        |c, p, name| c.storage.domain.budget = Budget::new(p.size_above_zero(name))),
    key("UNPACK_FILES_MAX", "storage.unpack.files_max", Whole, Some("65536"), "maximum number of files and folders in a zip input",
        |c, p, name| c.storage.domain.unpack.files = p.number(name, "a whole number", 0)),
    key("UNPACK_BYTES_MAX", "storage.unpack.bytes_max", Size, Some("16GiB"), "maximum unpacked size of a zip input",
        |c, p, name| c.storage.domain.unpack.bytes = p.size_above_zero(name)),
    key("UNPACK_RATIO_MAX", "storage.unpack.ratio_max", Whole, Some("200"), "maximum unpacked size of a zip input as a multiple of its size; not checked up to 16 MiB",
        |c, p, name| c.storage.domain.unpack.ratio = p.number(name, "a whole number", 0)),
    key("CLIENT_ID", "storage.client_id", Text, None, "id of this node for domain servers; if unset: random at each start",
        |c, p, name| p.header_text(name, &mut c.storage.domain.client_id)),
    key("DOMAIN_HOSTS", "storage.domain_hosts", List, None, "domain servers that the node may call, comma separated; if unset: any for posemesh, none for node-runtime",
        |c, p, name| c.storage.domain.domain_hosts.0 = p.hosts(name)),
    key("ALLOW_INSECURE_HTTP", "transport.allow_insecure_http", Switch, Some("false"), "allow plain http to hosts other than loopback",
        |c, p, name| c.transport.allow_insecure_http = p.flag(name)),
    key("CA_BUNDLE", "transport.ca_bundle", Path, None, "PEM file of certificate authorities to trust in addition to the system's",
        |c, p, name| c.transport.roots = p.roots(name)),
    key("ALLOW_CORE_DUMPS", "node.allow_core_dumps", Switch, Some("false"), "allow core dumps and debuggers, which show the private key and the registration secret (Linux)",
        |c, p, name| c.observe.allow_core_dumps = p.flag(name)),
    key("ALLOW_WRITABLE_PLUGINS", "plugins.allow_writable", Switch, Some("false"), "load plugins that everyone may write to, with a warning",
        |c, p, name| c.plugins.allow_writable = p.flag(name)),
    key("HTTPS_PROXY", "transport.https_proxy", Proxy, None, "proxy for https, such as http://proxy.example:3128",
        ELSEWHERE),
    key("HTTP_PROXY", "transport.http_proxy", Proxy, None, "proxy for plain http",
        ELSEWHERE),
    key("ALL_PROXY", "transport.all_proxy", Proxy, None, "proxy if the two above are unset",
        ELSEWHERE),
    key("NO_PROXY", "transport.no_proxy", List, None, "hosts, domains and networks that need no proxy, comma separated; *: all; loopback never uses a proxy",
        |c, p, _| c.transport.proxies = p.proxies()),
    key("ENABLE_NOOP", "noop.enabled", Switch, Some("false"), "load the packaged noop plugin as if it were listed",
        |c, p, name| c.plugins.noop = p.flag(name)),
    key("NOOP_SLEEP_SECS", "noop.sleep_secs", Number, Some("5"), "duration of a noop task, in seconds",
        |c, p, name| c.plugins.noop_sleep_secs = p.fractional_seconds(name)),
    key("LOG_FORMAT", "telemetry.log_format", Text, None, "json or text; if unset: json for `run`, text for other commands",
        |_, p, _| p.check_log_format()),
    key("RUST_LOG", "telemetry.log_filter", Text, Some("info"), "log filter",
        ELSEWHERE),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn setting_names_and_file_keys_are_unique() {
        assert_eq!(KEYS.iter().map(|key| key.name).collect::<BTreeSet<_>>().len(), KEYS.len());
        assert_eq!(KEYS.iter().map(|key| key.file).collect::<BTreeSet<_>>().len(), KEYS.len());
        for (key, other) in KEYS.iter().flat_map(|key| KEYS.iter().map(move |other| (key, other))) {
            assert!(!other.file.starts_with(&format!("{}.", key.file)), "{} is a table of {}", key.file, other.file);
        }
    }

    #[test]
    fn every_secret_may_come_from_a_file() {
        for key in KEYS.iter().filter(|key| key.is_secret()) {
            assert_eq!(key.file_variant().map(|variant| variant.kind), Some(Path), "{}", key.name);
        }
    }
}
