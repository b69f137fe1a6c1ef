//! Chat templates: the Jinja dialect of Hugging Face.

use anyhow::{Context, Result};
use forebay_runtime::tokenizer::Tokenizer;
use forebay_storage::image::SectionKind;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, ErrorKind, context};

use crate::host::session::ImageFile;

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

/// An image's chat template.
pub struct Template {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

const NAME: &str = "chat";

impl Template {
    /// The template of `file`, whose tokenizer is `tokenizer`.
    pub fn load(file: &ImageFile, tokenizer: &Tokenizer<'_>) -> Result<Self> {
        let path = file.path.display();
        let source = file.text(SectionKind::ChatTemplate)?.with_context(|| {
            format!("{path} has no chat template: its model was not made for chat; use `forebay run -p` instead")
        })?;
        let text = |id: Option<u32>| {
            let bytes = id.and_then(|id| tokenizer.token_bytes(id)).unwrap_or_default();
            String::from_utf8_lossy(bytes).into_owned()
        };
        Self::new(source, text(tokenizer.bos()), text(tokenizer.eos_ids().next()))
            .with_context(|| format!("the chat template of {path}"))
    }

    fn new(source: String, bos: String, eos: String) -> Result<Self> {
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

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{{ bos_token }}{% for message in messages %}\n\
        {{'<|im_start|>' + message['role'] + '\\n' + message['content'].strip() + '<|im_end|>' + '\\n'}}\n\
        {% endfor %}\n{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

    #[test]
    fn chatml_is_rendered() {
        let template = Template::new(CHATML.into(), "<s>".into(), "<|im_end|>".into()).unwrap();
        let messages = [Message::new("system", "Be brief."), Message::new("user", " Hi ")];
        let text = template.render(&messages, true).unwrap();
        let expected = "<s><|im_start|>system\nBe brief.<|im_end|>\n\n<|im_start|>user\nHi<|im_end|>\n\n\
                        <|im_start|>assistant\n";
        assert_eq!(text, expected);
        assert!(template.has_bos(&text));
    }

    #[test]
    fn a_template_may_refuse() {
        let template = Template::new("{{ raise_exception('no system turns') }}".into(), "".into(), "".into()).unwrap();
        let error = template.render(&[], false).unwrap_err();
        assert!(format!("{error:#}").contains("no system turns"), "{error:#}");
        assert!(!template.has_bos("anything"));
    }
}
