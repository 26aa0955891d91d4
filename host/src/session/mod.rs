//! One held lease.
