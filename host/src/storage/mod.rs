//! Inputs in, outputs out.
