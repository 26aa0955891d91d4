//! What the host sees: fetch the inputs, run the job on a thread of its own, publish three files.
//!
//! Everything about points is in [`crate::downsample`]; this file only connects it to a task.

use std::fs::File;

use runner_sdk::{Error, Runner, TaskCtx, export_runner};
use serde_json::json;

use crate::downsample::{self, DownsampleError, FileSource, Progress, Settings};

/// Thins point clouds: `/pointcloud/downsample/v1`.
///
/// Inputs: one PLY file or more, merged into one cloud. `meta.voxel`: the side of a voxel in the unit of the
/// files; derived from the size of the cloud where absent. Outputs: `cloud.ply`, `preview.png`, `report.json`.
#[derive(Default)]
pub struct Downsample;

impl Runner for Downsample {
    const CAPABILITY: &'static str = "/pointcloud/downsample/v1";

    async fn run(&self, ctx: TaskCtx) -> Result<(), Error> {
        let task = &ctx.lease.task;
        let settings = Settings::from_meta(&task.meta).map_err(explain)?;
        if task.inputs_cids.is_empty() {
            return Err(explain(DownsampleError::NoInput));
        }
        let mut sources = Vec::new();
        for (index, cid) in task.inputs_cids.iter().enumerate() {
            let input = ctx.input.materialize_cid_with_meta(cid).await?;
            // The place in the task says more to its author than the id, and holds no secret.
            let label = format!("input {} of {}", index + 1, task.inputs_cids.len());
            sources.push(FileSource::new(label, input.path)?);
        }

        let cloud_path = ctx.scratch_dir().join("cloud.ply");
        let cloud = File::create(&cloud_path)?;
        let worker = ctx.clone();
        let outcome = runner_sdk::spawn_blocking(move || {
            let runtime = tokio::runtime::Handle::current();
            let progress = |now: Progress| {
                let told = json!({ "pct": now.percent, "stage": now.stage.name() });
                // A progress report that gets lost is no reason to lose the work.
                let _ = runtime.block_on(worker.ctrl.progress(told));
            };
            downsample::run(&sources, settings, cloud, &progress, &|| worker.ctrl.is_cancelled())
        })
        .await?
        .map_err(explain)?;

        ctx.output.put_file("cloud.ply", &cloud_path).await?;
        ctx.output.put_bytes("preview.png", outcome.preview).await?;
        let report = serde_json::to_vec_pretty(&outcome.report.to_json())?;
        ctx.output.put_bytes("report.json", report).await?;
        Ok(())
    }
}

/// Tells the control plane whether trying the same input again could help.
fn explain(error: DownsampleError) -> Error {
    let invalid = error.is_invalid_input();
    let error = Error::from(error);
    if invalid { error.invalid_input() } else { error }
}

export_runner!(Downsample);
