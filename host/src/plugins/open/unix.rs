//! Linux: a sealed memory file. Other Unix systems: a private copy.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

/// Never unload: whether a library survives `dlclose` depends on its thread-locals and threads.
#[cfg(target_os = "linux")]
const RTLD_NODELETE: i32 = 0x1000;
#[cfg(target_vendor = "apple")]
const RTLD_NODELETE: i32 = 0x80;
#[cfg(not(any(target_os = "linux", target_vendor = "apple")))]
const RTLD_NODELETE: i32 = 0;

/// Checked bytes in a place nobody else can change.
pub(in crate::plugins) struct Sealed {
    path: PathBuf,
    /// Stays open for the life of the process: glibc recognises libraries by path, and a number
    /// used twice would give back the library of its first use.
    keep: Keep,
}

enum Keep {
    #[cfg(target_os = "linux")]
    Memory(OwnedFd),
    Folder(tempfile::TempDir),
}

impl Sealed {
    /// Puts `bytes` where they stay as they are. `name` shows in memory maps and debuggers.
    pub(in crate::plugins) fn new(name: &str, bytes: &[u8]) -> io::Result<Self> {
        #[cfg(target_os = "linux")]
        match Self::in_memory(name, bytes) {
            Ok(sealed) => return Ok(sealed),
            // A sandbox may forbid it; the private copy is the next best thing.
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
        Ok(Self { path, keep: Keep::Memory(fd) })
    }

    fn private_copy(name: &str, bytes: &[u8]) -> io::Result<Self> {
        let folder = tempfile::Builder::new().prefix("runner-host-plugin-").tempdir()?;
        let path = folder.path().join(name);
        let mut file = File::create_new(&path)?;
        file.write_all(bytes)?;
        Ok(Self { path, keep: Keep::Folder(folder) })
    }

    /// Maps the library and runs its constructors.
    pub(in crate::plugins) fn open(self) -> Result<Opened, String> {
        // SAFETY: opening runs the library's constructors: code the operator chose to load, out of
        // the very bytes that were hashed and inspected.
        let library = unsafe { Library::open(Some(&self.path), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE) };
        let library = library.map_err(|err| self.words(&err))?;
        match self.keep {
            #[cfg(target_os = "linux")]
            Keep::Memory(fd) => std::mem::forget(fd),
            // The copy may go once it is mapped.
            Keep::Folder(folder) => drop(folder),
        }
        Ok(Opened { library })
    }

    /// The linker's words, without the name of the memory file.
    fn words(&self, err: &libloading::Error) -> String {
        let text = match std::error::Error::source(err) {
            Some(source) => source.to_string(),
            None => err.to_string(),
        };
        text.replace(&format!("{}: ", self.path.display()), "").replace('\n', " ")
    }
}

/// Ends the process now. No destructor and no exit handler of a library runs: its threads may still
/// be using what those would take away, and one whose constructor hangs holds the lock they wait for.
pub(in crate::plugins) fn leave(code: u8) -> ! {
    unsafe extern "C" {
        fn _exit(code: std::ffi::c_int) -> !;
    }
    // SAFETY: it takes any number and needs nothing.
    unsafe { _exit(code.into()) }
}

/// Has `told` called when anybody calls `exit`.
pub(in crate::plugins) fn on_exit(told: extern "C" fn()) {
    unsafe extern "C" {
        fn atexit(told: extern "C" fn()) -> std::ffi::c_int;
    }
    // SAFETY: `told` is a function of this program, which is there until the process ends. Without room
    // for it an exit goes untold.
    let _ = unsafe { atexit(told) };
}

/// A library that stays mapped.
pub(in crate::plugins) struct Opened {
    library: Library,
}

impl Opened {
    /// The address of `symbol`.
    pub(in crate::plugins) fn address(&self, symbol: &str) -> Option<*const std::ffi::c_void> {
        // SAFETY: the symbol is only looked up; nothing is done with its address here.
        let found = unsafe { self.library.get::<*const std::ffi::c_void>(symbol.as_bytes()) };
        // A symbol may be defined and still be nowhere.
        found.ok().map(|symbol| symbol.into_raw().cast_const()).filter(|address| !address.is_null())
    }

    /// Keeps the library mapped until the process ends.
    pub(in crate::plugins) fn leak(self) {
        std::mem::forget(self.library);
    }
}
