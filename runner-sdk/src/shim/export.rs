//! `export_runner!`: makes a library a plugin.

use std::sync::Arc;

use serde::de::DeserializeOwned;

use crate::author::{DynRunner, Error, Runner};

/// How a runner is created. [`export_runner!`](crate::export_runner) makes this value.
pub struct Registration {
    /// The capability.
    pub capability: &'static str,
    /// Creates it from the plugin's config, a JSON object.
    pub build: fn(config: &str) -> Result<Arc<dyn DynRunner>, Error>,
}

/// A runner that needs no config. A config is rejected, because it would have no effect.
///
/// # Errors
/// When the config is not empty.
pub fn from_default<R: Runner + Default>(config: &str) -> Result<Arc<dyn DynRunner>, Error> {
    let keys: serde_json::Map<String, serde_json::Value> = serde_json::from_str(config)?;
    match keys.keys().next() {
        None => Ok(Arc::new(R::default())),
        Some(key) => Err(Error::msg(format!("config has the key `{key}`, but this plugin takes no config; remove it"))),
    }
}

/// A runner that `build` creates from its config.
///
/// # Errors
/// When the config does not have the shape `build` takes, or `build` fails.
pub fn from_config<R, C, E>(config: &str, build: fn(C) -> Result<R, E>) -> Result<Arc<dyn DynRunner>, Error>
where
    R: Runner,
    C: DeserializeOwned,
    E: Into<Error>,
{
    let config = serde_json::from_str(config).map_err(|err| Error::msg(format!("config: {err}")))?;
    match build(config) {
        Ok(runner) => Ok(Arc::new(runner)),
        Err(err) => Err(err.into()),
    }
}

/// Makes a `cdylib` a plugin that serves the named runners.
///
/// `export_runner!(Hello)` needs `Hello: Default`. `export_runner!(Hello: Hello::new)` calls `Hello::new(config)`
/// once when the plugin is loaded. It is a function from any deserialisable type to `Result<Hello, E>`. On an error
/// the host rejects the plugin with its text. Several runners are separated by commas.
///
/// A semicolon and keys of the manifest may follow, in any order:
///
/// - `wants = ["token"]`: the runner reads the storage token. The host rejects the plugin when it loads it, unless the
///   operator has granted the token. Without this key the call of `token()` fails in the middle of a task. A host
///   ignores words that it does not know.
/// - `requires = ["word"]`: like `wants`, but a host that does not know a word rejects the plugin.
/// - `min_abi = "2.0"`: the lowest ABI version of a host. A host with a lower one rejects the plugin.
///
/// ```
/// # use runner_sdk::{Error, Runner, TaskCtx, export_runner};
/// #[derive(Default)]
/// struct Mirror;
///
/// impl Runner for Mirror {
///     const CAPABILITY: &'static str = "/examples/mirror/v1";
///     async fn run(&self, ctx: TaskCtx) -> Result<(), Error> {
///         let token = ctx.ctrl.token().await?;
/// #       drop(token);
///         Ok(())
///     }
/// }
///
/// export_runner!(Mirror; wants = ["token"], min_abi = "2.0");
/// # fn main() {}
/// ```
///
/// A library has one `export_runner!`. The macro exports the symbol `runner_module_v2` and a manifest that can be
/// read without running the file. It also
/// exports the description of the tables, with which a host checks their layout.
///
/// ```
/// use runner_sdk::{Error, Runner, TaskCtx, export_runner};
///
/// struct Greet { greeting: String }
///
/// #[derive(serde::Deserialize)]
/// #[serde(deny_unknown_fields)]
/// struct Config { greeting: String }
///
/// impl Greet {
///     fn new(config: Config) -> Result<Self, Error> {
///         Ok(Self { greeting: config.greeting })
///     }
/// }
///
/// impl Runner for Greet {
///     const CAPABILITY: &'static str = "/examples/greet/v1";
///     async fn run(&self, ctx: TaskCtx) -> Result<(), Error> {
///         ctx.output.put_bytes("greeting.txt", self.greeting.clone()).await?;
///         Ok(())
///     }
/// }
///
/// export_runner!(Greet: Greet::new);
/// # fn main() {}
/// ```
///
/// An invalid capability name does not compile:
///
/// ```compile_fail,E0080
/// # use runner_sdk::{Error, Runner, TaskCtx, export_runner};
/// # #[derive(Default)]
/// # struct Blank;
/// # impl Runner for Blank {
/// const CAPABILITY: &'static str = "";
/// # async fn run(&self, _ctx: TaskCtx) -> Result<(), Error> { Ok(()) }
/// # }
/// # export_runner!(Blank);
/// ```
///
/// ```compile_fail,E0080
/// # use runner_sdk::{Error, Runner, TaskCtx, export_runner};
/// # #[derive(Default)]
/// # struct Bare;
/// # impl Runner for Bare {
/// const CAPABILITY: &'static str = "examples/bare/v1";
/// # async fn run(&self, _ctx: TaskCtx) -> Result<(), Error> { Ok(()) }
/// # }
/// # export_runner!(Bare);
/// ```
///
/// ```compile_fail,E0080
/// # use runner_sdk::{Error, Runner, TaskCtx, export_runner};
/// # #[derive(Default)]
/// # struct Spaced;
/// # impl Runner for Spaced {
/// const CAPABILITY: &'static str = "/two words/v1";
/// # async fn run(&self, _ctx: TaskCtx) -> Result<(), Error> { Ok(()) }
/// # }
/// # export_runner!(Spaced);
/// ```
///
/// So does an unknown key, or a value that is not valid:
///
/// ```compile_fail,E0560
/// # use runner_sdk::{Error, Runner, TaskCtx, export_runner};
/// # #[derive(Default)]
/// # struct Mirror;
/// # impl Runner for Mirror {
/// # const CAPABILITY: &'static str = "/examples/mirror/v1";
/// # async fn run(&self, _ctx: TaskCtx) -> Result<(), Error> { Ok(()) }
/// # }
/// export_runner!(Mirror; want = ["token"]);
/// ```
///
/// ```compile_fail,E0080
/// # use runner_sdk::{Error, Runner, TaskCtx, export_runner};
/// # #[derive(Default)]
/// # struct Mirror;
/// # impl Runner for Mirror {
/// # const CAPABILITY: &'static str = "/examples/mirror/v1";
/// # async fn run(&self, _ctx: TaskCtx) -> Result<(), Error> { Ok(()) }
/// # }
/// export_runner!(Mirror; min_abi = "1");
/// ```
#[macro_export]
macro_rules! export_runner {
    (
        $first:ty $(: $first_new:expr)? $(, $more:ty $(: $more_new:expr)?)* $(,)?
        $(; $($key:ident = $value:expr),* $(,)?)?
    ) => {
        // A macro that is exported is at the root of its crate. So a second one is an error in any module.
        #[doc(hidden)]
        #[macro_export]
        macro_rules! a_library_has_one_export_runner {
            () => {};
        }

        const _: () = {
            use $crate::__private as sdk;

            #[allow(clippy::needless_update)]
            const KEYS: sdk::ManifestKeys = sdk::ManifestKeys {
                $($($key: $crate::__manifest_value!($key $value),)*)?
                ..sdk::ManifestKeys::NONE
            }
            .checked();

            const PARTS: &[&str] = &[
                "{\"name\":\"", env!("CARGO_PKG_NAME"),
                "\",\"version\":\"", env!("CARGO_PKG_VERSION"),
                "\",\"sdk\":\"", sdk::SDK_VERSION,
                "\",\"abi\":\"", sdk::ABI_TEXT,
                "\",\"capabilities\":[\"", sdk::checked(<$first as $crate::Runner>::CAPABILITY), "\"",
                $(",\"", sdk::checked(<$more as $crate::Runner>::CAPABILITY), "\"",)*
                "]",
            ];

            #[used]
            #[cfg_attr(not(target_os = "macos"), unsafe(link_section = ".runner"))]
            #[cfg_attr(target_os = "macos", unsafe(link_section = "__DATA,.runner"))]
            static MANIFEST: [u8; sdk::manifest_len(PARTS, &KEYS)] = sdk::manifest(PARTS, &KEYS);

            static REGISTRATIONS: &[sdk::Registration] = &[
                sdk::Registration {
                    capability: <$first as $crate::Runner>::CAPABILITY,
                    build: $crate::__registration!($first $(: $first_new)?),
                },
                $(sdk::Registration {
                    capability: <$more as $crate::Runner>::CAPABILITY,
                    build: $crate::__registration!($more $(: $more_new)?),
                },)*
            ];

            #[unsafe(no_mangle)]
            extern "C" fn runner_module_v2() -> &'static sdk::ModuleTable {
                // The linker keeps what this exported function refers to. Before Rust 1.89, `#[used]` alone
                // lets it drop the section.
                std::hint::black_box(&MANIFEST);
                sdk::module(REGISTRATIONS)
            }

            extern "C" fn erased() -> sdk::RootModuleResult {
                sdk::call_root_module_loader(sdk::described)
            }

            #[unsafe(export_name = "_1as_0lib_1header_0root_bmodule_bloader")]
            static HEADER: sdk::LibHeader = sdk::header(erased);
        };
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __manifest_value {
    (min_abi $version:expr) => {
        $version
    };
    ($list:ident $words:expr) => {
        &$words
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __registration {
    ($runner:ty) => {
        $crate::__private::from_default::<$runner>
    };
    ($runner:ty : $new:expr) => {
        |config| $crate::__private::from_config::<$runner, _, _>(config, $new)
    };
}
