//! Takes the fields of a JSON object one by one, each checked, and knows which ones nobody took.
//!
//! `serde`'s derived errors name a line and a column; a client needs the parameter's name.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::ApiError;

/// The fields of one object that have not been taken yet. `null` counts as absent.
pub(crate) struct Fields {
    /// The object's own place in the body; empty for the body itself.
    path: String,
    map: Map<String, Value>,
}

impl Fields {
    /// The fields of the body itself.
    pub(crate) fn of_body(value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { path: String::new(), map }),
            other => Err(ApiError::invalid_type("body", "an object", &other)),
        }
    }

    /// The fields of an object inside the body.
    pub(crate) fn of(path: String, value: Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Self { path, map }),
            other => Err(ApiError::invalid_type(&path, "an object", &other)),
        }
    }

    /// A field's place in the body.
    pub(crate) fn path_of(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// Any value.
    pub(crate) fn value(&mut self, name: &str) -> Option<Value> {
        self.map.shift_remove(name).filter(|value| !value.is_null())
    }

    pub(crate) fn string(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(ApiError::invalid_type(&self.path_of(name), "a string", &other)),
        }
    }

    pub(crate) fn required_string(&mut self, name: &str) -> Result<String, ApiError> {
        self.string(name)?.ok_or_else(|| ApiError::missing(&self.path_of(name)))
    }

    pub(crate) fn boolean(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(ApiError::invalid_type(&self.path_of(name), "a boolean", &other)),
        }
    }

    pub(crate) fn integer(&mut self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        integer_of(&self.path_of(name), &value, &range).map(Some)
    }

    /// A count from `least` on.
    pub(crate) fn count(&mut self, name: &str, least: u32, most: u32) -> Result<Option<u32>, ApiError> {
        let value = self.integer(name, i64::from(least)..=i64::from(most))?;
        Ok(value.and_then(|value| u32::try_from(value).ok()))
    }

    pub(crate) fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        number_of(&self.path_of(name), &value, &range).map(Some)
    }

    pub(crate) fn array(&mut self, name: &str, most: usize) -> Result<Option<Vec<Value>>, ApiError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Array(items)) if items.len() > most => {
                let text = format!("it has {} items, expected at most {most}", items.len());
                Err(ApiError::invalid_value(&self.path_of(name), text))
            }
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => Err(ApiError::invalid_type(&self.path_of(name), "an array", &other)),
        }
    }

    pub(crate) fn object(&mut self, name: &str) -> Result<Option<Fields>, ApiError> {
        let path = self.path_of(name);
        self.value(name).map(|value| Fields::of(path, value)).transpose()
    }

    /// One of several words, each with what it stands for.
    pub(crate) fn word<T: Copy>(&mut self, name: &str, words: &[(&str, T)]) -> Result<Option<T>, ApiError> {
        let Some(found) = self.string(name)? else { return Ok(None) };
        match words.iter().find(|(word, _)| *word == found) {
            Some(&(_, value)) => Ok(Some(value)),
            None => Err(ApiError::invalid_value(&self.path_of(name), expected_word(&found, words))),
        }
    }

    /// Refuses the request if a field is there that would change the answer but cannot be honoured.
    pub(crate) fn refuse(&mut self, name: &str, reason: &str) -> Result<(), ApiError> {
        match self.value(name) {
            None => Ok(()),
            Some(_) => Err(ApiError::unsupported(&self.path_of(name), reason)),
        }
    }

    /// Places of the fields that nobody took.
    pub(crate) fn untaken(self) -> Vec<String> {
        let names: Vec<_> = self.map.iter().filter(|(_, value)| !value.is_null()).map(|(name, _)| name).collect();
        names.into_iter().map(|name| self.path_of(name)).collect()
    }
}

fn expected_word<T>(found: &str, words: &[(&str, T)]) -> String {
    let known: Vec<_> = words.iter().map(|(word, _)| format!("'{word}'")).collect();
    format!("'{found}' is not one of {}", known.join(", "))
}

/// A number that must be whole and in range.
pub(crate) fn integer_of(path: &str, value: &Value, range: &RangeInclusive<i64>) -> Result<i64, ApiError> {
    if value.is_u64() && value.as_i64().is_none() || value.as_i64().is_some_and(|found| !range.contains(&found)) {
        return Err(ApiError::invalid_value(path, out_of_range(value, range)));
    }
    value.as_i64().ok_or_else(|| ApiError::invalid_type(path, "an integer", value))
}

/// A number in range.
pub(crate) fn number_of(path: &str, value: &Value, range: &RangeInclusive<f64>) -> Result<f32, ApiError> {
    let Some(found) = value.as_f64() else {
        return Err(ApiError::invalid_type(path, "a number", value));
    };
    if !range.contains(&found) {
        return Err(ApiError::invalid_value(path, out_of_range(value, range)));
    }
    Ok(found as f32)
}

fn out_of_range<T: std::fmt::Display + PartialOrd>(found: &Value, range: &RangeInclusive<T>) -> String {
    format!("{found} is out of range; expected {} to {}", range.start(), range.end())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(value: Value) -> Fields {
        Fields::of("messages[2]".into(), value).unwrap()
    }

    #[test]
    fn the_error_names_the_place_the_expectation_and_what_was_found() {
        let error = fields(json!({"role": 7})).string("role").unwrap_err();
        assert_eq!(error.param.as_deref(), Some("messages[2].role"));
        assert_eq!(
            error.message,
            "Invalid type for 'messages[2].role': expected a string, but got an integer instead."
        );
    }

    #[test]
    fn integers_are_whole_and_in_range() {
        for (value, code) in [
            (json!(1.5), "invalid_type"),
            (json!("1"), "invalid_type"),
            (json!(true), "invalid_type"),
            (json!(-1), "invalid_value"),
            (json!(u64::MAX), "invalid_value"),
        ] {
            assert_eq!(fields(json!({"n": value})).integer("n", 0..=9).unwrap_err().code, Some(code), "{value}");
        }
        assert_eq!(fields(json!({"n": 9})).integer("n", 0..=9).unwrap(), Some(9));
        assert_eq!(fields(json!({"n": null})).integer("n", 0..=9).unwrap(), None);
    }

    #[test]
    fn what_nobody_took_is_listed_unless_null() {
        let mut fields = fields(json!({"role": "user", "b": 1, "a": null, "c": 2}));
        fields.string("role").unwrap();
        assert_eq!(fields.untaken(), ["messages[2].b", "messages[2].c"]);
    }
}
