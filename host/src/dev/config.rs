//! Settings of the dev server, and the reasons why it does not start.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use super::Faults;

/// The control planes that the dev server is. Both share one queue and one port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Wires {
    /// The posemesh services.
    #[default]
    Dms,
    /// A Node Runtime control plane: REST and gRPC.
    NodeRuntime,
    /// Both.
    Both,
}

impl Wires {
    /// Whether the posemesh services are served.
    #[must_use]
    pub fn has_dms(self) -> bool {
        self != Self::NodeRuntime
    }

    /// Whether the Node Runtime control plane is served.
    #[must_use]
    pub fn has_node_runtime(self) -> bool {
        self != Self::Dms
    }

    /// Their names on the command line.
    pub(super) fn names(self) -> &'static [&'static str] {
        match self {
            Self::Dms => &["dms"],
            Self::NodeRuntime => &["node-runtime"],
            Self::Both => &["dms", "node-runtime"],
        }
    }
}

/// Settings of the dev server. [`Config::default`] is what `runner-host dev` uses.
#[derive(Clone, Debug)]
pub struct Config {
    /// The control planes that are served.
    pub wires: Wires,
    /// Whether the Node Runtime control plane behaves as the original (docs/protocols/node-runtime.md).
    pub origin: bool,
    /// Address to serve on. Only loopback is accepted. Port 0 selects a free port.
    pub bind: SocketAddr,
    /// Folder in which domain data survives a restart. If absent, a temporary folder is used and removed on stop.
    pub data: Option<PathBuf>,
    /// Parent of that temporary folder. If absent, the system's default is used.
    pub temporary: Option<PathBuf>,
    /// Lifetime of a lease without a heartbeat.
    pub lease_ttl: Duration,
    /// Lifetime of the lease of a run. It is not renewed.
    pub run_ttl: Duration,
    /// How long after the end of its lease a run may still be reported. A node reports the run that reached the end.
    pub run_report_time: Duration,
    /// How long a run stays offered on a stream without an acknowledgement.
    pub offer_ttl: Duration,
    /// Lifetime of a login.
    pub node_token_ttl: Duration,
    /// Lifetime of a domain token.
    pub domain_token_ttl: Duration,
    /// Age from which a heartbeat returns a newer domain token.
    pub domain_token_renew_after: Duration,
    /// How long a replaced domain token is still accepted.
    pub domain_token_grace: Duration,
    /// Lifetime of an author's grant.
    pub grant_ttl: Duration,
    /// Lifetime of a sign-in nonce.
    pub nonce_ttl: Duration,
    /// Lifetime of an unfinished multipart upload.
    pub upload_ttl: Duration,
    /// Leases one node may hold at once. A poll above the limit is answered 409.
    pub leases_per_node: Option<usize>,
    /// Interval of the health requests to a node that registered with a URL.
    pub health_interval: Duration,
    /// Answer 409 to a registration without a URL while the same wallet has a live token or lease. A registration
    /// over a connection of that same node is exempt. Otherwise a repeat is a refresh. With a URL, a second node is
    /// one that answers at another URL.
    pub strict_identity: bool,
    /// The registration secret to require. If absent, any secret is accepted.
    pub reg_secret: Option<String>,
    /// Largest single upload request in bytes, as `/api/v1/info` reports it. 0 means no limit.
    pub request_max_bytes: i64,
    /// Largest stored item in bytes, as `/api/v1/info` reports it. 0 means no limit.
    pub domain_data_max_bytes: i64,
    /// Whether multipart uploads are offered. If not, initiating one is answered 404.
    pub multipart: bool,
    /// Size of every part of a multipart upload except the last.
    pub part_size: u64,
    /// Finished tasks that are remembered, with their jobs. Above the limit the oldest jobs are dropped.
    pub finished_tasks_max: usize,
    /// Requests remembered in the journal. 0 disables it.
    pub journal_max: usize,
    /// The fault rules.
    pub faults: Faults,
    /// Time limit for open requests when the dev server stops.
    pub stop_grace: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            wires: Wires::default(),
            origin: false,
            bind: SocketAddr::from(([127, 0, 0, 1], 0)),
            data: None,
            temporary: None,
            lease_ttl: Duration::from_secs(60),
            run_ttl: Duration::from_secs(300),
            run_report_time: Duration::from_secs(5),
            offer_ttl: Duration::from_secs(10),
            node_token_ttl: Duration::from_secs(15 * 60),
            domain_token_ttl: Duration::from_secs(15 * 60),
            domain_token_renew_after: Duration::from_secs(5 * 60),
            domain_token_grace: Duration::from_secs(60),
            grant_ttl: Duration::from_secs(24 * 60 * 60),
            nonce_ttl: Duration::from_secs(5 * 60),
            upload_ttl: Duration::from_secs(60 * 60),
            leases_per_node: None,
            health_interval: Duration::from_secs(30),
            strict_identity: false,
            reg_secret: None,
            request_max_bytes: 64 * 1024 * 1024,
            domain_data_max_bytes: 0,
            multipart: true,
            part_size: 16 * 1024 * 1024,
            finished_tasks_max: 200_000,
            journal_max: 4096,
            faults: Faults::default(),
            stop_grace: Duration::from_secs(2),
        }
    }
}

/// The maximum lifetime of a token or lease. It ensures that additions to the clock cannot overflow.
const TTL_MAX: Duration = Duration::from_secs(10 * 366 * 24 * 60 * 60);

impl Config {
    /// Rejects settings that cannot work.
    pub(super) fn check(&self) -> Result<(), DevError> {
        if !self.bind.ip().is_loopback() {
            return Err(DevError::NotLoopback { bind: self.bind });
        }
        if self.wires.has_node_runtime() && !cfg!(feature = "grpc") {
            return Err(DevError::NoGrpc);
        }
        if self.part_size == 0 {
            return Err(DevError::Setting { name: "part_size", reason: "is 0, expected at least 1 byte".to_owned() });
        }
        for (name, ttl) in [
            ("lease_ttl", self.lease_ttl),
            ("run_ttl", self.run_ttl),
            ("run_report_time", self.run_report_time),
            ("offer_ttl", self.offer_ttl),
            ("node_token_ttl", self.node_token_ttl),
            ("domain_token_ttl", self.domain_token_ttl),
            ("grant_ttl", self.grant_ttl),
            ("nonce_ttl", self.nonce_ttl),
            ("upload_ttl", self.upload_ttl),
        ] {
            if ttl.is_zero() || ttl > TTL_MAX {
                return Err(DevError::Setting {
                    name,
                    reason: format!("is {ttl:?}, expected more than zero and less than ten years"),
                });
            }
        }
        Ok(())
    }
}

/// The reason why the dev server did not start.
#[derive(Debug, thiserror::Error)]
pub enum DevError {
    /// The dev server must never be reachable from other machines.
    #[error("the dev server serves loopback only, {bind} is not; use 127.0.0.1 or [::1]")]
    NotLoopback {
        /// The requested address.
        bind: SocketAddr,
    },
    /// The binary cannot be a Node Runtime control plane.
    #[error("this binary was built without gRPC, which the plane node-runtime needs; build it with the feature grpc")]
    NoGrpc,
    /// A setting that cannot work.
    #[error("setting {name} {reason}")]
    Setting {
        /// Field of [`Config`].
        name: &'static str,
        /// The value found and the value expected.
        reason: String,
    },
    /// The port is in use, or the system rejected the call.
    #[error("cannot listen on {bind}: {source}")]
    Listen {
        /// The requested address.
        bind: SocketAddr,
        /// The error of the system.
        source: std::io::Error,
    },
    /// Another dev server uses the data folder.
    #[error("data folder {} is in use by another dev server; stop that one or name another folder", path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// The data folder cannot be used.
    #[error("data folder {}: {reason}", path.display())]
    Data {
        /// The folder, or the file in it.
        path: PathBuf,
        /// The error.
        reason: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn non_loopback_bind_address_is_refused() {
        let config = Config { bind: SocketAddr::from(([0, 0, 0, 0], 0)), ..Config::default() };
        let err = config.check().expect_err("not loopback");
        assert_eq!(err.to_string(), "the dev server serves loopback only, 0.0.0.0:0 is not; use 127.0.0.1 or [::1]");
    }

    #[test]
    fn zero_ttl_error_names_the_setting() {
        let config = Config { lease_ttl: Duration::ZERO, ..Config::default() };
        assert!(config.check().expect_err("zero").to_string().starts_with("setting lease_ttl is 0ns"));
        assert!(Config::default().check().is_ok());
    }
}
