//! What a line asks for.

use crate::options::Ids;

/// A line, understood.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Command<'l> {
    /// Go on from this text.
    Text(&'l str),
    /// Go on from these ids.
    Ids(Ids<'l>),
    /// Go on with the answer.
    More,
    /// Change how tokens are chosen.
    Set(Setting),
    /// Restart the draws from a seed; `None` takes another one for every conversation.
    Seed(Option<u64>),
    /// Most tokens of an answer.
    Length(usize),
    /// Put lines to the model as they are, or by the image's chat turns.
    Chat(bool),
    /// Begin conversations with this text; an empty one is none.
    System(&'l str),
    /// Forget the conversation.
    Reset,
    /// Show the settings.
    Settings,
    /// Show counts, speeds and memory.
    Stats,
    /// Show ids after an answer.
    Tokens(bool),
    /// Answer in JSON.
    Json(bool),
    /// List the commands.
    Help,
    /// End.
    Quit,
}

/// A parameter of the sampler.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Setting {
    /// See `SamplerParams::temperature`.
    Temperature(f32),
    /// See `SamplerParams::top_k`.
    TopK(usize),
    /// See `SamplerParams::top_p`.
    TopP(f32),
    /// See `SamplerParams::min_p`.
    MinP(f32),
    /// See `SamplerParams::repetition_penalty`.
    RepeatPenalty(f32),
}

/// A line that means nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CommandError<'l> {
    /// No such command.
    #[error("there is no command {0}; /help lists them")]
    Unknown(&'l str),
    /// The value does not fit the command.
    #[error("{name} {value}: expected {expected}")]
    Value {
        /// The command.
        name: &'l str,
        /// What stands behind it.
        value: &'l str,
        /// What is taken.
        expected: &'static str,
    },
    /// A JSON string is broken.
    #[error("a line that begins with a quotation mark must be one JSON string")]
    Json,
}

/// Every command and what it does.
pub const HELP: &[&str] = &[
    "TEXT                 put TEXT to the model; a first / is written //",
    "/ids 1,2,3           go on from these ids",
    "/more                go on with the answer",
    "/temp T              temperature; 0 always takes the most probable token",
    "/top-k K             choose among the K most probable tokens",
    "/top-p P             choose among the most probable tokens that together have this probability; 1 is all",
    "/min-p P             leave out tokens less probable than P times the most probable one; 0 is none",
    "/repeat-penalty R    make tokens of the last 64 less probable by this factor; 1 is none",
    "/seed N              seed of the choices; random takes another one for every conversation",
    "/length N            most tokens of an answer",
    "/chat, /raw          lines are turns of a conversation, or texts to go on from, each for itself",
    "/system TEXT         begin conversations with TEXT; without TEXT there is none",
    "/reset               forget the conversation",
    "/settings            show how tokens are chosen",
    "/stats               show counts, speeds and memory",
    "/tokens on|off       show ids after an answer",
    "/json on|off         answer in JSON, without echo, for programs",
    "/help                show these lines",
    "/quit                end",
    "Ctrl-C stops an answer; backspace and Ctrl-U erase.",
];

impl<'l> Command<'l> {
    /// Reads a line.
    pub fn parse(line: &'l str) -> Result<Self, CommandError<'l>> {
        let Some(rest) = line.strip_prefix('/') else { return Ok(Self::Text(line)) };
        if rest.starts_with('/') {
            return Ok(Self::Text(rest));
        }
        let (name, value) = line.split_once(' ').unwrap_or((line, ""));
        let value = value.trim();
        let wrong = |expected| CommandError::Value { name, value, expected };
        let number = |fits: fn(f32) -> bool, expected| {
            value.parse().ok().filter(|x: &f32| x.is_finite() && fits(*x)).ok_or(wrong(expected))
        };
        let fraction = || number(|x| (0.0..=1.0).contains(&x), "a number from 0 to 1");
        let count = || value.parse().ok().filter(|n| *n > 0).ok_or(wrong("a number from 1 on"));
        let switch = || match value {
            "on" => Ok(true),
            "off" => Ok(false),
            _ => Err(wrong("on or off")),
        };
        let alone = |command| if value.is_empty() { Ok(command) } else { Err(wrong("nothing behind it")) };
        match name {
            "/ids" => Ids::parse(value).map(Self::Ids).ok_or(wrong("ids parted by commas")),
            "/more" => alone(Self::More),
            "/temp" => number(|x| x >= 0.0, "a number of at least 0").map(|t| Self::Set(Setting::Temperature(t))),
            "/top-k" => count().map(|k| Self::Set(Setting::TopK(k))),
            "/top-p" => fraction().map(|p| Self::Set(Setting::TopP(p))),
            "/min-p" => fraction().map(|p| Self::Set(Setting::MinP(p))),
            "/repeat-penalty" => number(|x| x > 0.0, "a number above 0").map(|r| Self::Set(Setting::RepeatPenalty(r))),
            "/seed" if value == "random" => Ok(Self::Seed(None)),
            "/seed" => value.parse().map(|n| Self::Seed(Some(n))).map_err(|_| wrong("a whole number, or random")),
            "/length" => count().map(Self::Length),
            "/chat" => alone(Self::Chat(true)),
            "/raw" => alone(Self::Chat(false)),
            "/system" => Ok(Self::System(value)),
            "/reset" => alone(Self::Reset),
            "/settings" => alone(Self::Settings),
            "/stats" => alone(Self::Stats),
            "/tokens" => switch().map(Self::Tokens),
            "/json" => switch().map(Self::Json),
            "/help" => alone(Self::Help),
            "/quit" => alone(Self::Quit),
            _ => Err(CommandError::Unknown(name)),
        }
    }
}

/// The characters that a JSON string's content stands for (RFC 8259, section 7). Half of a surrogate pair alone becomes
/// U+FFFD; what is no such content is an error, once.
#[derive(Clone, Debug)]
pub struct Unescaped<'l> {
    rest: &'l str,
}

impl<'l> Unescaped<'l> {
    /// Of a line that is one JSON string, in its quotation marks.
    pub fn of(line: &'l str) -> Result<Self, CommandError<'static>> {
        let rest = line.trim().strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
        let found = rest.map(|rest| Self { rest }).ok_or(CommandError::Json)?;
        if found.clone().any(|character| character.is_err()) { Err(CommandError::Json) } else { Ok(found) }
    }

    /// Four hexadecimal digits.
    fn hexadecimal(&mut self) -> Option<u32> {
        let (digits, rest) = self.rest.split_at_checked(4)?;
        self.rest = rest;
        digits.bytes().all(|digit| digit.is_ascii_hexdigit()).then(|| u32::from_str_radix(digits, 16).ok())?
    }

    fn escape(&mut self) -> Option<char> {
        let mut characters = self.rest.chars();
        let kind = characters.next()?;
        self.rest = characters.as_str();
        Some(match kind {
            '"' | '\\' | '/' => kind,
            'b' => '\u{8}',
            'f' => '\u{c}',
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            'u' => {
                let first = self.hexadecimal()?;
                let behind = self.rest;
                let pair = match self.rest.strip_prefix("\\u") {
                    Some(rest) if (0xd800..0xdc00).contains(&first) => {
                        self.rest = rest;
                        self.hexadecimal().filter(|second| (0xdc00..0xe000).contains(second))
                    }
                    _ => None,
                };
                match pair {
                    Some(second) => char::from_u32(0x1_0000 + ((first & 0x3ff) << 10) + (second & 0x3ff))?,
                    None => {
                        self.rest = behind;
                        char::from_u32(first).unwrap_or(char::REPLACEMENT_CHARACTER)
                    }
                }
            }
            _ => return None,
        })
    }
}

impl Iterator for Unescaped<'_> {
    type Item = Result<char, CommandError<'static>>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut characters = self.rest.chars();
        let character = characters.next()?;
        self.rest = characters.as_str();
        let character = match character {
            '\\' => self.escape(),
            '"' => None,
            character => Some(character),
        };
        if character.is_none() {
            self.rest = "";
        }
        Some(character.ok_or(CommandError::Json))
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::string::String;

    use super::*;

    #[test]
    fn commands_are_read() {
        let parse = |line| Command::parse(line).unwrap();
        assert_eq!(parse("Once upon"), Command::Text("Once upon"));
        assert_eq!(parse("//etc"), Command::Text("/etc"));
        assert_eq!(parse(" /reset"), Command::Text(" /reset"));
        assert_eq!(parse("/temp 0.5"), Command::Set(Setting::Temperature(0.5)));
        assert_eq!(parse("/top-k  7 "), Command::Set(Setting::TopK(7)));
        assert_eq!(parse("/top-p 1"), Command::Set(Setting::TopP(1.0)));
        assert_eq!(parse("/min-p .05"), Command::Set(Setting::MinP(0.05)));
        assert_eq!(parse("/repeat-penalty 1.1"), Command::Set(Setting::RepeatPenalty(1.1)));
        assert_eq!(parse("/seed 18446744073709551615"), Command::Seed(Some(u64::MAX)));
        assert_eq!(parse("/seed random"), Command::Seed(None));
        assert_eq!(parse("/length 9"), Command::Length(9));
        assert_eq!((parse("/chat"), parse("/raw")), (Command::Chat(true), Command::Chat(false)));
        assert_eq!(parse("/system Be brief."), Command::System("Be brief."));
        assert_eq!(parse("/system"), Command::System(""));
        assert_eq!((parse("/tokens on"), parse("/json off")), (Command::Tokens(true), Command::Json(false)));
        assert!(matches!(parse("/ids 1,20"), Command::Ids(ids) if ids.iter().eq([1, 20])));
        let alone = ["/more", "/reset", "/settings", "/stats", "/help", "/quit"];
        assert!(alone.iter().all(|line| Command::parse(line).is_ok()));
        // The list of commands names all of them.
        let listed = |name: &str| HELP.iter().any(|line| line.contains(name));
        let others = ["/ids ", "/temp ", "/top-k ", "/top-p ", "/min-p ", "/repeat-penalty ", "/seed ", "/length "];
        let modes = ["/chat", "/raw", "/system ", "/tokens ", "/json "];
        assert!(alone.iter().chain(&others).chain(&modes).all(|name| listed(name)));
    }

    #[test]
    fn what_is_no_command_is_named() {
        assert_eq!(Command::parse("/fly high"), Err(CommandError::Unknown("/fly")));
        let wrong = [
            "/temp -1",
            "/temp inf",
            "/temp",
            "/top-k 0",
            "/top-k x",
            "/top-p 1.5",
            "/min-p nan",
            "/repeat-penalty 0",
            "/seed -1",
            "/length 0",
            "/tokens",
            "/json maybe",
            "/ids",
            "/ids 1,,2",
            "/quit now",
            "/reset all",
        ];
        for line in wrong {
            assert!(matches!(Command::parse(line), Err(CommandError::Value { .. })), "{line}");
        }
    }

    fn unescaped(line: &str) -> Option<String> {
        Unescaped::of(line).ok().map(|characters| characters.map(Result::unwrap).collect())
    }

    #[test]
    fn json_strings_are_read() {
        assert_eq!(unescaped(r#" "plain" "#).unwrap(), "plain");
        assert_eq!(unescaped(r#""a\n\"b\\\/\tc\u00e9\ud83d\ude00\r\b\f""#).unwrap(), "a\n\"b\\/\tcé😀\r\u{8}\u{c}");
        assert_eq!(
            unescaped(r#""\ud83d-\ude00\ud83d\n\ud83d\u0041""#).unwrap(),
            "\u{fffd}-\u{fffd}\u{fffd}\n\u{fffd}A"
        );
        for line in
            ["\"", "", "a", r#""a"b"#, r#""a"b""#, r#""\x""#, r#""\""#, r#""\u12""#, r#""\u12g4""#, r#""\u+123""#]
        {
            assert_eq!(unescaped(line), None, "{line}");
        }
        // Cut anywhere, it is text or an error.
        let line = r#""é\u00e9\ud83d\ude00""#;
        (0..line.len()).filter_map(|len| line.get(..len)).for_each(|line| drop(unescaped(line)));
    }
}
