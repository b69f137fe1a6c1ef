//! Emulated machines: building their binaries, booting them, reading what they print.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use forebay_conformance::reference::argmax;
use forebay_conformance::{Run, Setup, run, skipped};
use forebay_kernels::attention::KvFormat;

/// Longest time that one boot may take.
const PATIENCE: Duration = Duration::from_secs(100);

/// How a machine gets at an image.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Disk {
    /// The image is a virtio disk.
    Virtio,
    /// The image is in a partition of an SD card.
    SdCard,
    /// The image lies in a SPI NOR chip of this many bytes, which is always there.
    SpiNor(u64),
    /// The image lies in memory of this many bytes at this address, which the processor reads like flash.
    Mapped(u64, u64),
}

impl Disk {
    /// Bytes of a device that is always there and has one size, whatever was written to it; such a one has been read
    /// by QEMU before the machine starts, and does not stop answering.
    pub fn fixed(&self) -> Option<u64> {
        match self {
            Self::Virtio | Self::SdCard => None,
            Self::SpiNor(len) | Self::Mapped(len, _) => Some(*len),
        }
    }
}

/// An emulated machine and its board binary.
pub struct Machine {
    pub name: &'static str,
    /// Folder of the board, and name of its binary.
    pub board: &'static str,
    pub target: &'static str,
    pub qemu: &'static str,
    /// QEMU's arguments, but for the processor.
    pub machine: &'static [&'static str],
    /// QEMU's names of the processors; empty for the machine's own.
    pub cpus: &'static [&'static str],
    pub disk: Disk,
    /// Bytes of memory-mapped flash; 0 for none.
    pub flash_len: u64,
    /// Boots the bare bytes rather than an ELF file, as the board's firmware does.
    pub raw: bool,
    /// Words that bound the memory of a board that has much.
    pub bounds: &'static str,
    /// The program that QEMU boots, built once.
    pub kernel: OnceLock<Option<Kernel>>,
}

/// A board's binary.
pub struct Kernel {
    pub elf: PathBuf,
    /// What QEMU is given.
    boots: PathBuf,
}

/// Arguments for a machine with 16 MiB of RAM and slots for virtio devices.
macro_rules! virt {
    ($($arg:literal),*) => {
        &["-M", "virt", "-m", "16M", "-nic", "none", "-global", "virtio-mmio.force-legacy=false", $($arg),*]
    };
}

const SEMIHOSTING: &[&str] = &["-semihosting-config", "enable=on,target=native"];

pub static AARCH64: Machine = Machine {
    name: "aarch64-virt",
    board: "aarch64-virt",
    target: "aarch64-unknown-none",
    qemu: "qemu-system-aarch64",
    machine: virt![],
    cpus: &["cortex-a76", "cortex-a53", "cortex-a72"],
    disk: Disk::Virtio,
    flash_len: 64 << 20,
    raw: false,
    bounds: "",
    kernel: OnceLock::new(),
};

const fn pi(name: &'static str, machine: &'static [&'static str]) -> Machine {
    Machine {
        name,
        board: "raspi",
        target: "aarch64-unknown-none",
        qemu: "qemu-system-aarch64",
        machine,
        cpus: &[""],
        disk: Disk::SdCard,
        flash_len: 0,
        raw: true,
        bounds: "arena=2713600 ",
        kernel: OnceLock::new(),
    }
}

pub static RASPI3: Machine = pi("raspi3b", &["-M", "raspi3b"]);

pub static RASPI4: Machine = pi("raspi4b", &["-M", "raspi4b"]);

pub static RISCV64: Machine = Machine {
    name: "riscv64-virt",
    board: "riscv64-virt",
    target: "riscv64gc-unknown-none-elf",
    qemu: "qemu-system-riscv64",
    machine: virt!["-bios", "none"],
    cpus: &["rv64", "rv64,v=true,vlen=128", "rv64,v=true,vlen=256"],
    disk: Disk::Virtio,
    flash_len: 32 << 20,
    raw: false,
    bounds: "",
    kernel: OnceLock::new(),
};

/// Supervisor mode under QEMU's OpenSBI.
pub static RISCV64_SBI: Machine = Machine {
    name: "riscv64-sbi",
    board: "riscv64-sbi",
    target: "riscv64gc-unknown-none-elf",
    qemu: "qemu-system-riscv64",
    machine: virt![],
    cpus: &["rv64", "rv64,v=true,vlen=128", "rv64,v=true,vlen=256"],
    disk: Disk::Virtio,
    flash_len: 32 << 20,
    raw: false,
    bounds: "",
    kernel: OnceLock::new(),
};

/// Hart 0 has no floating point, and hart 1 boots.
pub static SIFIVE_U: Machine = Machine {
    name: "sifive-u",
    board: "sifive-u",
    target: "riscv64gc-unknown-none-elf",
    qemu: "qemu-system-riscv64",
    machine: &["-M", "sifive_u", "-smp", "2", "-m", "16M", "-bios", "none", "-nic", "none"],
    cpus: &[""],
    disk: Disk::SpiNor(32 << 20),
    flash_len: 0,
    raw: false,
    bounds: "",
    kernel: OnceLock::new(),
};

/// A microcontroller, Cortex-M4F. Its PSRAM stands for flash.
pub static MPS2_AN386: Machine = Machine {
    name: "mps2-an386",
    board: "mps2-an386",
    target: "thumbv7em-none-eabihf",
    qemu: "qemu-system-arm",
    machine: &["-M", "mps2-an386", "-nic", "none"],
    cpus: &[""],
    disk: Disk::Mapped(16 << 20, 0x2100_0000),
    flash_len: 0,
    raw: false,
    bounds: "",
    kernel: OnceLock::new(),
};

pub static MACHINES: [&Machine; 7] = [&AARCH64, &RASPI3, &RASPI4, &RISCV64, &RISCV64_SBI, &SIFIVE_U, &MPS2_AN386];

pub fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// Skips loudly, or fails where boards are required.
fn missing(what: &str) {
    let required = std::env::var_os("FOREBAY_REQUIRE_BOARDS").is_some_and(|v| v == "1");
    assert!(!required, "FOREBAY_REQUIRE_BOARDS is set, but {what}");
    skipped(&format!("{what}; nothing was booted"));
}

/// A linked program, little-endian.
struct Elf<'b> {
    bytes: &'b [u8],
    wide: bool,
}

impl<'b> Elf<'b> {
    fn new(bytes: &'b [u8]) -> Self {
        assert!(bytes.starts_with(b"\x7fELF") && bytes[5] == 1);
        Self { bytes, wide: bytes[4] == 2 }
    }

    fn number(&self, at: usize, len: usize) -> usize {
        self.bytes[at..at + len].iter().rev().fold(0, |n, b| n << 8 | usize::from(*b))
    }

    fn text(&self, at: usize) -> &'b str {
        let bytes = &self.bytes[at..];
        std::str::from_utf8(&bytes[..bytes.iter().position(|b| *b == 0).unwrap()]).unwrap()
    }

    /// Offset in the file, physical address and bytes in the file of what is loaded; for files of 64 bits.
    fn segments(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        assert!(self.wide);
        let (table, entry, count) = (self.number(32, 8), self.number(54, 2), self.number(56, 2));
        let headers = (0..count).map(move |i| table + i * entry);
        let loaded = headers.filter(|at| self.number(*at, 4) == 1 && self.number(at + 32, 8) > 0);
        loaded.map(|at| (self.number(at + 8, 8), self.number(at + 24, 8), self.number(at + 32, 8)))
    }

    /// Name, type, offset and length of each section, and the offset of the section that it links to.
    fn sections(&self) -> impl Iterator<Item = (&'b str, usize, usize, usize, usize)> {
        let (word, table) = if self.wide { (8, self.number(40, 8)) } else { (4, self.number(32, 4)) };
        let sizes = if self.wide { 58 } else { 46 };
        let (entry, count, names) = (self.number(sizes, 2), self.number(sizes + 2, 2), self.number(sizes + 4, 2));
        let field = move |index: usize, n: usize| {
            // Name and type have 4 bytes; flags, address, offset and length a word each; the link 4 bytes.
            let at = table + index * entry + if n < 2 { 4 * n } else { 8 + word * (n - 2) };
            self.number(at, if n < 2 || n == 6 { 4 } else { word })
        };
        let names = field(names, 4);
        (0..count).map(move |i| {
            let (kind, offset, len, link) = (field(i, 1), field(i, 4), field(i, 5), field(i, 6));
            (self.text(names + field(i, 0)), kind, offset, len, field(link, 4))
        })
    }

    /// Bytes of the symbols that have `part` in their names.
    fn symbols(&self, part: &str) -> usize {
        const SYMBOL_TABLE: usize = 2;
        let (entry, size, word) = if self.wide { (24, 16, 8) } else { (16, 8, 4) };
        let tables = self.sections().filter(|(_, kind, ..)| *kind == SYMBOL_TABLE);
        let symbols = tables.flat_map(|(_, _, offset, len, names)| {
            (offset..offset + len)
                .step_by(entry)
                .map(move |at| (names + self.number(at, 4), self.number(at + size, word)))
        });
        symbols.filter(|(name, _)| self.text(*name).contains(part)).map(|(_, len)| len).sum()
    }
}

/// The bytes that a program has in memory, from its first one on.
fn flatten(elf: &[u8]) -> Vec<u8> {
    let segments: Vec<_> = Elf::new(elf).segments().collect();
    let start = segments.iter().map(|(_, address, _)| *address).min().expect("something is loaded");
    let mut bytes = Vec::new();
    for (offset, address, len) in segments {
        bytes.resize(bytes.len().max(address - start + len), 0);
        bytes[address - start..][..len].copy_from_slice(&elf[offset..][..len]);
    }
    bytes
}

impl Kernel {
    /// Bytes of the arena and of all stacks, as linked; 0 of arena for a board that takes what its machine has.
    pub fn arena_and_stacks(&self) -> (u64, u64) {
        let bytes = std::fs::read(&self.elf).unwrap();
        let elf = Elf::new(&bytes);
        let stacks: usize = elf.sections().filter(|s| matches!(s.0, ".stack" | ".core_stacks")).map(|s| s.3).sum();
        assert!(stacks > 0, "no stack was linked");
        // The cell around the arena has a flag, which the arena's alignment gives a page of its own.
        const FLAG: usize = 4096;
        let arena = elf.symbols("ARENA_MEMORY").saturating_sub(FLAG);
        (arena as u64, (stacks + elf.symbols("TRAP_STACK")) as u64)
    }
}

impl Machine {
    /// The board's binary, built once; `None` if this host cannot build or boot it.
    pub fn kernel(&self) -> Option<&Kernel> {
        self.kernel.get_or_init(|| self.build()).as_ref()
    }

    fn build(&self) -> Option<Kernel> {
        if !Command::new(self.qemu).arg("--version").stdout(Stdio::null()).status().is_ok_and(|s| s.success()) {
            missing(&format!("{} is not installed", self.qemu));
            return None;
        }
        // One target directory for all boards, so that core and the crates below them are built once a target.
        let target_dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("boards");
        let build = Command::new(repository().canonicalize().unwrap().join(".ci/bare-metal"))
            .args([self.target, "build", "--release", "--locked", "--message-format=json-render-diagnostics"])
            .current_dir(repository().join("board-support/boards").join(self.board))
            .env("CARGO_TARGET_DIR", &target_dir)
            .env_remove("RUSTFLAGS")
            .stderr(Stdio::inherit())
            .output()
            .expect("bash runs");
        if build.status.code() == Some(69) {
            missing(&format!("there is no toolchain for {}", self.target));
            return None;
        }
        assert!(build.status.success(), "building {} failed", self.board);
        let messages = String::from_utf8(build.stdout).unwrap();
        let elf = messages
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
            .next_back()
            .expect("cargo names the executable");
        if !self.raw {
            return Some(Kernel { boots: elf.clone(), elf });
        }
        let boots = target_dir.join(format!("{}.img", self.name));
        std::fs::write(&boots, flatten(&std::fs::read(&elf).unwrap())).unwrap();
        Some(Kernel { elf, boots })
    }
}

/// A boot's conditions.
pub struct Boot<'a> {
    pub machine: &'a Machine,
    pub cpu: &'a str,
    pub disk: Option<&'a File>,
    /// Added to the disk's `-drive`.
    pub drive: &'a str,
    pub flash: Option<&'a Path>,
    pub words: String,
    /// Further arguments of QEMU; the last `-M` and `-m` count.
    pub more: &'a [&'a str],
    /// Whether the machine answers semihosting calls, as no real board does.
    pub semihosting: bool,
    /// Text after which the machine is switched off.
    pub until: Option<&'a str>,
}

impl<'a> Boot<'a> {
    pub fn new(machine: &'a Machine, words: impl Into<String>) -> Self {
        Self {
            machine,
            cpu: machine.cpus[0],
            disk: None,
            drive: "",
            flash: None,
            words: words.into(),
            more: &[],
            semihosting: true,
            until: None,
        }
    }

    /// QEMU with the board's console on `serial`; `None` if this host cannot.
    pub fn qemu(&self, serial: &str) -> Option<Command> {
        let kernel = self.machine.kernel()?;
        let mut qemu = Command::new(self.machine.qemu);
        qemu.args(self.machine.machine).args(["-display", "none", "-monitor", "none", "-serial", serial]);
        if !self.cpu.is_empty() {
            qemu.args(["-cpu", self.cpu]);
        }
        if self.semihosting {
            qemu.args(SEMIHOSTING);
        }
        if let Some(disk) = self.disk {
            match self.machine.disk {
                Disk::Virtio => {
                    let drive = format!("file={},if=none,format=raw,readonly=on,id=disk", disk.path.display());
                    qemu.args(["-drive", &(drive + self.drive), "-device", "virtio-blk-device,drive=disk"]);
                }
                // A card cannot be read-only as a whole; nothing writes to it.
                Disk::SdCard => {
                    let drive = format!("file={},if=sd,format=raw", disk.card().display());
                    qemu.args(["-drive", &(drive + self.drive)]);
                }
                Disk::Mapped(_, address) => {
                    let loader = format!("loader,file={},addr={address:#x},force-raw=on", disk.path.display());
                    qemu.args(["-device", &loader]);
                }
                Disk::SpiNor(len) => {
                    let drive = format!("file={},if=mtd,format=raw,readonly=on", disk.flash(len).display());
                    qemu.args(["-drive", &(drive + self.drive)]);
                }
            }
        }
        if let Some(flash) = self.flash {
            let drive = format!("file={},if=pflash,unit=1,format=raw,readonly=on", flash.display());
            qemu.args(["-drive", &drive]);
        }
        qemu.arg("-kernel").arg(&kernel.boots).args(["-append", &self.words]).args(self.more);
        Some(qemu)
    }

    /// Runs to the end; `None` if this host cannot.
    pub fn run(&self) -> Option<Report> {
        let mut qemu = self.qemu("stdio")?;
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("console");
        let console = std::fs::File::create(&log).unwrap();
        qemu.stdin(Stdio::null()).stderr(console.try_clone().unwrap()).stdout(console);
        let mut child = qemu.spawn().unwrap();
        let start = Instant::now();
        let read = || String::from_utf8_lossy(&std::fs::read(&log).unwrap()).replace('\r', "");
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status.code();
            }
            if start.elapsed() > PATIENCE || self.until.is_some_and(|text| read().contains(text)) {
                child.kill().unwrap();
                child.wait().unwrap();
                break None;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let text = read();
        println!("--- {} {} {:?} -> {status:?}\n{text}", self.machine.name, self.cpu, self.words);
        if text.contains("Unable to find the RISC-V BIOS") {
            missing("OpenSBI is not installed");
            return None;
        }
        Some(Report { status, text })
    }
}

/// What a boot printed.
pub struct Report {
    /// Exit status; `None` if it had to be killed.
    pub status: Option<i32>,
    pub text: String,
}

impl Report {
    /// The rest of the line that starts with `key`.
    pub fn line(&self, key: &str) -> &str {
        let line = self.text.lines().find_map(|line| line.strip_prefix(key));
        line.unwrap_or_else(|| panic!("no line {key:?}"))
    }

    fn ids(&self, key: &str) -> Vec<u32> {
        serde_json::from_str(self.line(key)).unwrap()
    }

    /// All numbers of a line, in order.
    pub fn numbers(&self, key: &str) -> Vec<u64> {
        let words = self.line(key).split(|c: char| !c.is_ascii_digit());
        words.filter(|w| !w.is_empty()).map(|w| w.parse().unwrap()).collect()
    }

    /// Asserts that tokens and logits are this host's for the same image, and gives prompt and answer.
    pub fn agrees(&self, image: &[u8], kv: KvFormat) -> (Vec<u32>, Vec<u32>) {
        assert_eq!(self.status, Some(0));
        self.has_the_hosts_bits(image, kv)
    }

    /// As [`Report::agrees`], of a machine that does not end by itself.
    pub fn has_the_hosts_bits(&self, image: &[u8], kv: KvFormat) -> (Vec<u32>, Vec<u32>) {
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

    /// Asserts that so many cores computed, the further ones too, on stacks with room to spare.
    pub fn shows_further_cores(&self, cores: usize) {
        assert!(self.line("image: ").ends_with(&format!(" on {cores} cores")));
        assert!(self.numbers("further cores: ")[0] > 0, "only the first core computed");
        let [used, len] = self.numbers("further cores' stacks: ")[..] else { panic!("stacks") };
        assert!(used > 0 && used < len * 9 / 10, "{used} bytes of {len}");
    }

    pub fn fails(&self, status: i32, message: &str) {
        assert!(self.text.contains(message), "the console does not say {message:?}");
        assert_eq!(self.status, Some(status));
    }
}

/// An image as a file for QEMU that lives as long as the test.
pub struct File {
    pub path: PathBuf,
    card: OnceLock<PathBuf>,
    flash: OnceLock<PathBuf>,
    dir: tempfile::TempDir,
}

pub fn file(bytes: &[u8]) -> File {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    std::fs::write(&path, bytes).unwrap();
    File { path, card: OnceLock::new(), flash: OnceLock::new(), dir }
}

impl File {
    /// A card that has the image in its second partition.
    fn card(&self) -> &Path {
        self.card.get_or_init(|| {
            let card = self.dir.path().join("card");
            std::fs::write(&card, card_of(&std::fs::read(&self.path).unwrap())).unwrap();
            card
        })
    }

    /// The image and what is behind it in a flash of `len` bytes: QEMU wants exactly those. What the image leaves is
    /// a hole, and what does not fit is left out.
    pub fn flash(&self, len: u64) -> &Path {
        self.flash.get_or_init(|| {
            let flash = self.dir.path().join("flash");
            std::fs::copy(&self.path, &flash).unwrap();
            std::fs::OpenOptions::new().write(true).open(&flash).unwrap().set_len(len).unwrap();
            flash
        })
    }

    /// A card of exactly these bytes.
    pub fn of_card_bytes(bytes: &[u8]) -> Self {
        let file = file(bytes);
        Self::of_card(file.path, file.dir)
    }

    /// The card at `path` in `dir`.
    pub fn of_card(path: PathBuf, dir: tempfile::TempDir) -> Self {
        Self { card: OnceLock::from(path.clone()), path, flash: OnceLock::new(), dir }
    }
}

/// A card with a master boot record: a first partition for the firmware, empty here, and the image in a second one. A
/// power of two of bytes, because QEMU wants that.
pub fn card_of(image: &[u8]) -> Vec<u8> {
    const BLOCK: usize = 512;
    const MEGABYTE: usize = 1 << 20;
    let entry = |kind: u8, start: usize, len: usize| {
        let (start, len) = ((start / BLOCK) as u32, (len / BLOCK) as u32);
        [0, u32::from(kind), start, len].map(u32::to_le_bytes).concat()
    };
    let mut card = vec![0; 2 * MEGABYTE];
    card[446..462].copy_from_slice(&entry(0x0c, MEGABYTE, MEGABYTE));
    card[462..478].copy_from_slice(&entry(0xda, 2 * MEGABYTE, image.len().next_multiple_of(BLOCK)));
    card[510..512].copy_from_slice(&[0x55, 0xaa]);
    card.extend_from_slice(image);
    card.resize(card.len().next_power_of_two(), 0);
    card
}
