//! Removes secrets from the environment before the first thread and the first plugin start.
//!
//! A plugin in this process can read `std::env`. On Linux it can also read `/proc/self/environ`, which shows the
//! memory of the process start. So a secret is removed from both: the variable is removed, and its bytes are
//! overwritten in place.

use std::{collections::BTreeMap, path::Path};

use secrecy::{ExposeSecret as _, SecretString};

use super::{
    file,
    keys::{KEYS, Key},
    layers::{Layers, Origin},
};

/// Largest secret read from a file, in bytes.
const BYTES_MAX: u64 = 16 * 1024;

/// Secrets from the environment or from a command, by variable.
pub struct Secrets {
    values: BTreeMap<&'static str, SecretString>,
    /// The given secrets that are not UTF-8.
    not_utf8: Vec<&'static str>,
    origin: Origin,
}

impl Secrets {
    /// Removes every secret from the environment.
    ///
    /// # Safety
    /// No other thread may be running: call it first in `main`.
    #[must_use]
    pub unsafe fn take() -> Self {
        let (mut found, mut not_utf8) = (BTreeMap::new(), Vec::new());
        for name in KEYS.iter().filter(|key| key.is_secret()).map(|key| key.name) {
            if let Some(value) = std::env::var_os(name) {
                match value.into_string() {
                    Ok(value) => drop(found.insert(name, SecretString::from(value))),
                    Err(_) => not_utf8.push(name),
                }
                // SAFETY: the caller guarantees that no other thread reads or writes the environment now.
                unsafe {
                    overwrite(name);
                    std::env::remove_var(name);
                }
            }
        }
        Self { values: found, not_utf8, origin: Origin::Environment }
    }

    /// Secrets that are not from the environment. Unknown names are ignored.
    pub fn from_pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let known = |name: &str| Key::find(name).filter(|key| key.is_secret()).map(|key| key.name);
        let pairs = pairs.into_iter();
        let values = pairs.filter_map(|(name, value)| Some((known(name)?, SecretString::from(value.to_owned()))));
        Self { values: values.collect(), not_utf8: Vec::new(), origin: Origin::Command }
    }

    /// The secret itself, if it was given directly. Blank is unset.
    fn direct(&self, key: &Key) -> Option<(&SecretString, Origin)> {
        let value = self.values.get(key.name).filter(|value| !value.expose_secret().trim().is_empty());
        value.map(|value| (value, self.origin))
    }

    /// The effective secret and its origin: given directly, or in a named file. The higher layer has priority. `None`:
    /// there is none.
    ///
    /// # Errors
    /// One line without the secret: both were given in one layer, it is not text, or the file cannot be used.
    pub fn find(&self, key: &Key, layers: &Layers) -> Result<Option<(SecretString, String)>, String> {
        if self.not_utf8.contains(&key.name) {
            return Err(format!("{}: expected UTF-8, found other bytes", key.name));
        }
        let direct = self.direct(key).or_else(|| layers.secret(key));
        let named = key.file_variant().and_then(|variant| {
            let (path, origin) = layers.get(variant);
            path.map(|path| (variant, path, origin))
        });
        match (direct, named) {
            (Some((_, direct)), Some((variant, _, named))) if direct == named || is_file(direct) && is_file(named) => {
                let (one, other) = (layers.place(key, direct), layers.place(variant, named));
                Err(format!("{one} and {other} are both set; keep one"))
            }
            (direct, Some((variant, path, named))) if direct.is_none_or(|(_, direct)| direct < named) => {
                let value =
                    read(Path::new(path)).map_err(|problem| format!("{}: {problem}", layers.place(variant, named)))?;
                Ok(Some((value, path.to_owned())))
            }
            (Some((value, origin)), _) => {
                Ok(Some((SecretString::from(value.expose_secret().trim().to_owned()), layers.describe(origin))))
            }
            (None, _) => Ok(None),
        }
    }
}

fn is_file(origin: Origin) -> bool {
    matches!(origin, Origin::File { .. })
}

/// The one line of a secret's file.
fn read(path: &Path) -> Result<SecretString, String> {
    let text = file::read_text(path, BYTES_MAX)?;
    let line = text.trim();
    if line.is_empty() {
        return Err(format!("{}: expected a secret, found nothing", path.display()));
    }
    if line.contains(['\n', '\r']) {
        return Err(format!("{}: expected one line, found {}", path.display(), line.lines().count()));
    }
    Ok(SecretString::from(line.to_owned()))
}

/// Overwrites the value of `name` in the initial environment of the process.
///
/// # Safety
/// No other thread may be running.
#[cfg(unix)]
unsafe fn overwrite(name: &str) {
    unsafe extern "C" {
        static environ: *const *mut std::ffi::c_char;
    }
    // SAFETY: `environ` is a null-terminated list of C strings, and no other thread uses it now. Only bytes inside a
    // string are written. Its length does not change.
    unsafe {
        let mut entry = environ;
        while !entry.is_null() && !(*entry).is_null() {
            let text = std::ffi::CStr::from_ptr(*entry).to_bytes();
            let is_it = text.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.starts_with(b"="));
            if is_it {
                let (start, len) = (name.len() + 1, text.len());
                for at in start..len {
                    (*entry).add(at).write_volatile(b'x' as std::ffi::c_char);
                }
            }
            entry = entry.add(1);
        }
    }
}

/// This system does not show the initial environment.
///
/// # Safety
/// Always safe.
#[cfg(not(unix))]
unsafe fn overwrite(_name: &str) {}
