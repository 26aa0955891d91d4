//! TLS with a Node Runtime control plane: client certificate, its own authority, and the expected name
//! (docs/operations/configuration.md, "TLS of a control plane").

use std::fs;

use http::Request;
use runner_host::transport::{self, Client, Identity, PeerTls, PeerTlsError, TlsError, TransportError};
use serde_json::{Value, json};

use crate::harness::{
    EVENT_LIMIT, TestServer,
    fault_proxy::FaultProxy,
    fixtures,
    node::{NodeSetup, TestNode},
    node_plane::{Call, NodePlane, domain_lease, lease, result},
    tls::{Clients, Front, NAME, authority, client_file},
};

const ECHO: &str = "/examples/echo-file/v1";
const WITH_CERTIFICATE: &str = "handshake with a certificate";

/// A control plane behind TLS that requires a client certificate.
struct TlsPlane {
    plane: NodePlane,
    front: Front,
}

impl TlsPlane {
    async fn start() -> Self {
        let plane = NodePlane::start().await;
        let front = Front::tls_with(plane.address(), Clients::MustShow).await;
        Self { plane, front }
    }

    fn url(&self) -> String {
        format!("https://localhost:{}", self.front.address.port())
    }

    /// A node in the form of .NET with these settings of the section `MTls`.
    fn node(&self, changes: &Value) -> NodeSetup {
        let mut mtls = json!({
            "Enabled": true,
            "ClientCertificatePath": client_file("client.pem"),
            "ClientKeyPath": client_file("client.key"),
            "ServerCaCertificatePath": authority(),
            "ExpectedServerCertificateSubject": NAME,
            "ValidateCertificateChain": true,
        });
        for (key, value) in changes.as_object().expect("an object") {
            mtls[key] = value.clone();
        }
        let file = json!({ "NodeRuntime": { "NodeId": "n", "ControlPlaneUrl": self.url() }, "MTls": mtls });
        NodeSetup::with_file("appsettings.json", &file.to_string(), &[fixtures::echo()])
    }

    /// The node runs a task, and each of its connections has shown its certificate.
    async fn serves(&self, node: TestNode) {
        self.plane.send(&node, lease("run", ECHO, &[("a", "x")], &[])).await;
        assert_eq!(result(&self.plane.completed(&node, "run").await)["echo-0.bin"], "x");
        node.says_ended("accepted").await;
        node.stop().await;
        let seen = self.front.seen();
        let shown = seen.iter().filter(|line| *line == WITH_CERTIFICATE).count();
        assert!(shown >= 2, "REST and gRPC have their own connections: {seen:?}");
        assert!(!seen.iter().any(|line| line == "handshake"), "{seen:?}");
    }
}

#[tokio::test]
async fn client_certificate_serves_rest_and_grpc() {
    let tls = TlsPlane::start().await;
    let node = tls.node(&json!({})).leasing().await;
    tls.serves(node).await;

    // The same in our own form. Its paths start from the folder of the file.
    let table = format!(
        "[plane.runs]\nkind = \"node-runtime\"\ncontrol_plane_url = \"{}\"\nnode_id = \"n\"\n[plane.runs.tls]\n\
         client_certificate = \"cert.pem\"\nclient_key = \"key.pem\"\nca = \"{}\"\n",
        tls.url(),
        authority()
    );
    let setup = NodeSetup::with_config(&table, &[fixtures::echo()]);
    for (from, to) in [("client.pem", "cert.pem"), ("client.key", "key.pem")] {
        fs::copy(client_file(from), setup.plugins().join(to)).expect("the folder is writable");
    }
    setup.leasing().await.stop().await;
}

#[tokio::test]
async fn wrong_authority_or_name_stops_before_the_registration() {
    let tls = TlsPlane::start().await;
    let other = client_file("client-ca.pem");
    let proxy = Front::proxy(tls.front.address, None).await;
    for (changes, url, wanted) in [
        (json!({ "ServerCaCertificatePath": other }), tls.url(), "UnknownIssuer; check the trusted authorities"),
        // Without an authority of its own, the system's apply.
        (json!({ "ServerCaCertificatePath": "" }), tls.url(), "UnknownIssuer; check the trusted authorities"),
        (
            json!({ "ExpectedServerCertificateSubject": "control-plane" }),
            tls.url(),
            "common name [\"plane.test\"], expected \"control-plane\"; check the expected name",
        ),
        // Only the proxy knows this name.
        (json!({}), "https://other.test".to_owned(), "not valid for name \"other.test\""),
    ] {
        let node = tls.node(&changes).set("NodeRuntime__ControlPlaneUrl", url);
        let node = node.set("ALL_PROXY", proxy.address.to_string()).start().await;
        let line = node.says("registration.failed").await;
        let error = line["error"].as_str().unwrap_or_default();
        assert!(error.contains(wanted), "{wanted}: {line}");
        node.stop().await;
    }
    assert!(tls.plane.calls().is_empty(), "{:#?}", tls.plane.calls());
}

#[tokio::test]
async fn unchecked_host_still_needs_authority_and_name() {
    let tls = TlsPlane::start().await;
    // Only the proxy knows this name.
    let proxy = Front::proxy(tls.front.address, None).await;
    let node = |changes: &Value| {
        let node = tls.node(changes).set("NodeRuntime__ControlPlaneUrl", "https://other.test");
        node.set("ALL_PROXY", proxy.address.to_string())
    };
    let unchecked = json!({ "ValidateCertificateChain": false });
    tls.serves(node(&unchecked).leasing().await).await;
    for (key, value, wanted) in [
        ("ServerCaCertificatePath", client_file("client-ca.pem").display().to_string(), "UnknownIssuer"),
        ("ExpectedServerCertificateSubject", "control-plane".to_owned(), "common name"),
    ] {
        let mut changes = unchecked.clone();
        changes[key] = value.into();
        let node = node(&changes).start().await;
        let line = node.says("registration.failed").await;
        assert!(line["error"].as_str().is_some_and(|error| error.contains(wanted)), "{line}");
        node.stop().await;
    }
}

#[tokio::test]
async fn renewed_certificate_needs_no_restart() {
    let tls = TlsPlane::start().await;
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("node-cert.pem");
    fs::copy(client_file("client-expired.pem"), &file).expect("the folder is writable");
    let node = tls.node(&json!({ "ClientCertificatePath": file })).start().await;
    let line = node.says("registration.failed").await;
    let wanted =
        "node-cert.pem: the client certificate has expired at 2021-01-01T00:00:00Z; renew it, it is read again";
    assert!(line["error"].as_str().is_some_and(|error| error.contains(wanted)), "{line}");
    assert!(tls.plane.calls().is_empty(), "{:#?}", tls.plane.calls());
    // A renewal in two steps: for a moment the files do not fit.
    fs::write(&file, "").expect("the folder is writable");
    node.line(|line| line["error"].as_str().is_some_and(|error| error.contains("node-cert.pem: expected cert"))).await;
    fs::copy(client_file("client.pem"), &file).expect("the folder is writable");
    node.says("node.leasing").await;
    tls.serves(node).await;
}

#[tokio::test]
async fn certificate_that_expires_meanwhile_is_named() {
    let tls = TlsPlane::start().await;
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("node-cert.pem");
    fs::copy(client_file("client.pem"), &file).expect("the folder is writable");
    let node = tls.node(&json!({ "ClientCertificatePath": file })).leasing().await;
    tls.plane.stream(&node).await;
    let handshakes = tls.front.seen().len();
    fs::copy(client_file("client-expired.pem"), &file).expect("the folder is writable");
    tls.plane.end_stream(&node, Some(tonic::Status::unavailable("restart"))).await;
    let wanted = format!("{}: the client certificate has expired at 2021-01-01T00:00:00Z", file.display());
    let names_file = |text: &Value| text.as_str().is_some_and(|text| text.contains(&wanted));
    node.line(|line| line["event"] == "stream.ended" && names_file(&line["error"])).await;
    let (_, page) = node.page_until("/ready", |page| page.0 == 503).await;
    assert!(names_file(&page["reason"]), "{page}");
    assert_eq!(tls.front.seen().len(), handshakes, "an expired certificate is not shown");
    fs::copy(client_file("client.pem"), &file).expect("the folder is writable");
    tls.serves(node).await;
}

#[tokio::test]
async fn refused_client_certificate_is_named() {
    // A certificate of a server, from an authority that the control plane does not know.
    let (other, key) = (client_file("server.pem"), client_file("server.key"));
    let wanted =
        format!("it refuses the client certificate {} (UnsupportedCertificate); check its authority", other.display());
    let tls = TlsPlane::start().await;
    let node = tls.node(&json!({ "ClientCertificatePath": other, "ClientKeyPath": key })).start().await;
    let line = node.says("registration.failed").await;
    assert!(line["error"].as_str().is_some_and(|error| error.contains(&wanted)), "{line}");
    assert_eq!(node.said("registration.failed").len(), 1, "one line for one try:\n{}", node.log());
    node.stop().await;
    assert!(tls.plane.calls().is_empty(), "{:#?}", tls.plane.calls());

    // Only gRPC requires a certificate here.
    let rest = Front::tls_with(tls.plane.address(), Clients::Any).await;
    let table = format!(
        "[plane.runs]\nkind = \"node-runtime\"\ncontrol_plane_url = \"https://localhost:{}\"\ngrpc_url = \"{}\"\n\
         node_id = \"n\"\n[plane.runs.tls]\nclient_certificate = {other:?}\nclient_key = {key:?}\nca = \"{}\"\n",
        rest.address.port(),
        tls.url(),
        authority()
    );
    let node = NodeSetup::with_config(&table, &[fixtures::echo()]).leasing().await;
    let line = node.says("stream.ended").await;
    assert!(line["error"].as_str().is_some_and(|error| error.contains(&wanted)), "{line}");
    node.stop().await;
    assert!(!tls.plane.calls().iter().any(|call| matches!(call, Call::Pull(_))), "{:#?}", tls.plane.calls());
}

#[tokio::test]
async fn tls_failures_are_typed_errors() {
    let tls = TlsPlane::start().await;
    let client = client_file("client.pem");
    let good = PeerTls {
        identity: Some(Identity { certificate: client.clone(), key: client_file("client.key") }),
        authorities: Some(authority().into()),
        common_name: Some(NAME.to_owned()),
        any_host: false,
    };
    let other = Identity { certificate: client_file("server.pem"), key: client_file("server.key") };
    let expired = Identity { certificate: client_file("client-expired.pem"), key: client_file("client.key") };
    let failure = async |peer: PeerTls| {
        let client = Client::new(transport::Config { peer: Some(peer), ..transport::Config::default() });
        let request = Request::get(format!("{}/v1/nodes/n", tls.url())).body(transport::full("")).expect("a request");
        match client.call(request, EVENT_LIMIT).await {
            Ok(answer) => panic!("{answer:?}"),
            Err(TransportError::Tls { error, .. }) => error,
            Err(err) => panic!("{err:?}"),
        }
    };
    let authorities = Some(client_file("client-ca.pem"));
    let error = failure(PeerTls { authorities, ..good.clone() }).await;
    assert!(matches!(error, TlsError::Untrusted(_)), "{error:?}");
    let error = failure(PeerTls { common_name: Some("control-plane".to_owned()), ..good.clone() }).await;
    assert!(matches!(error, TlsError::WrongName(_)), "{error:?}");
    let error = failure(PeerTls { identity: Some(other), ..good.clone() }).await;
    assert!(matches!(error, TlsError::ClientRefused { .. }), "{error:?}");
    let error = failure(PeerTls { identity: Some(expired), ..good }).await;
    assert!(matches!(error, TlsError::File(PeerTlsError::Expired { .. })), "{error:?}");
    assert!(tls.plane.calls().is_empty(), "{:#?}", tls.plane.calls());
}

#[tokio::test]
async fn unusable_tls_settings_exit_78() {
    let tls = TlsPlane::start().await;
    let server_key = client_file("server.key");
    let ca = authority();
    for (changes, wanted) in [
        (
            json!({ "ClientCertificatePath": null }),
            "MTls:ClientCertificatePath: is not set; give the PEM file".to_owned(),
        ),
        (json!({ "ClientKeyPath": " " }), "MTls:ClientKeyPath: is not set; give the PEM file".to_owned()),
        (
            json!({ "ClientCertificatePath": "/nowhere.pem" }),
            "tls.client_certificate: /nowhere.pem: No such file".to_owned(),
        ),
        (
            json!({ "ClientKeyPath": server_key }),
            format!(
                "tls.client_key: {}: is not the key of {}",
                server_key.display(),
                client_file("client.pem").display()
            ),
        ),
        (json!({ "ClientKeyPath": ca }), format!("tls.client_key: {ca}: expected a private key in PEM form")),
        (
            json!({ "ServerCaCertificatePath": server_key }),
            format!("tls.ca: {}: expected certificates in PEM form", server_key.display()),
        ),
        (
            json!({ "ValidateCertificateChain": false, "ServerCaCertificatePath": null }),
            "MTls:ServerCaCertificatePath: is not set; a node that does not check the host".to_owned(),
        ),
        (json!({ "Enabled": "perhaps" }), "MTls:Enabled: expected true or false, found \"perhaps\"".to_owned()),
    ] {
        let ended = tls.node(&changes).refused().await.expect(78);
        assert!(ended.stderr.contains(&wanted) && ended.stderr.lines().count() == 1, "{wanted}\n{}", ended.stderr);
    }
    let http =
        tls.node(&json!({})).set("NodeRuntime__ControlPlaneUrl", "http://localhost:1").refused().await.expect(78);
    assert!(http.stderr.contains("control_plane_url: is a plain http URL, which does not use"), "{}", http.stderr);
    assert!(tls.front.seen().is_empty(), "nothing is sent");
    // Disabled settings are not read.
    let setup = tls.node(&json!({ "ClientCertificatePath": "/nowhere.pem" })).set("MTls__Enabled", "False");
    let node = setup.set("CA_BUNDLE", authority()).start().await;
    node.says("registration.failed").await;
    node.stop().await;
    assert!(!tls.front.seen().iter().any(|line| line == WITH_CERTIFICATE), "{:?}", tls.front.seen());
}

#[tokio::test]
async fn other_servers_get_no_client_certificate() {
    let tls = TlsPlane::start().await;
    let test_server = TestServer::start().await;
    let known = FaultProxy::known_as(&test_server, Some(&format!("https://{NAME}"))).await;
    let services = Front::tls_with(known.address(), Clients::MayShow).await;
    let proxy = Front::proxy(services.address, None).await;
    let file = format!(
        "[plane.posemesh]\nkind = \"posemesh\"\n[plane.runs]\nkind = \"node-runtime\"\ncontrol_plane_url = \"{}\"\n\
         node_id = \"n\"\n[plane.runs.tls]\nclient_certificate = {:?}\nclient_key = {:?}\n",
        tls.url(),
        client_file("client.pem"),
        client_file("client.key"),
    );
    let url = |path: &str| format!("https://{NAME}{path}").parse().expect("a URL");
    let setup = NodeSetup::new(&url("/"), &url("/v1"), &[fixtures::echo()]).set("SIGN_IN_DOMAIN", "127.0.0.1");
    let path = setup.plugins().join("node.toml");
    fs::write(&path, file).expect("the folder is writable");
    let setup = setup.set("CA_BUNDLE", authority()).set("ALL_PROXY", proxy.address.to_string());
    let node = setup.set("DOMAIN_HOSTS", NAME).arg("--config").arg(path).leasing().await;
    // Sign-in, task service and domain data of one control plane, and a run of the other one.
    let input = test_server.put("in", &[7; 1000]).await;
    let job = test_server.task("/examples/echo-stream/v1").inputs(&[input]).submit();
    test_server.ended(&node, job).await.completed();
    // The domain server gets none for a run either.
    let server = format!("https://{NAME}");
    let changes = [("domain_server_url", Some(server.as_str()))];
    let run = domain_lease(&test_server, "data", ECHO, &[("in", &input.to_string())], &changes);
    tls.plane.send(&node, run).await;
    let sent = tls.plane.completed(&node, "data").await;
    assert_eq!(test_server.read(result(&sent)["echo-0.bin"]).await, [7; 1000]);
    tls.serves(node).await;
    let seen = services.seen();
    assert!(seen.iter().any(|line| line == "handshake"), "{seen:?}");
    assert!(!seen.iter().any(|line| line == WITH_CERTIFICATE), "{seen:?}");
}
