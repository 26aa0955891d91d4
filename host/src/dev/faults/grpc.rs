//! Faults of gRPC calls that HTTP/1 does not have: statuses, ends of a stream, GOAWAY, runs and nodes by their ids.

use std::{convert::Infallible, sync::Arc};

use ::http::{HeaderMap, Request, Response};
use axum::body::Body;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http_body_util::{BodyStream, StreamBody};
use hyper::body::Frame;
use percent_encoding::percent_decode_str;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use super::{
    AppliedFault, Kind,
    layer::{NoAnswer, Routes, filler, flushed, instead},
    wire::Line,
};
use crate::dev::{
    Inner,
    http::drain,
    node_runtime::{self, BeforeCall, CallFault, LeaseLimit},
};

/// Whether the fault differs from that of an HTTP/1 request.
pub(super) fn differs(applied: &AppliedFault) -> bool {
    let of_run = matches!(applied.kind, Kind::SecondLease | Kind::StealLease | Kind::ForgetNode);
    let of_wire =
        matches!(applied.kind, Kind::GrpcStatus { .. } | Kind::RstStream { .. } | Kind::Goaway | Kind::Oversize { .. });
    of_run || of_wire || applied.after_leases.is_some()
}

/// Answers a gRPC call to which such a fault applies.
pub(super) async fn answer(
    routes: &Routes<'_>,
    applied: AppliedFault,
    request: Request<Body>,
) -> Result<Response<Body>, NoAnswer> {
    if let Some(count) = applied.after_leases {
        return Ok(interrupted(routes, applied.kind, count, request).await);
    }
    let before = match applied.kind {
        Kind::GrpcStatus { code, message } => {
            drain(request.into_body()).await;
            return Ok(status(code, message).into_http());
        }
        Kind::RstStream { code } => return Err(reset_stream(code)),
        Kind::Goaway => {
            routes.line.close.cancel();
            None
        }
        Kind::Oversize { bytes } => return Ok(oversized(routes.answer(request).await, bytes)),
        Kind::SecondLease => Some(BeforeCall::SecondLease),
        Kind::StealLease => Some(BeforeCall::StealLease),
        Kind::ForgetNode => Some(BeforeCall::ForgetNode),
        _ => None,
    };
    Ok(routes.answer_grpc(request, CallFault { before, limit: None }).await)
}

impl Routes<'_> {
    /// Whether the request is a gRPC call.
    pub(super) fn is_grpc<B>(&self, request: &Request<B>) -> bool {
        self.server.config.wires.has_node_runtime() && node_runtime::is_grpc(request.headers())
    }

    pub(super) async fn answer_grpc(&self, request: Request<Body>, fault: CallFault) -> Response<Body> {
        node_runtime::call(self.server.clone(), self.line.close.clone(), fault, request).await
    }
}

/// Forgets the node whose heartbeat has this path.
pub(super) fn forget_node(server: &Inner, path: &str) {
    let segment = path.rsplit('/').next().unwrap_or_default();
    let id = percent_decode_str(segment.strip_suffix(":heartbeat").unwrap_or_default()).decode_utf8_lossy();
    server.nodes().remove(&id);
    server.changed();
}

fn status(code: i32, message: String) -> Status {
    Status::new(Code::from_i32(code), message)
}

fn reset_stream(code: u32) -> NoAnswer {
    NoAnswer::ResetStream(h2::Reason::from(code).into())
}

/// The stream of leases with the fault after `count` leases.
async fn interrupted(routes: &Routes<'_>, kind: Kind, count: u64, request: Request<Body>) -> Response<Body> {
    let reached = CancellationToken::new();
    let limit = Some(LeaseLimit { count, reached: reached.clone() });
    let answer = routes.answer_grpc(request, CallFault { before: None, limit }).await;
    if answer.headers().contains_key(Status::GRPC_STATUS) {
        return answer; // no stream was opened
    }
    let (line, stop) = (Arc::clone(routes.line), routes.server.stop.clone());
    let end = async move { end(kind, &line, &stop).await };
    let (head, body) = answer.into_parts();
    let leases = BodyStream::new(body).map(|frame| frame.map_err(|_| NoAnswer::Reset));
    // A frame never waits for a lease: what was offered before `reached` has passed.
    let body = StreamBody::new(leases.take_until(reached.cancelled_owned()).chain(stream::once(end)));
    Response::from_parts(head, Body::new(body))
}

/// The last frame of an interrupted stream.
async fn end(kind: Kind, line: &Line, stop: &CancellationToken) -> Result<Frame<Bytes>, NoAnswer> {
    match kind {
        Kind::GrpcStatus { code, message } => Ok(trailers(&status(code, message))),
        Kind::Goaway => {
            line.close.cancel();
            Ok(trailers(&Status::unavailable("the connection ends")))
        }
        Kind::RstStream { code } => {
            flushed(line).await; // a reset discards frames that wait
            Err(reset_stream(code))
        }
        Kind::Hang => {
            stop.cancelled().await;
            line.reset();
            Err(NoAnswer::Reset)
        }
        _ => {
            flushed(line).await;
            line.reset();
            Err(NoAnswer::Reset)
        }
    }
}

fn trailers(status: &Status) -> Frame<Bytes> {
    let mut headers = HeaderMap::new();
    status.add_header(&mut headers).expect("the message of a status is encoded");
    Frame::trailers(headers)
}

/// A message of that size, without a status.
fn oversized(answer: Response<Body>, bytes: usize) -> Response<Body> {
    let length = u32::try_from(bytes).unwrap_or(u32::MAX).to_be_bytes();
    let head = Bytes::from([&[0], &length[..]].concat());
    let pieces = stream::iter(std::iter::once(head).chain(filler(bytes)).map(Ok::<_, Infallible>));
    instead(answer, "application/grpc", Body::from_stream(pieces))
}
