//! The whole job: it reads clouds and makes one thinner cloud, a picture and a report.
//!
//! [`run`] is the only entry point. It does not depend on a host. It reads from [`Source`]s. It reports progress to
//! one callback and checks for cancellation with another. If the voxel size must be derived from the size of the
//! cloud, the sources are read twice. Keeping the points in memory would cost what the grid saves.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cloud::{Bounds, Cancelled, Point};
use crate::ply::{Encoding, Layout, PlyError, Reader, Writer};
use crate::preview;
use crate::voxel::{Grid, VoxelError, VoxelSize};

/// A cloud is at most this many voxels long by default. This is one voxel for every second pixel of the picture.
const VOXELS_ALONG: f64 = 256.0;
/// Larger coordinates would overflow when they are added.
const REACH_MAX: f64 = 1e100;
/// A point has at least three bytes. Thus this many bytes hold fewer than 65 536 points, the most between two
/// checks for cancellation.
const READ_BYTES: usize = 64 * 1024;
/// Number of points written between two such checks.
const WRITE_POINTS: usize = 16 * 1024;

/// A source of a cloud that can be read more than once.
pub trait Source {
    /// The name in errors.
    fn label(&self) -> &str;
    /// The size, to compute the progress of reading. It need not be exact.
    fn bytes(&self) -> u64;
    /// Starts reading from the beginning.
    fn open(&self) -> io::Result<Box<dyn Read + '_>>;
}

/// A file as a source.
#[derive(Clone, Debug)]
pub struct FileSource {
    label: String,
    path: PathBuf,
    bytes: u64,
}

impl FileSource {
    /// The file at `path`, called `label` in errors.
    pub fn new(label: impl Into<String>, path: impl Into<PathBuf>) -> io::Result<Self> {
        let path = path.into();
        let bytes = std::fs::metadata(&path)?.len();
        Ok(Self { label: label.into(), path, bytes })
    }
}

impl Source for FileSource {
    fn label(&self) -> &str {
        &self.label
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn open(&self) -> io::Result<Box<dyn Read + '_>> {
        Ok(Box::new(File::open(&self.path)?))
    }
}

/// The settings of the caller.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Settings {
    /// The side of a voxel, in the unit of the file. When absent, it is derived from the size of the cloud.
    pub voxel: Option<VoxelSize>,
}

impl Settings {
    /// Reads the settings from a task's `meta`. Unknown keys are ignored.
    pub fn from_meta(meta: &Value) -> Result<Self, DownsampleError> {
        let voxel = match meta.get("voxel") {
            None | Some(Value::Null) => None,
            Some(given) => {
                let size = given.as_f64().and_then(|size| VoxelSize::new(size).ok());
                Some(size.ok_or_else(|| DownsampleError::Meta { found: shorten(given) })?)
            }
        };
        Ok(Self { voxel })
    }
}

fn shorten(value: &Value) -> String {
    const SHOWN_MAX: usize = 40;
    let text = value.to_string();
    match text.char_indices().nth(SHOWN_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// The current stage of the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Measuring the size of the cloud.
    Measuring,
    /// Filling the grid.
    Reading,
    /// Drawing the picture.
    Drawing,
    /// Writing the thinner cloud.
    Writing,
}

impl Stage {
    /// The name of the stage for people and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Measuring => "measuring",
            Self::Reading => "reading",
            Self::Drawing => "drawing",
            Self::Writing => "writing",
        }
    }
}

/// The progress of the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The current stage.
    pub stage: Stage,
    /// The completed share of the whole job. It never decreases.
    pub percent: u8,
}

/// The result without the cloud.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The picture, as PNG.
    pub preview: Vec<u8>,
    /// The figures.
    pub report: Report,
}

/// The figures of one run.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Number of points read. Skipped points are included.
    pub points_in: u64,
    /// Number of points written, one per voxel.
    pub points_out: u64,
    /// Number of points without finite coordinates.
    pub skipped: u64,
    /// The voxel side that was used.
    pub voxel: f64,
    /// The box around the points read.
    pub bounds: Bounds,
    /// Duration from start to end.
    pub elapsed: Duration,
}

impl Report {
    /// The report as the runner publishes it.
    pub fn to_json(&self) -> Value {
        json!({
            "points_in": self.points_in,
            "points_out": self.points_out,
            "skipped": self.skipped,
            "voxel": self.voxel,
            "bounds": { "min": self.bounds.min, "max": self.bounds.max },
            "elapsed_ms": u64::try_from(self.elapsed.as_millis()).unwrap_or(u64::MAX),
        })
    }
}

/// The reason why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum DownsampleError {
    /// The caller cancelled the job.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    /// There is nothing to read.
    #[error("expected at least one PLY file as input, found none")]
    NoInput,
    /// `meta.voxel` is invalid.
    #[error("meta.voxel: expected a number above 0, found {found}")]
    Meta {
        /// The value as given, shortened.
        found: String,
    },
    /// A file is invalid.
    #[error("{label} is not a readable PLY file")]
    Ply {
        /// The source.
        label: String,
        /// What is wrong with it.
        #[source]
        source: PlyError,
    },
    /// A coordinate is too large to be plausible.
    #[error("{label}: expected coordinates within {REACH_MAX:e} of the origin, found {found:e}")]
    TooFar {
        /// The source.
        label: String,
        /// The coordinate.
        found: f64,
    },
    /// All files together have no usable point.
    #[error("expected points with finite coordinates, found none ({skipped} skipped)")]
    NoPoints {
        /// Number of points without finite coordinates.
        skipped: u64,
    },
    /// The voxel size does not fit the cloud.
    #[error(transparent)]
    Voxel(#[from] VoxelError),
    /// A file could not be opened.
    #[error("{label} could not be opened")]
    Open {
        /// The source.
        label: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The result could not be written.
    #[error("the result could not be written")]
    Write(#[source] io::Error),
}

impl DownsampleError {
    /// Whether the same input fails again on every node.
    pub fn is_invalid_input(&self) -> bool {
        match self {
            Self::Ply { source, .. } => !matches!(source, PlyError::Read(_)),
            Self::NoInput | Self::Meta { .. } | Self::TooFar { .. } | Self::NoPoints { .. } | Self::Voxel(_) => true,
            Self::Cancelled(_) | Self::Open { .. } | Self::Write(_) => false,
        }
    }
}

/// Merges all sources into one grid and writes its points to `cloud` as binary PLY.
///
/// `progress` is called when the stage or the percentage changes. `cancelled` is called at least once per 65 536
/// points.
pub fn run<S: Source>(
    sources: &[S],
    settings: Settings,
    cloud: impl Write,
    progress: &dyn Fn(Progress),
    cancelled: &dyn Fn() -> bool,
) -> Result<Outcome, DownsampleError> {
    let started = Instant::now();
    if sources.is_empty() {
        return Err(DownsampleError::NoInput);
    }
    let watch = Watch { progress, cancelled, last: Cell::new(None) };

    let (size, read_from) = match settings.voxel {
        Some(size) => (size, 0),
        None => {
            let mut bounds = None;
            let seen = each_point(sources, &watch, Stage::Measuring, 0..45, |point| {
                Bounds::extend(&mut bounds, point.position);
                Ok(())
            })?;
            let bounds = bounds.ok_or(DownsampleError::NoPoints { skipped: seen.skipped })?;
            (default_size(&bounds)?, 45)
        }
    };

    let mut grid = Grid::new(size);
    let mut bounds = None;
    let seen = each_point(sources, &watch, Stage::Reading, read_from..85, |point| {
        Bounds::extend(&mut bounds, point.position);
        grid.add(&point).map_err(DownsampleError::Voxel)
    })?;
    let bounds = bounds.ok_or(DownsampleError::NoPoints { skipped: seen.skipped })?;

    watch.step(Stage::Drawing, 85)?;
    let points = grid.into_cloud();
    let preview = preview::draw(&points, size.get(), cancelled)?;

    watch.step(Stage::Writing, 92)?;
    write(cloud, &points, &bounds, size, &watch)?;
    watch.report(Stage::Writing, 100);
    let report = Report {
        points_in: seen.points,
        points_out: points.len() as u64,
        skipped: seen.skipped,
        voxel: size.get(),
        bounds,
        elapsed: started.elapsed(),
    };
    Ok(Outcome { preview, report })
}

/// Divides the diagonal of the cloud into as many voxels as the picture can show.
fn default_size(bounds: &Bounds) -> Result<VoxelSize, VoxelError> {
    let diagonal = bounds.diagonal();
    // For a single position any size is valid. Far from the origin a fine grid would have cubes that cannot be
    // distinguished.
    let size = if diagonal > 0.0 { diagonal / VOXELS_ALONG } else { 1.0 };
    VoxelSize::new(size.max(VoxelSize::least_at(bounds.reach())))
}

fn write(
    to: impl Write,
    points: &[Point],
    bounds: &Bounds,
    size: VoxelSize,
    watch: &Watch<'_>,
) -> Result<(), DownsampleError> {
    // A float moves a point by up to 2^-24 of its distance from the origin. For georeferenced scans that is more
    // than a voxel. Doubles are written where the difference would show.
    let moved = bounds.reach() / f64::from(1_u32 << 24);
    let wide = moved > size.get() / 100.0 || bounds.reach() > f64::from(f32::MAX);
    let color = points.iter().any(|point| point.color.is_some());
    let layout = Layout { encoding: Encoding::LittleEndian, wide, color };
    let to = io::BufWriter::with_capacity(READ_BYTES, to);
    let mut writer = Writer::new(to, layout, points.len() as u64).map_err(DownsampleError::Write)?;
    for (round, some) in points.chunks(WRITE_POINTS).enumerate() {
        watch.step(Stage::Writing, 92 + (7 * round * WRITE_POINTS / points.len()) as u8)?;
        for point in some {
            writer.point(point).map_err(DownsampleError::Write)?;
        }
    }
    writer.finish().map(drop).map_err(DownsampleError::Write)
}

#[derive(Default)]
struct Seen {
    points: u64,
    skipped: u64,
}

/// Reads all sources once. Meanwhile the percentage moves through `span`.
fn each_point<S: Source>(
    sources: &[S],
    watch: &Watch<'_>,
    stage: Stage,
    span: std::ops::Range<u8>,
    mut take: impl FnMut(Point) -> Result<(), DownsampleError>,
) -> Result<Seen, DownsampleError> {
    watch.step(stage, span.start)?;
    let total = sources.iter().map(Source::bytes).fold(0, u64::saturating_add).max(1);
    let done = Cell::new(0_u64);
    let mut seen = Seen::default();
    for source in sources {
        let label = || source.label().to_owned();
        let wrong = |error: PlyError| match error {
            PlyError::Read(inner) if inner.get_ref().is_some_and(|inner| inner.is::<Cancelled>()) => Cancelled.into(),
            error => DownsampleError::Ply { label: label(), source: error },
        };
        let file = source.open().map_err(|error| DownsampleError::Open { label: label(), source: error })?;
        let metered = Metered {
            from: file,
            on_read: |bytes: usize| {
                done.set(done.get().saturating_add(bytes as u64));
                let share = (done.get() as f64 / total as f64).min(1.0);
                watch.step(stage, span.start + (share * f64::from(span.end - span.start)) as u8)
            },
        };
        let mut reader = Reader::new(BufReader::with_capacity(READ_BYTES, metered)).map_err(wrong)?;
        while let Some(point) = reader.next_point().map_err(wrong)? {
            if let Some(found) = point.position.into_iter().find(|value| value.abs() > REACH_MAX) {
                return Err(DownsampleError::TooFar { label: label(), found });
            }
            seen.points += 1;
            take(point)?;
        }
        seen.points += reader.skipped();
        seen.skipped += reader.skipped();
    }
    Ok(seen)
}

/// A reader that counts bytes. It fails after the job is cancelled.
struct Metered<R, F> {
    from: R,
    on_read: F,
}

impl<R: Read, F: FnMut(usize) -> Result<(), Cancelled>> Read for Metered<R, F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.from.read(buffer)?;
        (self.on_read)(bytes).map_err(io::Error::other)?;
        Ok(bytes)
    }
}

/// The two callbacks and the last reported progress.
struct Watch<'a> {
    progress: &'a dyn Fn(Progress),
    cancelled: &'a dyn Fn() -> bool,
    last: Cell<Option<Progress>>,
}

impl Watch<'_> {
    /// Reports the progress, unless the job is cancelled.
    fn step(&self, stage: Stage, percent: u8) -> Result<(), Cancelled> {
        if (self.cancelled)() {
            return Err(Cancelled);
        }
        self.report(stage, percent);
        Ok(())
    }

    fn report(&self, stage: Stage, percent: u8) {
        let now = Progress { stage, percent };
        if self.last.replace(Some(now)) != Some(now) {
            (self.progress)(now);
        }
    }
}

#[cfg(test)]
mod tests;
