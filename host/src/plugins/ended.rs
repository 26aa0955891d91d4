//! Handles the end of the process, by the host or by a plugin.
//!
//! The host cannot prevent a plugin from calling `exit`. It logs which plugin it was, and ends with a code on which
//! a supervisor restarts the process. No code of the host runs when a signal or `_exit` ends the process. Only the
//! last log line can then name the plugin. Therefore each library is named in the log before its code runs.

use std::{
    io::Write as _,
    panic::catch_unwind,
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::Duration,
};

use tracing::{error, info};

use super::{ffi, open};
use crate::model::in_a_line;

/// A library was opened in this process.
static OPENED: AtomicBool = AtomicBool::new(false);
/// The library that is being opened or initialised.
static OPENING: Mutex<Option<PathBuf>> = Mutex::new(None);
/// The names of all plugins whose code has run.
static NAMES: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Exit code after a plugin ended the process. A supervisor should restart it.
const ENDED_BY_PLUGIN: u8 = 75;
/// Time limit for this report. A stderr that nobody reads must not keep the process alive.
const REPORT_LIMIT: Duration = Duration::from_secs(1);
/// Maximum length of a thread name in the system.
const THREAD_NAME_CHARS: usize = 15;
/// Maximum number of tasks that are named.
const TASKS_MAX: usize = 32;

/// Logs the name of a library whose code is about to run for the first time. If the library ends the process, this
/// is the last line.
pub(super) fn opening(name: &str, file: &Path) {
    OPENED.store(true, Ordering::Relaxed);
    *lock(&OPENING) = Some(file.to_owned());
    let mut names = lock(&NAMES);
    if !names.iter().any(|known| known == name) {
        names.push(name.to_owned());
    }
    drop(names);
    info!(event = "plugin.loading", plugin = %name, file = %file.display(), "loading plugin");
}

/// All libraries have been opened.
pub(super) fn opened() {
    *lock(&OPENING) = None;
}

/// Ends the process with `code` when a library was opened in it. Exit handlers of that library do not run. Returns
/// when no library was opened.
pub fn exit_process(code: u8) {
    if OPENED.load(Ordering::Relaxed) {
        // A failure cannot be reported any more.
        let _ = std::io::stdout().flush();
        open::exit_process(code);
    }
}

/// For a program that ends by [`exit_process`]. Any other exit after a library was opened is reported as caused by the
/// library. Its exit code is never that of a success.
pub fn watch_exit() {
    open::on_exit(ended_by_plugin);
}

/// Runs on the thread that called `exit`. The locals of that thread are already destroyed, so another thread writes the
/// report.
extern "C" fn ended_by_plugin() {
    if !OPENED.load(Ordering::Relaxed) {
        return;
    }
    let _ = catch_unwind(|| {
        let thread = thread_name();
        let (reported, wait_reported) = mpsc::channel();
        let reporter = std::thread::Builder::new().spawn(move || {
            report(&thread);
            let _ = reported.send(());
        });
        if reporter.is_ok() {
            let _ = wait_reported.recv_timeout(REPORT_LIMIT);
        }
    });
    open::exit_process(ENDED_BY_PLUGIN);
}

/// A node writes this to its log. A command that logs only errors prints it as the reason of its end.
fn report(thread: &str) {
    let logged = tracing::enabled!(tracing::Level::WARN);
    if let Some(file) = lock(&OPENING).clone() {
        let file = file.display();
        if logged {
            error!(event = "plugin.exited", file = %file, "a plugin ended the process while it was loaded; remove the plugin");
        } else {
            print_error(&format!("plugin {file} ended the process while it was loaded; remove it"));
        }
        return;
    }
    let (plugin, tasks) = (owner(thread), running(thread));
    if logged {
        error!(
            event = "plugin.exited",
            plugin,
            thread,
            task_ids = tasks,
            "a plugin ended the process; a runner must not call exit"
        );
    } else {
        let mut line = "a plugin ended the process; a runner must not call exit".to_owned();
        for (what, found) in [("plugin", plugin), ("running tasks", tasks), ("thread", Some(thread.to_owned()))] {
            if let Some(found) = found.filter(|found| !found.is_empty()) {
                line = format!("{line}; {what}: {found}");
            }
        }
        print_error(&line);
    }
}

/// Unlike `eprintln!`, it does not panic when nobody reads.
fn print_error(line: &str) {
    let _ = writeln!(std::io::stderr(), "error: {}", in_a_line(line));
}

/// The plugins that a thread of this name may belong to.
fn owner(thread: &str) -> Option<String> {
    let names = lock(&NAMES);
    let names: Vec<&str> = names.iter().map(String::as_str).filter(|name| belongs_to(name, thread)).collect();
    (!names.is_empty()).then(|| names.join(" or "))
}

/// The tasks that run in those plugins. When the thread belongs to no plugin, the tasks of all plugins.
fn running(thread: &str) -> Option<String> {
    let mut tasks = ffi::running();
    if tasks.iter().any(|(plugin, _)| belongs_to(plugin, thread)) {
        tasks.retain(|(plugin, _)| belongs_to(plugin, thread));
    }
    let names: Vec<String> = tasks.iter().take(TASKS_MAX).map(|(_, task)| task.to_string()).collect();
    let more = if tasks.len() > names.len() { " …" } else { "" };
    (!names.is_empty()).then(|| names.join(" ") + more)
}

/// Host threads that call into a plugin, and SDK threads inside it, have names with the plugin's name.
fn belongs_to(plugin: &str, thread: &str) -> bool {
    let names = ["plugin-", "runner-"].map(|kind| format!("{kind}{plugin}"));
    names.iter().any(|name| name.chars().take(THREAD_NAME_CHARS).eq(thread.chars()))
}

/// The thread name as the system knows it. A plugin's own copy of std has started most of its threads.
fn thread_name() -> String {
    let name = std::fs::read_to_string("/proc/thread-self/comm").unwrap_or_default();
    name.trim_end().to_owned()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thread_name_identifies_its_plugin() {
        assert!(belongs_to("echo", "plugin-echo") && belongs_to("echo", "runner-echo"));
        assert!(belongs_to("pointcloud", "runner-pointclo") && belongs_to("pointcloth", "plugin-pointclo"));
        assert!(!belongs_to("echo", "plugin-echoes") && !belongs_to("echo", "echo") && !belongs_to("echo", ""));
    }
}
