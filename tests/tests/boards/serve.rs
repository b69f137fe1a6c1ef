//! Boards that serve: a person at a terminal, or a program, sends lines over the UART and gets what `forebay run` and
//! `forebay chat` give on this host.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::machine::{AARCH64, Boot, File, MACHINES, Machine, RASPI3, RISCV64, RISCV64_SBI, file, repository};
use crate::{fixture, image_of};

/// Longest silence of a board.
const PATIENCE: Duration = Duration::from_secs(60);

/// The `forebay` command, built once.
fn forebay() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--locked", "-p", "forebay", "--message-format=json-render-diagnostics"]);
        if !cfg!(debug_assertions) {
            build.arg("--release");
        }
        let build = build.current_dir(repository()).stderr(Stdio::inherit()).output().expect("cargo runs");
        assert!(build.status.success(), "building forebay failed");
        let messages = String::from_utf8(build.stdout).unwrap();
        let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let program = messages.filter_map(|message| message["executable"].as_str().map(PathBuf::from)).next_back();
        program.expect("cargo names the executable")
    })
}

/// Standard output of `forebay` with `input`.
fn host(args: &[&str], input: &str) -> String {
    let mut command = Command::new(forebay());
    let mut child =
        command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// The line of JSON of a `forebay run`.
fn host_run(image: &File, args: &[&str]) -> Value {
    let all = [&["run", image.path.to_str().unwrap(), "--json"], args].concat();
    serde_json::from_str(host(&all, "").lines().last().unwrap()).unwrap()
}

/// The bundled model with chat turns.
fn talker() -> &'static File {
    static IMAGE: OnceLock<File> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let model = repository().join("host-tools/models/tiny-lfm2moe").canonicalize().unwrap();
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
            std::os::unix::fs::symlink(model.join(name), folder.path().join(name)).unwrap();
        }
        let template = "{% for m in messages %}{{ m['role'].upper() }}:{{ m['content'] }}\n\n\
                        {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}";
        std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
        file(&image_of(folder.path(), &Default::default()).unwrap())
    })
}

/// A board that serves, and the other end of its UART.
struct Served {
    child: Child,
    line: UnixStream,
    machine: &'static Machine,
    /// All that it printed, without carriage returns.
    said: String,
    _dir: tempfile::TempDir,
}

impl Served {
    /// Boots and waits for the prompt; `None` if this host cannot.
    fn start(machine: &'static Machine, image: &File, words: &str) -> Option<Self> {
        let mut served = Self::boot(machine, image, words)?;
        assert!(served.until_prompt(), "no prompt: {}", served.said);
        Some(served)
    }

    fn boot(machine: &'static Machine, image: &File, words: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("uart");
        let words = format!("{}mode=serve {words}", machine.bounds);
        // Under SBI the firmware ends the machine; with semihosting it would, and QEMU then keeps the socket open.
        let semihosting = machine.name != RISCV64_SBI.name;
        let boot = Boot { disk: Some(image), semihosting, ..Boot::new(machine, words) };
        // The machine starts when somebody has connected.
        let mut qemu = boot.qemu(&format!("unix:{},server=on", socket.display()))?;
        let child = qemu.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let start = Instant::now();
        let line = loop {
            match UnixStream::connect(&socket) {
                Ok(line) => break line,
                Err(error) => assert!(start.elapsed() < PATIENCE, "QEMU offers no socket: {error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        line.set_read_timeout(Some(PATIENCE)).unwrap();
        Some(Self { child, line, machine, said: String::new(), _dir: dir })
    }

    /// Reads up to `mark`; `false` if the console is closed before.
    fn until(&mut self, mark: &str) -> bool {
        let (start, mut bytes) = (self.said.len(), Vec::new());
        loop {
            let mut byte = [0];
            match self.line.read(&mut byte) {
                Ok(1) => bytes.push(byte[0]),
                Ok(_) => break,
                Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
                Err(error) => panic!("{}: {error} after {:?}", self.machine.name, String::from_utf8_lossy(&bytes)),
            }
            if bytes.ends_with(mark.as_bytes()) {
                break;
            }
        }
        let text = String::from_utf8(bytes).unwrap();
        print!("{text}");
        self.said += &text.replace('\r', "");
        self.said[start..].ends_with(&mark.replace('\r', ""))
    }

    fn until_prompt(&mut self) -> bool {
        self.until("\r\n> ")
    }

    fn send(&mut self, bytes: &[u8]) {
        self.line.write_all(bytes).unwrap();
    }

    /// What the board answers to a line, without the line's echo and the next prompt.
    fn ask(&mut self, line: &str) -> String {
        let start = self.said.len();
        self.send(line.as_bytes());
        self.send(b"\r");
        assert!(self.until_prompt(), "no prompt after {line:?}");
        let said = &self.said[start..self.said.len() - "\n> ".len()];
        said.strip_prefix(line)
            .unwrap_or_else(|| panic!("{line:?} was not sent back: {said:?}"))
            .trim_start_matches('\n')
            .to_owned()
    }

    /// As [`Self::ask`], of a line that is text: the answer exactly.
    fn answer(&mut self, line: &str) -> String {
        let start = self.said.len();
        self.send(format!("{line}\r").as_bytes());
        assert!(self.until_prompt(), "no prompt after {line:?}");
        // The echo's end, and the line that ends the answer.
        let said = self.said[start..].strip_prefix(line).and_then(|said| said.strip_prefix('\n'));
        said.and_then(|said| said.strip_suffix("\n> ")).expect("an echo").to_owned()
    }

    /// Numbers of the last line that begins with `key`.
    fn numbers(&self, key: &str) -> Vec<u64> {
        let line =
            self.said.lines().rev().find_map(|line| line.strip_prefix(key)).unwrap_or_else(|| panic!("no {key:?}"));
        line.split(|c: char| !c.is_ascii_digit())
            .filter(|word| !word.is_empty())
            .map(|word| word.parse().unwrap())
            .collect()
    }

    fn ids(&self, key: &str) -> Value {
        let line = self.said.lines().rev().find_map(|line| line.strip_prefix(key));
        serde_json::from_str(line.unwrap_or_else(|| panic!("no {key:?}"))).unwrap()
    }

    /// The exit status, after the console was closed.
    fn status(&mut self) -> Option<i32> {
        while self.until("\n") {}
        self.child.wait().unwrap().code()
    }

    fn quit(mut self) {
        self.send(b"/quit\r");
        assert_eq!(self.status(), Some(0));
        let [used, len] = self.numbers("stack: ")[..] else { panic!("no stack") };
        assert!(used < len * 9 / 10, "{used} of {len} bytes of stack");
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The same settings give the text, the tokens and the conversation that `forebay` gives.
#[test]
fn lines_are_answered_as_on_the_host() {
    let image = talker();
    let path = image.path.to_str().unwrap();
    for machine in [&AARCH64, &RISCV64, &RASPI3] {
        let Some(mut board) = Served::start(machine, image, "generate=10") else { continue };
        let size = std::fs::metadata(&image.path).unwrap().len();
        let arena = board.numbers("plan: arena ")[0];
        assert!(board.said.contains("chat: temperature 0.8, top-k 40, top-p 0.95, min-p 0.05, seed random, length 10"));
        // A conversation of two turns, sampled.
        board.ask("/seed 7");
        let turns = ["Hello, who are you?", "And now?"];
        let [first, second] = turns.map(|turn| board.answer(turn));
        let lines = format!("{}\n{}\n", turns[0], turns[1]);
        let talk = host(&["chat", path, "--seed", "7", "-n", "10"], &lines);
        assert_eq!(format!("{first}\n{second}\n"), talk, "{}", machine.name);
        // Forgotten, the draws begin anew.
        board.ask("/reset");
        assert_eq!(board.answer(turns[0]), first);
        // A system text, greedily.
        board.ask("/system Be brief.");
        board.ask("/temp 0");
        let greedy = host_run(image, &["--system", "Be brief.", "-p", turns[0], "--temp", "0", "-n", "10"]);
        assert_eq!(board.answer(turns[0]), greedy["text"]);
        // A story, with other filters.
        board.ask("/raw");
        board.ask("/tokens on");
        for setting in ["/temp 1.5", "/top-k 9", "/top-p 0.9", "/min-p 0.02", "/repeat-penalty 1.3", "/length 6"] {
            board.ask(setting);
        }
        let sampling =
            ["--temp", "1.5", "--top-k", "9", "--top-p", "0.9", "--min-p", "0.02", "--repeat-penalty", "1.3"];
        let story = ["-p", "Once upon a time", "--seed", "7", "-n", "6"];
        let story = host_run(image, &[&story[..], &sampling].concat());
        for _ in 0..2 {
            board.ask("Once upon a time");
            assert_eq!(board.ids("tokens: "), story["tokens"], "{}", machine.name);
        }
        board.ask("/stats");
        let [used, _pool, _stack_used, stack] = board.numbers("memory ")[..] else { panic!("memory") };
        assert_eq!(used, arena);
        assert!((arena + stack) * 3 <= size, "arena and stack are more than a third of the image");
        board.quit();
    }
}

/// What a person does wrong is said, and nothing is spoilt by it.
#[test]
fn lines_are_edited_and_refused() {
    for machine in [&AARCH64, &RISCV64] {
        let Some(mut board) = Served::start(machine, talker(), "generate=4") else { continue };
        board.ask("/temp 0");
        let hello = board.answer("Hello");
        board.ask("/reset");
        assert_eq!(board.ask("/fly high"), "error: there is no command /fly; /help lists them");
        assert_eq!(board.ask("/temp warm"), "error: /temp warm: expected a number of at least 0");
        assert_eq!(board.ask("/top-k 300"), "error: /top-k 300: there is room for 256 tokens");
        assert_eq!(board.ask("/ids 1,4096"), "error: /ids: 4096 is outside of the vocabulary of 4096");
        assert_eq!(board.ask("/more"), "error: /more: there is no answer that was cut short");
        assert!(board.ask("/help").lines().count() > 15);
        // Each byte that has no room rings the bell.
        let start = board.said.len();
        board.send(&[b'x'; 600]);
        board.send(b"\r\n");
        assert!(board.until_prompt());
        let said = &board.said[start..];
        assert!(
            said.contains("error: the line is longer than 512 bytes") && said.matches('\x07').count() == 88,
            "{said}"
        );
        board.send(b"\xff\xfe\r");
        // The echo of what is not UTF-8 is not UTF-8.
        let mut echo = [0; 2];
        board.line.read_exact(&mut echo).unwrap();
        assert_eq!(echo, *b"\xff\xfe");
        assert!(board.until_prompt() && board.said.ends_with("error: the line is not UTF-8: it was not taken\n> "));
        // A long line that fits, too long for the context, and a conversation that is as it was.
        let long = "7x".repeat(250);
        assert!(board.ask(&long).contains("of the context's 128 are left"));
        // An arrow, a wrong letter, a wrong line, an interrupt, empty lines, line feeds.
        board.send(b"nonsense\x15\x1b[DHallo\x7f\x7f\x7fl");
        assert!(board.until("\x08 \x08l"));
        board.send(b"lo\n");
        assert!(board.until_prompt());
        assert!(board.said.ends_with(&format!("lo\n{hello}\n> ")), "edited otherwise");
        board.send(b"never mind\x03");
        assert!(board.until("^C\r\n> "));
        board.send(b"\n");
        assert!(board.until("\r\n> "));
        board.quit();
    }
}

/// Ctrl-C stops an answer, which goes on as if nothing had been; a full context ends one.
#[test]
fn answers_are_interrupted_and_go_on() {
    for machine in [&AARCH64, &RISCV64] {
        let Some(mut board) = Served::start(machine, talker(), "") else { continue };
        for setting in ["/raw", "/temp 0", "/tokens on", "/length 500"] {
            board.ask(setting);
        }
        let whole = board.ask("A king");
        assert!(whole.ends_with("(the context of 128 tokens is full: /reset forgets the conversation)"), "{whole}");
        let prompt = board.ids("prompt: ").as_array().unwrap().len();
        let tokens = board.ids("tokens: ").as_array().unwrap().clone();
        assert_eq!(prompt + tokens.len(), 129, "one token more than the context holds");
        assert!(board.ask("/more").starts_with("error: "));
        board.send(b"A king\r");
        assert!(board.until("A king\r\n"));
        let begun = board.said.len();
        while board.said.len() < begun + 40 {
            assert!(board.until(" "));
        }
        board.send(b"lost\x03");
        assert!(board.until_prompt());
        let said = &board.said[begun..];
        assert!(said.contains("(interrupted; /more goes on)"), "{said}");
        assert!(said.contains("\n4 bytes came while computing and were dropped: wait for the prompt\n"), "{said}");
        let first = board.ids("tokens: ").as_array().unwrap().clone();
        assert!(first.len() < tokens.len(), "it was not interrupted");
        board.ask("/more");
        let rest = board.ids("tokens: ").as_array().unwrap().clone();
        assert_eq!([first, rest].concat(), tokens);
        board.quit();
    }
}

/// Without a tokenizer ids are asked for and given, on every board.
#[test]
fn ids_are_answered_by_ids() {
    let disk = file(fixture());
    let ids = "1,17,205,33,60,4";
    for machine in MACHINES {
        let Some(mut board) = Served::start(machine, &disk, "generate=12") else { continue };
        assert_eq!(board.ask("Hello"), "error: the image has no tokenizer: give ids, /ids 1,2,3");
        assert!(board.ask("/chat").starts_with("error: /chat: the image has no chat turns"));
        board.ask("/temp 0");
        let want = host_run(&disk, &["--token-ids", ids, "--temp", "0", "-n", "12"]);
        let said = board.ask(&format!("/ids {ids}"));
        let said: Vec<u64> = said.split_whitespace().map(|id| id.parse().unwrap()).collect();
        assert_eq!(serde_json::json!(said), want["tokens"], "{}", machine.name);
        board.quit();
    }
}

/// A model that cannot be read ends the service with the status of a single run.
#[test]
fn a_failure_ends_the_service() {
    let mut damaged = fixture().to_vec();
    let page = damaged.len() - 4096;
    damaged[page..].iter_mut().for_each(|byte| *byte ^= 0x10);
    let Some(mut board) = Served::start(&AARCH64, &file(&damaged), "") else { return };
    board.send(b"/ids 1,17,205,33,60,4\r");
    assert_eq!(board.status(), Some(9));
    assert!(board.said.contains("\nerror: reading ") && board.said.contains("failed 3 times: checksum mismatch"));
}

/// `forebay attach` in front of a board: it waits for the start, sets, asks, and leaves the board to the next one.
#[test]
fn attach_asks_a_board() {
    let image = talker();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("uart");
    let name = socket.to_str().unwrap();
    for machine in [&AARCH64, &RISCV64] {
        let _ = std::fs::remove_file(&socket);
        let boot = Boot { disk: Some(image), ..Boot::new(machine, "mode=serve") };
        let Some(mut qemu) = boot.qemu(&format!("unix:{name},server=on")) else { continue };
        let child = qemu.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let mut child = Killed(child);
        let start = Instant::now();
        while !socket.exists() {
            assert!(start.elapsed() < PATIENCE, "QEMU offers no socket");
            std::thread::sleep(Duration::from_millis(20));
        }
        let attach = |args: &[&str]| host(&[&["attach", "--serial", name], args].concat(), "");
        let turn = ["-p", "Hello, \"you\"\n/there", "--seed", "7", "-n", "8"];
        let told = host_run(image, &[&["--chat"], &turn[..]].concat());
        let said: Value = serde_json::from_str(&attach(&[&turn[..], &["--json"]].concat())).unwrap();
        for key in ["text", "tokens", "prompt_tokens", "gen_tokens", "stop", "seed"] {
            assert_eq!(said[key], told[key], "{key} on {}", machine.name);
        }
        assert!(said["gen_tok_s"].as_f64().unwrap() > 0.0 && said["bytes_per_token"].as_u64().unwrap() > 0);
        let sampling =
            ["--temp", "1.2", "--top-k", "20", "--top-p", "0.9", "--min-p", "0.1", "--repeat-penalty", "1.2"];
        let story = [&["-p", "Once", "--seed", "3", "-n", "8"], &sampling[..]].concat();
        let text = host_run(image, &story)["text"].as_str().unwrap().to_owned() + "\n";
        assert_eq!(attach(&[&story[..], &["--raw"]].concat()), text);
        // What the board refuses fails; what is typed goes to it line by line.
        let refused =
            Command::new(forebay()).args(["attach", "--serial", name, "-p", "x", "--top-k", "999"]).output().unwrap();
        let error = String::from_utf8(refused.stderr).unwrap();
        assert!(refused.status.code() == Some(1) && error.contains("there is room for 256 tokens"), "{error}");
        let lines = "/seed 3\nOnce\n/fly\n/quit\n";
        assert_eq!(host(&["attach", "--serial", name], lines), text, "{}", machine.name);
        assert_eq!(child.0.wait().unwrap().code(), Some(0));
    }
}

/// A process that ends with the test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
