//! Measures that memory grows with the voxels, not with the points. Ten million points are read, but they never
//! exist all at once. The test has its own binary, because its counting allocator is global.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{self, BufWriter, Read};
use std::sync::atomic::{AtomicUsize, Ordering};

use pointcloud::downsample::{self, Settings, Source};
use pointcloud::ply::Encoding;
use pointcloud::synth::{self, Scan};
use pointcloud::voxel::{Grid, VoxelSize};

/// The system's allocator, with counters of the current and the highest use.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

impl Counting {
    fn took(bytes: usize) {
        let held = HELD.fetch_add(bytes, Ordering::Relaxed) + bytes;
        PEAK.fetch_max(held, Ordering::Relaxed);
    }
}

// SAFETY: every call goes to the system's allocator unchanged, and its answer is returned unchanged. In addition
// only two counters change, and they allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::took(layout.size());
        // SAFETY: the caller keeps the contract of `alloc`. It is the same contract here and there.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `place` came from `alloc` above, so from the system's allocator, with this layout.
        unsafe { System.dealloc(place, layout) }
    }
}

/// A scan that is generated while it is read.
struct Made {
    points: u64,
}

/// One row of `write_scan`: three floats and three bytes.
const ROW_BYTES: u64 = 15;

impl Source for Made {
    fn label(&self) -> &str {
        "made scan"
    }

    fn bytes(&self) -> u64 {
        self.points * ROW_BYTES
    }

    fn open(&self) -> io::Result<Box<dyn Read + '_>> {
        let (reader, writer) = io::pipe()?;
        let points = self.points;
        // The thread ends with the reader at the latest. Writing to a pipe without a reader is an error.
        std::thread::spawn(move || {
            synth::write_scan(BufWriter::with_capacity(64 * 1024, writer), 1, points, Encoding::LittleEndian)
        });
        Ok(Box::new(reader))
    }
}

/// Returns the result of the job and its peak memory use in bytes. Memory that was in use before does not count.
fn measure(what: &str, points: u64, job: impl FnOnce() -> u64) -> (u64, usize) {
    let before = HELD.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let voxels = job();
    let peak = PEAK.load(Ordering::Relaxed) - before;
    println!("{what}, {points} points: {voxels} voxels, {:.1} MiB at most", peak as f64 / f64::from(1 << 20));
    (voxels, peak)
}

fn check((few_voxels, few): (u64, usize), (many_voxels, many): (u64, usize), most: usize) {
    assert!(few_voxels > 10_000, "{few_voxels} voxels are too few to tell anything");
    // Ten times the points also reach a few cubes that the surface only touches.
    assert!(many_voxels.abs_diff(few_voxels) * 10 < few_voxels, "not equal voxels: {few_voxels} and {many_voxels}");
    assert!(many < few + few / 5, "{many} bytes for ten million points, {few} for one million");
    assert!(many < most, "{many} bytes");
}

// This is one test, because two concurrent tests would count each other's bytes.
#[test]
fn memory_use_is_independent_of_point_count() {
    let size = VoxelSize::new(0.006).expect("a size above 0");

    // The whole job. The picture takes most of its memory. Ten million positions alone would be 114 MiB.
    let whole = |points| {
        measure("whole job", points, || {
            let settings = Settings { voxel: Some(size) };
            let made = [Made { points }];
            let outcome = downsample::run(&made, settings, io::sink(), &|_| (), &|| false).expect("a good scan");
            assert_eq!(outcome.report.points_in, points);
            outcome.report.points_out
        })
    };
    check(whole(1_000_000), whole(10_000_000), 64 << 20);

    // The grid alone. No other use of memory hides it here.
    let grid = |points| {
        measure("grid alone", points, || {
            let mut grid = Grid::new(size);
            Scan::new(1, points).for_each(|point| grid.add(&point).expect("near the origin"));
            grid.into_cloud().len() as u64
        })
    };
    check(grid(1_000_000), grid(10_000_000), 16 << 20);
}
