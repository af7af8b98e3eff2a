//! Figures of interleaved rounds: the median, and what the rounds spread over.

use std::time::Duration;

use anyhow::Result;
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

/// Of one quantity, over all rounds.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Figure {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Figure {
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (Some(min), Some(max)) = (sorted.first(), sorted.last()) else { return Self::default() };
        Self { median: median(&sorted), min: *min, max: *max }
    }

    /// Quotients round by round: what the machine did meanwhile, it did to both.
    pub(crate) fn ratio(values: &[f64], to: &[f64]) -> Self {
        Self::of(values.iter().zip(to).map(|(value, to)| value / to))
    }
}

fn median(sorted: &[f64]) -> f64 {
    let half = sorted.len() / 2;
    match sorted.len() % 2 {
        0 => f64::midpoint(sorted[half - 1], sorted[half]),
        _ => sorted[half],
    }
}

pub(crate) fn median_of(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    if values.is_empty() { 0.0 } else { median(&values) }
}

/// `  median (min..max)`, in a fixed width.
pub(crate) fn show(figure: Figure, digits: usize) -> String {
    format!("{:.digits$} ({:.digits$}..{:.digits$})", figure.median, figure.min, figure.max)
}

/// Wall clock and CPU time of the whole process, in milliseconds.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Spent {
    pub(crate) wall: f64,
    pub(crate) cpu: f64,
}

impl Spent {
    pub(crate) fn now() -> Result<Self> {
        Self::read(ClockId::CLOCK_PROCESS_CPUTIME_ID)
    }

    pub(crate) fn read(cpu: ClockId) -> Result<Self> {
        let ms = |clock| -> Result<f64> { Ok(Duration::from(clock_gettime(clock)?).as_secs_f64() * 1000.0) };
        Ok(Self { wall: ms(ClockId::CLOCK_MONOTONIC)?, cpu: ms(cpu)? })
    }

    pub(crate) fn since(self, before: Self) -> Self {
        Self { wall: self.wall - before.wall, cpu: self.cpu - before.cpu }
    }
}

impl std::ops::Add for Spent {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { wall: self.wall + other.wall, cpu: self.cpu + other.cpu }
    }
}
