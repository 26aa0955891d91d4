//! The author's API, used from a crate that depends only on the SDK.

use std::{
    future::Future,
    num::ParseIntError,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use runner_sdk::{
    Artifact, CancelReason, DataQuery, DynRunner, Error, Failure, PortErrorKind, Runner, TaskCtx, TimeLeft, Usage,
    spawn_blocking,
    testing::{Ended, TestHost},
};
use serde_json::json;
use tokio::io::AsyncReadExt;

/// A runner made from a function, to keep each test in one place.
struct Act<F>(F);

impl<F, T> Runner for Act<F>
where
    F: Fn(TaskCtx) -> T + Send + Sync + 'static,
    T: Future<Output = Result<(), Error>> + Send,
{
    const CAPABILITY: &'static str = "/tests/act/v1";

    async fn run(&self, ctx: TaskCtx) -> Result<(), Error> {
        (self.0)(ctx).await
    }
}

fn act<F, T>(act: F) -> Ended
where
    F: Fn(TaskCtx) -> T + Send + Sync + 'static,
    T: Future<Output = Result<(), Error>> + Send,
{
    TestHost::new().run_blocking(&Act(act))
}

fn panic_of(ended: &Ended) -> (&str, &str) {
    match ended.failure() {
        Some(Failure::Panic { message, place }) => (message, place),
        other => panic!("expected a panic, found {other:?}"),
    }
}

#[test]
fn crate_name_is_exported() {
    assert_eq!(runner_sdk::CRATE_NAME, "runner-sdk");
    assert!(runner_sdk::RUNNER_H.contains("runner_module_v2"));
}

#[test]
fn question_mark_accepts_every_error_type() {
    let std_error = act(|_| async { Ok("x".parse::<u8>().map(drop)?) });
    assert_eq!(std_error.error().chain(), "invalid digit found in string");

    let anyhow_error = act(|_| async {
        use anyhow::Context as _;
        let parsed: Result<u8, ParseIntError> = "x".parse();
        Ok(parsed.context("voxel").context("meta").map(drop)?)
    });
    assert_eq!(anyhow_error.error().chain(), "meta: voxel: invalid digit found in string");

    let text = act(|_| async { Err("no points")? });
    assert_eq!(text.error().to_string(), "no points");
    let lines = act(|_| async { Err(Error::msg("two\nlines")) });
    assert_eq!(lines.error().chain(), "two lines");
}

#[test]
fn error_carries_its_advice() {
    let plain = act(|_| async { Err(Error::msg("broken")) });
    assert!(!plain.error().is_retryable() && !plain.error().is_invalid_input());

    let busy = act(|_| async { Err(Error::msg("busy").retryable()) });
    assert!(busy.error().is_retryable());

    let bad = act(|_| async { Err(Error::msg("empty").invalid_input().details(json!({ "points": 0 }))) });
    assert!(bad.error().is_invalid_input() && !bad.error().is_retryable());
}

#[test]
fn wrapped_port_errors_keep_their_kind() {
    let direct = act(|ctx| async move { Ok(ctx.input.get_bytes_by_cid("missing").await.map(drop)?) });
    assert_eq!(direct.error().port_error().map(|err| err.kind()), Some(PortErrorKind::NotFound));

    async fn with_anyhow(ctx: TaskCtx) -> anyhow::Result<()> {
        ctx.input.get_bytes_by_cid("missing").await?;
        Ok(())
    }
    let through_anyhow = act(|ctx| async move { Ok(with_anyhow(ctx).await?) });
    assert_eq!(through_anyhow.error().port_error().map(|err| err.kind()), Some(PortErrorKind::NotFound));
    assert_eq!(through_anyhow.error().chain(), "input missing: not found (404)");
}

#[test]
fn panic_is_caught_with_text_and_place() {
    let ended = act(|ctx| async move { panic!("boom {}", ctx.lease.task.inputs_cids.len()) });
    let (message, place) = panic_of(&ended);
    assert_eq!(message, "boom 0");
    assert!(place.contains("authoring.rs:"), "{place}");
}

#[test]
fn panic_on_a_blocking_thread_keeps_its_place() {
    let ended = act(|_| async { spawn_blocking(|| panic!("boom while computing")).await });
    let (message, place) = panic_of(&ended);
    assert_eq!(message, "boom while computing");
    assert!(place.contains("authoring.rs:"), "{place}");
}

struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("boom in drop");
    }
}

#[test]
fn panic_in_a_destructor_fails_the_run() {
    let at_the_end = act(|_| async {
        let _bomb = Bomb;
        tokio::task::yield_now().await;
        Ok(())
    });
    assert_eq!(panic_of(&at_the_end).0, "boom in drop");
}

#[test]
fn panic_does_not_affect_the_next_run() {
    let host = TestHost::new();
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let runner = Act(move |_| {
        let call = counted.fetch_add(1, Ordering::Relaxed);
        async move { if call == 0 { panic!("only once") } else { Ok(()) } }
    });
    assert_eq!(panic_of(&host.run_blocking(&runner)).0, "only once");
    assert!(host.run_blocking(&runner).is_ok());
}

#[test]
fn cancellation_has_flag_future_and_reason() {
    for reason in [CancelReason::Plane, CancelReason::Drained, CancelReason::Other("quota".to_owned())] {
        let host = TestHost::new().cancel_after_progress(1);
        let ended = host.run_blocking(&Act(|ctx: TaskCtx| async move {
            assert!(!ctx.ctrl.is_cancelled());
            assert_eq!(ctx.ctrl.cancel_reason().await, None);
            let waiting = tokio::spawn({
                let ctrl = ctx.ctrl.clone();
                async move { ctrl.cancelled().await }
            });
            ctx.ctrl.progress(json!(1)).await?;
            assert!(ctx.ctrl.is_cancelled());
            assert_eq!(waiting.await?, CancelReason::Plane);
            assert_eq!(ctx.ctrl.cancel_reason().await, Some(CancelReason::Plane));
            Ok(())
        }));
        assert!(ended.is_ok(), "{:?}", ended.failure());

        let host = TestHost::new();
        host.cancel(reason.clone());
        let seen = Arc::new(Mutex::new(None));
        let sender = Arc::clone(&seen);
        host.run_blocking(&Act(move |ctx: TaskCtx| {
            let sender = Arc::clone(&sender);
            async move {
                let reason = ctx.ctrl.cancelled().await;
                *sender.lock().expect("not poisoned") = Some(reason);
                Ok(())
            }
        }));
        assert_eq!(seen.lock().expect("not poisoned").take(), Some(reason));
    }
}

#[test]
fn cloned_test_host_cancels_a_run() {
    let host = TestHost::new();
    let outside = host.clone();
    let ended = host.run_blocking(&Act(move |ctx: TaskCtx| {
        let outside = outside.clone();
        async move {
            std::thread::spawn(move || outside.cancel(CancelReason::Operator));
            Err(Error::msg(format!("{:?}", ctx.ctrl.cancelled().await)))
        }
    }));
    assert_eq!(ended.error().chain(), "Operator");
}

#[test]
fn lost_lease_blocks_input_and_output() {
    let ended =
        TestHost::new().input("a", b"x").cancel_after_progress(1).run_blocking(&Act(|ctx: TaskCtx| async move {
            ctx.ctrl.progress(json!(1)).await?;
            ctx.output.put_bytes("after-a-cancel.txt", "still held").await?;
            Ok(())
        }));
    assert_eq!(ended.output("after-a-cancel.txt"), Some(&b"still held"[..]));

    let host = TestHost::new().input("a", b"x");
    host.cancel(CancelReason::LeaseLost);
    let ended = host.run_blocking(&Act(|ctx: TaskCtx| async move {
        let input = ctx.input.get_bytes_by_cid("a").await.map_err(|err| err.kind());
        assert_eq!(input, Err(PortErrorKind::LeaseOver));
        let output = ctx.output.put_bytes("b", "x").await.map_err(|err| err.kind());
        assert_eq!(output, Err(PortErrorKind::LeaseOver));
        Ok(())
    }));
    assert!(ended.is_ok() && ended.outputs().is_empty());
}

#[test]
fn input_is_read_in_every_form() {
    let content: Vec<u8> = (0..700_000_u32).map(|n| (n % 251) as u8).collect();
    let expected = content.clone();
    let clone_of_context = Arc::new(Mutex::new(None));
    let keep = Arc::clone(&clone_of_context);
    let ended = TestHost::new().input("scan", content).input("none", b"").run_blocking(&Act(move |ctx: TaskCtx| {
        let (expected, keep) = (expected.clone(), Arc::clone(&keep));
        async move {
            assert_eq!(ctx.input.get_bytes_by_cid("scan").await?, expected);
            assert_eq!(ctx.input.get_bytes_by_cid("none").await?, b"");

            let mut reader = ctx.input.open_reader_by_cid("scan").await?;
            assert_eq!((reader.size(), reader.name()), (Some(700_000), Some("scan")));
            let mut read = Vec::new();
            reader.read_to_end(&mut read).await?;
            assert_eq!(read, expected);

            let input = ctx.input.materialize_cid_with_meta("scan").await?;
            assert_eq!((input.cid.as_str(), input.size), ("scan", Some(700_000)));
            assert!(input.path.starts_with(&input.root_dir) && input.root_dir.starts_with(ctx.scratch_dir()));
            assert_eq!(std::fs::read(&input.path)?, expected);
            let again = ctx.input.materialize_cid_to_temp("scan").await?;
            assert_eq!(std::fs::read(again)?, expected);

            let missing = ctx.input.materialize_cid_with_meta("nowhere").await.map_err(|err| err.kind());
            assert_eq!(missing, Err(PortErrorKind::NotFound));
            *keep.lock().expect("not poisoned") = Some(input.path);
            Ok(())
        }
    }));
    assert!(ended.is_ok(), "{:?}", ended.failure());
    let path = clone_of_context.lock().expect("not poisoned").take().expect("the run kept it");
    assert!(!path.exists(), "the task's directory is removed with the task");
}

#[test]
fn artifacts_are_published_in_every_form() {
    let ended = act(|ctx| async move {
        ctx.output.put_bytes("/plain//a.txt", "bytes").await?;

        let file = ctx.scratch_dir().join("b.bin");
        std::fs::write(&file, b"from a file")?;
        ctx.output.put_file("b.bin", &file).await?;
        let missing = ctx.output.put_file("c.bin", ctx.scratch_dir().join("missing")).await.map_err(|err| err.kind());
        assert_eq!(missing, Err(PortErrorKind::Local));

        let mut writer = ctx.output.open_multipart("d.bin").await?;
        for piece in ["one ", "two ", "three"] {
            writer.write_chunk(piece).await?;
        }
        let id = writer.finish().await?;
        assert!(id.is_some());

        let mut dropped = ctx.output.open_multipart("never.bin").await?;
        dropped.write_chunk("unfinished").await?;
        drop(dropped);

        let artifact = Artifact::new("e.ply").name("cloud").data_type("refined_ply").existing_id("id-7");
        assert_eq!(ctx.output.put_domain_artifact(artifact.clone(), "ply").await?, Some("id-7".to_owned()));
        assert_eq!(ctx.output.put_domain_artifact_file(artifact, &file).await?, Some("id-7".to_owned()));

        for path in ["../up", "a/../b", "nul\0", &"x".repeat(1025)] {
            let refused = ctx.output.put_bytes(path, "x").await.map_err(|err| err.kind());
            assert_eq!(refused, Err(PortErrorKind::InvalidPath), "{path}");
        }
        Ok(())
    });
    assert!(ended.is_ok(), "{:?}", ended.failure());
    assert_eq!(ended.outputs().keys().collect::<Vec<_>>(), ["b.bin", "d.bin", "e.ply", "plain/a.txt"]);
    assert_eq!(ended.output("plain/a.txt"), Some(&b"bytes"[..]));
    assert_eq!(ended.output("d.bin"), Some(&b"one two three"[..]));
    let cloud = &ended.outputs()["e.ply"];
    assert_eq!(cloud.bytes, b"from a file", "putting one path twice replaces the first");
    assert_eq!((cloud.name.as_deref(), cloud.data_type.as_deref()), (Some("cloud"), Some("refined_ply")));
    assert_eq!(cloud.existing_id.as_deref(), Some("id-7"));
}

#[test]
fn progress_and_events_arrive_in_order() {
    let ended = act(|ctx| async move {
        for n in 0..3 {
            ctx.ctrl.progress(json!({ "n": n })).await?;
            ctx.ctrl.log_event(("step", n)).await?;
        }
        Ok(())
    });
    assert_eq!(ended.progress(), [json!({ "n": 0 }), json!({ "n": 1 }), json!({ "n": 2 })]);
    assert_eq!(ended.events(), [json!(["step", 0]), json!(["step", 1]), json!(["step", 2])]);
}

#[test]
fn usage_is_added_up_within_its_budget() {
    let host = TestHost::new().tokens_max(100);
    let ended = host.run_blocking(&Act(|ctx: TaskCtx| async move {
        ctx.ctrl.usage(Usage::tokens(60, 0).usd_cost(0.5)).await?;
        ctx.ctrl.usage(Usage::tokens(0, 40).usd_cost(0.25)).await?;
        for invalid in [-1.0, f64::NAN] {
            let refused = ctx.ctrl.usage(Usage::tokens(1, 1).usd_cost(invalid)).await.expect_err("an invalid cost");
            assert_eq!(refused.kind(), PortErrorKind::BadRequest, "{refused}");
        }
        assert!(!ctx.ctrl.is_cancelled(), "100 tokens are allowed");
        ctx.ctrl.usage(Usage::tokens(1, 0)).await?;
        assert_eq!(ctx.ctrl.cancelled().await, CancelReason::Budget);
        Ok(())
    }));
    assert!(ended.is_ok(), "{ended:?}");
    assert_eq!(ended.usage(), Usage::tokens(61, 40).usd_cost(0.75));
}

#[test]
fn token_needs_a_grant() {
    let token = |ctx: TaskCtx| async move {
        Err(Error::msg(format!("{:?}", ctx.ctrl.token().await.map_err(|err| err.kind()))))
    };
    assert_eq!(act(token).error().chain(), "Err(Unsupported)");
    let granted = TestHost::new().token("bearer-1").run_blocking(&Act(token));
    assert_eq!(granted.error().chain(), "Ok(\"bearer-1\")");
}

#[tokio::test]
async fn context_is_refused_after_its_run() {
    let (give, clone_of_context) = tokio::sync::oneshot::channel();
    let give = Mutex::new(Some(give));
    let runner = Act(move |ctx: TaskCtx| {
        let give = give.lock().expect("not poisoned").take();
        async move {
            let sent = give.map(|give| give.send(ctx));
            if matches!(sent, Some(Ok(()))) { Ok(()) } else { Err(Error::msg("the context is not received")) }
        }
    });
    let ended = TestHost::new().input("a", b"x").token("t").run(&runner).await;
    assert!(ended.is_ok());

    let ctx = clone_of_context.await.expect("the run sent its context");
    let late = tokio::spawn(async move {
        [
            ctx.ctrl.progress(json!(1)).await.err(),
            ctx.ctrl.log_event(json!(1)).await.err(),
            ctx.ctrl.token().await.err(),
            ctx.input.get_bytes_by_cid("a").await.err(),
            ctx.input.materialize_cid_with_meta("a").await.err(),
            ctx.output.put_bytes("late.txt", "x").await.err(),
            ctx.output.put_file("late.txt", "/dev/null").await.err(),
        ]
    });
    for err in late.await.expect("nothing panics") {
        assert_eq!(err.map(|err| err.kind()), Some(PortErrorKind::TaskOver));
    }
}

#[tokio::test]
async fn runners_are_objects_that_threads_share() {
    fn is_shared<T: Send + Sync + ?Sized>() {}
    is_shared::<dyn DynRunner>();
    is_shared::<TaskCtx>();

    #[derive(Default)]
    struct One;
    impl Runner for One {
        const CAPABILITY: &'static str = "/tests/one/v1";
        async fn run(&self, _ctx: TaskCtx) -> Result<(), Error> {
            Ok(())
        }
    }
    let runners: Vec<Box<dyn DynRunner>> = vec![Box::new(One), Box::new(Act(|_: TaskCtx| async { Ok(()) }))];
    let names: Vec<&str> = runners.iter().map(|runner| runner.capability()).collect();
    assert_eq!(names, ["/tests/one/v1", "/tests/act/v1"]);
}

#[test]
fn runner_serves_two_threads_concurrently() {
    let meeting = Arc::new(tokio::sync::Barrier::new(2));
    let runner = Arc::new(Act(move |ctx: TaskCtx| {
        let meeting = Arc::clone(&meeting);
        async move {
            // Each run waits here until both run.
            tokio::time::timeout(Duration::from_secs(30), meeting.wait()).await?;
            let text = ctx.input.get_bytes_by_cid("a").await?;
            ctx.output.put_bytes("a.txt", text).await?;
            Ok(())
        }
    }));
    let threads: Vec<_> = ["left", "right"]
        .map(|text| {
            let runner = Arc::clone(&runner);
            std::thread::spawn(move || (text, TestHost::new().input("a", text).run_blocking(&*runner)))
        })
        .into();
    for thread in threads {
        let (text, ended) = thread.join().expect("no panic");
        assert_eq!(ended.output("a.txt"), Some(text.as_bytes()));
    }
}

/// `export_runner!` with several runners, with and without a config function. A library can have only one, so this
/// is the only one in this test binary.
mod exported {
    use runner_sdk::{Error, Runner, TaskCtx, export_runner};

    #[derive(Default)]
    pub(super) struct Plain;

    impl Runner for Plain {
        const CAPABILITY: &'static str = "/tests/plain/v1";
        async fn run(&self, _ctx: TaskCtx) -> Result<(), Error> {
            Ok(())
        }
    }

    pub(super) struct Fallible;

    impl Fallible {
        fn new(config: std::collections::HashMap<String, u32>) -> Result<Self, std::io::Error> {
            if config.is_empty() { Ok(Self) } else { Err(std::io::Error::other("too much config")) }
        }
    }

    impl Runner for Fallible {
        const CAPABILITY: &'static str = "/tests/fallible/v1";
        async fn run(&self, _ctx: TaskCtx) -> Result<(), Error> {
            Ok(())
        }
    }

    export_runner!(Plain, Fallible: Fallible::new,);
}

#[test]
fn exported_table_has_this_version() {
    #[allow(improper_ctypes, reason = "the lint checks the targets of transparent pointers")]
    unsafe extern "C" {
        fn runner_module_v2() -> &'static runner_sdk::abi::ModuleTable;
    }
    // SAFETY: exported by the macro above, with this signature.
    let table = unsafe { runner_module_v2() };
    assert_eq!((table.magic, table.abi), (runner_sdk::abi::MAGIC, runner_sdk::abi::ABI_VERSION));
    assert_eq!(exported::Plain::CAPABILITY, "/tests/plain/v1");
    assert_eq!(exported::Fallible::CAPABILITY, "/tests/fallible/v1");
}

#[tokio::test]
async fn stored_data_is_found_by_each_part() {
    let runner = Act(|ctx: TaskCtx| async move {
        let mut seen = Vec::new();
        for query in [
            DataQuery::new(),
            DataQuery::new().name("floor"),
            DataQuery::new().data_type("ply"),
            DataQuery::new().name("floor").ids(["2", "9"]),
        ] {
            let mut found = ctx.input.find(query).await?;
            let mut ids = String::new();
            while let Some(data) = found.next().await? {
                ids.push_str(&data.id);
            }
            seen.push(ids);
        }
        let bytes = ctx.input.get_bytes_by_cid("2").await?;
        let left = ctx.ctrl.time_left().await?;
        ctx.output.put_bytes("seen.txt", format!("{seen:?} {} {:?}", bytes.len(), left.limit)).await?;
        Ok(())
    });
    let host = TestHost::new().stored("1", "floor", "ply", "x").stored("2", "floor", "obj", "yy");
    let host = host.stored("3", "wall", "ply", "zzz").time_left(TimeLeft::new(None, Some(Duration::from_secs(9))));
    let ended = host.run(&runner).await;
    let seen = ended.output("seen.txt").map(String::from_utf8_lossy);
    assert_eq!(seen.as_deref(), Some(r#"["123", "12", "13", "2"] 2 Some(9s)"#), "{:?}", ended.failure());
}

#[tokio::test]
async fn test_host_has_the_limits_of_a_node() {
    let runner = Act(|ctx: TaskCtx| async move {
        let large = "x".repeat(64 * 1024);
        let refused = [ctx.ctrl.progress(&large).await, ctx.ctrl.log_event(&large).await];
        for refused in refused.map(|result| result.expect_err("above 64 KiB")) {
            assert_eq!(refused.kind(), PortErrorKind::Limit, "{refused}");
        }
        let refused = ctx.input.get_bytes_by_cid("large").await.expect_err("above the budget");
        assert_eq!(refused.kind(), PortErrorKind::Limit, "{refused}");
        assert!(refused.to_string().contains("do not fit into MEMORY_BUDGET, 1000 bytes"), "{refused}");
        let mut open = Vec::new();
        while open.len() < 64 {
            open.push(ctx.input.open_reader_by_cid("large").await?);
        }
        let refused = ctx.output.open_multipart("one-too-many").await.err().expect("64 streams are open");
        assert_eq!(refused.kind(), PortErrorKind::Limit, "{refused}");
        drop(open);
        ctx.output.put_bytes("fits.txt", "fits").await?;
        Ok(())
    });
    let ended = TestHost::new().memory_budget(1000).input("large", vec![1; 1001]).run(&runner).await;
    assert!(ended.is_ok(), "{:?}", ended.failure());
    assert_eq!(ended.output("fits.txt"), Some(&b"fits"[..]));
}

#[tokio::test]
async fn context_reports_the_end_of_its_run() {
    let (sender, received) = tokio::sync::oneshot::channel();
    let sender = Mutex::new(Some(sender));
    let runner = Act(move |ctx: TaskCtx| {
        let sender = sender.lock().expect("not poisoned").take();
        async move {
            let Some(sender) = sender else {
                assert!(!ctx.ctrl.is_cancelled(), "the end of the first run does not stop the second");
                return Ok(());
            };
            tokio::spawn(async move {
                let reason = ctx.ctrl.cancelled().await;
                let _ = sender.send((ctx.ctrl.is_cancelled(), reason, ctx.ctrl.cancel_reason().await));
            });
            Ok(())
        }
    });
    let host = TestHost::new();
    assert!(host.run(&runner).await.is_ok());
    let seen = tokio::time::timeout(Duration::from_secs(10), received).await.expect("the end is reported");
    assert_eq!(seen, Ok((true, CancelReason::TaskOver, Some(CancelReason::TaskOver))));
    assert!(host.run(&runner).await.is_ok());
}
