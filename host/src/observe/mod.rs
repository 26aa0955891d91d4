//! Logs, and the pages a node shows of itself.

mod callback;
mod json;
pub mod logs;
pub mod pages;
mod text;

use std::net::SocketAddr;

use crate::model::ReadyWhen;

/// The pages of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusPage {
    /// The pages are not served.
    Disabled,
    /// The pages are served at this address.
    Enabled {
        /// Port 0 selects a free port.
        listen: SocketAddr,
    },
}

/// The settings of the pages and of secrets in memory.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the node serves its own pages.
    pub status_page: StatusPage,
    /// The host of `NODE_URL`, even if the node does not register with it.
    pub node_host: Option<String>,
    /// Keep the system's settings for core dumps and debuggers. Both can show the node's secrets.
    pub allow_core_dumps: bool,
    /// When a node with several control planes is ready.
    pub ready_when: ReadyWhen,
}

impl Default for Config {
    fn default() -> Self {
        let listen = SocketAddr::from(([127, 0, 0, 1], 8080));
        Self {
            status_page: StatusPage::Enabled { listen },
            node_host: None,
            allow_core_dumps: false,
            ready_when: ReadyWhen::Any,
        }
    }
}
