//! Whether what a setting names can be used: folders to work in, hosts to speak to. Nothing is made and
//! nobody is asked.

use std::{
    io::ErrorKind,
    net::IpAddr,
    path::{Path, PathBuf},
};

use url::Url;

use super::parser::Parser;

/// Why no folder can be made or written to at `path`, if that shows by looking.
pub(super) fn folder_trouble(path: &Path) -> Option<String> {
    // Without a slash at its end, behind which no file is found.
    let path: PathBuf = path.components().collect();
    for place in path.ancestors() {
        let place = if place.as_os_str().is_empty() { Path::new(".") } else { place };
        let shown = place.display();
        return match std::fs::metadata(place) {
            Ok(about) if !about.is_dir() => Some(format!("expected a folder, found a file at {shown}")),
            Ok(_) => {
                may_write(place).map(|err| format!("expected a folder this user can write to, found {shown}: {err}"))
            }
            // It would be made.
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

/// It shows when it is tried.
#[cfg(not(unix))]
fn may_write(_: &Path) -> Option<std::io::Error> {
    None
}

impl Parser<'_> {
    /// Notes a folder that cannot be used.
    pub(super) fn look_at_folder(&mut self, name: &str, path: &Path) {
        if let Some(trouble) = folder_trouble(path) {
            self.mistake(name, trouble);
        }
    }

    pub(super) fn scratch_dir(&self) -> PathBuf {
        self.optional("SCRATCH_DIR").map_or_else(super::default_scratch_dir, PathBuf::from)
    }

    /// Hosts, with or without a port each.
    pub(super) fn hosts(&mut self, name: &str) -> Vec<String> {
        let hosts = self.list(name);
        let mut odd: Vec<String> = hosts.iter().filter(|host| !is_host(host)).map(|host| format!("{host:?}")).collect();
        if hosts.is_empty() {
            // Who lists nothing but commas does not mean that every host is allowed.
            odd.extend(self.optional(name).map(|text| format!("{text:?}")));
        }
        if !odd.is_empty() {
            let odd = odd.join(", ");
            self.mistake(name, format_args!("expected hosts such as data.example or data.example:8443, found {odd}"));
        }
        hosts
    }

    /// Warns of entries that a list of hosts without proxy cannot hold: other programs read it too, so
    /// they are no mistake.
    pub(super) fn look_at_unproxied(&mut self, name: &str) {
        let odd: Vec<String> = self.list(name).into_iter().filter(|entry| !is_unproxied(entry)).collect();
        for entry in odd {
            self.warning(name, format_args!("{entry:?} is no host, domain or network and has no effect"));
        }
    }
}

/// `text` is in lower case. Addresses of version 6 stand with or without brackets.
fn is_host(text: &str) -> bool {
    let Ok(url) = Url::parse(&format!("http://{text}")) else { return text.parse::<IpAddr>().is_ok() };
    // What is not written as it is compared is never met.
    let port = url.host_str().and_then(|host| text.strip_prefix(host));
    let is_port = |port: &str| port.strip_prefix(':').is_some_and(|port| port.parse::<u16>().is_ok());
    port.is_some_and(|port| port.is_empty() || is_port(port)) && !text.contains('*')
}

/// `*`, an address, a network such as `10.0.0.0/8`, a host or a domain, also with a dot in front.
fn is_unproxied(text: &str) -> bool {
    if let Some((address, bits)) = text.split_once('/') {
        let most = match address.parse() {
            Ok(IpAddr::V4(_)) => 32,
            Ok(IpAddr::V6(_)) => 128,
            Err(_) => return false,
        };
        return bits.parse::<u8>().is_ok_and(|bits| bits <= most);
    }
    let domain = text.strip_prefix('.').unwrap_or(text);
    text == "*" || text.parse::<IpAddr>().is_ok() || (is_host(domain) && !domain.contains(':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_looked_at_where_it_is_or_would_be_made() {
        let base = tempfile::tempdir().expect("a folder");
        let file = base.path().join("file");
        std::fs::write(&file, "").expect("written");
        assert_eq!(folder_trouble(base.path()), None);
        assert_eq!(folder_trouble(&base.path().join("a/b/c")), None);
        assert_eq!(folder_trouble(Path::new("not-there/yet")), None);
        let said = format!("expected a folder, found a file at {}", file.display());
        for below in ["", "a", "a/b"] {
            assert_eq!(folder_trouble(&file.join(below)).as_deref(), Some(&*said), "{below}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_of_others_is_told() {
        use std::os::unix::fs::PermissionsExt as _;
        let base = tempfile::tempdir().expect("a folder");
        std::fs::set_permissions(base.path(), std::fs::Permissions::from_mode(0o500)).expect("ours");
        // Nothing is closed to the superuser.
        let open = rustix::process::geteuid().is_root();
        let said = folder_trouble(&base.path().join("a"));
        let wanted = format!("expected a folder this user can write to, found {}: ", base.path().display());
        assert_eq!(said.is_none(), open, "{said:?}");
        assert!(said.is_none_or(|said| said.starts_with(&wanted)));
    }

    #[test]
    fn hosts_are_told_from_what_can_never_match() {
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
        ] {
            assert!(!is_host(bad), "{bad}");
        }
    }

    #[test]
    fn entries_without_proxy_are_told_from_what_has_no_effect() {
        for good in ["*", "a.example", ".a.example", "10.0.0.1", "10.0.0.0/8", "::1", "fd00::/8", "localhost"] {
            assert!(is_unproxied(good), "{good}");
        }
        for bad in
            ["*.example", "a.example:8080", "http://a.example", "10.0.0.0/33", "10.0/8", "a/8", "[::1]", "a b", "."]
        {
            assert!(!is_unproxied(bad), "{bad}");
        }
    }
}
