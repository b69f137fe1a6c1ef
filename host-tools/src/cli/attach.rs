//! `forebay attach`

use std::io::{BufRead, IsTerminal, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::ChoiceArgs;
use crate::host::port::Port;

/// How often the board is asked to answer in JSON, until it does.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// Silence after which nothing more is on its way.
const SETTLED: Duration = Duration::from_millis(200);
/// Ctrl-C, which gives up a line and stops an answer.
const INTERRUPT: u8 = 0x03;

/// Talk with a board that serves, over its serial line.
///
/// The board must have been started with `mode=serve` (docs/console.md). With -p one prompt is put to it, in a
/// conversation of its own; without, each line of standard input. Lines that begin with a slash are the board's own
/// commands: /help lists them, /quit ends the board's program. Ctrl-C stops an answer, the end of the input leaves the
/// board as it is.
#[derive(Args)]
pub struct AttachArgs {
    /// The serial device, an emulator's Unix socket, or tcp:HOST:PORT
    #[arg(long, value_name = "DEVICE")]
    serial: String,
    /// Speed of a serial device, in bits a second
    #[arg(long, value_name = "N", default_value = "115200", value_parser = clap::value_parser!(u32).range(50..))]
    baud: u32,
    /// Put this to the model, print the answer and end
    #[arg(short, long, value_name = "TEXT", group = "once")]
    prompt: Option<String>,
    /// Ids to go on from, instead of a text
    #[arg(long, value_name = "ID,ID,…", value_delimiter = ',', group = "once", conflicts_with_all = ["chat", "system"])]
    token_ids: Option<Vec<u32>>,
    /// Put lines to the model as turns of a conversation, by the image's chat turns [default: if it has some]
    #[arg(long, conflicts_with = "raw")]
    chat: bool,
    /// Put lines to the model as they are
    #[arg(long)]
    raw: bool,
    /// Begin the conversation with this system text (implies --chat)
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Most tokens of an answer [default: as the board is set]
    #[arg(short, long, value_name = "N", value_parser = super::positive)]
    n: Option<usize>,
    #[command(flatten)]
    choice: ChoiceArgs,
    /// Give the board up when it says nothing for so many seconds
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = clap::value_parser!(u64).range(1..))]
    wait: u64,
    /// Print a line of JSON instead of the text (with -p or --token-ids)
    #[arg(long, requires = "once")]
    json: bool,
}

/// The line of JSON, named as that of `forebay run`.
#[derive(Serialize)]
struct Report<'r> {
    text: &'r str,
    tokens: &'r [u64],
    prompt_tokens: u64,
    prompt_tok_s: f64,
    gen_tokens: u64,
    gen_tok_s: f64,
    bytes_per_token: u64,
    hits: u64,
    misses: u64,
    stop: &'r str,
    seed: u64,
    position: u64,
    context: u64,
}

pub fn main(args: &AttachArgs) -> Result<()> {
    let once = args.prompt.is_some() || args.token_ids.is_some();
    let port = Port::open(&args.serial, args.baud)?;
    let (sender, events) = channel();
    listen(port.reader, sender.clone());
    let interrupts = sender.clone();
    ctrlc::set_handler(move || drop(interrupts.send(Event::Interrupt))).context("watching for Ctrl-C")?;
    let mut board = Board {
        name: &args.serial,
        writer: port.writer,
        events,
        wait: Duration::from_secs(args.wait),
        partial: Vec::new(),
        waiting: Vec::new(),
        lines: 0,
        ready: Value::Null,
        last: String::new(),
    };
    board.meet()?;
    let done = settings(args).iter().try_for_each(|line| board.set(line)).and_then(|()| match once {
        true => one(args, &mut board),
        false => converse(&mut board, sender),
    });
    // Whoever attaches a terminal next finds the board as it was. If it has gone, nobody is left to tell.
    if !matches!(done, Ok(Ended::WithBoard)) {
        let _ = board.writer.write_all(b"\x03/json off\r").and_then(|()| board.writer.flush());
        board.settle();
    }
    done.map(drop)
}

/// How attaching ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// The board goes on serving.
    Alone,
    /// The board was told to end.
    WithBoard,
}

/// The lines that set the board up as asked.
fn settings(args: &AttachArgs) -> Vec<String> {
    let ChoiceArgs { temp, top_k, top_p, min_p, repeat_penalty, seed } = &args.choice;
    let mut lines = Vec::new();
    let mut set = |name: &str, value: Option<String>| lines.extend(value.map(|value| format!("/{name} {value}")));
    set("temp", temp.map(|x| x.to_string()));
    set("top-k", top_k.map(|x| x.to_string()));
    set("top-p", top_p.map(|x| x.to_string()));
    set("min-p", min_p.map(|x| x.to_string()));
    set("repeat-penalty", repeat_penalty.map(|x| x.to_string()));
    set("length", args.n.map(|x| x.to_string()));
    if args.raw {
        lines.push("/raw".into());
    } else if args.chat || args.system.is_some() {
        lines.push("/chat".into());
    }
    lines.extend(args.system.iter().map(|text| format!("/system {text}")));
    lines.extend(seed.map(|seed| format!("/seed {seed}")));
    lines
}

/// One prompt.
fn one(args: &AttachArgs, board: &mut Board<'_>) -> Result<Ended> {
    board.set("/reset")?;
    let line = match (&args.token_ids, &args.prompt) {
        (Some(ids), _) => format!("/ids {}", ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")),
        (None, text) => quoted(text.as_deref().unwrap_or_default())?,
    };
    let mut out = std::io::stdout().lock();
    let mut answer = Answer::default();
    board.ask(&line, |record| answer.take(record, if args.json { None } else { Some(&mut out) }))?;
    if let Some(error) = answer.error {
        bail!("the board refused the prompt: {error}");
    }
    let end = answer.end.as_ref().context("the board gave no answer")?;
    let report = report(&answer, end);
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
    } else {
        writeln!(out)?;
        eprintln!();
        let line = |what: &str, text: String| eprintln!("{what:<11} {text}");
        line("prompt", format!("{} tokens, {:.1} tok/s", report.prompt_tokens, report.prompt_tok_s));
        line(
            "generation",
            format!("{} tokens, {:.1} tok/s, ended by {}", report.gen_tokens, report.gen_tok_s, report.stop),
        );
        line(
            "read",
            format!("{} bytes a token; {} hits, {} misses", report.bytes_per_token, report.hits, report.misses),
        );
        line("context", format!("{} of {} tokens", report.position, report.context));
        line("seed", report.seed.to_string());
    }
    Ok(Ended::Alone)
}

/// Text as a line that the board takes for text, whatever is in it.
fn quoted(text: &str) -> Result<String> {
    serde_json::to_string(text).context("writing the prompt as JSON")
}

fn number(record: &Value, key: &str) -> u64 {
    record[key].as_u64().unwrap_or_default()
}

fn report<'r>(answer: &'r Answer, end: &'r Value) -> Report<'r> {
    let rate = |count: u64, time: u64| if time == 0 { 0.0 } else { count as f64 * 1e6 / time as f64 };
    let (prompt, tokens) = (number(end, "prompt_tokens"), number(end, "tokens"));
    Report {
        text: &answer.text,
        tokens: &answer.tokens,
        prompt_tokens: prompt,
        prompt_tok_s: rate(prompt, number(end, "prompt_us")),
        gen_tokens: tokens,
        gen_tok_s: rate(tokens.saturating_sub(1), number(end, "answer_us")),
        bytes_per_token: number(end, "bytes_per_token"),
        hits: number(end, "hits"),
        misses: number(end, "misses"),
        stop: end["stop"].as_str().unwrap_or_default(),
        seed: number(end, "seed"),
        position: number(end, "position"),
        context: number(end, "context"),
    }
}

/// What comes back for a line.
#[derive(Default)]
struct Answer {
    text: String,
    tokens: Vec<u64>,
    end: Option<Value>,
    error: Option<String>,
}

impl Answer {
    /// Takes a record in; its text goes to `out` at once.
    fn take(&mut self, record: &Value, out: Option<&mut dyn Write>) -> Result<()> {
        self.tokens.extend(record["token"].as_u64());
        if let Some(text) = record["text"].as_str() {
            self.text += text;
            if let Some(out) = out {
                out.write_all(text.as_bytes()).and_then(|()| out.flush())?;
            }
        }
        if let Some(error) = record["error"].as_str() {
            self.error = Some(error.into());
        }
        if record["end"].is_object() {
            self.end = Some(record["end"].clone());
        }
        Ok(())
    }
}

/// Line by line.
fn converse(board: &mut Board<'_>, sender: Sender<Event>) -> Result<Ended> {
    let prompt = std::io::stdin().is_terminal();
    if prompt {
        eprintln!("/help lists the board's commands, Ctrl-C stops an answer, Ctrl-D leaves the board");
    }
    std::thread::spawn(move || {
        let mut lines = std::io::stdin().lock().lines();
        while let Some(Ok(line)) = lines.next() {
            if sender.send(Event::Line(line)).is_err() {
                return;
            }
        }
        let _ = sender.send(Event::EndOfInput);
    });
    let mut out = std::io::stdout().lock();
    loop {
        if prompt {
            eprint!("> ");
        }
        let line = match board.typed()? {
            Some(line) => line,
            None => return Ok(Ended::Alone),
        };
        match line.trim() {
            "" => continue,
            "/quit" => {
                board.end()?;
                return Ok(Ended::WithBoard);
            }
            command if command.starts_with("/json") => {
                eprintln!("error: {command}: this program and the board talk in JSON as it is");
                continue;
            }
            _ => {}
        }
        let line = if line.starts_with('/') && !line.starts_with("//") {
            line.trim_end().to_owned()
        } else {
            quoted(line.strip_prefix('/').unwrap_or(&line))?
        };
        let mut answer = Answer::default();
        let asked = board.ask(&line, |record| {
            answer.take(record, Some(&mut out))?;
            show(record);
            Ok(())
        });
        match asked {
            // The line was not sent.
            Err(error) if error.is::<TooLong>() => eprintln!("error: {error}"),
            asked => asked?,
        }
        if answer.end.is_some() {
            writeln!(out)?;
        }
        match answer.end.as_ref().and_then(|end| end["stop"].as_str()) {
            Some("context") => eprintln!("(the context is full: /reset forgets the conversation)"),
            Some("interrupted") => eprintln!("(interrupted; /more goes on)"),
            _ => {}
        }
    }
}

/// Prints what is no part of an answer.
fn show(record: &Value) {
    if let Some(text) = record["info"].as_str() {
        eprintln!("{text}");
    }
    if let Some(text) = record["error"].as_str() {
        eprintln!("error: {text}");
    }
    for kind in ["settings", "stats"] {
        for (name, value) in record[kind].as_object().into_iter().flatten() {
            eprintln!("{:<15} {value}", name.replace('_', " "));
        }
    }
}

/// What happens while a board is attached.
enum Event {
    /// Bytes came from the board.
    Bytes(Vec<u8>),
    /// The console is closed, perhaps by an error.
    Closed(Option<std::io::Error>),
    /// A line was typed.
    Line(String),
    /// No more lines will be typed.
    EndOfInput,
    /// Ctrl-C was typed.
    Interrupt,
}

/// Hands over what comes from the board, until nothing does.
fn listen(mut reader: Box<dyn std::io::Read + Send>, sender: Sender<Event>) {
    std::thread::spawn(move || {
        let mut buf = [0; 4096];
        loop {
            let event = match reader.read(&mut buf) {
                Ok(0) => Event::Closed(None),
                Ok(count) => Event::Bytes(buf[..count].to_vec()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => Event::Closed(Some(error)),
            };
            let last = matches!(event, Event::Closed(_));
            if sender.send(event).is_err() || last {
                return;
            }
        }
    });
}

/// A line is longer than the board takes.
#[derive(Debug, Clone, Copy)]
struct TooLong {
    len: u64,
    room: u64,
}

impl std::fmt::Display for TooLong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the line takes {} bytes, but the board takes {} at most: send a shorter one", self.len, self.room)
    }
}

impl std::error::Error for TooLong {}

/// What came next.
enum Heard {
    /// A line of JSON from the board.
    Record(Value),
    /// Another line: the board starts, ends, or is not ours.
    Plain(String),
    /// Something was typed; [`Board::typed`] gives it.
    Typed,
    /// Ctrl-C was typed.
    Interrupt,
    /// Nothing came in time.
    Silence,
}

/// A board at the other end.
struct Board<'b> {
    name: &'b str,
    writer: Box<dyn Write + Send>,
    events: Receiver<Event>,
    /// Longest silence.
    wait: Duration,
    /// The beginning of a line.
    partial: Vec<u8>,
    /// Lines typed ahead; `None` is their end.
    waiting: Vec<Option<String>>,
    /// Lines that the board has done.
    lines: u64,
    /// The board's last word on being ready.
    ready: Value,
    /// The last line that was no JSON.
    last: String,
}

impl Board<'_> {
    /// Makes the board answer in JSON.
    fn meet(&mut self) -> Result<()> {
        let mut heard = Instant::now();
        loop {
            // A board that is starting may lose this; one that is answering stops.
            self.write(b"\x03/json on\r")?;
            let next = Instant::now() + ASK_EVERY;
            loop {
                match self.receive(next.saturating_duration_since(Instant::now()))? {
                    Heard::Record(record) if record["ready"].is_object() => {
                        // Lines that were sent more than once are answered more than once.
                        self.settle();
                        return Ok(());
                    }
                    Heard::Plain(line) => {
                        heard = Instant::now();
                        if !line.starts_with(['>', '^']) {
                            eprintln!("{line}");
                        }
                    }
                    Heard::Record(_) => heard = Instant::now(),
                    Heard::Typed => {}
                    Heard::Interrupt => bail!("interrupted; the board at {} did not answer yet", self.name),
                    Heard::Silence => break,
                }
            }
            if heard.elapsed() >= self.wait {
                return Err(self.silence());
            }
        }
    }

    /// Takes in everything that is on its way.
    fn settle(&mut self) {
        while let Ok(Heard::Record(_) | Heard::Plain(_)) = self.receive(SETTLED) {}
    }

    /// Sends a setting, which the board must take.
    fn set(&mut self, line: &str) -> Result<()> {
        let mut refused = None;
        self.ask(line, |record| {
            refused = refused.take().or(record["error"].as_str().map(str::to_owned));
            Ok(())
        })?;
        refused.map_or(Ok(()), |error| bail!("the board refused {line:?}: {error}"))
    }

    /// Sends a line and hands over the records that answer it.
    fn ask(&mut self, line: &str, mut record: impl FnMut(&Value) -> Result<()>) -> Result<()> {
        let (len, room) = (line.len() as u64, number(&self.ready, "line_bytes"));
        ensure!(len <= room, TooLong { len, room });
        let before = self.lines;
        self.write(line.as_bytes())?;
        self.write(b"\r")?;
        let mut interrupts = 0;
        loop {
            match self.receive(self.wait)? {
                Heard::Record(said) => {
                    record(&said)?;
                    if said["ready"].is_object() && self.lines > before {
                        return Ok(());
                    }
                }
                Heard::Interrupt => {
                    interrupts += 1;
                    ensure!(interrupts < 3, "interrupted; the board did not stop its answer");
                    self.write(&[INTERRUPT])?;
                }
                Heard::Plain(_) | Heard::Typed => {}
                Heard::Silence => return Err(self.silence()),
            }
        }
    }

    /// The next line that is typed; `None` after the last one.
    fn typed(&mut self) -> Result<Option<String>> {
        loop {
            if !self.waiting.is_empty() {
                return Ok(self.waiting.remove(0));
            }
            // What the board says by itself is a failure, or noise on the line.
            if let Heard::Interrupt = self.receive(self.wait)? {
                eprintln!();
                return Ok(None);
            }
        }
    }

    /// Ends the board's program and prints its last words.
    fn end(&mut self) -> Result<()> {
        self.write(b"/quit\r")?;
        loop {
            match self.receive(ASK_EVERY) {
                Ok(Heard::Plain(line)) => eprintln!("{line}"),
                Ok(Heard::Record(_) | Heard::Typed) => {}
                // It is gone, or has halted.
                Ok(Heard::Silence | Heard::Interrupt) | Err(_) => return Ok(()),
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let written = self.writer.write_all(bytes).and_then(|()| self.writer.flush());
        written.with_context(|| format!("writing to {}", self.name))
    }

    fn silence(&self) -> anyhow::Error {
        let seconds = self.wait.as_secs();
        anyhow!(
            "the board at {} said nothing for {seconds} s{}: is it powered and wired, is the speed right, and was it \
             started with mode=serve?",
            self.name,
            self.last_words()
        )
    }

    fn last_words(&self) -> String {
        if self.last.is_empty() { String::new() } else { format!("; its last line was {:?}", self.last) }
    }

    /// What comes next, from the board or from the keyboard.
    fn receive(&mut self, patience: Duration) -> Result<Heard> {
        let until = Instant::now() + patience;
        loop {
            if let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.partial.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if let Some(heard) = self.understand(line)? {
                    return Ok(heard);
                }
                continue;
            }
            let left = until.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(Event::Bytes(bytes)) => self.partial.extend(bytes),
                Ok(Event::Closed(error)) => {
                    // Later calls find it closed, too.
                    let why = error.map_or(String::new(), |error| format!(" ({error})"));
                    bail!("the console at {} was closed{why}{}", self.name, self.last_words());
                }
                Ok(Event::Line(line)) => {
                    self.waiting.push(Some(line));
                    return Ok(Heard::Typed);
                }
                Ok(Event::EndOfInput) => {
                    self.waiting.push(None);
                    return Ok(Heard::Typed);
                }
                Ok(Event::Interrupt) => return Ok(Heard::Interrupt),
                Err(RecvTimeoutError::Timeout) => return Ok(Heard::Silence),
                Err(RecvTimeoutError::Disconnected) => bail!("the console at {} was closed", self.name),
            }
        }
    }

    /// What a line means; `None` if it is empty. A board that has failed is an error.
    fn understand(&mut self, line: String) -> Result<Option<Heard>> {
        if line.is_empty() {
            return Ok(None);
        }
        if line.starts_with('{')
            && let Ok(record) = serde_json::from_str::<Value>(&line)
        {
            if let Some(error) = record["fatal"].as_str() {
                bail!("the board has ended: {error}");
            }
            if record["ready"].is_object() {
                self.lines = number(&record["ready"], "lines");
                self.ready = record["ready"].clone();
            }
            return Ok(Some(Heard::Record(record)));
        }
        if line.starts_with("panicked at ") {
            // The message stands on the next line.
            let message = match self.receive(ASK_EVERY) {
                Ok(Heard::Plain(message)) => message,
                _ => String::new(),
            };
            bail!("the board {line} {message}");
        }
        self.last.clone_from(&line);
        Ok(Some(Heard::Plain(line)))
    }
}
