//! `forebay convert`

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use clap::Args;
use forebay::convert::{ConvertOptions, convert};
use forebay::moments::Moments;
use forebay::neurons::NeuronPlan;

use super::{WeightArgs, check_output};
use crate::host::models::Bar;
use crate::host::size::Size;

#[derive(Args)]
pub struct ConvertArgs {
    /// A Hugging Face folder (config.json, *.safetensors, tokenizer.json) or a GGUF file
    model: PathBuf,
    /// The image to write
    #[arg(short, long, value_name = "IMAGE")]
    output: PathBuf,
    #[command(flatten)]
    weights: WeightArgs,
    /// Alignment of everything that is read: a power of two from 512 to 1M, at least the device's block
    #[arg(long, value_name = "SIZE", default_value = "4096")]
    page: Size,
    /// Whether groups of 1 to 4 bits have a minimum besides their scale: two bytes more a group [default: where it is worth
    /// them]
    #[arg(long, value_name = "true|false")]
    affine: Option<bool>,
    /// Put the neurons of dense layers in the order that `forebay calibrate` found, with what predicts the clusters that a
    /// token needs
    #[arg(long, value_name = "NEURONS")]
    neurons: Option<PathBuf>,
    /// Let errors of streamed weights of 1 to 4 bits count as much as they matter to a text, which `forebay calibrate
    /// --moments` found out: low precision gets much better. A GGUF file's own codes are then kept only in
    /// units of one level (--unit-fields 4)
    #[arg(long, value_name = "MOMENTS")]
    moments: Option<PathBuf>,
    /// With --moments: what errors of the first levels of a unit alone count, those of all its levels counting 1. More makes
    /// low precision better and full precision worse
    #[arg(long, value_name = "X", default_value = "0.2", requires = "moments", value_parser = super::factor)]
    prefix_weight: f32,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

pub fn main(args: &ConvertArgs) -> Result<()> {
    use std::io::Write;
    check_output(&args.output)?;
    let neurons = args.neurons.as_deref().map(NeuronPlan::read).transpose()?.map(Arc::new);
    let moments = args.moments.as_deref().map(Moments::open).transpose()?.map(Arc::new);
    let options = ConvertOptions {
        neurons,
        moments,
        affine: args.affine,
        prefix_weight: args.prefix_weight,
        page: u32::try_from(args.page.bytes).unwrap_or(u32::MAX),
        ..args.weights.options()
    };
    let mut bar = Bar::new("converting");
    let report = convert(&args.model, &args.output, &options, &mut bar);
    bar.finish();
    let report = report?;
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
    } else {
        write!(out, "{report}")?;
    }
    Ok(())
}
