//! Chat templates: the Jinja dialect of Hugging Face.

use anyhow::{Context, Result};
use forebay_runtime::chat::{self, TEXTS};
use forebay_runtime::tokenizer::Tokenizer;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, ErrorKind, context};

/// One turn of a conversation.
#[derive(Clone, Debug)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: &'static str,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A turn.
    pub fn new(role: &'static str, content: impl Into<String>) -> Self {
        Self { role, content: content.into() }
    }
}

/// A model's chat template.
#[derive(Debug)]
pub struct Template {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

const NAME: &str = "chat";

impl Template {
    /// The template `source` of a model with this tokenizer.
    pub fn new(source: String, tokenizer: &Tokenizer<'_>) -> Result<Self> {
        let text = |id: Option<u32>| {
            let bytes = id.and_then(|id| tokenizer.token_bytes(id)).unwrap_or_default();
            String::from_utf8_lossy(bytes).into_owned()
        };
        Self::with_tokens(source, text(tokenizer.bos()), text(tokenizer.eos_ids().next()))
    }

    /// The template `source` where the begin-of-text and end-of-text tokens are these.
    pub fn with_tokens(source: String, bos: String, eos: String) -> Result<Self> {
        let mut environment = Environment::new();
        // As Hugging Face sets up Jinja.
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |text: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, text))
        });
        // Marks what a model is trained on; without meaning here, and unknown to the parser.
        let source = source
            .replace("{% generation %}", "")
            .replace("{%- generation -%}", "")
            .replace("{% endgeneration %}", "")
            .replace("{%- endgeneration -%}", "");
        environment.add_template_owned(NAME, source)?;
        Ok(Self { environment, bos, eos })
    }

    /// The text of a conversation, up to where the assistant speaks if it is its turn.
    pub fn render(&self, messages: &[Message], assistant_next: bool) -> Result<String> {
        let turn = |m: &Message| context! { role => m.role, content => m.content.as_str() };
        let values = context! {
            messages => messages.iter().map(turn).collect::<Vec<Value>>(),
            add_generation_prompt => assistant_next,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
        };
        let template = self.environment.get_template(NAME)?;
        template.render(values).context("applying the chat template")
    }

    /// Whether `text` begins with the begin-of-text token, so that encoding must not add one.
    pub fn has_bos(&self, text: &str) -> bool {
        !self.bos.is_empty() && text.starts_with(&self.bos)
    }
}

/// What stands between the turns of every conversation, for boards, which render no templates.
///
/// The texts are those of [`forebay_runtime::chat::Turns`], cut out of renderings of conversations whose contents are
/// known. `None` if the template does more than put texts between the turns: if a longer conversation put together from
/// the texts is not what it renders.
pub fn turns(template: &Template) -> Option<[String; TEXTS]> {
    // Contents that no template has and that trimming does not change.
    const SYSTEM: &str = "qzSystemContentzq";
    const USER: [&str; 3] = ["qzFirstQuestionzq", "qzSecondQuestionzq", "qzThirdQuestionzq"];
    const ANSWER: [&str; 2] = ["qzFirstAnswerzq", "qzSecondAnswerzq"];
    let conversation = |system: bool, questions: usize| {
        let mut messages = Vec::new();
        if system {
            messages.push(Message::new("system", SYSTEM));
        }
        for turn in 0..questions {
            if turn > 0 {
                messages.push(Message::new("assistant", ANSWER[turn - 1]));
            }
            messages.push(Message::new("user", USER[turn]));
        }
        template.render(&messages, true).ok()
    };
    let one = conversation(false, 1)?;
    let (first, answer) = one.split_once(USER[0])?;
    let two = conversation(false, 2)?;
    let (_, next) = two.split_once(ANSWER[0])?;
    let (next, _) = next.split_once(USER[1])?;
    let with_system = conversation(true, 1);
    let system = with_system.as_deref().and_then(|text| {
        let (before, rest) = text.split_once(SYSTEM)?;
        Some((before, rest.split_once(USER[0])?.0))
    });
    let put_together = |before: &str| {
        let mut text = before.to_owned();
        for turn in 0..USER.len() {
            if turn > 0 {
                text = text + ANSWER[turn - 1] + next;
            }
            text = text + USER[turn] + answer;
        }
        text
    };
    let (system, after_system) = match system {
        Some((before, after)) => {
            let whole = put_together(&[before, SYSTEM, after].concat());
            (conversation(true, USER.len())? == whole).then_some((before, after))?
        }
        // The template takes no system text.
        None => ("", ""),
    };
    let texts = [first, system, after_system, answer, next].map(str::to_owned);
    (conversation(false, USER.len())? == put_together(first)).then_some(texts)
}

/// The CHAT TURNS section of these texts.
pub fn turns_section(texts: &[String; TEXTS]) -> Vec<u8> {
    let texts = texts.each_ref().map(String::as_str);
    let mut section = chat::header(&texts).to_vec();
    texts.iter().for_each(|text| section.extend(text.as_bytes()));
    section
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{{ bos_token }}{% for message in messages %}\n\
        {{'<|im_start|>' + message['role'] + '\\n' + message['content'].strip() + '<|im_end|>' + '\\n'}}\n\
        {% endfor %}\n{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

    #[test]
    fn chatml_is_rendered() {
        let template = Template::with_tokens(CHATML.into(), "<s>".into(), "<|im_end|>".into()).unwrap();
        let messages = [Message::new("system", "Be brief."), Message::new("user", " Hi ")];
        let text = template.render(&messages, true).unwrap();
        let expected = "<s><|im_start|>system\nBe brief.<|im_end|>\n\n<|im_start|>user\nHi<|im_end|>\n\n\
                        <|im_start|>assistant\n";
        assert_eq!(text, expected);
        assert!(template.has_bos(&text));
    }

    #[test]
    fn a_template_may_refuse() {
        let template =
            Template::with_tokens("{{ raise_exception('no system turns') }}".into(), "".into(), "".into()).unwrap();
        let error = template.render(&[], false).unwrap_err();
        assert!(format!("{error:#}").contains("no system turns"), "{error:#}");
        assert!(!template.has_bos("anything"));
    }

    fn turns_of(source: &str) -> Option<[String; TEXTS]> {
        turns(&Template::with_tokens(source.into(), "<s>".into(), "<|im_end|>".into()).unwrap())
    }

    #[test]
    fn turns_are_cut_out_of_a_template() {
        let texts = turns_of(CHATML).unwrap();
        let expected = [
            "<s><|im_start|>user\n",
            "<s><|im_start|>system\n",
            "<|im_end|>\n\n<|im_start|>user\n",
            "<|im_end|>\n\n<|im_start|>assistant\n",
            "<|im_end|>\n\n<|im_start|>user\n",
        ];
        assert_eq!(texts, expected);
        let section = turns_section(&texts);
        assert_eq!(chat::Turns::parse(&section).unwrap().texts(), expected);
    }

    #[test]
    fn templates_that_do_more_have_no_turns() {
        // A template without system turns has the others.
        let texts = turns_of(
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}\
             [{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
        );
        assert_eq!(texts.unwrap(), ["[user]", "", "", "[assistant]", "[user]"]);
        // Turns are numbered.
        let numbered = "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}:";
        assert_eq!(turns_of(numbered), None);
        // Former answers are left out.
        let forgets = "{% for m in messages %}{% if m.role == 'user' %}>{{ m.content }}{% endif %}{% endfor %}:";
        assert_eq!(turns_of(forgets), None);
        assert_eq!(turns_of("{{ raise_exception('no') }}"), None);
    }
}
