//! Logs, and the pages a node shows of itself.

mod callback;
pub mod logs;
pub mod pages;
