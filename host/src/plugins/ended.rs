//! The end of the process: ours, and one that a plugin brings about.
//!
//! A plugin that calls `exit` cannot be kept from it. What is left to do is to say who it was, and to end
//! with a code a supervisor starts again. An end by a signal, or by `_exit`, asks nobody: there the last
//! line of the log has to tell, which is why each library is named before its code runs.

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

/// Exit code after a plugin ended the process: a supervisor should start it again.
const ENDED_BY_PLUGIN: u8 = 75;
/// How long the last line may take: a reader that stands still does not keep the process.
const LAST_LINE: Duration = Duration::from_secs(1);
/// As much of a name as the system keeps for a thread.
const THREAD_NAME_CHARS: usize = 15;
/// Most tasks that are named.
const TASKS_MAX: usize = 32;

/// Names a library whose code is about to run for the first time. Should it take the process with it, this
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

/// Ends the process with `code` when a library was opened in it, without that library's exit
/// handlers; returns when none was.
pub fn leave(code: u8) {
    if OPENED.load(Ordering::Relaxed) {
        // Nobody is left to be told when that fails.
        let _ = std::io::stdout().flush();
        open::leave(code);
    }
}

/// For a program that ends by [`leave`]: an exit in another way, after a library was opened, is told as
/// that library's doing and never has the code of a success.
pub fn watch_exit() {
    open::on_exit(ended_by_plugin);
}

/// Called by the thread that called `exit`, whose locals are gone already. So another one speaks.
extern "C" fn ended_by_plugin() {
    if !OPENED.load(Ordering::Relaxed) {
        return;
    }
    let _ = catch_unwind(|| {
        let thread = thread_name();
        let (tell, told) = mpsc::channel();
        let speaker = std::thread::Builder::new().spawn(move || {
            say(&thread);
            let _ = tell.send(());
        });
        if speaker.is_ok() {
            let _ = told.recv_timeout(LAST_LINE);
        }
    });
    open::leave(ENDED_BY_PLUGIN);
}

/// In the log of a node; as a command says why it ends where only errors are worth a line.
fn say(thread: &str) {
    let logged = tracing::enabled!(tracing::Level::WARN);
    if let Some(file) = lock(&OPENING).clone() {
        let file = file.display();
        if logged {
            error!(event = "plugin.exited", file = %file, "a plugin ended the process while it was loaded; remove the plugin");
        } else {
            complain(&format!("plugin {file} ended the process while it was loaded; remove it"));
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
        complain(&line);
    }
}

/// Unlike `eprintln!` it does not panic where nobody reads.
fn complain(line: &str) {
    let _ = writeln!(std::io::stderr(), "error: {}", in_a_line(line));
}

/// The plugins a thread of this name may belong to.
fn owner(thread: &str) -> Option<String> {
    let names = lock(&NAMES);
    let names: Vec<&str> = names.iter().map(String::as_str).filter(|name| is_of(name, thread)).collect();
    (!names.is_empty()).then(|| names.join(" or "))
}

/// The tasks that run in those plugins; in all of them where the thread belongs to none.
fn running(thread: &str) -> Option<String> {
    let mut tasks = ffi::running();
    if tasks.iter().any(|(plugin, _)| is_of(plugin, thread)) {
        tasks.retain(|(plugin, _)| is_of(plugin, thread));
    }
    let names: Vec<String> = tasks.iter().take(TASKS_MAX).map(|(_, task)| task.to_string()).collect();
    let more = if tasks.len() > names.len() { " …" } else { "" };
    (!names.is_empty()).then(|| names.join(" ") + more)
}

/// Our threads that call into a plugin, and those of the SDK in it, are named after it.
fn is_of(plugin: &str, thread: &str) -> bool {
    let whole = ["plugin-", "runner-"].map(|kind| format!("{kind}{plugin}"));
    whole.iter().any(|whole| whole.chars().take(THREAD_NAME_CHARS).eq(thread.chars()))
}

/// As the system knows it: a plugin's own copy of std has started most of its threads.
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
        assert!(is_of("echo", "plugin-echo") && is_of("echo", "runner-echo"));
        assert!(is_of("pointcloud", "runner-pointclo") && is_of("pointcloth", "plugin-pointclo"));
        assert!(!is_of("echo", "plugin-echoes") && !is_of("echo", "echo") && !is_of("echo", ""));
    }
}
