//! The posemesh task service (DMS) as a [`super::LeaseSource`].

pub mod wire;
