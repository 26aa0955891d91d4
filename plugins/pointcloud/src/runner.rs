//! The runner: it fetches the inputs, runs the job on a separate thread and publishes three files.
//!
//! All code about points is in [`crate::downsample`]. This file connects it to a task.

use std::{fs::File, path::Path};

use runner_sdk::{Error, Runner, TaskCtx, export_runner};
use serde_json::json;

use crate::downsample::{self, DownsampleError, FileSource, Progress, Settings};

/// Downsamples point clouds: `/pointcloud/downsample/v1`.
///
/// Inputs: PLY files, or zip archives of them, merged into one cloud. The host unpacks data of type `zip`.
/// `meta.voxel`: the side of a voxel in the unit of the files. When absent, it is derived from the size of the
/// cloud. Outputs: `cloud.ply`, `preview.png`, `report.json`.
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
            // The position in the task tells its author more than the id. It contains no secret.
            let label = format!("input {} of {}", index + 1, task.inputs_cids.len());
            if input.extracted_paths.is_empty() {
                sources.push(FileSource::new(label, input.path)?);
                continue;
            }
            let clouds: Vec<_> = input.extracted_paths.into_iter().filter(|path| is_cloud(path)).collect();
            if clouds.is_empty() {
                return Err(Error::msg(format!("{label}: the archive holds no .ply file")).invalid_input());
            }
            for cloud in clouds {
                let name = cloud.file_name().unwrap_or_default().to_string_lossy().into_owned();
                sources.push(FileSource::new(format!("{label}, {name}"), cloud)?);
            }
        }

        let cloud_path = ctx.scratch_dir().join("cloud.ply");
        let cloud = File::create(&cloud_path)?;
        let worker = ctx.clone();
        let outcome = runner_sdk::spawn_blocking(move || {
            let runtime = tokio::runtime::Handle::current();
            let progress = |now: Progress| {
                let reported = json!({ "pct": now.percent, "stage": now.stage.name() });
                // A lost progress report must not end the job.
                let _ = runtime.block_on(worker.ctrl.progress(reported));
            };
            downsample::run(&sources, settings, cloud, &progress, &|| worker.ctrl.is_cancelled())
        })
        .await
        .map_err(explain)?;

        ctx.output.put_file("cloud.ply", &cloud_path).await?;
        ctx.output.put_bytes("preview.png", outcome.preview).await?;
        let report = serde_json::to_vec_pretty(&outcome.report.to_json())?;
        ctx.output.put_bytes("report.json", report).await?;
        Ok(())
    }
}

/// Whether a file from an archive is a cloud. Archives from some systems also contain other files.
fn is_cloud(path: &Path) -> bool {
    let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
    !hidden && path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("ply"))
}

/// Reports to the control plane whether a retry with the same input could succeed.
fn explain(error: DownsampleError) -> Error {
    let invalid = error.is_invalid_input();
    let error = Error::from(error);
    if invalid { error.invalid_input() } else { error }
}

export_runner!(Downsample);

#[cfg(test)]
mod tests {
    use runner_sdk::testing::TestHost;
    use serde_json::{Value, json};

    use super::*;
    use crate::{ply::Encoding, synth::write_scan};

    fn scan(points: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_scan(&mut bytes, 7, points, Encoding::LittleEndian).expect("memory takes it");
        bytes
    }

    #[test]
    fn task_publishes_cloud_picture_and_report() {
        let host = TestHost::new().input("scan", scan(20_000)).meta(json!({ "voxel": 0.02 }));
        let ended = host.run_blocking(&Downsample);
        assert!(ended.is_ok(), "{:?}", ended.failure());
        assert!(ended.output("cloud.ply").is_some_and(|cloud| cloud.starts_with(b"ply\n")));
        assert!(ended.output("preview.png").is_some_and(|png| png.starts_with(b"\x89PNG")));
        let report: Value = serde_json::from_slice(ended.output("report.json").expect("a report")).expect("JSON");
        assert_eq!(report["points_in"], 20_000);
        assert!(report["points_out"].as_u64().expect("a count") < 20_000);
        assert!(!ended.progress().is_empty());
    }

    #[test]
    fn wrong_header_is_invalid_input() {
        let mut bytes = scan(1000);
        bytes.truncate(bytes.len() / 2);
        let ended = TestHost::new().input("scan", bytes).run_blocking(&Downsample);
        assert!(ended.error().is_invalid_input(), "{}", ended.error());
        assert!(ended.error().chain().contains("promises 1000"), "{}", ended.error());
    }

    #[test]
    fn cancelled_task_stops_and_publishes_nothing() {
        let ended = TestHost::new().input("scan", scan(300_000)).cancel_after_progress(1).run_blocking(&Downsample);
        assert!(!ended.is_ok() && ended.outputs().is_empty());
    }
}
