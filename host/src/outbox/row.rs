//! A row of the file: bytes that can be recognised and checked at any offset.
//!
//! Form: magic, number of the change, number of the report, length, checksum, bytes. The row under
//! [`LIVE`] lists the reports that exist, because freed pages hold old copies of removed ones.

use std::collections::{BTreeMap, BTreeSet};

use sha2::{Digest, Sha256};

use super::store::Row;

/// Not valid UTF-8, so the bytes of a report never contain it.
const MAGIC: [u8; 8] = *b"\x89report\x01";
const HEAD_BYTES: usize = 36;
/// The number of the row that lists the others.
pub(super) const LIVE: u64 = u64::MAX;

/// A row whose checksum is right.
pub(super) struct Found<'a> {
    pub(super) change: u64,
    pub(super) number: u64,
    pub(super) bytes: &'a [u8],
}

fn checksum(head: &[u8], bytes: &[u8]) -> [u8; 8] {
    let digest = Sha256::new().chain_update(head).chain_update(bytes).finalize();
    let mut sum = [0; 8];
    sum.copy_from_slice(&digest[..8]);
    sum
}

pub(super) fn write(number: u64, change: u64, bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).expect("a report is smaller than 4 GiB");
    let mut row = Vec::with_capacity(HEAD_BYTES + bytes.len());
    row.extend(MAGIC);
    row.extend(change.to_le_bytes());
    row.extend(number.to_le_bytes());
    row.extend(length.to_le_bytes());
    let sum = checksum(&row, bytes);
    row.extend(sum);
    row.extend(bytes);
    row
}

/// The row at the beginning of `text`, if it is intact.
pub(super) fn read(text: &[u8]) -> Option<Found<'_>> {
    let (head, rest) = text.split_at_checked(HEAD_BYTES)?;
    let (fields, sum) = head.split_at(HEAD_BYTES - 8);
    if !fields.starts_with(&MAGIC) {
        return None;
    }
    let number = |at: usize| u64::from_le_bytes(fields[at..at + 8].try_into().expect("eight bytes"));
    let length = u32::from_le_bytes(fields[24..28].try_into().expect("four bytes"));
    let bytes = rest.get(..usize::try_from(length).ok()?)?;
    (checksum(fields, bytes) == sum).then(|| Found { change: number(8), number: number(16), bytes })
}

/// The numbers as pairs of first and last.
pub(super) fn ranges(live: &BTreeSet<u64>) -> Vec<u8> {
    let mut pairs: Vec<(u64, u64)> = Vec::new();
    for number in live {
        match pairs.last_mut() {
            Some((_, last)) if *last + 1 == *number => *last = *number,
            _ => pairs.push((*number, *number)),
        }
    }
    pairs.iter().flat_map(|(first, last)| [first.to_le_bytes(), last.to_le_bytes()]).flatten().collect()
}

fn is_in(ranges: &[u8], number: u64) -> bool {
    ranges.chunks_exact(16).any(|pair| {
        let [first, last] = [0, 8].map(|at| u64::from_le_bytes(pair[at..at + 8].try_into().expect("eight bytes")));
        (first..=last).contains(&number)
    })
}

/// The newest intact copy of each report in the bytes of a damaged file, except those that were removed.
pub(super) fn scan(file: &[u8]) -> Vec<Row> {
    let mut newest: BTreeMap<u64, Found<'_>> = BTreeMap::new();
    let starts = file.iter().enumerate().filter(|(_, byte)| **byte == MAGIC[0]);
    for found in starts.filter_map(|(at, _)| read(&file[at..])) {
        let known = newest.get(&found.number).map(|known| known.change);
        if known.is_none_or(|known| known <= found.change) {
            newest.insert(found.number, found);
        }
    }
    // A row that is newer than the list exists, although it is not in the list.
    let live = newest.remove(&LIVE);
    let exists = |found: &Found<'_>| {
        live.as_ref().is_none_or(|live| found.change > live.change || is_in(live.bytes, found.number))
    };
    newest.into_values().filter(exists).map(|found| (found.number, found.bytes.to_vec())).collect()
}
