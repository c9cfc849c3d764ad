"""A response out of several streams: nothing lost, nothing doubled, spans and routing of who sampled what."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.rollout.client import Sampling
from megatron_rl.rollout.growing import Growing
from megatron_rl.rollout.replies import Piece, Routing

PROMPT = [7, 8, 9]


def routing(positions: int, server: int) -> Routing:
    return np.full((positions, 2, 2), server, dtype=np.uint8)


def piece(tokens: list[int], version: int = 0, **more: object) -> Piece:
    return Piece(tokens, [-float(token) for token in tokens], version, **more)  # type: ignore[arg-type]


@given(st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=6), st.integers(0, 3))
def test_what_was_streamed_is_kept_and_the_rest_asked_for(pieces: list[list[int]], least: int) -> None:
    tokens = [token for part in pieces for token in part]
    growing = Growing(PROMPT, Sampling(40, min_new_tokens=least, temperature=0.5))
    for version, part in enumerate(pieces):
        growing.absorb(piece(part, version))
    asked, sampling = growing.rest()
    assert asked == PROMPT + tokens
    assert sampling.max_new_tokens == 40 - len(tokens)
    assert sampling.min_new_tokens == max(0, least - len(tokens))
    assert sampling.temperature == 0.5
    now = growing.generation("abort")
    assert now.tokens.tolist() == tokens
    assert now.log_probs.tolist() == [-float(token) for token in tokens]
    versions = [span.version for span in now.spans for _ in range(span.length)]
    assert versions == [version for version, part in enumerate(pieces) for _ in part]


def decode(tokens: Sequence[int]) -> str:
    return "".join("abcdéfghij"[token] for token in tokens)


@pytest.mark.parametrize("before", range(1, 5))
def test_a_stop_text_is_found_across_servers(before: int) -> None:
    """`cdé` ends at the fifth token, wherever the response changes servers."""
    tokens, stop = [0, 1, 2, 3, 4, 5, 6], 5
    growing = Growing(PROMPT, Sampling(40, stop=("zz", "cdé")), decode)
    growing.rest()
    growing.absorb(piece(tokens[:before], 0))
    growing.rest()
    growing.absorb(piece([*tokens[before:], 9], 1, finish="abort", routing=routing(10, server=1)))
    assert growing.stopped
    ended = growing.generation("abort")
    assert ended.finish == "stop"
    assert ended.tokens.tolist() == tokens[:stop]
    assert sum(span.length for span in ended.spans) == len(ended.log_probs) == len(ended.tokens)
    assert ended.routing is not None and len(ended.routing) == len(PROMPT) + len(ended.tokens) - 1


def test_a_stop_text_is_found_whatever_the_pieces() -> None:
    growing = Growing(PROMPT, Sampling(40, stop=("cdé",)), decode)
    growing.absorb(piece([0, 1, 2], 0))
    growing.rest()
    for token in (3, 4, 5):
        assert not growing.stopped or token == 5
        growing.absorb(piece([token], 1))
    assert growing.stopped and growing.generation("abort").tokens.tolist() == [0, 1, 2, 3, 4]


def test_stop_texts_need_the_tokenizer() -> None:
    with pytest.raises(ValueError, match="decode"):
        Growing(PROMPT, Sampling(40, stop=("ab",)))


def test_positions_keep_the_routing_of_who_sampled_there() -> None:
    growing = Growing(PROMPT, Sampling(6))
    growing.absorb(piece([1, 2, 9], 0, finish="abort", routing=routing(5, server=1)))
    growing.rest()
    growing.absorb(piece([3], 1))  # this server died: its routing is lost
    growing.rest()
    growing.absorb(piece([4, 5, 6], 1, finish="length", routing=routing(8, server=2)))
    whole = growing.generation("length").routing
    assert whole is not None
    assert whole[:, 0, 0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2]


def test_routing_of_a_beginning_is_left_out() -> None:
    growing = Growing(PROMPT, Sampling(6))
    growing.absorb(piece([1, 2, 9], 0, finish="abort", routing=routing(5, server=1)))
    assert growing.generation("abort").routing is not None
    growing.absorb(piece([3], 1))
    assert growing.generation("abort").routing is None


@pytest.mark.parametrize("streamed", [0, 5, 6])
def test_full_is_full(streamed: int) -> None:
    growing = Growing(PROMPT, Sampling(6))
    growing.absorb(piece(list(range(streamed))))
    assert growing.full == (streamed == 6)
    assert growing.weight == 9


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("last", range(5))
def test_what_the_last_step_of_an_aborted_response_brought_is_asked_for_again(stride: int, last: int) -> None:
    """It may be the token that ends the response, at which nobody has looked. What was streamed before has been looked at."""
    growing = Growing(PROMPT, Sampling(40))
    growing.absorb(piece([1, 2, 3], 0), stride)
    growing.absorb(piece([4, 5, 6, 7][:last], 1, finish="abort"), stride)
    kept = [1, 2, 3, *[4, 5, 6, 7][: max(0, last - stride)]]
    assert growing.rest()[0] == PROMPT + kept
    now = growing.generation("abort")
    assert now.tokens.tolist() == kept and len(now.log_probs) == sum(span.length for span in now.spans) == len(kept)
