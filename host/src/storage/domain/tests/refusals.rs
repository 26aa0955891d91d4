//! What the ports refuse, and how refusals of the server read.

use super::*;

#[tokio::test]
async fn statuses_become_kinds_and_keep_their_words() {
    let world = world().await;
    for (status, kind, words) in [
        (400, PortErrorKind::BadRequest, "bad request (400): why"),
        (404, PortErrorKind::NotFound, "not found (404): why"),
        (409, PortErrorKind::Conflict, "upload of out/x.json refused: conflict (409): why"),
        (503, PortErrorKind::Server, "server error (503): why"),
        (403, PortErrorKind::Other, "unexpected status (403): why"),
        (429, PortErrorKind::Other, "unexpected status (429): why"),
        (302, PortErrorKind::Other, "unexpected redirect (302): why"),
    ] {
        world.answer("create", status, "text/plain", "why\r\n");
        refused(world.put("x.json", b"{}").await, kind, words);
    }
}

#[tokio::test]
async fn an_answer_that_is_not_the_protocol_is_malformed() {
    let world = world().await;
    let huge = format!("{{\"data\":[],\"x\":\"{}\"}}", "y".repeat(3 * MIB));
    for body in [
        "",
        "<html>hi</html>",
        "[]",
        "{\"data\":[{}]}",
        "{\"data\":[]}",
        "{\"data\":[{\"id\":\"a\\\"b\"}]}",
        "{\"da",
        &huge,
    ] {
        world.answer("create", 200, "application/json", body.to_owned());
        refused(world.put("x.json", b"{}").await, PortErrorKind::Malformed, "upload of out/x.json failed");
        // An empty list, or one of other things, says that there is no earlier artifact.
        if !body.contains("\"data\":[]") && !body.contains("\"id\"") {
            world.answer("list", 200, "application/json", body.to_owned());
            refused(world.put("x.json", b"{}").await, PortErrorKind::Malformed, "out/x.json");
        }
    }
    for body in ["{}", "<html>", ""] {
        world.answer("initiate", 200, "application/json", body);
        refused(world.put("x.json", &noise(5 * MIB)).await, PortErrorKind::Malformed, "upload of out/x.json failed");
    }
    assert!(world.ports.published().is_empty());
}

#[tokio::test]
async fn unknown_limits_stop_nothing() {
    let world = world().await;
    for (status, body) in [(200, "<html>"), (500, ""), (404, "")] {
        world.answer("info", status, "text/html", body);
        world.put("x.json", b"{}").await.expect("stored");
    }
    world.put("x.json", b"{}").await.expect("stored");
    assert_eq!(world.count("info"), 3, "only an answer, or a 404, is remembered");
}

#[tokio::test]
async fn impossible_artifacts_are_refused_before_any_request() {
    let world = world().await;
    for path in ["../x", "a/../../x", "a\0b", &"x".repeat(1025)] {
        refused(world.put(path, b"x").await, PortErrorKind::InvalidPath, "artifact path");
        refused(world.ports.create(spec(path)).await.map(|_| ()), PortErrorKind::InvalidPath, "artifact path");
    }
    for bad in ["a\r\nX: y", "a\"b", "", "a\\", "tab\there", "a;b"] {
        let named = ArtifactSpec { name: Some(bad.into()), ..spec("x") };
        refused(world.ports.create(named).await.map(|_| ()), PortErrorKind::BadRequest, "the name");
        let typed = ArtifactSpec { data_type: Some(bad.into()), ..spec("x") };
        refused(world.ports.create(typed).await.map(|_| ()), PortErrorKind::BadRequest, "the data type");
        let replaced = ArtifactSpec { existing_id: Some(bad.into()), ..spec("x") };
        refused(world.ports.create(replaced).await.map(|_| ()), PortErrorKind::BadRequest, "the id");
    }
    let nowhere = world.dir.path().join("nowhere");
    refused(world.ports.put_file(spec("x"), &nowhere).await, PortErrorKind::Local, "nowhere");
    refused(
        world.ports.open("https://elsewhere.example/data/x").await.map(|_| ()),
        PortErrorKind::BadRequest,
        "elsewhere",
    );
    assert_eq!(world.log(), [""; 0]);
}

#[tokio::test]
async fn without_set_up_nothing_is_requested() {
    let world = world().await;
    let at = |server: &str| {
        DataLocation::DomainServer(Coordinates { server: Url::parse(server).expect("a URL"), domain: DOMAIN })
    };
    for (setup, text) in [
        (Setup::Refused("heartbeat refused (403)".into()), "heartbeat refused (403)"),
        (Setup::Ready(Err("domain_id is missing".into())), "domain_id is missing"),
        (Setup::Ready(Ok(at("http://ds.example"))), "https"),
        (Setup::Ready(Ok(at("https://user:secret@ds.example"))), "credentials"),
    ] {
        world.keys.publish(|now| now.setup = setup);
        let result = world.ports.materialize("d").await;
        assert!(!format!("{result:?}").contains("secret"));
        refused(result, PortErrorKind::Setup, text);
        refused(world.put("x", b"y").await, PortErrorKind::Setup, text);
    }
    assert_eq!(world.log(), [""; 0]);
}

#[tokio::test]
async fn the_first_call_waits_for_the_set_up() {
    let world = world().await;
    world.item("d", "n", "t", "body");
    let mut ready = Setup::Pending;
    world.keys.publish(|now| std::mem::swap(&mut now.setup, &mut ready));
    let (input, ()) = tokio::join!(world.ports.materialize("d"), async {
        tokio::task::yield_now().await;
        assert_eq!(world.log(), [""; 0]);
        world.keys.publish(|now| now.setup = ready);
    });
    input.expect("comes");
}

#[tokio::test]
async fn only_allowed_hosts_get_the_bearer() {
    for (allowed, fine) in [("127.0.0.1", true), ("ds.example", false), ("127.0.0.1:1", false)] {
        let world = world_with(|config| config.domain_hosts = vec![allowed.to_owned()]).await;
        world.item("d", "n", "t", "body");
        let result = world.ports.materialize("d").await;
        match fine {
            true => assert!(result.is_ok(), "{result:?}"),
            false => refused(result, PortErrorKind::Setup, "DOMAIN_HOSTS"),
        }
    }
}

#[tokio::test]
async fn without_a_bearer_nothing_is_requested() {
    let world = world().await;
    world.keys.publish(|now| now.token = None);
    refused(world.ports.materialize("d").await, PortErrorKind::Setup, "no domain token");
    world.keys.publish(|now| now.token = Some(Token::new("a\nb")));
    let err = world.ports.materialize("d").await.expect_err("refused");
    assert!(err.kind == PortErrorKind::Setup && !err.message.contains("a\nb"), "{err}");
    assert_eq!(world.log(), [""; 0]);
}

#[tokio::test]
async fn a_server_that_is_not_there_is_a_network_error() {
    let world = world().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let address = listener.local_addr().expect("bound");
    drop(listener);
    let server = Url::parse(&format!("http://{address}")).expect("a URL");
    world.keys.publish(|now| {
        now.setup = Setup::Ready(Ok(DataLocation::DomainServer(Coordinates { server, domain: DOMAIN })))
    });
    refused(world.ports.materialize("d").await, PortErrorKind::Network, &address.to_string());
}

#[tokio::test]
async fn a_silent_server_ends_an_upload() {
    let world = world_with(|config| {
        config.request_timeout = Duration::from_millis(500);
        config.stall = Duration::from_millis(500);
    })
    .await;
    world.trick("create", Trick::Hang);
    refused(world.put("x", &noise(MIB)).await, PortErrorKind::Network, "did not answer within");
    world.trick("list", Trick::Hang);
    refused(world.put("x", &noise(MIB)).await, PortErrorKind::Network, "did not answer within");
}
