//! Sign-in state: nonces, registered wallets, node tokens (posemesh.md section 2).
//!
//! Pure state: the caller checks signatures (`siwe`) and passes the time.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use jiff::Timestamp;
use uuid::Uuid;

use super::{Config, siwe};

/// Maximum number of stored nonces. A failing client requests several per second (posemesh.md section 2.8). The bound
/// keeps a flood of requests from filling the memory.
const NONCES_MAX: usize = 65_536;

/// A node as the control plane sees it.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) id: Uuid,
    pub(super) wallet: Arc<str>,
    pub(super) version: Arc<str>,
    /// Sorted, without duplicates, 1 to 100.
    pub(super) capabilities: Arc<[Arc<str>]>,
    pub(super) seen_at: Timestamp,
}

struct Record {
    node: Node,
    token: Option<(String, Timestamp)>,
    /// The URL of the node, and the time of the next health request.
    url: Option<(Arc<str>, Timestamp)>,
}

/// The content of a registration.
pub(super) struct Entry<'a> {
    pub(super) id: Uuid,
    pub(super) wallet: &'a str,
    pub(super) version: &'a str,
    pub(super) capabilities: Vec<Arc<str>>,
    /// The URL of the node, in the form with a callback.
    pub(super) url: Option<&'a str>,
    /// The connection that carried the registration.
    pub(super) peer: &'a Peer,
}

/// The node of the last login or token on a connection. The wire protocol has no name for an instance of a node. Two
/// instances share no connection.
#[derive(Clone, Default)]
pub(super) struct Peer(Arc<Mutex<Option<Uuid>>>);

impl Peer {
    fn known(&self) -> MutexGuard<'_, Option<Uuid>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is(&self, node: Uuid) {
        *self.known() = Some(node);
    }
}

/// See the module documentation.
pub(super) struct Identity {
    nonces: HashMap<String, (String, Timestamp)>,
    wallets: HashMap<Arc<str>, Record>,
    tokens: HashMap<String, Arc<str>>,
    config: Arc<Config>,
}

/// The reason why a wallet was rejected.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Denied {
    /// Unknown, used, expired, or issued to another wallet.
    Nonce,
    /// The wallet is not registered.
    NotRegistered,
    /// Another live node has this identity (strict mode only).
    Conflict,
}

impl Identity {
    pub(super) fn new(config: Arc<Config>) -> Self {
        Self { nonces: HashMap::new(), wallets: HashMap::new(), tokens: HashMap::new(), config }
    }

    /// Returns a fresh nonce that `wallet` (lower case) can use once.
    pub(super) fn nonce(&mut self, wallet: &str, now: Timestamp) -> String {
        if self.nonces.len() >= NONCES_MAX {
            self.prune(now);
            if self.nonces.len() >= NONCES_MAX {
                self.nonces.clear();
            }
        }
        let nonce = siwe::hex(&rand::random::<[u8; 16]>());
        self.nonces.insert(nonce.clone(), (wallet.to_owned(), now + self.config.nonce_ttl));
        nonce
    }

    /// Consumes a nonce. The nonce is invalid afterwards, also after an error.
    pub(super) fn redeem(&mut self, nonce: &str, wallet: &str, now: Timestamp) -> Result<(), Denied> {
        match self.nonces.remove(nonce) {
            Some((owner, expires)) if owner == wallet && now < expires => Ok(()),
            _ => Err(Denied::Nonce),
        }
    }

    /// The node id of a wallet. A wallet that is not registered gets a fresh id.
    pub(super) fn id_of(&self, wallet: &str) -> Uuid {
        self.wallets.get(wallet).map_or_else(Uuid::new_v4, |record| record.node.id)
    }

    /// The previous URL of this wallet's node, if it differs from `url`.
    pub(super) fn other_url(&self, wallet: &str, url: &str) -> Option<Arc<str>> {
        let (known, _) = self.wallets.get(wallet)?.url.as_ref()?;
        (**known != *url).then(|| known.clone())
    }

    /// Registers a node. A repeat is a refresh: the token of the earlier login stays valid (posemesh.md section 2.8).
    /// `holds_leases` reports whether the node holds leases in the plane.
    pub(super) fn register(
        &mut self,
        entry: Entry<'_>,
        holds_leases: impl FnOnce(Uuid) -> bool,
        now: Timestamp,
    ) -> Result<Node, Denied> {
        let known = self.wallets.get(entry.wallet);
        // With a URL, the caller knows whether there is a second node. Without a URL, strict mode treats a repeat as
        // a second node. A repeat over a connection of the first node is exempt.
        if self.config.strict_identity
            && entry.url.is_none()
            && let Some(record) = known
            && *entry.peer.known() != Some(record.node.id)
        {
            let live = record.token.as_ref().is_some_and(|(_, expires)| now < *expires);
            if live || holds_leases(record.node.id) {
                return Err(Denied::Conflict);
            }
        }
        let node = Node {
            id: known.map_or(entry.id, |record| record.node.id),
            wallet: entry.wallet.into(),
            version: entry.version.into(),
            capabilities: entry.capabilities.into(),
            seen_at: now,
        };
        let token = known.and_then(|record| record.token.clone());
        let url = entry.url.map(|url| (Arc::from(url), now));
        self.wallets.insert(node.wallet.clone(), Record { node: node.clone(), token, url });
        entry.peer.is(node.id);
        Ok(node)
    }

    /// Nodes whose health request is due now. Sets the time of the next request.
    pub(super) fn due(&mut self, now: Timestamp) -> Vec<Arc<str>> {
        let next = now + self.config.health_interval;
        let urls = self.wallets.values_mut().filter_map(|record| record.url.as_mut());
        let due = urls.filter(|(_, at)| *at <= now);
        due.map(|(url, at)| {
            *at = next;
            url.clone()
        })
        .collect()
    }

    /// Logs in a registered wallet. Its earlier token becomes invalid.
    pub(super) fn login(&mut self, wallet: &str, now: Timestamp) -> Result<(String, Timestamp), Denied> {
        let record = self.wallets.get_mut(wallet).ok_or(Denied::NotRegistered)?;
        // The prefix makes a leaked token detectable in a log.
        let token = format!("dev-node-token-{}", siwe::hex(&rand::random::<[u8; 32]>()));
        let expires = now + self.config.node_token_ttl;
        if let Some((old, _)) = record.token.replace((token.clone(), expires)) {
            self.tokens.remove(&old);
        }
        record.node.seen_at = now;
        self.tokens.insert(token.clone(), record.node.wallet.clone());
        Ok((token, expires))
    }

    /// The node that owns a token, if the token is valid.
    pub(super) fn node(&mut self, token: &str, now: Timestamp) -> Option<Node> {
        let record = self.wallets.get_mut(self.tokens.get(token)?)?;
        let (_, expires) = record.token.as_ref()?;
        if now >= *expires {
            return None;
        }
        record.node.seen_at = now;
        Some(record.node.clone())
    }

    /// Revokes a token before it expires.
    pub(super) fn revoke(&mut self, token: &str) {
        let Some(wallet) = self.tokens.remove(token) else { return };
        if let Some(record) = self.wallets.get_mut(&wallet) {
            record.token = None;
        }
    }

    /// Removes expired entries.
    pub(super) fn prune(&mut self, now: Timestamp) {
        self.nonces.retain(|_, (_, expires)| now < *expires);
    }

    /// All registered nodes, each with whether it is logged in.
    pub(super) fn nodes(&self, now: Timestamp) -> Vec<(Node, bool)> {
        let live = |record: &Record| record.token.as_ref().is_some_and(|(_, expires)| now < *expires);
        self.wallets.values().map(|record| (record.node.clone(), live(record))).collect()
    }

    /// Removes a wallet's registration, as an operator of DDS could. Its logins are answered 403 from now on.
    pub(super) fn forget(&mut self, wallet: &str) -> bool {
        let Some(record) = self.wallets.remove(wallet) else { return false };
        if let Some((token, _)) = record.token {
            self.tokens.remove(&token);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const WALLET: &str = "0x1a642f0e3c3af545e7acbd38b07251b3990914f1";

    fn at(second: u64) -> Timestamp {
        Timestamp::UNIX_EPOCH + Duration::from_secs(second)
    }

    fn identity(strict_identity: bool) -> Identity {
        let config = Config {
            nonce_ttl: Duration::from_secs(10),
            node_token_ttl: Duration::from_secs(100),
            strict_identity,
            ..Config::default()
        };
        Identity::new(Arc::new(config))
    }

    fn entry<'a>(id: Uuid, url: Option<&'a str>, peer: &'a Peer) -> Entry<'a> {
        Entry { id, wallet: WALLET, version: "1.0.0", capabilities: vec!["/a".into()], url, peer }
    }

    fn register(identity: &mut Identity, now: u64) -> Result<Uuid, Denied> {
        register_over(identity, now, &Peer::default())
    }

    fn register_over(identity: &mut Identity, now: u64, peer: &Peer) -> Result<Uuid, Denied> {
        identity.register(entry(identity.id_of(WALLET), None, peer), |_| false, at(now)).map(|node| node.id)
    }

    #[test]
    fn nonce_works_once_before_expiry_for_its_wallet() {
        let mut identity = identity(false);
        let nonce = identity.nonce(WALLET, at(0));
        assert_eq!(identity.redeem(&nonce, WALLET, at(9)), Ok(()));
        assert_eq!(identity.redeem(&nonce, WALLET, at(9)), Err(Denied::Nonce));
        let nonce = identity.nonce(WALLET, at(0));
        assert_eq!(identity.redeem(&nonce, WALLET, at(10)), Err(Denied::Nonce));
        let nonce = identity.nonce(WALLET, at(0));
        assert_eq!(identity.redeem(&nonce, "0x0", at(1)), Err(Denied::Nonce));
        assert_eq!(identity.redeem(&nonce, WALLET, at(1)), Err(Denied::Nonce));
    }

    #[test]
    fn token_survives_reregistration_until_expiry_or_next_login() {
        let mut identity = identity(false);
        assert_eq!(identity.login(WALLET, at(0)).map(drop), Err(Denied::NotRegistered));
        let id = register(&mut identity, 0).expect("first");
        let (first, expires) = identity.login(WALLET, at(0)).expect("registered");
        assert_eq!(expires, at(100));
        assert!(identity.node(&first, at(99)).is_some());
        assert!(identity.node(&first, at(100)).is_none());
        let (second, _) = identity.login(WALLET, at(1)).expect("registered");
        assert!(identity.node(&first, at(2)).is_none());
        assert_eq!(register(&mut identity, 3), Ok(id), "a repeat keeps the node's id");
        assert!(identity.node(&second, at(4)).is_some());
        assert!(identity.forget(WALLET));
        assert_eq!(identity.login(WALLET, at(5)).map(drop), Err(Denied::NotRegistered));
    }

    #[test]
    fn strict_identity_refuses_a_second_live_node() {
        let mut identity = identity(true);
        register(&mut identity, 0).expect("first");
        register(&mut identity, 0).expect("no login yet, so no live node");
        let (token, _) = identity.login(WALLET, at(0)).expect("registered");
        assert_eq!(register(&mut identity, 1), Err(Denied::Conflict));
        assert!(identity.node(&token, at(2)).is_some(), "the first node is not disturbed");
        assert!(register(&mut identity, 100).is_ok(), "its token has expired");
        let held = identity.register(entry(Uuid::new_v4(), None, &Peer::default()), |_| true, at(101));
        assert_eq!(held.map(drop), Err(Denied::Conflict));
    }

    #[test]
    fn strict_identity_accepts_repeated_registration_of_same_node() {
        let mut identity = identity(true);
        let (its, another) = (Peer::default(), Peer::default());
        let id = register_over(&mut identity, 0, &its).expect("first");
        let (token, _) = identity.login(WALLET, at(0)).expect("registered");
        assert_eq!(register_over(&mut identity, 1, &its), Ok(id));
        assert_eq!(register_over(&mut identity, 1, &another), Err(Denied::Conflict));
        assert_eq!(
            register_over(&mut identity, 2, &another),
            Err(Denied::Conflict),
            "a repeated request changes nothing"
        );
        another.is(id);
        assert_eq!(register_over(&mut identity, 3, &another), Ok(id), "it used its token on that connection");
        assert!(identity.node(&token, at(4)).is_some());
    }

    #[test]
    fn node_with_url_is_probed_immediately_then_periodically() {
        let mut identity = identity(true);
        let url = "http://127.0.0.1:1";
        for second in [0, 10] {
            let peer = Peer::default();
            let registered = identity.register(entry(identity.id_of(WALLET), Some(url), &peer), |_| true, at(second));
            assert!(registered.is_ok(), "the the caller checks for a second node itself");
            assert_eq!(identity.due(at(second)), [url.into()]);
            assert_eq!(identity.due(at(second + 29)), []);
        }
        assert_eq!(identity.due(at(40)), [url.into()]);
        assert_eq!(identity.other_url(WALLET, url), None);
        assert_eq!(identity.other_url(WALLET, "http://127.0.0.1:2").as_deref(), Some(url));
        assert!(identity.forget(WALLET));
        assert_eq!(identity.due(at(400)), []);
    }
}
