//! The same tokens on bare metal: board binaries boot in QEMU, read an image from a virtio disk or from flash, and
//! their tokens and the hash of all their logits' bits are those of this host.
//!
//! Needs `qemu-system-aarch64`, `qemu-system-riscv64` and a bare-metal toolchain (see `.ci/bare-metal`). Where they
//! are missing the tests say SKIPPED and pass, unless `FOREBAY_REQUIRE_BOARDS` is 1, as it is in CI.
#![cfg(unix)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use forebay::convert::{ConvertOptions, WeightChoice};
use forebay_conformance::reference::{self, argmax};
use forebay_conformance::{Run, Setup, fixtures, image_of, run, skipped};
use forebay_kernels::attention::KvFormat;
use forebay_storage::image::{MAGIC, SUPERBLOCK_SLOT};

/// Longest time that one boot may take.
const PATIENCE: Duration = Duration::from_secs(100);

/// An emulated machine and its board binary.
struct Machine {
    name: &'static str,
    target: &'static str,
    qemu: &'static str,
    /// QEMU's arguments, but for the processor.
    machine: &'static [&'static str],
    cpus: &'static [&'static str],
    flash_len: u64,
    elf: OnceLock<Option<PathBuf>>,
}

static AARCH64: Machine = Machine {
    name: "aarch64-virt",
    target: "aarch64-unknown-none",
    qemu: "qemu-system-aarch64",
    machine: &["-M", "virt", "-semihosting-config", "enable=on,target=native"],
    cpus: &["cortex-a76", "cortex-a53", "cortex-a72"],
    flash_len: 64 << 20,
    elf: OnceLock::new(),
};

static RISCV64: Machine = Machine {
    name: "riscv64-virt",
    target: "riscv64gc-unknown-none-elf",
    qemu: "qemu-system-riscv64",
    machine: &["-M", "virt", "-bios", "none", "-semihosting-config", "enable=on,target=native"],
    cpus: &["rv64", "rv64,v=true,vlen=128", "rv64,v=true,vlen=256"],
    flash_len: 32 << 20,
    elf: OnceLock::new(),
};

/// Supervisor mode under QEMU's OpenSBI.
static RISCV64_SBI: Machine = Machine {
    name: "riscv64-sbi",
    target: "riscv64gc-unknown-none-elf",
    qemu: "qemu-system-riscv64",
    machine: &["-M", "virt"],
    cpus: &["rv64", "rv64,v=true,vlen=128", "rv64,v=true,vlen=256"],
    flash_len: 32 << 20,
    elf: OnceLock::new(),
};

static MACHINES: [&Machine; 3] = [&AARCH64, &RISCV64, &RISCV64_SBI];

fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Skips loudly, or fails where boards are required.
fn missing(what: &str) {
    let required = std::env::var_os("FOREBAY_REQUIRE_BOARDS").is_some_and(|v| v == "1");
    assert!(!required, "FOREBAY_REQUIRE_BOARDS is set, but {what}");
    skipped(&format!("{what}; nothing was booted"));
}

impl Machine {
    /// The board's binary, built once; `None` if this host cannot build or boot it.
    fn elf(&self) -> Option<&Path> {
        self.elf.get_or_init(|| self.build()).as_deref()
    }

    fn build(&self) -> Option<PathBuf> {
        if !Command::new(self.qemu).arg("--version").stdout(Stdio::null()).status().is_ok_and(|s| s.success()) {
            missing(&format!("{} is not installed", self.qemu));
            return None;
        }
        // One target directory for all boards, so that core and the crates below them are built once a target.
        let target_dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("boards");
        let build = Command::new(repository().canonicalize().unwrap().join(".ci/bare-metal"))
            .args([self.target, "build", "--release", "--locked", "--message-format=json-render-diagnostics"])
            .current_dir(repository().join("board-support/boards").join(self.name))
            .env("CARGO_TARGET_DIR", target_dir)
            .env_remove("RUSTFLAGS")
            .stderr(Stdio::inherit())
            .output()
            .expect("bash runs");
        if build.status.code() == Some(69) {
            missing(&format!("there is no toolchain for {}", self.target));
            return None;
        }
        assert!(build.status.success(), "building {} failed", self.name);
        let messages = String::from_utf8(build.stdout).unwrap();
        let elf = messages
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
            .next_back();
        Some(elf.expect("cargo names the executable"))
    }
}

/// A boot's conditions.
struct Boot<'a> {
    machine: &'a Machine,
    cpu: &'a str,
    disk: Option<&'a Path>,
    /// Added to the disk's `-drive`.
    drive: &'a str,
    flash: Option<&'a Path>,
    words: String,
    /// Further arguments of QEMU; the last `-M` and `-m` count.
    more: &'a [&'a str],
}

impl<'a> Boot<'a> {
    fn new(machine: &'a Machine, words: impl Into<String>) -> Self {
        let cpu = machine.cpus[0];
        Self { machine, cpu, disk: None, drive: "", flash: None, words: words.into(), more: &[] }
    }

    /// Runs to the end; `None` if this host cannot.
    fn run(&self) -> Option<Report> {
        let elf = self.machine.elf()?;
        let mut qemu = Command::new(self.machine.qemu);
        qemu.args(self.machine.machine).args(["-cpu", self.cpu, "-m", "16M", "-nic", "none"]);
        qemu.args(["-display", "none", "-monitor", "none", "-serial", "stdio"]);
        qemu.args(["-global", "virtio-mmio.force-legacy=false"]);
        if let Some(disk) = self.disk {
            let drive = format!("file={},if=none,format=raw,readonly=on,id=disk{}", disk.display(), self.drive);
            qemu.args(["-drive", &drive, "-device", "virtio-blk-device,drive=disk"]);
        }
        if let Some(flash) = self.flash {
            let drive = format!("file={},if=pflash,unit=1,format=raw,readonly=on", flash.display());
            qemu.args(["-drive", &drive]);
        }
        qemu.arg("-kernel").arg(elf).args(["-append", &self.words]).args(self.more);
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("console");
        let console = std::fs::File::create(&log).unwrap();
        qemu.stdin(Stdio::null()).stderr(console.try_clone().unwrap()).stdout(console);
        let mut child = qemu.spawn().unwrap();
        let start = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status.code();
            }
            if start.elapsed() > PATIENCE {
                child.kill().unwrap();
                child.wait().unwrap();
                break None;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let text = String::from_utf8_lossy(&std::fs::read(&log).unwrap()).replace('\r', "");
        println!("--- {} {} {:?} -> {status:?}\n{text}", self.machine.name, self.cpu, self.words);
        if text.contains("Unable to find the RISC-V BIOS") {
            missing("OpenSBI is not installed");
            return None;
        }
        Some(Report { status, text })
    }
}

/// What a boot printed.
struct Report {
    /// Exit status; `None` if it had to be killed.
    status: Option<i32>,
    text: String,
}

impl Report {
    /// The rest of the line that starts with `key`.
    fn line(&self, key: &str) -> &str {
        let line = self.text.lines().find_map(|line| line.strip_prefix(key));
        line.unwrap_or_else(|| panic!("no line {key:?}"))
    }

    fn ids(&self, key: &str) -> Vec<u32> {
        serde_json::from_str(self.line(key)).unwrap()
    }

    /// All numbers of a line, in order.
    fn numbers(&self, key: &str) -> Vec<u64> {
        let words = self.line(key).split(|c: char| !c.is_ascii_digit());
        words.filter(|w| !w.is_empty()).map(|w| w.parse().unwrap()).collect()
    }

    /// Asserts that tokens and logits are this host's for the same image, and gives prompt and answer.
    fn agrees(&self, image: &[u8], kv: KvFormat) -> (Vec<u32>, Vec<u32>) {
        assert_eq!(self.status, Some(0));
        let (prompt, answer) = (self.ids("prompt: "), self.ids("tokens: "));
        let fed: Vec<u32> = prompt.iter().chain(&answer[..answer.len() - 1]).copied().collect();
        let host: Run = run(image, &Setup { kv, ..Setup::default() }, &fed).unwrap();
        let vocab = host.logits.len() / fed.len();
        let rows = host.logits.chunks_exact(vocab).skip(prompt.len() - 1);
        let greedy: Vec<u32> = rows.map(|row| argmax(row) as u32).collect();
        assert_eq!(answer, greedy, "the host continues otherwise");
        let want = format!("{:#018x} over {} rows of {vocab}", host.hash(), fed.len());
        assert_eq!(self.line("logits: "), want, "same tokens, but not the same bits");
        (prompt, answer)
    }

    fn fails(&self, status: i32, message: &str) {
        assert!(self.text.contains(message), "the console does not say {message:?}");
        assert_eq!(self.status, Some(status));
    }
}

/// A file for QEMU that lives as long as the test.
struct File {
    path: PathBuf,
    _dir: tempfile::TempDir,
}

fn file(bytes: &[u8]) -> File {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    std::fs::write(&path, bytes).unwrap();
    File { path, _dir: dir }
}

/// The small mixture-of-experts fixture, converted once.
fn fixture() -> &'static [u8] {
    static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
    IMAGE.get_or_init(|| image_of(&fixtures().join("lfm2moe"), &ConvertOptions::default()).unwrap())
}

const PROMPT: &str = "tokens=1,17,205,33,60,4 generate=12";

#[test]
fn fixture_has_the_hosts_bits_on_every_processor() {
    let disk = file(fixture());
    for machine in MACHINES {
        for cpu in machine.cpus {
            let boot = Boot { cpu, disk: Some(&disk.path), ..Boot::new(machine, PROMPT) };
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
        let boot = Boot { disk: Some(&disk.path), ..Boot::new(machine, words.clone()) };
        let Some(report) = boot.run() else { continue };
        assert_eq!(report.agrees(&image, KvFormat::F32).1, continuation);
    }
}

/// Text in, text out, in memory of a third of the image.
#[test]
fn bundled_model_runs_in_a_third_of_its_size() {
    let model = repository().join("host-tools/models/tiny-lfm2moe");
    let image = image_of(&model, &ConvertOptions::default()).unwrap();
    let disk = file(&image);
    for machine in MACHINES {
        let boot = Boot { disk: Some(&disk.path), ..Boot::new(machine, "generate=16 text=Once upon a time") };
        let Some(report) = boot.run() else { continue };
        report.agrees(&image, KvFormat::F16);
        let text = report.text.lines().find(|line| line.starts_with("Once upon a time"));
        assert!(text.is_some_and(|text| text.split(' ').count() > 8), "no text");
        let (arena, stack) = (report.numbers("plan: arena ")[0], report.numbers("stack: "));
        let ram = arena + stack[1];
        assert!(ram * 3 <= image.len() as u64, "{ram} bytes of arena and stack for an image of {}", image.len());
        assert!(stack[0] < stack[1] * 9 / 10, "the stack is nearly full");
        assert!(report.numbers("pool: ")[1] > 0, "nothing was streamed");
    }
}

/// A disk of 1 MB/s answers while the processor computes, and is asked for several reads at a time.
#[test]
fn reads_overlap_computing() {
    let disk = file(fixture());
    // The pool holds few units, so that reading goes on to the end.
    let words = format!("{PROMPT} depth=4 context=32 batch=1 arena=200704");
    for machine in MACHINES {
        let drive = ",throttling.bps-read=1000000";
        let boot = Boot { disk: Some(&disk.path), drive, ..Boot::new(machine, words.clone()) };
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
    for machine in MACHINES {
        let flash = file(fixture());
        // QEMU wants the flash's exact size; the rest of the file is a hole.
        std::fs::OpenOptions::new().write(true).open(&flash.path).unwrap().set_len(machine.flash_len).unwrap();
        let Some(report) = (Boot { flash: Some(&flash.path), ..Boot::new(machine, PROMPT) }).run() else { continue };
        report.agrees(fixture(), KvFormat::F16);
        assert!(report.line("store: ").starts_with("flash"));
    }
}

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
        let boot = Boot { disk: Some(&disk.path), more: &["-M", machine, "-smp", "2"], ..Boot::new(&AARCH64, PROMPT) };
        let Some(report) = boot.run() else { return };
        report.agrees(fixture(), KvFormat::F16);
        assert!(report.line("forebay ").ends_with(level), "{machine}");
    }
    let scalar = Boot { disk: Some(&disk.path), ..Boot::new(&AARCH64, format!("{PROMPT} backend=scalar")) };
    scalar.run().unwrap().agrees(fixture(), KvFormat::F16);
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
    for machine in MACHINES {
        let boot = |disk: Option<&'static Path>, words: &str| Boot { disk, ..Boot::new(machine, words) }.run();
        let leak = |file: &File| -> &'static Path { Box::leak(file.path.clone().into_boxed_path()) };
        let Some(report) = boot(None, PROMPT) else { continue };
        report.fails(3, "error: there is no disk, and no image in flash");
        let run = |disk: &File, words: &str| boot(Some(leak(disk)), words).unwrap();
        run(&nothing, PROMPT).fails(6, "error: cannot open the image: not an image");
        run(&cut, PROMPT).fails(8, "error: cannot open the image: store: ");
        run(&other, PROMPT).fails(7, "is not supported, expected 1.x");
        run(&damaged, PROMPT).fails(9, "failed 3 times: checksum mismatch");
        run(&good, "tokens=1,99999").fails(2, "error: token 99999 is outside of the vocabulary of 288");
        run(&good, "text=no tokenizer here").fails(2, "error: the image has no tokenizer");
        run(&good, "speed=11").fails(2, "error: unknown word \"speed=11\"");
        // The refusal names the number of bytes that does, and it does.
        let refused = run(&good, &format!("{PROMPT} arena=65536"));
        refused.fails(10, "error: the arena of 65536 bytes is too small");
        let need = refused.numbers("error: the arena of 65536 bytes is too small")[0];
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
    for machine in MACHINES {
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

/// The core has no allocator, and boards add none.
#[test]
fn nothing_allocates() {
    for machine in MACHINES {
        let Some(elf) = machine.elf() else { continue };
        let bytes = std::fs::read(elf).unwrap();
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
