//! Refusals of the ports, and the errors for refusals of the server.

use super::*;

#[tokio::test]
async fn statuses_become_kinds_with_fixed_words() {
    let fixture = fixture().await;
    for (status, kind, words) in [
        (400, PortErrorKind::BadRequest, "bad request (400): why"),
        (404, PortErrorKind::NotFound, "not found (404): why"),
        (409, PortErrorKind::Conflict, "upload of out/x.json refused: conflict (409): why"),
        (503, PortErrorKind::Server, "server error (503): why"),
        (403, PortErrorKind::Other, "unexpected status (403): why"),
        (429, PortErrorKind::Other, "unexpected status (429): why"),
        (302, PortErrorKind::Other, "unexpected redirect (302): why"),
    ] {
        fixture.answer("create", status, "text/plain", "why\r\n");
        refused(fixture.put("x.json", b"{}").await, kind, words);
    }
}

#[tokio::test]
async fn answers_outside_the_protocol_are_malformed() {
    let fixture = fixture().await;
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
        fixture.answer("create", 200, "application/json", body.to_owned());
        refused(fixture.put("x.json", b"{}").await, PortErrorKind::Malformed, "upload of out/x.json failed");
        // An empty list, or one of other data, means that there is no earlier artifact.
        if !body.contains("\"data\":[]") && !body.contains("\"id\"") {
            fixture.answer("list", 200, "application/json", body.to_owned());
            refused(fixture.put("x.json", b"{}").await, PortErrorKind::Malformed, "out/x.json");
        }
    }
    for body in ["{}", "<html>", ""] {
        fixture.answer("initiate", 200, "application/json", body);
        refused(fixture.put("x.json", &noise(5 * MIB)).await, PortErrorKind::Malformed, "upload of out/x.json failed");
    }
    assert!(fixture.ports.published().is_empty());
}

#[tokio::test]
async fn uploads_succeed_without_known_limits() {
    let fixture = fixture().await;
    for (status, body) in [(200, "<html>"), (500, ""), (404, "")] {
        fixture.answer("info", status, "text/html", body);
        fixture.put("x.json", b"{}").await.expect("stored");
    }
    fixture.put("x.json", b"{}").await.expect("stored");
    assert_eq!(fixture.count("info"), 3, "only an answer, or a 404, is remembered");
}

#[tokio::test]
async fn invalid_artifacts_are_refused_before_any_request() {
    let fixture = fixture().await;
    for path in ["../x", "a/../../x", "a\0b", &"x".repeat(1025)] {
        refused(fixture.put(path, b"x").await, PortErrorKind::InvalidPath, "artifact path");
        refused(fixture.ports.create(spec(path)).await.map(|_| ()), PortErrorKind::InvalidPath, "artifact path");
    }
    for bad in ["a\r\nX: y", "a\"b", "", "a\\", "tab\there", "a;b"] {
        let named = ArtifactSpec { name: Some(bad.into()), ..spec("x") };
        refused(fixture.ports.create(named).await.map(|_| ()), PortErrorKind::BadRequest, "the name");
        let typed = ArtifactSpec { data_type: Some(bad.into()), ..spec("x") };
        refused(fixture.ports.create(typed).await.map(|_| ()), PortErrorKind::BadRequest, "the data type");
        let replaced = ArtifactSpec { existing_id: Some(bad.into()), ..spec("x") };
        refused(fixture.ports.create(replaced).await.map(|_| ()), PortErrorKind::BadRequest, "the id");
    }
    let nowhere = fixture.dir.path().join("nowhere");
    refused(fixture.ports.put_file(spec("x"), &nowhere).await, PortErrorKind::Local, "nowhere");
    refused(
        fixture.ports.open("https://elsewhere.example/data/x").await.map(|_| ()),
        PortErrorKind::BadRequest,
        "elsewhere",
    );
    assert_eq!(fixture.log(), [""; 0]);
}

#[tokio::test]
async fn no_request_before_the_set_up_heartbeat() {
    let fixture = fixture().await;
    let at = |server: &str| {
        DataLocation::DomainServer(Coordinates { server: Url::parse(server).expect("a URL"), domain: DOMAIN })
    };
    for (setup, text) in [
        (Setup::Refused("heartbeat refused (403)".into()), "heartbeat refused (403)"),
        (Setup::Ready(Err("domain_id is missing".into())), "domain_id is missing"),
        (Setup::Ready(Ok(at("http://ds.example"))), "https"),
        (Setup::Ready(Ok(at("https://user:secret@ds.example"))), "credentials"),
    ] {
        fixture.writer.publish(|now| now.setup = setup);
        let result = fixture.ports.materialize("d").await;
        assert!(!format!("{result:?}").contains("secret"));
        refused(result, PortErrorKind::Setup, text);
        refused(fixture.put("x", b"y").await, PortErrorKind::Setup, text);
    }
    assert_eq!(fixture.log(), [""; 0]);
}

#[tokio::test]
async fn first_call_waits_for_the_set_up_heartbeat() {
    let fixture = fixture().await;
    fixture.item("d", "n", "t", "body");
    let mut ready = Setup::Pending;
    fixture.writer.publish(|now| std::mem::swap(&mut now.setup, &mut ready));
    let (input, ()) = tokio::join!(fixture.ports.materialize("d"), async {
        tokio::task::yield_now().await;
        assert_eq!(fixture.log(), [""; 0]);
        fixture.writer.publish(|now| now.setup = ready);
    });
    input.expect("comes");
}

#[tokio::test]
async fn only_allowed_hosts_get_the_bearer() {
    for (allowed, fine) in [("127.0.0.1", true), ("ds.example", false), ("127.0.0.1:1", false)] {
        let fixture = fixture_with(|config| config.domain_hosts.0 = vec![allowed.to_owned()]).await;
        fixture.item("d", "n", "t", "body");
        let result = fixture.ports.materialize("d").await;
        match fine {
            true => assert!(result.is_ok(), "{result:?}"),
            false => refused(result, PortErrorKind::Setup, "DOMAIN_HOSTS"),
        }
    }
}

#[tokio::test]
async fn no_request_without_a_bearer() {
    let fixture = fixture().await;
    fixture.writer.publish(|now| now.token = None);
    refused(fixture.ports.materialize("d").await, PortErrorKind::Setup, "no domain token");
    fixture.writer.publish(|now| now.token = Some(Token::new("a\nb")));
    let err = fixture.ports.materialize("d").await.expect_err("refused");
    assert!(err.kind == PortErrorKind::Setup && !err.message.contains("a\nb"), "{err}");
    assert_eq!(fixture.log(), [""; 0]);
}

#[tokio::test]
async fn unreachable_server_is_a_network_error() {
    let fixture = fixture().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
    let address = listener.local_addr().expect("bound");
    drop(listener);
    let server = Url::parse(&format!("http://{address}")).expect("a URL");
    fixture.writer.publish(|now| {
        now.setup = Setup::Ready(Ok(DataLocation::DomainServer(Coordinates { server, domain: DOMAIN })))
    });
    refused(fixture.ports.materialize("d").await, PortErrorKind::Network, &address.to_string());
}

#[tokio::test]
async fn upload_to_a_hung_server_times_out() {
    let fixture = fixture_with(|config| {
        config.request_timeout = Duration::from_millis(500);
        config.stall = Duration::from_millis(500);
    })
    .await;
    fixture.fault("create", Fault::Hang);
    refused(fixture.put("x", &noise(MIB)).await, PortErrorKind::Network, "did not answer within");
    fixture.fault("list", Fault::Hang);
    refused(fixture.put("x", &noise(MIB)).await, PortErrorKind::Network, "did not answer within");
}
