//! What only the RISC-V boards have: further harts, with and without vectors, in machine mode and under firmware.

use forebay_kernels::attention::KvFormat;

use crate::bundled;
use crate::machine::{Boot, RISCV64, RISCV64_SBI, SIFIVE_U, file};

/// One hart and two give the same bits: called by software interrupts in machine mode, and by the firmware.
#[test]
fn further_harts_compute() {
    // Large enough that harts have work to share all the time.
    let disk = file(bundled());
    let two = "cores=2 generate=4 text=Once upon a time";
    let vectors = "rv64,v=true,vlen=128";
    for (machine, cpu, harts) in [
        (&RISCV64, "rv64", "2"),
        (&RISCV64, vectors, "2"),
        (&RISCV64_SBI, "rv64", "2"),
        (&RISCV64_SBI, vectors, "2"),
        // Hart 0 sleeps, and hart 1 boots.
        (&SIFIVE_U, "", "3"),
    ] {
        let boot = Boot { cpu, disk: Some(&disk), more: &["-smp", harts], ..Boot::new(machine, two) };
        let Some(report) = boot.run() else { continue };
        report.agrees(bundled(), KvFormat::F16);
        report.shows_further_cores(2);
    }
    // There is no second hart; there are more than there are stacks for.
    for machine in [&RISCV64, &RISCV64_SBI] {
        for (harts, words) in [("1", "cores=2"), ("8", "cores=8")] {
            let boot = Boot { disk: Some(&disk), more: &["-smp", harts], ..Boot::new(machine, words) };
            let Some(report) = boot.run() else { continue };
            report.fails(2, "cores were asked for");
        }
    }
}
