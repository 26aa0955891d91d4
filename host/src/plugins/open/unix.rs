//! Linux: a sealed memory file. Other Unix systems: a private copy.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

/// Never unload a library. Whether it survives `dlclose` depends on its thread-locals and threads.
#[cfg(target_os = "linux")]
const RTLD_NODELETE: i32 = 0x1000;
#[cfg(target_vendor = "apple")]
const RTLD_NODELETE: i32 = 0x80;
#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
const RTLD_NODELETE: i32 = 0;

/// Checked bytes in a place that nobody else can change.
pub(in crate::plugins) struct Sealed {
    path: PathBuf,
    /// Stays open until the process ends. glibc recognises libraries by path. If a descriptor number were used twice,
    /// glibc would return the library of the first use.
    storage: Storage,
}

enum Storage {
    #[cfg(target_os = "linux")]
    Memory(OwnedFd),
    Folder(tempfile::TempDir),
}

impl Sealed {
    /// Stores `bytes` where nobody can change them. `name` shows in memory maps and debuggers.
    pub(in crate::plugins) fn new(name: &str, bytes: &[u8]) -> io::Result<Self> {
        #[cfg(target_os = "linux")]
        match Self::in_memory(name, bytes) {
            Ok(sealed) => return Ok(sealed),
            // A sandbox may forbid it. The private copy is the fallback.
            Err(err) => tracing::debug!(error = %err, "no sealed memory file, using a private copy"),
        }
        Self::private_copy(name, bytes)
    }

    #[cfg(target_os = "linux")]
    fn in_memory(name: &str, bytes: &[u8]) -> io::Result<Self> {
        use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
        let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        let mut file = File::from(fd);
        file.write_all(bytes)?;
        let fd = OwnedFd::from(file);
        fcntl_add_seals(&fd, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        Ok(Self { path, storage: Storage::Memory(fd) })
    }

    fn private_copy(name: &str, bytes: &[u8]) -> io::Result<Self> {
        let folder = tempfile::Builder::new().prefix("runner-host-plugin-").tempdir()?;
        let path = folder.path().join(name);
        let mut file = File::create_new(&path)?;
        file.write_all(bytes)?;
        Ok(Self { path, storage: Storage::Folder(folder) })
    }

    /// Maps the library and runs its constructors.
    pub(in crate::plugins) fn open(self) -> Result<Opened, String> {
        // SAFETY: opening runs the library's constructors. That is code the operator chose to load. It comes from
        // the exact bytes that were hashed and inspected.
        let library = unsafe { Library::open(Some(&self.path), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE) };
        let library = library.map_err(|err| self.words(&err))?;
        match self.storage {
            #[cfg(target_os = "linux")]
            Storage::Memory(fd) => std::mem::forget(fd),
            // The copy can be removed after it is mapped.
            Storage::Folder(folder) => drop(folder),
        }
        Ok(Opened { library })
    }

    /// The error text of the linker, without the name of the memory file.
    fn words(&self, err: &libloading::Error) -> String {
        let text = match std::error::Error::source(err) {
            Some(source) => source.to_string(),
            None => err.to_string(),
        };
        text.replace(&format!("{}: ", self.path.display()), "").replace('\n', " ")
    }
}

/// Ends the process now. No destructor and no exit handler of a library runs. The library's threads may still use
/// what those would free. A thread whose constructor hangs holds the lock they wait for.
pub(in crate::plugins) fn exit_process(code: u8) -> ! {
    unsafe extern "C" {
        fn _exit(code: std::ffi::c_int) -> !;
    }
    // SAFETY: the call accepts any number and has no preconditions.
    unsafe { _exit(code.into()) }
}

/// Registers `handler` to be called when any code calls `exit`.
pub(in crate::plugins) fn on_exit(handler: extern "C" fn()) {
    unsafe extern "C" {
        fn atexit(handler: extern "C" fn()) -> std::ffi::c_int;
    }
    // SAFETY: `handler` is a function of this program and exists until the process ends. If the registration fails for
    // lack of memory, an exit is not reported.
    let _ = unsafe { atexit(handler) };
}

/// A library that stays mapped.
pub(in crate::plugins) struct Opened {
    library: Library,
}

impl Opened {
    /// The address of `symbol`.
    pub(in crate::plugins) fn address(&self, symbol: &str) -> Option<*const std::ffi::c_void> {
        // SAFETY: the symbol is only looked up. Its address is not used here.
        let found = unsafe { self.library.get::<*const std::ffi::c_void>(symbol.as_bytes()) };
        // A symbol may be defined and still have no address.
        found.ok().map(|symbol| symbol.into_raw().cast_const()).filter(|address| !address.is_null())
    }

    /// Keeps the library mapped until the process ends.
    pub(in crate::plugins) fn leak(self) {
        std::mem::forget(self.library);
    }
}
