//! Proves to the control plane who this node is.
