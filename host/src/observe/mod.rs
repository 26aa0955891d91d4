//! Logs, and the pages a node shows of itself.

mod callback;
mod json;
pub mod logs;
pub mod pages;
