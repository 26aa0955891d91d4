//! A connection that can be reset, as a client sees it after a service crash or a lost route.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_util::sync::CancellationToken;

/// The state of one connection, shared with the handlers that answer on it.
pub(in crate::dev) struct Line {
    /// Ends the connection after the answers in progress. HTTP/2 sends GOAWAY.
    #[cfg_attr(not(feature = "grpc"), expect(dead_code, reason = "only gRPC reads it"))]
    pub(super) close: CancellationToken,
    reset: AtomicBool,
    flushed: AtomicU64,
    waiting: Mutex<Option<Waker>>,
}

impl Line {
    /// Makes the connection end with a reset, at the latest at the next write.
    pub(super) fn reset(&self) {
        self.reset.store(true, Ordering::Release);
    }

    /// The number of times that all bytes written so far were passed to the system.
    pub(super) fn flushed(&self) -> u64 {
        self.flushed.load(Ordering::Acquire)
    }

    /// Ready when that number is above `times`.
    pub(super) fn poll_flushed(&self, times: u64, cx: &Context<'_>) -> Poll<()> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if self.flushed() > times {
            return Poll::Ready(());
        }
        *waiting = Some(cx.waker().clone());
        Poll::Pending
    }

    /// HTTP/2 would go on with the other requests of the connection.
    fn check(&self) -> io::Result<()> {
        if self.reset.load(Ordering::Acquire) { Err(io::ErrorKind::ConnectionReset.into()) } else { Ok(()) }
    }

    fn count(&self) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        self.flushed.fetch_add(1, Ordering::AcqRel);
        if let Some(waker) = waiting.take() {
            waker.wake();
        }
    }
}

/// A socket that its [`Line`] controls.
pub(in crate::dev) struct Wire {
    socket: TcpStream,
    line: Arc<Line>,
}

impl Wire {
    pub(in crate::dev) fn new(socket: TcpStream, close: CancellationToken) -> (Self, Arc<Line>) {
        let (reset, flushed, waiting) = (AtomicBool::default(), AtomicU64::default(), Mutex::default());
        let line = Arc::new(Line { close, reset, flushed, waiting });
        (Self { socket, line: line.clone() }, line)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        if self.line.reset.load(Ordering::Acquire) {
            // Closing with a linger time of zero sends a reset instead of a normal end. If the system rejects the
            // option, the connection is broken already.
            let _ = self.socket.set_zero_linger();
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(cx, buf)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.line.check()?;
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.line.check()?;
        Pin::new(&mut self.socket).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        std::task::ready!(Pin::new(&mut self.socket).poll_flush(cx))?;
        self.line.count();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // An orderly shutdown must not precede a reset.
        if self.line.reset.load(Ordering::Acquire) {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
