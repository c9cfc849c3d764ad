"""Replies that lie: each is refused with what is wrong. The honest ones are as SGLang 0.5.17 sends them."""

import base64
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest

from megatron_rl.rollout.replies import (
    Piece,
    RoutingShape,
    Span,
    StreamReader,
    Untrusted,
    gather,
    join_spans,
    read_score,
    read_server_info,
)

SHAPE = RoutingShape(layers=2, chosen=2, experts=4)
ROUTING = np.arange(6 * 2 * 2).reshape(6, 2, 2) % 4  # 3 prompt tokens and 4 of the response, less the last
type Change = Callable[[dict[str, Any]], object]


def reader() -> StreamReader:
    return StreamReader("a", prompt=3, limit=4, vocabulary=10, shape=SHAPE)


def event(tokens: list[int], total: int, finish: str | None = None, version: str = "5") -> dict[str, Any]:
    told = {
        "id": "a",
        "prompt_tokens": 3,
        "completion_tokens": total,
        "cached_tokens": 2,
        "weight_version": version,
        "finish_reason": {"type": finish} if finish else None,
        "output_token_logprobs": [[-0.5 * token, token, None] for token in tokens],
    }
    if finish:
        told["routed_experts"] = base64.b64encode(ROUTING.astype("<i4").tobytes()).decode()
    return {"text": "", "output_ids": tokens, "meta_info": told}


@pytest.mark.parametrize("cumulative", [False, True])
def test_both_ways_of_streaming_give_the_same_pieces(cumulative: bool) -> None:
    events = [event([1], 1), event([2, 3], 3, version="6"), event([4], 4, "length", version="6")]
    if cumulative:
        events = [event([1], 1), event([1, 2, 3], 3, version="6"), event([1, 2, 3, 4], 4, "length", version="6")]
    read = reader()
    pieces = [read.read(each) for each in events]
    assert [piece.tokens for piece in pieces] == [[1], [2, 3], [4]]
    whole = gather(pieces)
    assert whole.tokens.tolist() == [1, 2, 3, 4]
    assert whole.log_probs.tolist() == [-0.5, -1.0, -1.5, -2.0]
    assert whole.spans == (Span(5, 1), Span(6, 3))
    assert (whole.finish, whole.cached) == ("length", 2)
    assert whole.routing is not None
    np.testing.assert_array_equal(whole.routing, ROUTING)


def test_a_request_that_ends_in_the_queue_keeps_what_had_come() -> None:
    """Put back by a pause and then aborted: the answer counts no prompt, and repeats the last token."""
    read = reader()
    last = event([2], 3, "abort")
    for name in ("prompt_tokens", "cached_tokens", "routed_experts"):
        del last["meta_info"][name]
    whole = gather([read.read(event([1, 2], 2)), read.read(last)])
    assert (whole.tokens.tolist(), whole.finish, whole.routing) == ([1, 2], "abort", None)
    assert whole.spans == (Span(5, 2),)
    last["meta_info"]["finish_reason"] = {"type": "length"}
    with pytest.raises(Untrusted, match="prompt_tokens is missing"):
        reader().read(last)


LIES: dict[str, tuple[Change, str]] = {
    "no tokens": (lambda e: e.pop("output_ids"), "output_ids is missing"),
    "no meta": (lambda e: e.pop("meta_info"), "meta_info is missing"),
    "tokens no list": (lambda e: e.update(output_ids=7), "output_ids is 7, not of type list"),
    "other request": (lambda e: e["meta_info"].update(id="b"), "answers request b, not a"),
    "other prompt": (lambda e: e["meta_info"].update(prompt_tokens=9), "9 prompt tokens of 3"),
    "true for a count": (lambda e: e["meta_info"].update(completion_tokens=True), "completion_tokens is true"),
    "too many": (lambda e: e["meta_info"].update(completion_tokens=9), "9 tokens of at most 4"),
    "lost tokens": (lambda e: e["output_ids"].pop(), "sent 3 output_ids after 0, and counts 4"),
    "lost log-probs": (lambda e: e["meta_info"]["output_token_logprobs"].pop(), "sent 3 log-probs after 0"),
    "not in the vocabulary": (lambda e: e["output_ids"].__setitem__(0, 10), "token 10 is not in the vocabulary of 10"),
    "text for a token": (lambda e: e["output_ids"].__setitem__(0, "1"), 'token "1" is not in'),
    "log-prob of another": (lambda e: e["meta_info"]["output_token_logprobs"][1].__setitem__(1, 7), "log-prob of token 2 is"),
    "no log-prob": (lambda e: e["meta_info"]["output_token_logprobs"][1].__setitem__(0, None), "log-prob of token 2 is null"),
    "NaN": (lambda e: e["meta_info"]["output_token_logprobs"][1].__setitem__(0, float("nan")), "log-prob of token 2 is NaN"),
    "a probability above 1": (lambda e: e["meta_info"]["output_token_logprobs"][1].__setitem__(0, 0.5), "token 2 is 0.5"),
    "no version": (lambda e: e["meta_info"].pop("weight_version"), "weight_version is missing"),
    "unknown finish": (lambda e: e["meta_info"].update(finish_reason={"type": "bored"}), "bored"),
    "no routing": (lambda e: e["meta_info"].pop("routed_experts"), "sglang.enable_return_routed_experts: true"),
    "routing of another length": (lambda e: e["meta_info"].update(routed_experts="AAAA"), "routing"),
    "routing no base64": (lambda e: e["meta_info"].update(routed_experts="?"), "base64"),
    "an expert too many": (
        lambda e: e["meta_info"].update(routed_experts=base64.b64encode(np.full(24, 4, "<i4").tobytes()).decode()),
        "expert 4 to 4 of 4",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused(lie: str) -> None:
    change, said = LIES[lie]
    honest = event([1, 2, 3, 4], 4, "length")
    assert reader().read(deepcopy(honest)).finish == "length"
    change(honest)
    with pytest.raises(Untrusted, match=said):
        reader().read(honest)


def test_a_stream_cannot_go_back() -> None:
    read = reader()
    read.read(event([1, 2, 3], 3))
    with pytest.raises(Untrusted, match="after 3"):
        read.read(event([], 2))


def test_spans_join_neighbours_of_one_version() -> None:
    assert join_spans([Span(1, 2), Span(1, 3), Span(2, 0), Span(1, 1), Span(None, 4)]) == (Span(1, 6), Span(None, 4))


def test_more_than_256_experts_take_two_bytes() -> None:
    shape = RoutingShape(layers=1, chosen=1, experts=300)
    read = StreamReader("a", prompt=3, limit=4, vocabulary=10, shape=shape)
    last = event([1, 2, 3, 4], 4, "stop")
    last["meta_info"]["routed_experts"] = base64.b64encode(np.arange(294, 300).astype("<i4").tobytes()).decode()
    piece: Piece = read.read(last)
    assert piece.routing is not None and piece.routing.dtype == np.uint16
    assert piece.routing.flatten().tolist() == list(range(294, 300))


def test_a_score_must_be_about_the_tokens_asked_for() -> None:
    reply = {"meta_info": {"input_token_logprobs": [[None, 4, None], [-1.0, 5, None]]}}
    assert read_score(reply, [4, 5], 10).tolist() == [0.0, -1.0]
    with pytest.raises(Untrusted, match="log-prob of token 6"):
        read_score(reply, [4, 6], 10)
    with pytest.raises(Untrusted, match="2 tokens of 3"):
        read_score(reply, [4, 5, 6], 10)


@pytest.mark.parametrize("called", [0, 9])
def test_the_last_token_of_the_vocabulary_is_called_0_by_sglang(called: int) -> None:
    reply = {"meta_info": {"input_token_logprobs": [[None, called, None], [-1.0, called, None]]}}
    assert read_score(reply, [9, 9], 10).tolist() == [0.0, -1.0]
    if called == 0:
        with pytest.raises(Untrusted, match="log-prob of token 8"):
            read_score(reply, [9, 8], 10)


def test_a_server_that_describes_itself_badly() -> None:
    with pytest.raises(Untrusted, match="internal_states is empty"):
        read_server_info({"internal_states": []})
    with pytest.raises(Untrusted, match="version is missing"):
        read_server_info({"internal_states": [{}]})
