//! Parses texts to values and notes every mistake.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use secrecy::{ExposeSecret as _, SecretString};
use url::Url;

use super::{
    Mistakes,
    folders_and_hosts::host_problem,
    keys::Key,
    layers::{Layers, Origin},
};
use crate::{auth::NodeKey, model::parse_duration};

/// The longest duration. It is longer than any wait. Longer durations could overflow clocks.
const SECS_MAX: u64 = 10 * 366 * 24 * 60 * 60;

/// A remark about the configuration: one line, without a secret.
#[derive(Clone, Debug)]
pub struct Remark {
    /// The setting, if the remark is about one.
    pub setting: Option<&'static str>,
    /// The place where the operator wrote it.
    place: String,
    /// What was expected and found, or what is used instead.
    pub what: String,
}

impl Remark {
    /// A remark that belongs to no shown setting.
    pub(super) fn plain(line: impl Into<String>) -> Self {
        Self { setting: None, place: String::new(), what: line.into() }
    }

    /// A remark about a value that is not in [`super::KEYS`]. The place ends with its name.
    pub(super) fn elsewhere(place: String, what: impl Into<String>) -> Self {
        Self { setting: None, place, what: what.into() }
    }

    /// Whether the remark is about the value of this name.
    #[must_use]
    pub fn is_about(&self, name: &str) -> bool {
        self.setting == Some(name) || (self.setting.is_none() && self.place.ends_with(&format!(": {name}")))
    }

    /// A remark about a setting, with a special text for its place.
    pub fn at(setting: &'static str, place: impl Into<String>, what: impl std::fmt::Display) -> Self {
        Self { setting: Some(setting), place: place.into(), what: what.to_string() }
    }
}

impl std::fmt::Display for Remark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.place.is_empty() { f.write_str(&self.what) } else { write!(f, "{}: {}", self.place, self.what) }
    }
}

/// Parses values and collects every mistake.
pub(super) struct Parser<'a> {
    pub(super) layers: &'a Layers,
    pub(super) mistakes: Vec<Remark>,
    pub(super) warnings: Vec<Remark>,
    /// Each with its origin.
    pub(super) secrets: BTreeMap<&'static str, (SecretString, String)>,
}

impl<'a> Parser<'a> {
    pub(super) fn new(layers: &'a Layers) -> Self {
        Self { layers, mistakes: Vec::new(), warnings: Vec::new(), secrets: BTreeMap::new() }
    }

    fn found(&self, name: &str) -> (&'static Key, Option<&'a str>, Origin) {
        let key = Key::find(name).expect("settings are named in KEYS");
        let (text, origin) = self.layers.get(key);
        (key, text, origin)
    }

    pub(super) fn origin(&self, name: &str) -> Origin {
        self.found(name).2
    }

    /// How a mistake in `name` begins.
    pub(super) fn place(&self, name: &str) -> String {
        let (key, _, origin) = self.found(name);
        self.layers.place(key, origin)
    }

    /// Notes a mistake in the value of `name`.
    pub(super) fn mistake(&mut self, name: &str, what: impl std::fmt::Display) {
        let (key, _, _) = self.found(name);
        self.mistakes.push(Remark::at(key.name, self.place(name), what));
    }

    pub(super) fn warning(&mut self, name: &str, what: impl std::fmt::Display) {
        let (key, _, _) = self.found(name);
        self.warnings.push(Remark::at(key.name, self.place(name), what));
    }

    /// `value`, unless there was a mistake.
    pub(super) fn end<T>(self, value: T) -> Result<T, Mistakes> {
        if self.mistakes.is_empty() { Ok(value) } else { Err(Mistakes(lines(&self.mistakes))) }
    }

    /// The text of a setting that may be unset.
    pub(super) fn optional(&self, name: &str) -> Option<&'a str> {
        self.found(name).1
    }

    /// The value that `parse` returns. After a mistake, which is noted, `fallback`.
    pub(super) fn value<T>(&mut self, name: &str, expected: &str, fallback: T, parse: impl Fn(&str) -> Option<T>) -> T {
        let Some(text) = self.optional(name) else { return fallback };
        if let Some(value) = parse(text) {
            return value;
        }
        self.mistake(name, format_args!("expected {expected}, found {text:?}"));
        fallback
    }

    pub(super) fn number<T: std::str::FromStr + Copy>(&mut self, name: &str, expected: &str, fallback: T) -> T {
        self.value(name, expected, fallback, |text| text.parse().ok())
    }

    /// A number of things, at least one.
    pub(super) fn count(&mut self, name: &str, most: usize) -> usize {
        let expected = format!("a number from 1 to {most}");
        self.value(name, &expected, 1, |text| text.parse().ok().filter(|count| (1..=most).contains(count)))
    }

    /// The number of repetitions. -1: no limit.
    pub(super) fn retries(&mut self, name: &str) -> i32 {
        self.value(name, "-1 or a number of attempts", -1, |text| text.parse().ok().filter(|retries| *retries >= -1))
    }

    /// A secret that [`super::Secrets`] found. Empty if there is none.
    pub(super) fn secret(&self, name: &str) -> SecretString {
        self.secrets.get(name).map(|(secret, _)| secret.clone()).unwrap_or_default()
    }

    /// The private key of this node.
    pub(super) fn node_key(&mut self, name: &str, key: &mut NodeKey) {
        let Some((hex, place)) = self.secrets.get(name) else { return };
        match NodeKey::from_hex(hex.expose_secret()) {
            Ok(read) => *key = read,
            Err(err) => {
                let place = if place == "environment" { name.to_owned() } else { format!("{name} ({place})") };
                let (setting, _, _) = self.found(name);
                self.mistakes.push(Remark::at(setting.name, place, err));
            }
        }
    }

    /// Whole seconds, at least 1: no call can end in zero time.
    pub(super) fn seconds(&mut self, name: &str) -> Duration {
        let expected = format!("whole seconds, at most {SECS_MAX}");
        let seconds = self.value(name, &expected, 1, |text| text.parse().ok().filter(|secs| *secs <= SECS_MAX));
        if seconds == 0 {
            self.warning(name, "0 is too short, using 1");
        }
        Duration::from_secs(seconds.max(1))
    }

    pub(super) fn milliseconds(&mut self, name: &str) -> Duration {
        let most = SECS_MAX * 1000;
        let expected = format!("whole milliseconds, at most {most}");
        Duration::from_millis(self.value(name, &expected, 0, |text| text.parse().ok().filter(|ms| *ms <= most)))
    }

    /// A ratio, clamped to 0..=1 (posemesh.md sections 4.10 and 7.1). NaN is a mistake.
    pub(super) fn ratio(&mut self, name: &str) -> f64 {
        let ratio = self.value(name, "a number from 0 to 1", 0.5, |text| {
            text.parse::<f64>().ok().filter(|ratio| ratio.is_finite())
        });
        let clamped = ratio.clamp(0.0, 1.0);
        if clamped != ratio {
            self.warning(name, format_args!("{ratio} is outside 0 to 1, using {clamped}"));
        }
        clamped
    }

    /// Seconds with a fraction.
    pub(super) fn fractional_seconds(&mut self, name: &str) -> f64 {
        let expected = format!("seconds, at most {SECS_MAX}");
        self.value(name, &expected, 0.0, |text| {
            text.parse().ok().filter(|secs: &f64| (0.0..=SECS_MAX as f64).contains(secs))
        })
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
        match Url::parse(text) {
            Ok(url) if matches!(url.scheme(), "http" | "https") && url.host().is_some() => {
                if !url.username().is_empty() || url.password().is_some() {
                    self.mistake(name, "expected a URL without user or password");
                    return None;
                }
                if let Some(problem) = host_problem(&url) {
                    self.mistake(name, problem);
                    return None;
                }
                Some(url)
            }
            // A text that cannot be parsed may contain a password.
            _ if text.contains('@') => {
                self.mistake(name, "expected an absolute http or https URL without user or password");
                None
            }
            _ => {
                self.mistake(name, format_args!("expected an absolute http or https URL, found {text:?}"));
                None
            }
        }
    }

    pub(super) fn address(&mut self, name: &str) -> SocketAddr {
        let fallback = SocketAddr::from(([127, 0, 0, 1], 0));
        self.value(name, "an address such as 127.0.0.1:8080", fallback, |text| text.parse().ok())
    }

    pub(super) fn duration(&mut self, name: &str) -> Duration {
        let time = self.value(name, "a duration such as 30s", Duration::ZERO, parse_duration);
        if time.as_secs() > SECS_MAX {
            let text = self.optional(name).unwrap_or_default();
            self.mistake(name, format_args!("expected at most {SECS_MAX} seconds, found {text:?}"));
        }
        time
    }

    /// A time that is not 0.
    pub(super) fn duration_above_zero(&mut self, name: &str) -> Duration {
        let expected = format!("a duration above 0 such as 30s, at most {SECS_MAX} seconds");
        let valid = |time: &Duration| !time.is_zero() && time.as_secs() <= SECS_MAX;
        self.value(name, &expected, Duration::from_secs(1), |text| parse_duration(text).filter(valid))
    }

    /// A time that is not 0, or `None` if the setting is unset.
    pub(super) fn optional_duration(&mut self, name: &str) -> Option<Duration> {
        self.optional(name).map(|_| self.duration_above_zero(name))
    }

    /// A number of bytes.
    pub(super) fn size(&mut self, name: &str) -> u64 {
        self.value(name, "a size such as 1GiB, or bytes", 0, byte_size)
    }

    /// A number of bytes that is not 0.
    pub(super) fn size_above_zero(&mut self, name: &str) -> u64 {
        self.value(name, "a size above 0 such as 512MiB", 1, |text| byte_size(text).filter(|bytes| *bytes > 0))
    }

    /// The text of a header: visible ASCII and spaces. Unset changes nothing.
    pub(super) fn header_text(&mut self, name: &str, value: &mut String) {
        match self.optional(name) {
            Some(text) if text.bytes().all(|byte| matches!(byte, b' '..=b'~')) => text.clone_into(value),
            Some(text) => self.mistake(name, format_args!("expected visible ASCII characters, found {text:?}")),
            None => {}
        }
    }

    /// Comma-separated words, in lower case.
    pub(super) fn list(&self, name: &str) -> Vec<String> {
        let words = self.optional(name).unwrap_or_default().split(',');
        words.map(|word| word.trim().to_ascii_lowercase()).filter(|word| !word.is_empty()).collect()
    }

    /// Warns of a word that is neither form. Then `json` is used (posemesh.md section 7.1).
    pub(super) fn check_log_format(&mut self) {
        let Some(text) = self.optional("LOG_FORMAT") else { return };
        if !["json", "text"].iter().any(|form| text.eq_ignore_ascii_case(form)) {
            self.warning("LOG_FORMAT", format_args!("expected json or text, found {text:?}, using json"));
        }
    }

    /// `v1.2.3` becomes `1.2.3`. An invalid version is replaced by the version of the host (posemesh.md section 7.1).
    pub(super) fn version(&mut self, name: &str) -> String {
        let own = env!("CARGO_PKG_VERSION");
        let Some(text) = self.optional(name) else { return own.to_owned() };
        let bare = text.strip_prefix(['v', 'V']).unwrap_or(text);
        if semver::Version::parse(bare).is_ok() {
            return bare.to_owned();
        }
        self.warning(name, format_args!("{text:?} is not a semantic version, using {own}"));
        own.to_owned()
    }
}

pub(super) fn lines(remarks: &[Remark]) -> Vec<String> {
    remarks.iter().map(ToString::to_string).collect()
}

/// `512MiB`, `1 GiB`, `20kB` or plain bytes.
fn byte_size(text: &str) -> Option<u64> {
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
