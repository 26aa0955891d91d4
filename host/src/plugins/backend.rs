//! Connects the calls of a runner with the lease and the data of its task.

use std::path::Path;

use bytes::Bytes;
use runner_sdk::{
    BoxFuture, PortError, PortErrorKind, TimeLeft, Usage,
    host_calls::{ArtifactSpec, Backend, Budget, Sink, Source},
};
use serde_json::Value;

use super::run::TaskData;
use crate::model::{self, DataQuery, HeldLease, InputStream, OutputStream, ProgressError, Setup, Token};

/// The lease and the data of one task.
pub(super) struct TaskBackend {
    /// The lease.
    pub(super) held_lease: HeldLease,
    /// The data.
    pub(super) data: TaskData,
    /// The operator granted the storage token.
    pub(super) grant_token: bool,
}

impl TaskBackend {
    /// The tokens that only this task's runner may know.
    pub(super) fn bearers(&self) -> Vec<Token> {
        if self.grant_token { self.held_lease.tokens() } else { Vec::new() }
    }
}

impl Backend for TaskBackend {
    fn budget(&self) -> &Budget {
        self.data.ports.budget()
    }

    fn progress(&self, value: Value) -> Result<(), PortError> {
        self.held_lease.progress.progress(value).map_err(limit)
    }

    fn event(&self, value: Value) -> BoxFuture<'_, Result<(), PortError>> {
        Box::pin(async move { self.held_lease.event(value).await.map_err(port_error) })
    }

    fn usage(&self, used: Usage) {
        let Usage { tokens_in, tokens_out, usd_cost, .. } = used;
        self.held_lease.add_usage(model::Usage { tokens_in, tokens_out, usd_cost });
    }

    fn cancel_reason(&self) -> String {
        self.held_lease.cancel.reason().map_or("", |reason| reason.as_str()).to_owned()
    }

    fn token(&self) -> BoxFuture<'_, Result<(String, u64), PortError>> {
        Box::pin(async move {
            if !self.grant_token {
                let text = "this plugin was not granted the token; the operator can set grant = [\"token\"]";
                return Err(PortError::new(PortErrorKind::Unsupported, text));
            }
            if let Setup::Refused(text) = self.held_lease.setup().await {
                return Err(PortError::new(PortErrorKind::Setup, text));
            }
            match self.held_lease.token_with_expiry() {
                Some((token, expires)) => {
                    let expires = expires.and_then(|seconds| u64::try_from(seconds).ok()).unwrap_or(0);
                    Ok((token.expose().to_owned(), expires))
                }
                None => Err(PortError::new(PortErrorKind::Unsupported, "this lease carries no token")),
            }
        })
    }

    fn time_left(&self) -> TimeLeft {
        let model::TimeLeft { lease, run } = self.held_lease.time_left();
        TimeLeft::new(lease, run)
    }

    fn make_folder(&self) -> Result<(), PortError> {
        (self.data.folder.make)().map_err(|text| PortError::new(PortErrorKind::Local, text))
    }

    fn open<'a>(&'a self, cid: &'a str) -> BoxFuture<'a, Result<Box<dyn Source>, PortError>> {
        Box::pin(async move {
            let source: Box<dyn Source> = Box::new(Reading(self.data.ports.open(cid).await.map_err(port_error)?));
            Ok(source)
        })
    }

    fn materialize<'a>(&'a self, cid: &'a str) -> BoxFuture<'a, Result<Value, PortError>> {
        Box::pin(async move {
            let input = self.data.ports.materialize(cid).await.map_err(port_error)?;
            serde_json::to_value(&input).map_err(|err| PortError::new(PortErrorKind::Local, err.to_string()))
        })
    }

    fn find<'a>(&'a self, query: &'a str) -> BoxFuture<'a, Result<Box<dyn Source>, PortError>> {
        Box::pin(async move {
            let query = DataQuery::parse(query.as_bytes()).map_err(port_error)?;
            let source: Box<dyn Source> = Box::new(Reading(self.data.ports.find(query).await.map_err(port_error)?));
            Ok(source)
        })
    }

    fn create(&self, spec: ArtifactSpec) -> BoxFuture<'_, Result<Box<dyn Sink>, PortError>> {
        Box::pin(async move {
            let sink: Box<dyn Sink> = Box::new(Writing(self.data.ports.create(spec).await.map_err(port_error)?));
            Ok(sink)
        })
    }

    fn put_file<'a>(&'a self, spec: ArtifactSpec, file: &'a str) -> BoxFuture<'a, Result<Option<String>, PortError>> {
        Box::pin(async move { self.data.ports.put_file(spec, Path::new(file)).await.map_err(port_error) })
    }
}

/// An input of the task's ports.
struct Reading(Box<dyn InputStream>);

impl Source for Reading {
    fn meta(&self) -> Value {
        serde_json::to_value(self.0.meta()).expect("metadata is texts and a number")
    }

    fn size(&self) -> Option<u64> {
        self.0.meta().size
    }

    fn next(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, PortError>> {
        Box::pin(async move { self.0.next().await.map_err(port_error) })
    }
}

/// An artifact of the task's ports.
struct Writing(Box<dyn OutputStream>);

impl Sink for Writing {
    fn write(&mut self, piece: Bytes) -> BoxFuture<'_, Result<(), PortError>> {
        Box::pin(async move { self.0.write(piece).await.map_err(port_error) })
    }

    fn finish(self: Box<Self>) -> BoxFuture<'static, Result<Option<String>, PortError>> {
        Box::pin(async move { self.0.finish().await.map_err(port_error) })
    }

    fn abort(self: Box<Self>) -> BoxFuture<'static, ()> {
        self.0.abort()
    }
}

fn limit(err: ProgressError) -> PortError {
    PortError::new(PortErrorKind::Limit, err.to_string())
}

/// The same error as the author's API has it.
fn port_error(err: model::PortError) -> PortError {
    use model::PortErrorKind as Ports;
    let kind = match err.kind {
        Ports::BadRequest => PortErrorKind::BadRequest,
        Ports::InvalidPath => PortErrorKind::InvalidPath,
        Ports::Unauthorized => PortErrorKind::Unauthorized,
        Ports::NotFound => PortErrorKind::NotFound,
        Ports::Conflict => PortErrorKind::Conflict,
        Ports::Server => PortErrorKind::Server,
        Ports::Network => PortErrorKind::Network,
        Ports::Malformed => PortErrorKind::Malformed,
        Ports::Unsupported => PortErrorKind::Unsupported,
        Ports::LeaseOver => PortErrorKind::LeaseOver,
        Ports::Setup => PortErrorKind::Setup,
        Ports::Local => PortErrorKind::Local,
        Ports::Limit => PortErrorKind::Limit,
        Ports::TaskOver => PortErrorKind::TaskOver,
        Ports::Other => PortErrorKind::Other,
    };
    PortError::new(kind, err.message)
}
