//! The layout check of Rust plugins. A Rust plugin exports the plain entry and abi_stable's description of the
//! tables. Thus a host can check the layout before it calls anything.
//!
//! abi_stable describes types. This module compares the descriptions itself. abi_stable's own check has a direction: a
//! host with an appended optional entry would reject every older plugin. It also remembers, for the whole process, the
//! longest table it has accepted. It then compares that table with every later one, even in entries that the host does
//! not have. One accepted plugin could make the next one fail.
//!
//! This comparison has neither. It judges the entries that both sides have. The mask decides which of them exist.

use std::{
    collections::HashSet,
    ffi::c_void,
    fmt::{Debug, Display},
    panic::{AssertUnwindSafe, catch_unwind},
};

use abi_stable::{
    StableAbi,
    library::{AbiHeader, LibHeader, RootModuleResult},
    type_layout::{ReprAttr, TLData, TLField, TLFields, TLFunction, TLPrimitive, TypeLayout},
};

use super::ModuleRef;

/// Symbol under which a Rust plugin exports its header.
pub const HEADER_SYMBOL: &str = abi_stable::library::ROOT_MODULE_LOADER_NAME;

/// Types inside each other. The tables have less than ten. The limit protects the stack.
const DEPTH_MAX: usize = 64;

/// The header a Rust plugin exports.
#[doc(hidden)]
#[must_use]
pub const fn header(constructor: extern "C" fn() -> RootModuleResult) -> LibHeader {
    // SAFETY: `export_runner!` passes a constructor whose module is a `ModuleRef`, by
    // `__call_root_module_loader` over a function that returns one.
    unsafe { LibHeader::from_constructor::<ModuleRef>(constructor, abi_stable::library::CheckTypeLayout::Yes) }
}

/// What a header proves about a plugin's tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proof {
    /// The tables have the host's layout in all entries that both sides have.
    Layout,
    /// The header is of another version of abi_stable. As for a C plugin, only the mask and the rules of `runner.h`
    /// hold.
    None {
        /// The version found and the version expected.
        reason: String,
    },
}

/// How a Rust plugin's tables differ from the host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayoutMismatch {
    /// One line: where, expected, found.
    pub line: String,
    /// Both descriptions, hundreds of lines for a debug log.
    pub full: String,
}

/// The beginning of a [`LibHeader`], with plain values in place of references. A damaged header may hold any bytes.
#[repr(C)]
struct HeaderStart {
    abi: AbiHeader,
    /// Three texts: library, module, version.
    _texts: [*const c_void; 6],
    /// The discriminant of abi_stable's `IsLayoutChecked`.
    layout_state: u8,
    layout: *const TypeLayout,
}

/// `IsLayoutChecked::Yes`.
const WITH_LAYOUT: u8 = 0;
/// `IsLayoutChecked::No`.
const WITHOUT_LAYOUT: u8 = 1;

const _: () = assert!(size_of::<HeaderStart>() <= size_of::<LibHeader>());

/// Checks that the tables behind an exported header have the host's layout.
///
/// # Errors
/// When an entry that both sides have differs, or when the header is damaged.
///
/// # Safety
/// `header` must be the address of the symbol [`HEADER_SYMBOL`] in a library that stays loaded for
/// the rest of the process.
pub unsafe fn prove_layout(header: *const c_void) -> Result<Proof, LayoutMismatch> {
    // SAFETY: every version of abi_stable begins its header with an `AbiHeader`, which may have any bits.
    let abi = unsafe { header.cast::<AbiHeader>().read_unaligned() };
    if !abi.is_valid() {
        return Ok(Proof::None { reason: other_version(&abi) });
    }
    let damaged =
        |what: &str| LayoutMismatch { line: format!("its header is damaged: {what}"), full: format!("{abi:?}") };
    if !header.cast::<LibHeader>().is_aligned() {
        return Err(damaged("it is not aligned"));
    }
    // SAFETY: the header is of this version and is aligned. All its fields may have any bits, but for padding.
    let start = unsafe { &*header.cast::<HeaderStart>() };
    match start.layout_state {
        WITH_LAYOUT if !start.layout.is_null() && start.layout.is_aligned() => {}
        WITH_LAYOUT => return Err(damaged("it does not point to a layout")),
        WITHOUT_LAYOUT => return Err(damaged("it carries no layout, expected one made by export_runner!")),
        found => return Err(damaged(&format!("expected 0 or 1 for its layout, found {found}"))),
    }
    // SAFETY: a header of this version points to a layout that is never changed or freed.
    let plugin = unsafe { &*start.layout };
    // Ranges in a damaged description lead to a panic of abi_stable.
    let compared = catch_unwind(AssertUnwindSafe(|| compare(ModuleRef::LAYOUT, plugin)));
    compared.unwrap_or_else(|_| Err(damaged("its description of the tables cannot be read"))).map(|()| Proof::Layout)
}

fn other_version(found: &AbiHeader) -> String {
    let expected = AbiHeader::VALUE;
    if found.magic_string != expected.magic_string {
        return "its header is not one of abi_stable".to_owned();
    }
    format!(
        "its header is of abi_stable {}.{}, expected {}.{}",
        found.abi_major, found.abi_minor, expected.abi_major, expected.abi_minor
    )
}

fn compare(host: &'static TypeLayout, plugin: &'static TypeLayout) -> Result<(), LayoutMismatch> {
    Comparison::default().types(host, plugin, Held::ByValue).map_err(|line| LayoutMismatch {
        line: line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect(),
        full: format!("{line}\nthis host:\n{host}\nthe plugin:\n{plugin}"),
    })
}

/// How a type is reached. Only behind a pointer may a struct have more fields than the other side knows.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Held {
    ByValue,
    ByPointer,
}

/// A walk through two descriptions. An error is one line.
#[derive(Default)]
struct Comparison {
    /// The pairs that were compared, or are being compared. A description may have cycles.
    seen: HashSet<(*const TypeLayout, *const TypeLayout, Held)>,
    depth: usize,
}

impl Comparison {
    fn types(&mut self, host: &'static TypeLayout, plugin: &'static TypeLayout, held: Held) -> Result<(), String> {
        if !self.seen.insert((host, plugin, held)) {
            return Ok(());
        }
        if self.depth == DEPTH_MAX {
            return Err(format!("more than {DEPTH_MAX} types are inside each other"));
        }
        self.depth += 1;
        let compared = self.inside(host, plugin, held);
        self.depth -= 1;
        compared
    }

    fn inside(&mut self, host: &'static TypeLayout, plugin: &'static TypeLayout, held: Held) -> Result<(), String> {
        if host.name() != plugin.name() {
            return Err(expected_found(host.full_type(), plugin.full_type()));
        }
        same("kind: ", host.data_discriminant(), plugin.data_discriminant())?;
        same("representation: ", host.repr_attr(), plugin.repr_attr())?;
        let (data, plugin_data) = (host.data(), plugin.data());
        let growable = match &data {
            TLData::Struct { fields } => held == Held::ByPointer && is_growable(host, fields),
            // Its entries decide.
            TLData::PrefixType(_) => true,
            _ => false,
        };
        if !growable {
            same("size in bytes: ", host.size(), plugin.size())?;
            same("alignment: ", host.alignment(), plugin.alignment())?;
        }
        same("may be null: ", !host.is_nonzero(), !plugin.is_nonzero())?;
        match (data, plugin_data) {
            (TLData::Struct { fields: host }, TLData::Struct { fields: plugin })
            | (TLData::Union { fields: host }, TLData::Union { fields: plugin }) => {
                if !growable {
                    same("number of fields: ", host.len(), plugin.len())?;
                }
                self.common_fields("field", &host, &plugin)?;
            }
            (TLData::PrefixType(host), TLData::PrefixType(plugin)) => {
                self.common_fields("entry", &host.fields, &plugin.fields)?;
            }
            (TLData::Enum(host), TLData::Enum(plugin)) => {
                same("variants: ", host.variant_names, plugin.variant_names)?;
                same("fields of the variants: ", host.field_count, plugin.field_count)?;
                same("discriminants: ", host.discriminants, plugin.discriminants)?;
                self.common_fields("field", &host.fields, &plugin.fields)?;
            }
            (TLData::Primitive(host), TLData::Primitive(plugin)) => same("", host, plugin)?,
            // The kinds are equal. Of an opaque type only size and alignment are known.
            _ => {}
        }
        // What a pointer points to. abi_stable also describes the type behind a table's reference like this.
        let held = if is_pointer(host) { Held::ByPointer } else { Held::ByValue };
        let pairs = host.phantom_fields().iter().zip(plugin.phantom_fields());
        pairs.into_iter().try_for_each(|(host, plugin)| self.types(host.layout(), plugin.layout(), held))
    }

    /// Compares the fields that both sides have.
    fn common_fields(&mut self, what: &str, host: &TLFields, plugin: &TLFields) -> Result<(), String> {
        for (host, plugin) in host.iter().zip(plugin.iter()) {
            if host.name() != plugin.name() {
                return Err(format!("{what}: {}", expected_found(host.name(), plugin.name())));
            }
            self.field(&host, &plugin).map_err(|line| inside(host.name(), &line))?;
        }
        Ok(())
    }

    fn field(&mut self, host: &TLField, plugin: &TLField) -> Result<(), String> {
        let (functions, plugin_functions) = (host.function_range(), plugin.function_range());
        self.types(host.layout(), plugin.layout(), Held::ByValue)?;
        same("number of functions: ", functions.len(), plugin_functions.len())?;
        functions.iter().zip(plugin_functions.iter()).try_for_each(|(host, plugin)| self.function(&host, &plugin))
    }

    fn function(&mut self, host: &TLFunction, plugin: &TLFunction) -> Result<(), String> {
        let (parameters, plugin_parameters) = (host.param_type_layouts, plugin.param_type_layouts);
        same("number of parameters: ", parameters.len(), plugin_parameters.len())?;
        for (index, (host, plugin)) in parameters.iter().zip(plugin_parameters.iter()).enumerate() {
            let compared = self.types(host(), plugin(), Held::ByValue);
            compared.map_err(|line| format!("parameter {}: {line}", index + 1))?;
        }
        let result = |function: &TLFunction| function.return_type_layout().map_or(<()>::LAYOUT, |layout| layout());
        let compared = self.types(result(host), result(plugin), Held::ByValue);
        compared.map_err(|line| format!("result: {line}"))
    }
}

/// A struct that may get more fields at its end. By the rules of `runner.h` its first field is its size.
fn is_growable(layout: &TypeLayout, fields: &TLFields) -> bool {
    layout.repr_attr() == ReprAttr::C && fields.get(0).is_some_and(|first| first.name() == "size")
}

fn is_pointer(layout: &TypeLayout) -> bool {
    use TLPrimitive::{ConstPtr, MutPtr, MutRef, SharedRef};
    matches!(layout.data(), TLData::Primitive(SharedRef | MutRef | ConstPtr | MutPtr))
}

fn same<T: PartialEq + Debug>(what: &str, expected: T, found: T) -> Result<(), String> {
    if expected == found { Ok(()) } else { Err(format!("{what}expected {expected:?}, found {found:?}")) }
}

fn expected_found(expected: impl Display, found: impl Display) -> String {
    format!("expected {expected}, found {found}")
}

/// Puts the name of a field before a line. Authors do not know the fields of a newtype or of a pointer type.
fn inside(field: &str, line: &str) -> String {
    if WRAPPERS.contains(&field) { line.to_owned() } else { format!("{field}: {line}") }
}

/// Fields of the types around a table, and of newtypes.
const WRAPPERS: [&str; 3] = ["0", "ptr", "ref_"];

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

    // Entries that the host does not have, of different types at the same position.
    table!(other_signature {
        magic: u64,
        start: unsafe extern "C" fn(task: Task, request: Str),
        #[sabi(last_prefix_field)]
        cancel: unsafe extern "C" fn(task: Task) -> Status,
        warm_up: unsafe extern "C" fn(task: Task, text: Str) -> Status,
    });
    table!(other_name {
        magic: u64,
        start: unsafe extern "C" fn(task: Task, request: Str),
        #[sabi(last_prefix_field)]
        cancel: unsafe extern "C" fn(task: Task) -> Status,
        drain: unsafe extern "C" fn(user: *mut c_void),
        report: unsafe extern "C" fn(user: *mut c_void),
    });
    table!(no_function {
        magic: u64,
        start: unsafe extern "C" fn(task: Task, request: Str),
        cancel: unsafe extern "C" fn(task: Task) -> Status,
        #[sabi(last_prefix_field)]
        warm_up: u64,
    });

    /// A table whose `start` takes a struct behind a pointer and another one by value.
    macro_rules! table_with_structs {
        ($module:ident { $($name:ident: $kind:ty,)* } $by_value:ty) => {
            mod $module {
                #![allow(dead_code, unreachable_pub, reason = "only the layout is used")]

                use super::*;

                #[repr(C)]
                #[derive(StableAbi)]
                pub(super) struct Request {
                    $($name: $kind,)*
                }

                table!(table {
                    #[sabi(last_prefix_field)]
                    start: unsafe extern "C" fn(request: *const Request, value: $by_value),
                });

                pub(super) const LAYOUT: &TypeLayout = table::TableRef::LAYOUT;
            }
        };
    }

    table_with_structs!(request { size: usize, capability: Str, } u64);
    table_with_structs!(longer_request { size: usize, capability: Str, dir: Str, } u64);
    table_with_structs!(retyped_request { size: usize, capability: u64, dir: Str, } u64);
    table_with_structs!(fixed { capability: Str, } u64);
    table_with_structs!(longer_fixed { capability: Str, dir: Str, } u64);
    table_with_structs!(by_value { size: usize, capability: Str, } Request);
    table_with_structs!(longer_by_value { size: usize, capability: Str, dir: Str, } Request);
    table_with_structs!(list { size: usize, next: *const Request, } u64);
    table_with_structs!(longer_list { size: usize, next: *const Request, last: *const Request, } u64);

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

    /// Every order of `items`.
    fn orders<T: Copy>(items: &[T]) -> Vec<Vec<T>> {
        if items.is_empty() {
            return vec![Vec::new()];
        }
        let beginning_with = |index: usize| {
            let mut others = items.to_vec();
            let first = others.remove(index);
            orders(&others).into_iter().map(move |others| [vec![first], others].concat())
        };
        (0..items.len()).flat_map(beginning_with).collect()
    }

    #[test]
    fn no_accepted_table_affects_another_check() {
        let line = "start: parameter 2: expected Str, found u64";
        let plugins = [
            (released::TableRef::LAYOUT, None),
            (grown::TableRef::LAYOUT, None),
            (other_signature::TableRef::LAYOUT, None),
            (other_name::TableRef::LAYOUT, None),
            (no_function::TableRef::LAYOUT, None),
            (retyped::TableRef::LAYOUT, Some(line)),
        ];
        let orders = orders(&plugins);
        assert_eq!(orders.len(), 720);
        for order in orders {
            for (plugin, refused) in order {
                let compared = compare(released::TableRef::LAYOUT, plugin).map_err(|mismatch| mismatch.line);
                assert_eq!(compared.err().as_deref(), refused);
            }
        }
    }

    #[test]
    fn appended_entry_is_compared_if_both_have_it() {
        let line = |plugin| compare(grown::TableRef::LAYOUT, plugin).expect_err("it differs").line;
        assert_eq!(line(other_signature::TableRef::LAYOUT), "warm_up: number of parameters: expected 1, found 2");
        assert_eq!(line(other_name::TableRef::LAYOUT), "entry: expected warm_up, found drain");
        assert_eq!(line(no_function::TableRef::LAYOUT), "warm_up: expected AFunctionPointer, found u64");
    }

    #[test]
    fn struct_behind_pointer_grows_if_it_has_its_size() {
        let line = |host, plugin| compare(host, plugin).map_err(|mismatch| mismatch.line).err();
        let (short, long) = (request::LAYOUT, longer_request::LAYOUT);
        assert_eq!((line(short, long), line(long, short)), (None, None));
        let retyped = line(short, retyped_request::LAYOUT);
        assert_eq!(retyped.as_deref(), Some("start: parameter 1: capability: expected Str, found u64"));

        let fixed = line(fixed::LAYOUT, longer_fixed::LAYOUT);
        assert_eq!(fixed.as_deref(), Some("start: parameter 1: size in bytes: expected 16, found 32"));
        let by_value = line(by_value::LAYOUT, longer_by_value::LAYOUT);
        assert_eq!(by_value.as_deref(), Some("start: parameter 2: size in bytes: expected 24, found 40"));
    }

    #[test]
    fn types_that_contain_themselves_are_compared() {
        let (list, longer) = (list::LAYOUT, longer_list::LAYOUT);
        assert_eq!(compare(list, list), Ok(()));
        assert_eq!(compare(list, longer), Ok(()));
        let line = compare(list, request::LAYOUT).expect_err("another field").line;
        assert_eq!(line, "start: parameter 1: field: expected next, found capability");
    }

    /// One more array around a type for each dot.
    macro_rules! nested {
        ($kind:ty;) => { $kind };
        ($kind:ty; . $($more:tt)*) => { nested!([$kind; 1]; $($more)*) };
    }

    type Deep = nested!(u8; . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . . .
        . . . . . . . . . . . . . . . . . . . .);

    table!(deep {
        #[sabi(last_prefix_field)]
        start: unsafe extern "C" fn(deep: Deep),
    });

    #[test]
    fn too_deep_description_is_a_mismatch() {
        let line = compare(deep::TableRef::LAYOUT, deep::TableRef::LAYOUT).expect_err("too deep").line;
        assert_eq!(line, "start: parameter 1: more than 64 types are inside each other");
    }

    extern "C" fn no_module() -> RootModuleResult {
        unreachable!("the check does not create the module")
    }

    /// The proof of a header whose words are changed first.
    fn prove(change: impl FnOnce(&mut HeaderStart)) -> Result<Proof, LayoutMismatch> {
        // It stays loaded for the rest of the process.
        let header: &'static mut LibHeader = Box::leak(Box::new(header(no_module)));
        let header: *mut LibHeader = header;
        // SAFETY: the value behind the pointer begins with these fields, and nobody else has the pointer.
        change(unsafe { &mut *header.cast::<HeaderStart>() });
        // SAFETY: a header of this process, changed only where the check must notice it.
        unsafe { prove_layout(header.cast()) }
    }

    #[test]
    fn own_header_proves_the_layout() {
        let header = header(no_module);
        let mut start = None;
        assert_eq!(prove(|header| start = Some((header.layout_state, header.layout))), Ok(Proof::Layout));
        assert_eq!(start, header.layout().map(|layout| (WITH_LAYOUT, std::ptr::from_ref(layout))));
    }

    #[test]
    fn header_of_another_version_proves_nothing() {
        let later = prove(|header| header.abi.abi_minor += 1);
        let reason = "its header is of abi_stable 0.12, expected 0.11".to_owned();
        assert_eq!(later, Ok(Proof::None { reason }));
        let foreign = prove(|header| header.abi.magic_string = [0; 32]);
        assert_eq!(foreign, Ok(Proof::None { reason: "its header is not one of abi_stable".to_owned() }));
    }

    #[test]
    fn damaged_header_is_a_mismatch() {
        let line = |change: fn(&mut HeaderStart)| prove(change).expect_err("damaged").line;
        let damaged = |what: &str| format!("its header is damaged: {what}");
        assert_eq!(line(|header| header.layout = std::ptr::null()), damaged("it does not point to a layout"));
        assert_eq!(
            line(|header| header.layout = header.layout.wrapping_byte_add(1)),
            damaged("it does not point to a layout")
        );
        assert_eq!(line(|header| header.layout_state = 7), damaged("expected 0 or 1 for its layout, found 7"));
        assert_eq!(
            line(|header| header.layout_state = WITHOUT_LAYOUT),
            damaged("it carries no layout, expected one made by export_runner!")
        );
    }

    #[test]
    fn macro_exports_the_header_the_host_expects() {
        let line = format!("#[unsafe(export_name = \"{HEADER_SYMBOL}\")]");
        assert!(include_str!("../shim/export.rs").contains(&line), "export_runner! does not export {HEADER_SYMBOL}");
    }
}
