//! Types that the other modules share: a point, the box around points, and the cancel error.
#![forbid(unsafe_code)]

/// One measured point.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// x, y and z, in the unit of the file.
    pub position: [f64; 3],
    /// Red, green and blue, if the file has them.
    pub color: Option<[u8; 3]>,
}

/// The smallest axis-aligned box around the given points.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bounds {
    /// The lowest coordinate on each axis.
    pub min: [f64; 3],
    /// The highest coordinate on each axis.
    pub max: [f64; 3],
}

impl Bounds {
    /// The box around one position.
    pub fn at(position: [f64; 3]) -> Self {
        Self { min: position, max: position }
    }

    /// The box around all positions. `None` if there are none.
    pub fn around(positions: impl IntoIterator<Item = [f64; 3]>) -> Option<Self> {
        let mut found = None;
        for position in positions {
            Self::extend(&mut found, position);
        }
        found
    }

    /// Extends the box to include one more position.
    pub fn extend(bounds: &mut Option<Self>, position: [f64; 3]) {
        match bounds {
            None => *bounds = Some(Self::at(position)),
            Some(known) => {
                for (axis, value) in position.into_iter().enumerate() {
                    known.min[axis] = known.min[axis].min(value);
                    known.max[axis] = known.max[axis].max(value);
                }
            }
        }
    }

    /// The length of the box on each axis.
    pub fn extent(&self) -> [f64; 3] {
        std::array::from_fn(|axis| self.max[axis] - self.min[axis])
    }

    /// The middle of the box.
    pub fn center(&self) -> [f64; 3] {
        std::array::from_fn(|axis| self.min[axis] + (self.max[axis] - self.min[axis]) / 2.0)
    }

    /// The length from one corner to the opposite one.
    pub fn diagonal(&self) -> f64 {
        self.extent().into_iter().map(|side| side * side).sum::<f64>().sqrt()
    }

    /// The largest distance of a coordinate from zero.
    pub fn reach(&self) -> f64 {
        self.min.into_iter().chain(self.max).fold(0.0, |reach, value| reach.max(value.abs()))
    }
}

/// The caller cancelled the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cancelled")]
pub struct Cancelled;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_contain_all_points() {
        let bounds = Bounds::around([[1.0, -2.0, 3.0], [4.0, 2.0, 3.0]]).expect("two points");
        assert_eq!(bounds, Bounds { min: [1.0, -2.0, 3.0], max: [4.0, 2.0, 3.0] });
        assert_eq!((bounds.extent(), bounds.diagonal(), bounds.reach()), ([3.0, 4.0, 0.0], 5.0, 4.0));
        assert_eq!(bounds.center(), [2.5, 0.0, 3.0]);
        assert_eq!(Bounds::around([]), None);
    }
}
