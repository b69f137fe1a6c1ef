//! The router: which experts a token uses, and with what weight.

use forebay_kernels::ops::sigmoid;

use super::Choice;
use crate::model::record::Router;
use crate::model::{LayerShape, MAX_TOP_K};

/// Chooses `choices.len()` experts from the router's `scores`, one per expert, which are overwritten with
/// probabilities. Choices come in descending order of selection score, equal scores in order of their index.
///
/// LFM2-MoE (`Lfm2MoeSparseMoeBlock`): `p = sigmoid(score)`; the bias acts on the selection only; the weights
/// are `p`, divided by `sum + eps` if the layer normalises, times the layer's factor.
pub(super) fn choose(shape: &LayerShape, scores: &mut [f32], bias: Option<&[f32]>, choices: &mut [Choice]) {
    let mut keys = [f32::NEG_INFINITY; MAX_TOP_K];
    let mut filled = 0;
    match shape.router {
        Router::All => return,
        Router::Sigmoid => scores.iter_mut().for_each(|s| *s = sigmoid(*s)),
    }
    for (unit, &p) in scores.iter().enumerate() {
        let key = p + bias.map_or(0.0, |b| b[unit]);
        // Insertion from the back; a later unit moves up only past smaller keys. NaN never moves up, and a slot
        // is always filled, so damaged weights choose something and show in the logits.
        let mut at = filled;
        while at > 0 && key > keys[at - 1] {
            at -= 1;
        }
        if at >= choices.len() {
            continue;
        }
        filled = (filled + 1).min(choices.len());
        keys.copy_within(at..filled - 1, at + 1);
        choices.copy_within(at..filled - 1, at + 1);
        keys[at] = key;
        choices[at] = Choice { unit: unit as u16, weight: p };
    }
    let divisor = match shape.normalise {
        true => choices.iter().fold(0.0, |sum, c| sum + c.weight) + shape.router_norm_eps,
        false => 1.0,
    };
    for choice in choices {
        choice.weight = choice.weight / divisor * shape.router_scale;
    }
}
