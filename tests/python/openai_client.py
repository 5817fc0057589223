"""The official OpenAI client against a running server. Usage: openai_client.py BASE_URL MODEL

Every check is a function; the script runs all of them and fails when one does.
"""
import json
import sys
import traceback

import openai

base, MODEL = sys.argv[1], sys.argv[2]
client = openai.OpenAI(base_url=base + "/v1", api_key="none", max_retries=0, timeout=60)
ASK = [{"role": "user", "content": "What is the capital of France?"}]
KOREAN = [{"role": "user", "content": "대한민국의 수도는 어디야?"}]
WEATHER = [{
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get current weather for a location",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city"}},
            "required": ["city"],
        },
    },
}]


def chat(messages=ASK, **more):
    return client.chat.completions.create(model=MODEL, messages=messages, temperature=0, **more)


def check_chat_answers():
    answer = chat()
    choice = answer.choices[0]
    assert "Paris" in choice.message.content, choice
    assert choice.finish_reason == "stop" and choice.message.role == "assistant"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0
    assert answer.model == MODEL and answer.object == "chat.completion"


def check_chat_answers_in_korean():
    assert "서울" in chat(KOREAN).choices[0].message.content


def check_reasoning_is_separate():
    message = chat(reasoning_effort="high").choices[0].message
    assert message.reasoning_content and message.reasoning_content == message.reasoning
    assert "<|" not in message.content + message.reasoning_content


def check_stream_equals_the_whole():
    for messages in (ASK, KOREAN):
        whole = chat(messages).choices[0].message
        roles, content, reasoning, finish, usage, ids = [], "", "", [], None, set()
        for chunk in chat(messages, stream=True, stream_options={"include_usage": True}):
            ids.add((chunk.id, chunk.created, chunk.model, chunk.object))
            usage = chunk.usage or usage
            for choice in chunk.choices:
                assert choice.index == 0
                if choice.delta.role:
                    roles.append(choice.delta.role)
                content += choice.delta.content or ""
                reasoning += getattr(choice.delta, "reasoning_content", None) or ""
                if choice.finish_reason:
                    finish.append(choice.finish_reason)
        assert roles == ["assistant"], roles
        assert content == whole.content and reasoning == whole.reasoning_content
        assert finish == ["stop"] and len(ids) == 1
        assert usage.completion_tokens > 0


def check_tool_call_and_answer():
    ask = [{"role": "user", "content": "How is the weather in Paris?"}]
    answer = chat(ask, tools=WEATHER).choices[0]
    assert answer.finish_reason == "tool_calls", answer
    call = answer.message.tool_calls[0]
    assert call.function.name == "get_weather" and call.id.startswith("call_")
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    history = ask + [
        answer.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 21, "condition": "sunny"}'},
    ]
    final = chat(history, tools=WEATHER).choices[0]
    assert final.finish_reason == "stop" and "21" in final.message.content, final


def check_tool_call_streams():
    ask = [{"role": "user", "content": "How is the weather in Paris?"}]
    name, arguments, ids, finish = "", "", [], None
    for chunk in chat(ask, tools=WEATHER, stream=True):
        for choice in chunk.choices:
            finish = choice.finish_reason or finish
            for call in choice.delta.tool_calls or []:
                assert call.index == 0
                ids += [call.id] if call.id else []
                name += call.function.name or ""
                arguments += call.function.arguments or ""
    assert (name, json.loads(arguments), finish) == ("get_weather", {"city": "Paris"}, "tool_calls")
    assert len(ids) == 1


def check_completions():
    made = client.completions.create(model=MODEL, prompt="Hello", max_tokens=4, temperature=0)
    assert made.choices[0].finish_reason == "length" and made.usage.completion_tokens == 4
    echo = client.completions.create(model=MODEL, prompt="Hello", max_tokens=4, temperature=0, echo=True)
    assert echo.choices[0].text == "Hello" + made.choices[0].text
    two = client.completions.create(model=MODEL, prompt=["Hello", "Bye"], max_tokens=3, temperature=0)
    assert [choice.index for choice in two.choices] == [0, 1]
    ids = client.completions.create(model=MODEL, prompt=[100, 200, 300], max_tokens=3, logprobs=2, temperature=0)
    logprobs = ids.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 3
    assert all(len(top) >= 2 for top in logprobs.top_logprobs)
    streamed = client.completions.create(model=MODEL, prompt="Hello", max_tokens=4, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == made.choices[0].text


def check_models():
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


def expect(kind, code, param, **body):
    try:
        client.chat.completions.create(**{"model": MODEL, "messages": ASK, **body})
    except kind as error:
        assert error.code == code and error.param == param, (error.code, error.param, error.message)
        assert set(error.body) == {"message", "type", "param", "code"}, error.body
        return
    raise AssertionError(f"no {kind.__name__} for {body}")


def check_errors():
    expect(openai.NotFoundError, "model_not_found", "model", model="gpt-5")
    expect(openai.BadRequestError, "invalid_value", "temperature", temperature=3)
    expect(openai.BadRequestError, "invalid_value", "messages", messages=[])
    expect(openai.BadRequestError, "context_length_exceeded", "messages", messages=[{"role": "user", "content": "word " * 400000}])
    assert chat().choices[0].finish_reason == "stop", "the next request works"


def check_logprobs():
    content = chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert "".join(token.token for token in content) == chat().choices[0].message.content
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob >= token.logprob
        assert bytes(token.bytes).decode("utf-8", "replace")


def check_n_choices():
    answer = client.chat.completions.create(model=MODEL, messages=ASK, n=2, seed=7, temperature=1.5)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage.completion_tokens > 0
    texts = {0: "", 1: ""}
    for chunk in client.chat.completions.create(model=MODEL, messages=ASK, n=2, seed=7, temperature=1.5, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert [texts[0], texts[1]] == [choice.message.content or "" for choice in answer.choices]


def check_stop_strings():
    ask = [{"role": "user", "content": "Count from 1 to 9"}]
    whole = chat(ask).choices[0].message.content
    assert "5" in whole
    cut = chat(ask, stop=["5"]).choices[0]
    assert cut.message.content == whole.split("5")[0] and cut.finish_reason == "stop"
    pieces = [c.choices[0].delta.content or "" for c in chat(ask, stop="5", stream=True) if c.choices]
    assert "".join(pieces) == cut.message.content


def check_seed_repeats():
    def sample(seed):
        return client.chat.completions.create(model=MODEL, messages=ASK, temperature=1.8, seed=seed).choices[0].message.content

    assert sample(11) == sample(11)
    assert len({sample(seed) for seed in range(6)}) > 1


def check_length_is_said():
    cut = chat(max_completion_tokens=3).choices[0]
    assert cut.finish_reason == "length" and not cut.message.content


failed = 0
for name, check in list(globals().items()):
    if name.startswith("check_"):
        try:
            check()
            print("ok  ", name)
        except Exception:
            failed += 1
            print("FAIL", name)
            traceback.print_exc()
sys.exit(1 if failed else 0)
