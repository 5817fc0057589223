//! JSON schemas as the TypeScript-like types that gpt-oss was trained to read.
//!
//! The model has seen exactly the output of `openai-harmony` 0.0.8, so this follows it in every space, its oddities
//! included (a description repeated inside an object, a newline of a description left bare). The vectors of the tests hold
//! it to that; where a line looks wrong, they are why.

use std::fmt::Write as _;

use serde_json::Value;

/// The type of a schema; `indent` stands before each line but the first.
pub(super) fn type_of(schema: &Value, indent: &str) -> String {
    if let Some(variants) = list(schema, "oneOf") {
        return union_of(variants, indent);
    }
    if let Some(types) = list(schema, "type") {
        let names: Vec<_> = types.iter().filter_map(Value::as_str).map(number_if_integer).collect();
        if !names.is_empty() {
            return names.join(" | ");
        }
    }
    match text(schema, "type") {
        Some("object") => object_of(schema, indent),
        Some("string") => string_of(schema),
        Some("array") => match schema.get("items") {
            Some(items) => format!("{}[]", type_of(items, indent)),
            None => "Array<any>".to_owned(),
        },
        Some(name @ ("number" | "integer" | "boolean")) => number_if_integer(name).to_owned(),
        _ => "any".to_owned(),
    }
}

fn number_if_integer(name: &str) -> &str {
    if name == "integer" { "number" } else { name }
}

fn string_of(schema: &Value) -> String {
    let values = list(schema, "enum").into_iter().flatten().filter_map(Value::as_str);
    let values: Vec<_> = values.map(|value| format!("\"{value}\"")).collect();
    if values.is_empty() { "string".to_owned() } else { values.join(" | ") }
}

/// A `oneOf` that is not the value of a property: one variant a line, each with its description and default.
fn union_of(variants: &[Value], indent: &str) -> String {
    let mut out = String::new();
    for variant in variants {
        let _ = write!(out, "\n{indent} | {}", nullable_type(variant, &format!("{indent}   ")));
        let mut comments: Vec<_> = text(variant, "description").map(str::to_owned).into_iter().collect();
        if let Some(default) = variant.get("default") {
            comments.push(match default {
                Value::String(default) if !is_enum(variant) => format!("default: \"{default}\""),
                default => format!("default: {default}"),
            });
        }
        push_comments(&mut out, &comments);
    }
    out
}

fn object_of(schema: &Value, indent: &str) -> String {
    let mut out = String::new();
    if let Some(description) = text(schema, "description") {
        let _ = writeln!(out, "{indent}// {description}");
    }
    out.push_str("{\n");
    let required: Vec<_> = list(schema, "required").into_iter().flatten().filter_map(Value::as_str).collect();
    for (name, property) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let mark = if required.contains(&name.as_str()) { "" } else { "?" };
        push_property(&mut out, &format!("{name}{mark}"), property, indent);
    }
    let _ = write!(out, "{indent}}}");
    out
}

fn push_property(out: &mut String, name: &str, property: &Value, indent: &str) {
    if let Some(title) = text(property, "title") {
        let _ = writeln!(out, "{indent}// {title}\n{indent}//");
    }
    let is_union = property.get("oneOf").is_some();
    if let Some(description) = text(property, "description").filter(|_| !is_union) {
        let _ = writeln!(out, "{indent}// {description}");
    }
    if let Some(examples) = list(property, "examples").filter(|examples| !examples.is_empty()) {
        let _ = writeln!(out, "{indent}// Examples:");
        for example in examples.iter().filter_map(Value::as_str) {
            let _ = writeln!(out, "{indent}// - \"{example}\"");
        }
    }
    if let Some(variants) = list(property, "oneOf") {
        return push_union_property(out, name, property, variants, indent);
    }
    let _ = write!(out, "{indent}{name}: {},", nullable_type(property, &format!("{indent}    ")));
    if let Some(default) = default_comment(property).filter(|_| !is_union) {
        let _ = write!(out, " // {default}");
    }
    out.push('\n');
}

/// A property whose value is a `oneOf`: description and default above it, one variant a line below.
fn push_union_property(out: &mut String, name: &str, property: &Value, variants: &[Value], indent: &str) {
    let description = text(property, "description");
    // A description that the first variant repeats is left to stand nowhere: the variant leaves it out as well.
    let repeated =
        description.is_some() && description == variants.first().and_then(|first| text(first, "description"));
    let shown_above = description.filter(|_| !repeated);
    if let Some(description) = shown_above {
        let _ = writeln!(out, "{indent}// {description}");
    }
    if let Some(default) = default_comment(property) {
        let _ = writeln!(out, "{indent}// {default}");
    }
    let _ = writeln!(out, "{indent}{name}:");
    for (at, variant) in variants.iter().enumerate() {
        let _ = write!(out, "{indent} | {}", nullable_type(variant, &format!("{indent}   ")));
        let own = text(variant, "description").filter(|_| at > 0 || shown_above.is_none());
        let own = own.filter(|&own| Some(own) != description).map(str::to_owned);
        push_comments(out, &own.into_iter().chain(default_comment(variant)).collect::<Vec<_>>());
        out.push('\n');
    }
    let _ = writeln!(out, "{indent},");
}

fn push_comments(out: &mut String, comments: &[String]) {
    if !comments.is_empty() {
        let _ = write!(out, " // {}", comments.join(" "));
    }
}

fn nullable_type(schema: &Value, indent: &str) -> String {
    let mut name = type_of(schema, indent);
    if schema.get("nullable").and_then(Value::as_bool) == Some(true) && !name.contains("null") {
        name.push_str(" | null");
    }
    name
}

/// A string that is one of an enumeration stands bare, any other in quotes.
fn default_comment(schema: &Value) -> Option<String> {
    Some(match schema.get("default")? {
        Value::String(default) if is_enum(schema) => format!("default: {default}"),
        Value::String(default) => format!("default: \"{default}\""),
        default => format!("default: {default}"),
    })
}

fn is_enum(schema: &Value) -> bool {
    list(schema, "enum").is_some_and(|values| !values.is_empty())
}

fn list<'s>(schema: &'s Value, key: &str) -> Option<&'s Vec<Value>> {
    schema.get(key)?.as_array()
}

fn text<'s>(schema: &'s Value, key: &str) -> Option<&'s str> {
    schema.get(key)?.as_str()
}
