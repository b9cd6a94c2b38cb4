"""The mask function says the same as sdpa's, in fewer words."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from torch import Tensor
from transformers_models import padding

from fastattn.integrations.transformers import attention_mask
from fastattn.integrations.transformers.masks import Packed, Visible, said_by

masking = pytest.importorskip("transformers.masking_utils")

LENGTH, WINDOW = 17, 6


class Config:
    attention_chunk_size = None


class Chunked(Config):
    attention_chunk_size = WINDOW


def arguments(queries: int, keys: int = LENGTH, offset: int = 0, **others) -> dict:
    """As transformers gives them: `keys` from `offset` on, of which the last ones are queried."""
    first = offset + keys - queries
    if "q_length" in inspect.signature(masking.sdpa_mask).parameters:
        positions = {"q_length": queries, "q_offset": first}
    else:
        positions = {"cache_position": torch.arange(first, first + queries)}
    common = {"batch_size": 3, "kv_length": keys, "kv_offset": offset, "config": Config()}
    return common | positions | others


def sdpa(given: dict) -> Tensor:
    """(B, 1, S_q, S_k) bool."""
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = masking.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**{**given, **skips})
    return mask.expand(3, 1, *mask.shape[2:])


def dense(said: Visible | Packed | Tensor | None, queries: int, keys: int, causal: bool) -> Tensor:
    """What was said, as such a tensor."""
    i, j = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
    if said is None:
        assert queries in (1, keys) or not causal
        said = Visible(keys, keys, (-1, 0 if causal else -1))
    if isinstance(said, Tensor):
        return said.expand(3, 1, queries, keys)
    if isinstance(said, Visible):
        assert said.kv_length == keys and (said.keys is None or said.left_padding is None)
        assert said.lengths is None or said.lengths.tolist() == [said.end] * 3
        i = i - keys + said.end
    left, right = said.window
    seen = ((left == -1) | (i - j <= left)) & ((right == -1) | (j - i <= right))
    seen = seen.expand(3, 1, queries, keys)
    if isinstance(said, Packed):
        offsets, _ = said.cu_seqlens
        number = torch.bucketize(torch.arange(3 * keys), offsets[1:], right=True).view(3, 1, keys)
        return seen & (number[..., :, None] == number[..., None, :])
    seen = seen & (j < said.end)
    if said.keys is not None:
        flags = torch.nn.functional.pad(said.keys, (0, keys - said.end))
        seen = seen & flags[:, None, None]
    if said.left_padding is not None:
        seen = seen & (j >= said.left_padding[:, None, None, None])
    return seen


def masks() -> dict[str, Tensor | None]:
    holes = torch.ones(3, LENGTH).bool()
    holes[1, [0, 4, 7]] = False
    sides = {side: padding(side).bool() for side in ("left", "right")}
    return {"none": None, "all": torch.ones(3, LENGTH).bool(), "holes": holes, **sides}


@pytest.mark.parametrize("queries", [1, 4, LENGTH])
@pytest.mark.parametrize("pattern", ["causal", "window", "wide", "chunked", "both", "both_window"])
def test_says_what_sdpa_says(pattern, queries):
    sliding = masking.sliding_window_causal_mask_function
    given = {
        "causal": {"mask_function": masking.causal_mask_function},
        "window": {"mask_function": sliding(WINDOW), "local_size": WINDOW},
        "wide": {"mask_function": sliding(LENGTH), "local_size": LENGTH},
        "chunked": {
            "mask_function": masking.chunked_causal_mask_function(WINDOW, torch.zeros(3).long()),
            "local_size": WINDOW,
            "config": Chunked(),
        },
    }
    if hasattr(masking, "sliding_window_bidirectional_mask_function"):
        both = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}
        two_sided = masking.sliding_window_bidirectional_mask_function
        given["both"] = {"mask_function": masking.bidirectional_mask_function, **both}
        given["both_window"] = {"mask_function": two_sided(3), "local_size": 3, **both}
    if pattern not in given:
        pytest.skip("this transformers has no masks for encoders")
    for (name, mask), offset in itertools.product(masks().items(), (0, 5)):
        if mask is not None and offset:
            mask = torch.nn.functional.pad(mask, (offset, 0))
        call = arguments(queries, offset=offset, attention_mask=mask, **given[pattern])
        said = attention_mask(**call)
        got = dense(said, queries, LENGTH, causal="both" not in pattern)
        assert torch.equal(got, sdpa(call)), (name, offset)
        if pattern in ("causal", "wide", "both") and name in ("none", "all"):
            assert said is None or (queries == 4 and said.window == (-1, 0) and said.keys is None)
        if isinstance(said, Tensor):
            assert pattern == "chunked" or said.shape[2] == 1
        if queries == 1 and name == "left" and pattern == "causal":
            assert said.left_padding is not None


def test_a_mask_too_short_ends_in_padding():
    call = arguments(LENGTH, attention_mask=torch.ones(3, LENGTH - 4).bool())
    assert torch.equal(dense(attention_mask(**call), LENGTH, LENGTH, True), sdpa(call))


@pytest.mark.parametrize("pattern", ["causal", "window", "wide"])
@pytest.mark.parametrize("queries", [1, 4, LENGTH])
def test_a_static_cache(queries, pattern):
    """It is longer than what it holds. A token's mask is a tensor, which carries what we say."""
    length = {"causal": None, "window": WINDOW, "wide": LENGTH}[pattern]
    sliding = masking.sliding_window_causal_mask_function
    function = masking.causal_mask_function if length is None else sliding(length)
    for name, mask in masks().items():
        call = arguments(queries, attention_mask=mask, mask_function=function, local_size=length)
        call["kv_length"] = 30
        if "q_offset" in call:
            call["q_offset"] = torch.tensor(call["q_offset"])
        call["allow_is_causal_skip"] = queries > 1
        got, want = attention_mask(**call), sdpa(call)
        if queries > 1:
            assert not isinstance(got, Tensor)
        else:
            assert torch.equal(got.expand_as(want), want)
            assert isinstance(said_by(got), Tensor if name in ("holes", "right") else Visible)
            assert name in ("holes", "right") or said_by(got.contiguous()).lengths is not None
        if got is not None:  # None is top-left then
            assert torch.equal(dense(said_by(got), queries, 30, causal=True), want), name
    call["mask_function"] = masking.chunked_causal_mask_function(WINDOW, torch.zeros(3).long())
    call |= {"allow_is_causal_skip": False, "config": Chunked()}
    assert isinstance(said_by(attention_mask(**call)), Tensor)


def test_one_token_in_a_static_cache():
    call = arguments(1, keys=1) | {"kv_length": 30}
    said = attention_mask(**call)
    assert said is not None and torch.equal(dense(said, 1, 30, True), sdpa(call))


@pytest.mark.parametrize("window", [None, WINDOW])
def test_packed(window):
    causal = masking.causal_mask_function
    if window:
        causal = masking.sliding_window_causal_mask_function(window)
    lengths = [[8, 9], [17], [1, 3, 13]]
    segments = torch.stack(
        [torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in lengths]
    )
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    if hasattr(masking, "packed_sequence_compatibility_function"):
        packed = masking.packed_sequence_compatibility_function(causal, positions, segments)
    else:
        packed = masking.and_masks(causal, masking.packed_sequence_mask_function(segments))
    call = arguments(LENGTH, mask_function=packed, local_size=window, allow_is_causal_skip=False)
    said = attention_mask(**call)
    assert isinstance(said, Packed)
    assert said.cu_seqlens[0].tolist() == [0, 8, 17, 34, 35, 38, 51]
    assert said.max_seqlens == (17, 17)
    assert torch.equal(dense(said, LENGTH, LENGTH, True), sdpa(call))


def test_functions_of_other_makes_become_tensors():
    segments = torch.zeros(3, LENGTH).long()

    def every_other(batch, head, query, key):
        return key % 2 == 0

    for other in (
        every_other,
        masking.and_masks(masking.causal_mask_function, every_other),
        masking.or_masks(masking.causal_mask_function, every_other),
        masking.and_masks(masking.packed_sequence_mask_function(segments), every_other),
    ):
        call = arguments(LENGTH, mask_function=other, allow_is_causal_skip=False)
        got = attention_mask(**call)
        assert isinstance(got, Tensor) and torch.equal(got.expand_as(sdpa(call)), sdpa(call))


def test_tensors_where_transformers_wants_them():
    """It says so by forbidding to skip the mask, before it joins it to another."""
    assert isinstance(attention_mask(**arguments(LENGTH, allow_is_causal_skip=False)), Tensor)


def test_a_mask_that_comes_back():
    visible = Visible(LENGTH, LENGTH, (5, 0))
    assert attention_mask(**arguments(LENGTH, attention_mask=visible)) is visible
    assert visible.contiguous() is visible and visible.ndim != 2
