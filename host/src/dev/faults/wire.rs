//! A connection that can be reset: what a crashed service or a lost route looks like to its client.

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

/// One connection, seen from those who answer on it.
#[derive(Default)]
pub(in crate::dev) struct Line {
    reset: AtomicBool,
    flushed: AtomicU64,
    waiting: Mutex<Option<Waker>>,
}

impl Line {
    /// The connection ends with a reset, whenever it ends.
    pub(super) fn reset(&self) {
        self.reset.store(true, Ordering::Release);
    }

    /// How often everything written so far was given to the system.
    pub(super) fn flushed(&self) -> u64 {
        self.flushed.load(Ordering::Acquire)
    }

    /// Ready once that has happened more than `times` times.
    pub(super) fn poll_flushed(&self, times: u64, cx: &Context<'_>) -> Poll<()> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if self.flushed() > times {
            return Poll::Ready(());
        }
        *waiting = Some(cx.waker().clone());
        Poll::Pending
    }

    fn count(&self) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        self.flushed.fetch_add(1, Ordering::AcqRel);
        if let Some(waker) = waiting.take() {
            waker.wake();
        }
    }
}

/// A socket that obeys its [`Line`].
pub(in crate::dev) struct Wire {
    socket: TcpStream,
    line: Arc<Line>,
}

impl Wire {
    pub(in crate::dev) fn new(socket: TcpStream) -> (Self, Arc<Line>) {
        let line = Arc::new(Line::default());
        (Self { socket, line: line.clone() }, line)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        if self.line.reset.load(Ordering::Acquire) {
            // Closing with nothing to linger for sends a reset in place of an end. Where the system
            // refuses, the connection has broken already.
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
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
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
        // A reset must not be announced by an orderly end.
        if self.line.reset.load(Ordering::Acquire) {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
