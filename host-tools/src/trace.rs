//! Traces of routing: which experts every token chose in every layer, with what weight, and where they came from.
//!
//! `docs/trace.md` specifies the file. `forebay run --trace` writes one; [`crate::simulate`] replays it.

use std::io::{Read, Write};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use forebay_runtime::model::record::Router;
use forebay_runtime::model::unit::MAX_LEVELS;
use forebay_runtime::model::{MAX_LAYERS, MAX_TOP_K, MAX_UNITS, Model};
use forebay_runtime::policy::{Choice, Source};

/// First bytes of a trace.
const MAGIC: [u8; 8] = *b"FBTRACE\0";
const VERSION: u16 = 1;
/// Bytes of a layer's record.
const LAYER_BYTES: usize = 24;
/// Bytes of a choice.
const CHOICE_BYTES: usize = 8;

/// What a trace says of a layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layer {
    /// Whether a router chooses; else every token uses every unit.
    pub experts: bool,
    /// Experts, or clusters.
    pub units: u16,
    /// Units a token uses.
    pub top_k: u16,
    /// Levels of a unit.
    pub levels: u8,
    /// Bytes of each level; 0 past the last.
    pub level_bytes: [u32; MAX_LEVELS],
}

impl Layer {
    /// Bytes of the levels from `have` to `want`.
    #[must_use]
    pub fn bytes(&self, have: u8, want: u8) -> u64 {
        self.level_bytes.iter().take(want.into()).skip(have.into()).map(|n| u64::from(*n)).sum()
    }
}

/// What stands at the beginning of a trace.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Head {
    /// Identity of the image that ran.
    pub image: [u8; 16],
    /// Its layers.
    pub layers: Vec<Layer>,
}

impl Head {
    /// The head of traces of `model`, in the image `image`.
    #[must_use]
    pub fn new(image: [u8; 16], model: &Model<'_>) -> Self {
        let layer = |shape: forebay_runtime::model::LayerShape| {
            let mut level_bytes = [0; MAX_LEVELS];
            let levels = shape.unit.levels();
            for (level, bytes) in level_bytes.iter_mut().enumerate().take(levels) {
                *bytes = u32::try_from(shape.unit.level_len(level, model.page())).unwrap_or(u32::MAX);
            }
            Layer {
                experts: shape.router != Router::All,
                units: shape.units as u16,
                top_k: shape.top_k as u16,
                levels: levels as u8,
                level_bytes,
            }
        };
        let layers = (0..model.layer_count()).filter_map(|l| model.layer(l)).map(layer).collect();
        Self { image, layers }
    }
}

/// What the tokens of a pass chose in a layer.
#[derive(Clone, PartialEq, Debug)]
pub struct Event {
    /// The layer.
    pub layer: usize,
    /// `[tokens][top_k]`.
    pub choices: Vec<Choice>,
}

/// A whole trace: passes of the model, each of one or more tokens computed together, in order; of each pass the events
/// of its layers with experts, in order.
#[derive(Clone, PartialEq, Debug)]
pub struct Trace {
    /// What ran.
    pub head: Head,
    /// Events of each pass.
    pub passes: Vec<Vec<Event>>,
}

/// Writes a trace as it happens.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    head: Head,
}

impl<W: Write> Writer<W> {
    /// Begins a trace.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn new(mut out: W, head: Head) -> Result<Self> {
        out.write_all(&MAGIC)?;
        out.write_all(&VERSION.to_le_bytes())?;
        out.write_all(&(head.layers.len() as u16).to_le_bytes())?;
        out.write_all(&[0; 4])?;
        out.write_all(&head.image)?;
        for layer in &head.layers {
            out.write_all(&[layer.experts.into(), layer.levels])?;
            out.write_all(&layer.units.to_le_bytes())?;
            out.write_all(&layer.top_k.to_le_bytes())?;
            out.write_all(&[0; 2])?;
            layer.level_bytes.iter().try_for_each(|n| out.write_all(&n.to_le_bytes()))?;
        }
        Ok(Self { out, head })
    }

    /// What stands at the beginning.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// Adds the choices of a layer, `[tokens][top_k]`; nothing if there are none.
    ///
    /// # Errors
    /// They cannot be written, or there is no such layer with experts.
    pub fn event(&mut self, layer: usize, choices: &[Choice]) -> Result<()> {
        if choices.is_empty() {
            return Ok(());
        }
        let top_k = self.head.layers.get(layer).filter(|l| l.experts).context("a layer without experts")?.top_k;
        self.out.write_all(&(layer as u16).to_le_bytes())?;
        self.out.write_all(&((choices.len() / usize::from(top_k)) as u16).to_le_bytes())?;
        for choice in choices {
            self.out.write_all(&choice.unit.to_le_bytes())?;
            self.out.write_all(&[choice.levels, choice.source as u8])?;
            self.out.write_all(&choice.weight.to_le_bytes())?;
        }
        Ok(())
    }

    /// Ends the trace.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn finish(mut self) -> Result<W> {
        self.out.flush()?;
        Ok(self.out)
    }
}

/// Takes little-endian numbers off the front of bytes.
struct Bytes<'b>(&'b [u8]);

impl Bytes<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk().context("the trace is cut off")?;
        self.0 = rest;
        Ok(*head)
    }

    fn u16(&mut self) -> Result<u16> {
        self.array().map(u16::from_le_bytes)
    }
}

impl Trace {
    /// Reads the trace in `path`.
    ///
    /// # Errors
    /// The file cannot be read, or is no trace.
    pub fn load(path: &Path) -> Result<Self> {
        let what = || format!("reading the trace {}", path.display());
        let mut bytes = Vec::new();
        std::fs::File::open(path).and_then(|mut f| f.read_to_end(&mut bytes)).with_context(what)?;
        Self::parse(&bytes).with_context(what)
    }

    /// Reads a trace.
    ///
    /// # Errors
    /// Says what is wrong where.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut input = Bytes(bytes);
        let magic: [u8; 8] = input.array()?;
        ensure!(magic == MAGIC, "it begins with {magic:02x?}, expected a trace; make one with `forebay run --trace`");
        let version = input.u16()?;
        ensure!(version == VERSION, "version {version}, expected {VERSION}");
        let count = usize::from(input.u16()?);
        ensure!((1..=MAX_LAYERS).contains(&count), "{count} layers, expected 1 to {MAX_LAYERS}");
        input.array::<4>()?;
        let image = input.array()?;
        let layers =
            (0..count).map(|l| layer(&mut input).with_context(|| format!("layer {l}"))).collect::<Result<_>>()?;
        let head = Head { image, layers };
        let mut passes: Vec<Vec<Event>> = Vec::new();
        while !input.0.is_empty() {
            let number = passes.iter().map(Vec::len).sum::<usize>();
            let event = event(&mut input, &head).with_context(|| format!("event {number}"))?;
            match passes.last_mut() {
                Some(pass) if pass.last().is_some_and(|last| last.layer < event.layer) => pass.push(event),
                _ => passes.push(vec![event]),
            }
        }
        let trace = Self { head, passes };
        // The last pass may have been cut short; the others have every layer.
        let experts = trace.head.layers.iter().filter(|l| l.experts).count();
        if let Some((at, pass)) = trace.passes.iter().enumerate().find(|(_, pass)| pass.len() != experts) {
            bail!("pass {at} has the choices of {} layers, expected {experts}", pass.len());
        }
        Ok(trace)
    }

    /// Tokens of a pass.
    #[must_use]
    pub fn tokens(&self, pass: usize) -> usize {
        let first = self.passes.get(pass).and_then(|events| events.first());
        first.map_or(0, |event| event.choices.len() / usize::from(self.head.layers[event.layer].top_k))
    }
}

fn layer(input: &mut Bytes<'_>) -> Result<Layer> {
    let [experts, levels] = input.array()?;
    let (units, top_k) = (input.u16()?, input.u16()?);
    input.array::<2>()?;
    let mut level_bytes = [0; MAX_LEVELS];
    for bytes in &mut level_bytes {
        *bytes = u32::from_le_bytes(input.array()?);
    }
    ensure!(experts <= 1, "kind {experts}, expected 0 or 1");
    ensure!((1..=MAX_LEVELS).contains(&levels.into()), "{levels} levels, expected 1 to {MAX_LEVELS}");
    ensure!((1..=MAX_UNITS).contains(&units.into()), "{units} units, expected 1 to {MAX_UNITS}");
    let most = if experts == 1 { MAX_TOP_K } else { MAX_UNITS };
    ensure!(top_k > 0 && top_k <= units && usize::from(top_k) <= most, "{top_k} of {units} units a token");
    Ok(Layer { experts: experts == 1, units, top_k, levels, level_bytes })
}

fn event(input: &mut Bytes<'_>, head: &Head) -> Result<Event> {
    let (index, tokens) = (usize::from(input.u16()?), usize::from(input.u16()?));
    let layer = head.layers.get(index).filter(|l| l.experts);
    let layer = layer.with_context(|| format!("layer {index}, expected one with experts"))?;
    let count = tokens * usize::from(layer.top_k);
    ensure!(tokens > 0 && count * CHOICE_BYTES <= input.0.len(), "{tokens} tokens, but {} bytes left", input.0.len());
    let mut choices = Vec::with_capacity(count);
    for _ in 0..count {
        let unit = input.u16()?;
        let [levels, source] = input.array()?;
        let weight = f32::from_le_bytes(input.array()?);
        ensure!(unit < layer.units, "expert {unit} of {}", layer.units);
        ensure!(levels <= layer.levels, "{levels} levels of {}", layer.levels);
        let source = match source {
            0 => Source::Resident,
            1 => Source::InFlight,
            2 => Source::Read,
            3 => Source::Skip,
            _ => bail!("source {source}, expected 0 to 3"),
        };
        choices.push(Choice { unit, levels, source, weight, score: 0.0 });
    }
    Ok(Event { layer: index, choices })
}

const _: () = assert!(LAYER_BYTES == 2 + 2 + 2 + 2 + 4 * MAX_LEVELS);

#[cfg(test)]
mod tests {
    use super::*;

    fn head() -> Head {
        let dense = Layer { experts: false, units: 3, top_k: 3, levels: 1, level_bytes: [4096, 0, 0, 0] };
        let experts = Layer { experts: true, units: 8, top_k: 2, levels: 2, level_bytes: [8192, 4096, 0, 0] };
        Head { image: [7; 16], layers: vec![dense, experts, experts] }
    }

    fn choices(units: &[u16]) -> Vec<Choice> {
        let choice = |&unit| Choice { unit, levels: 2, source: Source::Read, weight: 0.5, score: 0.0 };
        units.iter().map(choice).collect()
    }

    fn written() -> Vec<u8> {
        let mut writer = Writer::new(Vec::new(), head()).unwrap();
        writer.event(0, &[]).unwrap();
        for units in [&[1, 2, 3, 4][..], &[5, 6]] {
            writer.event(1, &choices(units)).unwrap();
            writer.event(2, &choices(units)).unwrap();
        }
        writer.finish().unwrap()
    }

    #[test]
    fn what_is_written_is_read() {
        let trace = Trace::parse(&written()).unwrap();
        assert_eq!(trace.head, head());
        assert_eq!(trace.passes.len(), 2);
        assert_eq!((trace.tokens(0), trace.tokens(1)), (2, 1));
        assert_eq!(trace.passes[1][1], Event { layer: 2, choices: choices(&[5, 6]) });
        assert_eq!(head().layers[1].bytes(1, 2), 4096);
    }

    #[test]
    fn damage_is_an_error() {
        let good = written();
        for len in 0..good.len() {
            // Cut anywhere, nothing panics; between passes the shorter trace is whole.
            let _ = Trace::parse(&good[..len]);
        }
        let end = good.len();
        for (at, byte) in [(0, 0), (8, 9), (end - 8, 8), (end - 6, 3), (end - 5, 4)] {
            let mut bad = good.clone();
            bad[at] = byte;
            assert!(Trace::parse(&bad).is_err(), "byte {at}");
        }
        assert!(Trace::parse(&good[..end - 1]).is_err());
    }
}
