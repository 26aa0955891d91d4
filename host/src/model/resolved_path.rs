//! A path with its links resolved.

use std::path::{Component, Path, PathBuf};

/// `path` as an absolute path, with links resolved. A part that does not exist stays as it is.
#[must_use]
pub fn resolved_path(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut rest = Vec::new();
    for ancestor in path.ancestors() {
        if let Ok(mut real) = ancestor.canonicalize() {
            for part in rest.into_iter().rev() {
                match part {
                    Component::ParentDir => drop(real.pop()),
                    part => real.push(part),
                }
            }
            return real;
        }
        rest.extend(ancestor.components().next_back());
    }
    path
}
