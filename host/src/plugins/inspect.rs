//! Reads the facts about a library from its bytes. No code of the library runs.

use object::{
    Architecture, BinaryFormat, FileKind, Object, ObjectKind, ObjectSection, ObjectSegment, ObjectSymbol, elf,
    read::elf::{FileHeader, SectionHeader},
};
use runner_sdk::abi;
use serde::{Deserialize, Serialize};

use super::{InstallError, config::Settings};
use crate::model::Capability;

/// Maximum length of a name, a version or a word in a manifest, in bytes.
const TEXT_BYTES_MAX: usize = 128;

/// The storage token of a task's lease. The operator grants it.
const TOKEN: &str = "token";
/// The words that this host knows in `requires` and `wants`.
const KNOWN_WORDS: &[&str] = &[TOKEN];

/// Facts about a library file.
#[derive(Clone, Debug, Serialize)]
pub struct Facts {
    /// `elf`, `mach-o` or `pe`.
    pub format: &'static str,
    /// The processor it was built for.
    pub machine: String,
    /// The libraries it needs.
    pub needed: Vec<String>,
    /// The newest glibc symbol version it needs, such as `2.34`.
    pub glibc: Option<String>,
    /// It uses static thread-local storage. A process has little of that.
    pub static_tls: bool,
    /// It exports the layout proof of a Rust plugin.
    pub rust: bool,
    /// Its manifest.
    pub manifest: Manifest,
}

/// The JSON in a library's `.runner` section. Other keys are ignored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// The plugin's name.
    pub name: String,
    /// The plugin's version.
    #[serde(default)]
    pub version: String,
    /// The version of runner-sdk it was built with. Absent in C plugins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sdk: Option<String>,
    /// The ABI it was built for, as `major.minor`.
    pub abi: String,
    /// The lowest ABI version of a host that it needs, as `major.minor`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_abi: Option<String>,
    /// The capabilities it serves.
    pub capabilities: Vec<String>,
    /// What it cannot work without. A host that does not know a word rejects it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub requires: Vec<String>,
    /// What it uses if the host has it. A host ignores words that it does not know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub wants: Vec<String>,
}

impl Manifest {
    /// Rejects a plugin that needs a later host, or something that the operator has not granted.
    pub(super) fn check_needs(&self, settings: &Settings) -> Result<(), InstallError> {
        if let Some(needed) = &self.min_abi {
            let host = (abi::ABI_MAJOR, abi::ABI_MINOR);
            if version(needed).is_none_or(|needed| needed > host) {
                return Err(InstallError::HostTooOld { needed: needed.clone() });
            }
        }
        if let Some(word) = self.requires.iter().find(|word| !KNOWN_WORDS.contains(&word.as_str())) {
            return Err(InstallError::UnknownRequirement { word: word.clone() });
        }
        let uses_token = self.requires.iter().chain(&self.wants).any(|word| word == TOKEN);
        if uses_token && !settings.grant_token {
            return Err(InstallError::NotGranted { word: TOKEN });
        }
        Ok(())
    }
}

/// A version such as `2.1`.
fn version(text: &str) -> Option<(u16, u16)> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Reads the facts. Rejects every file that could not be loaded.
pub(super) fn inspect(bytes: &[u8]) -> Result<Facts, InstallError> {
    if bytes.is_empty() {
        return Err(InstallError::NotALibrary { found: "an empty file".to_owned() });
    }
    match object::FileKind::parse(bytes) {
        Ok(FileKind::Elf32 | FileKind::Elf64 | FileKind::MachO32 | FileKind::MachO64) => {}
        Ok(FileKind::Pe32 | FileKind::Pe64 | FileKind::MachOFat32 | FileKind::MachOFat64) => {}
        other => return Err(InstallError::NotALibrary { found: beginning(bytes, other.ok()) }),
    }
    let file = object::File::parse(bytes).map_err(|err| InstallError::Truncated { reason: err.to_string() })?;
    let format = match file.format() {
        BinaryFormat::Elf => "elf",
        BinaryFormat::MachO => "mach-o",
        BinaryFormat::Pe => "pe",
        other => return Err(InstallError::NotALibrary { found: format!("a file of format {other:?}") }),
    };
    if format != native_format() {
        return Err(InstallError::OtherMachine { expected: native_format().to_owned(), found: format.to_owned() });
    }
    let machine = machine_name(file.architecture());
    if machine != std::env::consts::ARCH {
        return Err(InstallError::OtherMachine { expected: std::env::consts::ARCH.to_owned(), found: machine });
    }
    match file.kind() {
        ObjectKind::Dynamic => {}
        ObjectKind::Executable => return Err(InstallError::NotALibrary { found: "a program".to_owned() }),
        ObjectKind::Relocatable => return Err(InstallError::NotALibrary { found: "an object file".to_owned() }),
        other => return Err(InstallError::NotALibrary { found: format!("a file of kind {other:?}") }),
    }
    // A truncated library still has its header. Everything the header refers to must be inside the file.
    for segment in file.segments() {
        if segment.data().is_err() {
            return Err(InstallError::Truncated { reason: "a segment lies outside the file".to_owned() });
        }
    }
    for section in file.sections() {
        if section.data().is_err() {
            let name = section.name().unwrap_or("?").to_owned();
            return Err(InstallError::Truncated { reason: format!("section {name} lies outside the file") });
        }
    }
    let exports = |name: &str| {
        file.dynamic_symbols().any(|symbol| symbol.is_definition() && symbol.name() == Ok(name))
            || (format != "elf"
                && file.exports().is_ok_and(|mut list| {
                    list.any(|export| {
                        export.is_ok_and(|export| {
                            let found = export.name();
                            let found = found.name().unwrap_or_default();
                            found.strip_prefix(b"_").unwrap_or(found) == name.as_bytes()
                        })
                    })
                }))
    };
    let elf = if format == "elf" { elf_facts(bytes) } else { ElfFacts::default() };
    if elf.program {
        return Err(InstallError::NotALibrary { found: "a program".to_owned() });
    }
    if !exports(abi::ENTRY) {
        return Err(if exports(abi::ENTRY_V1) { InstallError::FirstDraft } else { InstallError::NoEntry });
    }
    let manifest = manifest(&file)?;
    Ok(Facts {
        format,
        machine,
        needed: elf.needed,
        glibc: elf.glibc.map(|(major, minor)| format!("{major}.{minor}")),
        static_tls: elf.static_tls,
        rust: exports(abi::proof::HEADER_SYMBOL),
        manifest,
    })
}

/// Describes a file that is not a library, as far as its first bytes show.
fn beginning(bytes: &[u8], kind: Option<FileKind>) -> String {
    if let Some(kind) = kind {
        return format!("a file of kind {kind:?}").to_lowercase();
    }
    if bytes.starts_with(b"\x7fELF") || b"\x7fELF".starts_with(bytes) {
        return "the beginning of a library".to_owned();
    }
    let text = |byte: &u8| byte.is_ascii_graphic() || byte.is_ascii_whitespace();
    if bytes.iter().take(64).all(text) { "text".to_owned() } else { "something else".to_owned() }
}

fn native_format() -> &'static str {
    if cfg!(windows) {
        "pe"
    } else if cfg!(target_vendor = "apple") {
        "mach-o"
    } else {
        "elf"
    }
}

fn machine_name(architecture: Architecture) -> String {
    match architecture {
        Architecture::X86_64 => "x86_64".to_owned(),
        Architecture::I386 => "x86".to_owned(),
        Architecture::Aarch64 => "aarch64".to_owned(),
        Architecture::Arm => "arm".to_owned(),
        Architecture::Riscv64 => "riscv64".to_owned(),
        other => format!("{other:?}").to_lowercase(),
    }
}

fn manifest(file: &object::File<'_>) -> Result<Manifest, InstallError> {
    let section = file.section_by_name(abi::MANIFEST_SECTION).ok_or(InstallError::NoManifest)?;
    let data = section.data().map_err(|err| InstallError::Truncated { reason: err.to_string() })?;
    let end = data.iter().position(|byte| *byte == 0).unwrap_or(data.len());
    let bad = |reason: String| InstallError::BadManifest { reason };
    let manifest: Manifest = serde_json::from_slice(&data[..end]).map_err(|err| bad(err.to_string()))?;
    if manifest.name.trim().is_empty() {
        return Err(bad("its name is blank".to_owned()));
    }
    let mut texts = vec![("name", &manifest.name), ("version", &manifest.version)];
    texts.extend(manifest.requires.iter().map(|word| ("requires", word)));
    texts.extend(manifest.wants.iter().map(|word| ("wants", word)));
    for (what, text) in texts {
        // They are printed and logged, and the name is used for threads.
        if text.len() > TEXT_BYTES_MAX || text.chars().any(char::is_control) {
            let expected = format!("at most {TEXT_BYTES_MAX} bytes without control characters");
            let start: String = text.chars().take(40).collect();
            return Err(bad(format!("its {what} begins with {start:?}, expected {expected}")));
        }
    }
    if let Some(text) = manifest.min_abi.as_ref().filter(|text| version(text).is_none()) {
        return Err(bad(format!("its min_abi is {text:?}, expected \"major.minor\"")));
    }
    if manifest.capabilities.is_empty() {
        return Err(bad("it names no capability".to_owned()));
    }
    for (index, name) in manifest.capabilities.iter().enumerate() {
        Capability::parse(name).map_err(|err| bad(err.to_string()))?;
        if manifest.capabilities[..index].contains(name) {
            return Err(bad(format!("it names {name} twice")));
        }
    }
    let major = manifest.abi.split('.').next().unwrap_or_default();
    match major.parse::<u16>() {
        Ok(abi::ABI_MAJOR) => Ok(manifest),
        Ok(found) => Err(InstallError::AbiMajor { found }),
        Err(_) => Err(bad(format!("its abi is {:?}, expected \"major.minor\"", manifest.abi))),
    }
}

#[derive(Default)]
struct ElfFacts {
    needed: Vec<String>,
    glibc: Option<(u32, u32)>,
    static_tls: bool,
    /// Only this flag distinguishes a position-independent program from a library.
    program: bool,
}

/// Facts that only ELF files have. They are informative. A fact that cannot be read is omitted.
fn elf_facts(bytes: &[u8]) -> ElfFacts {
    match elf::FileHeader64::<object::Endianness>::parse(bytes) {
        Ok(header) => read_elf(header, bytes).unwrap_or_default(),
        Err(_) => ElfFacts::default(),
    }
}

fn read_elf(header: &elf::FileHeader64<object::Endianness>, bytes: &[u8]) -> object::read::Result<ElfFacts> {
    let endian = header.endian()?;
    let sections = header.sections(endian, bytes)?;
    let mut facts = ElfFacts::default();
    for section in sections.iter() {
        if let Some((entries, strings)) = section.dynamic(endian, bytes)? {
            let strings = sections.strings(endian, bytes, strings)?;
            for entry in entries {
                let (tag, value) = (entry.d_tag.get(endian), entry.d_val.get(endian));
                if tag == elf::DT_NEEDED {
                    let name = strings.get(u32::try_from(value).unwrap_or(u32::MAX)).unwrap_or_default();
                    facts.needed.push(String::from_utf8_lossy(name).into_owned());
                } else if tag == elf::DT_FLAGS {
                    facts.static_tls |= value & elf::DF_STATIC_TLS.0 != 0;
                } else if tag == elf::DT_FLAGS_1 {
                    facts.program |= value & elf::DF_1_PIE.0 != 0;
                }
            }
        }
        if let Some((mut needs, strings)) = section.gnu_verneed(endian, bytes)? {
            let strings = sections.strings(endian, bytes, strings)?;
            while let Some((_, mut versions)) = needs.next()? {
                while let Some(version) = versions.next()? {
                    let name = String::from_utf8_lossy(version.name(endian, strings)?).into_owned();
                    facts.glibc = facts.glibc.max(glibc_version(&name));
                }
            }
        }
    }
    Ok(facts)
}

fn glibc_version(name: &str) -> Option<(u32, u32)> {
    let mut parts = name.strip_prefix("GLIBC_")?.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    // The SDK's rule stops the compilation. When it is called at run time, it panics.
    #[test]
    fn sdk_and_host_accept_the_same_capabilities() {
        let long = format!("/{}", "x".repeat(256));
        let cases: [(&'static str, bool); 14] = [
            ("/examples/hello/v1", true),
            ("/a", true),
            ("/~!@#$%^&*()[]{}<>?;:',.|+=-_`/v1", true),
            ("", false),
            ("/", false),
            ("examples/hello/v1", false),
            ("hello", false),
            ("/a//v1", false),
            ("/a/", false),
            ("/two words", false),
            ("/tab\t", false),
            ("/quote\"", false),
            ("/\u{e4}", false),
            (long.leak(), false),
        ];
        for (name, valid) in cases {
            assert_eq!(Capability::parse(name).is_ok(), valid, "the host's rule for {name:?}");
            let sdk = std::panic::catch_unwind(|| runner_sdk::__private::checked(name));
            assert_eq!(sdk.is_ok(), valid, "the SDK's rule for {name:?}");
        }
    }
}
