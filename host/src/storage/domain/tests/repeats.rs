//! Failed requests: which are repeated, and no duplicates.

use super::*;

/// A fixture whose ports repeat failed requests.
async fn retrying() -> Fixture {
    fixture_with(|config| config.retry_limit = Duration::from_millis(200)).await
}

/// The answer of a gateway, after the server has done the request.
fn gateway() -> Fault {
    Fault::Lost(reply(502, "text/plain", "bad gateway"))
}

#[tokio::test]
async fn create_with_lost_answer_makes_no_duplicate() {
    let fixture = retrying().await;
    fixture.fault("create", gateway());
    let id = fixture.put("x.json", b"{}").await.expect("stored").expect("an id");
    assert_eq!(fixture.log(), ["list", "info", "create", "list", "update"], "looked up, then replaced");
    assert_eq!((fixture.stored(&id).bytes, fixture.server.store().items.len()), (b"{}".to_vec(), 1));
    // A search that does not show the data yet.
    fixture.fault("create", gateway());
    fixture.fault("list", Fault::First(Box::new(|| {})));
    fixture.answer("list", 200, "application/json", r#"{"data":[]}"#);
    fixture.put("y.json", b"{}").await.expect("stored");
    assert_eq!(fixture.log()[5..], ["list", "create", "list", "create", "list", "update"]);
    assert_eq!(fixture.server.store().items.len(), 2);
}

#[tokio::test]
async fn conflict_of_a_first_try_is_reported() {
    let fixture = retrying().await;
    fixture.answer("create", 409, "text/plain", "exists");
    refused(fixture.put("x.json", b"{}").await, PortErrorKind::Conflict, "conflict (409)");
    assert_eq!(fixture.count("create"), 1);
}

#[tokio::test]
async fn updates_and_searches_are_repeated() {
    let fixture = retrying().await;
    fixture.answer("list", 503, "text/plain", "later");
    fixture.answer("create", 429, "text/plain", "slower");
    let id = fixture.put("x.json", b"1").await.expect("stored");
    fixture.fault("update", gateway());
    assert_eq!(fixture.put("x.json", b"2").await.expect("stored"), id);
    assert_eq!(fixture.log(), ["list", "list", "info", "create", "list", "create", "update", "update"]);
    assert_eq!(fixture.server.store().items.len(), 1);
}

#[tokio::test]
async fn failed_part_is_repeated_and_refused_part_aborts() {
    let fixture = fixture_with(|config| {
        config.stall = Duration::from_secs(1);
        config.retry_limit = Duration::from_secs(3);
    })
    .await;
    let bytes = noise(5 * MIB);
    fixture.answer("part", 503, "text/plain", "busy");
    fixture.fault("part", gateway());
    fixture.fault("part", Fault::Hang);
    let id = fixture.put("x.ply", &bytes).await.expect("stored").expect("an id");
    assert!(fixture.stored(&id).bytes == bytes);
    assert_eq!((fixture.count("part"), fixture.count("abort")), (8, 0));
    for _ in 0..100 {
        fixture.answer("part", 503, "text/plain", "busy");
    }
    refused(fixture.put("y.ply", &bytes).await, PortErrorKind::Server, "server error (503): busy");
    assert_eq!((fixture.count("abort"), fixture.server.store().uploads.len()), (1, 0));
    assert_eq!(fixture.ports.published().len(), 1, "what failed is not published");
}

#[tokio::test]
async fn upload_with_lost_initiate_answer_is_restarted() {
    let fixture = retrying().await;
    fixture.fault("initiate", gateway());
    let bytes = noise(5 * MIB);
    let id = fixture.put("x.ply", &bytes).await.expect("stored").expect("an id");
    assert!(fixture.stored(&id).bytes == bytes);
    assert_eq!((fixture.count("initiate"), fixture.count("part")), (2, 5));
}

#[tokio::test]
async fn completion_with_lost_answer_is_found() {
    let fixture = retrying().await;
    let bytes = noise(5 * MIB);
    // The repetition is refused with 404, because the upload is complete.
    fixture.fault("complete", gateway());
    let id = fixture.put("x.ply", &bytes).await.expect("stored").expect("an id");
    assert_eq!((fixture.count("complete"), fixture.count("abort")), (2, 0));
    // An update too: the time of change is newer than before.
    let bytes = noise(6 * MIB);
    fixture.fault("complete", gateway());
    assert_eq!(fixture.put("x.ply", &bytes).await.expect("stored").expect("an id"), id);
    assert!(fixture.stored(&id).bytes == bytes);
    assert_eq!((fixture.count("part"), fixture.count("abort")), (11, 0));
}

#[tokio::test]
async fn completion_that_the_server_lacks_is_an_error() {
    let fixture = retrying().await;
    let bytes = noise(5 * MIB);
    let id = fixture.put("x.ply", &bytes).await.expect("stored");
    // The stored data has the right size, but is the old data.
    fixture.answer("complete", 502, "text/plain", "bad gateway");
    fixture.answer("complete", 404, "text/plain", "no such upload");
    refused(fixture.put("x.ply", &bytes).await, PortErrorKind::NotFound, "not found (404)");
    // The runner gives the id, so the time of the last change is unknown.
    fixture.fault("complete", gateway());
    let own = ArtifactSpec { existing_id: id, ..spec("y.ply") };
    let lost = fixture.ports.put_file(own, &fixture.file(&bytes)).await;
    refused(lost, PortErrorKind::NotFound, "not found (404)");
    assert_eq!(fixture.count("abort"), 2);
}

#[tokio::test]
async fn unreadable_answer_counts_as_lost() {
    let fixture = retrying().await;
    let page = || reply(200, "text/html", "<html>welcome</html>");
    let bytes = noise(5 * MIB);
    // Either the server has done the request ...
    for at in ["list", "create", "update", "initiate", "part", "complete"] {
        fixture.fault(at, Fault::Lost(page()));
    }
    let small = fixture.put("x.json", b"{}").await.expect("stored").expect("an id");
    assert_eq!(fixture.log(), ["list", "list", "info", "create", "list", "update", "update"]);
    let large = fixture.put("x.ply", &bytes).await.expect("stored").expect("an id");
    assert_eq!((fixture.count("initiate"), fixture.count("part"), fixture.count("complete")), (2, 6, 2));
    // ... or something else answered instead.
    for at in ["update", "initiate", "part", "complete"] {
        fixture.fault(at, Fault::Answer(page()));
    }
    assert_eq!(fixture.put("x.json", b"[]").await.expect("stored").as_ref(), Some(&small));
    assert_eq!(fixture.put("x.ply", &bytes).await.expect("stored").as_ref(), Some(&large));
    assert_eq!((fixture.count("initiate"), fixture.count("part"), fixture.count("complete")), (4, 12, 4));
    assert_eq!((fixture.stored(&small).bytes, fixture.stored(&large).bytes == bytes), (b"[]".to_vec(), true));
    assert_eq!((fixture.count("abort"), fixture.server.store().items.len()), (0, 2), "there is no duplicate");
    // A valid answer without an entry counts as lost too.
    fixture.fault("create", Fault::Lost(reply(200, "application/json", r#"{"data":[]}"#)));
    fixture.put("y.json", b"{}").await.expect("stored");
    assert_eq!(fixture.server.store().items.len(), 3);
    for _ in 0..100 {
        fixture.fault("create", Fault::Answer(page()));
    }
    let exhausted = fixture.put("z.json", b"{}").await;
    assert!(exhausted.as_ref().is_err_and(|err| err.message.contains("given up after ")), "{exhausted:?}");
    refused(exhausted, PortErrorKind::Malformed, "is not the expected JSON");
}

#[tokio::test]
async fn abort_is_repeated() {
    let fixture = retrying().await;
    fixture.answer("abort", 503, "text/plain", "busy");
    fixture.answer("complete", 400, "text/plain", "no");
    refused(fixture.put("x.ply", &noise(5 * MIB)).await, PortErrorKind::BadRequest, "bad request (400): no");
    assert_eq!((fixture.count("abort"), fixture.server.store().uploads.len()), (2, 0));
}

#[tokio::test]
async fn ended_task_aborts_an_upload_once() {
    // Its lease may have ended with the cancellation. Then the server refuses the token.
    let fixture = fixture_with(|config| config.token_wait = Duration::from_secs(60)).await;
    for _ in 0..2 {
        fixture.fault("part", Fault::Hang);
    }
    let bytes = noise(5 * MIB);
    let (result, ()) = tokio::join!(fixture.put("x.ply", &bytes), async {
        fixture.until("part").await;
        fixture.server.store().tokens.clear();
        fixture.ports.close().await;
    });
    refused(result, PortErrorKind::LeaseOver, "task is over");
    assert_eq!(fixture.count("abort"), 1, "no newer token will come");
}

fn began_now() -> tokio::time::Instant {
    tokio::time::Instant::now()
}

#[tokio::test]
async fn retry_after_is_obeyed_up_to_the_retry_limit() {
    let later = || {
        let mut answer = reply(429, "text/plain", "slower");
        answer.headers_mut().insert("retry-after", "1".parse().expect("a header"));
        Fault::Answer(answer)
    };
    let fixture = fixture_with(|config| config.retry_limit = Duration::from_millis(1500)).await;
    fixture.fault("create", later());
    let began = began_now();
    fixture.put("x.json", b"{}").await.expect("stored");
    assert!(began.elapsed() >= Duration::from_secs(1));
    // The retry limit of 200 ms is shorter than the requested second: the pause is cut, and one more try follows.
    let fixture = retrying().await;
    fixture.fault("create", later());
    let began = began_now();
    fixture.put("x.json", b"{}").await.expect("stored");
    assert!((Duration::from_millis(150)..Duration::from_secs(1)).contains(&began.elapsed()), "{:?}", began.elapsed());
    assert_eq!(fixture.count("create"), 2);
    let fixture = retrying().await;
    for _ in 0..2 {
        fixture.fault("create", later());
    }
    let message = "unexpected status (429): slower (given up after 2 tries)";
    refused(fixture.put("x.json", b"{}").await, PortErrorKind::Other, message);
    assert_eq!(fixture.count("create"), 2, "one try after the cut pause");
}
