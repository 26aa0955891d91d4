//! The Rust door: abi_stable's description of the tables, exported by Rust plugins beside the plain
//! entry, so that a host can prove their layout before it calls anything.
//!
//! Nothing else in the project touches abi_stable's loader. Its check is one-directional: a host
//! whose table grew by an optional entry would refuse every older plugin. So it runs in both
//! directions, and passing one is enough.

use abi_stable::{
    StableAbi,
    abi_stability::abi_checking::{AbiInstability, AbiInstabilityErrors, check_layout_compatibility},
    library::{AbiHeader, AbiHeaderRef, LibHeader, RootModuleResult},
    type_layout::TypeLayout,
};

use super::ModuleRef;

/// Symbol under which a Rust plugin exports its header.
pub const HEADER_SYMBOL: &str = abi_stable::library::ROOT_MODULE_LOADER_NAME;

/// The header a Rust plugin exports.
#[doc(hidden)]
#[must_use]
pub const fn header(constructor: extern "C" fn() -> RootModuleResult) -> LibHeader {
    // SAFETY: `export_runner!` passes a constructor whose module is a `ModuleRef`, by
    // `__call_root_module_loader` over a function that returns one.
    unsafe { LibHeader::from_constructor::<ModuleRef>(constructor, abi_stable::library::CheckTypeLayout::Yes) }
}

/// Why a Rust plugin's tables are not ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayoutMismatch {
    /// One line: where, expected, found.
    pub line: String,
    /// The checker's whole text, hundreds of lines; for a debug log.
    pub full: String,
}

/// Proves that the tables behind an exported header are laid out as ours.
///
/// # Errors
/// When neither side is a prefix of the other.
///
/// # Safety
/// `header` must be the address of the symbol [`HEADER_SYMBOL`] in a library that stays loaded for
/// the rest of the process.
pub unsafe fn prove_layout(header: *const std::ffi::c_void) -> Result<(), LayoutMismatch> {
    // SAFETY: `AbiHeaderRef` is a transparent, non-null pointer to an `AbiHeader`, the first field
    // of what the symbol names; `upgrade` looks at the magic before anything behind it.
    let header = unsafe { std::mem::transmute::<*const AbiHeader, AbiHeaderRef>(header.cast()) };
    let header = header.upgrade().map_err(|err| LayoutMismatch {
        line: "its abi_stable header is of another version; rebuild it with this host's runner-sdk".to_owned(),
        full: err.to_string(),
    })?;
    match header.layout() {
        Some(theirs) => compare(ModuleRef::LAYOUT, theirs),
        None => Err(LayoutMismatch {
            line: "its header carries no layout, expected one made by export_runner!".to_owned(),
            full: String::new(),
        }),
    }
}

fn compare(ours: &'static TypeLayout, theirs: &'static TypeLayout) -> Result<(), LayoutMismatch> {
    let Err(forth) = check_layout_compatibility(ours, theirs) else { return Ok(()) };
    if check_layout_compatibility(theirs, ours).is_ok() {
        return Ok(());
    }
    Err(LayoutMismatch { line: one_line(&forth), full: forth.to_string() })
}

/// The innermost mismatch as `Module > start: expected …, found …`.
fn one_line(errors: &AbiInstabilityErrors) -> String {
    let deepest = errors.errors.iter().filter(|err| !err.errs.is_empty()).max_by_key(|err| err.stack_trace.len());
    let Some(error) = deepest else { return "the tables differ".to_owned() };
    let place: Vec<String> = error.stack_trace.iter().map(|step| name_of(&step.expected)).collect();
    let what = error.errs.first().map_or_else(|| "differs".to_owned(), describe);
    if place.is_empty() { what } else { format!("{}: {what}", place.join(" > ")) }
}

fn name_of(step: &abi_stable::type_layout::TLFieldOrFunction) -> String {
    use abi_stable::type_layout::TLFieldOrFunction as Step;
    match step {
        Step::Field(field) => field.name().to_owned(),
        Step::Function(function) => function.name.to_string(),
    }
}

fn describe(error: &AbiInstability) -> String {
    fn pair(what: &str, expected: impl std::fmt::Display, found: impl std::fmt::Display) -> String {
        format!("{what}expected {expected}, found {found}")
    }
    match error {
        AbiInstability::Name(v) => pair("", v.expected, v.found),
        AbiInstability::Size(v) => pair("size in bytes: ", v.expected, v.found),
        AbiInstability::Alignment(v) => pair("alignment: ", v.expected, v.found),
        AbiInstability::FieldCountMismatch(v) => pair("number of fields: ", v.expected, v.found),
        AbiInstability::UnexpectedField(v) => pair("field: ", v.expected.name(), v.found.name()),
        AbiInstability::MismatchedPrefixSize(v) => pair("number of mandatory entries: ", v.expected, v.found),
        AbiInstability::Package(v) => pair("package: ", v.expected, v.found),
        AbiInstability::PackageVersion(v) => pair("runner-sdk: ", v.expected, v.found),
        other => {
            let text = format!("{other:?}");
            text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(160).collect()
        }
    }
}
