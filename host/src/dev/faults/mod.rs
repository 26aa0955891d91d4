//! Fault injection: the failures that `runner-host dev --faults FILE` and tests request, and when they occur.
//!
//! [`Faults`] is the checked content of such a file. For each request it decides whether a rule applies
//! ([`Live::apply`]). That decision is pure, counted, and repeatable by its seed. [`layer`] applies the fault around
//! the router, and [`wire`] breaks connections. `docs/operations/faults.md` is the reference for the format.

mod endpoint;
#[cfg(feature = "grpc")]
mod grpc;
pub(super) mod layer;
mod parse;
pub(super) mod wire;

use std::time::Duration;

use ::http::{HeaderMap, StatusCode};
use jiff::SignedDuration;
use rand::{Rng, SeedableRng, rngs::StdRng};

pub(super) use endpoint::Client;
pub use endpoint::Endpoint;
pub use parse::FaultsError;

/// The fault rules, and the version of the contract that the dev server uses.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Seed of the draws for `probability`. If absent, a random seed is used and logged.
    pub seed: Option<u64>,
    /// The version of the contract that the dev server uses.
    pub form: WireForm,
    /// How far the dev server's clock is ahead of the true clock.
    clock_offset: SignedDuration,
    rules: Vec<Rule>,
}

/// The version of the contract that the dev server uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WireForm {
    /// Everything that newer clients require (posemesh.md section 10).
    #[default]
    New,
    /// The answers of the oldest services. Domain tokens are opaque and have no expiry. There is no `/api/v1/info`
    /// and no upload in parts. Heartbeat answers contain only the lease's end. There is no JSON content type.
    Old,
}

/// One rule: a kind of fault, and the requests it applies to.
#[derive(Clone, Debug)]
struct Rule {
    /// Its `name`, or its position: `fault 2`.
    name: String,
    endpoints: Vec<Endpoint>,
    /// The client whose requests it applies to. `None`: any client.
    client: Option<Client>,
    kind: Kind,
    /// Delay before the fault is applied.
    delay: Duration,
    /// The maximum number of requests it applies to.
    count: u64,
    /// Requests that pass before the first fault.
    skip: u64,
    /// The probability that the rule applies to each later request.
    probability: f64,
    seed: Option<u64>,
    /// The leases that a stream gives before the fault. `None`: the fault replaces the answer.
    after_leases: Option<u64>,
}

/// The kind of fault.
#[derive(Clone, Debug, PartialEq)]
enum Kind {
    /// Answered with this status; the request is not executed.
    Status { code: StatusCode, headers: HeaderMap, body: String },
    /// Executed and answered after the rule's delay.
    Delay,
    /// Not executed; the connection is reset.
    Reset,
    /// Executed; the connection is reset in the middle of the answer's body.
    ResetBody { after: Option<usize> },
    /// Executed; the answer's body ends too early but as a valid HTTP message.
    Malformed { after: Option<usize> },
    /// Executed; the answer is this many bytes of JSON.
    Oversize { bytes: usize },
    /// Executed; the answer is an HTML page.
    WrongType,
    /// Not executed; no answer is sent.
    Hang,
    /// Executed; the connection is reset before the answer.
    LostAnswer,
    /// The token in the request is invalid from now on.
    RevokeToken,
    /// The wallet of the request is no longer registered.
    ForgetNode,
    /// Another node holds the lease of the task from now on.
    StealLease,
    /// The run is queued again while its node has it.
    SecondLease,
    /// Not executed; answered with this gRPC status.
    GrpcStatus { code: i32, message: String },
    /// Not executed; the stream of the call is reset with this HTTP/2 error code.
    RstStream { code: u32 },
    /// Executed and answered; the connection takes no other calls.
    Goaway,
}

impl Kind {
    fn name(&self) -> &'static str {
        match self {
            Self::Status { .. } => "status",
            Self::Delay => "delay",
            Self::Reset => "reset",
            Self::ResetBody { .. } => "reset_body",
            Self::Malformed { .. } => "malformed",
            Self::Oversize { .. } => "oversize",
            Self::WrongType => "wrong_type",
            Self::Hang => "hang",
            Self::LostAnswer => "lost_answer",
            Self::RevokeToken => "revoke_token",
            Self::ForgetNode => "forget_node",
            Self::StealLease => "steal_lease",
            Self::SecondLease => "second_lease",
            Self::GrpcStatus { .. } => "grpc_status",
            Self::RstStream { .. } => "rst_stream",
            Self::Goaway => "goaway",
        }
    }
}

impl Faults {
    /// Whether there is no rule and no other change to apply.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty() && self.clock_offset.is_zero() && self.form == WireForm::New
    }

    /// The number of rules.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rules.len()
    }

    /// How far the dev server's clock is ahead of the true one.
    #[must_use]
    pub fn clock_offset(&self) -> SignedDuration {
        self.clock_offset
    }
}

/// Active rules, with the counts of requests that passed and requests that were hit.
pub(super) struct Live {
    rules: Vec<ActiveRule>,
    seed: u64,
    clock_offset: SignedDuration,
    form: WireForm,
}

struct ActiveRule {
    rule: Rule,
    passed: u64,
    applied: u64,
    draw: StdRng,
}

/// A rule that applies to a request.
#[derive(Clone, Debug)]
pub(super) struct AppliedFault {
    /// Name of the rule.
    pub(super) rule: String,
    kind: Kind,
    delay: Duration,
    #[cfg_attr(not(feature = "grpc"), expect(dead_code, reason = "only gRPC reads it"))]
    after_leases: Option<u64>,
}

impl AppliedFault {
    pub(super) fn kind(&self) -> &'static str {
        self.kind.name()
    }
}

impl Live {
    pub(super) fn new(faults: Faults) -> Self {
        let seed = faults.seed.unwrap_or_else(rand::random);
        let activate = |(place, rule): (u64, Rule)| {
            // Each rule has its own random draws, so an additional rule does not change the others.
            let draw = StdRng::seed_from_u64(rule.seed.unwrap_or_else(|| seed.wrapping_add(place)));
            ActiveRule { rule, passed: 0, applied: 0, draw }
        };
        let rules = (0..).zip(faults.rules).map(activate).collect();
        Self { rules, seed, clock_offset: faults.clock_offset, form: faults.form }
    }

    pub(super) fn clock_offset(&self) -> SignedDuration {
        self.clock_offset
    }

    pub(super) fn seed(&self) -> u64 {
        self.seed
    }

    pub(super) fn form(&self) -> WireForm {
        self.form
    }

    /// The first rule that applies to this request. Later rules do not see the request.
    pub(super) fn apply(&mut self, endpoint: Endpoint, client: Client) -> Option<AppliedFault> {
        self.rules.iter_mut().find_map(|active| active.apply(endpoint, client))
    }
}

impl ActiveRule {
    fn apply(&mut self, endpoint: Endpoint, client: Client) -> Option<AppliedFault> {
        let rule = &self.rule;
        let other = rule.client.is_some_and(|wanted| wanted != client);
        if other || !rule.endpoints.contains(&endpoint) || self.applied >= rule.count {
            return None;
        }
        if self.passed < rule.skip {
            self.passed += 1;
            return None;
        }
        if rule.probability < 1.0 && !self.draw.random_bool(rule.probability) {
            return None;
        }
        self.applied += 1;
        let Rule { delay, after_leases, .. } = *rule;
        Some(AppliedFault { rule: rule.name.clone(), kind: rule.kind.clone(), delay, after_leases })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The result for each of `requests`: the name of the rule that applies, or `-`.
    #[track_caller]
    fn check(file: &str, requests: &str, applied: &str) {
        let mut live = Live::new(Faults::parse(file).expect("a valid file"));
        let apply = |word: &str| {
            let endpoint = Endpoint::named(word).expect("a name")[0];
            live.apply(endpoint, Client::Node).map_or("-".to_owned(), |apply| apply.rule)
        };
        assert_eq!(requests.split(' ').map(apply).collect::<Vec<_>>().join(" "), applied);
    }

    #[test]
    fn skip_passes_first_requests_and_count_limits_faults() {
        let file = "[[fault]]\nname = \"a\"\nendpoint = \"lease\"\nkind = \"reset\"\nskip = 1\ncount = 2";
        check(file, "lease heartbeat lease lease lease", "- - a a -");
    }

    #[test]
    fn rules_apply_to_nodes_by_default() {
        for (client, applied) in [("", "node"), ("node", "node"), ("submit", "submit"), ("any", "node submit")] {
            let client = if client.is_empty() { String::new() } else { format!("client = \"{client}\"\n") };
            let file = format!("[[fault]]\nendpoint = \"create\"\nkind = \"reset\"\n{client}");
            let mut live = Live::new(Faults::parse(&file).expect("a valid file"));
            let callers = [(Client::Node, "node"), (Client::Submit, "submit")];
            let hit = callers.into_iter().filter(|(caller, _)| live.apply(Endpoint::Create, *caller).is_some());
            assert_eq!(hit.map(|(_, word)| word).collect::<Vec<_>>().join(" "), applied, "{client}");
        }
        let mut live = Live::new(Faults::parse("[[fault]]\nendpoint = \"jobs\"\nkind = \"reset\"").expect("sound"));
        assert!(live.apply(Endpoint::Jobs, Client::Submit).is_some(), "no node calls jobs");
        assert!(live.apply(Endpoint::Jobs, Client::Node).is_some(), "nor does an author with another client");
    }

    #[test]
    fn applied_rule_hides_request_from_later_rules() {
        let file = "
            [[fault]]\nname = \"a\"\nendpoint = \"part\"\nkind = \"reset\"\ncount = 1
            [[fault]]\nname = \"b\"\nendpoint = [\"part\", \"abort\"]\nkind = \"hang\"\nskip = 1";
        check(file, "part part part abort", "a - b b");
    }

    #[test]
    fn seed_makes_draws_repeatable_and_rules_draw_independently() {
        let rule = |name: &str| {
            format!("[[fault]]\nname = \"{name}\"\nendpoint = \"part\"\nkind = \"reset\"\nprobability = 0.5\n")
        };
        let draws = |file: String| {
            let mut live = Live::new(Faults::parse(&file).expect("a valid file"));
            let applied = (0..64).map(|_| live.apply(Endpoint::Part, Client::Node).map(|apply| apply.rule));
            applied.collect::<Vec<_>>()
        };
        let one = draws(format!("seed = 7\n{}", rule("a")));
        assert_eq!(one, draws(format!("seed = 7\n{}", rule("a"))));
        assert_ne!(one, draws(format!("seed = 8\n{}", rule("a"))));
        let applied = one.iter().flatten().count();
        assert!((16..48).contains(&applied), "{applied} of 64 at a half");
        let two = draws(format!("seed = 7\n{}{}", rule("a"), rule("b")));
        let first: Vec<_> = two.into_iter().map(|rule| rule.filter(|rule| rule == "a")).collect();
        assert_eq!(one, first, "a second rule does not change the first one's draws");
    }
}
