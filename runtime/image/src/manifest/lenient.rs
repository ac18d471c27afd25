//! JSON as Go's `encoding/json` takes it, by which all other clients of registries read: a null is no value, the case of
//! a key does not matter, and what is not asked for may be anything.

use serde_json::{Map, Value};

/// An object's fields.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fields<'a>(Option<&'a Map<String, Value>>);

impl<'a> Fields<'a> {
    /// The fields of `value`; none of null.
    pub(super) fn of(value: &'a Value) -> Result<Self, String> {
        match value {
            Value::Null => Ok(Self(None)),
            Value::Object(fields) => Ok(Self(Some(fields))),
            _ => Err("an object is expected".to_owned()),
        }
    }

    /// What `name` has, unless that is null. Its exact spelling goes before others.
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        let fields = self.0?;
        let other = || fields.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value);
        fields.get(name).or_else(other).filter(|value| !value.is_null())
    }

    /// A text; empty if there is none.
    pub(super) fn text(&self, name: &str) -> Result<String, String> {
        self.get(name).map_or(Ok(String::new()), |value| text(name, value))
    }

    /// A list; empty if there is none.
    pub(super) fn list(&self, name: &str) -> Result<&'a [Value], String> {
        match self.get(name) {
            None => Ok(&[]),
            Some(Value::Array(values)) => Ok(values),
            Some(_) => Err(format!("{name:?} is no list")),
        }
    }

    /// A list of texts. One text alone is taken for a list of it, as Docker does; an empty one for none.
    pub(super) fn texts(&self, name: &str) -> Result<Vec<String>, String> {
        match self.get(name) {
            Some(Value::String(only)) if only.is_empty() => Ok(Vec::new()),
            Some(Value::String(only)) => Ok(vec![only.clone()]),
            _ => self.list(name)?.iter().map(|value| text(name, value)).collect(),
        }
    }

    /// An object; without fields if there is none.
    pub(super) fn object(&self, name: &str) -> Result<Fields<'a>, String> {
        self.get(name).map_or(Ok(Self(None)), |value| Self::of(value).map_err(|_| format!("{name:?} is no object")))
    }

    /// The names of all fields, those with null, too.
    pub(super) fn names(&self) -> impl Iterator<Item = &'a String> {
        self.0.into_iter().flat_map(|fields| fields.keys())
    }
}

/// A text; a null is an empty one.
fn text(name: &str, value: &Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Null => Ok(String::new()),
        _ => Err(format!("{name:?} is no text")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_are_read_as_go_reads_them() {
        let value =
            json!({"a": "1", "B": "2", "c": null, "D": ["x", null], "e": {"x": null}, "f": "", "g": "one", "n": 1});
        let fields = Fields::of(&value).unwrap();
        assert_eq!(fields.text("a"), Ok("1".to_owned()));
        assert_eq!(fields.text("b"), Ok("2".to_owned()));
        assert_eq!((fields.text("c"), fields.text("missing")), (Ok(String::new()), Ok(String::new())));
        assert_eq!(fields.texts("d"), Ok(vec!["x".to_owned(), String::new()]));
        assert_eq!((fields.texts("c"), fields.texts("f")), (Ok(Vec::new()), Ok(Vec::new())));
        assert_eq!(fields.texts("g"), Ok(vec!["one".to_owned()]));
        assert_eq!(fields.object("e").unwrap().names().collect::<Vec<_>>(), ["x"]);
        assert!(fields.object("c").unwrap().get("x").is_none());
        assert!(fields.text("n").is_err() && fields.list("a").is_err() && fields.object("a").is_err());
        let twice = json!({"User": "wrong", "user": "right"});
        assert_eq!(Fields::of(&twice).unwrap().text("user"), Ok("right".to_owned()));
        assert!(Fields::of(&Value::Null).unwrap().get("a").is_none());
    }
}
