//! The fields of a JSON object, each read when it is asked for: a container's rules may be long, and what nobody asks
//! for costs nothing. What is null is absent, as it is for Go.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU32;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;
use weft_model::reason::Reason;

pub(crate) struct Fields<'a> {
    /// The object's own name, with a dot behind it; nothing for the whole configuration.
    of: String,
    fields: BTreeMap<String, &'a RawValue>,
    /// What is in [`RUNTIME`], if that was read with the object.
    runtime: Option<BTreeMap<String, &'a RawValue>>,
}

/// Nearly all of a configuration is in there, so it is not read twice.
pub(super) const RUNTIME: &str = "runtimeConfig";

/// A configuration whose [`RUNTIME`] is an object, or null.
#[derive(Default)]
struct Document<'a> {
    fields: BTreeMap<String, &'a RawValue>,
    runtime: Option<BTreeMap<String, &'a RawValue>>,
}

impl<'de> Deserialize<'de> for Document<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = Document<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut document = Document::default();
                while let Some(field) = map.next_key::<String>()? {
                    match field.as_str() {
                        RUNTIME => document.runtime = map.next_value()?,
                        _ => drop(document.fields.insert(field, map.next_value()?)),
                    }
                }
                Ok(document)
            }
        }

        deserializer.deserialize_map(Object)
    }
}

pub(crate) fn invalid(field: impl Into<String>, why: impl Into<String>) -> Reason {
    Reason::InvalidField { field: field.into(), why: why.into() }
}

impl<'a> Fields<'a> {
    /// The whole configuration.
    pub(crate) fn document(stdin: &'a [u8]) -> Result<Self, Reason> {
        let of = String::new();
        if let Ok(Document { fields, runtime }) = serde_json::from_slice(stdin) {
            return Ok(Self { of, fields, runtime });
        }
        // What is wrong with it is told by who asks for it, if that is a field.
        let fields = serde_json::from_slice(stdin);
        let fields = fields.map_err(|why| Reason::InvalidJson { why: why.to_string() })?;
        Ok(Self { of, fields, runtime: None })
    }

    /// The object in a field.
    pub(super) fn object(&self, field: &str) -> Result<Option<Fields<'a>>, Reason> {
        let fields = match (self.runtime.as_ref().filter(|_| field == RUNTIME), self.raw(field)) {
            (Some(runtime), _) => runtime.clone(),
            (None, Some(raw)) => {
                serde_json::from_str(raw.get()).map_err(|_| self.wrong(field, raw.get(), "an object"))?
            }
            (None, None) => return Ok(None),
        };
        Ok(Some(Fields { of: format!("{}.", self.name(field)), fields, runtime: None }))
    }

    /// A field's name as it is told to people.
    pub(super) fn name(&self, field: &str) -> String {
        format!("{}{field}", self.of)
    }

    /// Whether there is such a field, be it null.
    pub(super) fn has(&self, field: &str) -> bool {
        self.fields.contains_key(field)
    }

    pub(super) fn raw(&self, field: &str) -> Option<&'a RawValue> {
        self.fields.get(field).copied().filter(|raw| raw.get() != "null")
    }

    pub(super) fn get(&self, field: &str) -> Result<Option<Value>, Reason> {
        let Some(raw) = self.raw(field) else { return Ok(None) };
        let value = serde_json::from_str(raw.get());
        value.map(Some).map_err(|why| invalid(self.name(field), format!("cannot be read: {why}")))
    }

    pub(super) fn text(&self, field: &str) -> Result<Option<String>, Reason> {
        match self.get(field)? {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(field, other, "a text")),
        }
    }

    pub(super) fn flag(&self, field: &str, default: bool) -> Result<bool, Reason> {
        match self.get(field)? {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(other) => Err(self.wrong(field, other, "true or false")),
        }
    }

    pub(super) fn above_zero(&self, field: &str, default: NonZeroU32) -> Result<NonZeroU32, Reason> {
        let Some(value) = self.get(field)? else { return Ok(default) };
        let number = value.as_u64().and_then(|number| u32::try_from(number).ok()).and_then(NonZeroU32::new);
        number.ok_or_else(|| self.wrong(field, value, "a whole number above 0"))
    }

    pub(super) fn number(&self, field: &str) -> Result<u64, Reason> {
        let Some(value) = self.get(field)? else { return Ok(0) };
        value.as_u64().ok_or_else(|| self.wrong(field, value, "a whole number"))
    }

    pub(super) fn list(&self, field: &str) -> Result<Vec<Value>, Reason> {
        match self.get(field)? {
            None => Ok(Vec::new()),
            Some(Value::Array(list)) => Ok(list),
            Some(other) => Err(self.wrong(field, other, "a list")),
        }
    }

    pub(super) fn texts(&self, field: &str) -> Result<Vec<String>, Reason> {
        let text = |value| match value {
            Value::String(text) => Ok(text),
            other => Err(self.wrong(field, other, "a text")),
        };
        self.list(field)?.into_iter().map(text).collect()
    }

    pub(super) fn wrong(&self, field: &str, given: impl std::fmt::Display, expected: &str) -> Reason {
        invalid(self.name(field), format!("`{given}` is not {expected}"))
    }
}
