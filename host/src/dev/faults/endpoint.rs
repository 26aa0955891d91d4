//! The calls of both wire protocols by name.

use axum::http::{HeaderMap, Method, Uri, header};

/// A call a node or an author makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Endpoint {
    /// `POST {DDS}/internal/v1/auth/siwe/request`
    Nonce,
    /// `POST {DDS}/internal/v1/auth/siwe/verify`
    Verify,
    /// `POST {DDS}/internal/v1/nodes/register-wallet`
    RegisterWallet,
    /// `POST {DDS}/internal/v1/nodes/register`
    Register,
    /// `GET {DMS}/tasks`
    Lease,
    /// `POST {DMS}/tasks/{id}/heartbeat`
    Heartbeat,
    /// `POST {DMS}/tasks/{id}/complete`
    Complete,
    /// `POST {DMS}/tasks/{id}/fail`
    Fail,
    /// `GET {DS}/api/v1/info`
    Info,
    /// `GET {DS}/…/data` that asks for metadata.
    List,
    /// `GET {DS}/…/data` that asks for content (`Accept: multipart/form-data`).
    Download,
    /// `GET {DS}/…/data/{id}`, metadata or raw content.
    ById,
    /// `POST {DS}/…/data`
    Create,
    /// `PUT {DS}/…/data`
    Replace,
    /// `DELETE {DS}/…/data/{id}`
    Delete,
    /// `POST {DS}/…/data/multipart?uploads`
    Initiate,
    /// `PUT {DS}/…/data/multipart`
    Part,
    /// `POST {DS}/…/data/multipart?uploadId=`
    CompleteUpload,
    /// `DELETE {DS}/…/data/multipart`
    Abort,
    /// `POST /v1/nodes:register`
    NodeRegister,
    /// `POST /v1/nodes/{id}:heartbeat`
    NodeHeartbeat,
    /// `DELETE /v1/nodes/{id}`
    NodeRemove,
    /// gRPC `Pull`
    Pull,
    /// gRPC `Ack`
    Ack,
    /// gRPC `Complete`
    RunComplete,
    /// gRPC `Fail`
    RunFail,
    /// The author's calls: `{DMS}/jobs` and below, `{DMS}/nodes/busy`.
    Jobs,
    /// The author's calls: `/v1/runs` and below.
    Runs,
}

/// The client that makes a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::dev) enum Client {
    /// A node, or any other client that is not `submit`.
    Node,
    /// `runner-host submit`.
    Submit,
}

impl Client {
    /// Determines the client from the client id of a request.
    pub(in crate::dev) fn of(headers: &HeaderMap) -> Self {
        let id = headers.get("posemesh-client-id");
        if id.is_some_and(|id| id == "runner-host-submit") { Self::Submit } else { Self::Node }
    }

    /// The error is the reason why this client never makes the call.
    pub(super) fn makes(self, call: Endpoint) -> Result<(), &'static str> {
        use Endpoint::{Abort, ById, CompleteUpload, Create, Info, Initiate, Jobs, List, Part, Runs};
        match (self, call) {
            (Self::Node, Jobs | Runs) => Err("no node makes this call"),
            (Self::Node, _)
            | (Self::Submit, Info | List | ById | Create | Initiate | Part | CompleteUpload | Abort | Jobs | Runs) => {
                Ok(())
            }
            (Self::Submit, _) => Err("submit does not make this call"),
        }
    }
}

/// A name for several calls.
const GROUPS: [(&str, &[Endpoint]); 6] = {
    use Endpoint::{
        Abort, Ack, ById, Complete, CompleteUpload, Create, Delete, Download, Fail, Heartbeat, Info, Initiate, Lease,
        List, NodeHeartbeat, NodeRegister, NodeRemove, Nonce, Part, Pull, Register, RegisterWallet, Replace,
        RunComplete, RunFail, Verify,
    };
    [
        ("any", Endpoint::of_nodes()),
        ("dds", &[Nonce, Verify, RegisterWallet, Register]),
        ("dms", &[Lease, Heartbeat, Complete, Fail]),
        (
            "domain_server",
            &[Info, List, Download, ById, Create, Replace, Delete, Initiate, Part, CompleteUpload, Abort],
        ),
        ("upload", &[Create, Replace]),
        ("node_runtime", &[NodeRegister, NodeHeartbeat, NodeRemove, Pull, Ack, RunComplete, RunFail]),
    ]
};

impl Endpoint {
    /// Every call.
    pub const ALL: &'static [Self] = &[
        Self::Nonce,
        Self::Verify,
        Self::RegisterWallet,
        Self::Register,
        Self::Lease,
        Self::Heartbeat,
        Self::Complete,
        Self::Fail,
        Self::Info,
        Self::List,
        Self::Download,
        Self::ById,
        Self::Create,
        Self::Replace,
        Self::Delete,
        Self::Initiate,
        Self::Part,
        Self::CompleteUpload,
        Self::Abort,
        Self::NodeRegister,
        Self::NodeHeartbeat,
        Self::NodeRemove,
        Self::Pull,
        Self::Ack,
        Self::RunComplete,
        Self::RunFail,
        Self::Jobs,
        Self::Runs,
    ];

    /// All calls except the author's, which are last.
    const fn of_nodes() -> &'static [Self] {
        Self::ALL.split_at(Self::ALL.len() - 2).0
    }

    /// Its name in fault files and in the journal.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Nonce => "nonce",
            Self::Verify => "verify",
            Self::RegisterWallet => "register_wallet",
            Self::Register => "register",
            Self::Lease => "lease",
            Self::Heartbeat => "heartbeat",
            Self::Complete => "complete",
            Self::Fail => "fail",
            Self::Info => "info",
            Self::List => "list",
            Self::Download => "download",
            Self::ById => "by_id",
            Self::Create => "create",
            Self::Replace => "replace",
            Self::Delete => "delete",
            Self::Initiate => "initiate",
            Self::Part => "part",
            Self::CompleteUpload => "complete_upload",
            Self::Abort => "abort",
            Self::NodeRegister => "node_register",
            Self::NodeHeartbeat => "node_heartbeat",
            Self::NodeRemove => "node_remove",
            Self::Pull => "pull",
            Self::Ack => "ack",
            Self::RunComplete => "run_complete",
            Self::RunFail => "run_fail",
            Self::Jobs => "jobs",
            Self::Runs => "runs",
        }
    }

    /// The calls that a word of a fault file names.
    pub(super) fn named(word: &str) -> Option<Vec<Self>> {
        if let Some((_, calls)) = GROUPS.iter().find(|(group, _)| *group == word) {
            return Some(calls.to_vec());
        }
        Self::ALL.iter().find(|call| call.name() == word).map(|call| vec![*call])
    }

    /// Every word that [`Endpoint::named`] accepts.
    pub(super) fn words() -> impl Iterator<Item = &'static str> {
        Self::ALL.iter().map(|call| call.name()).chain(GROUPS.iter().map(|(group, _)| *group))
    }

    /// Whether the call carries a node token.
    pub(super) fn is_of_dms(self) -> bool {
        matches!(self, Self::Lease | Self::Heartbeat | Self::Complete | Self::Fail)
    }

    /// Whether the call carries a domain token.
    pub(super) fn is_of_domain(self) -> bool {
        let sign_in = matches!(self, Self::Nonce | Self::Verify | Self::RegisterWallet | Self::Register);
        let node = matches!(self, Self::NodeRegister | Self::NodeHeartbeat | Self::NodeRemove);
        !(sign_in || node || self == Self::Info || self.is_of_dms() || self.is_grpc() || self.is_of_authors())
    }

    /// Whether the call is gRPC.
    pub(super) fn is_grpc(self) -> bool {
        self == Self::Pull || self.names_run()
    }

    /// Whether the call is about one run.
    pub(super) fn names_run(self) -> bool {
        matches!(self, Self::Ack | Self::RunComplete | Self::RunFail)
    }

    /// Whether authors make the call, and no node.
    pub(super) fn is_of_authors(self) -> bool {
        matches!(self, Self::Jobs | Self::Runs)
    }

    /// The call that a request makes. `None`: it is no call of the wire protocol.
    pub(in crate::dev) fn of(method: &Method, uri: &Uri, headers: &HeaderMap) -> Option<Self> {
        let (get, post, put) = (method == Method::GET, method == Method::POST, method == Method::PUT);
        let delete = method == Method::DELETE;
        let path: Vec<&str> = uri.path().split('/').skip(1).collect();
        let asks = |name: &str| {
            let query = uri.query().unwrap_or_default().as_bytes();
            url::form_urlencoded::parse(query).any(|(key, _)| key == name)
        };
        Some(match path[..] {
            ["internal", "v1", "auth", "siwe", "request"] if post => Self::Nonce,
            ["internal", "v1", "auth", "siwe", "verify"] if post => Self::Verify,
            ["internal", "v1", "nodes", "register-wallet"] if post => Self::RegisterWallet,
            ["internal", "v1", "nodes", "register"] if post => Self::Register,
            ["v1", "tasks"] if get => Self::Lease,
            ["v1", "tasks", _, "heartbeat"] if post => Self::Heartbeat,
            ["v1", "tasks", _, "complete"] if post => Self::Complete,
            ["v1", "tasks", _, "fail"] if post => Self::Fail,
            ["v1", "nodes:register"] if post => Self::NodeRegister,
            ["v1", "nodes", segment] if post && segment.ends_with(":heartbeat") => Self::NodeHeartbeat,
            ["v1", "nodes", _] if delete => Self::NodeRemove,
            ["lease.LeaseService", "Pull"] if post => Self::Pull,
            ["lease.LeaseService", "Ack"] if post => Self::Ack,
            ["lease.LeaseService", "Complete"] if post => Self::RunComplete,
            ["lease.LeaseService", "Fail"] if post => Self::RunFail,
            ["v1", "jobs", ..] | ["v1", "nodes", "busy"] => Self::Jobs,
            ["v1", "runs", ..] => Self::Runs,
            ["api", "v1", "info"] if get => Self::Info,
            ["api", "v1", "domains", _, "data"] if get => {
                let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
                if accept.contains("multipart/form-data") { Self::Download } else { Self::List }
            }
            ["api", "v1", "domains", _, "data"] if post => Self::Create,
            ["api", "v1", "domains", _, "data"] if put => Self::Replace,
            ["api", "v1", "domains", _, "data", "multipart"] if post && asks("uploads") => Self::Initiate,
            ["api", "v1", "domains", _, "data", "multipart"] if post => Self::CompleteUpload,
            ["api", "v1", "domains", _, "data", "multipart"] if put => Self::Part,
            ["api", "v1", "domains", _, "data", "multipart"] if delete => Self::Abort,
            ["api", "v1", "domains", _, "data", _] if get => Self::ById,
            ["api", "v1", "domains", _, "data", _] if delete => Self::Delete,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(method: Method, uri: &'static str, accept: &'static str, name: Option<&str>) {
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, accept.parse().expect("a header"));
        let found = Endpoint::of(&method, &Uri::from_static(uri), &headers);
        assert_eq!(found.map(Endpoint::name), name, "{method} {uri}");
    }

    #[test]
    fn each_call_of_the_wire_has_a_name() {
        let (any, form) = ("*/*", "multipart/form-data");
        check(Method::POST, "/internal/v1/auth/siwe/request", any, Some("nonce"));
        check(Method::POST, "/internal/v1/nodes/register", any, Some("register"));
        check(Method::GET, "/v1/tasks?capability=%2Fa", any, Some("lease"));
        check(Method::POST, "/v1/tasks/7/complete", any, Some("complete"));
        check(Method::GET, "/api/v1/domains/d/data?ids=1", form, Some("download"));
        check(Method::GET, "/api/v1/domains/d/data?name=1", "application/json", Some("list"));
        check(Method::GET, "/api/v1/domains/d/data/7?raw=true", any, Some("by_id"));
        check(Method::DELETE, "/api/v1/domains/d/data/7", any, Some("delete"));
        check(Method::POST, "/api/v1/domains/d/data/multipart?uploads", any, Some("initiate"));
        check(Method::POST, "/api/v1/domains/d/data/multipart?uploads=", any, Some("initiate"));
        check(Method::POST, "/api/v1/domains/d/data/multipart?uploadId=7", any, Some("complete_upload"));
        check(Method::DELETE, "/api/v1/domains/d/data/multipart?uploadId=7", any, Some("abort"));
        check(Method::POST, "/v1/jobs/7/cancel", any, Some("jobs"));
        check(Method::POST, "/v1/nodes:register", any, Some("node_register"));
        check(Method::POST, "/v1/nodes/a%2Fb:heartbeat", any, Some("node_heartbeat"));
        check(Method::DELETE, "/v1/nodes/busy", any, Some("node_remove"));
        check(Method::GET, "/v1/nodes/busy", any, Some("jobs"));
        check(Method::POST, "/lease.LeaseService/Pull", any, Some("pull"));
        check(Method::POST, "/lease.LeaseService/Ack", any, Some("ack"));
        check(Method::POST, "/lease.LeaseService/Complete", any, Some("run_complete"));
        check(Method::POST, "/lease.LeaseService/Fail", any, Some("run_fail"));
        check(Method::POST, "/v1/runs/7:cancel", any, Some("runs"));
        check(Method::GET, "/dev/v1/world", any, None);
        check(Method::DELETE, "/v1/tasks", any, None);
    }

    #[test]
    fn endpoint_name_selects_one_call_or_a_group() {
        assert_eq!(Endpoint::named("part"), Some(vec![Endpoint::Part]));
        assert_eq!(Endpoint::named("upload"), Some(vec![Endpoint::Create, Endpoint::Replace]));
        let any = Endpoint::named("any").expect("a group");
        assert!(any.len() == Endpoint::ALL.len() - 2 && !any.iter().any(|call| call.is_of_authors()));
        assert_eq!(Endpoint::named("Part"), None);
    }
}
