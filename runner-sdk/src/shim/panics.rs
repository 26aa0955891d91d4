//! Catches panics before they reach the boundary, and keeps their text and place.

use std::{
    any::Any,
    backtrace::Backtrace,
    cell::RefCell,
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    pin::Pin,
    sync::Once,
    task::{Context, Poll},
};

/// Text and place of a panic.
#[derive(Clone, Debug)]
pub(crate) struct PanicNote {
    pub(crate) message: String,
    pub(crate) place: String,
}

thread_local! {
    static LAST: RefCell<Option<PanicNote>> = const { RefCell::new(None) };
}

/// Installs the process-wide hook once. In a plugin this is the hook of the plugin's own copy of std. `report`
/// receives note and backtrace. `chain` keeps the previous hook active.
///
/// As in std, a backtrace is captured only if `RUST_BACKTRACE` or `RUST_LIB_BACKTRACE` asks for it.
/// The first one makes std cache the debug information of all loaded files, once per plugin, and
/// nothing frees that cache.
pub(crate) fn install_hook(report: Option<fn(&PanicNote, &Backtrace)>, chain: bool) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let note = PanicNote {
                message: payload_text(info.payload()),
                place: info.location().map_or_else(unknown, |at| format!("{}:{}", at.file(), at.line())),
            };
            if let Some(report) = report {
                report(&note, &Backtrace::capture());
            }
            LAST.with(|last| *last.borrow_mut() = Some(note));
            if chain {
                previous(info);
            }
        }));
    });
}

fn unknown() -> String {
    "unknown place".to_owned()
}

/// The panic's text. The compiler may fold `panic!` with arguments into a `&str`, so both are tried.
fn payload_text(payload: &(dyn Any + Send)) -> String {
    if let Some(text) = payload.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text.clone()
    } else {
        "a panic without text".to_owned()
    }
}

fn take_note(payload: &(dyn Any + Send)) -> PanicNote {
    let message = payload_text(payload);
    // A panic that the author caught has left an old note. `resume_unwind` writes no note.
    let note = LAST.with(|last| last.borrow_mut().take()).filter(|note| note.message == message);
    note.unwrap_or_else(|| PanicNote { message, place: unknown() })
}

/// Runs `work` and turns a panic into a note.
pub(crate) fn guard<T>(work: impl FnOnce() -> T) -> Result<T, PanicNote> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|payload| {
        let note = take_note(&*payload);
        // Dropping a payload may panic as well, so it is leaked.
        std::mem::forget(payload);
        note
    })
}

/// Drives a future. Turns a panic in it, or in its destructor, into a note.
pub(crate) struct Guarded<F>(Option<Pin<Box<F>>>);

impl<F: Future> Guarded<F> {
    pub(crate) fn new(future: F) -> Self {
        Self(Some(Box::pin(future)))
    }
}

impl<F: Future> Future for Guarded<F> {
    type Output = Result<F::Output, PanicNote>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let future = self.0.as_mut().expect("a guarded future is not polled after its end");
        let ended = match guard(|| future.as_mut().poll(cx)) {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(output)) => Ok(output),
            Err(note) => Err(note),
        };
        let dropped = guard(|| drop(self.0.take()));
        Poll::Ready(ended.and_then(|output| dropped.map(|()| output)))
    }
}

impl<F> Drop for Guarded<F> {
    fn drop(&mut self) {
        let _ = guard(|| drop(self.0.take()));
    }
}

/// Runs a long computation on its own thread and waits for it. There it blocks no other task. If the computation
/// panics, the caller panics with the same place.
///
/// Dropping the returned future does not stop the computation. Let it check
/// [`crate::ControlPlane::is_cancelled`] from time to time.
pub async fn spawn_blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let span = tracing::Span::current();
    let ended = tokio::task::spawn_blocking(move || {
        let _entered = span.enter();
        catch_unwind(AssertUnwindSafe(work)).map_err(|payload| (take_note(&*payload), payload))
    });
    match ended.await.expect("the blocking thread catches panics, and the runtime outlives its tasks") {
        Ok(value) => value,
        Err((note, payload)) => {
            LAST.with(|last| *last.borrow_mut() = Some(note));
            resume_unwind(payload)
        }
    }
}
