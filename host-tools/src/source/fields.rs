//! The parameters of an architecture, under the names of either format.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

use crate::gguf::{self, Gguf};

/// One parameter: its names in config.json (newest first, `a.b` for `b` inside the object `a`), and its GGUF
/// key, to which the architecture is prefixed if it begins with a dot. Empty where a format has none.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Names in config.json.
    pub hf: &'static [&'static str],
    /// GGUF key.
    pub gguf: &'static str,
}

/// The parameters of a source.
#[derive(Clone, Debug)]
pub struct Fields {
    architecture: String,
    origin: &'static str,
    gguf: bool,
    values: Map<String, Value>,
}

impl Fields {
    /// The fields of config.json.
    pub(super) fn from_json(json: Value, origin: &'static str) -> Result<Self> {
        let mut fields = Self::of_object(json, origin)?;
        fields.architecture = fields
            .values
            .get("model_type")
            .and_then(Value::as_str)
            .with_context(|| format!("{origin}: no \"model_type\"; expected the name of an architecture"))?
            .to_owned();
        Ok(fields)
    }

    /// The fields of another JSON file.
    ///
    /// # Errors
    /// It is no object.
    pub fn of_object(json: Value, origin: &'static str) -> Result<Self> {
        let Value::Object(values) = json else {
            bail!("{origin}: expected a JSON object");
        };
        Ok(Self { architecture: String::new(), origin, gguf: false, values })
    }

    /// The metadata of a GGUF file, without the tokenizer's.
    pub(super) fn from_gguf(header: &Gguf) -> Result<Self> {
        let mut values = Map::new();
        for (key, value) in &header.metadata {
            if key.starts_with("tokenizer.") {
                continue;
            }
            let value = match value {
                gguf::Value::Int(n) => match (u64::try_from(*n), i64::try_from(*n)) {
                    (Ok(n), _) => n.into(),
                    (_, Ok(n)) => n.into(),
                    _ => continue,
                },
                gguf::Value::Float(x) => (*x).into(),
                gguf::Value::Bool(b) => (*b).into(),
                gguf::Value::Text(s) => s.as_str().into(),
                gguf::Value::Ints(v) => v.as_slice().into(),
                gguf::Value::Floats(v) => v.as_slice().into(),
                gguf::Value::Bools(v) => v.as_slice().into(),
                gguf::Value::Texts(v) => v.as_slice().into(),
            };
            values.insert(key.clone(), value);
        }
        let architecture = match header.get("general.architecture") {
            Some(gguf::Value::Text(name)) => name.clone(),
            Some(found) => bail!("general.architecture is {found:?}, expected text"),
            None => bail!("no general.architecture; expected the name of an architecture"),
        };
        Ok(Self { architecture, origin: "GGUF metadata", gguf: true, values })
    }

    /// `model_type` or `general.architecture`.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// Whether the fields are a GGUF file's.
    pub fn is_gguf(&self) -> bool {
        self.gguf
    }

    /// The name of `key` in this source, for messages.
    pub fn label(&self, key: Key) -> String {
        if self.gguf {
            format!("{}: {}", self.origin, self.gguf_key(key))
        } else {
            format!("{}: {}", self.origin, key.hf.first().unwrap_or(&"(none)"))
        }
    }

    fn gguf_key(&self, key: Key) -> String {
        if key.gguf.starts_with('.') { format!("{}{}", self.architecture, key.gguf) } else { key.gguf.to_owned() }
    }

    /// The value of `key`; null counts as absent.
    pub fn get(&self, key: Key) -> Option<&Value> {
        let found = if self.gguf {
            self.values.get(&self.gguf_key(key))
        } else {
            key.hf.iter().find_map(|path| {
                let mut parts = path.split('.');
                let first = self.values.get(parts.next()?)?;
                let value = parts.try_fold(first, |value, part| value.get(part))?;
                (!value.is_null()).then_some(value)
            })
        };
        found.filter(|v| !v.is_null())
    }

    /// An error about the value of `key`.
    pub fn wrong(&self, key: Key, expected: &str) -> anyhow::Error {
        match self.get(key) {
            Some(found) => anyhow::anyhow!("{} is {found}, expected {expected}", self.label(key)),
            None => anyhow::anyhow!("{} is missing, expected {expected}", self.label(key)),
        }
    }

    /// A whole number from 1 to 2^31 - 1, if it is there.
    ///
    /// # Errors
    /// The value is something else.
    pub fn maybe_count(&self, key: Key) -> Result<Option<u32>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if (1..1 << 31).contains(&n) => Ok(Some(n as u32)),
            _ => Err(self.wrong(key, "a whole number from 1 to 2147483647")),
        }
    }

    /// A whole number from 1 to 2^31 - 1.
    ///
    /// # Errors
    /// The value is absent or something else.
    pub fn count(&self, key: Key) -> Result<u32> {
        self.maybe_count(key)?.ok_or_else(|| self.wrong(key, "a whole number from 1 to 2147483647"))
    }

    /// A finite number, if it is there.
    ///
    /// # Errors
    /// The value is something else.
    pub fn maybe_number(&self, key: Key) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() => Ok(Some(x)),
            _ => Err(self.wrong(key, "a finite number")),
        }
    }

    /// A finite number.
    ///
    /// # Errors
    /// The value is absent or something else.
    pub fn number(&self, key: Key) -> Result<f64> {
        self.maybe_number(key)?.ok_or_else(|| self.wrong(key, "a finite number"))
    }

    /// A bool, or `default`.
    ///
    /// # Errors
    /// The value is something else.
    pub fn flag(&self, key: Key, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    /// Text, if it is there.
    ///
    /// # Errors
    /// The value is something else.
    pub fn maybe_text(&self, key: Key) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(_) => Err(self.wrong(key, "text")),
        }
    }

    /// One number a layer: an array of `layers` numbers, or one number for all.
    ///
    /// # Errors
    /// The value is something else.
    pub fn per_layer(&self, key: Key, layers: usize) -> Result<Option<Vec<u32>>> {
        const EXPECTED: &str = "a whole number, or one a layer";
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|n| *n < 1 << 31);
        if let Some(all) = number(value) {
            return Ok(Some(vec![all; layers]));
        }
        let Some(array) = value.as_array() else { return Err(self.wrong(key, EXPECTED)) };
        ensure!(array.len() == layers, "{} has {} entries, expected {layers}", self.label(key), array.len());
        let numbers: Option<Vec<u32>> = array.iter().map(number).collect();
        numbers.map(Some).ok_or_else(|| self.wrong(key, EXPECTED))
    }
}
