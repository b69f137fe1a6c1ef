//! How well a model predicts a text, by the method of llama.cpp's llama-perplexity.

use anyhow::Result;
use forebay_runtime::engine::Output;

use crate::host::session::Session;

/// Rows of logits that are kept at once.
pub const LOGIT_ROWS: usize = 16;

/// The negative logarithm of a token's probability.
pub fn nll(logits: &[f32], token: u32) -> f64 {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - top).exp()).sum();
    sum.ln() - f64::from(logits[token as usize] - top)
}

/// Computes `chunk` as a sequence of its own, its first token replaced by `bos` if there is one, and gives `add` the
/// negative logarithm of the probability of every token of its second half, each by the logits after those before it.
pub fn score_chunk(
    session: &mut Session<'_, '_>,
    chunk: &mut [u32],
    bos: Option<u32>,
    mut add: impl FnMut(f64),
) -> Result<()> {
    session.reset()?;
    if let Some(bos) = bos {
        chunk[0] = bos;
    }
    // The last token has nothing after it to be scored.
    let (first, last) = (chunk.len() / 2, chunk.len() - 1);
    let vocab = session.engine.vocab();
    if first > 0 {
        session.feed(&chunk[..first], Output::None, |_, _| ())?;
    }
    session.feed(&chunk[first..last], Output::All, |position, rows| {
        for (row, logits) in rows.chunks_exact(vocab).enumerate() {
            add(nll(logits, chunk[position + row + 1]));
        }
    })
}
