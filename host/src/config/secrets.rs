//! Secrets leave the environment before the first thread and the first plugin.
//!
//! A plugin in this process can read `std::env`, and on Linux `/proc/self/environ`, which keeps
//! showing the memory the process was started with. So a secret is taken out of both: the variable is
//! removed and its bytes are overwritten where they lie.

use std::collections::BTreeMap;

use secrecy::SecretString;

/// Variables that hold secrets.
pub const SECRET_VARIABLES: [&str; 2] = ["REG_SECRET", "SECP256K1_PRIVHEX"];

/// Secrets found in the environment, by variable.
#[derive(Default)]
pub struct Secrets(BTreeMap<&'static str, SecretString>);

impl Secrets {
    /// Takes every secret out of the environment.
    ///
    /// # Safety
    /// No other thread may be running: call it first in `main`.
    #[must_use]
    pub unsafe fn take() -> Self {
        let mut found = BTreeMap::new();
        for name in SECRET_VARIABLES {
            if let Some(value) = std::env::var_os(name) {
                found.insert(name, SecretString::from(value.to_string_lossy().into_owned()));
                // SAFETY: the caller's promise: nobody else reads or writes the environment now.
                unsafe {
                    overwrite(name);
                    std::env::remove_var(name);
                }
            }
        }
        Self(found)
    }

    /// Secrets that do not come from the environment. Unknown names are passed over.
    pub fn from_pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let known = |name: &str| SECRET_VARIABLES.into_iter().find(|known| *known == name);
        let pairs = pairs.into_iter();
        Self(pairs.filter_map(|(name, value)| Some((known(name)?, SecretString::from(value.to_owned())))).collect())
    }

    /// The secret of one variable. Blank is unset.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&SecretString> {
        use secrecy::ExposeSecret as _;
        self.0.get(name).filter(|value| !value.expose_secret().trim().is_empty())
    }
}

/// Overwrites the value of `name` where the process was given it.
///
/// # Safety
/// No other thread may be running.
#[cfg(unix)]
unsafe fn overwrite(name: &str) {
    unsafe extern "C" {
        static environ: *const *mut std::ffi::c_char;
    }
    // SAFETY: `environ` is a null-terminated list of C strings, and nobody else touches it now. Only
    // bytes inside a string are written, its length stays.
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

/// Nothing shows the first environment here.
///
/// # Safety
/// Always safe.
#[cfg(not(unix))]
unsafe fn overwrite(_name: &str) {}
