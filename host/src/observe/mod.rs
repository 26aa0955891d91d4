//! Logs, and the pages a node shows of itself.

pub mod logs;
pub mod pages;
