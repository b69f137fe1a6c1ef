//! The same tokens on bare metal: board binaries boot in QEMU, read an image from a virtio disk, an SD card, SPI NOR or
//! mapped flash, and their tokens and the hash of all their logits' bits are those of this host.
//!
//! Needs `qemu-system-aarch64`, `qemu-system-arm`, `qemu-system-riscv64` and a bare-metal toolchain (see `.ci/bare-metal`). Where they
//! are missing the tests say SKIPPED and pass, unless `FOREBAY_REQUIRE_BOARDS` is 1, as it is in CI.
#![cfg(unix)]

mod aarch64;
mod machine;
mod riscv64;
mod serve;

use std::sync::OnceLock;

use forebay::convert::{ConvertOptions, WeightChoice};
use forebay_conformance::hostile::reseal;
use forebay_conformance::{fixtures, image_of, reference};
use forebay_kernels::attention::KvFormat;
use forebay_storage::image::{MAGIC, SUPERBLOCK_SLOT};

use machine::{AARCH64, Boot, Disk, File, MACHINES, MPS2_AN386, RASPI3, RISCV64, RISCV64_SBI, file, repository};

/// The small mixture-of-experts fixture, converted once.
fn fixture() -> &'static [u8] {
    static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
    IMAGE.get_or_init(|| image_of(&fixtures().join("lfm2moe"), &ConvertOptions::default()).unwrap())
}

/// The bundled model, converted once.
fn bundled() -> &'static [u8] {
    static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
    IMAGE.get_or_init(|| {
        image_of(&repository().join("host-tools/models/tiny-lfm2moe"), &ConvertOptions::default()).unwrap()
    })
}

/// Offset of the image's length in a superblock; docs/format.md specifies it.
const IMAGE_LEN: usize = 24;

const PROMPT: &str = "tokens=1,17,205,33,60,4 generate=12";

#[test]
fn fixture_has_the_hosts_bits_on_every_processor() {
    let disk = file(fixture());
    for machine in MACHINES {
        for cpu in machine.cpus {
            let boot = Boot { cpu, disk: Some(&disk), ..Boot::new(machine, PROMPT) };
            let Some(report) = boot.run() else { break };
            let (prompt, answer) = report.agrees(fixture(), KvFormat::F16);
            assert_eq!((prompt, answer.len()), (vec![1, 17, 205, 33, 60, 4], 12));
            // RISC-V's vector unit is found at run time, by `misa` or by the device tree.
            let vectors = cpu.contains("v=true");
            assert_eq!(report.line("image: ").contains("kernels rvv"), vectors, "{cpu}");
        }
    }
}

/// With f32 weights the continuation is the one that transformers computed.
#[test]
fn f32_weights_continue_as_the_reference_does() {
    let case = fixtures().join("lfm2moe");
    let want = reference::load(&case).unwrap();
    let options = ConvertOptions { weights: Some(WeightChoice::F32), ..ConvertOptions::default() };
    let image = image_of(&case, &options).unwrap();
    let disk = file(&image);
    let (prompt, continuation) = want.tokens.split_at(want.prompt_len);
    let ids: Vec<String> = prompt.iter().map(u32::to_string).collect();
    let words = format!("kv=f32 tokens={} generate={}", ids.join(","), continuation.len());
    for machine in MACHINES {
        let boot = Boot { disk: Some(&disk), ..Boot::new(machine, words.clone()) };
        let Some(report) = boot.run() else { continue };
        assert_eq!(report.agrees(&image, KvFormat::F32).1, continuation);
    }
}

/// Text in, text out, in memory of a third of the image.
#[test]
fn bundled_model_runs_in_a_third_of_its_size() {
    let image = bundled();
    let disk = file(image);
    for machine in MACHINES {
        let fast = matches!(machine.disk, Disk::Virtio | Disk::Mapped(..));
        let generate = if fast { 16 } else { 3 };
        let words = format!("{}generate={generate} text=Once upon a time", machine.bounds);
        let boot = Boot { disk: Some(&disk), ..Boot::new(machine, words) };
        let Some(report) = boot.run() else { continue };
        report.agrees(image, KvFormat::F16);
        let text = report.text.lines().find(|line| line.starts_with("Once upon a time"));
        assert!(text.is_some_and(|text| text.split(' ').count() >= 4 + generate / 4), "no text");
        let (planned, stack) = (report.numbers("plan: arena ")[0], report.numbers("stack: "));
        let (linked, stacks) = machine.kernel().unwrap().arena_and_stacks();
        // The Pi takes the memory that it has, and is held to a bound here; its stacks are those of four cores.
        let (arena, stacks) = if linked > 0 { (linked, stacks) } else { (planned, stack[1]) };
        assert!(planned <= arena && stack[1] <= stacks);
        let ram = arena + stacks;
        assert!(ram * 3 <= image.len() as u64, "{ram} bytes of arena and stacks for an image of {}", image.len());
        assert!(stack[0] < stack[1] * 9 / 10, "the stack is nearly full");
        match machine.disk {
            Disk::Mapped(..) => assert_eq!(report.numbers("reads: ")[..2], [0, 0], "mapped flash was copied"),
            _ => assert!(report.numbers("pool: ")[1] > 0, "nothing was streamed"),
        }
    }
}

/// A disk of 1 MB/s answers while the processor computes, and is asked for several reads at a time.
#[test]
fn reads_overlap_computing() {
    let disk = file(fixture());
    // The pool holds few units, so that reading goes on to the end.
    let words = format!("{PROMPT} depth=4 context=32 batch=1 arena=200704");
    // Without DMA a card's data come when the processor fetches them.
    for machine in MACHINES.into_iter().filter(|machine| machine.disk == Disk::Virtio) {
        let drive = ",throttling.bps-read=1000000";
        let boot = Boot { disk: Some(&disk), drive, ..Boot::new(machine, words.clone()) };
        let Some(report) = boot.run() else { continue };
        report.agrees(fixture(), KvFormat::F16);
        let [reads, bytes, most, waited, ..] = report.numbers("reads: ")[..] else { panic!("reads") };
        assert!(bytes > fixture().len() as u64, "the image was read only once");
        assert!(most >= 3, "at most {most} reads in flight");
        assert!(waited < reads, "each of {reads} reads was waited for");
    }
}

#[test]
fn flash_gives_the_same_bits() {
    for machine in MACHINES.into_iter().filter(|machine| machine.flash_len > 0) {
        let flash = file(fixture());
        let flash = Some(flash.flash(machine.flash_len));
        let Some(report) = (Boot { flash, ..Boot::new(machine, PROMPT) }).run() else { continue };
        report.agrees(fixture(), KvFormat::F16);
        assert!(report.line("store: ").starts_with("flash"));
        assert_eq!(report.numbers("reads: ")[..2], [0, 0], "mapped flash was copied");
    }
}

#[test]
fn what_is_wrong_is_said() {
    let image = fixture();
    let good = file(image);
    let cut = file(&image[..image.len() / 2 / 4096 * 4096]);
    // The last page belongs to a unit, or to resident tensors: everything has a checksum.
    let mut damaged = image.to_vec();
    let page = damaged.len() - 4096;
    damaged[page..].iter_mut().for_each(|byte| *byte ^= 0x10);
    let damaged = file(&damaged);
    let mut other = image.to_vec();
    // The major version of both superblocks, behind the magic.
    for slot in [0, SUPERBLOCK_SLOT as usize] {
        other[slot + MAGIC.len()] ^= 0x40;
    }
    let other = file(&other);
    let nothing = file(&[0; 65536]);
    // An image that is longer than any flash of these machines: one superblock says so, the other is erased.
    let mut long = image.to_vec();
    long[IMAGE_LEN..][..8].copy_from_slice(&(1u64 << 30).to_le_bytes());
    long[SUPERBLOCK_SLOT as usize..][..MAGIC.len()].fill(0xff);
    reseal(&mut long);
    let long = file(&long);
    for machine in MACHINES {
        let Some(report) = Boot::new(machine, PROMPT).run() else { continue };
        match machine.disk {
            Disk::Virtio => report.fails(3, "error: there is no disk, and no image in flash"),
            Disk::SdCard => report.fails(3, "error: there is no SD card, or it does not answer"),
            Disk::Mapped(..) => report.fails(3, "error: there is no disk, and no image in flash"),
            // The chip is soldered in, and erased.
            Disk::SpiNor(_) => report.fails(6, "error: cannot open the image: not an image"),
        }
        let run = |disk: &File, words: &str| Boot { disk: Some(disk), ..Boot::new(machine, words) }.run().unwrap();
        // Mapped flash is looked into before anything else, unless the words say that the image is there.
        let source = if matches!(machine.disk, Disk::Mapped(..)) { "image=flash " } else { "" };
        run(&nothing, &format!("{source}{PROMPT}")).fails(6, "error: cannot open the image: not an image");
        run(&long, PROMPT).fails(8, "error: cannot open the image: store: ");
        if machine.disk.fixed().is_none() {
            run(&cut, PROMPT).fails(8, "error: cannot open the image: store: ");
        }
        run(&other, PROMPT).fails(7, "is not supported, expected 1.x");
        run(&damaged, PROMPT).fails(9, "checksum mismatch");
        run(&good, "tokens=1,99999").fails(2, "error: token 99999 is outside of the vocabulary of 288");
        run(&good, "text=no tokenizer here").fails(2, "error: the image has no tokenizer");
        run(&good, "speed=11").fails(2, "error: unknown word \"speed=11\"");
        // The refusal names the number of bytes that does, and it does.
        // Of mapped flash nothing is kept in the arena.
        let little = if matches!(machine.disk, Disk::Mapped(..)) { 16384 } else { 65536 };
        let refused = run(&good, &format!("{PROMPT} arena={little}"));
        let message = format!("error: the arena of {little} bytes is too small");
        refused.fails(10, &message);
        let need = refused.numbers(&message)[0];
        run(&good, &format!("{PROMPT} arena={need}")).agrees(image, KvFormat::F16);
        run(&good, &format!("{PROMPT} arena={}", need - 4096)).fails(10, &format!("needs at least {need} bytes"));
    }
}

/// A read that the device fails is tried again; one that it keeps failing ends the run with its name.
#[test]
fn device_errors_are_tried_again_and_then_named() {
    let disk = file(fixture());
    // The last page of the image is a unit's.
    let sector = fixture().len() / 512 - 8;
    // QEMU's cards do not tell of errors beneath them.
    for machine in MACHINES.into_iter().filter(|machine| machine.disk == Disk::Virtio) {
        let boot = |sector: usize, once: &str| {
            let fault = format!("file.inject-error.0.event=read_aio,file.inject-error.0.sector={sector}");
            let layers = format!("driver=raw,file.driver=blkdebug,file.image.driver=file,{fault}");
            let name = format!("file.image.filename={},if=none,id=disk,readonly=on", disk.path.display());
            let drive = format!("{layers},file.inject-error.0.once={once},{name}");
            let more = ["-drive", &drive, "-device", "virtio-blk-device,drive=disk"];
            Boot { more: &more, ..Boot::new(machine, PROMPT) }.run()
        };
        let Some(report) = boot(sector, "on") else { continue };
        report.agrees(fixture(), KvFormat::F16);
        assert!(report.line("reads: ").ends_with("; 1 tried again"), "the error was not met");
        let report = boot(sector, "off").unwrap();
        report.fails(4, "failed 3 times: the device reported an error");
        boot(0, "off").unwrap().fails(4, "the device reported an error: virtio-blk: I/O error");
    }
}

/// A disk that stops answering is given up, whether nothing has been read yet or the model is running.
#[test]
fn silence_is_given_up() {
    let disk = file(fixture());
    // The pool holds few units, so that reading goes on to the end.
    let words = format!("patience=1 {PROMPT} context=32 batch=1 arena=200704");
    // The SPI NOR driver's own tests have a chip that dies.
    for machine in MACHINES.into_iter().filter(|machine| machine.disk.fixed().is_none()) {
        let boot = |drive| Boot { disk: Some(&disk), drive, ..Boot::new(machine, words.clone()) }.run();
        let Some(report) = boot(",throttling.bps-read=100") else { continue };
        report.fails(5, "stopped answering");
        if machine.disk == Disk::Virtio {
            let late = ",throttling.bps-read=1000,throttling.bps-read-max=600000";
            let report = boot(late).unwrap();
            assert!(!report.line("prompt: ").is_empty());
            report.fails(5, "error: the store stopped answering with ");
        }
    }
}

/// The core has no allocator, and boards add none.
#[test]
fn nothing_allocates() {
    for machine in MACHINES {
        let Some(kernel) = machine.kernel() else { continue };
        let bytes = std::fs::read(&kernel.elf).unwrap();
        let names = |name: &[u8]| bytes.windows(name.len()).any(|window| window == name);
        assert!(names(b"forebay_runtime"), "the binary has no symbols to look at");
        assert!(!names(b"__rust_alloc") && !names(b"__rdl_alloc"), "{} links an allocator", machine.name);
    }
}

/// What a board does not have, memory or a floating-point unit, ends the run with the exception's name.
#[test]
fn exceptions_are_reported() {
    let little_memory = Boot { more: &["-m", "4M"], ..Boot::new(&AARCH64, PROMPT) };
    if let Some(report) = little_memory.run() {
        report.fails(101, "data abort: the bus answered with an error");
    }
    for machine in [&RISCV64, &RISCV64_SBI] {
        let no_floats = Boot { cpu: "rv64,zfa=false,d=false,f=false", ..Boot::new(machine, PROMPT) };
        if let Some(report) = no_floats.run() {
            report.fails(101, "illegal instruction");
        }
    }
}

/// As on a board without a debugger: nothing answers semihosting calls, the words come from the device tree or there
/// are none, and the program ends by saying its status.
#[test]
fn boards_run_without_semihosting() {
    let image = bundled();
    let disk = file(image);
    for machine in [&RASPI3, &MPS2_AN386] {
        let boot = Boot { disk: Some(&disk), semihosting: false, until: Some("halted"), ..Boot::new(machine, "") };
        let Some(report) = boot.run() else { continue };
        report.has_the_hosts_bits(image, KvFormat::F16);
        assert_eq!(report.line("status "), "0; halted");
    }
}
