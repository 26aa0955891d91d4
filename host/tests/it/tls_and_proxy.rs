//! Services behind TLS with a private certificate authority, and proxies (posemesh.md section 1.1).

use crate::harness::{
    TestServer,
    fault_proxy::FaultProxy,
    fixtures,
    node::{Cli, NodeSetup},
    tls::{Front, NAME, authority},
};

const SECRET: &str = "pass%20word-nobody-may-see";
/// The user and password of [`SECRET`] as they are sent.
const BASIC: &str = "Basic bWU6cGFzcyB3b3JkLW5vYm9keS1tYXktc2Vl";

/// A dev server that is reachable at `https://NAME` only.
struct TlsServer {
    test_server: TestServer,
    _rubbish: FaultProxy,
    tls: Front,
}

impl TlsServer {
    async fn new() -> Self {
        let test_server = TestServer::start().await;
        let proxy = FaultProxy::known_as(&test_server, Some(&format!("https://{NAME}"))).await;
        let tls = Front::tls(proxy.address()).await;
        Self { test_server, _rubbish: proxy, tls }
    }

    fn node(&self) -> NodeSetup {
        let url = |path: &str| format!("https://{NAME}{path}").parse().expect("a URL");
        NodeSetup::new(&url("/"), &url("/v1"), &[fixtures::echo()])
            .set("SIGN_IN_DOMAIN", "127.0.0.1")
            .set("REGISTER_INTERVAL_SECS", "1")
    }
}

#[tokio::test]
async fn task_runs_over_tls_through_a_proxy() {
    let server = TlsServer::new().await;
    let proxy = Front::proxy(server.tls.address, Some(BASIC)).await;
    let url = format!("http://me:{SECRET}@{}", proxy.address);
    let node = server.node().set("CA_BUNDLE", authority()).set("https_proxy", url).set("RUST_LOG", "trace");
    let node = node.leasing().await;
    let input = server.test_server.put("in", &[7; 300_000]).await;
    let job = server.test_server.task("/examples/echo-stream/v1").inputs(&[input]).submit();
    server.test_server.ended(&node, job).await.completed();
    node.stop().await;
    let asked = proxy.seen();
    assert!(!asked.is_empty() && asked.iter().all(|line| line == "CONNECT plane.test:443 HTTP/1.1"), "{asked:?}");
    let handshakes = server.tls.seen().iter().filter(|line| *line == "handshake").count();
    assert_eq!(handshakes, asked.len(), "each handshake went through the proxy");
    for secret in [SECRET, "pass word", BASIC.trim_start_matches("Basic ")] {
        assert!(!node.log().contains(secret), "a proxy's password is in the log");
    }
}

#[tokio::test]
async fn unknown_certificate_authority_is_refused() {
    let server = TlsServer::new().await;
    let proxy = Front::proxy(server.tls.address, None).await;
    let node = server.node().set("ALL_PROXY", proxy.address.to_string()).start().await;
    let line = node.says("registration.failed").await;
    let error = line["error"].as_str().unwrap_or_default();
    assert!(error.contains(NAME) && error.contains("UnknownIssuer"), "{line}");
    node.stop().await;

    // The standard environment variables have the same effect.
    let node = server.node().set("HTTPS_PROXY", proxy.address.to_string()).set("SSL_CERT_FILE", authority());
    node.leasing().await.stop().await;
}

#[tokio::test]
async fn proxy_errors_hide_the_password() {
    let server = TlsServer::new().await;
    let proxy = Front::proxy(server.tls.address, Some("Basic other")).await;
    let url = format!("http://me:{SECRET}@{}", proxy.address);
    let node = server.node().set("CA_BUNDLE", authority()).set("HTTPS_PROXY", url).start().await;
    let line = node.says("registration.failed").await;
    let wanted = format!("proxy {}: tunnel error: proxy authorization required", proxy.address);
    assert!(line["error"].as_str().is_some_and(|error| error.contains(&wanted)), "{line}");
    node.stop().await;
    assert!(!node.log().contains(SECRET), "a proxy's password is in the log");
    assert!(server.tls.seen().is_empty(), "no request passed the proxy");
}

#[tokio::test]
async fn plain_http_uses_the_proxy_except_for_loopback() {
    let test_server = TestServer::start().await;
    let proxy = Front::proxy(test_server.dev_server.address(), None).await;
    let url = |path: &str| format!("http://{NAME}{path}").parse().expect("a URL");
    let node = NodeSetup::new(&url("/"), &url("/v1"), &[fixtures::echo()])
        .set("SIGN_IN_DOMAIN", "127.0.0.1")
        .set("ALLOW_INSECURE_HTTP", "true")
        .set("HTTP_PROXY", proxy.address.to_string())
        .leasing()
        .await;
    // The lease names the domain server by its loopback address.
    let input = test_server.put("in", b"bytes").await;
    test_server.ended(&node, test_server.task("/examples/echo-file/v1").inputs(&[input]).submit()).await.completed();
    node.stop().await;
    let asked = proxy.seen();
    assert!(asked.iter().any(|line| line.contains("http://plane.test/")), "{asked:?}");
    assert!(!asked.iter().any(|line| line.contains("127.0.0.1")), "{asked:?}");
    let data = test_server.seen(&node, |seen| seen.iter().any(|request| request.path.contains("/data"))).await;
    assert!(!data.is_empty(), "the input was fetched");

    // With the host in NO_PROXY, the node resolves its name directly, which fails.
    let node = NodeSetup::new(&url("/"), &url("/v1"), &[fixtures::echo()])
        .set("ALLOW_INSECURE_HTTP", "true")
        .set("HTTP_PROXY", proxy.address.to_string())
        .set("NO_PROXY", "other.example, .test")
        .start()
        .await;
    let before = proxy.seen().len();
    node.says("registration.failed").await;
    assert_eq!(proxy.seen().len(), before, "the proxy was not used");
    node.stop().await;
}

#[tokio::test]
async fn invalid_bundle_or_proxy_is_one_error_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, text: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).expect("the folder is writable");
        path.to_string_lossy().into_owned()
    };
    let pem = |what: &str| format!("-----BEGIN CERTIFICATE-----\n{what}\n-----END CERTIFICATE-----\n");
    let missing = folder.path().join("missing.pem").to_string_lossy().into_owned();
    for (bundle, wanted) in [
        (missing, "No such file"),
        (folder.path().to_string_lossy().into_owned(), "directory"),
        (write("empty.pem", b""), "expected certificates in PEM form (-----BEGIN CERTIFICATE-----), found none"),
        (write("proxy.pem", &[0xff; 4096]), "expected certificates in PEM form"),
        (write("base64.pem", pem("!!").as_bytes()), "certificate 1 is not valid PEM: "),
        (write("der.pem", pem("AAAA").as_bytes()), "certificate 1 cannot be used: "),
    ] {
        let ended = check().set("CA_BUNDLE", &*bundle).run().await.expect(78);
        let line = format!("error: CA_BUNDLE: {bundle}: ");
        assert!(ended.stderr.starts_with(&line) && ended.stderr.contains(wanted), "{}", ended.stderr);
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    }
    check().set("CA_BUNDLE", authority()).run().await.expect(0);
    for name in ["HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "all_proxy"] {
        let ended = check().set(name, format!("socks5://me:{SECRET}@127.0.0.1:1")).run().await.expect(78);
        let wanted = "expected the URL of an http or https proxy, such as http://proxy.example:3128";
        assert_eq!(ended.stderr, format!("error: {}: {wanted}", name.to_uppercase()));
    }
    let shown = Cli::new(&["config", "show"]).set("HTTPS_PROXY", format!("http://me:{SECRET}@proxy.example:1"));
    let shown = shown.set("NO_PROXY", "a.example").run().await.expect(0);
    assert!(shown.stdout.contains("********@proxy.example:1") && !shown.stdout.contains(SECRET), "{}", shown.stdout);
    assert!(shown.stdout.contains("a.example"), "{}", shown.stdout);
}

/// `config check` with all required settings.
fn check() -> Cli {
    Cli::new(&["config", "check"])
        .set("DMS_BASE_URL", "https://plane.example/v1")
        .set("DDS_BASE_URL", "https://dds.example")
        .set("REG_SECRET", "a-secret")
        .set("SECP256K1_PRIVHEX", "11".repeat(32))
}
