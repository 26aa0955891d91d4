//! Acknowledges and completes the runs of a stream. It does not read what they ask for.

use std::rc::Rc;

use anyhow::Context;
use runner_host::{
    leases::node_runtime::lease::{
        AckRequest, CompleteRequest, PullRequest, TimingInfo, lease_service_client::LeaseServiceClient,
    },
    transport::{self, Http2, Http2Limits},
};
use tokio::task::{JoinSet, LocalSet};
use url::Url;

use super::control_plane::LIMIT;

/// The windows of a client that nothing holds back.
const CONNECTION: Http2Limits =
    Http2Limits { stream_window: 1 << 20, ping_every: LIMIT, ping_patience: LIMIT, tcp_patience: LIMIT };

/// Where to work.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Base URL of the control plane
    control_plane: Url,
    /// The name of this client
    node: String,
    /// Runs at once
    slots: i32,
}

/// Works until the control plane ends the stream.
pub(super) async fn work(args: &Args) -> anyhow::Result<()> {
    let client = transport::Client::new(transport::Config::default());
    let connection: Http2<tonic::body::Body> = client.http2(&args.control_plane, CONNECTION).await?;
    let origin = args.control_plane.as_str().trim_end_matches('/').parse().context("the URL of the control plane")?;
    let mut wire = LeaseServiceClient::with_origin(connection, origin);
    let node: Rc<str> = args.node.as_str().into();
    let pull = PullRequest { node_id: node.to_string(), max_leases: args.slots };
    let mut stream = wire.pull(pull).await?.into_inner();
    let calls = async {
        let mut calls = JoinSet::new();
        while let Some(lease) = stream.message().await? {
            let (mut acks, mut reports, node) = (wire.clone(), wire.clone(), Rc::clone(&node));
            calls.spawn_local(async move {
                let ack = AckRequest {
                    lease_id: lease.lease_id.clone(),
                    node_id: node.to_string(),
                    ack_timestamp_unix_ms: jiff::Timestamp::now().as_millisecond(),
                };
                let report = CompleteRequest {
                    lease_id: lease.lease_id,
                    run_id: lease.run_id,
                    node_id: node.to_string(),
                    timings: Some(TimingInfo::default()),
                    ..CompleteRequest::default()
                };
                let answers = tokio::try_join!(acks.ack(ack), reports.complete(report));
                answers.map(|(ack, report)| ack.into_inner().success && report.into_inner().success)
            });
            while let Some(ended) = calls.try_join_next() {
                anyhow::ensure!(ended??, "the control plane did not accept a call");
            }
        }
        Ok(())
    };
    LocalSet::new().run_until(calls).await
}
