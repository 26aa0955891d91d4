//! The layout check of Rust plugins. A Rust plugin exports the plain entry and abi_stable's description of the
//! tables. Thus a host can check the layout before it calls anything.
//!
//! Only this module uses abi_stable's loader. Its check has one direction: a host with an appended optional entry
//! would reject every older plugin. Therefore the check runs in both directions, and one success is enough.

use std::{cmp::Reverse, fmt::Display};

use abi_stable::{
    StableAbi,
    abi_stability::abi_checking::{AbiInstability, AbiInstabilityErrors, check_layout_compatibility},
    library::{AbiHeader, AbiHeaderRef, LibHeader, RootModuleResult},
    type_layout::{TLFieldOrFunction, TypeLayout},
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

/// How a Rust plugin's tables differ from the host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayoutMismatch {
    /// One line: where, expected, found.
    pub line: String,
    /// The checker's whole text of hundreds of lines, for a debug log.
    pub full: String,
}

/// Checks that the tables behind an exported header have the host's layout.
///
/// # Errors
/// When neither side is a prefix of the other.
///
/// # Safety
/// `header` must be the address of the symbol [`HEADER_SYMBOL`] in a library that stays loaded for
/// the rest of the process.
pub unsafe fn prove_layout(header: *const std::ffi::c_void) -> Result<(), LayoutMismatch> {
    // SAFETY: `AbiHeaderRef` is a transparent, non-null pointer to an `AbiHeader`. That is the first field of the
    // data at the symbol. `upgrade` checks the magic before it reads anything after it.
    let header = unsafe { std::mem::transmute::<*const AbiHeader, AbiHeaderRef>(header.cast()) };
    let header = header.upgrade().map_err(|err| LayoutMismatch {
        line: "its abi_stable header is of another version; rebuild it with this host's runner-sdk".to_owned(),
        full: err.to_string(),
    })?;
    match header.layout() {
        Some(plugin) => compare(ModuleRef::LAYOUT, plugin),
        None => Err(LayoutMismatch {
            line: "its header carries no layout, expected one made by export_runner!".to_owned(),
            full: String::new(),
        }),
    }
}

fn compare(host: &'static TypeLayout, plugin: &'static TypeLayout) -> Result<(), LayoutMismatch> {
    let Err(forth) = same_but_for_versions(host, plugin) else { return Ok(()) };
    if same_but_for_versions(plugin, host).is_ok() {
        return Ok(());
    }
    Err(LayoutMismatch { line: one_line(&forth), full: forth.to_string() })
}

/// abi_stable's check without crate versions. Each type has the version of the crate that declares it. abi_stable
/// rejects 0.1 against 0.2 even if the layout is equal. Here only the ABI version decides.
fn same_but_for_versions(host: &'static TypeLayout, plugin: &'static TypeLayout) -> Result<(), AbiInstabilityErrors> {
    let Err(mut found) = check_layout_compatibility(host, plugin) else { return Ok(()) };
    for error in &mut found.errors {
        error.errs.retain(|err| !matches!(err, AbiInstability::PackageVersion(_)));
    }
    if found.errors.iter().all(|error| error.errs.is_empty()) { Ok(()) } else { Err(found) }
}

/// The innermost mismatch on one line: `start: parameter 2: expected Str, found u64`.
fn one_line(errors: &AbiInstabilityErrors) -> String {
    let failed = errors.errors.iter().filter(|err| !err.errs.is_empty());
    // The first of the deepest mismatches: it causes the outer ones.
    let deepest = failed.min_by_key(|err| (Reverse(err.stack_trace.len()), err.index));
    let Some(error) = deepest else { return "the tables differ".to_owned() };
    let mut line = String::new();
    let mut inside: Option<&TLFieldOrFunction> = None;
    for step in &error.stack_trace {
        let name = name_of(&step.expected);
        match inside {
            // A function follows the entry that holds it, under the same name.
            Some(outer) if name_of(outer) == name => {}
            Some(TLFieldOrFunction::Function(_)) if name == RETURNS => line.push_str("result: "),
            Some(TLFieldOrFunction::Function(_)) => line.push_str(&format!("parameter {}: ", ordinal(name))),
            _ if WRAPPERS.contains(&name) => continue,
            _ => line.push_str(&format!("{name}: ")),
        }
        inside = Some(&step.expected);
    }
    let parameters = error.stack_trace.last().and_then(|step| match (&step.expected, &step.found) {
        (TLFieldOrFunction::Function(host), TLFieldOrFunction::Function(plugin)) => {
            Some((host.param_type_layouts.len(), plugin.param_type_layouts.len()))
        }
        _ => None,
    });
    match parameters {
        Some((host, plugin)) if host != plugin => {
            line.push_str(&format!("number of parameters: expected {host}, found {plugin}"));
        }
        _ => line.push_str(&error.errs.first().map_or_else(|| "differs".to_owned(), describe)),
    }
    line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// abi_stable's name for the return value of a function, which it handles as one more parameter.
const RETURNS: &str = "__returns";
/// abi_stable keeps no names of parameters. It numbers them from 0 as `param_0`.
fn ordinal(name: &str) -> String {
    let index = name.strip_prefix("param_").and_then(|digits| digits.parse::<usize>().ok());
    index.map_or_else(|| name.to_owned(), |index| (index + 1).to_string())
}

/// Fields of the pointer types around a table. Authors do not know them.
const WRAPPERS: [&str; 3] = ["0", "ptr", "ref_"];

fn name_of(step: &TLFieldOrFunction) -> &'static str {
    match step {
        TLFieldOrFunction::Field(field) => field.name(),
        TLFieldOrFunction::Function(function) => function.name.as_str(),
    }
}

fn describe(error: &AbiInstability) -> String {
    fn pair(what: &str, expected: impl Display, found: impl Display) -> String {
        format!("{what}expected {expected}, found {found}")
    }
    match error {
        AbiInstability::Name(v) => pair("", v.expected, v.found),
        AbiInstability::Size(v) => pair("size in bytes: ", v.expected, v.found),
        AbiInstability::Alignment(v) => pair("alignment: ", v.expected, v.found),
        AbiInstability::FieldCountMismatch(v) => pair("number of entries: ", v.expected, v.found),
        AbiInstability::UnexpectedField(v) => pair("entry: ", v.expected.name(), v.found.name()),
        AbiInstability::MismatchedPrefixSize(v) => pair("number of mandatory entries: ", v.expected, v.found),
        AbiInstability::Package(v) => pair("crate: ", v.expected, v.found),
        other => format!("{other:?}").chars().take(160).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::c_void;

    use super::*;
    use crate::abi::{Status, Str, Task};

    /// The smallest possible table, in the variant that the test needs.
    macro_rules! table {
        ($module:ident { $($(#[$attr:meta])* $name:ident: $kind:ty,)* }) => {
            mod $module {
                #![allow(dead_code, unreachable_pub, reason = "only the layout is used")]

                use super::*;

                #[repr(C)]
                #[derive(StableAbi)]
                #[sabi(kind(Prefix(prefix_ref = TableRef, prefix_fields = TablePrefix)))]
                #[sabi(missing_field(panic))]
                pub(super) struct Table {
                    $($(#[$attr])* pub(super) $name: $kind,)*
                }
            }
        };
    }

    table!(released {
        magic: u64,
        start: unsafe extern "C" fn(task: Task, request: Str),
        #[sabi(last_prefix_field)]
        cancel: unsafe extern "C" fn(task: Task) -> Status,
    });
    table!(grown {
        magic: u64,
        start: unsafe extern "C" fn(task: Task, request: Str),
        #[sabi(last_prefix_field)]
        cancel: unsafe extern "C" fn(task: Task) -> Status,
        warm_up: unsafe extern "C" fn(user: *mut c_void),
    });
    table!(retyped {
        magic: u64,
        start: unsafe extern "C" fn(task: Task, request: u64),
        #[sabi(last_prefix_field)]
        cancel: unsafe extern "C" fn(task: Task) -> Status,
    });
    table!(field_retyped {
        magic: u32,
        start: unsafe extern "C" fn(task: Task, request: Str),
        #[sabi(last_prefix_field)]
        cancel: unsafe extern "C" fn(task: Task) -> Status,
    });
    table!(result_retyped {
        magic: u64,
        start: unsafe extern "C" fn(task: Task, request: Str),
        #[sabi(last_prefix_field)]
        cancel: unsafe extern "C" fn(task: Task) -> u64,
    });
    table!(reordered {
        magic: u64,
        cancel: unsafe extern "C" fn(task: Task) -> Status,
        #[sabi(last_prefix_field)]
        start: unsafe extern "C" fn(task: Task, request: Str),
    });
    table!(parameter_added {
        magic: u64,
        start: unsafe extern "C" fn(task: Task, request: Str, user: *mut c_void),
        #[sabi(last_prefix_field)]
        cancel: unsafe extern "C" fn(task: Task) -> Status,
    });
    table!(parameter_removed {
        magic: u64,
        start: unsafe extern "C" fn(task: Task),
        #[sabi(last_prefix_field)]
        cancel: unsafe extern "C" fn(task: Task) -> Status,
    });

    fn check(plugin: &'static TypeLayout, line: &str) {
        let host = released::TableRef::LAYOUT;
        for refused in [compare(host, plugin), compare(plugin, host)] {
            assert!(refused.is_err(), "{line}: accepted");
        }
        let mismatch = compare(host, plugin).expect_err("refused above");
        assert_eq!(mismatch.line, line);
        assert!(mismatch.full.lines().count() > 1, "the full text is kept for a debug log");
    }

    #[test]
    fn appended_entry_is_accepted_in_both_directions() {
        assert_eq!(compare(released::TableRef::LAYOUT, released::TableRef::LAYOUT), Ok(()));
        assert_eq!(compare(released::TableRef::LAYOUT, grown::TableRef::LAYOUT), Ok(()));
        assert_eq!(compare(grown::TableRef::LAYOUT, released::TableRef::LAYOUT), Ok(()));
    }

    #[test]
    fn refused_table_names_the_changed_place() {
        check(retyped::TableRef::LAYOUT, "start: parameter 2: expected Str, found u64");
        check(field_retyped::TableRef::LAYOUT, "magic: expected u64, found u32");
        check(result_retyped::TableRef::LAYOUT, "cancel: result: expected Status, found u64");
        check(reordered::TableRef::LAYOUT, "entry: expected start, found cancel");
        check(parameter_added::TableRef::LAYOUT, "start: number of parameters: expected 2, found 3");
        check(parameter_removed::TableRef::LAYOUT, "start: number of parameters: expected 2, found 1");
    }

    #[test]
    fn macro_exports_the_header_the_host_expects() {
        let line = format!("#[unsafe(export_name = \"{HEADER_SYMBOL}\")]");
        assert!(include_str!("../shim/export.rs").contains(&line), "export_runner! does not export {HEADER_SYMBOL}");
    }
}
