//! Each error of a fault file is one line.

use super::*;

#[track_caller]
fn check(text: &str, line: &str) {
    let found = Faults::parse(text).map(|faults| faults.len()).expect_err("a mistake").to_string();
    assert_eq!(found, line);
    assert!(!found.contains('\n'));
}

fn rule(rest: &str) -> String {
    format!("[[fault]]\nendpoint = \"lease\"\n{rest}")
}

#[test]
fn mistakes_name_the_rule_and_the_key() {
    check("[[fualt]]", "unknown key \"fualt\", did you mean \"fault\"?");
    check("seed = -1", "seed: expected a whole number, not negative, found -1");
    check("[world]\nform = 1", "[world] form: expected \"old\" or \"new\", found 1");
    check("[[fault]]\nkind = \"reset\"", "[[fault]] 1: the key \"endpoint\" is missing, such as endpoint = \"lease\"");
    check(&rule(""), "[[fault]] 1: the key \"kind\" is missing, such as kind = \"status\"");
    check(&rule("kind = \"rest\""), "[[fault]] 1 kind: \"rest\", did you mean \"reset\"?");
    check(&rule("kind = \"reset\"\ncuont = 1"), "[[fault]] 1 unknown key \"cuont\", did you mean \"count\"?");
    check(&rule("kind = \"reset\"\ncount = 0"), "[[fault]] 1 count: is 0, so the rule never applies; remove the rule");
    check(
        &rule("name = \"n\"\nkind = \"reset\"\nprobability = 1.5"),
        "[[fault]] 1 \"n\" probability: expected above 0, at most 1, found 1.5",
    );
    check(&rule("kind = \"status\""), "[[fault]] 1: the key \"code\" is missing, such as code = 503");
    check(&rule("kind = \"status\"\ncode = 99"), "[[fault]] 1 code: expected a status from 200 to 599, found 99");
    check(
        &rule("kind = \"status\"\ncode = 503\nheaders = { \"a b\" = \"1\" }"),
        "[[fault]] 1 headers: \"a b\" is not a header name",
    );
    check(&rule("kind = \"delay\""), "[[fault]] 1: the key \"delay\" is missing, such as delay = \"500ms\"");
    check(
        &rule("kind = \"delay\"\ndelay = 5"),
        "[[fault]] 1 delay: expected a time such as \"500ms\" or \"2s\", at most 1h, found 5",
    );
    check(
        "[[fault]]\nendpoint = \"laese\"\nkind = \"reset\"",
        "[[fault]] 1 endpoint: \"laese\", did you mean \"lease\"?",
    );
    check("a = \n", "line 1: string values must be quoted, expected literal string");
}

#[test]
fn invalid_combinations_are_refused() {
    check(&rule("kind = \"reset\"\ncode = 503"), "[[fault]] 1 code: has no effect with kind \"reset\"; remove it");
    check(&rule("kind = \"hang\"\ndelay = \"1s\""), "[[fault]] 1 delay: a hang does not end; remove the key");
    check(
        &rule("kind = \"status\"\ncode = 204\nbody = \"x\""),
        "[[fault]] 1 body: an answer 204 has no body; remove it",
    );
    check(
        &rule("kind = \"steal_lease\""),
        "[[fault]] 1 kind: steal_lease cannot apply to lease: the call names no task",
    );
    check(
        "[[fault]]\nendpoint = [\"lease\", \"info\"]\nkind = \"revoke_token\"",
        "[[fault]] 1 kind: revoke_token cannot apply to info: the call has no token of a node or a task",
    );
    check(
        "[[fault]]\nendpoint = \"nonce\"\nkind = \"forget_node\"",
        "[[fault]] 1 kind: forget_node cannot apply to nonce: the call does not name a node",
    );
    check(
        "[[fault]]\nendpoint = \"download\"\nkind = \"oversize\"",
        "[[fault]] 1 kind: oversize cannot apply to download: the size of data is fixed; store a larger item",
    );
    check(
        "[[fault]]\nendpoint = \"lease\"\nkind = \"clock_offset\"\noffset = \"1m\"",
        "[[fault]] 1 endpoint: the dev server has one clock; expected \"any\", found \"lease\"",
    );
    check(
        "[[fault]]\nkind = \"clock_offset\"\noffset = \"soon\"",
        "[[fault]] 1 offset: expected a time such as \"20m\" or \"-20m\", at most a year, found \"soon\"",
    );
}

#[test]
fn mistakes_in_grpc_rules_name_rule_and_key() {
    let rule = |endpoint: &str, rest: &str| format!("[[fault]]\nendpoint = \"{endpoint}\"\n{rest}");
    let status = |code: &str| rule("ack", &format!("kind = \"grpc_status\"\n{code}"));
    check(&status(""), "[[fault]] 1: the key \"code\" is missing, such as code = \"UNAVAILABLE\"");
    check(&status("code = \"UNAVAILBLE\""), "[[fault]] 1 code: \"UNAVAILBLE\", did you mean \"UNAVAILABLE\"?");
    check(&status("code = 14"), "[[fault]] 1 code: expected a name such as \"UNAVAILABLE\", found 14");
    check(&status("code = \"OK\"\nmessage = 1"), "[[fault]] 1 message: expected text, found 1");
    check(
        &status("code = \"OK\"\nbody = \"\""),
        "[[fault]] 1 body: has no effect with kind \"grpc_status\"; remove it",
    );
    check(
        &rule("pull", "kind = \"rst_stream\"\ncode = \"REFUSED_STREM\""),
        "[[fault]] 1 code: \"REFUSED_STREM\", did you mean \"REFUSED_STREAM\"?",
    );
    check(&rule("pul", "kind = \"goaway\""), "[[fault]] 1 endpoint: \"pul\", did you mean \"pull\"?");
    check(
        &rule("node_heartbeat", "kind = \"goaway\""),
        "[[fault]] 1 kind: goaway cannot apply to node_heartbeat: the call does not use gRPC",
    );
    check(
        &rule("pull", "kind = \"second_lease\""),
        "[[fault]] 1 kind: second_lease cannot apply to pull: the call names no run",
    );
    check(
        &rule("ack", "kind = \"hang\"\nafter_leases = 1"),
        "[[fault]] 1 after_leases: ack sends no leases, only pull does",
    );
    check(
        &rule("pull", "kind = \"delay\"\ndelay = \"1s\"\nafter_leases = 1"),
        "[[fault]] 1 after_leases: has no effect with kind \"delay\"; remove it",
    );
    check(
        &rule("pull", "kind = \"reset_body\""),
        "[[fault]] 1 kind: reset_body cannot apply to pull: a stream has no middle; add after_bytes",
    );
    let faults = Faults::parse(&rule("node_runtime", "kind = \"hang\"\nafter_leases = 2")).expect("a valid file");
    assert_eq!((&*faults.rules[0].endpoints, faults.rules[0].after_leases), (&[Endpoint::Pull][..], Some(2)));
}

#[test]
fn client_must_make_the_call() {
    let client = |text: &str| format!("[[fault]]\nkind = \"reset\"\n{text}");
    check(
        &client("endpoint = \"lease\"\nclient = \"submit\""),
        "[[fault]] 1 client: \"submit\" does not fit lease: submit does not make this call",
    );
    check(
        &client("endpoint = \"jobs\"\nclient = \"node\""),
        "[[fault]] 1 client: \"node\" does not fit jobs: no node makes this call",
    );
    check(
        &client("endpoint = \"lease\"\nclient = \"me\""),
        "[[fault]] 1 client: expected \"any\", \"node\" or \"submit\", found \"me\"",
    );
}

#[test]
fn endpoint_group_keeps_only_calls_valid_for_fault() {
    let faults = Faults::parse("[[fault]]\nendpoint = \"any\"\nkind = \"revoke_token\"").expect("a valid file");
    assert!(faults.rules[0].endpoints.contains(&Endpoint::Lease));
    assert!(faults.rules[0].endpoints.contains(&Endpoint::Part));
    assert!(!faults.rules[0].endpoints.contains(&Endpoint::Nonce));
    assert!(Faults::parse("[[fault]]\nendpoint = \"dds\"\nkind = \"steal_lease\"").is_err());
}

#[test]
fn all_keys_of_a_rule_are_read() {
    let text = "
        seed = 9
        [world]
        form = \"old\"
        [[fault]]
        name = \"busy\"
        endpoint = [\"upload\", \"part\"]
        kind = \"status\"
        code = 429
        headers = { Retry-After = 2 }
        body = \"later\"
        count = 3
        skip = 1
        probability = 0.25
        seed = 4
        delay = \"1.5s\"
        [[fault]]
        kind = \"clock_offset\"
        offset = \"-20m\"";
    let faults = Faults::parse(text).expect("a valid file");
    assert_eq!((faults.seed, faults.form), (Some(9), WireForm::Old));
    assert_eq!(faults.clock_offset(), SignedDuration::from_mins(-20));
    let rule = &faults.rules[0];
    assert_eq!(rule.endpoints, [Endpoint::Create, Endpoint::Replace, Endpoint::Part]);
    assert_eq!((rule.count, rule.skip, rule.seed, rule.delay), (3, 1, Some(4), Duration::from_millis(1500)));
    let Kind::Status { code, headers, body } = &rule.kind else { panic!("{:?}", rule.kind) };
    assert_eq!((code.as_u16(), &headers["retry-after"], body.as_str()), (429, &HeaderValue::from(2), "later"));
}
