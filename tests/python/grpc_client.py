"""A gRPC client that knows nothing but the address: it learns the service by reflection, generates, and aborts.

Usage: grpc_client.py HOST:PORT TOKEN_ID[,TOKEN_ID…]
"""
import sys

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

address, prompt = sys.argv[1], [int(token) for token in sys.argv[2].split(",")]
channel = grpc.insecure_channel(address)
database = ProtoReflectionDescriptorDatabase(channel)
assert "phalanx.v1.Inference" in database.get_services(), database.get_services()
service = descriptor_pool.DescriptorPool(database).FindServiceByName("phalanx.v1.Inference")


def call(name, kind, **fields):
    method = service.methods_by_name[name]
    request, response = (message_factory.GetMessageClass(m) for m in (method.input_type, method.output_type))
    stub = getattr(channel, kind)(
        f"/{service.full_name}/{name}",
        request_serializer=request.SerializeToString,
        response_deserializer=response.FromString,
    )
    return stub(request(**fields), timeout=60)


def generate(**fields):
    tokens, finished = [], None
    for event in call("Generate", "unary_stream", prompt=prompt, sampling={"temperature": 0}, **fields):
        tokens += [token.id for token in event.tokens.tokens]
        if event.HasField("finished"):
            assert finished is None, "one terminal event"
            finished = event.finished
    return tokens, finished


models = call("Models", "unary_unary").deployments
assert len(models) == 1 and models[0].vocab_size > 0, models
tokens, finished = generate(max_tokens=8)
assert len(tokens) == 8 and finished.reason == 2, (tokens, finished)
assert finished.prompt_tokens == len(prompt) and finished.completion_tokens == 8
rest, _ = generate(max_tokens=8, resume=tokens[:3])
assert rest == tokens[3:], "a resumed request goes on where it stopped"
stopped, finished = generate(max_tokens=8, stop_token_ids=[tokens[2]])
assert stopped[-1] == tokens[2] and finished.reason == 1, (stopped, finished)

stream = call("Generate", "unary_stream", request_id="to-abort", prompt=prompt, max_tokens=100000, sampling={"temperature": 0, "ignore_eos": True})
seen = 0
for event in stream:
    seen += len(event.tokens.tokens)
    if seen >= 5 and not event.HasField("finished"):
        break
assert call("Abort", "unary_unary", request_id="to-abort").aborted
last = None
for event in stream:
    last = event
assert last.finished.reason == 3, last
assert not call("Abort", "unary_unary", request_id="to-abort").aborted

try:
    generate(max_tokens=8, request_id="bad", model="nothing-of-that-name")
    raise AssertionError("an unknown model is refused")
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.NOT_FOUND, error
print("generated", tokens)
