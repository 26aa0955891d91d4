//! Tests the parser with the sample of the protocol, unusual forms, and random bodies in random pieces.

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;

const TYPE: &str = "multipart/form-data; boundary=q7";

/// Feeds `body` in pieces of the lengths from `piece`. Returns the heads and bodies of the parts, or the error.
fn parse(kind: &str, body: &[u8], mut piece: impl FnMut() -> usize) -> Result<Vec<(PartHead, Vec<u8>)>, PartsError> {
    let mut parser = Parser::new(kind)?;
    let mut parts: Vec<(PartHead, Vec<u8>)> = Vec::new();
    let (mut rest, mut open, mut over) = (body, false, false);
    loop {
        while let Some(event) = parser.next()? {
            assert!(!over, "an event after the end");
            match event {
                PartsEvent::Part(head) => {
                    assert!(!open, "a part inside a part");
                    open = true;
                    parts.push((head, Vec::new()));
                }
                PartsEvent::Data(bytes) => {
                    assert!(open && !bytes.is_empty());
                    parts.last_mut().expect("a part is open").1.extend_from_slice(&bytes);
                }
                PartsEvent::PartEnd => open = !std::mem::replace(&mut open, false),
                PartsEvent::End => over = true,
            }
        }
        assert!(parser.buffer.len() <= HEAD_BYTES_MAX + 4096 || rest.is_empty() || open, "the buffer is bounded");
        if rest.is_empty() {
            if parser.ended {
                assert!(!open, "the body ended inside a part");
                return Ok(parts);
            }
            parser.end();
            continue;
        }
        let (now, later) = rest.split_at(piece().clamp(1, rest.len()));
        parser.feed(Bytes::copy_from_slice(now));
        rest = later;
    }
}

#[track_caller]
fn bodies(kind: &str, body: &str) -> Vec<String> {
    let parts = parse(kind, body.as_bytes(), || usize::MAX).expect("parses");
    let single = parse(kind, body.as_bytes(), || 1).expect("parses byte by byte");
    assert_eq!(parts, single);
    parts.into_iter().map(|(_, body)| String::from_utf8(body).expect("text")).collect()
}

#[track_caller]
fn refusal(body: &str) -> PartsError {
    let whole = parse(TYPE, body.as_bytes(), || usize::MAX).expect_err("refused");
    assert_eq!(parse(TYPE, body.as_bytes(), || 1).expect_err("rejected byte by byte"), whole);
    whole
}

fn part(given: &str, body: &str) -> String {
    format!(
        "--q7\r\nContent-Type: application/octet-stream\r\nContent-Disposition: form-data; {given}\r\n\r\n{body}\r\n"
    )
}

#[test]
fn protocol_sample_is_parsed() {
    let given =
        r#"name="scan a"; data-type="ply"; id="d-7"; domain-id="dom-1"; size="4"; updated-at="2025-06-01T08:00:00Z""#;
    let body = format!("{}--q7--\r\n", part(given, "abcd"));
    let parts = parse(TYPE, body.as_bytes(), || usize::MAX).expect("parses");
    let head = PartHead {
        id: Some("d-7".into()),
        domain_id: Some("dom-1".into()),
        name: Some("scan a".into()),
        data_type: Some("ply".into()),
        size: Some(4),
        updated_at: Some("2025-06-01T08:00:00Z".into()),
        sha256: None,
    };
    assert_eq!(parts, [(head, b"abcd".to_vec())]);
}

#[test]
fn boundary_may_be_quoted_among_other_parameters() {
    let body = "--a b;c\r\ncontent-disposition: x; size=2\r\n\r\nhi\r\n--a b;c--";
    for kind in [
        r#"multipart/form-data; boundary="a b;c""#,
        r#"Multipart/Form-Data ;charset=utf-8; Boundary="a b;c"; x=y"#,
        r#"multipart/form-data;boundary="a b;c";"#,
    ] {
        assert_eq!(bodies(kind, body), ["hi"], "{kind}");
    }
    for kind in [
        "text/html",
        "application/json; charset=utf-8",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        r#"multipart/form-data; boundary="open"#,
        "multipart/mixed; boundary=q7",
        "",
    ] {
        let err = Parser::new(kind).expect_err("no multipart");
        assert_eq!(err, PartsError::ContentType(kind.into()));
    }
}

#[test]
fn size_overrides_boundaries_and_line_ends() {
    let inside = "\r\n--q7--\r\n--q7\r\n\r\n";
    let given = format!("size={}", inside.len());
    assert_eq!(bodies(TYPE, &format!("{}--q7--", part(&given, inside))), [inside]);
    // No line end between body and delimiter, text before the first, text after the last.
    let body =
        "some\r\npreamble --q --q7x\r\n--q7 \t\r\nContent-Disposition: f; size=3\r\n\r\nabc--q7--trailing --q7\r\n";
    assert_eq!(bodies(TYPE, body), ["abc"]);
    // Empty parts, one with and one without a line end of its own.
    let body =
        "--q7\r\nContent-Disposition: f; size=0\r\n\r\n\r\n--q7\r\nContent-Disposition: f; size=0\r\n\r\n--q7--\r\n";
    assert_eq!(bodies(TYPE, body), ["", ""]);
}

#[test]
fn headers_may_end_in_bare_line_feeds() {
    let inside = "a\r\n\r\nb";
    let body = format!("--q7\nX: y\nContent-Disposition: f; size={}\n\n{inside}\n--q7--\n", inside.len());
    assert_eq!(bodies(TYPE, &body), [inside]);
}

#[test]
fn part_without_size_ends_at_the_boundary() {
    let inside = "a--q7 b\r\n--q7x\r\n--q";
    let body = format!("{}{}--q7--", part("name=a", inside), part("name=b", ""));
    assert_eq!(bodies(TYPE, &body), [inside, ""]);
    let body = "--q7\nContent-Disposition: f\n\nab\r\n--q7--\n";
    assert_eq!(bodies(TYPE, body), ["ab\r"], "with LF headers the CR belongs to the body");
    assert_eq!(bodies(TYPE, "--q7\r\nContent-Disposition: f\r\n\r\n--q7--"), [""]);
    assert!(matches!(refusal("--q7\r\nContent-Disposition: f\r\n\r\nabc"), PartsError::Truncated(_)));
}

#[test]
fn quoted_values_keep_semicolons_and_escaped_quotes() {
    let given = r#"name="a;b=\"c\\d\e"; Data-Type = plain ; odd; size="1" ; size=9; name=second"#;
    let body = format!("{}--q7--", part(given, "x"));
    let parts = parse(TYPE, body.as_bytes(), || 3).expect("parses");
    assert_eq!(parts[0].0.name.as_deref(), Some(r#"a;b="c\d\e"#));
    assert_eq!(parts[0].0.data_type.as_deref(), Some("plain"));
}

#[test]
fn empty_bodies_are_accepted() {
    for body in ["", "\r\n", "--q7--", "--q7--\r\n", "\r\n--q7--\r\n"] {
        assert_eq!(bodies(TYPE, body), [""; 0], "{body:?}");
    }
}

#[test]
fn cut_miscounted_or_malformed_bodies_are_errors() {
    let whole = format!("{}{}--q7--", part("size=5", "hello"), part("name=x; size=2", "ok"));
    for cut in 3..whole.len() {
        let err = refusal(&whole[..cut]);
        assert!(matches!(err, PartsError::Truncated(_) | PartsError::NoBoundary), "cut at {cut}: {err}");
    }
    assert_eq!(refusal(&format!("{}--q7--", part("size=4", "hello"))), PartsError::LongerThanSize(4));
    assert_eq!(refusal("--q7\r\nContent-Disposition: f; size=1\r\n\r\nx--q7oops--q7--"), PartsError::LongerThanSize(1));
    assert!(matches!(refusal(&format!("{}--q7--", part("size=99", "hello"))), PartsError::Truncated(_)));
    for given in ["size=x", "size=-1", "size=+1", "size=", "size=99999999999999999999", r#"name="open"#, r#"name="a"b"#]
    {
        assert!(matches!(refusal(&format!("{}--q7--", part(given, "x"))), PartsError::Head(_)), "{given}");
    }
    assert!(matches!(refusal("--q7\r\n\r\nx\r\n--q7--"), PartsError::Head(_)));
    assert!(matches!(refusal("--q7\r\nno colon\r\n\r\n--q7--"), PartsError::Head(_)));
    assert_eq!(refusal("<html>no multipart</html>"), PartsError::NoBoundary);
    let long = format!("--q7\r\nX: {}\r\n\r\n--q7--", "y".repeat(HEAD_BYTES_MAX));
    assert_eq!(refusal(&long), PartsError::HeadTooLarge);
}

#[test]
fn bodies_are_passed_on_without_a_copy() {
    let mut parser = Parser::new(TYPE).expect("a boundary");
    parser.feed(Bytes::from_static(b"--q7\r\nContent-Disposition: f; size=1000000000000\r\n\r\n"));
    assert!(matches!(parser.next(), Ok(Some(PartsEvent::Part(_)))));
    let piece = Bytes::from(vec![7; 65536]);
    for _ in 0..64 {
        parser.feed(piece.clone());
        let Ok(Some(PartsEvent::Data(data))) = parser.next() else { panic!("data is passed on") };
        assert_eq!(data.as_ptr(), piece.as_ptr(), "not even copied");
        assert_eq!((data.len(), parser.buffer.len()), (65536, 0));
    }
}

/// Random parts in every accepted style, split at random positions.
#[test]
fn every_split_gives_the_same_parts() {
    for seed in 0..2000 {
        let mut random = StdRng::seed_from_u64(seed);
        let boundary = ["q7", "-", "--", "a\"b", "x y;z", "\u{e9}"][random.random_range(0..6)];
        let kind = format!("multipart/form-data; boundary=\"{}\"", boundary.replace('"', "\\\""));
        let mut body = Vec::new();
        let mut expected = Vec::new();
        for _ in 0..random.random_range(0..4) {
            let end = if random.random() { "\r\n" } else { "\n" };
            // Bodies with fragments of a boundary are the difficult ones.
            let fragments = ["\r", "\n", "-", "--", boundary, "a", "\r\n--"];
            let count = random.random_range(0..12);
            let mut content: String = (0..count).map(|_| fragments[random.random_range(0..fragments.len())]).collect();
            let sized = random.random_bool(0.7);
            let mark = format!("--{boundary}");
            if !sized && content.contains(&mark) {
                content = content.replace(boundary, "!");
            }
            if !sized && content.contains(&mark) {
                content.clear();
            }
            let size = if sized { format!("; size={}", content.len()) } else { String::new() };
            body.extend(format!("--{boundary}{end}A: b{end}Content-Disposition: f; id=i{size}{end}{end}").bytes());
            body.extend(content.bytes());
            body.extend(end.bytes());
            expected.push(content.into_bytes());
        }
        body.extend(format!("--{boundary}--\r\n").bytes());
        let largest = random.random_range(1..40);
        let parts = parse(&kind, &body, || random.random_range(1..=largest));
        let text = String::from_utf8_lossy(&body).into_owned();
        let parts = parts.unwrap_or_else(|err| panic!("seed {seed}: {err} in {text:?}"));
        let found: Vec<_> = parts.into_iter().map(|(_, body)| body).collect();
        assert_eq!(found, expected, "seed {seed}: {text:?}");
    }
}

#[test]
fn random_bytes_give_the_same_result_when_split() {
    for seed in 0..3000 {
        let mut random = StdRng::seed_from_u64(seed);
        let fragments: [&[u8]; 12] = [
            b"--q7",
            b"--",
            b"\r\n",
            b"\n",
            b"\r",
            b"Content-Disposition: f; size=",
            b"3",
            b";",
            b"\"",
            b"\xff",
            b"x: y",
            b"q7",
        ];
        let body: Vec<u8> =
            (0..random.random_range(0..30)).flat_map(|_| fragments[random.random_range(0..12)].to_vec()).collect();
        let whole = parse(TYPE, &body, || usize::MAX);
        let split = parse(TYPE, &body, || random.random_range(1..6));
        assert_eq!(whole.is_ok(), split.is_ok(), "seed {seed}: {:?}", String::from_utf8_lossy(&body));
        if whole.is_ok() {
            assert_eq!(whole, split, "seed {seed}");
        }
    }
}
