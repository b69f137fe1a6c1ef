//! What only the AArch64 boards have: exception levels, dot products found at run time, further cores, SD cards, and
//! hardware without a debugger.

use forebay::boards::{Board, BootFiles, MediumKind, write_medium};
use forebay::convert::Silent;
use forebay_kernels::attention::KvFormat;

use crate::machine::{AARCH64, Boot, File, RASPI3, RASPI4, card_of, file};
use crate::{PROMPT, bundled, fixture};

/// Firmware hands over on EL1, EL2 or EL3; the scalar definition and the vector code agree.
#[test]
fn every_exception_level_and_back_end() {
    let disk = file(fixture());
    let levels = [
        ("EL1", "virt"),
        ("EL2", "virt,virtualization=on"),
        ("EL3", "virt,secure=on"),
        ("EL3", "virt,secure=on,virtualization=on"),
    ];
    for (level, machine) in levels {
        // On EL3 there is no firmware, and the second core comes out of reset too.
        let boot = Boot { disk: Some(&disk), more: &["-M", machine, "-smp", "2"], ..Boot::new(&AARCH64, PROMPT) };
        let Some(report) = boot.run() else { return };
        report.agrees(fixture(), KvFormat::F16);
        assert!(report.line("forebay ").ends_with(level), "{machine}");
    }
}

/// Cortex-A76 has the dot-product extension, A53 and A72 do not; each back-end that a processor has gives the same bits.
#[test]
fn dot_products_are_found_at_run_time() {
    let disk = file(fixture());
    for (cpu, best) in [("cortex-a53", "neon"), ("cortex-a72", "neon"), ("cortex-a76", "dotprod")] {
        let boot = |words: String| Boot { cpu, disk: Some(&disk), ..Boot::new(&AARCH64, words) }.run();
        let Some(report) = boot(PROMPT.into()) else { return };
        report.agrees(fixture(), KvFormat::F16);
        assert!(report.line("image: ").ends_with(&format!("kernels {best} on 1 core")), "{cpu}");
        boot(format!("{PROMPT} backend=scalar")).unwrap().agrees(fixture(), KvFormat::F16);
        let dotprod = boot(format!("{PROMPT} backend=dotprod")).unwrap();
        match best {
            "dotprod" => drop(dotprod.agrees(fixture(), KvFormat::F16)),
            _ => dotprod.fails(2, "error: this processor has no such back-end"),
        }
    }
}

/// One core and several give the same bits: started by PSCI over HVC or SMC, and by a spin table.
#[test]
fn further_cores_compute() {
    // Large enough that cores have work to share all the time.
    let disk = file(bundled());
    let machines = [
        (&AARCH64, ["-M", "virt", "-smp", "2"]),
        (&AARCH64, ["-M", "virt,virtualization=on", "-smp", "2"]),
        (&RASPI3, ["-M", "raspi3b", "-smp", "4"]),
        (&RASPI4, ["-M", "raspi4b", "-smp", "4"]),
    ];
    for (machine, more) in machines {
        let two = format!("cores=2 {}generate=2 text=Once upon a time", machine.bounds);
        let Some(report) = (Boot { disk: Some(&disk), more: &more, ..Boot::new(machine, two) }).run() else { return };
        report.agrees(bundled(), KvFormat::F16);
        report.shows_further_cores(2);
    }
    // There is no second core; there are more than there are stacks for; there is no firmware to start one.
    for (more, words) in [
        (["-M", "virt", "-smp", "1"], "cores=2"),
        (["-M", "virt", "-smp", "8"], "cores=8"),
        (["-M", "virt,secure=on", "-smp", "2"], "cores=2"),
    ] {
        let boot = Boot { disk: Some(&disk), more: &more, ..Boot::new(&AARCH64, words) };
        boot.run().unwrap().fails(2, "cores were asked for");
    }
}

/// The card that `forebay image` makes is one that the board reads.
#[test]
fn a_written_card_is_read() {
    let disk = file(fixture());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("card");
    let medium = Board::by_name("raspi").and_then(|board| board.medium(MediumKind::Card)).unwrap();
    write_medium(medium, &disk.path, &path, &BootFiles::default(), &mut Silent).unwrap();
    let card = File::of_card(path, folder);
    let Some(report) = (Boot { disk: Some(&card), ..Boot::new(&RASPI4, PROMPT) }).run() else { return };
    report.agrees(fixture(), KvFormat::F16);
}

/// What is wrong with a card, rather than with the image on it.
#[test]
fn cards_are_looked_at() {
    let card = card_of(fixture());
    let mut unpartitioned = card.clone();
    unpartitioned[446..512].fill(0);
    // The partition is there, the card's end is not.
    let short = card[..card.len() / 2].to_vec();
    assert!(short.len() < (2 << 20) + fixture().len());
    for machine in [&RASPI3, &RASPI4] {
        let boot = |card: &[u8]| {
            let disk = File::of_card_bytes(card);
            Boot { disk: Some(&disk), ..Boot::new(machine, PROMPT) }.run()
        };
        let Some(report) = boot(&unpartitioned) else { return };
        report.fails(3, "error: SD card: no partition of type 0xda");
        boot(&short).unwrap().fails(8, "error: SD card: the image's partition ends at byte");
    }
}

/// A block that comes wrong from the card has not its checksum, and is read again.
#[test]
fn a_cards_errors_are_met_by_checksums() {
    let card = file(&card_of(fixture()));
    // The last page of the image is a unit's.
    let sector = ((2 << 20) + fixture().len()) / 512 - 8;
    for (once, status) in [("on", 0), ("off", 9)] {
        let fault = format!("file.inject-error.0.event=read_aio,file.inject-error.0.sector={sector}");
        let layers = format!("driver=raw,file.driver=blkdebug,file.image.driver=file,{fault}");
        let drive = format!("{layers},file.inject-error.0.once={once},file.image.filename={}", card.path.display());
        let more = ["-drive", &(drive + ",if=sd")];
        let Some(report) = (Boot { more: &more, ..Boot::new(&RASPI3, PROMPT) }).run() else { return };
        match status {
            0 => {
                report.agrees(fixture(), KvFormat::F16);
                assert!(report.line("reads: ").ends_with("; 1 tried again"), "the error was not met");
            }
            _ => report.fails(status, "failed 3 times: checksum mismatch"),
        }
    }
}
