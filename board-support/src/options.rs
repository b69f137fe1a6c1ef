//! The words of a command line: `name=value`, parted by spaces.

use forebay_kernels::attention::KvFormat;
use forebay_kernels::exec::Exec;
use forebay_runtime::open::Image;
use forebay_runtime::plan::{Limits, Plan, PlanError};
use forebay_runtime::policy::Policy;

/// Ids parted by commas, at least one, all of them numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ids<'a>(&'a str);

impl<'a> Ids<'a> {
    /// Checks that `list` is such a list.
    pub fn parse(list: &'a str) -> Option<Self> {
        list.split(',').all(|id| id.parse::<u32>().is_ok()).then_some(Self(list))
    }

    /// The ids.
    pub fn iter(&self) -> impl Iterator<Item = u32> + 'a {
        self.0.split(',').filter_map(|id| id.parse().ok())
    }
}

/// What to generate from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Prompt<'a> {
    /// A text, for images that have a tokenizer.
    Text(&'a str),
    /// Ids.
    Tokens(Ids<'a>),
}

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Generate from one prompt, greedily, and end.
    Once,
    /// Take prompts from the console until somebody says `/quit`.
    Serve,
}

/// Where the image is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// On the first disk, or in flash if there is no disk.
    Any,
    /// On the first disk.
    Disk,
    /// In memory-mapped flash.
    Flash,
}

/// What a run is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options<'a> {
    /// What to do.
    pub mode: Mode,
    /// What to generate from.
    pub prompt: Prompt<'a>,
    /// Tokens to generate, at least 1; `None` leaves it to the mode.
    pub generate: Option<usize>,
    /// Tokens of prompt and answer together; `None` leaves it to the mode.
    pub context: Option<usize>,
    /// Prompt tokens computed together.
    pub batch: usize,
    /// Reads in flight at once; the device's own limit applies too.
    pub depth: usize,
    /// How keys and values are kept.
    pub kv: KvFormat,
    /// Bytes of the arena to use; `None` is all.
    pub arena: Option<usize>,
    /// Where the image is.
    pub source: Source,
    /// Name of the kernels' back-end; `None` is the best that the processor has.
    pub backend: Option<&'a str>,
    /// Cores that compute.
    pub cores: usize,
    /// Seconds without an answer after which a disk is given up.
    pub patience: usize,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self {
            mode: Mode::Once,
            prompt: Prompt::Text("Once upon a time"),
            generate: None,
            context: None,
            batch: 16,
            depth: 4,
            kv: KvFormat::F16,
            arena: None,
            source: Source::Any,
            backend: None,
            cores: 1,
            patience: 30,
        }
    }
}

/// A word of the command line that means nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OptionError<'a> {
    /// No such name.
    #[error(
        "unknown word {0:?} on the command line; known are mode, tokens, text (last), generate, context, batch, depth, kv, arena, image, backend, cores and patience, each with =value"
    )]
    Unknown(&'a str),
    /// The value does not fit the name.
    #[error("{name}={value}: expected {expected}")]
    Value {
        /// The name.
        name: &'a str,
        /// The value given.
        value: &'a str,
        /// What is taken.
        expected: &'static str,
    },
}

impl<'a> Options<'a> {
    /// Reads a command line without the program's name. `text=` takes everything up to the line's end.
    pub fn parse(line: &'a str) -> Result<Self, OptionError<'a>> {
        let mut options = Self::default();
        let mut rest = line.trim();
        while !rest.is_empty() {
            if let Some(text) = rest.strip_prefix("text=") {
                options.prompt = Prompt::Text(text);
                break;
            }
            let (word, after) = rest.split_once(' ').unwrap_or((rest, ""));
            rest = after.trim_start();
            options.set(word)?;
        }
        Ok(options)
    }

    /// The plan of an arena of `arena` bytes of which the application takes `reserved` for itself.
    pub(crate) fn plan(
        &self,
        image: &Image<'_>,
        arena: usize,
        exec: &Exec<'_>,
        context: usize,
        reserved: u64,
    ) -> Result<Plan, PlanError> {
        let limits = Limits {
            arena: arena as u64,
            context,
            batch: self.batch,
            logit_rows: 1,
            kv: self.kv,
            workers: exec.workers.count(),
            reserved,
            policy: Policy::default(),
        };
        Plan::new(image, limits)
    }

    fn set(&mut self, word: &'a str) -> Result<(), OptionError<'a>> {
        let (name, value) = word.split_once('=').ok_or(OptionError::Unknown(word))?;
        let wrong = |expected| OptionError::Value { name, value, expected };
        let count = || match value.parse::<usize>() {
            Ok(n) if n > 0 => Ok(n),
            _ => Err(wrong("a number from 1 on")),
        };
        match name {
            "tokens" => self.prompt = Prompt::Tokens(Ids::parse(value).ok_or(wrong("ids parted by commas"))?),
            "mode" => {
                self.mode = match value {
                    "once" => Mode::Once,
                    "serve" => Mode::Serve,
                    _ => return Err(wrong("once or serve")),
                }
            }
            "generate" => self.generate = Some(count()?),
            "context" => self.context = Some(count()?),
            "batch" => self.batch = count()?,
            "depth" => self.depth = count()?,
            "arena" => self.arena = Some(count()?),
            "kv" => {
                self.kv = match value {
                    "f16" => KvFormat::F16,
                    "f32" => KvFormat::F32,
                    _ => return Err(wrong("f16 or f32")),
                }
            }
            "image" => {
                self.source = match value {
                    "any" => Source::Any,
                    "disk" => Source::Disk,
                    "flash" => Source::Flash,
                    _ => return Err(wrong("any, disk or flash")),
                }
            }
            "cores" => self.cores = count()?,
            "patience" => self.patience = count()?,
            "backend" => self.backend = Some(value),
            _ => return Err(OptionError::Unknown(word)),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_taken() {
        let line = "mode=serve tokens=1,20,300 generate=5 context=9 batch=2 depth=3 kv=f32 arena=4096 image=flash backend=neon cores=4 patience=7";
        let options = Options::parse(line).unwrap();
        let Prompt::Tokens(ids) = options.prompt else { panic!("{options:?}") };
        assert!(ids.iter().eq([1, 20, 300]));
        let want = Options {
            mode: Mode::Serve,
            prompt: Prompt::Tokens(ids),
            generate: Some(5),
            context: Some(9),
            batch: 2,
            depth: 3,
            kv: KvFormat::F32,
            arena: Some(4096),
            source: Source::Flash,
            backend: Some("neon"),
            cores: 4,
            patience: 7,
        };
        assert_eq!(options, want);
    }

    #[test]
    fn a_text_is_the_rest_of_the_line() {
        let options = Options::parse("generate=3 text=Two words, depth=1").unwrap();
        assert_eq!(options.prompt, Prompt::Text("Two words, depth=1"));
        assert_eq!((options.generate, options.depth), (Some(3), Options::default().depth));
        assert_eq!(Options::parse("").unwrap(), Options::default());
        assert_eq!(Options::parse("  ").unwrap(), Options::default());
    }

    #[test]
    fn what_means_nothing_is_named() {
        for (line, word) in [("speed=3", "speed=3"), ("generate", "generate"), ("generate=1 =", "=")] {
            assert_eq!(Options::parse(line), Err(OptionError::Unknown(word)));
        }
        let refused = [
            "tokens=",
            "tokens=1,,2",
            "tokens=-1",
            "generate=0",
            "context=x",
            "kv=f8",
            "image=tape",
            "cores=0",
            "mode=talk",
        ];
        for word in refused {
            assert!(matches!(Options::parse(word), Err(OptionError::Value { .. })), "{word}");
        }
    }
}
