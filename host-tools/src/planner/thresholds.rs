//! HOBBIT's thresholds for a model: the lowest that cost no more perplexity than is allowed.
//!
//! The paper's 0.6 and 0.9 suit Mixtral. Where the chosen experts weigh about the same, or there are more of them,
//! scores lie elsewhere, so thresholds are searched among the scores that occur.

use anyhow::{Result, ensure};
use forebay_runtime::policy::{Allowance, Held, Loading, Thresholds, plan_token};

use crate::settings::Profiled;
use crate::trace::Trace;

/// Thresholds that a search has to choose from, of the scores that occur.
const STEPS: usize = 48;
/// Standard errors that the loss on the text and these together must keep within the limit: another text of the same kind
/// loses more than that in one case of 44, if losses of tokens are independent.
const MARGIN: f64 = 2.0;

/// The scores that thresholds are chosen among: those at equal shares of all choices, ascending, then 1.
#[derive(Clone, PartialEq, Debug)]
pub struct Scores(Vec<f32>);

impl Scores {
    /// Of the choices in `trace`.
    #[must_use]
    pub fn of(trace: &Trace) -> Self {
        let mut scores = Vec::new();
        for event in trace.passes.iter().flatten() {
            let layer = &trace.head.layers[event.layer];
            for token in event.choices.chunks_exact(layer.top_k.into()) {
                let mut token = token.to_vec();
                plan_token(&mut token, &Loading::Exact, layer.levels, |_| Held::default(), &mut Allowance::default());
                scores.extend(token.iter().map(|choice| choice.score).filter(|score| *score > 0.0));
            }
        }
        scores.sort_unstable_by(f32::total_cmp);
        // Scores of two thirds and such are cut to three digits, so that people can type them again.
        let at = |step: usize| (scores[step * (scores.len() - 1) / STEPS] * 1e3).floor() / 1e3;
        let mut grid: Vec<f32> = if scores.is_empty() { Vec::new() } else { (0..STEPS).map(at).collect() };
        grid.insert(0, 0.0);
        grid.push(1.0);
        grid.dedup();
        Self(grid)
    }
}

/// The negative logarithms of the probabilities of the same tokens, compared: how much worse `other` is, as a ratio of
/// perplexities less 1, and the standard error of that.
fn loss(exact: &[f64], other: &[f64]) -> (f64, f64) {
    let n = exact.len() as f64;
    let differences = || exact.iter().zip(other).map(|(a, b)| b - a);
    let mean = differences().sum::<f64>() / n;
    let variance = differences().map(|d| (d - mean) * (d - mean)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean.exp_m1(), (variance / n).sqrt())
}

/// Thresholds that cost at most `max_loss`, a share of the perplexity, by `measure`, which gives the negative logarithms
/// of a text's probabilities under `scored` with given thresholds: with low precision alone, with low precision for
/// half of the loss and leaving out for the rest, and with leaving out alone. What is certain is what counts: the
/// loss on the text and `MARGIN` standard errors more must be within the limit. Thresholds of 1 and 1 are not given.
///
/// # Errors
/// Whatever `measure` says; a text of fewer than two tokens.
pub fn profile(
    scores: &Scores,
    low_levels: u8,
    max_loss: f64,
    measure: &mut dyn FnMut(Thresholds) -> Result<Vec<f64>>,
) -> Result<Vec<Profiled>> {
    let thresholds = |full: f32, low: f32| Thresholds { full, low, low_levels };
    let exact = measure(thresholds(1.0, 1.0))?;
    ensure!(exact.len() > 1, "a text of {} tokens says nothing", exact.len());
    let grid = &scores.0;
    // The least of the grid from `from` on for which the loss keeps within `most`, and that loss with its error.
    let mut search = |from: usize, most: f64, at: &dyn Fn(f32) -> Thresholds| -> Result<(usize, (f64, f64))> {
        let (mut low, mut high, mut found) = (from, grid.len() - 1, (0.0, 0.0));
        while low < high {
            let middle = (low + high) / 2;
            let (loss, error) = loss(&exact, &measure(at(grid[middle]))?);
            if loss + MARGIN * error <= most {
                (high, found) = (middle, (loss, error));
            } else {
                low = middle + 1;
            }
        }
        Ok((high, found))
    };
    let mut found = Vec::new();
    let mut add = |full: f32, low: f32, (loss, error): (f64, f64)| {
        let profiled = Profiled { full, low, low_levels, loss, error, max_loss, tokens: exact.len() as u64 };
        if full < 1.0 && found.iter().all(|known: &Profiled| (known.full, known.low) != (full, low)) {
            found.push(profiled);
        }
    };
    let (at, lost) = search(0, max_loss, &|full| thresholds(full, 1.0))?;
    add(grid[at], 1.0, lost);
    let (at, _) = search(0, max_loss / 2.0, &|full| thresholds(full, 1.0))?;
    let (low, lost) = search(at, max_loss, &|low| thresholds(grid[at], low))?;
    if grid[low] < 1.0 {
        add(grid[at], grid[low], lost);
    }
    let (at, lost) = search(0, max_loss, &|both| thresholds(both, both))?;
    add(grid[at], grid[at], lost);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A model whose loss is 2 % for everything in low precision and 10 % for everything left out, evenly.
    #[test]
    fn thresholds_keep_within_the_loss() {
        let grid: Vec<f32> = (0..=20).map(|i| i as f32 / 20.0).collect();
        let cost = |t: Thresholds| 0.02 * f64::from(1.0 - t.full) + 0.08 * f64::from(1.0 - t.low);
        let mut calls = 0;
        let mut measure = |t: Thresholds| {
            calls += 1;
            Ok((0..100).map(|i| f64::from(i) / 10.0 + cost(t).ln_1p()).collect())
        };
        let found = profile(&Scores(grid), 1, 0.0101, &mut measure).unwrap();
        let pairs: Vec<(f32, f32)> = found.iter().map(|p| (p.full, p.low)).collect();
        assert_eq!(pairs, [(0.5, 1.0), (0.75, 0.95), (0.9, 0.9)]);
        assert!(found.iter().all(|p| p.loss <= 0.0101 && p.loss > 0.005 && p.tokens == 100), "{found:?}");
        assert!(calls < 30, "{calls}");
        // Where everything is free, all but the most important goes.
        let found = profile(&Scores(vec![0.0, 0.5, 1.0]), 1, 0.01, &mut |_| Ok(vec![1.0; 9])).unwrap();
        assert_eq!((found[0].full, found[0].low), (0.0, 1.0));
        // Where nothing is allowed, nothing is found.
        let strict = |t: Thresholds| Ok(vec![1.0 + f64::from(2.0 - t.full - t.low); 9]);
        assert!(profile(&Scores(vec![0.0, 0.5, 1.0]), 1, 0.01, &mut { strict }).unwrap().is_empty());
    }

    #[test]
    fn an_uncertain_loss_is_not_within_the_limit() {
        // 0.5 % in the mean of 100 tokens, with a standard error of about 0.2, 0.4 or no per cent.
        let found = |spread: f64| {
            let mut measure = |t: Thresholds| {
                let cost = if t.full < 1.0 { 0.005 } else { 0.0 };
                Ok((0..100).map(|i| 1.0 + cost * (1.0 + spread * f64::from(2 * (i % 2) - 1))).collect())
            };
            profile(&Scores(vec![0.0, 1.0]), 1, 0.01, &mut measure).unwrap()
        };
        assert_eq!([0.0, 4.0, 8.0].map(|spread| found(spread).is_empty()), [false, false, true]);
        let kept = found(4.0)[0];
        assert!((kept.loss - 0.005).abs() < 1e-4 && (kept.error - 0.002).abs() < 1e-4, "{kept:?}");
    }

    #[test]
    fn the_loss_is_of_the_perplexity() {
        let (got, error) = loss(&[1.0, 2.0, 3.0], &[1.1, 2.1, 3.1]);
        assert!((got - 0.1f64.exp_m1()).abs() < 1e-12 && error < 1e-9, "{got} {error}");
    }
}
