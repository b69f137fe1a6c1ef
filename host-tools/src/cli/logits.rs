//! `forebay logits`

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use forebay_runtime::engine::Output;

use super::{MachineArgs, ModelArgs, Wanted, check_ids, check_output};
use crate::host::accounting::PolicyReport;
use crate::host::npy;
use crate::host::session::{self, Extra};

/// Rows of logits that are kept at once.
const LOGIT_ROWS: usize = 16;

#[derive(Args)]
pub struct LogitsArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The tokens
    #[arg(long, value_name = "ID,ID,…", value_delimiter = ',', required = true)]
    token_ids: Vec<u32>,
    #[command(flatten)]
    machine: MachineArgs,
    /// The array to write: f32 [tokens, vocabulary], row i being the scores after tokens 0 to i
    #[arg(short, long, value_name = "FILE.npy")]
    output: PathBuf,
}

pub fn main(args: &LogitsArgs) -> Result<()> {
    let backend = args.machine.backend()?;
    check_output(&args.output)?;
    let found = args.model.find()?;
    let tokens = &args.token_ids;
    let (setup, vocab) = found.file.probe(|image, _| {
        let model = image.model();
        check_ids(tokens, model.vocab())?;
        ensure!(
            tokens.len() <= model.context(),
            "{} tokens are longer than the model's context of {}; give fewer",
            tokens.len(),
            model.context()
        );
        let count = tokens.len();
        let extra = Extra::default();
        let wanted = Wanted { context: count, batch: count, logit_rows: LOGIT_ROWS, extra, with_tokenizer: false };
        let setup = args.machine.setup(&found, image, backend, wanted)?;
        Ok((setup, model.vocab()))
    })?;
    if setup.plan.limits.policy.by_level() {
        eprintln!("note: not full precision: {}", PolicyReport::new(&setup).text());
    }
    let what = || format!("writing {}", args.output.display());
    let mut out = BufWriter::new(File::create(&args.output).with_context(what)?);
    npy::write_header(&mut out, tokens.len(), vocab).with_context(what)?;
    let mut written = Ok(());
    session::run(&found.file, setup, |session| {
        session.feed(tokens, Output::All, |_, rows| {
            if written.is_ok() {
                written = npy::write_values(&mut out, rows);
            }
        })
    })?;
    written.and_then(|()| out.flush()).with_context(what)
}
