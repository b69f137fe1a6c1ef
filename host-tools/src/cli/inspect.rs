//! `forebay inspect`

use std::io::Write;

use anyhow::Result;
use clap::Args;
use forebay::inspect::inspect;
use forebay_runtime::plan::Plan;
use serde_json::json;

use super::{MachineArgs, ModelArgs, Wanted};
use crate::host::session::Extra;
use crate::host::size::bytes_text;

#[derive(Args)]
pub struct InspectArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens of the longest sequence, for the plan of the arena [default: as the image was planned for, else
    /// the model's, at most 4096]
    #[arg(short, long, value_name = "TOKENS", value_parser = super::positive)]
    context: Option<usize>,
    #[command(flatten)]
    machine: MachineArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub fn main(args: &InspectArgs) -> Result<()> {
    let found = args.model.find()?;
    let inspection = inspect(&found.file.path)?;
    let (plan, units) = found.file.probe(|image, _| {
        let model = image.model();
        let planned = inspection.settings.as_ref().filter(|_| !args.machine.no_plan).map(|settings| settings.context);
        let context = args.context.or(planned).unwrap_or(model.context().min(super::LONG_CONTEXT));
        let wanted =
            Wanted { context, batch: usize::MAX, logit_rows: 1, extra: Extra::default(), with_tokenizer: false };
        let (plan, ..) = args.machine.plan(&found, image, &wanted)?;
        Ok((plan, model.unit_count()))
    })?;
    let mut out = std::io::stdout().lock();
    if args.json {
        let mut json = serde_json::to_value(&inspection)?;
        json["plan"] = plan_json(&plan, units);
        writeln!(out, "{}", serde_json::to_string_pretty(&json)?)?;
        return Ok(());
    }
    writeln!(out, "{inspection}")?;
    print_plan(&mut out, &plan, units)
}

/// Where an arena's bytes go.
pub(super) fn print_plan(out: &mut impl Write, plan: &Plan, units: usize) -> Result<()> {
    writeln!(out, "arena with a context of {} tokens: {}", plan.limits.context, bytes_text(plan.limits.arena))?;
    let own = plan.bookkeeping + plan.limits.reserved;
    for (what, bytes) in [
        ("tables", plan.tables),
        ("resident", plan.resident),
        ("state", plan.state),
        ("working", plan.working),
        ("own", own),
        ("pool", plan.pool),
    ] {
        writeln!(out, "  {what:<9} {bytes:>14}  {}", bytes_text(bytes))?;
    }
    if plan.resident == 0 && plan.pool == 0 {
        writeln!(out, "  weights are used where they lie in flash; batches of {} tokens", plan.batch)?;
    } else {
        writeln!(
            out,
            "  the pool holds {} of {} units{}; batches of {} tokens",
            plan.slots / plan.pieces,
            units,
            if plan.pieces > 1 { ", level by level" } else { "" },
            plan.batch
        )?;
    }
    writeln!(out, "  least     {:>14}  {}", plan.least, bytes_text(plan.least))?;
    Ok(())
}

/// The same for programs.
pub(super) fn plan_json(plan: &Plan, units: usize) -> serde_json::Value {
    json!({
        "context": plan.limits.context,
        "arena": plan.limits.arena,
        "tables": plan.tables,
        "resident": plan.resident,
        "state": plan.state,
        "working": plan.working,
        "bookkeeping": plan.bookkeeping,
        "reserved": plan.limits.reserved,
        "pool": plan.pool,
        "slots": plan.slots,
        "pieces": plan.pieces,
        "slot": plan.slot_len,
        "units": units,
        "batch": plan.batch,
        "least": plan.least,
    })
}
