//! Who may sign in: nonces, registered wallets, node tokens (posemesh contract 2).
//!
//! Pure state: signatures are checked by the caller (`siwe`), time is passed in.

use std::{collections::HashMap, sync::Arc};

use jiff::Timestamp;
use uuid::Uuid;

use super::{Config, siwe};

/// Nonces kept at once: a client in trouble asks several times per second (contract 2.8), a flood
/// must not fill the memory.
const NONCES_MAX: usize = 65_536;

/// A node as the plane sees it.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) id: Uuid,
    pub(super) wallet: Arc<str>,
    pub(super) version: Arc<str>,
    /// Sorted, unique, 1 to 100.
    pub(super) capabilities: Arc<[Arc<str>]>,
    pub(super) seen_at: Timestamp,
}

struct Record {
    node: Node,
    token: Option<(String, Timestamp)>,
}

/// See the module's text.
pub(super) struct Identity {
    nonces: HashMap<String, (String, Timestamp)>,
    wallets: HashMap<Arc<str>, Record>,
    tokens: HashMap<String, Arc<str>>,
    config: Arc<Config>,
}

/// Why a wallet was not let in.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Denied {
    /// Unknown, used, expired, or issued for another wallet.
    Nonce,
    /// Nobody registered it.
    NotRegistered,
    /// Another live node has this identity (strict mode only).
    Conflict,
}

impl Identity {
    pub(super) fn new(config: Arc<Config>) -> Self {
        Self { nonces: HashMap::new(), wallets: HashMap::new(), tokens: HashMap::new(), config }
    }

    /// A fresh nonce for one use by `wallet` (lower case).
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

    /// Uses up a nonce. It is gone afterwards, whatever the answer.
    pub(super) fn redeem(&mut self, nonce: &str, wallet: &str, now: Timestamp) -> Result<(), Denied> {
        match self.nonces.remove(nonce) {
            Some((owner, expires)) if owner == wallet && now < expires => Ok(()),
            _ => Err(Denied::Nonce),
        }
    }

    /// Registers a wallet. A repeat is a restart: the token of the earlier login dies.
    /// `holds_leases` answers for the plane.
    pub(super) fn register(
        &mut self,
        wallet: &str,
        version: &str,
        capabilities: Vec<Arc<str>>,
        holds_leases: impl FnOnce(Uuid) -> bool,
        now: Timestamp,
    ) -> Result<Node, Denied> {
        let wallet: Arc<str> = wallet.into();
        let known = self.wallets.remove(&wallet);
        if self.config.strict_identity
            && let Some(record) = &known
        {
            let live = record.token.as_ref().is_some_and(|(_, expires)| now < *expires);
            if live || holds_leases(record.node.id) {
                self.wallets.extend(known.map(|record| (wallet, record)));
                return Err(Denied::Conflict);
            }
        }
        let id = known.as_ref().map_or_else(Uuid::new_v4, |record| record.node.id);
        if let Some((token, _)) = known.and_then(|record| record.token) {
            self.tokens.remove(&token);
        }
        let node = Node {
            id,
            wallet: wallet.clone(),
            version: version.into(),
            capabilities: capabilities.into(),
            seen_at: now,
        };
        self.wallets.insert(wallet, Record { node: node.clone(), token: None });
        Ok(node)
    }

    /// Logs a registered wallet in. Its earlier token dies.
    pub(super) fn login(&mut self, wallet: &str, now: Timestamp) -> Result<(String, Timestamp), Denied> {
        let record = self.wallets.get_mut(wallet).ok_or(Denied::NotRegistered)?;
        let token = siwe::hex(&rand::random::<[u8; 32]>());
        let expires = now + self.config.node_token_ttl;
        if let Some((old, _)) = record.token.replace((token.clone(), expires)) {
            self.tokens.remove(&old);
        }
        record.node.seen_at = now;
        self.tokens.insert(token.clone(), record.node.wallet.clone());
        Ok((token, expires))
    }

    /// The node behind a token, if the token still lives.
    pub(super) fn node(&mut self, token: &str, now: Timestamp) -> Option<Node> {
        let record = self.wallets.get_mut(self.tokens.get(token)?)?;
        let (_, expires) = record.token.as_ref()?;
        if now >= *expires {
            return None;
        }
        record.node.seen_at = now;
        Some(record.node.clone())
    }

    /// Ends a token before its time.
    pub(super) fn revoke(&mut self, token: &str) {
        let Some(wallet) = self.tokens.remove(token) else { return };
        if let Some(record) = self.wallets.get_mut(&wallet) {
            record.token = None;
        }
    }

    /// Forgets what has expired.
    pub(super) fn prune(&mut self, now: Timestamp) {
        self.nonces.retain(|_, (_, expires)| now < *expires);
    }

    /// All registered nodes, with whether they are logged in.
    pub(super) fn nodes(&self, now: Timestamp) -> Vec<(Node, bool)> {
        let live = |record: &Record| record.token.as_ref().is_some_and(|(_, expires)| now < *expires);
        self.wallets.values().map(|record| (record.node.clone(), live(record))).collect()
    }

    /// Makes DDS forget a wallet, as an operator there would: its logins are answered 403 from now on.
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

    fn register(identity: &mut Identity, now: u64) -> Result<Uuid, Denied> {
        identity.register(WALLET, "1.0.0", vec!["/a".into()], |_| false, at(now)).map(|node| node.id)
    }

    #[test]
    fn a_nonce_serves_once_in_time_and_its_wallet_only() {
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
    fn a_token_lives_until_expiry_the_next_login_or_a_restart() {
        let mut identity = identity(false);
        assert_eq!(identity.login(WALLET, at(0)).map(drop), Err(Denied::NotRegistered));
        let id = register(&mut identity, 0).expect("first");
        let (first, expires) = identity.login(WALLET, at(0)).expect("registered");
        assert_eq!(expires, at(100));
        assert!(identity.node(&first, at(99)).is_some());
        assert!(identity.node(&first, at(100)).is_none());
        let (second, _) = identity.login(WALLET, at(1)).expect("registered");
        assert!(identity.node(&first, at(2)).is_none());
        assert_eq!(register(&mut identity, 3), Ok(id), "a restart keeps the node's id");
        assert!(identity.node(&second, at(4)).is_none());
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
        assert!(register(&mut identity, 100).is_ok(), "its token has run out");
        let held = identity.register(WALLET, "1", vec!["/a".into()], |_| true, at(101));
        assert_eq!(held.map(drop), Err(Denied::Conflict));
    }
}
