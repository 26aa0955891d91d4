//! `spawn`: work beside a run.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::task::JoinHandle;
use tracing::Instrument as _;

use super::panics::{Guarded, PanicNote};
use crate::author::Error;

/// The result of a future that [`spawn`] started. If it is dropped, the future goes on.
pub struct Spawned<T>(JoinHandle<Result<T, PanicNote>>);

impl<T> Spawned<T> {
    /// Ends the future at its next `await`. It then results in an error.
    pub fn abort(&self) {
        self.0.abort();
    }

    /// Whether the future has ended.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.0.is_finished()
    }
}

impl<T> Future for Spawned<T> {
    type Output = Result<T, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(|ended| match ended {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(note)) => Err(Error::msg(format!("a spawned future panicked: {} at {}", note.message, note.place))),
            // The future catches its panics, so this is the only other way it ends.
            Err(_) => Err(Error::msg("a spawned future was aborted")),
        })
    }
}

/// Runs a future beside the run, on the same runtime. Its log lines carry the task of the run, unlike those of a future
/// of `tokio::spawn`. A panic in it is an error of the returned future, with text and place.
///
/// The future may outlive the run. The calls of its context are rejected then, see [`crate::TaskCtx`].
///
/// ```
/// # use runner_sdk::{Error, Runner, TaskCtx, testing::TestHost};
/// # struct Halves;
/// # impl Runner for Halves {
/// # const CAPABILITY: &'static str = "/examples/halves/v1";
/// async fn run(&self, ctx: TaskCtx) -> Result<(), Error> {
///     let other = ctx.clone();
///     let left = runner_sdk::spawn(async move { other.output.put_bytes("left.txt", "left").await });
///     ctx.output.put_bytes("right.txt", "right").await?;
///     left.await??;
///     Ok(())
/// }
/// # }
/// # assert_eq!(TestHost::new().run_blocking(&Halves).outputs().len(), 2);
/// ```
///
/// # Panics
/// Outside of a tokio runtime, such as in a thread that the runner started.
pub fn spawn<F>(future: F) -> Spawned<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    Spawned(tokio::spawn(Guarded::new(future).instrument(tracing::Span::current())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn spawned_future_returns_its_value() {
        assert_eq!(spawn(async { 7 }).await.expect("no panic"), 7);
    }

    #[tokio::test]
    async fn panic_of_spawned_future_is_an_error() {
        let error = spawn(async { panic!("no {}", "film") }).await.expect_err("it panicked");
        assert!(error.chain().starts_with("a spawned future panicked: no film at "), "{error}");
    }

    #[tokio::test]
    async fn aborted_future_is_an_error() {
        let spawned = spawn(std::future::pending::<()>());
        spawned.abort();
        assert_eq!(spawned.await.expect_err("aborted").chain(), "a spawned future was aborted");
    }
}
