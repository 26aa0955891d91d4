//! Which form of registration is used, and whether this node can be reached under `NODE_URL`.
//!
//! The check needs no traffic. The node serves plain http, so with an `http` URL it must answer itself:
//! `HTTP_BIND` must be reachable from the host of the URL.
//! With an `https` URL a proxy ends TLS and forwards to `HTTP_BIND`. Only the callback of the service can check that.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use url::{Host, Url};

use super::parser::{Parser, Remark};
use crate::auth::Form;

/// Reads `REGISTRATION` and `NODE_URL`. Mistakes are noted, and the wallet form replaces them.
pub(super) fn registration(parser: &mut Parser<'_>, bind: SocketAddr, dds: &Url) -> Form {
    let wanted = parser.value("REGISTRATION", "wallet or callback", None, |text| match text {
        "wallet" => Some(Some(false)),
        "callback" => Some(Some(true)),
        _ => None,
    });
    let text = parser.optional("NODE_URL");
    match (wanted, text) {
        (Some(false), Some(_)) => {
            let _ = parser.url("NODE_URL"); // not used, but a mistake in it is reported
            Form::Wallet
        }
        (Some(false) | None, None) => Form::Wallet,
        (Some(true), None) => {
            let needed = "NODE_URL is not set: REGISTRATION=callback needs the URL of this node";
            parser.mistakes.push(Remark::plain(needed));
            Form::Wallet
        }
        (None | Some(true), Some(text)) => {
            let Some(url) = parser.url("NODE_URL") else { return Form::Wallet };
            match servable(&url, bind, dds) {
                // As configured: the service checks the signature over these very bytes.
                Ok(()) => Form::Callback { url: text.to_owned() },
                Err(why) => {
                    let place = parser.place("NODE_URL");
                    parser.mistakes.push(Remark::at("NODE_URL", format!("{place} {text}"), why));
                    Form::Wallet
                }
            }
        }
    }
}

/// The host of `NODE_URL`.
pub(super) fn host(url: &str) -> Option<String> {
    Some(Url::parse(url).ok()?.host_str()?.to_owned())
}

/// Whether the service may reach this node under `url`. The error is one clause with a remedy.
fn servable(url: &Url, bind: SocketAddr, dds: &Url) -> Result<(), String> {
    if url.query().is_some() || url.fragment().is_some() {
        return Err("expected a base URL without query or fragment".to_owned());
    }
    let address = address(url);
    if url.port() == Some(0) || address.is_some_and(|ip| ip.is_unspecified() || ip.is_multicast()) {
        return Err("no node can be reached there; use the host and port that others connect to".to_owned());
    }
    if bind.port() == 0 {
        return Err(format!("HTTP_BIND {bind} uses any free port; set the port of this URL"));
    }
    let loopback = address.is_some_and(|ip| ip.is_loopback());
    if loopback && !self::address(dds).is_some_and(|ip| ip.is_loopback()) {
        return Err(
            "a sign-in service on another machine cannot reach loopback; name this machine's address".to_owned()
        );
    }
    if url.scheme() == "https" {
        return Ok(());
    }
    let served = bind.ip().is_unspecified() || bind.ip().is_loopback() == loopback;
    if !served {
        let reached = if loopback { "loopback" } else { "other machines" };
        return Err(format!(
            "HTTP_BIND {bind} is not reached from {reached}; set HTTP_BIND=0.0.0.0:{}, or give the https URL of a proxy \
             in front of this node",
            bind.port()
        ));
    }
    if loopback && url.port_or_known_default() != Some(bind.port()) {
        return Err(format!("HTTP_BIND {bind} listens on another port; make them the same"));
    }
    Ok(())
}

/// The address of a host, if it is certain.
fn address(url: &Url) -> Option<IpAddr> {
    match url.host()? {
        Host::Domain(name) => {
            (name == "localhost" || name.ends_with(".localhost")).then_some(Ipv4Addr::LOCALHOST.into())
        }
        Host::Ipv4(ip) => Some(ip.into()),
        Host::Ipv6(ip) => Some(ip.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(url: &str, bind: &str, dds: &str, expected: &str) {
        let (parsed, dds) = (Url::parse(url).expect("a URL"), Url::parse(dds).expect("a URL"));
        let problem = servable(&parsed, bind.parse().expect("an address"), &dds).err();
        let problem = problem.unwrap_or_else(|| "fine".to_owned());
        assert!(problem.contains(expected), "{url} at {bind}: {problem}");
    }

    #[test]
    fn unservable_node_url_fails_and_proxied_url_passes() {
        let remote = "https://dds.example";
        check("http://node.example:8080", "0.0.0.0:8080", remote, "fine");
        check("http://node.example", "0.0.0.0:8080", remote, "fine"); // a mapped port
        check("http://203.0.113.9:8080", "10.0.0.5:8080", remote, "fine"); // a mapped address
        check("http://node.example:8080", "[::]:8080", remote, "fine");
        check("https://node.example/some/where", "127.0.0.1:8080", remote, "fine"); // a proxy on this machine
        check(
            "http://node.example:8080",
            "127.0.0.1:8080",
            remote,
            "is not reached from other machines; set HTTP_BIND=0",
        );
        check("http://192.0.2.7:8080", "[::1]:8080", remote, "is not reached from other machines");
        check("https://node.example", "127.0.0.1:0", remote, "uses any free port");
        check("http://0.0.0.0:8080", "0.0.0.0:8080", remote, "no node can be reached there");
        check("http://[::]:8080", "0.0.0.0:8080", remote, "no node can be reached there");
        check("http://239.1.2.3:8080", "0.0.0.0:8080", remote, "no node can be reached there");
        check("http://node.example:0", "0.0.0.0:8080", remote, "no node can be reached there");
        check("https://node.example/?x=1", "0.0.0.0:8080", remote, "without query or fragment");
        check("https://node.example/#x", "0.0.0.0:8080", remote, "without query or fragment");
        check("https://localhost", "127.0.0.1:8080", remote, "another machine cannot reach loopback");
    }

    #[test]
    fn loopback_http_url_must_match_bind_address() {
        let local = "http://127.0.0.1:8700";
        check("http://127.0.0.1:8080", "127.0.0.1:8080", local, "fine");
        check("http://localhost:8080/", "0.0.0.0:8080", local, "fine");
        check("http://127.0.0.1:8081", "127.0.0.1:8080", local, "listens on another port");
        check("http://127.0.0.1", "127.0.0.1:8080", local, "listens on another port");
        check("http://127.0.0.1:8080", "192.0.2.7:8080", local, "is not reached from loopback");
        check("https://127.0.0.1:8443", "127.0.0.1:8080", local, "fine");
    }
}
