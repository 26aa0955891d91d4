//! Lease, one heartbeat, complete, at the maximum rate of one thread.

use std::{
    cell::Cell,
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::Context;
use bytes::Bytes;
use http::Method;
use runner_host::{
    auth::{self, Auth, NodeKey},
    model::{Capability, StatusBoard},
    node_event::NodeEvents,
    transport,
};
use serde::Deserialize;
use tokio::{sync::watch, task::LocalSet};
use tokio_util::sync::CancellationToken;
use url::Url;

use super::{Small, Wire};

const HEARTBEAT: &str = r#"{"progress":{},"events":[]}"#;
const COMPLETE: &str = r#"{"outputs_index":{},"result":{},"output_cids":[],"meta":{}}"#;

/// Where to work.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Base URL of the dev server
    dev_server: Url,
    /// What to lease
    capability: String,
    /// Connections
    slots: usize,
}

/// Signed-in connections.
pub(super) struct Client {
    wires: Vec<Wire<Small>>,
}

/// The fields of a lease that are read.
#[derive(Deserialize)]
struct Lease<'a> {
    #[serde(borrow)]
    task: Task<'a>,
}

#[derive(Deserialize)]
struct Task<'a> {
    id: &'a str,
}

impl Client {
    pub(super) async fn connect(args: &Args) -> anyhow::Result<Self> {
        let token = sign_in(args).await?;
        let mut wires = Vec::new();
        for _ in 0..args.slots {
            wires.push(Wire::open(&args.dev_server, &token).await?);
        }
        Ok(Self { wires })
    }

    /// Completes `count` tasks and returns the time that took, in nanoseconds.
    pub(super) async fn work(&mut self, count: usize) -> anyhow::Result<String> {
        let left = Rc::new(Cell::new(count));
        let began = Instant::now();
        let local = LocalSet::new();
        let workers: Vec<_> =
            self.wires.drain(..).map(|wire| local.spawn_local(slot(wire, Rc::clone(&left)))).collect();
        let wires = local.run_until(async {
            let mut wires = Vec::new();
            for worker in workers {
                wires.push(worker.await??);
            }
            anyhow::Ok(wires)
        });
        self.wires = wires.await?;
        Ok(began.elapsed().as_nanos().to_string())
    }
}

/// One connection's share of the work.
async fn slot(mut wire: Wire<Small>, left: Rc<Cell<usize>>) -> anyhow::Result<Wire<Small>> {
    while let Some(rest) = left.get().checked_sub(1) {
        left.set(rest);
        let lease = loop {
            let lease = wire.call(Method::GET, "/v1/tasks", Small::default()).await?;
            if !lease.is_empty() {
                break lease;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        let lease: Lease<'_> = serde_json::from_slice(&lease).context("read a lease")?;
        let path = format!("/v1/tasks/{}/heartbeat", lease.task.id);
        wire.call(Method::POST, &path, Bytes::from_static(HEARTBEAT.as_bytes()).into()).await?;
        let path = format!("/v1/tasks/{}/complete", lease.task.id);
        wire.call(Method::POST, &path, Bytes::from_static(COMPLETE.as_bytes()).into()).await?;
    }
    Ok(wire)
}

/// Registers a fresh wallet and signs in. Returns the node token.
async fn sign_in(args: &Args) -> anyhow::Result<String> {
    let (key, _) = NodeKey::generate();
    let (_unchanged, capabilities) = watch::channel(vec![Capability::parse(&args.capability)?]);
    let config = auth::Config {
        dds: args.dev_server.clone(),
        reg_secret: "bench".to_owned().into(),
        key,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        form: auth::Form::Wallet,
        sign_in_domain: None,
        register_interval: Duration::from_secs(1),
        register_max_retry: 3,
        token_safety_ratio: 0.75,
        token_max_retries: 3,
        token_jitter: Duration::ZERO,
        request_timeout: Duration::from_secs(10),
    };
    let client = transport::Client::new(transport::Config::default());
    let auth = Auth::new(config, capabilities, client, NodeEvents::new(StatusBoard::new(1, Vec::new())));
    let (tokens, over) = (auth.tokens(), CancellationToken::new());
    let signing = tokio::spawn(auth.run(over.clone()));
    let token = tokens.bearer().await?.expose().to_owned();
    over.cancel();
    signing.await?;
    Ok(token)
}
