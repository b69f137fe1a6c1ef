//! The `forebay` command, run as a process.

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use forebay_storage::image::{SectionKind, Superblock};
use serde_json::Value;

/// Folder of the bundled model.
fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-lfm2moe")
}

/// A folder of this test's own.
fn scratch(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli").join(name);
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

fn forebay(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_forebay"));
    command.args(args).stdin(Stdio::null()).env_remove("FOREBAY_MODELS");
    command.env("FOREBAY_CACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli-cache"));
    command
}

fn output(args: &[&str]) -> Output {
    forebay(args).output().unwrap()
}

/// Standard output of a command that must succeed.
fn stdout(args: &[&str]) -> String {
    let out = output(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// Standard error of a command that must fail with `code`, which must be one line that says all of `words`.
fn failure(code: i32, args: &[&str], words: &[&str]) -> String {
    let out = output(args);
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(code), "{args:?}: {said}");
    if code == 1 {
        assert!(said.starts_with("error: ") && said.lines().count() == 1, "{args:?}: {said}");
    }
    for word in words {
        assert!(said.contains(word), "{args:?}: no {word:?} in {said}");
    }
    said
}

/// The bundled model as an image.
fn image() -> &'static str {
    static IMAGE: OnceLock<String> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let image = scratch("image").join("tiny.fby");
        let image = image.to_str().unwrap();
        stdout(&["convert", model().to_str().unwrap(), "-o", image]);
        image.to_owned()
    })
}

/// The JSON of a run of 24 tokens with more options.
fn sampled(options: &[&str]) -> Value {
    let fixed = ["run", image(), "--token-ids", "1,310,272,500,261", "-n", "24", "--ignore-eos", "--json"];
    let args: Vec<&str> = fixed.iter().chain(options).copied().collect();
    serde_json::from_str(stdout(&args).lines().last().unwrap()).unwrap()
}

/// The same without chance.
fn run(options: &[&str]) -> Value {
    sampled(&[&["--temp", "0"], options].concat())
}

#[test]
fn usage_errors_have_code_2() {
    failure(2, &["run", "--no-such-option"], &["--no-such-option"]);
    failure(2, &["run", "x", "--ram", "5X"], &["5X", "64M"]);
    failure(2, &["run", "x", "--temp", "-1"], &[]);
    failure(2, &["run", "x", "-n", "0"], &["at least 1"]);
    failure(2, &["run", "x", "--device", "floppy"], &["floppy", "pi4-sd"]);
    failure(2, &["run", "x", "-p", "a", "--token-ids", "1"], &["cannot be used with"]);
    failure(2, &["logits", "x", "-o", "y"], &["--token-ids"]);
    failure(2, &["convert", "x"], &["--output"]);
    failure(2, &["convert", "x", "-o", "y", "--weights", "q5"], &["q5", "q4"]);
    failure(2, &["bench", "--kernels", "--shape", "64"], &["64", "4096x4096"]);
    failure(2, &["bench", "--kernels", "--shape", "0x64"], &["0x64"]);
    failure(2, &["bench", "--kernels", "--bits", "5"], &["5", "1, 2, 3, 4 or 8"]);
    failure(2, &["bench", "--kernels", "x"], &["cannot be used with"]);
    failure(2, &["bench", "--kernels", "--ram", "64M"], &["cannot be used with"]);
    failure(2, &["bench", "x", "--bits", "4"], &["--bits", "cannot be used with"]);
    failure(2, &["bench", "--shape", "64x64"], &["--kernels"]);
    failure(2, &["attach"], &["--serial"]);
    failure(2, &["attach", "--serial", "x", "--json"], &["--prompt"]);
    failure(2, &["attach", "--serial", "x", "-p", "a", "--token-ids", "1"], &["cannot be used with"]);
    failure(2, &["attach", "--serial", "x", "--raw", "--system", "s"], &["cannot be used with"]);
    failure(2, &["attach", "--serial", "x", "--baud", "fast"], &["fast"]);
}

#[test]
fn failures_say_what_where_and_what_to_do() {
    failure(1, &["run", "/no/such/file"], &["/no/such/file", "No such file"]);
    let folder = scratch("failures");
    let text = folder.join("text");
    std::fs::write(&text, "not an image, though long enough to be read").unwrap();
    failure(1, &["run", text.to_str().unwrap()], &["not a Forebay image", "forebay convert"]);
    let folder = folder.to_str().unwrap();
    failure(1, &["run", folder], &["config.json"]);
    failure(1, &["run", image(), "-p", ""], &["the prompt is empty", "-p"]);
    failure(1, &["run", image()], &["no prompt", "-p TEXT"]);
    failure(1, &["run", image(), "--token-ids", "1,2,3", "-c", "2"], &["3 tokens", "context only 2", "-c"]);
    failure(1, &["run", image(), "--token-ids", "4096"], &["4096", "0 to 4095"]);
    failure(1, &["run", image(), "--token-ids", "1", "-c", "100000"], &["100000", "2048"]);
    failure(1, &["run", image(), "--token-ids", "1", "--backend", "mmx"], &["mmx", "scalar"]);
    failure(1, &["run", image(), "--token-ids", "1", "--weights", "q4"], &["converted already"]);
    failure(1, &["logits", image(), "--token-ids", "1", "-o", "/no/such/folder/x.npy"], &["/no/such/folder"]);
    failure(1, &["logits", image(), "--token-ids", "1", "-o", folder], &["it is a folder"]);
    failure(1, &["convert", model().to_str().unwrap(), "-o", "/no/such/folder/x"], &["/no/such/folder"]);
    failure(1, &["perplexity", image(), "-f", "/no/such/text"], &["/no/such/text"]);
    failure(1, &["chat", image()], &["no chat template"]);
    let out = forebay(&["run"]).env("FOREBAY_MODELS", folder).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.code() == Some(1) && said.contains("FOREBAY_MODELS"), "{said}");
}

#[test]
fn a_damaged_image_is_named_with_the_place() {
    let damaged = scratch("damaged").join("damaged.fby");
    std::fs::copy(image(), &damaged).unwrap();
    let file = std::fs::File::options().read(true).write(true).open(&damaged).unwrap();
    let path = damaged.to_str().unwrap();
    let len = file.metadata().unwrap().len();
    // The last page belongs to a unit of the last layer.
    let mut byte = [0];
    file.read_exact_at(&mut byte, len - 5000).unwrap();
    file.write_all_at(&[byte[0] ^ 1], len - 5000).unwrap();
    let ids: Vec<String> = (0..200).map(|i| (3 + i * 17).to_string()).collect();
    let run = ["run", path, "--token-ids", &ids.join(","), "-n", "1"];
    failure(1, &run, &[path, "unit", "layer 7", "image offset", "checksum", "convert it again"]);
    // A table is found damaged before anything runs.
    let mut slots = [0; 8192];
    file.read_exact_at(&mut slots, 0).unwrap();
    let tensors = Superblock::parse(&slots, len).unwrap().section(SectionKind::Tensors).unwrap();
    file.write_all_at(&[0xff; 4], tensors.offset).unwrap();
    failure(1, &run, &[path, "tensors"]);
    file.set_len(len / 2).unwrap();
    failure(1, &run, &[path, "damaged", "again"]);
}

#[test]
fn the_json_line_has_its_fields() {
    let json = run(&[]);
    for field in ["text", "tokens", "prompt_tokens", "prompt_tok_s", "gen_tokens", "gen_tok_s", "arena_bytes"] {
        assert!(!json[field].is_null(), "{field}");
    }
    assert_eq!(json["prompt_tokens"], 5);
    assert_eq!(json["gen_tokens"], 24);
    assert_eq!(json["tokens"].as_array().unwrap().len(), 24);
    assert_eq!(json["stop"], "length");
    assert_eq!(json["image_bytes"], std::fs::metadata(image()).unwrap().len());
    assert!(json["stall_s"].as_f64().unwrap() >= 0.0);
    assert!(json["gen_tok_s"].as_f64().unwrap() > 0.0);
    // Everything fits, so each unit is read at most once.
    let (pool, streamed) = (json["pool_bytes"].as_u64().unwrap(), json["streamed_bytes_total"].as_u64().unwrap());
    assert!(pool >= streamed && streamed > 0, "{pool} {streamed}");
    assert!(json["cache"]["bytes_read"].as_u64().unwrap() <= streamed);
    assert!(json["cache"]["hits"].as_u64().unwrap() > 0);
}

#[test]
fn kernels_are_measured_beside_a_read() {
    let fixed = ["bench", "--kernels", "--shape", "100x320", "-t", "2", "--json"];
    let rows = |options: &[&str]| -> Vec<Value> {
        let text = stdout(&[&fixed, options].concat());
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let all = rows(&[]);
    let what: Vec<_> = all.iter().map(|row| (row["bits"].as_u64().unwrap(), row["memory"].as_str().unwrap())).collect();
    let (hot, dram) = ("hot", "dram");
    assert_eq!(what, [(4, hot), (4, dram), (3, hot), (3, dram), (2, hot), (2, dram), (1, hot), (1, dram)]);
    for row in &all {
        let fields: Vec<_> = row.as_object().unwrap().keys().map(String::as_str).collect();
        let mut want =
            ["kernel", "bits", "shape", "threads", "memory", "median_us", "read_only_us", "gbps", "gops", "nmse"];
        want.sort();
        assert_eq!(fields, want, "serde_json sorts the keys it reads");
        assert!(row["kernel"].as_str().unwrap().starts_with("gemv "));
        assert_eq!((&row["shape"], &row["threads"]), (&Value::from("100x320"), &Value::from(2)));
        let number = |field: &str| row[field].as_f64().unwrap();
        assert!(number("median_us") > 0.0 && number("read_only_us") > 0.0);
        let gops = 2.0 * 100.0 * 320.0 / number("median_us") / 1e3;
        assert!((number("gops") / gops - 1.0).abs() < 1e-6);
        // Weights of 1 bit and of 3 take activations of 7 bits.
        let (least, most) = if row["bits"].as_u64().unwrap() % 2 == 1 { (4e-5, 5e-4) } else { (1e-5, 1e-4) };
        assert!((least..most).contains(&number("nmse")), "{row}");
    }
    let one = rows(&["--bits", "8", "--memory", "hot", "--tokens", "5", "--backend", "scalar", "--group", "64"]);
    assert_eq!(one.len(), 1);
    assert_eq!(one[0]["kernel"], "gemm5 scalar");
    assert_eq!(one[0]["bits"], 8);
    let bytes = 128.0 * 320.0 * (1.0 + 2.0 / 64.0);
    assert!(
        (one[0]["gbps"].as_f64().unwrap() * one[0]["median_us"].as_f64().unwrap() * 1e3 / bytes - 1.0).abs() < 1e-6
    );
    let table = stdout(&["bench", "--kernels", "--shape", "64x64", "--bits", "4"]);
    assert_eq!(table.lines().count(), 4, "{table}");
}

#[test]
fn the_number_in_the_refusal_is_exact() {
    let fixed = ["run", image(), "--token-ids", "1,2,3", "-n", "8", "--temp", "0", "--ignore-eos", "--json", "--ram"];
    let with = |ram: &str| fixed.iter().copied().chain([ram]).map(str::to_owned).collect::<Vec<String>>();
    let refs = |args: &[String]| output(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let refused = refs(&with("1M"));
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("--ram 1M is too small") && said.contains("MiB"), "{said}");
    let need: u64 = said.split("at least --ram ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    let enough = refs(&with(&need.to_string()));
    assert!(enough.status.success(), "{}", String::from_utf8_lossy(&enough.stderr));
    let text = String::from_utf8(enough.stdout).unwrap();
    let json: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(json["arena_bytes"], need);
    assert_eq!(refs(&with(&(need - 1).to_string())).status.code(), Some(1));
}

#[test]
fn memory_threads_store_and_batch_do_not_change_the_tokens() {
    let expected = run(&[])["tokens"].clone();
    let others: [&[&str]; 9] = [
        &["--ram", "3M"],
        &["--ram", "3M", "--batch", "1"],
        &["--ram", "4M", "-t", "3"],
        &["-t", "1"],
        &["--backend", "scalar"],
        &["--store", "memory"],
        &["--store", "memory", "--ram", "3M"],
        &["--ram", "4M", "--device", "bw=200MB/s,lat=50us,qd=2"],
        &["-c", "512"],
    ];
    for options in others {
        assert_eq!(run(options)["tokens"], expected, "{options:?}");
    }
    let drawn = |seed| sampled(&["--temp", "1", "--seed", seed])["tokens"].clone();
    assert_eq!(drawn("7"), drawn("7"));
    assert_ne!(drawn("7"), drawn("8"));
}

#[test]
fn a_small_pool_streams() {
    let json = run(&["--ram", "3M"]);
    let number = |value: &Value| value.as_u64().unwrap();
    assert!(number(&json["pool_bytes"]) < number(&json["streamed_bytes_total"]) / 3, "{json}");
    assert!(number(&json["cache"]["misses"]) > 0 && number(&json["cache"]["hits"]) > 0, "{json}");
    assert!(number(&json["cache"]["bytes_read"]) > number(&json["streamed_bytes_total"]), "{json}");
    assert_eq!(number(&json["arena_bytes"]), 3 << 20);
    let slack = 32 << 20;
    assert!(number(&json["peak_rss_bytes"]) <= number(&json["arena_bytes"]) + slack, "{json}");
}

#[test]
fn a_slow_device_stalls() {
    let stall = |options: &[&str]| run(options)["stall_s"].as_f64().unwrap();
    // At 20 MB/s the units that a token misses take longer to read than they do to compute.
    let slow = stall(&["--ram", "3M", "--device", "bw=20MB/s,lat=1ms"]);
    assert!(slow > 0.2, "{slow}");
}

/// Values of an array file of `f32`, and its rows and columns.
fn npy(path: &Path) -> (Vec<f32>, usize, usize) {
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
    let head = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let text = std::str::from_utf8(&bytes[10..head]).unwrap();
    assert!(text.contains("'descr': '<f4'") && text.contains("'fortran_order': False"), "{text}");
    let shape = text.split('(').nth(1).unwrap().split(')').next().unwrap();
    let dims: Vec<usize> = shape.split(',').map(|d| d.trim().parse().unwrap()).collect();
    let values = bytes[head..].chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    (values, dims[0], dims[1])
}

#[test]
fn logits_are_those_that_a_run_chooses_by() {
    let folder = scratch("logits");
    let run = run(&[]);
    let tokens: Vec<u64> = run["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect();
    let all: Vec<u64> = [1, 310, 272, 500, 261].into_iter().chain(tokens.iter().copied()).collect();
    let ids = all.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
    let file = |name: &str, options: &[&str]| {
        let path = folder.join(name);
        let fixed = ["logits", image(), "--token-ids", &ids, "-o", path.to_str().unwrap()];
        stdout(&fixed.iter().chain(options).copied().collect::<Vec<_>>());
        npy(&path)
    };
    let (logits, rows, cols) = file("a.npy", &[]);
    assert_eq!((rows, cols), (29, 4096));
    let argmax = |row: usize| {
        let row = &logits[row * cols..(row + 1) * cols];
        row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as u64
    };
    let chosen: Vec<u64> = (4..28).map(argmax).collect();
    assert_eq!(chosen, tokens);
    let (one_by_one, ..) = file("b.npy", &["--batch", "1", "--ram", "4M", "-t", "1"]);
    assert!(logits.iter().zip(&one_by_one).all(|(a, b)| a.to_bits() == b.to_bits()), "batch changes the bits");
}

#[test]
fn a_model_is_converted_once() {
    let cache = scratch("cache");
    let model = model();
    let run = || {
        let args = ["run", model.to_str().unwrap(), "--token-ids", "1,2", "-n", "2", "--json"];
        let out = forebay(&args).env("FOREBAY_CACHE", &cache).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let images: Vec<_> = std::fs::read_dir(&cache).unwrap().map(|e| e.unwrap()).collect();
        assert_eq!(images.len(), 1);
        let text = String::from_utf8(out.stdout).unwrap();
        let json: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        (images[0].metadata().unwrap().modified().unwrap(), json)
    };
    let (first, json) = run();
    assert_eq!(run().0, first);
    // The first run converts: even so its memory is bounded.
    let bound = json["arena_bytes"].as_u64().unwrap() + (32 << 20);
    assert!(json["peak_rss_bytes"].as_u64().unwrap() <= bound, "{json}");
    let args = ["run", model.to_str().unwrap(), "--weights", "q8", "--token-ids", "1,2", "-n", "2"];
    assert!(forebay(&args).env("FOREBAY_CACHE", &cache).output().unwrap().status.success());
    assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 2);
    let out = forebay(&args).env("FOREBAY_CACHE", "/proc/no/cache").output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.code() == Some(1) && said.contains("set FOREBAY_CACHE"), "{said}");
}

#[test]
fn without_arguments_it_tells_a_story() {
    let first = output(&[]);
    let said = String::from_utf8_lossy(&first.stderr).into_owned();
    assert!(first.status.success(), "{said}");
    let story = String::from_utf8(first.stdout).unwrap();
    assert!(story.starts_with("Once upon a time"), "{story}");
    assert!(story.len() > 200, "{story}");
    assert_eq!(stdout(&[]), story);
    for word in ["prompt", "generation", "arena", "pool", "misses", "stalled", "threads", "seed"] {
        assert!(said.contains(word), "{word}: {said}");
    }
    // The bundled model shows streaming: its pool holds at most a third.
    let json: Value = serde_json::from_str(stdout(&["run", "-n", "20", "--json"]).lines().last().unwrap()).unwrap();
    assert!(json["pool_bytes"].as_u64().unwrap() <= json["streamed_bytes_total"].as_u64().unwrap() / 3);
    assert!(json["cache"]["misses"].as_u64().unwrap() > 0);
}

#[test]
fn text_streams_and_a_closed_pipe_is_no_error() {
    use std::io::Read;
    let args = ["run", image(), "-p", "The king", "-n", "400", "--temp", "0", "--ignore-eos"];
    let mut child = forebay(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 12];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    assert!(first.starts_with(b"The king"));
    // The pipe is closed now, and the child still generating.
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(child.wait().unwrap().success(), "{said}");
    assert!(!said.contains("panicked") && !said.contains("error"), "{said}");
}

#[test]
fn a_text_is_tokenised_and_comes_back() {
    let ids: Vec<u32> = serde_json::from_str(&stdout(&["tokenize", image(), "-p", "The king said", "--json"])).unwrap();
    let list = ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let base = ["-n", "12", "--temp", "0", "--json"];
    let run = |prompt: [&str; 2]| {
        let args: Vec<&str> = ["run", image()].into_iter().chain(prompt).chain(base).collect();
        let text = stdout(&args);
        let json: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        // The text streams before the line of JSON.
        assert!(text.starts_with(json["text"].as_str().unwrap()), "{text}");
        json
    };
    let (by_text, by_ids) = (run(["-p", "The king said"]), run(["--token-ids", &list]));
    assert_eq!(by_text["tokens"], by_ids["tokens"]);
    assert_eq!(by_text["prompt_tokens"].as_u64(), Some(ids.len() as u64));
    assert!(by_text["text"].as_str().unwrap().chars().any(char::is_alphabetic));
}

#[test]
fn perplexity_is_what_the_logits_say() {
    let folder = scratch("perplexity");
    let text = folder.join("text.txt");
    let story = "Once upon a time there was a king who had three sons, and the youngest of them was called Jack. ";
    std::fs::write(&text, story.repeat(4)).unwrap();
    let text_path = text.to_str().unwrap();
    let measure = |options: &[&str]| -> Value {
        let fixed = ["perplexity", image(), "-f", text_path, "-c", "32", "--json"];
        serde_json::from_str(&stdout(&fixed.iter().chain(options).copied().collect::<Vec<_>>())).unwrap()
    };
    let report = measure(&["--chunks", "2"]);
    assert_eq!(report["chunks"], 2);
    // Positions 16 to 30 of each chunk predict what follows.
    assert_eq!(report["tokens_scored"], 30);
    let prompt = std::fs::read_to_string(&text).unwrap();
    let ids: Vec<u32> = serde_json::from_str(&stdout(&["tokenize", image(), "-p", &prompt, "--json"])).unwrap();
    let mut nll = 0.0;
    for chunk in 0..2 {
        let mut tokens = ids[chunk * 32..(chunk + 1) * 32].to_vec();
        // The model expects a begin-of-text token, with which every chunk begins.
        if chunk > 0 && ids[0] == 1 {
            tokens[0] = 1;
        }
        let list = tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let path = folder.join("chunk.npy");
        stdout(&["logits", image(), "--token-ids", &list, "-o", path.to_str().unwrap()]);
        let (logits, _, cols) = npy(&path);
        for position in 16..31 {
            let row = &logits[position * cols..(position + 1) * cols];
            let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
            nll += sum.ln() - f64::from(row[tokens[position + 1] as usize]);
        }
    }
    let expected = (nll / 30.0).exp();
    let measured = report["perplexity"].as_f64().unwrap();
    assert!((measured / expected - 1.0).abs() < 1e-5, "{measured} {expected}");
    assert_eq!(measure(&["--chunks", "2", "--ram", "4M", "--batch", "5"])["perplexity"], report["perplexity"]);
    failure(1, &["perplexity", image(), "-f", text_path], &["two chunks of 512 need 1024", "-c"]);
}

/// Calibrating, converting with the result, and leaving neurons out.
#[test]
fn neurons_are_calibrated_and_left_out() {
    let folder = scratch("neurons");
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let (text, neurons, clustered) = (path("text"), path("neurons"), path("clustered.fby"));
    let story = "Once upon a time there was a king who had three sons, and the youngest of them was called Jack. ";
    std::fs::write(&text, story.repeat(10)).unwrap();
    let model = model();
    let model = model.to_str().unwrap();
    failure(2, &["calibrate", image(), "-f", &text, "-o", &neurons, "--cluster-neurons", "33"], &["multiple of 32"]);
    failure(1, &["run", image(), "-p", "a", "--neurons-kept", "0.5"], &["forebay calibrate", "--neurons"]);
    failure(1, &["convert", model, "-o", &clustered, "--neurons", &text], &["forebay calibrate"]);
    let short = path("short");
    std::fs::write(&short, "a king").unwrap();
    failure(1, &["calibrate", image(), "-f", &short, "-o", &neurons], &["at least 64"]);

    let calibrate = ["calibrate", image(), "-f", &text, "-o", &neurons, "-c", "64", "--json"];
    let report: Value = serde_json::from_str(&stdout(&calibrate)).unwrap();
    let layers = report["layers"].as_array().unwrap();
    assert!(!layers.is_empty() && report["cluster_neurons"] == 32);
    for layer in layers {
        let (oracle, single) = (layer["oracle"][1].as_f64().unwrap(), layer["neuron_oracle"][1].as_f64().unwrap());
        assert!(0.5 < oracle && oracle <= single && single <= 1.0, "{layer}");
    }
    assert!(stdout(&calibrate[..calibrate.len() - 1]).contains("oracle"));

    stdout(&["convert", model, "-o", &clustered, "--neurons", &neurons]);
    let error = ["calibrate", &clustered, "-f", &text, "-o", &neurons];
    failure(1, &error, &["converted without --neurons"]);
    let run = |options: &[&str]| -> Value {
        let fixed = ["run", &clustered, "--token-ids", "1,310,272,500,261", "-n", "24", "--ignore-eos", "--json"];
        let args: Vec<&str> = fixed.iter().chain(&["--temp", "0"]).chain(options).copied().collect();
        serde_json::from_str(stdout(&args).lines().last().unwrap()).unwrap()
    };
    let half = ["--neurons-kept", "0.5"];
    let exact = run(&[]);
    assert!(exact["cache"]["neurons_used"].is_null());
    let lossy = run(&half);
    let used = lossy["cache"]["neurons_used"].as_f64().unwrap();
    assert!(lossy["policy"]["neurons_kept"] == 0.5 && (0.2..0.8).contains(&used), "{lossy}");
    for others in [["--ram", "5M"], ["--threads", "1"], ["--batch", "1"]] {
        assert_eq!(run(&[&half[..], &others].concat())["tokens"], lossy["tokens"], "{others:?}");
        assert_eq!(run(&others)["tokens"], exact["tokens"], "{others:?}");
    }
}

/// Perplexity of `text` with the first `levels` levels of every unit.
fn perplexity_at(image: &str, text: &str, levels: &str) -> f64 {
    let args = ["perplexity", image, "-f", text, "-c", "128", "--chunks", "4", "--levels", levels, "--json"];
    serde_json::from_str::<Value>(&stdout(&args)).unwrap()["perplexity"].as_f64().unwrap()
}

/// Converting with the moments of a text makes low precision better, on a text that it has not seen.
#[test]
fn moments_are_recorded_and_used() {
    let folder = scratch("moments");
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let (seen, unseen, moments) = (path("seen"), path("unseen"), path("moments"));
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/smollm2/austen.txt"));
    let text = text.unwrap();
    std::fs::write(&seen, &text[..10_000]).unwrap();
    std::fs::write(&unseen, &text[10_000..]).unwrap();
    let model = model();
    let model = model.to_str().unwrap();
    failure(2, &["calibrate", image(), "-f", &seen], &["--output"]);
    failure(2, &["convert", model, "-o", &path("x"), "--prefix-weight", "1"], &["--moments"]);
    failure(1, &["convert", model, "-o", &path("x"), "--moments", &seen], &["forebay calibrate --moments"]);
    stdout(&["calibrate", image(), "-f", &seen, "--moments", &moments, "-c", "128"]);

    let (plain, better) = (path("plain.fby"), path("better.fby"));
    stdout(&["convert", model, "-o", &plain]);
    let convert = ["convert", model, "-o", &better, "--moments", &moments];
    stdout(&convert);
    let bytes = std::fs::read(&better).unwrap();
    stdout(&convert);
    assert_eq!(bytes, std::fs::read(&better).unwrap(), "the same image every time");
    let (low, low_better) = (perplexity_at(&plain, &unseen, "1"), perplexity_at(&better, &unseen, "1"));
    assert!(low_better < low, "{low_better}, without moments {low}");
    let (full, full_better) = (perplexity_at(&plain, &unseen, "2"), perplexity_at(&better, &unseen, "2"));
    assert!(full_better < 1.02 * full, "{full_better}, without moments {full}");
}

/// The bundled model with a chat template, as an image.
fn chat_image() -> String {
    let folder = scratch("chat");
    for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::os::unix::fs::symlink(model().join(file), folder.join(file)).unwrap();
    }
    let template = "{% for m in messages %}{{ m['role'].upper() }}:{{ m['content'] }}\n\n\
                    {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}";
    std::fs::write(folder.join("chat_template.jinja"), template).unwrap();
    let image = folder.join("chat.fby").to_str().unwrap().to_owned();
    stdout(&["convert", folder.to_str().unwrap(), "-o", &image]);
    image
}

/// Standard output and error of a chat that is given `lines`.
fn chat(image: &str, lines: &str) -> (String, String) {
    let args = ["chat", image, "-n", "12", "--temp", "0", "--ignore-eos", "-c", "200"];
    let command = &mut forebay(&args);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.success(), "{said}");
    (String::from_utf8(out.stdout).unwrap(), said)
}

#[test]
fn chat_remembers_until_it_is_reset() {
    let image = &chat_image();
    let hello = "Hello, who are you?\n";
    let (first, _) = chat(image, hello);
    let (both, _) = chat(image, &format!("{hello}/reset\n{hello}"));
    assert_eq!(both, first.repeat(2));
    let (two, said) = chat(image, &format!("{hello}\n/stats\n/nonsense\n{hello}/stats\n/quit\n{hello}"));
    assert!(two.starts_with(&first) && two.len() > first.len(), "{two}");
    assert!(said.contains("there is no command /nonsense"), "{said}");
    let numbers = |what: &str| -> Vec<u32> {
        let lines = said.lines().filter(|line| line.starts_with(what));
        lines.map(|line| line.split_whitespace().find_map(|word| word.parse().ok()).unwrap()).collect()
    };
    // The second turn goes on after the first, and feeds no more than itself and the last token of the answer.
    let (context, fed) = (numbers("context"), numbers("last turn"));
    assert_eq!(context, [fed[0] + 11, fed[0] + 11 + fed[1] + 11], "{said}");
    assert!(fed[1] <= fed[0] + 4, "{said}");
    // A conversation that outgrows the context is forgotten, and the chat goes on.
    let (long, said) = chat(image, &format!("{}\n{hello}", "word ".repeat(400)));
    assert!(said.contains("give a longer context with -c") && said.contains("forgotten"), "{said}");
    assert_eq!(long, first);
    let run = ["run", image, "--chat", "-p", hello.trim(), "-n", "12", "--temp", "0", "--ignore-eos"];
    assert_eq!(stdout(&run), first);
    let system: Vec<&str> = run.iter().copied().chain(["--system", "You are a fox."]).collect();
    assert_ne!(stdout(&system), first);
}

#[test]
fn inspect_shows_the_plan() {
    let text = stdout(&["inspect", image(), "--ram", "4M", "-c", "128"]);
    for word in ["lfm2_moe", "4.00 MiB", "resident", "pool", "least"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let json: Value = serde_json::from_str(&stdout(&["inspect", image(), "-c", "128", "--json"])).unwrap();
    let part = |name: &str| json["plan"][name].as_u64().unwrap();
    let parts = ["tables", "resident", "state", "working", "bookkeeping", "reserved", "pool"];
    assert!(parts.iter().map(|name| part(name)).sum::<u64>() <= part("arena"));
    assert!(part("least") < part("arena"));
    assert_eq!(json["model"]["family"], "lfm2_moe");
    failure(1, &["inspect", image(), "--ram", "100K"], &["--ram 100K is too small"]);
}

#[test]
fn batches_are_wide_where_that_costs_the_pool_little() {
    let batch = |more: &[&str]| {
        let args = [&["inspect", image(), "-c", "1024", "--json"], more].concat();
        serde_json::from_str::<Value>(&stdout(&args)).unwrap()["plan"]["batch"].as_u64().unwrap()
    };
    assert_eq!((batch(&[]), batch(&["--ram", "9M"])), (512, 64));
    assert_eq!(batch(&["-b", "100"]), 100);
}

/// A copy of the bundled model's image, to be planned.
fn own_image(name: &str) -> String {
    let path = scratch(name).join("tiny.fby");
    std::fs::copy(image(), &path).unwrap();
    path.to_str().unwrap().to_owned()
}

/// A plan of `image` on a slow device.
fn planned(image: &str, options: &[&str]) -> Value {
    let fixed = ["plan", image, "--device", "bw=200MB/s,lat=100us,qd=8", "-c", "96", "--tokens", "96", "--json"];
    let args: Vec<&str> = fixed.iter().chain(options).copied().collect();
    serde_json::from_str(&stdout(&args)).unwrap()
}

/// The JSON of a run of `image` that generates 24 tokens.
fn run_of(image: &str, options: &[&str]) -> Value {
    run_for(image, "24", options)
}

fn run_for(image: &str, count: &str, options: &[&str]) -> Value {
    let fixed = ["run", image, "--token-ids", "1,310,272,500,261", "-n", count, "-c", "96", "--temp", "0", "--json"];
    let args: Vec<&str> = fixed.iter().chain(options).copied().collect();
    serde_json::from_str(stdout(&args).lines().last().unwrap()).unwrap()
}

#[test]
fn a_plan_is_kept_in_the_image_and_used() {
    let image = own_image("plan");
    let before = std::fs::read(&image).unwrap();
    let json = planned(&image, &["--ram", "3300K", "--no-trials", "--dry-run"]);
    assert!(std::fs::read(&image).unwrap() == before && json["written"] == false);
    let json = planned(&image, &["--ram", "3300K"]);
    assert_eq!(json["trials"].as_array().unwrap().len(), 3);
    // Nothing but the other superblock and the plan behind everything else was written.
    let after = std::fs::read(&image).unwrap();
    assert!(after[..4096] == before[..4096] && after[8192..before.len()] == before[8192..]);
    assert!(after[4096..8192] != before[4096..8192] && after.len() > before.len());
    let plan = &json["plan"];
    let rate = |value: &Value| value.as_f64().unwrap();
    assert!(rate(&plan["predicted"]["hit_rate"]) >= rate(&plan["lru_hit_rate"]));
    assert!(rate(&plan["predicted"]["hit_rate"]) <= rate(&plan["belady_hit_rate"]));
    assert!(rate(&plan["predicted"]["worst_token_s"]) > 1.0 / rate(&plan["predicted"]["tok_s"]));
    assert_eq!(plan["policy"]["loading"], "exact");
    assert!(json["candidates"].as_array().unwrap().len() > 6);
    // It is shown and used; the result is that of any other plan.
    let shown: Value = serde_json::from_str(&stdout(&["inspect", &image, "--json"])).unwrap();
    assert_eq!(shown["settings"], *plan);
    assert_eq!(shown["plan"]["arena"], 3300 * 1024 / 4096 * 4096);
    assert!(stdout(&["inspect", &image]).contains("plan for 3.2 MiB, 200.0 MB/s and 100 us: exact"));
    let used = run_of(&image, &[]);
    assert_eq!(used["arena_bytes"], 3300 * 1024 / 4096 * 4096);
    assert_eq!(used["policy"]["eviction"], plan["policy"]["eviction"]);
    assert_eq!(used["policy"]["from_plan"], serde_json::json!(["ram", "loading", "eviction", "prefetch"]));
    let overridden = run_of(&image, &["--ram", "4M", "--eviction", "s3fifo", "--policy", "exact"]);
    assert_eq!((&overridden["arena_bytes"], &overridden["policy"]["eviction"]), (&(4 << 20).into(), &"s3fifo".into()));
    assert_eq!(overridden["policy"]["from_plan"], serde_json::json!(["prefetch"]));
    let ignored = run_of(&image, &["--no-plan"]);
    assert_eq!(ignored["policy"]["from_plan"], serde_json::json!([]));
    assert!(ignored["arena_bytes"].as_u64() > used["arena_bytes"].as_u64());
    assert!(used["tokens"] == ignored["tokens"] && overridden["tokens"] == ignored["tokens"]);
    let text = String::from_utf8(output(&["run", &image, "-p", "The king", "-n", "8", "-c", "96"]).stderr).unwrap();
    assert!(text.contains("ram, loading, eviction, prefetch from the image's plan"), "{text}");
    // A longer context than it was made for is refused with what would do.
    failure(1, &["run", &image, "-p", "A", "-c", "2048"], &["the memory of the image's plan", "at least --ram"]);
    // Planning again replaces it.
    let again = planned(&image, &["--ram", "3600K", "--no-trials"]);
    assert_eq!(again["plan"]["ram"], 3600 * 1024);
    assert_eq!(run_of(&image, &[])["arena_bytes"], 3600 * 1024);
    assert!(std::fs::metadata(&image).unwrap().len() <= after.len() as u64 + 4096);
}

#[test]
fn traces_are_replayed_if_they_are_of_the_image() {
    let image = own_image("plan-trace");
    let folder = scratch("plan-traces");
    let trace = folder.join("trace").to_str().unwrap().to_owned();
    run_for(&image, "88", &["--ignore-eos", "--trace", &trace]);
    let json = planned(&image, &["--ram", "3300K", "--no-trials", "--trace", &trace]);
    assert_eq!(json["plan"]["trace_tokens"], 92);
    let other = folder.join("other.fby").to_str().unwrap().to_owned();
    stdout(&["convert", model().to_str().unwrap(), "--unit-weights", "q3", "-o", &other]);
    let args = |image: &'static str, trace: &'static str| {
        ["plan", image, "--ram", "3300K", "-c", "96", "--device", "pi4-sd", "--trace", trace]
    };
    let leak = |text: &str| -> &'static str { Box::leak(text.to_owned().into_boxed_str()) };
    failure(1, &args(leak(&other), leak(&trace)), &["is of another image", "run", "--trace"]);
    let short = folder.join("short").to_str().unwrap().to_owned();
    run_for(&image, "4", &["--ignore-eos", "--trace", &short]);
    failure(1, &args(leak(&image), leak(&short)), &["3 tokens", "at least 64"]);
    failure(1, &args(leak(&image), leak(&image)), &["reading the trace", "expected a trace"]);
    failure(1, &args(leak(&image), "/nowhere"), &["reading the trace", "/nowhere"]);
    failure(2, &["plan", &image, "--ram", "3300K"], &["--device"]);
    failure(1, &["plan", &image, "--ram", "100K", "--device", "pi4-sd"], &["--ram 100K is too small"]);
    failure(1, &["plan", &image, "--ram", "8M", "--device", "pi4-sd", "--tokens", "9"], &["--tokens 9", "64"]);
}

#[test]
fn thresholds_are_found_and_become_the_default() {
    let image = own_image("plan-loss");
    let prompt = ["run", &image, "-p", "A", "-n", "4", "-c", "96", "--policy", "scored", "--json"];
    failure(1, &prompt, &["no thresholds are known", "--thresholds", "forebay plan"]);
    let json = planned(&image, &["--ram", "3300K", "--no-trials", "--max-loss", "20%"]);
    let found = &json["plan"]["profiled"];
    assert!(found["full"].as_f64().unwrap() < 1.0 && found["loss"].as_f64().unwrap() <= 0.2, "{found}");
    assert!(json["profiled"].as_array().unwrap().contains(found));
    let scored: Value = serde_json::from_str(stdout(&prompt).lines().last().unwrap()).unwrap();
    assert_eq!(scored["policy"]["thresholds"], serde_json::json!([found["full"], found["low"]]));
    assert_eq!(scored["policy"]["from_plan"], serde_json::json!(["ram", "thresholds", "eviction", "prefetch"]));
    // What loses something only wins where it is allowed, and says so.
    let planned = &json["plan"]["policy"]["loading"];
    assert!(*planned != "exact", "{planned}");
    assert_eq!(run_of(&image, &[])["policy"]["loading"], *planned);
}

#[test]
fn bench_measures_both_tests_and_what_is_streamed() {
    let lines = stdout(&["bench", image(), "-p", "24", "-n", "12", "-r", "2", "--ram", "4M", "--json"]);
    let rows: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let tests: Vec<&str> = rows.iter().map(|row| row["test"].as_str().unwrap()).collect();
    assert_eq!(tests, ["pp24", "tg12"]);
    for row in &rows {
        let rate = |key: &str| row[key].as_f64().unwrap();
        assert!(0.0 < rate("tok_s_min") && rate("tok_s_min") <= rate("tok_s_median"), "{row}");
        assert!(rate("tok_s_median") <= rate("tok_s_max"), "{row}");
        assert!(rate("bytes_read_per_token") > 0.0, "the pool holds only a part: {row}");
    }
    // A prompt's tokens share the experts that are read.
    let read = |i: usize| rows[i]["bytes_read_per_token"].as_f64().unwrap();
    assert!(read(0) < read(1), "{rows:?}");
    failure(1, &["bench", image(), "-p", "0", "-n", "0"], &["-p and -n"]);
    failure(1, &["bench", image(), "-p", "100000"], &["context of 2048"]);
}

/// A board that is not there, is silent, fails, panics, or goes away.
#[test]
fn boards_that_do_not_serve_are_told_apart() {
    use std::os::unix::net::UnixListener;

    failure(1, &["attach", "--serial", "/dev/no-such-tty"], &["/dev/no-such-tty", "No such file", "/dev/ttyUSB0"]);
    failure(1, &["attach", "--serial", image()], &["neither a serial device nor a socket"]);
    failure(1, &["attach", "--serial", "/dev/null"], &["/dev/null is not a serial device"]);
    failure(1, &["attach", "--serial", "tcp:127.0.0.1:1"], &["connecting to 127.0.0.1:1"]);
    let ready = "{\"ready\":{\"lines\":1,\"line_bytes\":4}}\r\n";
    let cases = [
        ("", "said nothing for 1 s", true),
        ("halted\r\n", "its last line was \"halted\"", true),
        ("panicked at src/main.rs:1:2:\r\nindex out of bounds\r\n", "panicked at src/main.rs:1:2: index out", true),
        ("{\"fatal\":\"reading unit 3 failed\"}\r\n", "the board has ended: reading unit 3 failed", true),
        ("error: no card\r\n", "was closed; its last line was \"error: no card\"", false),
        (ready, "the board takes 4 at most", true),
    ];
    let folder = scratch("attach");
    for (index, (says, error, stays)) in cases.into_iter().enumerate() {
        let socket = folder.join(index.to_string());
        let listener = UnixListener::bind(&socket).unwrap();
        let board = std::thread::spawn(move || {
            let (mut line, _) = listener.accept().unwrap();
            let mut asked = [0; 10];
            std::io::Read::read_exact(&mut line, &mut asked).unwrap();
            assert_eq!(asked, *b"\x03/json on\r");
            line.write_all(says.as_bytes()).unwrap();
            // Whatever is sent to it, it says no more.
            if stays {
                let _ = std::io::copy(&mut line, &mut std::io::sink());
            }
        });
        let args = ["attach", "--serial", socket.to_str().unwrap(), "--wait", "1", "-p", "Hello"];
        let out = output(&args);
        let said = String::from_utf8(out.stderr).unwrap();
        assert!(out.status.code() == Some(1) && said.lines().last().is_some_and(|line| line.contains(error)), "{said}");
        board.join().unwrap();
    }
}
