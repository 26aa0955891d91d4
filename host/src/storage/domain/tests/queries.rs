//! Queries of a domain's data.

use bytes::Bytes;
use futures_util::StreamExt;
use tokio::sync::oneshot;

use super::*;
use crate::model::{CancelReason, DataQuery};

fn query(json: &str) -> DataQuery {
    DataQuery::parse(json.as_bytes()).expect("a query")
}

/// The lines of an answer.
async fn lines(mut stream: Box<dyn InputStream>) -> Result<Vec<Value>, PortError> {
    let text = drain(&mut stream).await?;
    let lines = text.split_inclusive(|byte| *byte == b'\n');
    Ok(lines.map(|line| serde_json::from_slice(line).expect("a line of JSON")).collect())
}

async fn ids(fixture: &Fixture, json: &str) -> Result<Vec<String>, PortError> {
    let found = lines(fixture.ports.find(query(json)).await?).await?;
    Ok(found.iter().map(|found| found["id"].as_str().expect("an id").to_owned()).collect())
}

/// A list of so many entries, `a-0` and so on, without its end.
fn entries(range: std::ops::Range<usize>) -> String {
    let entry = |n: usize| format!("{},", metadata(&format!("a-{n}"), &Item::default()));
    range.map(entry).collect()
}

fn json_body(stream: impl futures_util::Stream<Item = Result<Bytes, std::io::Error>> + Send + 'static) -> Response {
    reply(200, "application/json", Body::from_stream(stream))
}

#[tokio::test]
async fn found_data_matches_each_part_exactly() {
    let fixture = fixture().await;
    fixture.item("a", "scan", "ply", b"abc");
    fixture.item("b", "scan", "obj", b"");
    // The server of this test matches parts of names.
    fixture.item("c", "scan two", "ply", b"");
    for (json, expected) in [
        ("{}", &["a", "b", "c"][..]),
        (r#"{"name":"scan"}"#, &["a", "b"]),
        (r#"{"data_type":"ply"}"#, &["a", "c"]),
        (r#"{"name":"scan","data_type":"ply"}"#, &["a"]),
        (r#"{"ids":["c","a"]}"#, &["a", "c"]),
        (r#"{"ids":["b","c"],"data_type":"ply"}"#, &["c"]),
        (r#"{"name":"nothing"}"#, &[]),
        (r#"{"ids":[]}"#, &[]),
    ] {
        assert_eq!(ids(&fixture, json).await.expect(json), expected, "{json}");
    }
    assert_eq!(fixture.count("list"), 7, "an empty list of ids needs no request");
    let found = lines(fixture.ports.find(query(r#"{"ids":["a"]}"#)).await.expect("found")).await.expect("read");
    let expected = json!({"id": "a", "name": "scan", "data_type": "ply", "size": 3, "domain_id": DOMAIN,
        "created_at": "2025-06-01T08:00:00Z", "updated_at": "2025-06-01T08:00:00Z"});
    assert_eq!(found, [expected]);
    assert!(fixture.ports.fetched().is_empty(), "a query is not an input");
    // The id of a line is an input.
    let mut input = fixture.ports.open(found[0]["id"].as_str().expect("an id")).await.expect("opens");
    assert_eq!(drain(&mut input).await.expect("read"), b"abc");
}

#[tokio::test]
async fn nothing_found_has_several_forms() {
    let fixture = fixture().await;
    for (status, body) in [(404, "no such data"), (204, ""), (200, "{\"data\":[]}")] {
        fixture.answer("list", status, "application/json", body);
        assert_eq!(ids(&fixture, "{}").await.expect("an answer"), [""; 0]);
    }
}

#[tokio::test]
async fn entries_are_passed_on_before_answer_ends() {
    // Far larger than the answers that are read as a whole.
    const ENTRIES: usize = 40_000;
    let fixture = fixture().await;
    let (go_on, gate) = oneshot::channel::<()>();
    let first = futures_util::stream::iter([Ok(Bytes::from(format!("{{\"data\":[{}", entries(0..1))))]);
    let rest = futures_util::stream::once(async move {
        gate.await.expect("the first line was read");
        let text = entries(1..ENTRIES);
        Ok(Bytes::from(format!("{}]}}", text.trim_end_matches(','))))
    });
    fixture.fault("list", Fault::Answer(json_body(first.chain(rest))));
    let mut stream = fixture.ports.find(query("{}")).await.expect("found");
    let first = stream.next().await.expect("read").expect("a line");
    assert!(first.starts_with(b"{\"id\":\"a-0\"") && first.ends_with(b"\n"));
    go_on.send(()).expect("the server waits");
    let (mut count, mut largest) = (1, 0);
    while let Some(piece) = stream.next().await.expect("read") {
        assert_eq!(piece.last(), Some(&b'\n'), "a piece has whole lines");
        count += piece.iter().filter(|byte| **byte == b'\n').count();
        largest = largest.max(piece.len());
    }
    assert_eq!(count, ENTRIES);
    assert!(largest < 65 * 1024, "{largest}");
    assert!(stream.next().await.expect("still ended").is_none());
}

#[tokio::test]
async fn broken_answer_is_continued_without_duplicates() {
    let fixture = fixture_with(|config| config.retry_limit = Duration::from_secs(30)).await;
    for n in 0..5 {
        fixture.item(&format!("a-{n}"), "scan", "ply", b"");
    }
    let cut = |text: String| {
        let pieces = [Ok(Bytes::from(text)), Err(std::io::Error::other("cut"))];
        Fault::Answer(json_body(futures_util::stream::iter(pieces)))
    };
    fixture.fault("list", cut("{\"data\":[".to_owned() + &entries(0..2)));
    fixture.answer("list", 503, "text/plain", "later");
    fixture.fault("list", cut("{\"data\":[".to_owned() + &entries(0..1)));
    // An answer that ends too early without an error of the connection.
    fixture.answer("list", 200, "application/json", "{\"data\":[".to_owned() + &entries(0..3));
    fixture.answer("list", 200, "text/html", "<html>a gateway</html>");
    assert_eq!(ids(&fixture, "{}").await.expect("found"), ["a-0", "a-1", "a-2", "a-3", "a-4"]);
    assert_eq!(fixture.count("list"), 6);
}

#[tokio::test]
async fn changed_list_ends_a_continued_query() {
    for (repeated, status) in [(entries(1..5), 200), (entries(0..1), 200), (String::new(), 404)] {
        let fixture = fixture_with(|config| config.retry_limit = Duration::from_secs(30)).await;
        fixture.answer("list", 200, "application/json", "{\"data\":[".to_owned() + &entries(0..2));
        let repeated = format!("{{\"data\":[{}]}}", repeated.trim_end_matches(','));
        fixture.answer("list", status, "application/json", repeated);
        let mut stream = fixture.ports.find(query("{}")).await.expect("the first lines");
        stream.next().await.expect("the first lines");
        for _ in 0..2 {
            refused(stream.next().await, PortErrorKind::Network, "changed on the server meanwhile");
        }
        assert_eq!(fixture.count("list"), 2);
    }
}

#[tokio::test]
async fn many_ids_are_queried_in_groups() {
    let fixture = fixture().await;
    let asked: Vec<String> = (0..250).map(|n| format!("i{n:03}")).collect();
    for id in &asked {
        fixture.item(id, "scan", "ply", b"");
    }
    let twice: Vec<&String> = asked.iter().chain(&asked).collect();
    assert_eq!(ids(&fixture, &json!({"ids": twice}).to_string()).await.expect("found"), asked);
    assert_eq!(fixture.count("list"), 3);
}

#[tokio::test]
async fn refusals_of_queries_are_errors() {
    let fixture = fixture().await;
    let find = async |query: DataQuery| fixture.ports.find(query).await.map(|_| ());
    refused(
        find(DataQuery { name: Some(String::new()), ..query("{}") }).await,
        PortErrorKind::BadRequest,
        "empty name",
    );
    assert_eq!(fixture.log(), [""; 0]);
    for (status, body, kind, text) in [
        (403, "why", PortErrorKind::Other, "query of the domain's data refused: unexpected status (403): why"),
        (500, "why", PortErrorKind::Server, "server error (500)"),
        (200, "<html>", PortErrorKind::Malformed, "query of the domain's data failed: the answer is not a list"),
        (200, "{\"data\":[{\"name\":\"x\"}]}", PortErrorKind::Malformed, "missing field `id`"),
        (200, "{\"data\":[", PortErrorKind::Network, "ended before its last entry"),
    ] {
        fixture.answer("list", status, "application/json", body);
        refused(find(query("{}")).await, kind, text);
    }
    fixture.held.cancel.cancel(CancelReason::Plane);
    refused(find(query("{}")).await, PortErrorKind::LeaseOver, "cancelled the task");
}

#[tokio::test]
async fn refused_token_is_replaced_for_a_query() {
    let fixture = fixture_with(|config| config.token_wait = Duration::from_secs(30)).await;
    fixture.item("a", "scan", "ply", b"");
    let (server, writer) = (fixture.server.clone(), Arc::clone(&fixture.writer));
    let rotate = move || {
        server.store().tokens = vec!["t2".to_owned()];
        writer.renew(Some(Token::new("t2")), None);
    };
    fixture.fault("list", Fault::First(Box::new(rotate)));
    assert_eq!(ids(&fixture, "{}").await.expect("found"), ["a"]);
    assert_eq!(fixture.count("list"), 2);
}

#[tokio::test]
async fn query_waits_for_setup_and_ends_with_the_lease() {
    let fixture = fixture().await;
    let (held, writer) = HeldLease::new(lease(&[]), Setup::Pending);
    let config = Arc::new(Config::new("node/1"));
    let client = Client::new(transport::Config::default());
    let ports = DomainPorts::new(client, held, fixture.dir.path().to_owned(), config);
    let mut find = ports.find(query("{}"));
    assert!(futures_util::poll!(&mut find).is_pending());
    assert_eq!(fixture.log(), [""; 0]);
    fixture.fault("list", Fault::Hang);
    let url = fixture.url.clone();
    writer.publish(|now| {
        now.setup = Setup::Ready(Ok(DataLocation::DomainServer(Coordinates { server: url, domain: DOMAIN })))
    });
    let end = async {
        fixture.until("list").await;
        writer.deadline().set(crate::model::BootInstant::now());
        ports.close().await;
    };
    let (found, ()) = tokio::join!(find, end);
    refused(found.map(|_| ()), PortErrorKind::LeaseOver, "nothing more is transferred");
}
