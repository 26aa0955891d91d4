//! Why a plugin is refused: one line each, with what was expected, what was found, what to do.

use std::time::Duration;

use runner_sdk::abi;

/// Why a plugin is refused. The others still load.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
pub enum InstallError {
    /// The file could not be read.
    #[error("cannot be read: {reason}; check that it exists and that this user may read it")]
    Unreadable {
        /// The operating system's words.
        reason: String,
    },
    /// The process has as many files open as it may.
    #[error("cannot be read: too many files are open; raise the limit (ulimit -n, LimitNOFILE= of a service)")]
    TooManyFiles,
    /// Everyone may change the file, or put another in its place.
    #[error(
        "everyone may write to {} (mode {mode:04o}), so anyone may change the plugin; run chmod o-w {}, or pin the \
         plugin by sha256 in plugins.toml",
        path.display(), path.display()
    )]
    Writable {
        /// The file or its folder.
        path: std::path::PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// A folder with a library's name.
    #[error("is a directory, expected a library file; folders are not searched recursively")]
    Directory,
    /// Not a shared library of this system.
    #[error("expected a shared library, found {found}; build the runner as a cdylib")]
    NotALibrary {
        /// What it is instead.
        found: String,
    },
    /// More than fits.
    #[error("is {bytes} bytes large, at most {} are read; is it a library?", super::load::LIBRARY_BYTES_MAX)]
    TooLarge {
        /// Its size.
        bytes: u64,
    },
    /// A library cut short.
    #[error("the library is damaged or cut short ({reason}); copy it again")]
    Truncated {
        /// The reader's words.
        reason: String,
    },
    /// Built for another system or processor.
    #[error("built for {found}, this host runs {expected}; build it for {expected}")]
    OtherMachine {
        /// This host's.
        expected: String,
        /// The library's.
        found: String,
    },
    /// The entry symbol is missing.
    #[error("exports no symbol {}, expected one; add export_runner!(…) or, in C, define it", abi::ENTRY)]
    NoEntry,
    /// The manifest section is missing.
    #[error(
        "has no section {}, expected a manifest; add export_runner!(…) or, in C, RUNNER_MANIFEST(…)",
        abi::MANIFEST_SECTION
    )]
    NoManifest,
    /// The manifest cannot be used.
    #[error("its manifest cannot be used: {reason}; rebuild it with runner-sdk or correct RUNNER_MANIFEST")]
    BadManifest {
        /// What is wrong with it.
        reason: String,
    },
    /// The SHA-256 in `plugins.toml` is another one.
    #[error("sha256 is {found}, plugins.toml pins {expected}; install the pinned file or update the pin")]
    PinMismatch {
        /// The operator's.
        expected: String,
        /// The file's.
        found: String,
    },
    /// `unlisted = "refuse"` and no entry.
    #[error("is not listed in plugins.toml and unlisted = \"refuse\"; add a [[plugin]] entry for it")]
    Unlisted,
    /// `enabled = false`.
    #[error("is switched off by enabled = false in plugins.toml")]
    Disabled,
    /// A listed file that is nowhere.
    #[error("is listed in plugins.toml but was not found in {searched}; install it or remove the entry")]
    NotFound {
        /// Where it was looked for.
        searched: String,
    },
    /// A key whose effect this version does not have.
    #[error("{key} is not available in this version; remove it")]
    Unavailable {
        /// The key, with its value where that matters.
        key: String,
    },
    /// `capabilities = []`.
    #[error("would serve nothing: capabilities = [] in plugins.toml; name some, or write enabled = false")]
    ServesNothing,
    /// Two entries lead to one file.
    #[error("is the same file as {other}; keep one entry")]
    SameFile {
        /// The entry that counts.
        other: String,
    },
    /// `capabilities` names one the library does not have.
    #[error("does not serve {wanted}, which plugins.toml lists for it; it serves {serves}")]
    UnknownCapability {
        /// The listed one.
        wanted: String,
        /// All it has.
        serves: String,
    },
    /// Nothing is left for it to serve.
    #[error(
        "serves {capability}, which {other} serves already; remove one of the two, or set override = true on the one that should serve it"
    )]
    Duplicate {
        /// The contested capability.
        capability: String,
        /// The other plugin's file.
        other: String,
    },
    /// The dynamic linker refused it.
    #[error("cannot be opened: {reason}")]
    Open {
        /// The linker's words.
        reason: String,
    },
    /// A constructor that does not return.
    #[error(
        "opening it took longer than {limit:?}: a constructor in it hangs; libraries after it cannot be opened \
         (if it is only slow, raise PLUGIN_INIT_TIMEOUT)"
    )]
    OpenHung {
        /// How long was waited.
        limit: Duration,
    },
    /// The table does not begin as it should.
    #[error(
        "its table begins with {found:#018x}, expected {:#018x}; rebuild it with this host's runner-sdk or runner.h",
        abi::MAGIC
    )]
    WrongMagic {
        /// The first entry.
        found: u64,
    },
    /// Another major version of the ABI.
    #[error(
        "speaks ABI {found}, this host speaks {}; rebuild it with runner-sdk for ABI {}",
        abi::ABI_MAJOR,
        abi::ABI_MAJOR
    )]
    AbiMajor {
        /// The plugin's.
        found: u16,
    },
    /// A mandatory entry is missing.
    #[error(
        "its table lacks the mandatory entry {entry}; rebuild it with runner-sdk or complete the mask and the table"
    )]
    MissingEntry {
        /// The entry's name.
        entry: &'static str,
    },
    /// A Rust plugin whose tables are laid out differently.
    #[error("its tables are not this host's ({line}); rebuild it with this host's runner-sdk")]
    Layout {
        /// Where, expected, found.
        line: String,
    },
    /// `init` said no.
    #[error("init failed: {reason}")]
    InitFailed {
        /// The plugin's words.
        reason: String,
    },
    /// `init` panicked.
    #[error("init panicked: {reason}")]
    InitPanicked {
        /// Text and place.
        reason: String,
    },
    /// `init` gave no answer.
    #[error("init gave no answer within {limit:?}; a plugin's init must answer once, soon")]
    InitHung {
        /// How long was waited.
        limit: Duration,
    },
}

impl InstallError {
    /// Whether the same file may load later: the machine was short of something.
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        matches!(self, Self::TooManyFiles)
    }
}

/// Whether the system's text says that no more files can be opened. The dynamic linker gives nothing but the text.
pub(super) fn is_out_of_files(reason: &str) -> bool {
    reason.contains("Too many open files")
}
