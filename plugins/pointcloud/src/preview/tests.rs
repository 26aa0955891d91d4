use super::*;
use crate::synth::{Random, Scan};

fn decode(file: &[u8]) -> Vec<[u8; 3]> {
    let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().expect("a PNG");
    let mut bytes = vec![0; reader.output_buffer_size().expect("a small image")];
    let info = reader.next_frame(&mut bytes).expect("a whole image");
    assert_eq!((info.width, info.height), (SIDE as u32, SIDE as u32));
    assert_eq!((info.color_type, info.bit_depth), (png::ColorType::Rgb, png::BitDepth::Eight));
    bytes.as_chunks::<3>().0.to_vec()
}

fn picture(cloud: &[Point], voxel: f64) -> Vec<[u8; 3]> {
    decode(&draw(cloud, voxel, &|| false).expect("nobody cancels"))
}

fn background() -> [u8; 3] {
    BACKGROUND.map(to_byte)
}

fn at(picture: &[[u8; 3]], column: usize, row: usize) -> [u8; 3] {
    picture[row * SIDE + column]
}

fn covered(picture: &[[u8; 3]]) -> f64 {
    picture.iter().filter(|pixel| **pixel != background()).count() as f64 / picture.len() as f64
}

/// The first and last covered column and row.
fn frame(picture: &[[u8; 3]]) -> [usize; 4] {
    let places = picture.iter().enumerate().filter(|(_, pixel)| **pixel != background());
    places.fold([SIDE, 0, SIDE, 0], |[left, right, top, bottom], (place, _)| {
        let (row, column) = (place / SIDE, place % SIDE);
        [left.min(column), right.max(column), top.min(row), bottom.max(row)]
    })
}

/// A ball without colours.
fn ball(points: usize, middle: [f64; 3], radius: f64) -> Vec<Point> {
    let turn = |index: usize| index as f64 * 2.399_963_229_728_653;
    (0..points)
        .map(|index| {
            let height = 1.0 - 2.0 * (index as f64 + 0.5) / points as f64;
            let ring = (1.0 - height * height).sqrt();
            let place = [ring * turn(index).cos(), ring * turn(index).sin(), height];
            let position = std::array::from_fn(|axis| middle[axis] + radius * place[axis]);
            Point { position, color: None }
        })
        .collect()
}

#[test]
fn ball_is_bright_and_centered_on_dark_background() {
    let picture = picture(&ball(20_000, [5e6, -3.0, 0.0], 2.0), 0.03);
    let middle = at(&picture, SIDE / 2, SIDE / 2);
    assert!(middle.iter().all(|channel| *channel > 120), "{middle:?}");
    for (column, row) in [(0, 0), (SIDE - 1, 0), (0, SIDE - 1), (SIDE - 1, SIDE - 1)] {
        let corner = at(&picture, column, row);
        assert!(corner.iter().all(|channel| *channel < 40), "{corner:?}");
    }
    // A disc of 88 % of the width covers 61 % of the picture. It is round, centred and solid.
    let share = covered(&picture);
    assert!((0.58..0.66).contains(&share), "{share}");
    let [left, right, top, bottom] = frame(&picture);
    assert!(left.abs_diff(top) <= 2 && right.abs_diff(bottom) <= 2, "{:?}", [left, right, top, bottom]);
    assert!((left + right).abs_diff(SIDE) <= 4, "{:?}", [left, right]);
    for row in 200..312 {
        for column in 200..312 {
            assert_ne!(at(&picture, column, row), background(), "a hole at {column}, {row}");
        }
    }
    // Light comes from the upper left.
    let sum = |column, row| at(&picture, column, row).iter().map(|channel| u32::from(*channel)).sum::<u32>();
    assert!(sum(190, 190) > sum(322, 322) + 60, "{} {}", sum(190, 190), sum(322, 322));
}

#[test]
fn thin_scan_looks_solid() {
    let sparse = picture(&ball(600, [0.0; 3], 1.0), 0.001);
    let dense = picture(&ball(60_000, [0.0; 3], 1.0), 0.02);
    assert!(covered(&sparse) > covered(&dense) * 0.97, "{} of {}", covered(&sparse), covered(&dense));
}

#[test]
fn preview_keeps_proportions_and_orientation() {
    // A board along each axis in turn: three wide, one high, with a colour in its upper right corner.
    for (thin, right, up) in [(2, (0, 1.0), (1, 1.0)), (1, (0, 1.0), (2, -1.0)), (0, (2, -1.0), (1, 1.0))] {
        let mut cloud = Vec::new();
        for across in 0..=300 {
            for high in 0..=100 {
                let mut position = [0.0; 3];
                position[right.0] = right.1 * f64::from(across);
                position[up.0] = up.1 * f64::from(high);
                let color = if across > 270 && high > 70 { [255, 0, 0] } else { [120, 120, 120] };
                assert_eq!(position[thin], 0.0);
                cloud.push(Point { position, color: Some(color) });
            }
        }
        let picture = picture(&cloud, 1.0);
        let [left, right, top, bottom] = frame(&picture);
        let shape = (right - left) as f64 / (bottom - top) as f64;
        assert!((2.85..3.05).contains(&shape), "{shape}");
        let red = |column, row| {
            let [red, green, _] = at(&picture, column, row);
            red > 100 && green < 20
        };
        let corners = [(right - 8, top + 8), (left + 8, top + 8), (right - 8, bottom - 8), (left + 8, bottom - 8)];
        assert_eq!(corners.map(|(column, row)| red(column, row)), [true, false, false, false], "thin along {thin}");
    }
}

#[test]
fn nearer_points_hide_points_behind_them() {
    let sheet = |z: f64, from: i32, to: i32| {
        (from..to)
            .flat_map(move |x| (0..200).map(move |y| Point { position: [f64::from(x), f64::from(y), z], color: None }))
    };
    let cloud: Vec<Point> = sheet(0.0, 0, 200).chain(sheet(50.0, 100, 200)).collect();
    let picture = picture(&cloud, 1.0);
    let sum = |column, row| at(&picture, column, row).iter().map(|channel| u32::from(*channel)).sum::<u32>();
    assert!(sum(380, 256) > sum(130, 256) * 3 / 2, "{} {}", sum(380, 256), sum(130, 256));
}

#[test]
fn degenerate_clouds_are_drawn() {
    let of = |positions: &[[f64; 3]]| -> Vec<Point> {
        positions.iter().map(|position| Point { position: *position, color: None }).collect()
    };
    assert_eq!(covered(&picture(&[], 1.0)), 0.0);
    for (cloud, voxel) in [
        (of(&[[3.0, 4.0, 5.0]]), 1.0),
        (of(&[[1e100; 3]]), 1e99),
        (of(&[[-1e100; 3], [1e100; 3]]), 1.0),
        (of(&[[0.0; 3], [5e-324, 0.0, 0.0]]), 1e-300),
        (of(&[[0.0; 3], [1.0, 0.0, 0.0], [2.0, 0.0, 0.0]]), f64::MIN_POSITIVE),
        (of(&[[0.0; 3], [1.0, 1.0, 1.0]]), 1e300),
    ] {
        let share = covered(&picture(&cloud, voxel));
        assert!(share > 0.0 && share < 0.2, "{cloud:?}: {share}");
    }
}

#[test]
fn same_cloud_gives_the_same_picture() {
    let cloud: Vec<Point> = Scan::new(5, 30_000).collect();
    let draw = || super::draw(&cloud, 0.003, &|| false).expect("nobody cancels");
    assert_eq!(draw(), draw());
}

#[test]
fn drawing_stops_after_cancellation() {
    let mut random = Random::new(1);
    let cloud: Vec<Point> =
        (0..50_000).map(|_| Point { position: std::array::from_fn(|_| random.unit()), color: None }).collect();
    let looks = std::cell::Cell::new(0);
    let cancelled = || looks.replace(looks.get() + 1) == 2;
    assert_eq!(draw(&cloud, 0.01, &cancelled), Err(Cancelled));
    assert_eq!(looks.get(), 3);
}
