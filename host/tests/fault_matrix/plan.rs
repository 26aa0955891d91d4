//! The cells, and the combinations that are skipped.

use runner_host::dev::JournalEntry;

/// A kind of fault: its name in the table, and the keys of its rule.
pub(crate) type Kind = (&'static str, &'static str);

/// The duration of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Length {
    /// For two requests.
    Twice,
    /// For longer than a lease.
    Long,
}

/// One call, one kind of fault, one length.
#[derive(Clone, Debug)]
pub(crate) struct Cell {
    pub(crate) endpoint: &'static str,
    pub(crate) kind: Kind,
    pub(crate) length: Length,
}

/// The calls of a node (posemesh.md section 1), in the order of a task's life.
pub(crate) const ENDPOINTS: [&str; 19] = [
    "nonce",
    "register_wallet",
    "register",
    "verify",
    "lease",
    "heartbeat",
    "download",
    "by_id",
    "list",
    "info",
    "create",
    "replace",
    "initiate",
    "part",
    "complete_upload",
    "abort",
    "complete",
    "fail",
    "any",
];

/// Every kind of fault except the clock, which is a setting of the dev server.
pub(crate) const KINDS: [Kind; 15] = [
    ("503", "kind = \"status\"\ncode = 503"),
    ("429", "kind = \"status\"\ncode = 429\nheaders = { Retry-After = \"1\" }"),
    ("401", "kind = \"status\"\ncode = 401"),
    ("404", "kind = \"status\"\ncode = 404"),
    ("delay", "kind = \"delay\"\ndelay = \"1500ms\""),
    ("reset", "kind = \"reset\""),
    ("reset_body", "kind = \"reset_body\""),
    ("malformed", "kind = \"malformed\""),
    ("oversize", "kind = \"oversize\""),
    ("wrong_type", "kind = \"wrong_type\""),
    ("hang", "kind = \"hang\""),
    ("lost_answer", "kind = \"lost_answer\""),
    ("revoke_token", "kind = \"revoke_token\""),
    ("forget_node", "kind = \"forget_node\""),
    ("steal_lease", "kind = \"steal_lease\""),
];

/// Kinds of faults of the Node Runtime wire, beside those of [`KINDS`].
pub(crate) const RUN_KINDS: [Kind; 13] = [
    ("unavailable", "kind = \"grpc_status\"\ncode = \"UNAVAILABLE\""),
    ("cancelled", "kind = \"grpc_status\"\ncode = \"CANCELLED\""),
    ("invalid", "kind = \"grpc_status\"\ncode = \"INVALID_ARGUMENT\""),
    ("ok", "kind = \"grpc_status\"\ncode = \"OK\""),
    ("goaway", "kind = \"goaway\""),
    ("rst_stream", "kind = \"rst_stream\"\ncode = \"REFUSED_STREAM\""),
    ("second_lease", "kind = \"second_lease\""),
    ("clean_end", "kind = \"grpc_status\"\ncode = \"OK\"\nafter_leases = 1"),
    ("late_goaway", "kind = \"goaway\"\nafter_leases = 1"),
    ("late_rst", "kind = \"rst_stream\"\ncode = \"INTERNAL_ERROR\"\nafter_leases = 1"),
    ("late_reset", "kind = \"reset\"\nafter_leases = 1"),
    ("half_lease", "kind = \"malformed\"\nafter_bytes = 100"),
    ("silence", "kind = \"hang\"\nafter_leases = 0"),
];

/// The calls of a node on the Node Runtime wire, with the faults of each. Ack, Complete and Fail share their code, so
/// only one of them gets every fault.
pub(crate) const RUN_ENDPOINTS: [(&str, &[&str]); 7] = [
    ("node_register", &["503", "404", "reset", "reset_body", "malformed", "oversize", "wrong_type", "hang"]),
    ("node_heartbeat", &["503", "delay", "reset", "malformed", "wrong_type", "hang", "forget_node"]),
    ("node_remove", &["503", "reset", "hang", "lost_answer"]),
    (
        "pull",
        &[
            "503",
            "404",
            "delay",
            "reset",
            "oversize",
            "wrong_type",
            "hang",
            "forget_node",
            "unavailable",
            "cancelled",
            "invalid",
            "ok",
            "goaway",
            "rst_stream",
            "clean_end",
            "late_goaway",
            "late_rst",
            "late_reset",
            "half_lease",
            "silence",
        ],
    ),
    ("ack", &["reset", "lost_answer", "hang", "invalid", "goaway", "rst_stream", "steal_lease", "second_lease"]),
    (
        "run_complete",
        &[
            "503",
            "404",
            "delay",
            "reset",
            "reset_body",
            "malformed",
            "oversize",
            "wrong_type",
            "hang",
            "lost_answer",
            "steal_lease",
            "unavailable",
            "cancelled",
            "invalid",
            "ok",
            "goaway",
            "rst_stream",
            "second_lease",
        ],
    ),
    ("run_fail", &["reset", "lost_answer", "steal_lease", "unavailable", "goaway", "rst_stream", "second_lease"]),
];

/// Faults of the Node Runtime wire that may also last long.
const RUN_LASTING: [&str; 2] = ["503", "reset"];

/// Faults that may also last long: five forms of an outage.
const LASTING: [&str; 5] = ["503", "429", "reset", "malformed", "hang"];

const SIGN_IN: [&str; 4] = ["nonce", "register_wallet", "register", "verify"];
const PLANE: [&str; 4] = ["lease", "heartbeat", "complete", "fail"];

/// A call and a fault that are not combined, with the reason.
pub(crate) type Skipped = (&'static str, &'static str, &'static str);

/// All cells, and all skipped combinations.
pub(crate) fn all() -> (Vec<Cell>, Vec<Skipped>) {
    let (mut cells, mut skipped) = (Vec::new(), Vec::new());
    for endpoint in ENDPOINTS {
        for kind in KINDS {
            if let Some(reason) = skip_reason(endpoint, kind.0) {
                skipped.push((endpoint, kind.0, reason));
                continue;
            }
            cells.push(Cell { endpoint, kind, length: Length::Twice });
            if LASTING.contains(&kind.0) && endpoint != "abort" {
                cells.push(Cell { endpoint, kind, length: Length::Long });
            }
        }
    }
    for kind in [
        ("ahead", "kind = \"clock_offset\"\noffset = \"20m\""),
        ("behind", "kind = \"clock_offset\"\noffset = \"-20m\""),
    ] {
        cells.push(Cell { endpoint: "any", kind, length: Length::Long });
    }
    for (endpoint, kinds) in RUN_ENDPOINTS {
        for name in kinds {
            let kind = KINDS.into_iter().chain(RUN_KINDS).find(|kind| kind.0 == *name).expect("a known kind");
            cells.push(Cell { endpoint, kind, length: Length::Twice });
            if RUN_LASTING.contains(name) && endpoint != "node_remove" {
                cells.push(Cell { endpoint, kind, length: Length::Long });
            }
        }
    }
    (cells, skipped)
}

fn skip_reason(endpoint: &str, kind: &str) -> Option<&'static str> {
    let (sign_in, plane) = (SIGN_IN.contains(&endpoint), PLANE.contains(&endpoint));
    match kind {
        "revoke_token" if sign_in || endpoint == "info" => Some("the call carries no token"),
        "forget_node" if !plane && !["verify", "any"].contains(&endpoint) => {
            Some("the call does not identify its node")
        }
        "steal_lease" if sign_in || ["lease", "info"].contains(&endpoint) => Some("the call names no task"),
        "oversize" if ["download", "by_id"].contains(&endpoint) => Some("the client has no limit for data"),
        _ => None,
    }
}

impl Cell {
    pub(crate) fn name(&self) -> String {
        let length = if self.length == Length::Long { "/long" } else { "" };
        format!("{}/{}{length}", self.endpoint, self.kind.0)
    }

    /// The fault applies before a node has signed in.
    fn is_of_sign_in(&self) -> bool {
        SIGN_IN.contains(&self.endpoint)
    }

    /// The fault applies before the node begins to lease.
    pub(crate) fn applies_at_start(&self) -> bool {
        self.is_of_sign_in() || self.is_of_the_clock() || ["node_register", "pull"].contains(&self.endpoint)
    }

    /// A cell of the Node Runtime wire.
    pub(crate) fn is_run(&self) -> bool {
        RUN_ENDPOINTS.iter().any(|(endpoint, _)| *endpoint == self.endpoint)
    }

    /// A node waits ten minutes for a silent stream. The cell checks that the run is still in the queue.
    pub(crate) fn stays_queued(&self) -> bool {
        self.endpoint == "pull" && ["hang", "silence"].contains(&self.kind.0)
    }

    pub(crate) fn is_of_the_clock(&self) -> bool {
        self.kind.1.contains("clock_offset")
    }

    /// Whether the cell's own fault was applied to this request.
    pub(crate) fn struck(&self, seen: &JournalEntry) -> bool {
        seen.fault.is_some() && (self.endpoint == "any" || seen.endpoint == Some(self.endpoint))
    }

    /// The fault also applies to the requests of the test itself.
    pub(crate) fn strikes_the_test(&self) -> bool {
        ["any", "by_id"].contains(&self.endpoint) && !self.is_of_the_clock()
    }

    /// The node registers with its URL.
    pub(crate) fn is_by_url(&self) -> bool {
        self.endpoint == "register"
    }

    /// The fault file.
    pub(crate) fn file(&self) -> String {
        if self.is_of_the_clock() {
            return format!("[[fault]]\n{}", self.kind.1);
        }
        // A node pauses for seconds after a stream, and waits for up to 30 s for an answer of this wire.
        let once = self.endpoint == "pull" || (self.is_run() && self.kind.0 == "hang");
        let count = match self.length {
            Length::Twice if once => "count = 1\n",
            Length::Twice => "count = 2\n",
            Length::Long => "",
        };
        let rule = format!("[[fault]]\nname = \"cell\"\nendpoint = \"{}\"\n{count}{}\n", self.endpoint, self.kind.1);
        let first = match self.endpoint {
            // An upload is aborted only if something fails permanently.
            "abort" => "endpoint = \"part\"\nkind = \"status\"\ncode = 403",
            // Data is requested by its id after a broken download.
            "by_id" => "endpoint = \"download\"\nkind = \"reset_body\"\nafter_bytes = 100_000",
            _ => return rule,
        };
        format!("[[fault]]\nname = \"first\"\n{first}\ncount = 1\n{rule}")
    }
}
