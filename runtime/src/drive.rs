//! Driving an engine with a store: the loop that boards and hosts share.

use forebay_kernels::exec::Exec;
use forebay_storage::store::{BlockStore, ReadRequest};

use crate::engine::{Choice, Engine, EngineError, Output, Step};

/// Watches a run. Every method does nothing unless it is overridden; clocks live here, not in the engine.
pub trait Observer {
    /// The run is about to wait for a read.
    fn wait_begins(&mut self) {}
    /// The wait is over.
    fn wait_ends(&mut self) {}
    /// A layer's experts were chosen: `choices` is `[tokens][k]`.
    fn routed(&mut self, layer: usize, choices: &[Choice]) {
        let _ = (layer, choices);
    }
    /// A layer's units are about to be computed on `input`, the normed rows `[tokens][hidden]` of the residual stream
    /// `residual`.
    fn feed_forward(&mut self, layer: usize, input: &[f32], residual: &[f32]) {
        let _ = (layer, input, residual);
    }
    /// A unit was computed. `activations` is what its down projection was applied to, `activation(gate) * up`,
    /// `[tokens that use the unit][unit width]`.
    fn unit(&mut self, layer: usize, unit: usize, activations: &[f32]) {
        let _ = (layer, unit, activations);
    }
}

/// Watches nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unobserved;

impl Observer for Unobserved {}

/// What [`advance`] reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Reached {
    /// [`Engine::logits`] has `rows` rows, the first for `position`.
    Logits {
        /// Position of the first row.
        position: usize,
        /// Number of rows.
        rows: usize,
    },
    /// All tokens given are finished.
    Idle,
}

/// Takes back every read that has finished.
fn collect<'a, S: BlockStore<'a>>(engine: &mut Engine<'a>, store: &mut S) -> Result<(), EngineError> {
    while let Some(done) = store.poll() {
        engine.complete(done)?;
    }
    Ok(())
}

/// Blocks until one read has finished, and takes it back.
fn wait<'a, S: BlockStore<'a>>(
    engine: &mut Engine<'a>,
    store: &mut S,
    observer: &mut impl Observer,
) -> Result<(), EngineError> {
    observer.wait_begins();
    let done = store.wait();
    observer.wait_ends();
    engine.complete(done.ok_or(EngineError::NoAnswer { in_flight: store.in_flight() })?)
}

/// Steps until logits are ready or everything is finished, starting reads and taking them back on the way.
pub fn advance<'a, S: BlockStore<'a>>(
    engine: &mut Engine<'a>,
    store: &mut S,
    exec: &Exec<'_>,
    observer: &mut impl Observer,
) -> Result<Reached, EngineError> {
    loop {
        collect(engine, store)?;
        match engine.step(exec)? {
            Step::Read(request) => {
                let mut pending: Option<ReadRequest<'a>> = Some(request);
                while let Some(request) = pending.take() {
                    if let Err(refused) = store.submit(request) {
                        pending = Some(refused);
                        wait(engine, store, observer)?;
                    }
                }
            }
            Step::Computed => {
                for (layer, unit, activations) in engine.activations() {
                    observer.unit(layer, unit, activations);
                }
            }
            Step::Routed { layer } => {
                observer.routed(layer, engine.choices());
                let (input, residual) = engine.feed_forward();
                observer.feed_forward(layer, input, residual);
            }
            Step::Wait => wait(engine, store, observer)?,
            Step::Logits { position, rows } => return Ok(Reached::Logits { position, rows }),
            Step::Idle => return Ok(Reached::Idle),
        }
    }
}

/// Feeds a prompt in batches. Logits wanted by `output` are handed to `rows`: position of the first row, `[rows][vocab]`.
pub fn prefill<'a, S: BlockStore<'a>>(
    engine: &mut Engine<'a>,
    store: &mut S,
    exec: &Exec<'_>,
    tokens: &[u32],
    output: Output,
    observer: &mut impl Observer,
    mut rows: impl FnMut(usize, &mut [f32]),
) -> Result<(), EngineError> {
    let batch = engine.plan().batch;
    let mut chunks = tokens.chunks(batch).peekable();
    while let Some(chunk) = chunks.next() {
        let wanted = match output {
            Output::Last if chunks.peek().is_some() => Output::None,
            other => other,
        };
        engine.feed(chunk, wanted)?;
        while let Reached::Logits { position, rows: count } = advance(engine, store, exec, observer)? {
            let vocab = engine.vocab();
            rows(position, &mut engine.logits_mut()[..count * vocab]);
        }
    }
    Ok(())
}
