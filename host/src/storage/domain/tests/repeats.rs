//! Requests that fail on the way: what is sent again, what is not, and nothing twice.

use super::*;

/// A world for ports that try again.
async fn patient() -> World {
    world_with(|config| config.patience = Duration::from_millis(200)).await
}

/// The answer of something between us and a server that did its work.
fn gateway() -> Trick {
    Trick::Lost(reply(502, "text/plain", "bad gateway"))
}

#[tokio::test]
async fn a_create_whose_answer_was_lost_is_not_doubled() {
    let world = patient().await;
    world.trick("create", gateway());
    let id = world.put("x.json", b"{}").await.expect("stored").expect("an id");
    assert_eq!(world.log(), ["list", "info", "create", "list", "update"], "looked up, then replaced");
    assert_eq!((world.stored(&id).bytes, world.server.store().items.len()), (b"{}".to_vec(), 1));
    // A search that does not show it yet.
    world.trick("create", gateway());
    world.trick("list", Trick::First(Box::new(|| {})));
    world.answer("list", 200, "application/json", r#"{"data":[]}"#);
    world.put("y.json", b"{}").await.expect("stored");
    assert_eq!(world.log()[5..], ["list", "create", "list", "create", "list", "update"]);
    assert_eq!(world.server.store().items.len(), 2);
}

#[tokio::test]
async fn a_conflict_without_doubt_is_the_runners_to_know() {
    let world = patient().await;
    world.answer("create", 409, "text/plain", "exists");
    refused(world.put("x.json", b"{}").await, PortErrorKind::Conflict, "conflict (409)");
    assert_eq!(world.count("create"), 1);
}

#[tokio::test]
async fn an_update_and_a_search_are_simply_repeated() {
    let world = patient().await;
    world.answer("list", 503, "text/plain", "later");
    world.answer("create", 429, "text/plain", "slower");
    let id = world.put("x.json", b"1").await.expect("stored");
    world.trick("update", gateway());
    assert_eq!(world.put("x.json", b"2").await.expect("stored"), id);
    assert_eq!(world.log(), ["list", "list", "info", "create", "list", "create", "update", "update"]);
    assert_eq!(world.server.store().items.len(), 1);
}

#[tokio::test]
async fn a_failed_part_is_sent_again_alone_and_a_hopeless_one_aborts() {
    let world = world_with(|config| {
        config.stall = Duration::from_secs(1);
        config.patience = Duration::from_secs(3);
    })
    .await;
    let bytes = noise(5 * MIB);
    world.answer("part", 503, "text/plain", "busy");
    world.trick("part", gateway());
    world.trick("part", Trick::Hang);
    let id = world.put("x.ply", &bytes).await.expect("stored").expect("an id");
    assert!(world.stored(&id).bytes == bytes);
    assert_eq!((world.count("part"), world.count("abort")), (8, 0));
    for _ in 0..100 {
        world.answer("part", 503, "text/plain", "busy");
    }
    refused(world.put("y.ply", &bytes).await, PortErrorKind::Server, "server error (503): busy");
    assert_eq!((world.count("abort"), world.server.store().uploads.len()), (1, 0));
    assert_eq!(world.ports.published().len(), 1, "what failed is not published");
}

#[tokio::test]
async fn an_upload_whose_beginning_was_lost_is_begun_again() {
    let world = patient().await;
    world.trick("initiate", gateway());
    let bytes = noise(5 * MIB);
    let id = world.put("x.ply", &bytes).await.expect("stored").expect("an id");
    assert!(world.stored(&id).bytes == bytes);
    assert_eq!((world.count("initiate"), world.count("part")), (2, 5));
}

#[tokio::test]
async fn a_completion_whose_answer_was_lost_is_found_to_have_happened() {
    let world = patient().await;
    let bytes = noise(5 * MIB);
    // The repetition is refused with 404, because the upload is an artifact by now.
    world.trick("complete", gateway());
    let id = world.put("x.ply", &bytes).await.expect("stored").expect("an id");
    assert_eq!((world.count("complete"), world.count("abort")), (2, 0));
    // An update too: the artifact was changed since it was last seen.
    let bytes = noise(6 * MIB);
    world.trick("complete", gateway());
    assert_eq!(world.put("x.ply", &bytes).await.expect("stored").expect("an id"), id);
    assert!(world.stored(&id).bytes == bytes);
    assert_eq!((world.count("part"), world.count("abort")), (11, 0));
}

#[tokio::test]
async fn a_completion_that_did_not_happen_is_an_error() {
    let world = patient().await;
    let bytes = noise(5 * MIB);
    let id = world.put("x.ply", &bytes).await.expect("stored");
    // What is stored has the right size, but is what was stored before.
    world.answer("complete", 502, "text/plain", "bad gateway");
    world.answer("complete", 404, "text/plain", "no such upload");
    refused(world.put("x.ply", &bytes).await, PortErrorKind::NotFound, "not found (404)");
    // The runner's own id: nobody knows when it was changed last.
    world.trick("complete", gateway());
    let own = ArtifactSpec { existing_id: id, ..spec("y.ply") };
    let lost = world.ports.put_file(own, &world.file(&bytes)).await;
    refused(lost, PortErrorKind::NotFound, "not found (404)");
    assert_eq!(world.count("abort"), 2);
}

#[tokio::test]
async fn an_answer_nobody_can_read_is_as_good_as_lost() {
    let world = patient().await;
    let page = || reply(200, "text/html", "<html>welcome</html>");
    let bytes = noise(5 * MIB);
    // Whether the server did its work before ...
    for at in ["list", "create", "update", "initiate", "part", "complete"] {
        world.trick(at, Trick::Lost(page()));
    }
    let small = world.put("x.json", b"{}").await.expect("stored").expect("an id");
    assert_eq!(world.log(), ["list", "list", "info", "create", "list", "update", "update"]);
    let large = world.put("x.ply", &bytes).await.expect("stored").expect("an id");
    assert_eq!((world.count("initiate"), world.count("part"), world.count("complete")), (2, 6, 2));
    // ... or something else answered in its place.
    for at in ["update", "initiate", "part", "complete"] {
        world.trick(at, Trick::Answer(page()));
    }
    assert_eq!(world.put("x.json", b"[]").await.expect("stored").as_ref(), Some(&small));
    assert_eq!(world.put("x.ply", &bytes).await.expect("stored").as_ref(), Some(&large));
    assert_eq!((world.count("initiate"), world.count("part"), world.count("complete")), (4, 12, 4));
    assert_eq!((world.stored(&small).bytes, world.stored(&large).bytes == bytes), (b"[]".to_vec(), true));
    assert_eq!((world.count("abort"), world.server.store().items.len()), (0, 2), "nothing is doubled");
    // An answer of the protocol that names nothing tells as little.
    world.trick("create", Trick::Lost(reply(200, "application/json", r#"{"data":[]}"#)));
    world.put("y.json", b"{}").await.expect("stored");
    assert_eq!(world.server.store().items.len(), 3);
    for _ in 0..100 {
        world.trick("create", Trick::Answer(page()));
    }
    let hopeless = world.put("z.json", b"{}").await;
    assert!(hopeless.as_ref().is_err_and(|err| err.message.contains("given up after ")), "{hopeless:?}");
    refused(hopeless, PortErrorKind::Malformed, "is not the expected JSON");
}

#[tokio::test]
async fn an_abort_is_repeated_too() {
    let world = patient().await;
    world.answer("abort", 503, "text/plain", "busy");
    world.answer("complete", 400, "text/plain", "no");
    refused(world.put("x.ply", &noise(5 * MIB)).await, PortErrorKind::BadRequest, "bad request (400): no");
    assert_eq!((world.count("abort"), world.server.store().uploads.len()), (2, 0));
}

#[tokio::test]
async fn ended_task_aborts_an_upload_once() {
    // Its lease may have ended with the cancellation. Then the server refuses the token.
    let world = world_with(|config| config.token_wait = Duration::from_secs(60)).await;
    for _ in 0..2 {
        world.trick("part", Trick::Hang);
    }
    let bytes = noise(5 * MIB);
    let (result, ()) = tokio::join!(world.put("x.ply", &bytes), async {
        world.until("part").await;
        world.server.store().tokens.clear();
        world.ports.close().await;
    });
    refused(result, PortErrorKind::LeaseOver, "task is over");
    assert_eq!(world.count("abort"), 1, "no newer token will come");
}

fn began_now() -> tokio::time::Instant {
    tokio::time::Instant::now()
}

#[tokio::test]
async fn retry_after_is_obeyed_up_to_the_patience() {
    let later = || {
        let mut answer = reply(429, "text/plain", "slower");
        answer.headers_mut().insert("retry-after", "1".parse().expect("a header"));
        Trick::Answer(answer)
    };
    let world = world_with(|config| config.patience = Duration::from_millis(1500)).await;
    world.trick("create", later());
    let began = began_now();
    world.put("x.json", b"{}").await.expect("stored");
    assert!(began.elapsed() >= Duration::from_secs(1));
    // The patience of 200 ms is shorter than the requested second: the pause is cut, and one more try follows.
    let world = patient().await;
    world.trick("create", later());
    let began = began_now();
    world.put("x.json", b"{}").await.expect("stored");
    assert!((Duration::from_millis(150)..Duration::from_secs(1)).contains(&began.elapsed()), "{:?}", began.elapsed());
    assert_eq!(world.count("create"), 2);
    let world = patient().await;
    for _ in 0..2 {
        world.trick("create", later());
    }
    let message = "unexpected status (429): slower (given up after 2 tries)";
    refused(world.put("x.json", b"{}").await, PortErrorKind::Other, message);
    assert_eq!(world.count("create"), 2, "one try after the cut pause");
}
