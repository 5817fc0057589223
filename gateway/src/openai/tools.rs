//! Function tools of a chat request, and which of them the model must call.

use serde_json::Value;

use super::{error::ApiError, fields::Fields};

/// Most tools of one request.
const MAX_TOOLS: usize = 128;
/// Longest name of a function, in bytes.
const MAX_NAME: usize = 64;

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) description: Option<String>,
    /// A JSON schema; its order of properties is the client's.
    pub(crate) parameters: Option<Value>,
}

/// Which tool the model must call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    /// Whichever it wants, or none.
    #[default]
    Auto,
    /// None: tools are not shown to it.
    None,
    /// The function of this name.
    Named(String),
}

/// Takes `tools`; `ignored` gets the places of what has no effect.
pub(crate) fn take_tools(fields: &mut Fields, ignored: &mut Vec<String>) -> Result<Vec<Function>, ApiError> {
    fields.refuse("functions", "it is deprecated; use 'tools'")?;
    fields.refuse("function_call", "it is deprecated; use 'tool_choice'")?;
    fields.refuse("web_search_options", "there is no web search")?;
    let values = fields.array("tools", MAX_TOOLS)?.unwrap_or_default();
    let mut tools = Vec::with_capacity(values.len());
    for (at, value) in values.into_iter().enumerate() {
        let function = take_tool(format!("tools[{at}]"), value, ignored)?;
        if tools.iter().any(|other: &Function| other.name == function.name) {
            let text = format!("'{}' is the name of an earlier tool too", function.name);
            return Err(ApiError::invalid_value(&format!("tools[{at}].function.name"), text));
        }
        tools.push(function);
    }
    Ok(tools)
}

fn take_tool(path: String, value: Value, ignored: &mut Vec<String>) -> Result<Function, ApiError> {
    let mut tool = Fields::of(path.clone(), value)?;
    let kind = tool.required_string("type")?;
    if kind != "function" {
        let reason = format!("tools of type '{kind}' do not exist here, only 'function'");
        return Err(ApiError::unsupported(&tool.path_of("type"), reason));
    }
    let mut function = tool.object("function")?.ok_or_else(|| ApiError::missing(&format!("{path}.function")))?;
    let name = function_name(&mut function)?;
    let description = function.string("description")?;
    let parameters = match function.value("parameters") {
        Some(Value::Object(schema)) => Some(Value::Object(schema)),
        Some(other) => return Err(ApiError::invalid_type(&function.path_of("parameters"), "an object", &other)),
        None => None,
    };
    if function.boolean("strict")?.unwrap_or(false) {
        // The arguments follow the schema as far as the model follows it.
        ignored.push(function.path_of("strict"));
    }
    ignored.extend(function.untaken());
    ignored.extend(tool.untaken());
    Ok(Function { name, description, parameters })
}

fn function_name(function: &mut Fields) -> Result<String, ApiError> {
    let name = function.required_string("name")?;
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(allowed) {
        let text = format!("expected 1 to {MAX_NAME} letters, digits, '_' or '-'");
        return Err(ApiError::invalid_value(&function.path_of("name"), text));
    }
    Ok(name)
}

/// Takes `tool_choice`, which must fit the tools.
pub(crate) fn take_tool_choice(fields: &mut Fields, tools: &[Function]) -> Result<ToolChoice, ApiError> {
    const NAME: &str = "tool_choice";
    match fields.value(NAME) {
        None => Ok(ToolChoice::Auto),
        Some(Value::String(word)) => match word.as_str() {
            "auto" => Ok(ToolChoice::Auto),
            "none" => Ok(ToolChoice::None),
            "required" => required(tools),
            _ => {
                let text = format!("'{word}' is not one of 'none', 'auto', 'required', or an object that names a tool");
                Err(ApiError::invalid_value(NAME, text))
            }
        },
        Some(value @ Value::Object(_)) => named(Fields::of(NAME.to_owned(), value)?, tools),
        Some(other) => Err(ApiError::invalid_type(NAME, "a string or an object", &other)),
    }
}

/// With one tool, "any tool" is that one; among several the model cannot be made to choose without a grammar.
fn required(tools: &[Function]) -> Result<ToolChoice, ApiError> {
    match tools {
        [] => Err(ApiError::invalid_value("tool_choice", "'required' needs 'tools'")),
        [only] => Ok(ToolChoice::Named(only.name.clone())),
        _ => {
            let reason = "'required' with several tools cannot be guaranteed yet; name the tool, or use 'auto'";
            Err(ApiError::unsupported("tool_choice", reason))
        }
    }
}

fn named(mut choice: Fields, tools: &[Function]) -> Result<ToolChoice, ApiError> {
    choice.word("type", &[("function", ())])?.ok_or_else(|| ApiError::missing("tool_choice.type"))?;
    let mut function = choice.object("function")?.ok_or_else(|| ApiError::missing("tool_choice.function"))?;
    let name = function.required_string("name")?;
    if tools.iter().any(|tool| tool.name == name) {
        return Ok(ToolChoice::Named(name));
    }
    Err(ApiError::invalid_value("tool_choice.function.name", format!("'{name}' is not among 'tools'")))
}
