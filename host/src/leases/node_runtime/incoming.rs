//! Converts a lease of the wire to a [`model::Lease`](crate::model::Lease). Everything in it is untrusted.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use jiff::Timestamp;
use serde_json::{Map, Value, json, value::to_raw_value};
use sha2::{Digest, Sha256};
use url::Url;

use super::{
    super::{is_credential, wall_time},
    domain_data::{DomainData, TOKEN_KEY},
    lease,
    report::At,
};
use crate::model::{
    AnnouncedData, BootInstant, Capability, DataLocation, InlineInputs, JSON_SUFFIX, Lease, PlaneName, ReportAddress,
    TaskId, Token,
};

/// Longest id that is used, in bytes.
const ID_BYTES_MAX: usize = 1024;
/// Most inputs of a lease.
const INPUTS_MAX: usize = 1000;
/// Longest name of an input, in bytes.
const INPUT_NAME_BYTES_MAX: usize = 1024;
/// Longest time that a run may take. A later deadline counts as this one.
const RUN_MAX: Duration = Duration::from_secs(23 * 3600);
/// How long after its deadline the end of a run may still be reported. The control plane decides whether it counts.
const REPORT_TIME: Duration = Duration::from_secs(3600);
/// The ids of a lease. They are checked first: without them nothing can be reported.
#[derive(Debug)]
pub(super) struct Ids {
    pub(super) task: TaskId,
    pub(super) lease: String,
    pub(super) run: String,
}

impl Ids {
    /// # Errors
    /// One line about the unusable id.
    pub(super) fn read(plane: &PlaneName, wire: &lease::Lease) -> Result<Self, String> {
        for (name, id) in [("lease_id", &wire.lease_id), ("run_id", &wire.run_id)] {
            if id.trim().is_empty() {
                return Err(format!("its {name} is blank"));
            }
            if id.len() > ID_BYTES_MAX {
                return Err(format!("its {name} has {} bytes, at most {ID_BYTES_MAX} are allowed", id.len()));
            }
        }
        let task = task(plane, &wire.run_id);
        Ok(Self { task, lease: wire.lease_id.clone(), run: wire.run_id.clone() })
    }

    /// Where the report of the run goes.
    pub(super) fn at(&self) -> At {
        At { lease: self.lease.clone(), run: self.run.clone() }
    }
}

/// The task of a run: its id, or a UUID that depends only on the plane and the id.
fn task(plane: &PlaneName, run: &str) -> TaskId {
    TaskId::parse(run).unwrap_or_else(|_| {
        let digest = Sha256::new().chain_update(plane.as_str()).chain_update([0]).chain_update(run).finalize();
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&digest[..16]);
        uuid::Builder::from_custom_bytes(bytes).into_uuid().into()
    })
}

/// Why a lease cannot run here.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unusable {
    /// Its deadline has passed.
    Expired,
    /// It is malformed. One line.
    Malformed(String),
}

/// Reads the lease. `now` is the time of the control plane. `check` refuses a domain server that must get no token.
pub(super) fn lease(
    ids: &Ids,
    wire: lease::Lease,
    agents: &BTreeMap<String, Capability>,
    check: impl FnOnce(&Url) -> Result<(), String>,
    now: Timestamp,
) -> Result<Lease, Unusable> {
    let malformed = |reason: String| Unusable::Malformed(reason);
    let end = deadline(&wire, now)?;
    let spec = wire.run_spec.ok_or_else(|| malformed("the lease has no run_spec".to_owned()))?;
    let capability = capability(&spec, agents).map_err(malformed)?;
    let mut meta = parameters(spec.metadata).map_err(malformed)?;
    let domain = DomainData::take(&mut meta).map_err(malformed)?;
    meta.retain(|key, _| !is_credential(key));
    let (inputs, data) = match &domain {
        Some(domain) => {
            check(&domain.at.server).map_err(malformed)?;
            (data_ids(spec.input_ref).map_err(malformed)?, DataLocation::DomainServer(domain.at.clone()))
        }
        None => {
            let inputs = inputs(spec.input_ref).map_err(malformed)?;
            (inputs.keys().cloned().collect(), DataLocation::Inline(InlineInputs(Arc::new(inputs))))
        }
    };
    let budgets = spec.budgets.unwrap_or_default();
    let given = [("max_tokens", budgets.max_tokens), ("max_duration_seconds", budgets.max_duration_seconds)];
    let given = given.into_iter().filter(|(_, value)| *value > 0);
    let mut all = match meta.remove("budgets") {
        Some(Value::Object(all)) => all,
        _ => Map::new(),
    };
    all.extend(given.map(|(key, value)| (key.to_owned(), Value::from(value))));
    let all = Value::Object(all);
    let wall_time = wall_time(&all).map_err(malformed)?;
    meta.insert("budgets".into(), all);
    let task =
        json!({ "id": ids.run, "capability": capability.as_str(), "inputs_cids": inputs, "meta": Value::Object(meta) });
    let mut document = json!({ "task": task });
    if let Some(DomainData { at, .. }) = &domain {
        document["domain_id"] = at.domain.to_string().into();
        document["domain_server_url"] = at.server.as_str().into();
    }
    let traceparent = traceparent(&wire.trace_id);
    let limit = |value| u64::try_from(value).ok().filter(|limit| *limit > 0);
    Ok(Lease {
        expires_at: Some(expiry(end)),
        hard_deadline: Some(end),
        time_limit: limit(budgets.max_duration_seconds).map(Duration::from_secs).into_iter().chain(wall_time).min(),
        tokens_max: limit(budgets.max_tokens),
        data: AnnouncedData::Known(data),
        token: domain.map(|domain| domain.token),
        inputs,
        traceparent,
        document: to_raw_value(&document).expect("JSON values are JSON"),
        ..Lease::bare(ReportAddress { task: ids.task.clone(), at: ids.at().text().into() }, capability)
    })
}

/// The W3C trace context of a run. Its trace is named by the control plane: a UUID, or 32 hex digits. The wire names no
/// span, so the parent is the half of the trace id that no other trace has.
fn traceparent(trace: &str) -> Option<String> {
    let trace = uuid::Uuid::try_parse(trace.trim()).ok().filter(|trace| !trace.is_nil())?.simple().to_string();
    let parent = &trace[16..];
    (parent != "0000000000000000").then(|| format!("00-{trace}-{parent}-00"))
}

/// The domain server and the token that a newer lease of a run names, if they can be used.
pub(super) fn domain_data(wire: &lease::Lease) -> Option<DomainData> {
    let mut metadata = parameters(wire.run_spec.as_ref()?.metadata.clone()).ok()?;
    DomainData::take(&mut metadata).ok()?
}

/// The token of a lease that may be unusable.
pub(super) fn token(wire: &lease::Lease) -> Option<Token> {
    let metadata = &wire.run_spec.as_ref()?.metadata;
    let quoted = || serde_json::from_str(metadata.get(&format!("{TOKEN_KEY}{JSON_SUFFIX}"))?).ok();
    metadata.get(TOKEN_KEY).cloned().or_else(quoted).map(Token::new)
}

/// The metadata: texts, or JSON where the name says so.
fn parameters(metadata: HashMap<String, String>) -> Result<Map<String, Value>, String> {
    let mut parameters = Map::new();
    for (key, value) in metadata {
        let (name, value) = match key.strip_suffix(JSON_SUFFIX) {
            Some(name) => {
                let value = serde_json::from_str(&value);
                (name.to_owned(), value.map_err(|err| format!("the value of its metadata {key:?} is not JSON: {err}"))?)
            }
            None => (key, Value::String(value)),
        };
        if parameters.contains_key(&name) {
            return Err(format!("its metadata have {name:?} both with and without {JSON_SUFFIX:?} at its end"));
        }
        parameters.insert(name, value);
    }
    Ok(parameters)
}

/// When the run must have ended. `now` is the time of the control plane.
pub(super) fn deadline(wire: &lease::Lease, now: Timestamp) -> Result<BootInstant, Unusable> {
    Ok(BootInstant::now() + left(wire.deadline_unix_ms, now)?)
}

/// Until when the end of a run with this deadline may be reported.
pub(super) fn expiry(deadline: BootInstant) -> BootInstant {
    deadline + REPORT_TIME
}

/// The time until the deadline. 0 on the wire is no deadline.
fn left(deadline_ms: i64, now: Timestamp) -> Result<Duration, Unusable> {
    match deadline_ms {
        ..0 => Err(Unusable::Malformed(format!("its deadline is {deadline_ms}, expected a time"))),
        0 => Ok(RUN_MAX),
        _ => {
            // A time that no calendar has is far away.
            let Ok(deadline) = Timestamp::from_millisecond(deadline_ms) else { return Ok(RUN_MAX) };
            let left = Duration::try_from(deadline.duration_since(now)).unwrap_or_default();
            if left.is_zero() { Err(Unusable::Expired) } else { Ok(left.min(RUN_MAX)) }
        }
    }
}

/// The runner of a run: the metadata names it, or the configuration, or the agent.
fn capability(spec: &lease::RunSpec, agents: &BTreeMap<String, Capability>) -> Result<Capability, String> {
    if let Some(name) = spec.metadata.get("capability").filter(|name| !name.trim().is_empty()) {
        return Capability::from_wire(name).map_err(|err| format!("metadata.capability: {err}"));
    }
    if let Some(capability) = agents.get(&spec.agent_id) {
        return Ok(capability.clone());
    }
    if spec.agent_id.starts_with('/') {
        return Capability::from_wire(&spec.agent_id).map_err(|err| format!("agent_id: {err}"));
    }
    let version = spec.version.trim();
    let name = if version.is_empty() {
        format!("/agents/{}", spec.agent_id)
    } else {
        format!("/agents/{}/{version}", spec.agent_id)
    };
    if spec.agent_id.trim().is_empty() {
        return Err("the lease names no agent and no capability".to_owned());
    }
    Capability::from_wire(&name).map_err(|err| format!("agent_id and version: {err}"))
}

/// The ids of inputs on a domain server, in the order of their names.
fn data_ids(wire: HashMap<String, String>) -> Result<Vec<String>, String> {
    check_count(wire.len())?;
    Ok(BTreeMap::from_iter(wire).into_values().collect())
}

fn check_count(count: usize) -> Result<(), String> {
    if count > INPUTS_MAX {
        return Err(format!("input_ref has {count} entries, at most {INPUTS_MAX} are allowed"));
    }
    Ok(())
}

/// The inputs by their names. A value under a name that ends in `;base64` is decoded.
fn inputs(wire: HashMap<String, String>) -> Result<BTreeMap<String, Bytes>, String> {
    let count = wire.len();
    check_count(count)?;
    let mut inputs = BTreeMap::new();
    for (key, value) in wire {
        let (name, value) = match key.strip_suffix(InlineInputs::BASE64_SUFFIX) {
            None => (key, Bytes::from(value)),
            Some(name) => match BASE64_STANDARD.decode(value.as_bytes()) {
                Ok(bytes) => (name.to_owned(), Bytes::from(bytes)),
                Err(err) => return Err(format!("input_ref has an entry that is not base64: {err}")),
            },
        };
        if name.is_empty() || name.len() > INPUT_NAME_BYTES_MAX {
            let bytes = name.len();
            return Err(format!("input_ref has a name of {bytes} bytes, expected 1 to {INPUT_NAME_BYTES_MAX}"));
        }
        inputs.insert(name, value);
    }
    if inputs.len() < count {
        return Err(format!("input_ref has a name both with and without {}", InlineInputs::BASE64_SUFFIX));
    }
    Ok(inputs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plane() -> PlaneName {
        PlaneName::parse("p").expect("a name")
    }

    fn wire() -> lease::Lease {
        lease::Lease {
            lease_id: "l".into(),
            run_id: "r".into(),
            run_spec: Some(lease::RunSpec { agent_id: "a".into(), version: "v1".into(), ..Default::default() }),
            deadline_unix_ms: 0,
            trace_id: String::new(),
        }
    }

    /// Changes a usable lease and reads it at second 1000 of the epoch.
    fn read(change: impl FnOnce(&mut lease::Lease)) -> Result<Lease, Unusable> {
        let mut wire = wire();
        change(&mut wire);
        let agents = BTreeMap::from([("mapped".to_owned(), Capability::parse("/lab/mapped/v1").expect("a name"))]);
        let ids = Ids::read(&plane(), &wire).map_err(Unusable::Malformed)?;
        lease(&ids, wire, &agents, |_| Ok(()), Timestamp::from_second(1000).expect("a time"))
    }

    fn spec(change: impl FnOnce(&mut lease::RunSpec)) -> Result<Lease, Unusable> {
        read(|wire| change(wire.run_spec.as_mut().expect("a spec")))
    }

    #[track_caller]
    fn refused(read: Result<Lease, Unusable>, text: &str) {
        match read {
            Err(Unusable::Malformed(reason)) => assert!(reason.contains(text), "{reason}"),
            other => panic!("expected {text:?}: {other:?}"),
        }
    }

    #[test]
    fn run_names_its_runner_in_four_ways() {
        let name = |read: Result<Lease, Unusable>| read.expect("usable").capability.to_string();
        assert_eq!(name(read(|_| {})), "/agents/a/v1");
        assert_eq!(name(spec(|spec| spec.version.clear())), "/agents/a");
        assert_eq!(name(spec(|spec| spec.agent_id = "/lab/echo/v1".into())), "/lab/echo/v1");
        assert_eq!(name(spec(|spec| spec.agent_id = "mapped".into())), "/lab/mapped/v1");
        let named = |spec: &mut lease::RunSpec| {
            spec.agent_id = "mapped".into();
            spec.metadata.insert("capability".into(), "/lab/x/v1".into());
        };
        assert_eq!(name(spec(named)), "/lab/x/v1");
        refused(spec(|spec| spec.agent_id.clear()), "names no agent");
        refused(spec(|spec| spec.agent_id = "a b".into()), "white space");
    }

    #[test]
    fn unusable_leases_are_refused() {
        refused(read(|wire| wire.run_spec = None), "no run_spec");
        refused(read(|wire| wire.lease_id = " ".into()), "lease_id is blank");
        refused(read(|wire| wire.run_id = "x".repeat(100_000)), "run_id has 100000 bytes");
        refused(read(|wire| wire.deadline_unix_ms = -1), "its deadline is -1");
        assert_eq!(read(|wire| wire.deadline_unix_ms = 1_000_000).err(), Some(Unusable::Expired));
        let many = |spec: &mut lease::RunSpec| {
            spec.input_ref = (0..10_000).map(|number| (number.to_string(), String::new())).collect();
        };
        refused(spec(many), "10000 entries");
        let entry = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        refused(spec(|spec| spec.input_ref = HashMap::from([entry("a;base64", "!")])), "not base64");
        refused(spec(|spec| spec.input_ref = HashMap::from([entry(";base64", "")])), "0 bytes");
        let both = HashMap::from([entry("a;base64", ""), entry("a", "")]);
        refused(spec(|spec| spec.input_ref = both), "both with and without");
    }

    #[test]
    fn deadlines_are_bounded() {
        let left = |ms| {
            let lease = read(|wire| wire.deadline_unix_ms = ms).expect("usable");
            lease.hard_deadline.expect("a deadline").left().as_secs_f64().round()
        };
        assert_eq!([left(1_002_000), left(0), left(i64::MAX)], [2.0, RUN_MAX.as_secs_f64(), RUN_MAX.as_secs_f64()]);
    }

    #[test]
    fn inputs_and_document_hold_no_credential() {
        let full = |spec: &mut lease::RunSpec| {
            spec.input_ref = HashMap::from([("b".into(), "text".into()), ("a.bin;base64".into(), "/wA=".into())]);
            spec.metadata.insert("Access_Token".into(), "secret".into());
            spec.metadata.insert("sas_token;json".into(), "\"secret\"".into());
            spec.metadata.insert("name".into(), "0.1".into());
            spec.metadata.insert("voxel;json".into(), "0.1".into());
            spec.budgets = Some(lease::BudgetConstraints { max_tokens: 7, max_duration_seconds: 60 });
        };
        let lease = spec(full).expect("usable");
        assert_eq!((lease.inputs.as_slice(), lease.time_limit), (&["a.bin".into(), "b".into()][..], Some(60 * SECOND)));
        let document: Value = serde_json::from_str(lease.document.get()).expect("JSON");
        assert_eq!(
            document["task"],
            json!({
                "id": "r",
                "capability": "/agents/a/v1",
                "inputs_cids": ["a.bin", "b"],
                "meta": { "name": "0.1", "voxel": 0.1, "budgets": { "max_tokens": 7, "max_duration_seconds": 60 } },
            })
        );
        let AnnouncedData::Known(DataLocation::Inline(inputs)) = lease.data else { panic!("inline") };
        assert_eq!((&inputs.0["a.bin"][..], &inputs.0["b"][..]), (&b"\xff\x00"[..], &b"text"[..]));
        assert_eq!(&*lease.address.at, r#"{"lease":"l","run":"r"}"#);
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn trace_id_becomes_a_trace_context() {
        let expected = "00-0b9f3c523b0e4f0e8f8e6f2e9d0c7a01-8f8e6f2e9d0c7a01-00";
        for trace in ["0b9f3c52-3b0e-4f0e-8f8e-6f2e9d0c7a01", " 0B9F3C523B0E4F0E8F8E6F2E9D0C7A01 "] {
            assert_eq!(traceparent(trace).as_deref(), Some(expected));
        }
        for trace in ["", "x", "00000000-0000-0000-0000-000000000000", "0b9f3c523b0e4f0e0000000000000000"] {
            assert_eq!(traceparent(trace), None, "{trace:?}");
        }
    }

    #[test]
    fn unusual_run_ids_get_a_stable_task_id() {
        let task = |run: &str| task(&plane(), run).to_string();
        assert_eq!(task("run-7"), "run-7");
        assert_eq!(task("a b"), task("a b"));
        assert_ne!(task("a b"), task("a  b"));
        assert_eq!(task("é").len(), 36);
    }
}
