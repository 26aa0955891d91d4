//! Checks the folders and hosts in settings. It creates nothing and sends nothing.

use std::{
    io::ErrorKind,
    net::IpAddr,
    path::{Path, PathBuf},
};

use url::{Host, Url};

use super::parser::Parser;
use crate::model::resolved_path;

/// Folders of the kernel, except [`SHARED_MEMORY`].
const KERNEL_FOLDERS: [&str; 3] = ["/proc", "/sys", "/dev"];
const SHARED_MEMORY: &str = "/dev/shm";

/// The prefix of folders in SCRATCH_DIR. A node removes such a folder when its process has ended
/// (`storage::Scratch`).
const SWEPT_PREFIX: &str = "node-";

/// Longest label and longest name of a host.
const LABEL_BYTES_MAX: usize = 63;
const HOST_BYTES_MAX: usize = 253;

/// Why `path` cannot be created as a folder, or written to.
#[must_use]
pub fn folder_problem(path: &Path) -> Option<String> {
    kernel_problem(path).or_else(|| writable_problem(path))
}

/// Why `path` cannot be used for files: it belongs to the kernel.
#[must_use]
pub fn kernel_problem(path: &Path) -> Option<String> {
    let real = resolved_path(path);
    let kernel_folder = KERNEL_FOLDERS
        .iter()
        .find(|kernel_folder| real.starts_with(kernel_folder) && !real.starts_with(SHARED_MEMORY))?;
    let shown = path.display();
    let resolves_to =
        if path.starts_with(kernel_folder) { String::new() } else { format!(", which is {}", real.display()) };
    Some(format!("expected a folder for files, found {shown}{resolves_to}; name one that is not below {kernel_folder}"))
}

/// Why the default folder cannot be used. Every user may create folders in its parent, so a link or a folder of
/// another user may be an attack.
#[cfg(unix)]
pub(super) fn foreign_problem(path: &Path) -> Option<String> {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = std::fs::symlink_metadata(path).ok()?;
    let found = match () {
        () if metadata.is_symlink() => "a link",
        () if metadata.uid() != rustix::process::geteuid().as_raw() => "a folder of another user",
        () if metadata.mode() & 0o022 != 0 => "a folder that others can write to",
        () => return None,
    };
    let shown = path.display();
    Some(format!(
        "expected a folder of this user alone, found {found} at {shown}; have it removed, or set TMPDIR to a folder of your own"
    ))
}

#[cfg(not(unix))]
pub(super) fn foreign_problem(_: &Path) -> Option<String> {
    None
}

/// Why the two folders conflict: they are the same, or a start would remove the second.
pub(super) fn conflict(scratch: &Path, state: &Path) -> Option<String> {
    let (real_scratch, real_state) = (resolved_path(scratch), resolved_path(state));
    let (scratch, shown) = (scratch.display(), state.display());
    if is_same(&real_scratch, &real_state) {
        return Some(format!(
            "expected another folder than SCRATCH_DIR, which is {scratch}, found {shown}; name two folders"
        ));
    }
    let inside = real_state.strip_prefix(&real_scratch).ok()?;
    let first = inside.components().next()?.as_os_str().to_string_lossy();
    first.starts_with(SWEPT_PREFIX).then(|| {
        format!(
            "expected a folder that stays, found {shown}: {SWEPT_PREFIX}… in SCRATCH_DIR {scratch} is removed at a start; \
             name another"
        )
    })
}

#[cfg(unix)]
fn is_same(one: &Path, other: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = |path: &Path| std::fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
    one == other || metadata(one).is_some_and(|one| metadata(other) == Some(one))
}

#[cfg(not(unix))]
fn is_same(one: &Path, other: &Path) -> bool {
    one == other
}

fn writable_problem(path: &Path) -> Option<String> {
    // Without a trailing slash, because no file is found with one.
    let path: PathBuf = path.components().collect();
    for place in path.ancestors() {
        let place = if place.as_os_str().is_empty() { Path::new(".") } else { place };
        let shown = place.display();
        return match std::fs::metadata(place) {
            Err(err) if err.kind() == ErrorKind::NotFound && place.is_symlink() => {
                Some(format!("expected a folder, found a broken link at {shown}"))
            }
            Ok(metadata) if !metadata.is_dir() => Some(format!("expected a folder, found a file at {shown}")),
            Ok(_) => {
                may_write(place).map(|err| format!("expected a folder this user can write to, found {shown}: {err}"))
            }
            // It would be created.
            Err(err) if matches!(err.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => continue,
            Err(err) => Some(format!("expected a folder, found {shown}: {err}")),
        };
    }
    None
}

#[cfg(unix)]
fn may_write(folder: &Path) -> Option<std::io::Error> {
    use rustix::fs::Access;
    rustix::fs::access(folder, Access::WRITE_OK | Access::EXEC_OK).err().map(Into::into)
}

/// Not checked here: an error appears at the first use.
#[cfg(not(unix))]
fn may_write(_: &Path) -> Option<std::io::Error> {
    None
}

/// The mistake in the host name of a URL that no look-up could find.
#[must_use]
pub fn host_problem(url: &Url) -> Option<String> {
    let Some(Host::Domain(name)) = url.host() else { return None };
    (!is_name(name)).then(|| {
        format!(
            "expected a host of names with 1 to {LABEL_BYTES_MAX} characters between dots, none with a hyphen at its start \
             or end, found {name:?}; correct the host"
        )
    })
}

/// The same for a proxy. No part of its URL may be repeated.
pub(super) fn proxy_problem(url: &str) -> Option<String> {
    let whole = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
    let problem = Url::parse(&whole).ok().and_then(|url| host_problem(&url))?;
    let (expected, _) = problem.split_once(", found ")?;
    Some(format!("{expected}; correct the host of the proxy"))
}

/// Names between dots. A dot may follow the last one.
fn is_name(host: &str) -> bool {
    let name = host.strip_suffix('.').unwrap_or(host);
    let is_label =
        |label: &str| (1..=LABEL_BYTES_MAX).contains(&label.len()) && !label.starts_with('-') && !label.ends_with('-');
    name.len() <= HOST_BYTES_MAX && name.split('.').all(is_label)
}

impl Parser<'_> {
    /// Notes a folder that cannot be used.
    pub(super) fn check_folder(&mut self, name: &str, path: &Path) {
        if let Some(problem) = folder_problem(path) {
            self.mistake(name, problem);
        }
    }

    /// Notes that another user owns the folder of this user, if it will be used.
    pub(super) fn check_default_folder(&mut self) {
        if self.optional("SCRATCH_DIR").is_none()
            && let Some(problem) = foreign_problem(&super::default_scratch_dir())
        {
            self.mistake("SCRATCH_DIR", problem);
        }
    }

    pub(super) fn scratch_dir(&self) -> PathBuf {
        self.optional("SCRATCH_DIR").map_or_else(super::default_scratch_dir, PathBuf::from)
    }

    /// Hosts, with or without a port each.
    pub(super) fn hosts(&mut self, name: &str) -> Vec<String> {
        let hosts = self.list(name);
        let mut invalid: Vec<String> =
            hosts.iter().filter(|host| !is_host(host)).map(|host| format!("{host:?}")).collect();
        if hosts.is_empty() {
            // A list of only commas must not allow every host.
            invalid.extend(self.optional(name).map(|text| format!("{text:?}")));
        }
        if !invalid.is_empty() {
            let invalid = invalid.join(", ");
            self.mistake(
                name,
                format_args!("expected hosts such as data.example or data.example:8443, found {invalid}"),
            );
        }
        hosts
    }

    /// Warns of invalid entries in a list of hosts without a proxy. They are not mistakes, because other programs read
    /// the list too.
    pub(super) fn check_no_proxy(&mut self, name: &str) {
        let invalid: Vec<String> = self.list(name).into_iter().filter(|entry| !is_no_proxy_entry(entry)).collect();
        for entry in invalid {
            self.warning(name, format_args!("{entry:?} is not a host, domain or network and has no effect"));
        }
    }
}

/// `text` is in lower case. IPv6 addresses have brackets or not.
fn is_host(text: &str) -> bool {
    let Ok(url) = Url::parse(&format!("http://{text}")) else { return text.parse::<IpAddr>().is_ok() };
    // Only the canonical form can match.
    let port = url.host_str().and_then(|host| text.strip_prefix(host));
    let is_port = |port: &str| port.strip_prefix(':').is_some_and(|port| port.parse::<u16>().is_ok());
    if host_problem(&url).is_some() {
        return false;
    }
    port.is_some_and(|port| port.is_empty() || is_port(port)) && !text.contains('*')
}

/// `*`, an address, a network such as `10.0.0.0/8`, a host or a domain. A leading dot is allowed.
fn is_no_proxy_entry(text: &str) -> bool {
    if let Some((address, bits)) = text.split_once('/') {
        let bits_max = match address.parse() {
            Ok(IpAddr::V4(_)) => 32,
            Ok(IpAddr::V6(_)) => 128,
            Err(_) => return false,
        };
        return bits.parse::<u8>().is_ok_and(|bits| bits <= bits_max);
    }
    let domain = text.strip_prefix('.').unwrap_or(text);
    text == "*" || text.parse::<IpAddr>().is_ok() || (is_host(domain) && !domain.contains(':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_folder_passes_and_path_through_file_fails() {
        let base = tempfile::tempdir().expect("a folder");
        let file = base.path().join("file");
        std::fs::write(&file, "").expect("written");
        assert_eq!(folder_problem(base.path()), None);
        assert_eq!(folder_problem(&base.path().join("a/b/c")), None);
        assert_eq!(folder_problem(Path::new("not-there/yet")), None);
        let problem = format!("expected a folder, found a file at {}", file.display());
        for below in ["", "a", "a/b"] {
            assert_eq!(folder_problem(&file.join(below)).as_deref(), Some(&*problem), "{below}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn folders_are_compared_with_links_resolved() {
        let base = tempfile::tempdir().expect("a folder");
        let at = |inside: &str| base.path().join(inside);
        std::fs::create_dir(at("a")).expect("made");
        std::os::unix::fs::symlink(at("a"), at("link")).expect("made");
        std::os::unix::fs::symlink("/proc", at("kernel")).expect("made");
        std::os::unix::fs::symlink(at("none"), at("lost")).expect("made");
        for same in ["a", "a/", "a/.", "link", "link/../a", "not/../a", "a/not/.."] {
            assert!(
                conflict(&at("a"), &at(same)).is_some_and(|problem| problem.contains("name two folders")),
                "{same}"
            );
        }
        for apart in ["b", "a/state", "link/x/node-1", "not/there"] {
            assert_eq!(conflict(&at("a"), &at(apart)), None, "{apart}");
        }
        assert_eq!(conflict(&at("a/node-1"), &at("a")), None, "only folders in SCRATCH_DIR are removed");
        for swept in ["a/node-1", "link/node-x/deep"] {
            assert!(
                conflict(&at("a"), &at(swept)).is_some_and(|problem| problem.contains("is removed at a start")),
                "{swept}"
            );
        }
        for kernel_folder in ["/proc", "/proc/self/x", "/sys/none", "/dev/", "/dev/shm/../x", "/dev/null"] {
            let problem = folder_problem(Path::new(kernel_folder)).expect(kernel_folder);
            assert!(problem.contains("expected a folder for files, found "), "{problem}");
        }
        let problem = folder_problem(&at("kernel/x")).expect("the kernel's");
        assert!(problem.ends_with(", which is /proc/x; name one that is not below /proc"), "{problem}");
        let problem = folder_problem(&at("lost/x")).expect("a broken link");
        assert_eq!(problem, format!("expected a folder, found a broken link at {}", at("lost").display()));
        assert_eq!(kernel_problem(Path::new("/dev/shm/x")), None);
        assert_eq!(kernel_problem(Path::new("/process")), None);
    }

    #[test]
    fn unresolvable_host_names_are_rejected_without_leaking_secrets() {
        let problem = |host: &str| host_problem(&Url::parse(&format!("http://{host}/x")).expect("a URL"));
        let long = "a".repeat(63);
        for good in ["a", "a.b", "a.b.", "a_b", "a--b", "xn--bcher-kva.example", "1.2.3.4", "[::1]", &long] {
            assert_eq!(problem(good), None, "{good}");
        }
        let longer = "a".repeat(64);
        let deep = format!("{}e", "a.".repeat(127));
        for bad in ["a..b", ".a", "-x", "x-", "a.-b", "a..", &longer, &deep] {
            let problem = problem(bad).expect(bad);
            assert!(problem.ends_with(&format!("found {bad:?}; correct the host")), "{problem}");
        }
        let problem = proxy_problem("http://me:secret@a..b:1").expect("no host");
        assert!(!problem.contains("secret") && !problem.contains("a..b"), "{problem}");
    }

    #[cfg(unix)]
    #[test]
    fn unwritable_folder_is_a_problem() {
        use std::os::unix::fs::PermissionsExt as _;
        let base = tempfile::tempdir().expect("a folder");
        std::fs::set_permissions(base.path(), std::fs::Permissions::from_mode(0o500)).expect("ours");
        // The superuser has access to every folder.
        let open = rustix::process::geteuid().is_root();
        let problem = folder_problem(&base.path().join("a"));
        let wanted = format!("expected a folder this user can write to, found {}: ", base.path().display());
        assert_eq!(problem.is_none(), open, "{problem:?}");
        assert!(problem.is_none_or(|problem| problem.starts_with(&wanted)));
    }

    #[test]
    fn host_check_rejects_names_that_never_match() {
        for good in
            ["data.example", "data.example:8443", "10.0.0.1", "10.0.0.1:80", "::1", "[::1]", "[::1]:8443", "a_b"]
        {
            assert!(is_host(good), "{good}");
        }
        for bad in [
            "https://data.example",
            "a/b",
            "*.example",
            "a b",
            "me@a",
            "a:port",
            "a:",
            "a:70000",
            "b\u{fc}cher.example",
            ":1",
            "a..b",
            "-a.example",
            "a-:80",
        ] {
            assert!(!is_host(bad), "{bad}");
        }
    }

    #[test]
    fn no_proxy_check_rejects_entries_without_effect() {
        for good in ["*", "a.example", ".a.example", "10.0.0.1", "10.0.0.0/8", "::1", "fd00::/8", "localhost"] {
            assert!(is_no_proxy_entry(good), "{good}");
        }
        for bad in
            ["*.example", "a.example:8080", "http://a.example", "10.0.0.0/33", "10.0/8", "a/8", "[::1]", "a b", "."]
        {
            assert!(!is_no_proxy_entry(bad), "{bad}");
        }
    }
}
