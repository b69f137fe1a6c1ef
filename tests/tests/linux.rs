//! `forebay` on other processors' Linux: built for them by `.ci/linux`, run under qemu-user, it converts to the same
//! image, tells the same text and gives the same bits of logits as this host, with every instruction set.
//!
//! Building takes minutes, so the test runs where `FOREBAY_LINUX` is 1, as it is in CI, and fails there if a tool is
//! missing; elsewhere it says SKIPPED.
#![cfg(unix)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use forebay::convert::ConvertOptions;
use forebay_conformance::reference::argmax;
use forebay_conformance::{Setup, arena_memory, arena_of, fixtures, image_of, run, skipped};
use forebay_kernels::attention::KvFormat;
use forebay_runtime::open::Image;
use forebay_runtime::tokenizer::{EncodeOptions, Tokenizer};
use forebay_storage::MemoryStore;
use serde_json::Value;

/// A processor family.
struct Linux {
    target: &'static str,
    qemu: &'static str,
    /// QEMU's processors, and the back-ends of each: the one that is found, then those that are asked for by name.
    cpus: &'static [(&'static str, &'static [&'static str])],
    program: OnceLock<PathBuf>,
}

static AARCH64: Linux = Linux {
    target: "aarch64-unknown-linux-gnu",
    qemu: "qemu-aarch64",
    // Raspberry Pi 5 and 4.
    cpus: &[("cortex-a76", &["dotprod", "neon", "scalar"]), ("cortex-a72", &["neon"])],
    program: OnceLock::new(),
};

/// 32 bits: addresses, sizes and file offsets differ in width. Its NEON has no stable intrinsics.
static ARMV7: Linux = Linux {
    target: "armv7-unknown-linux-gnueabihf",
    qemu: "qemu-arm",
    cpus: &[("cortex-a7", &["scalar"])],
    program: OnceLock::new(),
};

static RISCV64: Linux = Linux {
    target: "riscv64gc-unknown-linux-gnu",
    qemu: "qemu-riscv64",
    cpus: &[
        ("rv64,v=true,vlen=128", &["rvv"]),
        ("rv64,v=true,vlen=256", &["rvv"]),
        ("rv64,v=false", &["swar", "scalar"]),
    ],
    program: OnceLock::new(),
};

fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

impl Linux {
    /// The program, built once; `None` where nobody asked for it.
    fn program(&self) -> Option<&Path> {
        if std::env::var_os("FOREBAY_LINUX").is_none_or(|v| v != "1") {
            skipped(&format!("FOREBAY_LINUX is not 1; forebay was not built for {}", self.target));
            return None;
        }
        Some(self.program.get_or_init(|| self.build()))
    }

    fn build(&self) -> PathBuf {
        let emulator = Command::new(self.qemu).arg("--version").stdout(Stdio::null()).status();
        assert!(emulator.is_ok_and(|s| s.success()), "{} is not installed", self.qemu);
        let build = Command::new(repository().canonicalize().unwrap().join(".ci/linux"))
            .args([self.target, "build", "--release", "--locked", "-p", "forebay"])
            .arg("--message-format=json-render-diagnostics")
            .current_dir(repository())
            .env_remove("RUSTFLAGS")
            .stderr(Stdio::inherit())
            .output()
            .expect("bash runs");
        assert!(build.status.success(), "building forebay for {} failed: {}", self.target, build.status);
        let messages = String::from_utf8(build.stdout).unwrap();
        let program = messages
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter_map(|message| message["executable"].as_str().map(PathBuf::from))
            .next_back();
        program.expect("cargo names the executable")
    }

    /// Standard output of `forebay` with `args` on a processor.
    fn forebay(&self, cpu: &str, args: &[&str]) -> Option<String> {
        let out = Command::new(self.qemu)
            .args(["-cpu", cpu])
            .arg(self.program()?)
            .args(args)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{} on {cpu}, {args:?}: {said}", self.target);
        Some(String::from_utf8(out.stdout).unwrap())
    }
}

const PROMPT: &str = "Once upon a time";

/// The bundled model on this host.
struct Host {
    image: Vec<u8>,
    /// Ids of [`PROMPT`].
    prompt: Vec<u32>,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

/// Converted here once.
fn bundled() -> &'static Host {
    static HOST: OnceLock<Host> = OnceLock::new();
    HOST.get_or_init(|| {
        let image = image_of(&repository().join("host-tools/models/tiny-lfm2moe"), &ConvertOptions::default()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.fby");
        std::fs::write(&path, &image).unwrap();
        let prompt = encoded(&image, PROMPT);
        Host { image, prompt, path, _dir: dir }
    })
}

/// A text's ids.
fn encoded(image: &[u8], text: &str) -> Vec<u32> {
    let mut memory = arena_memory(16 << 20);
    let arena = arena_of(&mut memory, 16 << 20);
    let image = Image::open(&mut MemoryStore::new(image), &arena, true).unwrap();
    let tokenizer = Tokenizer::parse(image.tokenizer().unwrap()).unwrap();
    let options = EncodeOptions { add_bos: tokenizer.add_bos(), parse_special: true };
    let (mut scratch, mut ids) = (vec![0; Tokenizer::encode_scratch(text.len())], vec![0; text.len() + 1]);
    let len = tokenizer.encode(text, options, &mut scratch, &mut ids).unwrap();
    ids.truncate(len);
    ids
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn agrees(linux: &Linux) {
    if linux.program().is_none() {
        return;
    }
    // Conversion: the same image, byte for byte.
    let dir = tempfile::tempdir().unwrap();
    let case = fixtures().join("lfm2moe");
    let converted = dir.path().join("case.fby");
    linux.forebay(linux.cpus[0].0, &["convert", case.to_str().unwrap(), "-o", converted.to_str().unwrap()]);
    let want = image_of(&case, &ConvertOptions::default()).unwrap();
    assert!(std::fs::read(&converted).unwrap() == want, "{}: another image", linux.target);

    let host = bundled();
    let path = host.path.to_str().unwrap();
    let mut texts = Vec::new();
    let named = |(cpu, names): &(&'static str, &'static [&'static str])| {
        names.iter().enumerate().map(|(at, name)| (*cpu, *name, at > 0)).collect::<Vec<_>>()
    };
    for (cpu, backend, forced) in linux.cpus.iter().flat_map(named) {
        let choice: &[&str] = if forced { &["--backend", backend] } else { &[] };
        // Two thirds of the units are not in the pool, so that the file is read throughout.
        let words = ["run", path, "-p", PROMPT, "-n", "16", "--temp", "0", "--ignore-eos", "--json"];
        let words = [&words[..], &["--threads", "2", "--ram", "4500K"], choice].concat();
        let out = linux.forebay(cpu, &words).unwrap();
        let report: Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
        assert_eq!(report["backend"], backend, "{} on {cpu}", linux.target);
        assert!(report["cache"]["misses"].as_u64() > Some(100), "nothing was streamed: {report}");
        let tokens = ids(&report["tokens"]);
        assert_eq!(tokens.len(), 16);
        texts.push(report["text"].as_str().unwrap().to_owned());

        // What it said is what this host would have said, and every logit has this host's bits.
        let fed: Vec<u32> = host.prompt.iter().chain(&tokens[..15]).copied().collect();
        let list: Vec<String> = fed.iter().map(u32::to_string).collect();
        let array = dir.path().join("logits.npy");
        let (list, array_path) = (list.join(","), array.to_str().unwrap());
        linux.forebay(cpu, &[&["logits", path, "--token-ids", &list, "-o", array_path][..], choice].concat());
        let want = run(&host.image, &Setup { kv: KvFormat::F16, ..Setup::default() }, &fed).unwrap();
        let vocab = want.logits.len() / fed.len();
        let rows = want.logits.chunks_exact(vocab).skip(host.prompt.len() - 1);
        let greedy: Vec<u32> = rows.map(|row| argmax(row) as u32).collect();
        assert_eq!(tokens, greedy, "{} on {cpu}: this host continues otherwise", linux.target);
        let bytes = std::fs::read(&array).unwrap();
        let bits: Vec<u8> = want.logits.iter().flat_map(|x| x.to_le_bytes()).collect();
        assert!(bytes.ends_with(&bits), "{} on {cpu}: same tokens, but not the same bits", linux.target);
        println!("{} on {cpu} ({backend}): {:#018x}", linux.target, want.hash());
    }
    assert!(texts[0].split(' ').count() > 5 && texts.iter().all(|text| *text == texts[0]), "{texts:?}");
}

#[test]
fn aarch64_linux_agrees() {
    agrees(&AARCH64);
}

#[test]
fn armv7_linux_agrees() {
    agrees(&ARMV7);
}

#[test]
fn riscv64_linux_agrees() {
    agrees(&RISCV64);
}
