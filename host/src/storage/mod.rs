//! Inputs in, outputs out.
//!
//! A task's data moves through [`crate::model::Ports`]. [`DomainPorts`] implements it against the
//! domain server of a lease, [`LocalPorts`] against plain files for `runner-host invoke`, and
//! [`Scratch`] gives each task the directory it works in. Both directions stream: nothing in here
//! holds a whole object. This room decides neither when a task runs nor what is reported about it;
//! it lists what was published. Start at [`domain`].

pub mod domain;
mod file;
mod local;
mod naming;
mod task_dir;

pub use domain::{Config, DomainPorts};
pub use local::LocalPorts;
pub use task_dir::{Scratch, ScratchError, TaskDir};
