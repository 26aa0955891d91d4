//! Windows: a private copy that is never unloaded. The code compiles and is not tested.

use std::{io, path::PathBuf};

use libloading::os::windows::Library;

/// Checked bytes in a private folder.
pub(in crate::plugins) struct Sealed {
    path: PathBuf,
    folder: tempfile::TempDir,
}

impl Sealed {
    /// Puts `bytes` into a private folder under `name`.
    pub(in crate::plugins) fn new(name: &str, bytes: &[u8]) -> io::Result<Self> {
        let folder = tempfile::Builder::new().prefix("runner-host-plugin-").tempdir()?;
        let path = folder.path().join(name);
        std::fs::write(&path, bytes)?;
        Ok(Self { path, folder })
    }

    /// Maps the library and runs its `DllMain`.
    pub(in crate::plugins) fn open(self) -> Result<Opened, String> {
        // SAFETY: opening runs the library's initialisers. That is code the operator chose to load. It comes from
        // the exact bytes that were hashed and inspected.
        let library = unsafe { Library::new(&self.path) }.map_err(|err| err.to_string())?;
        // A mapped file cannot be removed. The folder stays until the system cleans it.
        let _ = self.folder.keep();
        Ok(Opened { library })
    }
}

/// Ends the process.
pub(in crate::plugins) fn exit_process(code: u8) -> ! {
    std::process::exit(code.into())
}

/// Not supported on this system. Exits are not reported.
pub(in crate::plugins) fn on_exit(_handler: extern "C" fn()) {}

/// A library that stays mapped.
pub(in crate::plugins) struct Opened {
    library: Library,
}

impl Opened {
    /// The address of `symbol`.
    pub(in crate::plugins) fn address(&self, symbol: &str) -> Option<*const std::ffi::c_void> {
        // SAFETY: the symbol is only looked up. Its address is not used here.
        let found = unsafe { self.library.get::<*const std::ffi::c_void>(symbol.as_bytes()) };
        found.ok().and_then(|symbol| symbol.into_raw().map(|address| address as *const _))
    }

    /// Keeps the library mapped until the process ends.
    pub(in crate::plugins) fn leak(self) {
        std::mem::forget(self.library);
    }
}
