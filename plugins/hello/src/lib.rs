//! The smallest example runner. It reads the first input, adds a greeting and publishes one artifact.

use runner_sdk::{Error, Runner, TaskCtx, export_runner};
use serde_json::json;

/// Serves `/examples/hello/v1`.
#[derive(Default)]
pub struct Hello;

impl Runner for Hello {
    const CAPABILITY: &'static str = "/examples/hello/v1";

    async fn run(&self, ctx: TaskCtx) -> Result<(), Error> {
        ctx.ctrl.progress(json!({ "status": "started" })).await?;
        let input = match ctx.lease.task.inputs_cids.first() {
            Some(cid) => ctx.input.get_bytes_by_cid(cid).await?,
            None => Vec::new(),
        };
        ctx.output.put_bytes("outputs/hello.bin", [b"hello, ".as_slice(), &input].concat()).await?;
        ctx.ctrl.log_event(json!({ "level": "info", "message": "greeted", "bytes": input.len() })).await?;
        ctx.ctrl.progress(json!({ "status": "finished" })).await?;
        Ok(())
    }
}

export_runner!(Hello);

#[cfg(test)]
mod tests {
    use runner_sdk::testing::TestHost;

    use super::*;

    #[test]
    fn hello_reads_its_input_and_reports_progress() {
        let ended = TestHost::new().input("in", b"world").run_blocking(&Hello);
        assert!(ended.is_ok());
        assert_eq!(ended.output("outputs/hello.bin"), Some(&b"hello, world"[..]));
        assert_eq!(ended.progress(), [json!({ "status": "started" }), json!({ "status": "finished" })]);
        assert_eq!(ended.events().len(), 1);
    }

    #[test]
    fn hello_needs_no_input() {
        let ended = TestHost::new().run_blocking(&Hello);
        assert_eq!(ended.output("outputs/hello.bin"), Some(&b"hello, "[..]));
    }
}
