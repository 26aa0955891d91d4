//! Parses a fault file. Each error is one line that names the rule and the key.

use std::{path::Path, time::Duration};

use ::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use jiff::SignedDuration;
use toml::{Table, Value as Toml};

use super::{Client, Endpoint, Faults, Kind, Rule, WireForm};
use crate::model::nearest;

/// An error in a fault file, as one line.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct FaultsError(String);

/// Largest answer of `oversize`, in bytes. The answer is built in memory.
const OVERSIZE_MAX: i64 = 1 << 30;
/// Default size of an `oversize` answer. Nodes read at most 2 MiB of a lease (posemesh.md section 10.3), and authors
/// at most 4 MiB.
const OVERSIZE: usize = 5 << 20;

/// Longest delay before a fault.
const HOUR: Duration = Duration::from_secs(60 * 60);
/// Largest offset of the clock.
const YEAR: Duration = Duration::from_secs(366 * 24 * 60 * 60);

const KINDS: [&str; 17] = [
    "status",
    "delay",
    "reset",
    "reset_body",
    "malformed",
    "oversize",
    "wrong_type",
    "hang",
    "lost_answer",
    "revoke_token",
    "forget_node",
    "steal_lease",
    "second_lease",
    "grpc_status",
    "rst_stream",
    "goaway",
    "clock_offset",
];
const KEYS: [&str; 16] = [
    "name",
    "endpoint",
    "client",
    "kind",
    "count",
    "skip",
    "probability",
    "seed",
    "delay",
    "code",
    "headers",
    "body",
    "after_bytes",
    "bytes",
    "message",
    "after_leases",
];
/// Keys that only some kinds accept.
const OWN_KEYS: [&str; 7] = ["code", "headers", "body", "after_bytes", "bytes", "message", "after_leases"];

/// The names of the gRPC statuses, by number.
const GRPC_CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];
/// The names of the HTTP/2 error codes, by number.
const HTTP2_CODES: [&str; 14] = [
    "NO_ERROR",
    "PROTOCOL_ERROR",
    "INTERNAL_ERROR",
    "FLOW_CONTROL_ERROR",
    "SETTINGS_TIMEOUT",
    "STREAM_CLOSED",
    "FRAME_SIZE_ERROR",
    "REFUSED_STREAM",
    "CANCEL",
    "COMPRESSION_ERROR",
    "CONNECT_ERROR",
    "ENHANCE_YOUR_CALM",
    "INADEQUATE_SECURITY",
    "HTTP_1_1_REQUIRED",
];

impl Faults {
    /// Reads a fault file.
    pub fn read(file: &Path) -> Result<Self, FaultsError> {
        let told = |problem: String| FaultsError(format!("{}: {problem}", file.display()));
        let text = std::fs::read_to_string(file).map_err(|err| told(err.to_string()))?;
        Self::parse(&text).map_err(|FaultsError(problem)| told(problem))
    }

    /// Parses the text of a fault file.
    pub fn parse(text: &str) -> Result<Self, FaultsError> {
        parse(text).map_err(FaultsError)
    }
}

fn parse(text: &str) -> Result<Faults, String> {
    let table: Table = text.parse().map_err(|err: toml::de::Error| {
        let line = err.span().map_or(1, |span| text[..span.start.min(text.len())].lines().count().max(1));
        format!("line {line}: {}", err.message().replace('\n', " "))
    })?;
    known("", &table, &["seed", "world", "fault"])?;
    let mut faults = Faults::default();
    if let Some(seed) = table.get("seed") {
        faults.seed = Some(whole("seed", seed)?);
    }
    if let Some(wire_table) = table.get("world") {
        let wire_table =
            wire_table.as_table().ok_or_else(|| format!("expected [world] as a table, found {wire_table}"))?;
        known("[world] ", wire_table, &["form"])?;
        faults.form = match wire_table.get("form").map(Toml::as_str) {
            None | Some(Some("new")) => WireForm::New,
            Some(Some("old")) => WireForm::Old,
            Some(_) => return Err(format!("[world] form: expected \"old\" or \"new\", found {}", wire_table["form"])),
        };
    }
    let Some(rules) = table.get("fault") else { return Ok(faults) };
    let rules = rules.as_array().ok_or("expected [[fault]] tables, found `fault` as something else")?;
    let mut clocks = 0;
    for (index, rule) in rules.iter().enumerate() {
        let number = index + 1;
        let rule = rule.as_table().ok_or_else(|| format!("[[fault]] {number}: expected a table"))?;
        let label = RuleLabel::of(number, rule)?;
        if rule.get("kind").and_then(Toml::as_str) == Some("clock_offset") {
            clocks += 1;
            if clocks > 1 {
                return Err(label.problem("kind", "clock_offset is given twice; the dev server has one clock"));
            }
            faults.clock_offset = clock_offset(&label, rule)?;
        } else {
            faults.rules.push(self::rule(&label, rule)?);
        }
    }
    Ok(faults)
}

/// The rule as error messages name it.
struct RuleLabel {
    rule: String,
    text: String,
}

impl RuleLabel {
    fn of(number: usize, rule: &Table) -> Result<Self, String> {
        match rule.get("name") {
            None => Ok(Self { rule: format!("fault {number}"), text: format!("[[fault]] {number}") }),
            Some(Toml::String(name)) if !name.trim().is_empty() => {
                Ok(Self { rule: name.clone(), text: format!("[[fault]] {number} {name:?}") })
            }
            Some(other) => Err(format!("[[fault]] {number} name: expected a word, found {other}")),
        }
    }

    fn problem(&self, key: &str, problem: impl std::fmt::Display) -> String {
        format!("{} {key}: {problem}", self.text)
    }
}

fn rule(label: &RuleLabel, table: &Table) -> Result<Rule, String> {
    known(&format!("{} ", label.text), table, &KEYS)?;
    let kind = kind(label, table)?;
    let endpoints = endpoints(label, table)?;
    let client = client(label, table)?;
    let number = |key: &str| table.get(key).map(|value| whole(&format!("{} {key}", label.text), value)).transpose();
    let after_leases = number("after_leases")?;
    let fits = |call: Endpoint| {
        if after_leases.is_some() && call != Endpoint::Pull {
            return Err(label.problem("after_leases", format!("{} sends no leases, only pull does", call.name())));
        }
        fits(&kind, call)
            .map_err(|why| label.problem("kind", format!("{} cannot apply to {}: {why}", kind.name(), call.name())))?;
        let made = client.map_or(Ok(()), |client| client.makes(call));
        made.map_err(|why| label.problem("client", format!("{} does not fit {}: {why}", table["client"], call.name())))
    };
    // A rule for calls of authors alone that names no client applies to every client.
    let authors = |call: &Endpoint| call.is_of_authors();
    let client_filter =
        if endpoints.iter().all(authors) || table.contains_key("client") { client } else { Some(Client::Node) };
    let fitting: Vec<Endpoint> = endpoints.iter().copied().filter(|call| fits(*call).is_ok()).collect();
    // A group selects those of its calls that fit the kind. A call that is named alone must fit.
    if fitting.is_empty() || (named_alone(table) && fitting.len() < endpoints.len()) {
        let call = endpoints.iter().find(|call| !fitting.contains(call)).expect("one does not fit");
        return Err(fits(*call).expect_err("it does not fit"));
    }
    let delay = match table.get("delay") {
        None if kind == Kind::Delay => {
            return Err(format!("{}: the key \"delay\" is missing, such as delay = \"500ms\"", label.text));
        }
        None => Duration::ZERO,
        Some(text) => duration(label, "delay", text)?,
    };
    if !delay.is_zero() && kind == Kind::Hang {
        return Err(label.problem("delay", "a hang does not end; remove the key"));
    }
    let count = number("count")?;
    if count == Some(0) {
        return Err(label.problem("count", "is 0, so the rule never applies; remove the rule"));
    }
    let probability = match table.get("probability") {
        None => 1.0,
        Some(value) => {
            #[expect(clippy::cast_precision_loss, reason = "only 0 and 1 pass the filter")]
            let share = value.as_float().or(value.as_integer().map(|whole| whole as f64));
            let share = share.filter(|share| *share > 0.0 && *share <= 1.0);
            share.ok_or_else(|| label.problem("probability", format!("expected above 0, at most 1, found {value}")))?
        }
    };
    Ok(Rule {
        name: label.rule.clone(),
        endpoints: fitting,
        client: client_filter,
        kind,
        delay,
        count: count.unwrap_or(u64::MAX),
        skip: number("skip")?.unwrap_or(0),
        probability,
        seed: number("seed")?,
        after_leases,
    })
}

/// The client that the rule names. `None`: any client.
fn client(label: &RuleLabel, table: &Table) -> Result<Option<Client>, String> {
    match table.get("client").map(|value| (value.as_str(), value)) {
        None | Some((Some("any"), _)) => Ok(None),
        Some((Some("node"), _)) => Ok(Some(Client::Node)),
        Some((Some("submit"), _)) => Ok(Some(Client::Submit)),
        Some((_, other)) => {
            Err(label.problem("client", format!("expected \"any\", \"node\" or \"submit\", found {other}")))
        }
    }
}

/// Whether the rule names only calls and no group.
fn named_alone(table: &Table) -> bool {
    let is_call = |word: &Toml| word.as_str().is_some_and(|word| Endpoint::ALL.iter().any(|call| call.name() == word));
    match table.get("endpoint") {
        Some(Toml::Array(words)) => words.iter().all(is_call),
        Some(word) => is_call(word),
        None => false,
    }
}

fn endpoints(label: &RuleLabel, table: &Table) -> Result<Vec<Endpoint>, String> {
    let word = |value: &Toml| {
        let name =
            value.as_str().ok_or_else(|| label.problem("endpoint", format!("expected a name, found {value}")))?;
        Endpoint::named(name)
            .ok_or_else(|| label.problem("endpoint", unknown(name, &Endpoint::words().collect::<Vec<_>>())))
    };
    match table.get("endpoint") {
        None => Err(format!("{}: the key \"endpoint\" is missing, such as endpoint = \"lease\"", label.text)),
        Some(Toml::Array(words)) if words.is_empty() => {
            Err(label.problem("endpoint", "is empty, expected names of calls"))
        }
        Some(Toml::Array(words)) => {
            let calls = words.iter().map(word).collect::<Result<Vec<_>, _>>()?;
            let mut calls = calls.concat();
            calls.sort();
            calls.dedup();
            Ok(calls)
        }
        Some(one) => word(one),
    }
}

fn kind(label: &RuleLabel, table: &Table) -> Result<Kind, String> {
    let word = match table.get("kind") {
        None => return Err(format!("{}: the key \"kind\" is missing, such as kind = \"status\"", label.text)),
        Some(Toml::String(word)) => word.as_str(),
        Some(other) => return Err(label.problem("kind", format!("expected a word, found {other}"))),
    };
    let own: &[&str] = match word {
        "status" => &["code", "headers", "body"],
        "reset_body" | "malformed" => &["after_bytes"],
        "oversize" => &["bytes"],
        "grpc_status" => &["code", "message", "after_leases"],
        "rst_stream" => &["code", "after_leases"],
        "reset" | "hang" | "goaway" => &["after_leases"],
        _ => &[],
    };
    if let Some(key) = OWN_KEYS.iter().find(|key| table.contains_key(**key) && !own.contains(key))
        && KINDS.contains(&word)
    {
        return Err(label.problem(key, format!("has no effect with kind {word:?}; remove it")));
    }
    let after = || -> Result<Option<usize>, String> {
        let Some(value) = table.get("after_bytes") else { return Ok(None) };
        let bytes = whole(&format!("{} after_bytes", label.text), value)?;
        Ok(Some(usize::try_from(bytes).unwrap_or(usize::MAX)))
    };
    Ok(match word {
        "status" => status(label, table)?,
        "delay" => Kind::Delay,
        "reset" => Kind::Reset,
        "reset_body" => Kind::ResetBody { after: after()? },
        "malformed" => Kind::Malformed { after: after()? },
        "oversize" => {
            let bytes = match table.get("bytes") {
                None => OVERSIZE,
                Some(Toml::Integer(bytes)) if (1..=OVERSIZE_MAX).contains(bytes) => {
                    usize::try_from(*bytes).expect("a gibibyte fits in usize")
                }
                Some(other) => {
                    return Err(label.problem("bytes", format!("expected 1 to {OVERSIZE_MAX}, found {other}")));
                }
            };
            Kind::Oversize { bytes }
        }
        "wrong_type" => Kind::WrongType,
        "hang" => Kind::Hang,
        "lost_answer" => Kind::LostAnswer,
        "revoke_token" => Kind::RevokeToken,
        "forget_node" => Kind::ForgetNode,
        "steal_lease" => Kind::StealLease,
        "second_lease" => Kind::SecondLease,
        "grpc_status" => Kind::GrpcStatus {
            code: i32::from(code(label, table, &GRPC_CODES, "UNAVAILABLE")?),
            message: text(label, table, "message")?,
        },
        "rst_stream" => Kind::RstStream { code: code(label, table, &HTTP2_CODES, "REFUSED_STREAM")?.into() },
        "goaway" => Kind::Goaway,
        other => return Err(label.problem("kind", unknown(other, &KINDS))),
    })
}

/// The number of a code that the rule names.
fn code(label: &RuleLabel, table: &Table, names: &[&str], example: &str) -> Result<u8, String> {
    let name = match table.get("code") {
        None => return Err(format!("{}: the key \"code\" is missing, such as code = {example:?}", label.text)),
        Some(Toml::String(name)) => name,
        Some(other) => return Err(label.problem("code", format!("expected a name such as {example:?}, found {other}"))),
    };
    let number = (0..).zip(names).find_map(|(number, known)| (known == name).then_some(number));
    number.ok_or_else(|| label.problem("code", unknown(name, names)))
}

fn text(label: &RuleLabel, table: &Table, key: &str) -> Result<String, String> {
    match table.get(key) {
        None => Ok(String::new()),
        Some(Toml::String(text)) => Ok(text.clone()),
        Some(other) => Err(label.problem(key, format!("expected text, found {other}"))),
    }
}

fn status(label: &RuleLabel, table: &Table) -> Result<Kind, String> {
    let code = match table.get("code") {
        None => return Err(format!("{}: the key \"code\" is missing, such as code = 503", label.text)),
        Some(Toml::Integer(code)) if (200..=599).contains(code) => {
            let code = u16::try_from(*code).ok().and_then(|code| StatusCode::from_u16(code).ok());
            code.expect("200 to 599 are statuses")
        }
        Some(other) => return Err(label.problem("code", format!("expected a status from 200 to 599, found {other}"))),
    };
    let mut headers = HeaderMap::new();
    if let Some(table) = table.get("headers") {
        let table =
            table.as_table().ok_or_else(|| label.problem("headers", format!("expected a table, found {table}")))?;
        for (name, value) in table {
            let wrong = |problem: &str| label.problem("headers", format!("{name:?} {problem}"));
            let text = match value {
                Toml::String(text) => text.clone(),
                Toml::Integer(number) => number.to_string(),
                other => return Err(wrong(&format!("expected text, found {other}"))),
            };
            let known = HeaderName::try_from(name).map_err(|_| wrong("is not a header name"))?;
            if known == ::http::header::CONTENT_LENGTH || known == ::http::header::TRANSFER_ENCODING {
                return Err(wrong("is set by the dev server; remove it"));
            }
            headers.append(
                known,
                HeaderValue::try_from(text).map_err(|_| wrong("contains characters that are invalid in a header"))?,
            );
        }
    }
    let body = text(label, table, "body")?;
    if !body.is_empty() && [204, 205, 304].contains(&code.as_u16()) {
        return Err(label.problem("body", format!("an answer {} has no body; remove it", code.as_u16())));
    }
    Ok(Kind::Status { code, headers, body })
}

/// The error is the reason why a kind does not fit a call.
fn fits(kind: &Kind, call: Endpoint) -> Result<(), &'static str> {
    let task = matches!(call, Endpoint::Heartbeat | Endpoint::Complete | Endpoint::Fail)
        || call.names_run()
        || call.is_of_domain();
    let node = matches!(call, Endpoint::Verify | Endpoint::NodeHeartbeat | Endpoint::Pull) || call.is_of_dms();
    match kind {
        Kind::RevokeToken if !call.is_of_dms() && !call.is_of_domain() => {
            Err("the call has no token of a node or a task")
        }
        Kind::ForgetNode if !node => Err("the call does not name a node"),
        Kind::StealLease if !task => Err("the call names no task"),
        Kind::SecondLease if !call.names_run() => Err("the call names no run"),
        Kind::GrpcStatus { .. } | Kind::RstStream { .. } | Kind::Goaway if !call.is_grpc() => {
            Err("the call does not use gRPC")
        }
        Kind::ResetBody { after: None } | Kind::Malformed { after: None } if call == Endpoint::Pull => {
            Err("a stream has no middle; add after_bytes")
        }
        Kind::Oversize { .. } if matches!(call, Endpoint::Download | Endpoint::ById) => {
            Err("the size of data is fixed; store a larger item")
        }
        _ => Ok(()),
    }
}

fn clock_offset(label: &RuleLabel, table: &Table) -> Result<SignedDuration, String> {
    known(&format!("{} ", label.text), table, &["name", "kind", "endpoint", "offset"])?;
    if let Some(other) = table.get("endpoint").filter(|value| value.as_str() != Some("any")) {
        return Err(label.problem("endpoint", format!("the dev server has one clock; expected \"any\", found {other}")));
    }
    let Some(offset) = table.get("offset") else {
        return Err(format!("{}: the key \"offset\" is missing, such as offset = \"-20m\"", label.text));
    };
    let length = offset.as_str().and_then(|text| text.parse::<SignedDuration>().ok());
    length.filter(|length| length.unsigned_abs() <= YEAR).ok_or_else(|| {
        let expected = "expected a time such as \"20m\" or \"-20m\", at most a year";
        label.problem("offset", format!("{expected}, found {offset}"))
    })
}

fn duration(label: &RuleLabel, key: &str, value: &Toml) -> Result<Duration, String> {
    let length = value.as_str().and_then(|text| text.parse::<SignedDuration>().ok());
    let length = length.and_then(|length| Duration::try_from(length).ok()).filter(|length| *length <= HOUR);
    length.ok_or_else(|| {
        label.problem(key, format!("expected a time such as \"500ms\" or \"2s\", at most 1h, found {value}"))
    })
}

fn whole(label: &str, value: &Toml) -> Result<u64, String> {
    let number = value.as_integer().and_then(|number| u64::try_from(number).ok());
    number.ok_or_else(|| format!("{label}: expected a whole number, not negative, found {value}"))
}

fn known(label: &str, table: &Table, known: &[&str]) -> Result<(), String> {
    match table.keys().find(|key| !known.contains(&key.as_str())) {
        None => Ok(()),
        Some(key) => Err(format!("{label}unknown key {}", unknown(key, known))),
    }
}

fn unknown(word: &str, known: &[&str]) -> String {
    match nearest(word, known.iter().copied()) {
        Some(near) => format!("{word:?}, did you mean {near:?}?"),
        None => format!("{word:?}, expected one of {}", known.join(", ")),
    }
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
