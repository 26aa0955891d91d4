//! Compares the ABI of major version 2 in three places: the Rust tables, `runner.h` as the C compiler sees it, and a
//! committed text.
//!
//! A changed line breaks every released plugin: entries are only appended. To append one, add it to the lists below
//! and write the file again with `RUNNER_SDK_BLESS=1`.

#![cfg(all(unix, target_pointer_width = "64"))]

use std::{
    fmt::Write as _,
    mem::offset_of,
    path::{Path, PathBuf},
    process::Command,
};

use abi_stable::prefix_type::PrefixTypeTrait as _;
use runner_sdk::abi::{
    self, Bytes, Callback, CreateRequest, End, Host, HostWord, Instance, Module, ModuleTable, StartRequest, Status,
    Str, Table, Task,
};

const GOLDEN: &str = include_str!("abi_v2.golden");

/// Both sides of the comparison: `rust` is the text of this crate, `c` the statements that print it from `runner.h`.
#[derive(Default)]
struct Facts {
    rust: String,
    c: String,
}

impl Facts {
    fn add(&mut self, name: &str, rust: impl std::fmt::Display, c: &str) {
        let _ = writeln!(self.rust, "{name} {rust}");
        let _ = writeln!(self.c, "  printf(\"{name} %llu\\n\", (unsigned long long)({c}));");
    }
}

macro_rules! values {
    ($facts:ident, $rust:ty as $c:literal { $($field:ident),* }) => {
        $facts.add(concat!($c, " size"), size_of::<$rust>(), concat!("sizeof(", $c, ")"));
        $($facts.add(
            concat!($c, ".", stringify!($field), " offset"),
            offset_of!($rust, $field),
            concat!("offsetof(", $c, ", ", stringify!($field), ")"),
        );)*
    };
}

macro_rules! table {
    (
        $facts:ident, $rust:ident at $start:expr, $c:literal, $mask:expr, $c_mask:literal { $($field:ident),* }
    ) => {
        let offsets = [$($start + offset_of!(Table<$rust>, entries) + offset_of!($rust, $field)),*];
        assert!(offsets.is_sorted(), "entries are numbered in memory order");
        let names = [$(stringify!($field)),*];
        for (bit, (name, offset)) in names.into_iter().zip(offsets).enumerate() {
            $facts.add(&format!("{}.{name} bit {bit} offset", $c), offset, &format!("offsetof({}, {name})", $c));
            if $c == "runner_host" {
                let index = format!("RUNNER_HOST_{}", name.to_uppercase());
                $facts.add(&index, bit, &index);
            }
        }
        assert_eq!(u64::MAX >> (64 - names.len()), $mask, "the mask has one bit per entry");
        $facts.add($c_mask, $mask, $c_mask);
    };
}

macro_rules! numbers {
    ($facts:ident, $rust:ident as $prefix:literal { $($name:ident),* }) => {
        $($facts.add(concat!($prefix, stringify!($name)), $rust::$name.0, concat!($prefix, stringify!($name)));)*
    };
}

fn facts() -> Facts {
    let mut facts = Facts::default();
    facts.add("RUNNER_MAGIC", abi::MAGIC, "RUNNER_MAGIC");
    facts.add("RUNNER_ABI_MAJOR", abi::ABI_MAJOR, "RUNNER_ABI_MAJOR");
    facts.add("RUNNER_ABI_MINOR", abi::ABI_MINOR, "RUNNER_ABI_MINOR");
    facts.add("RUNNER_ABI_VERSION", abi::ABI_VERSION, "RUNNER_ABI_VERSION");
    values!(facts, Str as "runner_str" { ptr, len });
    values!(facts, Bytes as "runner_bytes" { ptr, len, owner, release });
    values!(facts, Task as "runner_task" {});
    values!(facts, HostWord as "runner_host_word" {});
    values!(facts, Instance as "runner_instance" {});
    values!(facts, Status as "runner_status" {});
    values!(facts, End as "runner_end" {});
    values!(facts, Callback as "runner_callback" {});
    values!(facts, CreateRequest as "runner_create_request" {
        size, abi, log_level, capabilities_len, capabilities, name, config
    });
    values!(facts, StartRequest as "runner_start_request" {
        size, inputs_len, inputs, capability, dir, task_id, traceparent, lease
    });
    numbers!(facts, End as "RUNNER_END_" { OK, FAILED, RETRYABLE, CANCELLED, INVALID_INPUT, PANICKED, STORAGE });
    numbers!(facts, Status as "RUNNER_" {
        OK,
        OTHER,
        UNSUPPORTED,
        STALE,
        NOT_FOUND,
        BAD_REQUEST,
        INVALID_PATH,
        UNAUTHORIZED,
        CONFLICT,
        SERVER,
        NETWORK,
        MALFORMED,
        LEASE_OVER,
        LOCAL,
        LIMIT,
        SETUP,
        PANICKED
    });
    facts.add("RUNNER_INPUT_KEEP", abi::INPUT_KEEP, "RUNNER_INPUT_KEEP");
    values!(facts, Table<Host> as "runner_host" { present, reserved });
    table!(facts, Host at 0, "runner_host", abi::HOST_MASK, "RUNNER_HOST_MASK" {
        log, cancelled, complete, progress, event, usage, cancel_reason, token, time_left, task_dir, input_open, input_read,
        input_close, input_file, input_find, output_open, output_write, output_finish, output_abort, output_file
    });
    values!(facts, ModuleTable as "runner_module" { magic, abi });
    table!(facts, Module at offset_of!(ModuleTable, table), "runner_module", abi::MODULE_MASK, "RUNNER_MODULE_MASK" {
        create, start, cancel, shutdown, log_level
    });
    facts.add("RUNNER_MODULE_NEEDED", abi::MODULE_NEEDED, "RUNNER_MODULE_NEEDED");
    facts
}

#[test]
fn rust_tables_match_the_golden_file() {
    let rust = facts().rust;
    if std::env::var_os("RUNNER_SDK_BLESS").is_some() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/abi_v2.golden");
        std::fs::write(path, &rust).expect("the golden file is writable");
        return;
    }
    assert_eq!(rust, GOLDEN);
}

#[test]
fn c_tables_match_the_golden_file() {
    let dir = Scratch::new("c");
    let source = format!(
        "#include <stdio.h>\n#include <stddef.h>\n#include \"runner.h\"\n\n\
         const runner_module *runner_module_v2(void) {{ return 0; }}\n\n\
         int main(void) {{\n{}  return 0;\n}}\n",
        facts().c
    );
    let program = compile("cc", "c", "-std=c99", &source, &dir);
    let printed = Command::new(program).output().expect("the program that prints the layout runs");
    assert!(printed.status.success());
    assert_eq!(String::from_utf8_lossy(&printed.stdout), GOLDEN);
}

#[test]
#[ignore = "needs a C++ compiler; .ci/run runs it where there is one"]
fn runner_h_compiles_as_cpp() {
    let found = ["c++", "g++", "clang++"].into_iter().find(|name| Command::new(name).arg("--version").output().is_ok());
    let compiler = found.expect("this test needs a C++ compiler: install g++ or clang++");
    let dir = Scratch::new("cpp");
    let source = "#include \"runner.h\"\n\
        RUNNER_PLUGIN(\"mine\", \"1.0.0\", \"\\\"/mine/v1\\\"\");\n\
        static const runner_module table = {RUNNER_MODULE_HEAD, 0, 0, 0, 0, 0};\n\
        const runner_module *runner_module_v2(void) { return &table; }\n\
        int main() { return RUNNER_HAS(runner_module_v2(), 4) ? 0 : 1; }\n";
    let program = compile(compiler, "cpp", "-std=c++11", source, &dir);
    assert!(Command::new(program).status().expect("the program runs").success());
}

/// The first word of the tables that Rust plugins and Rust hosts write.
#[test]
fn written_masks_equal_the_declared_masks() {
    assert_eq!(Module::PT_FIELD_ACCESSIBILITY.bits(), abi::MODULE_MASK);
    assert_eq!(Host::PT_FIELD_ACCESSIBILITY.bits(), abi::HOST_MASK);

    let module = runner_sdk::__private::module(&[]);
    assert_eq!((module.magic, module.abi, module.table.present), (abi::MAGIC, abi::ABI_VERSION, abi::MODULE_MASK));
}

/// One version number, wherever it is written.
#[test]
fn abi_version_is_the_same_everywhere() {
    let (major, minor) = (abi::ABI_MAJOR, abi::ABI_MINOR);
    let version = format!("{major}.{minor}");
    assert_eq!(abi::ABI_TEXT, version);
    assert_eq!(abi::MAGIC.to_be_bytes(), *format!("RUNNERv{major}").as_bytes());
    assert_eq!(abi::ENTRY, format!("runner_module_v{major}"));
    let header = include_str!("../include/runner.h");
    assert!(header.starts_with(&format!("/* runner.h - write a runner for runner-host in C. ABI version {version},")));
    assert!(header.contains(&format!("const runner_module *{}(void);", abi::ENTRY)));
    let manifest = runner_sdk::__private::ABI_TEXT;
    assert_eq!(manifest, version);
    let entry = abi::ENTRY;
    assert!(include_str!("../src/shim/export.rs").contains(&format!("fn {entry}() -> ")));
    // The documented examples load on this host.
    for (file, text) in
        [("README.md", include_str!("../README.md")), ("export.rs", include_str!("../src/shim/export.rs"))]
    {
        let examples: Vec<&str> =
            text.split("min_abi = \"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
        assert!(!examples.is_empty(), "{file} has no example of min_abi");
        // "1" is the example of an invalid one.
        for example in examples.into_iter().filter(|example| *example != "1") {
            let (needed_major, needed_minor) = example.split_once('.').expect("major.minor");
            assert_eq!(needed_major.parse(), Ok(major), "{file}: {example}");
            assert!(needed_minor.parse().is_ok_and(|needed: u16| needed <= minor), "{file}: {example}");
        }
    }
}

fn compile(compiler: &str, extension: &str, standard: &str, source: &str, dir: &Scratch) -> PathBuf {
    let file = dir.0.join(format!("layout.{extension}"));
    let program = dir.0.join("layout");
    std::fs::write(&file, source).expect("the scratch directory is writable");
    let output = Command::new(compiler)
        .args([standard, "-Wall", "-Wextra", "-Werror", "-pedantic", "-I"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("include"))
        .arg("-o")
        .args([&program, &file])
        .output()
        .unwrap_or_else(|err| panic!("{compiler} does not run ({err}); these tests need a C compiler"));
    assert!(output.status.success(), "{compiler}:\n{}", String::from_utf8_lossy(&output.stderr));
    program
}

/// A directory of one test, removed with it.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("runner-sdk-abi-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory below the system's temporary one");
        Self(dir)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
