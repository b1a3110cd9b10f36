//! Quantiles.

/// The value below which a fraction `q` of the samples lie. Sorts them. 0 if there are none.
pub fn quantile(of: &mut [f64], q: f64) -> f64 {
    of.sort_unstable_by(f64::total_cmp);
    let last = of.len().saturating_sub(1);
    of.get((last as f64 * q) as usize).copied().unwrap_or_default()
}

/// The middle one.
pub fn median(mut of: Vec<f64>) -> f64 {
    quantile(&mut of, 0.5)
}
