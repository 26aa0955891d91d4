//! The reference client: it makes only the calls and shows the possible maximum.
//!
//! It uses one thread and one connection per slot. It has no pool, and it parses only the id. `tasks` leases and
//! completes tasks. `data` downloads to a file and uploads from it. Orders are lines on stdin.
//!
//! `runs` completes runs of a Node Runtime control plane, over one connection. `control_plane` is that control plane.

mod control_plane;
mod data;
mod runs;
mod tasks;

use std::io::BufRead;

use anyhow::Context;
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, header};
use http_body_util::{BodyExt, Full};
use hyper::{
    body::{Body, Incoming},
    client::conn::http1::{self, SendRequest},
};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use url::Url;

/// The work of the bare client.
#[derive(clap::Subcommand)]
pub(crate) enum Work {
    /// Lease, one heartbeat, complete
    Tasks(tasks::Args),
    /// Download to a file, upload from it
    Data(data::Args),
    /// Complete the runs of a stream
    Runs(runs::Args),
    /// Lease runs to the clients of gRPC
    ControlPlane,
}

pub(crate) fn run(work: Work) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match work {
        Work::Tasks(args) => {
            let mut client = runtime.block_on(tasks::Client::connect(&args))?;
            serve(|count| {
                let count = count.parse().context("expected a number of tasks")?;
                runtime.block_on(client.work(count))
            })
        }
        Work::Data(args) => {
            let mut client = runtime.block_on(data::Client::connect(&args))?;
            serve(|id| runtime.block_on(client.copy(id)))
        }
        Work::Runs(args) => {
            println!("ready");
            runtime.block_on(runs::work(&args))
        }
        Work::ControlPlane => {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
            let plane = runtime.block_on(control_plane::ControlPlane::start())?;
            serve(|order| runtime.block_on(plane.answer(order)))
        }
    }
}

/// Executes orders until stdin ends.
fn serve(mut work: impl FnMut(&str) -> anyhow::Result<String>) -> anyhow::Result<()> {
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        println!("{}", work(&line?)?);
    }
    Ok(())
}

/// A persistent connection.
struct Wire<B> {
    sender: SendRequest<B>,
    host: HeaderValue,
    bearer: HeaderValue,
}

impl<B> Wire<B>
where
    B: Body<Data = Bytes> + Unpin + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    async fn open(base: &Url, bearer: &str) -> anyhow::Result<Self> {
        let address = base.socket_addrs(|| None)?.into_iter().next().context("the dev server has no address")?;
        let socket = TcpStream::connect(address).await?;
        socket.set_nodelay(true)?;
        let (sender, connection) = http1::handshake(TokioIo::new(socket)).await?;
        // This task ends when the sender is dropped.
        tokio::spawn(connection);
        let host = HeaderValue::from_str(&address.to_string())?;
        Ok(Self { sender, host, bearer: HeaderValue::from_str(&format!("Bearer {bearer}"))? })
    }

    async fn send(&mut self, method: Method, path: &str, body: B) -> anyhow::Result<Response<Incoming>> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, &self.host)
            .header(header::AUTHORIZATION, &self.bearer)
            .header(header::CONTENT_TYPE, "application/json")
            .body(body)?;
        self.sender.ready().await?;
        Ok(self.sender.send_request(request).await?)
    }

    /// Sends a request and reads the answer, which must be a success.
    async fn call(&mut self, method: Method, path: &str, body: B) -> anyhow::Result<Bytes> {
        let response = self.send(method, path, body).await?;
        let status = response.status();
        let bytes = response.into_body().collect().await?.to_bytes();
        anyhow::ensure!(status.is_success(), "{path}: {status}: {}", String::from_utf8_lossy(&bytes));
        Ok(bytes)
    }
}

type Small = Full<Bytes>;
