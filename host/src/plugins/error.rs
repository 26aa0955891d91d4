//! The reasons to reject a plugin. Each is one line: what was expected, what was found, what to do.

use std::time::Duration;

use runner_sdk::abi;

/// The reason why a plugin is rejected. The other plugins still load.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
pub enum InstallError {
    /// The file could not be read.
    #[error("cannot be read: {reason}; check that it exists and that this user may read it")]
    Unreadable {
        /// The error of the operating system.
        reason: String,
    },
    /// The process has reached its limit of open files.
    #[error("cannot be read: too many files are open; raise the limit (ulimit -n, LimitNOFILE= of a service)")]
    TooManyFiles,
    /// Everyone may change or replace the file.
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
    /// A folder that has a library's name.
    #[error("is a directory, expected a library file; folders are not searched recursively")]
    Directory,
    /// Not a shared library of this system.
    #[error("expected a shared library, found {found}; build the runner as a cdylib")]
    NotALibrary {
        /// What the file is instead.
        found: String,
    },
    /// The file is too large.
    #[error("is {bytes} bytes large, at most {} are read; is it a library?", super::load::LIBRARY_BYTES_MAX)]
    TooLarge {
        /// Its size.
        bytes: u64,
    },
    /// A truncated library.
    #[error("the library is damaged or cut short ({reason}); copy it again")]
    Truncated {
        /// The error of the reader.
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
    /// Built for the first draft of the ABI.
    #[error(
        "was built for the first draft of the ABI (it exports {}), this host needs {}; rebuild it with this host's \
         runner-sdk or runner.h",
        abi::ENTRY_V1,
        abi::ENTRY
    )]
    FirstDraft,
    /// The entry symbol is missing.
    #[error("exports no symbol {}, expected one; add export_runner!(…) or, in C, define it", abi::ENTRY)]
    NoEntry,
    /// The manifest section is missing.
    #[error(
        "has no section {}, expected a manifest; add export_runner!(…) or, in C, RUNNER_MANIFEST(…)",
        abi::MANIFEST_SECTION
    )]
    NoManifest,
    /// The manifest is invalid.
    #[error("its manifest cannot be used: {reason}; rebuild it with runner-sdk or correct RUNNER_MANIFEST")]
    BadManifest {
        /// What is wrong with it.
        reason: String,
    },
    /// The SHA-256 in `plugins.toml` does not match.
    #[error("sha256 is {found}, plugins.toml pins {expected}; install the pinned file or update the pin")]
    PinMismatch {
        /// The SHA-256 in `plugins.toml`.
        expected: String,
        /// The SHA-256 of the file.
        found: String,
    },
    /// `unlisted = "refuse"` is set and the file has no entry.
    #[error("is not listed in plugins.toml and unlisted = \"refuse\"; add a [[plugin]] entry for it")]
    Unlisted,
    /// `enabled = false`.
    #[error("is switched off by enabled = false in plugins.toml")]
    Disabled,
    /// A listed file that was not found.
    #[error("is listed in plugins.toml but was not found in {searched}; install it or remove the entry")]
    NotFound {
        /// The places that were searched.
        searched: String,
    },
    /// A key that has no effect in this version.
    #[error("{key} is not available in this version; remove it")]
    Unavailable {
        /// The key, with its value where the value matters.
        key: String,
    },
    /// `capabilities = []`.
    #[error("would serve nothing: capabilities = [] in plugins.toml; name some, or write enabled = false")]
    ServesNothing,
    /// Two entries refer to one file.
    #[error("is the same file as {other}; keep one entry, or give each its own name")]
    SameFile {
        /// The entry that is used.
        other: String,
    },
    /// `capabilities` or `capability_limits` names a capability that the library does not have.
    #[error("does not serve {wanted}, which plugins.toml lists for it; it serves {serves}")]
    UnknownCapability {
        /// The named capability.
        wanted: String,
        /// All capabilities of the library.
        serves: String,
    },
    /// No capability is left for it to serve.
    #[error(
        "serves {capability}, which {other} serves already; remove one of the two, or set override = true on the one that should serve it"
    )]
    Duplicate {
        /// The contested capability.
        capability: String,
        /// The other plugin's file.
        other: String,
    },
    /// The dynamic linker rejected the file.
    #[error("cannot be opened: {reason}")]
    Open {
        /// The error of the linker.
        reason: String,
    },
    /// A constructor that does not return.
    #[error(
        "opening it took longer than {limit:?}: a constructor in it hangs; libraries after it cannot be opened \
         (if it is only slow, raise PLUGIN_INIT_TIMEOUT)"
    )]
    OpenHung {
        /// The time limit.
        limit: Duration,
    },
    /// The table does not begin with the expected bytes.
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
    /// It needs a later minor version of the ABI.
    #[error("needs ABI {needed}, this host has {}.{}; update runner-host", abi::ABI_MAJOR, abi::ABI_MINOR)]
    HostTooOld {
        /// `min_abi` in its manifest.
        needed: String,
    },
    /// It requires something that only later hosts have.
    #[error("requires {word:?}, and this host is too old to know it; update runner-host")]
    UnknownRequirement {
        /// The word in its manifest.
        word: String,
    },
    /// The operator has not granted something that it needs.
    #[error("wants {word:?}, which is not granted; add grant = [{word:?}] to its entry in plugins.toml")]
    NotGranted {
        /// The word in its manifest.
        word: &'static str,
    },
    /// A mandatory entry is missing.
    #[error(
        "its table lacks the mandatory entry {entry}; rebuild it with runner-sdk or complete the mask and the table"
    )]
    MissingEntry {
        /// The name of the entry.
        entry: &'static str,
    },
    /// A Rust plugin whose tables have another layout.
    #[error("its tables are not this host's ({line}); rebuild it with this host's runner-sdk")]
    Layout {
        /// The place in the layout, what was expected, what was found.
        line: String,
    },
    /// `create` reported an error.
    #[error("create failed: {reason}")]
    CreateFailed {
        /// The text of the plugin.
        reason: String,
    },
    /// `create` panicked.
    #[error("create panicked: {reason}")]
    CreatePanicked {
        /// The text and the place of the panic.
        reason: String,
    },
    /// `create` gave no answer.
    #[error("create gave no answer within {limit:?}; a plugin's create must answer once, soon")]
    CreateHung {
        /// The time limit.
        limit: Duration,
    },
}

impl InstallError {
    /// Whether the same file may load later. This is so when the machine was short of a resource.
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        matches!(self, Self::TooManyFiles)
    }
}

/// Whether the system's text says that no more files can be opened. The dynamic linker gives only the text.
pub(super) fn is_out_of_files(reason: &str) -> bool {
    reason.contains("Too many open files")
}
