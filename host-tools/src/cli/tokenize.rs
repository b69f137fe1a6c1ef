//! `forebay tokenize`

use std::io::Write;

use anyhow::{Context, Result};
use clap::Args;
use forebay_runtime::tokenizer::EncodeOptions;

use super::ModelArgs;
use crate::host::session;

#[derive(Args)]
pub struct TokenizeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text
    #[arg(short, long, value_name = "TEXT")]
    prompt: String,
    /// Leave out the token that begins a text
    #[arg(long)]
    no_bos: bool,
    /// Print the ids as a JSON array
    #[arg(long)]
    json: bool,
}

pub fn main(args: &TokenizeArgs) -> Result<()> {
    let found = args.model.find()?;
    found.file.probe(|_, tokenizer| {
        let tokenizer = tokenizer.with_context(|| format!("{} has no tokenizer", found.file.path.display()))?;
        let options = EncodeOptions { add_bos: tokenizer.add_bos() && !args.no_bos, parse_special: true };
        let (ids, _) = session::encode(&tokenizer, &args.prompt, options)?;
        let mut out = std::io::stdout().lock();
        if args.json {
            writeln!(out, "{}", serde_json::to_string(&ids)?)?;
            return Ok(());
        }
        for id in ids {
            let bytes = tokenizer.token_bytes(id).unwrap_or_default();
            writeln!(out, "{id:>7} {:?}", String::from_utf8_lossy(bytes))?;
        }
        Ok(())
    })
}
