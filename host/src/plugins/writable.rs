//! Checks whether other users may change or replace a library.

use std::{fs::Metadata, path::Path};

use super::InstallError;

/// Checks the file of the library and the folders that contain it.
///
/// # Errors
/// When everyone may write to one of them, unless `allowed`.
#[cfg(unix)]
pub(super) fn check(file: &Path, about: &Metadata, allowed: bool) -> Result<(), InstallError> {
    use std::os::unix::fs::MetadataExt as _;
    let mut places = vec![(file.to_owned(), about.mode())];
    let real = file.canonicalize().ok();
    for name in [Some(file), real.as_deref()].into_iter().flatten() {
        let folder = name.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // A file that has no metadata here is reported as missing later.
        let (Ok(folder_about), Ok(own)) = (folder.metadata(), name.symlink_metadata()) else { continue };
        let is_ours = [0, rustix::process::geteuid().as_raw()].contains(&own.uid());
        let is_sticky = folder_about.mode() & 0o1000 != 0;
        // In a sticky folder only the owner of a file can replace it.
        if !(is_sticky && is_ours) {
            places.push((folder.to_owned(), folder_about.mode()));
        }
    }
    let writable_by = |bit: u32| places.iter().find(|(_, mode)| mode & bit != 0);
    if let Some((path, mode)) = writable_by(0o002) {
        if !allowed {
            return Err(InstallError::Writable { path: path.clone(), mode: mode & 0o7777 });
        }
        let (path, mode) = (path.display(), format!("{:04o}", mode & 0o7777));
        tracing::warn!(
            event = "plugin.writable", file = %file.display(), path = %path, mode,
            "everyone may change this plugin, ALLOW_WRITABLE_PLUGINS lets it load"
        );
    } else if let Some((path, mode)) = writable_by(0o020) {
        let (path, mode) = (path.display(), format!("{:04o}", mode & 0o7777));
        tracing::warn!(
            event = "plugin.writable", file = %file.display(), path = %path, mode,
            "a group may change this plugin"
        );
    }
    Ok(())
}

/// The host does not check permissions on other systems.
///
/// # Errors
/// None.
#[cfg(not(unix))]
pub(super) fn check(_: &Path, _: &Metadata, _: bool) -> Result<(), InstallError> {
    Ok(())
}
