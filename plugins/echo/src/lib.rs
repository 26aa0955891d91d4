//! Three capabilities in one library. Each returns its inputs: as bytes, as files or as streams.

use runner_sdk::{Artifact, Error, Runner, TaskCtx, export_runner};
use serde_json::json;
use tokio::io::AsyncReadExt;

/// Serves `/examples/echo-bytes/v1`. It holds whole inputs in memory.
#[derive(Default)]
pub struct EchoBytes;

impl Runner for EchoBytes {
    const CAPABILITY: &'static str = "/examples/echo-bytes/v1";

    async fn run(&self, ctx: TaskCtx) -> Result<(), Error> {
        for (index, cid) in ctx.lease.task.inputs_cids.iter().enumerate() {
            let bytes = ctx.input.get_bytes_by_cid(cid).await?;
            ctx.output.put_bytes(&format!("echo-{index}.bin"), bytes).await?;
        }
        Ok(())
    }
}

/// Serves `/examples/echo-file/v1`. It gets inputs as files and publishes artifacts from files, for any size.
#[derive(Default)]
pub struct EchoFile;

impl Runner for EchoFile {
    const CAPABILITY: &'static str = "/examples/echo-file/v1";

    async fn run(&self, ctx: TaskCtx) -> Result<(), Error> {
        for (index, cid) in ctx.lease.task.inputs_cids.iter().enumerate() {
            let input = ctx.input.materialize_cid_with_meta(cid).await?;
            ctx.output.put_file(&format!("echo-{index}.bin"), &input.path).await?;
        }
        Ok(())
    }
}

/// Serves `/examples/echo-stream/v1`. It copies from reader to writer in pieces, for any size.
#[derive(Default)]
pub struct EchoStream;

/// Size of one piece, in bytes.
const PIECE_BYTES: usize = 256 * 1024;

impl Runner for EchoStream {
    const CAPABILITY: &'static str = "/examples/echo-stream/v1";

    async fn run(&self, ctx: TaskCtx) -> Result<(), Error> {
        for (index, cid) in ctx.lease.task.inputs_cids.iter().enumerate() {
            let mut reader = ctx.input.open_reader_by_cid(cid).await?;
            let mut artifact = Artifact::new(format!("echo-{index}.bin"));
            if let Some(size) = reader.size() {
                artifact = artifact.size(size);
            }
            let mut writer = ctx.output.open_multipart(artifact).await?;
            let mut sent: u64 = 0;
            loop {
                let mut piece = Vec::with_capacity(PIECE_BYTES);
                while piece.len() < PIECE_BYTES && reader.read_buf(&mut piece).await? > 0 {}
                if piece.is_empty() {
                    break;
                }
                sent += piece.len() as u64;
                writer.write_chunk(piece).await?;
                ctx.ctrl.progress(json!({ "input": index, "bytes": sent })).await?;
                if ctx.ctrl.is_cancelled() {
                    return Err(Error::msg("cancelled"));
                }
            }
            writer.finish().await?;
        }
        Ok(())
    }
}

export_runner!(EchoBytes, EchoFile, EchoStream);

#[cfg(test)]
mod tests {
    use runner_sdk::testing::TestHost;

    use super::*;

    fn check<R: Runner>(runner: &R, inputs: &[&[u8]]) {
        let mut host = TestHost::new();
        for (index, input) in inputs.iter().enumerate() {
            host = host.input(&index.to_string(), input.to_vec());
        }
        let ended = host.run_blocking(runner);
        assert!(ended.is_ok(), "{:?}", ended.failure());
        for (index, input) in inputs.iter().enumerate() {
            assert_eq!(ended.output(&format!("echo-{index}.bin")), Some(*input));
        }
    }

    #[test]
    fn every_form_returns_its_input() {
        let large: Vec<u8> = (0..1_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        check(&EchoBytes, &[&large, b""]);
        check(&EchoStream, &[&large, b""]);
        check(&EchoFile, &[&large]);
    }

    #[test]
    fn empty_file_is_refused_as_artifact() {
        let ended = TestHost::new().input("a", Vec::new()).run_blocking(&EchoFile);
        assert!(ended.failure().is_some_and(|failure| format!("{failure:?}").contains("is empty")), "{ended:?}");
    }

    #[test]
    fn cancelled_stream_publishes_nothing() {
        let ended = TestHost::new().input("a", vec![7; 4 << 20]).cancel_after_progress(2).run_blocking(&EchoStream);
        assert!(!ended.is_ok());
        assert!(ended.outputs().is_empty());
        assert_eq!(ended.progress().len(), 2);
    }
}
