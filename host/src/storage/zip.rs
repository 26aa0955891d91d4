//! Zip inputs, unpacked next to the archive.
//!
//! [`unpack`] trusts no content of an archive. Names must stay below the target folder and differ in more
//! than case. Entries are plain files or folders that share no byte. Counts and sizes are bounded before and
//! during the write. An archive that breaks a rule is refused as a whole, with one line.
//!
//! Files are written one after the other in blocks, so an archive of any size needs the same memory. Only its
//! directory is held in memory, and that is bounded too.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use tokio_util::{sync::CancellationToken, task::task_tracker::TaskTrackerToken};
use zip::{CompressionMethod, ZipArchive, result::ZipError};

use super::naming::{dataset_folder, for_message};
use crate::model::{PortError, PortErrorKind};

/// Bytes of one read from an archive.
const BLOCK_BYTES: usize = 128 * 1024;
/// An archive of at most so many bytes may unpack to any multiple of its size.
const RATIO_FREE_BYTES: u64 = 16 << 20;
/// Largest directory of an archive, in bytes. It is held in memory.
const DIRECTORY_BYTES_MAX: u64 = 64 << 20;
/// Longest path of an entry, and longest name in it, in bytes. File systems accept no longer names.
const PATH_BYTES_MAX: usize = 1024;
const NAME_BYTES_MAX: usize = 255;

/// Limits for the content of an archive.
#[derive(Clone, Debug)]
pub struct UnpackLimits {
    /// Most files and folders.
    pub files: u64,
    /// Most bytes of all files together.
    pub bytes: u64,
    /// Most bytes of all files together, as a multiple of the archive's size. Not checked up to 16 MiB.
    pub ratio: u64,
}

impl Default for UnpackLimits {
    fn default() -> Self {
        Self { files: 65_536, bytes: 16 << 30, ratio: 200 }
    }
}

/// Why an archive was not unpacked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UnpackError {
    #[error("it is not a valid zip archive: {0}")]
    Invalid(String),
    #[error("its entry {name} {why}")]
    Entry { name: String, why: String },
    #[error("its directory lists {0} twice, or both as a file and as a folder")]
    Twice(String),
    #[error("its entries overlap")]
    Overlap,
    #[error("it contains {found} files and folders, at most {max} are allowed (UNPACK_FILES_MAX)")]
    Files { found: u64, max: u64 },
    #[error("its directory has {found} bytes, at most {DIRECTORY_BYTES_MAX} are read")]
    Directory { found: u64 },
    #[error("it unpacks to {found} bytes, at most {max} are allowed (UNPACK_BYTES_MAX)")]
    Bytes { found: u64, max: u64 },
    #[error("it unpacks to {found} bytes, more than {ratio} times its size (UNPACK_RATIO_MAX)")]
    Ratio { found: u64, ratio: u64 },
    #[error("it unpacks to {found} bytes, and {free} are free on the disk")]
    Space { found: u64, free: u64 },
    #[error("the task is over or cancelled")]
    Stopped,
    #[error("{path}: {source}", path = path.display())]
    Disk {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl UnpackError {
    fn kind(&self) -> PortErrorKind {
        match self {
            Self::Invalid(_) | Self::Entry { .. } | Self::Twice(_) | Self::Overlap => PortErrorKind::BadRequest,
            Self::Files { .. } | Self::Directory { .. } | Self::Bytes { .. } | Self::Ratio { .. } => {
                PortErrorKind::Limit
            }
            Self::Space { .. } | Self::Disk { .. } => PortErrorKind::Local,
            Self::Stopped => PortErrorKind::LeaseOver,
        }
    }
}

impl From<ZipError> for UnpackError {
    fn from(err: ZipError) -> Self {
        Self::Invalid(err.to_string())
    }
}

/// Whether data of this type is an archive to unpack. `zip_data` is the wire's type of a `.zip` file for which the
/// runner named none.
pub(crate) fn is_archive(data_type: &str) -> bool {
    matches!(data_type, "zip" | "zip_data") || data_type.ends_with("_zip")
}

/// The folder of an unpacked archive, below the input's root. For a refined scan it is the folder that later stages
/// expect. A `number` above 1 distinguishes several archives of one name in one answer.
pub(crate) fn folder(data_type: &str, name: &str, number: usize) -> PathBuf {
    let name = match number {
        1 => dataset_folder(name),
        more => format!("{}_{more}", dataset_folder(name)),
    };
    match data_type {
        "refined_scan_zip" => Path::new("refined/local").join(name).join("sfm"),
        _ => Path::new("unpacked").join(name),
    }
}

/// Runs [`unpack`] on the blocking pool until it is done or this future is dropped. The thread holds `busy` until
/// it has stopped.
pub(crate) async fn unpacked(
    what: &str,
    archive: PathBuf,
    into: PathBuf,
    limits: UnpackLimits,
    busy: Option<TaskTrackerToken>,
) -> Result<Vec<PathBuf>, PortError> {
    let stop = CancellationToken::new();
    let _stops_when_dropped = stop.clone().drop_guard();
    let work = tokio::task::spawn_blocking(move || {
        let _busy = busy;
        unpack(&archive, &into, &limits, &|| stop.is_cancelled())
    });
    let done = work.await.map_err(|err| PortError::new(PortErrorKind::Other, format!("{what} failed: {err}")))?;
    done.map_err(|err| PortError::new(err.kind(), format!("{what} refused: {err}")))
}

/// Unpacks `archive` into the new folder `into` and returns its files in the archive's order. Blocks.
pub(crate) fn unpack(
    archive: &Path,
    into: &Path,
    limits: &UnpackLimits,
    stopped: &dyn Fn() -> bool,
) -> Result<Vec<PathBuf>, UnpackError> {
    let disk = |path: &Path| {
        let path = path.to_owned();
        move |source| UnpackError::Disk { path, source }
    };
    let mut file = File::open(archive).map_err(disk(archive))?;
    let size = file.metadata().map_err(disk(archive))?.len();
    check_directory(&mut file, size, limits).map_err(disk(archive))??;
    let mut zip = ZipArchive::new(file)?;
    let entries = plan(&mut zip, size, limits)?;
    fs::create_dir_all(into).map_err(disk(into))?;
    check_space(&entries, into)?;

    let mut block = vec![0; BLOCK_BYTES];
    let mut files = Vec::new();
    let mut made = HashSet::new();
    for entry in entries {
        let folders = entry.path.ancestors().skip(usize::from(!entry.folder)).collect::<Vec<_>>();
        for folder in folders.into_iter().rev().filter(|folder| !folder.as_os_str().is_empty()) {
            if made.insert(folder.to_owned()) {
                // One at a time, so that a task directory that was removed during the loop is not created again.
                fs::create_dir(into.join(folder)).map_err(disk(&into.join(folder)))?;
            }
        }
        if entry.folder {
            continue;
        }
        let path = into.join(&entry.path);
        let mut target = File::create_new(&path).map_err(disk(&path))?;
        let mut source = zip.by_index(entry.index)?;
        let bad_entry = |why: &str| UnpackError::Entry { name: quoted(&entry.path), why: why.to_owned() };
        let mut left = entry.size;
        loop {
            if stopped() {
                return Err(UnpackError::Stopped);
            }
            let read = match source.read(&mut block) {
                Ok(0) => break,
                Ok(read) => read,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
                Err(err) => return Err(bad_entry(&format!("cannot be unpacked: {err}"))),
            };
            left = left.checked_sub(read as u64).ok_or_else(|| bad_entry("is longer than its directory says"))?;
            target.write_all(&block[..read]).map_err(disk(&path))?;
        }
        if left > 0 {
            return Err(bad_entry("is shorter than its directory says"));
        }
        files.push(path);
    }
    Ok(files)
}

/// An entry that passed all checks.
struct Entry {
    index: usize,
    path: PathBuf,
    folder: bool,
    size: u64,
}

/// Checks a whole archive before anything is written.
fn plan(zip: &mut ZipArchive<File>, archive_bytes: u64, limits: &UnpackLimits) -> Result<Vec<Entry>, UnpackError> {
    let found = zip.len() as u64;
    if found > limits.files {
        return Err(UnpackError::Files { found, max: limits.files });
    }
    if zip.has_duplicate_names() {
        return Err(UnpackError::Twice("a name".to_owned()));
    }
    if zip.has_overlapping_entries()? {
        return Err(UnpackError::Overlap);
    }
    let mut entries = Vec::with_capacity(zip.len());
    let (mut files, mut folders) = (HashSet::new(), HashSet::new());
    let mut total: u64 = 0;
    for index in 0..zip.len() {
        let entry = zip.by_index_data(index)?;
        let name = entry.name()?.into_owned();
        let refuse = |why: &str| UnpackError::Entry { name: for_message(&name), why: why.to_owned() };
        let path = safe_path(&name).map_err(refuse)?;
        let folder = name.ends_with('/');
        // The upper bits of the mode name the kind of file. Archives of some systems have none.
        let kind = entry.unix_mode().unwrap_or_default() & 0o170_000;
        match kind {
            0 | 0o100_000 if !folder => {}
            0 | 0o040_000 if folder => {}
            0o120_000 => return Err(refuse("is a link; only files and folders are unpacked")),
            _ => return Err(refuse("is a special file; only files and folders are unpacked")),
        }
        if entry.encrypted() {
            return Err(refuse("is encrypted; upload it unencrypted"));
        }
        if !matches!(entry.compression(), CompressionMethod::Stored | CompressionMethod::Deflated) {
            return Err(refuse("is compressed by another method than deflate"));
        }
        // Two names that differ only in case are one file on some systems.
        let key = |path: &Path| path.to_string_lossy().to_lowercase();
        let twice = || UnpackError::Twice(for_message(&name));
        if path.as_os_str().is_empty() {
            return Err(refuse("has no name"));
        }
        // From the inside out: if a folder is known, all folders above it are known.
        let known = |folders: &mut HashSet<String>, folder: &Path| !folders.insert(key(folder));
        for parent in path.ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty()) {
            if known(&mut folders, parent) {
                break;
            }
        }
        if folder {
            known(&mut folders, &path);
        } else if !files.insert(key(&path)) {
            return Err(twice());
        }
        // A name of a thousand bytes can name hundreds of folders.
        let found = (files.len() + folders.len()) as u64;
        if found > limits.files {
            return Err(UnpackError::Files { found, max: limits.files });
        }
        total = total.saturating_add(entry.size());
        entries.push(Entry { index, path, folder, size: entry.size() });
    }
    if let Some(both) = files.intersection(&folders).next() {
        return Err(UnpackError::Twice(for_message(both)));
    }
    if total > limits.bytes {
        return Err(UnpackError::Bytes { found: total, max: limits.bytes });
    }
    if total > RATIO_FREE_BYTES && total > archive_bytes.saturating_mul(limits.ratio) {
        return Err(UnpackError::Ratio { found: total, ratio: limits.ratio });
    }
    Ok(entries)
}

/// An entry's name as a path below the folder it is unpacked to.
fn safe_path(name: &str) -> Result<PathBuf, &'static str> {
    let drive = name.as_bytes().get(1) == Some(&b':') && name.as_bytes()[0].is_ascii_alphabetic();
    if name.starts_with('/') || drive {
        return Err("has an absolute path; only paths below the archive's folder are unpacked");
    }
    if name.contains(|c: char| c == '\\' || c.is_control()) {
        return Err("has a backslash or a control character in its name");
    }
    if name.len() > PATH_BYTES_MAX {
        return Err("has a path of more than 1024 bytes");
    }
    let mut path = PathBuf::new();
    for part in name.split('/').filter(|part| !part.is_empty() && *part != ".") {
        match part {
            ".." => return Err("would leave the folder it is unpacked to"),
            part if part.len() > NAME_BYTES_MAX => return Err("has a name of more than 255 bytes"),
            part => path.push(part),
        }
    }
    Ok(path)
}

/// Checks the size of the directory that the archive states, before the directory is read into memory.
fn check_directory(file: &mut File, size: u64, limits: &UnpackLimits) -> io::Result<Result<(), UnpackError>> {
    const END: &[u8] = b"PK\x05\x06";
    const END_BYTES: u64 = 22;
    const COMMENT_BYTES_MAX: u64 = 65_535;
    let from = size.saturating_sub(END_BYTES + COMMENT_BYTES_MAX + 20);
    let mut tail = Vec::new();
    file.seek(SeekFrom::Start(from))?;
    Read::by_ref(file).take(size - from).read_to_end(&mut tail)?;
    let number = |bytes: &[u8], at: usize, length: usize| {
        let bytes = bytes.get(at..at + length)?;
        Some(bytes.iter().rev().fold(0_u64, |number, byte| number << 8 | u64::from(*byte)))
    };
    let mut end = None;
    if let Some(at) = memchr::memmem::rfind(&tail, END) {
        let record = &tail[at..];
        end = number(record, 10, 2).zip(number(record, 12, 4));
        // Large archives have a second record. Its locator is before this one.
        let locator = at.checked_sub(20).map(|at| &tail[at..]).filter(|locator| locator.starts_with(b"PK\x06\x07"));
        if let Some(at) = locator.and_then(|locator| number(locator, 8, 8)).filter(|at| *at < size) {
            let mut record = Vec::new();
            file.seek(SeekFrom::Start(at))?;
            Read::by_ref(file).take(56).read_to_end(&mut record)?;
            end = number(&record, 32, 8).zip(number(&record, 40, 8)).or(end);
        }
    }
    file.seek(SeekFrom::Start(0))?;
    Ok(match end {
        None => Err(UnpackError::Invalid("its end is missing; is the upload complete?".to_owned())),
        Some((found, _)) if found > limits.files => Err(UnpackError::Files { found, max: limits.files }),
        Some((_, found)) if found > DIRECTORY_BYTES_MAX => Err(UnpackError::Directory { found }),
        Some(_) => Ok(()),
    })
}

/// Refuses an archive that is larger than the free space, before anything is written.
fn check_space(entries: &[Entry], into: &Path) -> Result<(), UnpackError> {
    #[cfg(unix)]
    {
        let stat =
            rustix::fs::statvfs(into).map_err(|err| UnpackError::Disk { path: into.to_owned(), source: err.into() })?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        let found = entries.iter().map(|entry| entry.size).fold(0, u64::saturating_add);
        if found > free {
            return Err(UnpackError::Space { found, free });
        }
    }
    #[cfg(not(unix))]
    let _ = (entries, into);
    Ok(())
}

fn quoted(path: &Path) -> String {
    for_message(&path.to_string_lossy())
}

#[cfg(test)]
#[path = "zip_tests.rs"]
mod tests;
