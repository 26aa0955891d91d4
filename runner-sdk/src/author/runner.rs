//! The trait a runner implements.

use std::{future::Future, pin::Pin};

use super::{Error, TaskCtx};

/// A boxed future that may move between threads.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Code that serves one capability.
///
/// One value serves all tasks, several at once if the operator allows it. So state is behind `&self`. A tokio
/// runtime inside the plugin drives `run`: `tokio::spawn`, timers, sockets and HTTP clients work. Use
/// [`crate::spawn_blocking`] for long computations.
///
/// ```
/// use runner_sdk::{Error, Runner, TaskCtx};
///
/// #[derive(Default)]
/// struct Count;
///
/// impl Runner for Count {
///     const CAPABILITY: &'static str = "/examples/count/v1";
///
///     async fn run(&self, ctx: TaskCtx) -> Result<(), Error> {
///         let mut bytes = 0;
///         for cid in &ctx.lease.task.inputs_cids {
///             bytes += ctx.input.get_bytes_by_cid(cid).await?.len();
///         }
///         ctx.output.put_bytes("count.txt", bytes.to_string()).await?;
///         Ok(())
///     }
/// }
/// # let ended = runner_sdk::testing::TestHost::new().input("a", b"four").run_blocking(&Count);
/// # assert_eq!(ended.output("count.txt"), Some(&b"4"[..]));
/// ```
pub trait Runner: Send + Sync + 'static {
    /// The capability that this runner serves, such as `/examples/hello/v1`. The compiler checks the name.
    const CAPABILITY: &'static str;

    /// [`Self::CAPABILITY`].
    fn capability(&self) -> &str {
        Self::CAPABILITY
    }

    /// Runs one task. `Ok` completes it. `Err` fails it with the whole error chain as the reason. A panic fails it
    /// with the panic's text and place. Return soon after [`crate::ControlPlane::is_cancelled`] turns true. The
    /// result is then not reported.
    fn run(&self, ctx: TaskCtx) -> impl Future<Output = Result<(), Error>> + Send;
}

/// [`Runner`] as a trait object, for code that holds several kinds of them.
pub trait DynRunner: Send + Sync + 'static {
    /// The capability.
    fn capability(&self) -> &str;
    /// [`Runner::run`], boxed.
    fn run_boxed(&self, ctx: TaskCtx) -> BoxFuture<'_, Result<(), Error>>;
}

impl<R: Runner> DynRunner for R {
    fn capability(&self) -> &str {
        Runner::capability(self)
    }

    fn run_boxed(&self, ctx: TaskCtx) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(self.run(ctx))
    }
}
