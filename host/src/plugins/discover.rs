//! Finds the plugin files: the libraries in the folders, and the entries of `plugins.toml`.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map},
    path::{Path, PathBuf},
};

use super::{
    InstallError,
    config::{PluginsFile, Settings},
};

/// A file that should be loaded, or the reason why it is not.
pub(super) struct Found {
    /// The file. For a listed name that was not found, the name itself.
    pub(super) file: PathBuf,
    /// The operator's settings for the file.
    pub(super) settings: Settings,
    /// The reason, when the file was rejected without being read.
    pub(super) refused: Option<InstallError>,
}

/// The paths that are searched for libraries.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// Folders, searched for libraries, not recursively.
    pub folders: Vec<PathBuf>,
    /// Single libraries.
    pub files: Vec<PathBuf>,
}

/// Why a path cannot be used. The cause is a mistake in the command or the configuration.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// Neither a folder nor a file.
    #[error("plugins folder {} does not exist; create it, or name another with --plugins", .0.display())]
    Missing(PathBuf),
    /// The folder exists but cannot be listed.
    #[error("plugins folder {} cannot be read: {reason}", folder.display())]
    Unreadable {
        /// The folder.
        folder: PathBuf,
        /// The error of the operating system.
        #[source]
        reason: std::io::Error,
    },
}

impl PlaceError {
    /// Whether the path may be usable later, which is so when too many files are open.
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        matches!(self, Self::Unreadable { reason, .. } if super::error::is_out_of_files(&reason.to_string()))
    }
}

impl Places {
    /// Sorts what `--plugins` named into folders and files.
    pub fn from_arguments(arguments: &[PathBuf]) -> Result<Self, PlaceError> {
        let mut places = Self::default();
        for path in arguments {
            if path.is_dir() {
                std::fs::read_dir(path).map_err(unreadable(path))?;
                places.folders.push(path.clone());
            } else if path.exists() {
                places.files.push(path.clone());
            } else {
                return Err(PlaceError::Missing(path.clone()));
            }
        }
        Ok(places)
    }
}

fn unreadable(folder: &Path) -> impl Fn(std::io::Error) -> PlaceError + use<'_> {
    |err| PlaceError::Unreadable { folder: folder.to_owned(), reason: err }
}

/// Lists every candidate. Listed files come first, in the file's order. The others follow by name.
pub(super) fn discover(places: &Places, file: &PluginsFile) -> Result<Vec<Found>, PlaceError> {
    // One file may have several entries, each with its own name.
    let mut known: BTreeMap<(PathBuf, Option<String>), String> = BTreeMap::new();
    let mut listed = BTreeSet::new();
    let mut all = Vec::new();
    for path in &places.files {
        all.push(path.clone());
    }
    for folder in &places.folders {
        all.extend(libraries(folder)?);
    }
    let mut found = Vec::new();
    for entry in &file.entries {
        let path = locate(&entry.file, places, &file.folder);
        let refused = match &path {
            _ if !entry.settings.enabled => Some(InstallError::Disabled),
            None => Some(InstallError::NotFound { searched: searched(places, &file.folder) }),
            Some(_) => None,
        };
        let mut refused = refused;
        let path = path.unwrap_or_else(|| PathBuf::from(&entry.file));
        let identity = identity(&path);
        listed.insert(identity.clone());
        match known.entry((identity, entry.settings.name.clone())) {
            btree_map::Entry::Vacant(vacant) => drop(vacant.insert(entry.file.clone())),
            btree_map::Entry::Occupied(first) => {
                refused = Some(InstallError::SameFile { other: first.get().clone() });
            }
        }
        found.push(Found { file: path, settings: entry.settings.clone(), refused });
    }
    for path in all {
        if listed.insert(identity(&path)) {
            let refused = file.refuse_unlisted.then_some(InstallError::Unlisted);
            let refused = if file.defaults.enabled { refused } else { Some(InstallError::Disabled) };
            found.push(Found { file: path, settings: file.defaults.clone(), refused });
        }
    }
    for found in &mut found {
        if found.refused.is_none()
            && let Some(key) = found.settings.unavailable.first()
        {
            found.refused = Some(InstallError::Unavailable { key: key.clone() });
        }
    }
    Ok(found)
}

/// One file with two paths is one file.
fn identity(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

fn libraries(folder: &Path) -> Result<Vec<PathBuf>, PlaceError> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable(folder))? {
        let path = entry.map_err(unreadable(folder))?.path();
        if path.extension().is_some_and(|extension| extension == std::env::consts::DLL_EXTENSION) {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// Finds the library for a `name`. A path is relative to the plugins file. A bare name is looked up in the folders,
/// with and without the platform's prefix and suffix.
fn locate(name: &str, places: &Places, file_folder: &Path) -> Option<PathBuf> {
    let path = Path::new(name);
    if path.components().count() > 1 {
        let path = file_folder.join(path);
        return path.exists().then_some(path);
    }
    let decorated = decorated(name);
    let direct = places
        .files
        .iter()
        .find(|file| file.file_name().is_some_and(|found| found == name || found.to_str() == Some(decorated.as_str())));
    if let Some(file) = direct {
        return Some(file.clone());
    }
    places.folders.iter().flat_map(|folder| [folder.join(&decorated), folder.join(name)]).find(|path| path.is_file())
}

/// Returns the file name of a library on this platform: `hello` becomes `libhello.so`.
fn decorated(name: &str) -> String {
    format!("{}{}{}", std::env::consts::DLL_PREFIX, name.replace('-', "_"), std::env::consts::DLL_SUFFIX)
}

fn searched(places: &Places, file_folder: &Path) -> String {
    let mut folders: Vec<String> = places.folders.iter().map(|folder| folder.display().to_string()).collect();
    if folders.is_empty() {
        folders.push(file_folder.display().to_string());
    }
    folders.join(", ")
}
