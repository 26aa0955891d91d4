use super::*;
use crate::cloud::Point;
use crate::synth::Random;

const ENCODINGS: [Encoding; 3] = [Encoding::Ascii, Encoding::LittleEndian, Encoding::BigEndian];

fn read_all(bytes: &[u8]) -> Result<(Vec<Point>, u64), PlyError> {
    let mut reader = Reader::new(bytes)?;
    let mut points = Vec::new();
    while let Some(point) = reader.next_point()? {
        points.push(point);
    }
    Ok((points, reader.skipped()))
}

fn refusal(bytes: &[u8]) -> String {
    let text = read_all(bytes).expect_err("must be refused").to_string();
    assert!(!text.contains('\n') && text.len() < 200, "not one short line: {text:?}");
    text
}

/// A file with the given rows of numbers, in any encoding.
struct Table<'a> {
    encoding: Encoding,
    bytes: Vec<u8>,
    elements: &'a [(&'a str, &'a [&'a str])],
    next: usize,
}

impl<'a> Table<'a> {
    fn new(encoding: Encoding, elements: &'a [(&'a str, &'a [&'a str])]) -> Self {
        let mut header = format!("ply\nformat {} 1.0\ncomment made by hand\n", encoding.keyword());
        for (element, properties) in elements {
            header += &format!("element {element}\n");
            properties.iter().for_each(|property| header += &format!("property {property}\n"));
        }
        Self { encoding, bytes: (header + "end_header\n").into_bytes(), elements, next: 0 }
    }

    /// Adds a row to the current element. Each property has its own numbers.
    fn row(&mut self, row: &[&[f64]]) {
        let properties = self.elements[self.next].1;
        for (property, numbers) in properties.iter().zip(row) {
            let words: Vec<&str> = property.split(' ').collect();
            if words[0] == "list" {
                self.number(words[1], numbers.len() as f64);
                numbers.iter().for_each(|number| self.number(words[2], *number));
            } else {
                self.number(words[0], numbers[0]);
            }
        }
        if self.encoding == Encoding::Ascii {
            self.bytes.push(b'\n');
        }
    }

    fn number(&mut self, kind: &str, value: f64) {
        let mut bytes = match kind {
            "char" => (value as i8).to_le_bytes().to_vec(),
            "uchar" => (value as u8).to_le_bytes().to_vec(),
            "short" => (value as i16).to_le_bytes().to_vec(),
            "ushort" => (value as u16).to_le_bytes().to_vec(),
            "int" => (value as i32).to_le_bytes().to_vec(),
            "uint" => (value as u32).to_le_bytes().to_vec(),
            "float" => (value as f32).to_le_bytes().to_vec(),
            "double" => value.to_le_bytes().to_vec(),
            other => panic!("no type {other}"),
        };
        match self.encoding {
            Encoding::Ascii => bytes = format!("{value} ").into_bytes(),
            Encoding::LittleEndian => {}
            Encoding::BigEndian => bytes.reverse(),
        }
        self.bytes.extend(bytes);
    }
}

#[test]
fn written_files_are_read_in_every_encoding() {
    let mut random = Random::new(1);
    let points: Vec<Point> = (0..300)
        .map(|_| Point {
            position: std::array::from_fn(|_| f64::from((random.unit() * 2e3 - 1e3) as f32)),
            color: Some(std::array::from_fn(|_| random.next() as u8)),
        })
        .collect();
    for encoding in ENCODINGS {
        for (wide, color) in [(false, true), (true, true), (true, false), (false, false)] {
            let layout = Layout { encoding, wide, color };
            let mut writer = Writer::new(Vec::new(), layout, 300).expect("a Vec takes every byte");
            points.iter().for_each(|point| writer.point(point).expect("a Vec takes every byte"));
            let (mut read, skipped) = read_all(&writer.finish().expect("300 points")).expect("our own file");
            assert_eq!(skipped, 0);
            if !wide {
                // Ascii text is read as a double with all its digits. The cast rounds it to the float that was written.
                read.iter_mut().for_each(|point| point.position = point.position.map(|value| f64::from(value as f32)));
            }
            let expected: Vec<Point> =
                points.iter().map(|point| Point { color: point.color.filter(|_| color), ..*point }).collect();
            assert!(read == expected, "{layout:?}");
        }
    }
}

#[test]
fn writer_enforces_the_announced_count() {
    let layout = Layout { encoding: Encoding::LittleEndian, wide: false, color: false };
    let point = Point { position: [0.0; 3], color: None };
    let mut writer = Writer::new(Vec::new(), layout, 1).expect("a Vec takes every byte");
    writer.point(&point).expect("the first");
    assert!(writer.point(&point).is_err());
    assert!(Writer::new(Vec::new(), layout, 1).expect("a Vec takes every byte").finish().is_err());
}

#[test]
fn ply_properties_parse_in_any_order_and_type() {
    const TYPES: [&str; 8] = ["char", "uchar", "short", "ushort", "int", "uint", "float", "double"];
    for seed in 0..300 {
        let mut random = Random::new(seed);
        let mut pick = |count: usize| (random.next() % count as u64) as usize;
        let color = ["uchar", "ushort", "float", "double"][pick(4)];
        let mut columns: Vec<String> = ["x", "y", "z"].map(|name| format!("{} {name}", TYPES[pick(8)])).into();
        columns.extend(["red", "green", "blue"].map(|name| format!("{color} {name}")));
        columns.extend((0..pick(4)).map(|index| format!("{} other{index}", TYPES[pick(8)])));
        columns.extend((0..pick(3)).map(|index| format!("list {} {} list{index}", TYPES[pick(6)], TYPES[pick(8)])));
        for index in (1..columns.len()).rev() {
            columns.swap(index, pick(index + 1));
        }
        let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
        let elements = [("vertex 20", columns.as_slice())];
        for encoding in ENCODINGS {
            let mut random = Random::new(seed);
            let mut table = Table::new(encoding, &elements);
            let mut expected = Vec::new();
            for _ in 0..20 {
                // Whole numbers of 0 to 100 fit all types.
                let mut number = || (random.next() % 101) as f64;
                let position = [number(), number(), number()];
                let bytes = [number(), number(), number()];
                let row: Vec<Vec<f64>> = columns
                    .iter()
                    .map(|column| match (column.rsplit(' ').next(), color) {
                        (Some("x"), _) => vec![position[0]],
                        (Some("y"), _) => vec![position[1]],
                        (Some("z"), _) => vec![position[2]],
                        (Some(name @ ("red" | "green" | "blue")), color) => {
                            let byte = bytes[["red", "green", "blue"].iter().position(|own| *own == name).unwrap_or(0)];
                            vec![match color {
                                "uchar" => byte,
                                "ushort" => byte * 257.0,
                                _ => byte / 255.0,
                            }]
                        }
                        _ if column.starts_with("list") => (0..number() as usize % 5).map(|_| number()).collect(),
                        _ => vec![number()],
                    })
                    .collect();
                table.row(&row.iter().map(Vec::as_slice).collect::<Vec<_>>());
                expected.push(Point { position, color: Some(bytes.map(|byte| byte as u8)) });
            }
            let (read, _) = read_all(&table.bytes).unwrap_or_else(|error| panic!("seed {seed}: {error}: {columns:?}"));
            assert_eq!(read, expected, "seed {seed}, {encoding:?}: {columns:?}");
        }
    }
}

#[test]
fn elements_before_and_after_the_vertices_are_skipped() {
    let elements: [(&str, &[&str]); 6] = [
        ("camera 1", &["float fx", "double fy", "uchar kind"]),
        ("tristrips 2", &["list int int vertex_indices"]),
        ("nothing 18446744073709551615", &[]),
        ("vertex 3", &["list uchar float weights", "float z", "float y", "float x"]),
        ("face 2", &["list uchar int vertex_indices", "uchar flags"]),
        ("edge 2", &["int first", "int second"]),
    ];
    for encoding in ENCODINGS {
        let mut table = Table::new(encoding, &elements);
        table.row(&[&[1.0], &[2.0], &[3.0]]);
        table.next = 1;
        let strip: Vec<f64> = (-1..50_000).map(f64::from).collect();
        table.row(&[&strip]);
        table.row(&[&[]]);
        table.next = 3;
        for x in 1..=3 {
            table.row(&[&[0.5; 2][..x - 1], &[30.0], &[20.0], &[x as f64]]);
        }
        table.next = 4;
        table.row(&[&[0.0, 1.0, 2.0], &[9.0]]);
        table.row(&[&[0.0, 2.0, 1.0, 1.0], &[9.0]]);
        table.next = 5;
        table.row(&[&[0.0], &[1.0]]);
        table.row(&[&[1.0], &[2.0]]);
        let points = [1.0, 2.0, 3.0].map(|x| Point { position: [x, 20.0, 30.0], color: None });
        assert_eq!(read_all(&table.bytes).expect("a good file").0, points, "{encoding:?}");
        // The data after the points is checked as well.
        let last = if encoding == Encoding::Ascii { "1 2 \n".len() } else { 8 };
        let short = &table.bytes[..table.bytes.len() - last];
        let text = refusal(short);
        assert!(text.ends_with("2 rows of element `edge`, the data ends after 1"), "{text}");
        table.bytes.extend(b"7 ");
        let text = refusal(&table.bytes);
        assert!(text.starts_with("the data goes on after the last row the header promises"), "{text}");
    }
}

#[test]
fn ascii_variants_are_read() {
    let head = "ply\r\nformat ascii 1.0\r\nobj_info x\r\nelement vertex 5\r\nproperty float x\r\nproperty float y\r\n\
                property float z\r\nproperty uchar red\r\nproperty uchar green\r\nproperty uchar blue\r\nend_header\r\n";
    let rows = "\r\n1 2 3 4 5 6\r\n  +1e1\t-.5 0.25 0 0 255  \r\n\r\nnan 0 0 1 1 1\r\n0 -inf 0 1 1 1\n1.#QNAN -nan(ind) 0 1 1 1";
    let (points, skipped) = read_all(format!("{head}{rows}\r\n\r\n").as_bytes()).expect("a good file");
    let expected = [
        Point { position: [1.0, 2.0, 3.0], color: Some([4, 5, 6]) },
        Point { position: [10.0, -0.5, 0.25], color: Some([0, 0, 255]) },
    ];
    assert_eq!((points.as_slice(), skipped), (&expected[..], 3));
    assert_eq!(read_all(format!("{head}{rows}").as_bytes()).expect("no last line end").0, expected);
}

#[test]
fn incomplete_colours_are_ignored() {
    for columns in [
        ["uchar red", "uchar green", "float blue"],
        ["uchar red", "uchar green", "uchar alpha"],
        ["int red", "int green", "int blue"],
        ["list uchar uchar red", "list uchar uchar green", "list uchar uchar blue"],
    ] {
        let columns = ["float x", "float y", "float z", columns[0], columns[1], columns[2]];
        let elements = [("vertex 1", &columns[..])];
        let mut table = Table::new(Encoding::LittleEndian, &elements);
        table.row(&[&[1.0], &[2.0], &[3.0], &[1.0], &[1.0], &[1.0]]);
        let expected = Point { position: [1.0, 2.0, 3.0], color: None };
        assert_eq!(read_all(&table.bytes).expect("a good file").0, [expected], "{columns:?}");
    }
    let columns = ["float x", "float y", "float z", "float diffuse_red", "float diffuse_green", "float diffuse_blue"];
    let elements = [("vertex 1", &columns[..])];
    let mut table = Table::new(Encoding::BigEndian, &elements);
    table.row(&[&[1.0], &[2.0], &[3.0], &[f64::NAN], &[7.0], &[-1.0]]);
    assert_eq!(read_all(&table.bytes).expect("a good file").0[0].color, Some([0, 255, 0]), "shares are cut to 0..1");
}

#[test]
fn damaged_header_is_refused_with_its_line() {
    let vertex = "element vertex 1\nproperty float x\nproperty float y\nproperty float z\n";
    for (header, expected) in [
        ("".to_owned(), "line 1: expected `ply`, found the end of the file"),
        ("solid cube\n".to_owned(), "line 1: expected `ply`, found `solid cube`"),
        ("PK\u{3}\u{4}".to_owned(), "line 1: expected `ply`, found `PK\\x03\\x04`"),
        ("ply\n".to_owned(), "line 2: expected `end_header` before the end of the file, found the end of the file"),
        ("ply\nelement vertex 1\n".to_owned(), "line 2: expected `format ascii 1.0` or another format line, found `element vertex 1`"),
        ("ply\nformat ascii 2.0\n".to_owned(), "line 2: expected format version `1.0`, found `format ascii 2.0`"),
        (
            "ply\nformat binary 1.0\n".to_owned(),
            "line 2: expected `ascii`, `binary_little_endian` or `binary_big_endian`, found `format binary 1.0`",
        ),
        ("ply\nformat ascii 1.0\nelement vertex -3\n".to_owned(), "line 3: expected `element NAME COUNT` with a count of 0 or more, found `element vertex -3`"),
        ("ply\nformat ascii 1.0\nelement vertex 99999999999999999999\n".to_owned(), "line 3: expected `element NAME COUNT` with a count of 0 or more, found `element vertex 99999999999999999999`"),
        ("ply\nformat ascii 1.0\nproperty float x\n".to_owned(), "line 3: expected an `element` line before the first property, found `property float x`"),
        ("ply\nformat ascii 1.0\nelement vertex 1\nproperty real x\n".to_owned(), "line 4: expected a type of char, uchar, short, ushort, int, uint, float or double, found `property real x`"),
        ("ply\nformat ascii 1.0\nelement vertex 1\nproperty list float int x\n".to_owned(), "line 4: expected a list length of an integer type, found `property list float int x`"),
        ("ply\nformat ascii 1.0\nelement vertex 1\nproperty list int x\n".to_owned(), "line 4: expected `property TYPE NAME` or `property list TYPE TYPE NAME`, found `property list int x`"),
        (format!("ply\nformat ascii 1.0\n{vertex}property int x\n"), "line 7: expected a property name that was not used before in this element, found `property int x`"),
        (format!("ply\nformat ascii 1.0\n{vertex}{vertex}"), "line 7: expected an element name that was not used before, found `element vertex 1`"),
        (format!("ply\nformat ascii 1.0\n{vertex}end_heade"), "line 7: expected `end_header` before the end of the file, found `end_heade`"),
        (format!("ply\nformat ascii 1.0\n{vertex}{}\n", "wild ".repeat(20)), "line 7: expected `element`, `property`, `comment` or `end_header`, found `wild wild wild wild wild wild wild wild …`"),
        ("ply\nformat ascii 1.0\nelement face 0\nend_header\n".to_owned(), "the header has no element `vertex`, so the file holds no points"),
        (
            "ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty list int int z\nend_header\n".to_owned(),
            "element `vertex` has no number `z`: a point needs the properties x, y and z",
        ),
        (
            format!("ply\nformat ascii 1.0\n{}", "comment\n".repeat(10_000)),
            "no `end_header` in the first 65536 bytes: the header is damaged, or this is not PLY",
        ),
        (
            "x".repeat(1_000_000),
            "no `end_header` in the first 65536 bytes: the header is damaged, or this is not PLY",
        ),
    ] {
        assert_eq!(refusal(header.as_bytes()), expected);
    }
}

#[test]
fn wrong_header_is_detected() {
    let file = |encoding: &str, count: &str, kind: &str, data: &[u8]| {
        let header = format!(
            "ply\nformat {encoding} 1.0\nelement vertex {count}\nproperty {kind} x\nproperty {kind} y\nproperty {kind} z\nend_header\n"
        );
        [header.as_bytes(), data].concat()
    };
    let ascii = |count: &str, kind: &str, data: &str| refusal(&file("ascii", count, kind, data.as_bytes()));
    let promises = |count: &str, found: u64| {
        format!("the header promises {count} rows of element `vertex`, the data ends after {found}")
    };
    // Too few rows, in all encodings, and counts that do not fit into any memory.
    for count in ["3", "4000000000", "18446744073709551615"] {
        assert_eq!(ascii(count, "float", "1 2 3\n4 5 6\n"), promises(count, 2));
        assert_eq!(ascii(count, "float", "1 2 3\n4 5 6\n7 8"), promises(count, 2));
        for encoding in ["binary_little_endian", "binary_big_endian"] {
            assert_eq!(refusal(&file(encoding, count, "float", &[0; 30])), promises(count, 2));
            assert_eq!(refusal(&file(encoding, count, "double", &[0; 24])), promises(count, 1));
        }
    }
    // Too many rows, or rows that are wider than the header says.
    let goes_on =
        "the data goes on after the last row the header promises: its counts or types do not fit the data".to_owned();
    assert_eq!(ascii("1", "float", "1 2 3\n4 5 6\n"), goes_on);
    assert_eq!(refusal(&file("binary_little_endian", "2", "float", &[1; 48])), goes_on);
    assert_eq!(refusal(&file("binary_little_endian", "0", "float", &[1; 12])), goes_on);
    // Rows that do not match the properties.
    assert_eq!(
        ascii("2", "float", "1 2\n3 4\n"),
        "line 8: expected more than 2 values in this row, found the end of the line"
    );
    assert_eq!(ascii("2", "float", "1 2 3\n1 2 3 4\n"), "line 9: expected 3 values in this row, found `4`");
    assert_eq!(ascii("1", "float", "1 two 3\n"), "line 8: expected a number of type float, found `two`");
    assert_eq!(ascii("1", "float", "1 \u{fc} 3\n"), "line 8: expected a number of type float, found `\\xc3\\xbc`");
    assert_eq!(ascii("1", "uchar", "1 300 3\n"), "line 8: expected a number of type uchar, found `300`");
    assert_eq!(ascii("1", "int", "1 0.5 3\n"), "line 8: expected a number of type int, found `0.5`");
    assert_eq!(ascii("1", "int", "1 nan 3\n"), "line 8: expected a number of type int, found `nan`");
    assert_eq!(
        ascii("1", "float", &"9".repeat(1_000_000)),
        format!("line 8: expected a number of at most 512 bytes, found `{}…`", "9".repeat(40))
    );
    // Binary data under an ascii header.
    let text = refusal(&file("ascii", "2", "float", &[0xff; 24]));
    assert_eq!(text, format!("line 8: expected a number of type float, found `{}`", "\\xff".repeat(24)));
}

#[test]
fn wrong_list_lengths_are_detected() {
    for before in [true, false] {
        let vertex: (&str, &[&str]) = ("vertex 1", &["float x", "float y", "float z"]);
        let strips: (&str, &[&str]) = ("tristrips 2", &["list int int vertex_indices"]);
        let elements = if before { [strips, vertex] } else { [vertex, strips] };
        for (length, expected) in [
            (-1.0, "row 2 of element `tristrips`: expected a list length of 0 or more, found -1"),
            (2e9, "the header promises 2 rows of element `tristrips`, the data ends after 1"),
        ] {
            for encoding in ENCODINGS {
                let mut table = Table::new(encoding, &elements);
                table.next = usize::from(before);
                if !before {
                    table.row(&[&[1.0], &[2.0], &[3.0]]);
                    table.next = 1;
                }
                table.next = usize::from(!before);
                table.row(&[&[1.0, 2.0]]);
                table.number("int", length);
                assert_eq!(refusal(&table.bytes), expected, "{encoding:?}");
            }
        }
    }
    let elements: [(&str, &[&str]); 1] = [("vertex 1", &["float x", "float y", "float z", "list char double w"])];
    for encoding in ENCODINGS {
        let mut table = Table::new(encoding, &elements);
        [1.0, 2.0, 3.0].iter().for_each(|value| table.number("float", *value));
        table.number("char", -7.0);
        assert_eq!(refusal(&table.bytes), "row 1 of element `vertex`: expected a list length of 0 or more, found -7");
    }
}

#[test]
fn garbage_never_panics() {
    // Reading always ends: every step consumes input, whatever the header claims.
    for seed in 0..2_000 {
        let mut random = Random::new(seed);
        let mut bytes: Vec<u8> = (0..random.next() % 300).map(|_| random.next() as u8).collect();
        if seed % 2 == 0 {
            bytes.splice(0..0, *b"ply\nformat binary_big_endian 1.0\nelement vertex ");
        }
        assert!(read_all(&bytes).is_err());
    }
}

#[test]
fn mutated_files_never_panic() {
    let elements: [(&str, &[&str]); 3] = [
        ("tristrips 1", &["list int int vertex_indices"]),
        ("vertex 4", &["float x", "double y", "short z", "list uchar int w", "uchar red", "uchar green", "uchar blue"]),
        ("face 2", &["list uchar int vertex_indices"]),
    ];
    let words: [&[u8]; 12] = [
        b"-1",
        b"18446744073709551615",
        b"list",
        b"float",
        b"char",
        b"nan",
        b"\n",
        b" ",
        b"vertex",
        b"end_header",
        b"1e308",
        b"ascii",
    ];
    let (mut read, mut refused) = (0, 0);
    for seed in 0..6_000 {
        let mut random = Random::new(seed);
        let mut table = Table::new(ENCODINGS[seed as usize % 3], &elements);
        table.row(&[&[0.0, 1.0, 2.0, -1.0, 3.0]]);
        table.next = 1;
        for x in 0..4 {
            table.row(&[&[f64::from(x)], &[0.5], &[-3.0], &[1.0, 2.0], &[1.0], &[2.0], &[3.0]]);
        }
        table.next = 2;
        table.row(&[&[0.0, 1.0, 2.0]]);
        table.row(&[&[3.0]]);
        let mut bytes = table.bytes;
        for _ in 0..1 + random.next() % 4 {
            let at = (random.next() % (bytes.len() as u64 + 1)) as usize;
            let to = (at + (random.next() % 12) as usize).min(bytes.len());
            match random.next() % 4 {
                0 => drop(bytes.splice(at..to, words[(random.next() % 12) as usize].iter().copied())),
                1 => drop(bytes.drain(at..to)),
                2 => bytes[at..to].iter_mut().for_each(|byte| *byte ^= 1 << (random.next() % 8)),
                _ => bytes.truncate(at),
            }
        }
        match read_all(&bytes) {
            Ok(_) => read += 1,
            Err(error) => {
                refused += 1;
                assert!(!error.to_string().contains('\n'), "{error:?}");
            }
        }
    }
    assert!(read > 100 && refused > 1_000, "the mutations are too tame or too wild: {read} read, {refused} refused");
}
