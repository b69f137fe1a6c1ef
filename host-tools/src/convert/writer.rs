//! Laying an image out, encoding its extents on all processors, and putting it in place.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use anyhow::{Context, Result, bail};
use forebay_kernels::weights::{Encoding, MatrixShape, ROW_BLOCK};
use forebay_runtime::model::record::{LayerRecord, MatrixRecord, ModelRecord, NO_LAYER, TensorRecord};
use forebay_runtime::model::unit::UnitHead;
use forebay_storage::image::{
    ExtentKind, ExtentRecord, ExtentTable, SUPERBLOCK_SLOT, Section, SectionKind, Superblock, crc32c, data_start,
};
use half::f16;
use zerocopy::IntoBytes;

use super::encode::{Aims, Scratch, Tallies, encode, encoding_name};
use super::plan::{Content, Plan, Resident};
use super::{ConvertOptions, Progress, Tally};
use crate::quantize::Feedback;
use crate::source::Source;
use crate::temporary::Temporary;

/// Alignment of a tensor in its group.
const TENSOR_ALIGN: u64 = 64;
/// Longest extent of a group.
const CHUNK: u64 = 1 << 20;
/// Output bytes of a resident tensor that are encoded at once.
const STEP: u64 = 512 << 10;

/// The sections that are not about weights.
pub(super) struct Sections {
    pub tokenizer: Option<Vec<u8>>,
    pub chat_template: Option<Vec<u8>>,
    pub chat_turns: Option<Vec<u8>>,
    pub metadata: Vec<u8>,
}

/// What was written.
pub(super) struct Written {
    pub image_len: u64,
    pub resident_len: u64,
    pub unit_len: u64,
    pub tallies: Tallies,
}

/// An extent before its checksums are known.
struct Extent {
    kind: ExtentKind,
    offset: u64,
    levels: Vec<u64>,
}

/// Where everything lies.
struct Layout {
    extents: Vec<Extent>,
    /// Image offset of each resident tensor.
    tensors: Vec<u64>,
    /// First extent of each layer's units.
    first_units: Vec<usize>,
    /// The TENSORS section.
    tensor_section: Vec<u8>,
    /// The MODEL section.
    model_section: Vec<u8>,
    /// Offset of MODEL, TENSORS, EXTENTS, and the others in order.
    sections: Vec<(SectionKind, u64, u64)>,
    image_len: u64,
    resident_len: u64,
}

fn layout(
    plan: &Plan<'_>,
    (mut model, mut layers): (ModelRecord, Vec<LayerRecord>),
    sections: &Sections,
    page: u32,
) -> Result<Layout> {
    let page64 = u64::from(page);
    // Groups: the tensors of no layer first, then each layer's. Offsets are from the group's start here.
    let order = core::iter::once(NO_LAYER).chain(0..layers.len() as u16);
    let mut groups: Vec<(u16, u64)> = Vec::new();
    let mut offsets = vec![0; plan.residents.len()];
    for layer in order {
        let mut at = 0u64;
        for (offset, resident) in offsets.iter_mut().zip(&plan.residents).filter(|(_, r)| r.layer == layer) {
            *offset = at;
            at = (at + resident.shape.bytes()).next_multiple_of(TENSOR_ALIGN);
        }
        groups.push((layer, at.next_multiple_of(page64)));
    }
    let chunks: u64 = groups.iter().map(|(_, len)| len.div_ceil(CHUNK.max(page64))).sum();
    let units: usize = plan.units.iter().map(|u| u.views.len()).sum();
    let extent_count = chunks + units as u64;

    let lens = [
        (SectionKind::Model, (size_of::<ModelRecord>() + layers.len() * size_of::<LayerRecord>()) as u64),
        (SectionKind::Tensors, (plan.residents.len() * size_of::<TensorRecord>()) as u64),
        (SectionKind::Extents, extent_count * size_of::<ExtentRecord>() as u64),
        (SectionKind::Tokenizer, sections.tokenizer.as_ref().map_or(0, Vec::len) as u64),
        (SectionKind::ChatTemplate, sections.chat_template.as_ref().map_or(0, Vec::len) as u64),
        (SectionKind::ChatTurns, sections.chat_turns.as_ref().map_or(0, Vec::len) as u64),
        (SectionKind::Metadata, sections.metadata.len() as u64),
    ];
    let mut at = data_start(page);
    let mut placed = Vec::new();
    for (kind, len) in lens.into_iter().filter(|(_, len)| *len > 0) {
        placed.push((kind, at, len));
        at = (at + len).next_multiple_of(page64);
    }

    let mut extents = Vec::new();
    let mut tensors = vec![0; plan.residents.len()];
    let first_group = at;
    for (layer, len) in groups {
        for ((tensor, offset), _) in
            tensors.iter_mut().zip(&offsets).zip(&plan.residents).filter(|(_, r)| r.layer == layer)
        {
            *tensor = at + offset;
        }
        let (first, end) = (extents.len(), at + len);
        while at < end {
            let chunk = (end - at).min(CHUNK);
            extents.push(Extent { kind: ExtentKind::Resident, offset: at, levels: vec![chunk] });
            at += chunk;
        }
        let count = ((extents.len() - first) as u32).into();
        let first = (first as u32).into();
        match layers.get_mut(usize::from(layer)) {
            Some(record) => (record.resident_first, record.resident_count) = (first, count),
            None => (model.resident_first, model.resident_count) = (first, count),
        }
    }
    let resident_len = at - first_group;
    let mut first_units = Vec::new();
    for (units, record) in plan.units.iter().zip(&mut layers) {
        record.first_extent = (extents.len() as u32).into();
        first_units.push(extents.len());
        let levels: Vec<u64> = (0..units.shape.levels()).map(|level| units.shape.level_len(level, page)).collect();
        if let Some(len) = levels.iter().find(|len| **len > u64::from(u32::MAX)) {
            bail!("a unit's level of {len} bytes, expected less than 4 GiB; choose narrower units or fewer bits");
        }
        for _ in &units.views {
            extents.push(Extent { kind: ExtentKind::Unit, offset: at, levels: levels.clone() });
            at += levels.iter().sum::<u64>();
        }
    }

    let mut tensor_section = Vec::new();
    for (resident, offset) in plan.residents.iter().zip(&offsets) {
        let record = TensorRecord {
            layer: resident.layer.into(),
            role: (resident.role as u16).into(),
            matrix: MatrixRecord::new(resident.shape),
            offset: (*offset).into(),
            len: resident.shape.bytes().into(),
            reserved: [0; 4],
        };
        tensor_section.extend_from_slice(record.as_bytes());
    }
    let mut model_section = model.as_bytes().to_vec();
    model_section.extend_from_slice(layers.as_bytes());
    Ok(Layout {
        extents,
        tensors,
        first_units,
        tensor_section,
        model_section,
        sections: placed,
        image_len: at,
        resident_len,
    })
}

/// A piece of work.
enum Job {
    /// Row blocks `from..to` of resident tensor `index`.
    Rows { index: usize, from: usize, to: usize },
    /// Unit `unit` of layer `layer`.
    Unit { layer: usize, unit: usize },
}

/// What a piece of work gave.
struct Done {
    tallies: Tallies,
    bytes: u64,
    /// Checksums of a unit's levels.
    crcs: Vec<u32>,
}

fn jobs(plan: &Plan<'_>) -> Vec<Job> {
    let mut jobs = Vec::new();
    for (index, resident) in plan.residents.iter().enumerate() {
        let blocks = (resident.shape.rows as usize).div_ceil(ROW_BLOCK);
        let block_bytes = (resident.shape.bytes() / blocks.max(1) as u64).max(1);
        let step = (STEP / block_bytes).max(1) as usize;
        for from in (0..blocks).step_by(step) {
            jobs.push(Job::Rows { index, from, to: (from + step).min(blocks) });
        }
    }
    for (layer, units) in plan.units.iter().enumerate() {
        jobs.extend((0..units.views.len()).map(|unit| Job::Unit { layer, unit }));
    }
    jobs
}

/// Writes the image of `plan` at `image`.
pub(super) fn write(
    source: &Source,
    plan: &Plan<'_>,
    records: (ModelRecord, Vec<LayerRecord>),
    sections: &Sections,
    image: &Path,
    options: &ConvertOptions,
    progress: &mut dyn Progress,
) -> Result<Written> {
    let page = options.page;
    let layout = layout(plan, records, sections, page)?;
    check(&layout, page)?;
    let temporary = Temporary::create(image)?;
    let file = &temporary.file;
    let jobs = jobs(plan);
    progress.set_total(layout.image_len);

    let work = Work { source, plan, layout: &layout, file, options, inputs: Mutex::default() };
    let threads = options.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let threads = threads.clamp(1, jobs.len().max(1));
    let results = run(&jobs, threads, progress, |job, scratch| work.encode(job, scratch))?;

    let mut tallies = Tallies::new();
    let mut unit_crcs = results.iter().map(|done| &done.crcs).filter(|crcs| !crcs.is_empty());
    for (name, tally) in results.iter().flat_map(|done| &done.tallies) {
        tallies.entry(name.clone()).or_default().add(tally);
    }
    let mut extents = Vec::with_capacity(layout.extents.len());
    let mut buffer = Vec::new();
    for extent in &layout.extents {
        let crcs = match extent.kind {
            ExtentKind::Unit => unit_crcs.next().context("a unit was not written")?.clone(),
            _ => {
                buffer.resize(extent.levels[0] as usize, 0);
                file.read_exact_at(&mut buffer, extent.offset).context("reading back what was written")?;
                vec![crc32c(&buffer)]
            }
        };
        let levels: Vec<(u32, u32)> = extent.levels.iter().map(|len| *len as u32).zip(crcs).collect();
        extents.push(ExtentRecord::new(extent.kind, extent.offset, &levels));
    }
    write_sections(file, &layout, sections, &extents, page)?;
    temporary.finish(image)?;
    progress.advance(layout.image_len - layout.extents.iter().flat_map(|e| &e.levels).sum::<u64>());
    Ok(Written {
        image_len: layout.image_len,
        resident_len: layout.resident_len,
        unit_len: layout.extents.iter().filter(|e| e.kind == ExtentKind::Unit).flat_map(|e| &e.levels).sum(),
        tallies,
    })
}

/// Lets the engine's own parser judge the description, before the long part of the work.
fn check(layout: &Layout, page: u32) -> Result<()> {
    let records: Vec<ExtentRecord> = layout
        .extents
        .iter()
        .map(|e| {
            let levels: Vec<(u32, u32)> = e.levels.iter().map(|len| (*len as u32, 0)).collect();
            ExtentRecord::new(e.kind, e.offset, &levels)
        })
        .collect();
    let superblock = Superblock::new(page, 1, [0; 16], layout.image_len)?;
    let table = ExtentTable::parse(records.as_bytes(), &superblock)?;
    forebay_runtime::model::Model::parse(&layout.model_section, &layout.tensor_section, table, page)
        .context("the model is beyond what an engine accepts")?;
    Ok(())
}

/// Does `jobs` on `threads` threads; results are in the order of the jobs, whoever did them.
fn run(
    jobs: &[Job],
    threads: usize,
    progress: &mut dyn Progress,
    work: impl Fn(&Job, &mut Scratch) -> Result<Done> + Sync,
) -> Result<Vec<Done>> {
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (sender, receiver) = mpsc::sync_channel(threads * 2);
    let mut results: Vec<Option<Done>> = (0..jobs.len()).map(|_| None).collect();
    let mut failure: Option<(usize, anyhow::Error)> = None;
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let sender = sender.clone();
            scope.spawn(|| {
                let sender = sender;
                let mut scratch = Scratch::default();
                while !stop.load(Ordering::Relaxed) {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(job) = jobs.get(index) else { break };
                    if sender.send((index, work(job, &mut scratch))).is_err() {
                        break;
                    }
                }
            });
        }
        drop(sender);
        for (index, result) in receiver {
            match result {
                Ok(done) => {
                    progress.advance(done.bytes);
                    results[index] = Some(done);
                }
                Err(e) => {
                    stop.store(true, Ordering::Relaxed);
                    // Of several failures, the first in the order of the jobs: the same every time.
                    if failure.as_ref().is_none_or(|(first, _)| index < *first) {
                        failure = Some((index, e));
                    }
                }
            }
        }
    });
    match failure {
        Some((_, e)) => Err(e),
        None => results.into_iter().collect::<Option<_>>().context("a part of the image was not written"),
    }
}

/// What all pieces of work have in common.
struct Work<'a> {
    source: &'a Source,
    plan: &'a Plan<'a>,
    layout: &'a Layout,
    file: &'a File,
    options: &'a ConvertOptions,
    /// What the moments say about the input of the layers in work.
    inputs: Mutex<Vec<(usize, Arc<Feedback>)>>,
}

impl Work<'_> {
    fn encode(&self, job: &Job, scratch: &mut Scratch) -> Result<Done> {
        match *job {
            Job::Rows { index, from, to } => {
                let resident = &self.plan.residents[index];
                encode_resident(self.source, resident, self.layout.tensors[index], self.file, from, to, scratch)
            }
            Job::Unit { layer, unit } => self.encode_unit(layer, unit, scratch),
        }
    }

    /// What is known about errors of matrix `m` of a unit.
    fn feedback(&self, layer: usize, unit: usize, m: usize) -> Result<Option<Arc<Feedback>>> {
        let Some(moments) = &self.options.moments else { return Ok(None) };
        if m == 2 {
            let neurons = self.plan.units[layer].neurons(unit);
            return Ok(Some(Arc::new(moments.neurons(layer as u16, &neurons)?)));
        }
        let mut inputs = self.inputs.lock().expect("no thread has panicked");
        if let Some((_, known)) = inputs.iter().find(|(l, _)| *l == layer) {
            return Ok(Some(Arc::clone(known)));
        }
        let found = Arc::new(moments.input(layer as u16)?);
        // Threads work on neighbouring units, so the layers in work are few.
        inputs.truncate(1);
        inputs.insert(0, (layer, Arc::clone(&found)));
        Ok(Some(found))
    }
}

fn encode_resident(
    source: &Source,
    resident: &Resident<'_>,
    offset: u64,
    file: &File,
    from: usize,
    to: usize,
    scratch: &mut Scratch,
) -> Result<Done> {
    let shape = &resident.shape;
    let view = match &resident.content {
        Content::View(view) => view,
        Content::Values(values) => {
            match shape.encoding {
                Encoding::F16 => {
                    let bytes: Vec<u8> = values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
                    file.write_all_at(&bytes, offset)?;
                }
                _ => file.write_all_at(values.as_bytes(), offset)?,
            }
            return Ok(Done { tallies: Tallies::new(), bytes: shape.bytes(), crcs: Vec::new() });
        }
    };
    let parts = Regions::of_blocks(shape, from, to);
    let mut buffers: Vec<Vec<u8>> = parts.iter().map(|&(_, len)| vec![0; len]).collect();
    let (scales, fields) = buffers.split_at_mut(1);
    let mut fields: Vec<&mut [u8]> = fields.iter_mut().map(Vec::as_mut_slice).collect();
    // Resident tensors are always read whole.
    let tally = encode(source, view, shape, from..to, &mut scales[0], &mut fields, &mut Aims::default(), scratch)?;
    let mut bytes = 0;
    for ((at, _), buffer) in parts.iter().zip(&buffers) {
        file.write_all_at(buffer, offset + at)?;
        bytes += buffer.len() as u64;
    }
    Ok(Done { tallies: tallied(shape, tally), bytes, crcs: Vec::new() })
}

fn tallied(shape: &MatrixShape, tally: Tally) -> Tallies {
    BTreeMap::from([(encoding_name(shape.encoding), tally)])
}

/// The parts of a matrix's regions.
struct Regions;

impl Regions {
    /// Offset from the matrix's start and length of row blocks `from..to`: in the scales, then in each field.
    fn of_blocks(shape: &MatrixShape, from: usize, to: usize) -> Vec<(u64, usize)> {
        if !matches!(shape.encoding, Encoding::Quant(_)) {
            let element = if shape.encoding == Encoding::F32 { 4 } else { 2 };
            let row = u64::from(shape.cols) * element;
            let (from, to) = ((from * ROW_BLOCK) as u64, ((to * ROW_BLOCK) as u64).min(shape.rows.into()));
            return vec![(0, 0), (from * row, ((to - from) * row) as usize)];
        }
        let scales = shape.block_scale_bytes();
        let mut parts = vec![((from * scales) as u64, (to - from) * scales)];
        let mut base = shape.scale_bytes();
        for level in 0..shape.levels() {
            let block = shape.block_field_bytes(level);
            parts.push((base + (from * block) as u64, (to - from) * block));
            base += shape.field_bytes(level);
        }
        parts
    }
}

impl Work<'_> {
    fn encode_unit(&self, layer: usize, unit: usize, scratch: &mut Scratch) -> Result<Done> {
        let Self { source, file, options, .. } = *self;
        let (units, page) = (&self.plan.units[layer], options.page);
        let extent = &self.layout.extents[self.layout.first_units[layer] + unit];
        let total: u64 = extent.levels.iter().sum();
        let mut buffer = vec![0u8; usize::try_from(total)?];
        let mut tallies = Tallies::new();
        let mut head = UnitHead::default();
        for (m, (shape, view)) in units.shape.matrices().iter().zip(&units.views[unit]).enumerate() {
            // The regions of one matrix are disjoint and increasing: cut the buffer along them.
            let ranges = core::iter::once(None)
                .chain((0..shape.levels()).map(Some))
                .map(|field| units.shape.region(m, field, page))
                .collect::<Vec<_>>();
            let mut cut = Vec::with_capacity(ranges.len());
            let (mut rest, mut at) = (buffer.as_mut_slice(), 0);
            for range in &ranges {
                let (_, tail) = rest.split_at_mut((range.start - at) as usize);
                let (region, tail) = tail.split_at_mut((range.end - range.start) as usize);
                cut.push(region);
                (rest, at) = (tail, range.end);
            }
            let (scales, fields) = cut.split_at_mut(1);
            let blocks = 0..(shape.rows as usize).div_ceil(ROW_BLOCK);
            let feedback = match shape.encoding {
                Encoding::Quant(_) => self.feedback(layer, unit, m)?,
                _ => None,
            };
            let mut aims = Aims::new(shape, feedback, options.prefix_weight);
            let tally = encode(source, view, shape, blocks, scales[0], fields, &mut aims, scratch)?;
            for (of_level, gain) in head.gains.iter_mut().zip(aims.gains()) {
                of_level[m] = gain.into();
            }
            tallies.entry(encoding_name(shape.encoding)).or_default().add(&tally);
        }
        if extent.levels.len() > 1 {
            buffer[..size_of::<UnitHead>()].copy_from_slice(head.as_bytes());
        }
        let mut crcs = Vec::with_capacity(extent.levels.len());
        let mut at = 0;
        for len in &extent.levels {
            crcs.push(crc32c(&buffer[at..at + *len as usize]));
            at += *len as usize;
        }
        file.write_all_at(&buffer, extent.offset)?;
        Ok(Done { tallies, bytes: total, crcs })
    }
}

fn write_sections(
    file: &File,
    layout: &Layout,
    sections: &Sections,
    extents: &[ExtentRecord],
    page: u32,
) -> Result<()> {
    let content = |kind| -> &[u8] {
        match kind {
            SectionKind::Model => &layout.model_section,
            SectionKind::Tensors => &layout.tensor_section,
            SectionKind::Extents => extents.as_bytes(),
            SectionKind::Tokenizer => sections.tokenizer.as_deref().unwrap_or_default(),
            SectionKind::ChatTemplate => sections.chat_template.as_deref().unwrap_or_default(),
            SectionKind::ChatTurns => sections.chat_turns.as_deref().unwrap_or_default(),
            _ => &sections.metadata,
        }
    };
    // The extents' checksums stand for the weights, so these sections stand for the whole image.
    let id = fnv1a_128(layout.sections.iter().map(|&(kind, ..)| content(kind)));
    let mut superblock = Superblock::new(page, 1, id, layout.image_len)?;
    for &(kind, offset, len) in &layout.sections {
        let bytes = content(kind);
        file.write_all_at(bytes, offset)?;
        superblock.push_section(Section { kind, offset, len, crc: crc32c(bytes) })?;
    }
    let mut slot = [0; SUPERBLOCK_SLOT as usize];
    superblock.write(&mut slot);
    file.write_all_at(&slot, 0)?;
    Ok(())
}

/// FNV-1a of 128 bits (draft-eastlake-fnv): an identity, not a defence.
fn fnv1a_128<'a>(parts: impl Iterator<Item = &'a [u8]>) -> [u8; 16] {
    const BASIS: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let hash = parts.flatten().fold(BASIS, |hash, byte| (hash ^ u128::from(*byte)).wrapping_mul(PRIME));
    hash.to_be_bytes()
}
