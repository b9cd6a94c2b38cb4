"""What transformers asks of a mask, said in numbers as far as it can be.

transformers hands over a function of (batch, head, query, key), the padding and the lengths, once a
forward pass. sdpa makes a (B, 1, S_q, S_k) tensor of it as soon as anything but plain causal is
wanted. Here it becomes, in this order:

* None where nothing needs saying: all keys, or, if the layer is causal, those up to the query;
* `Visible`: a window, the keys that are no padding, or the first one that is none;
* `Packed`: offsets of the sequences that `position_ids` tell apart;
* sdpa's own tensor for the rest: chunks, a model's own mask functions. Where transformers insists
  on a tensor, as for a token decoded from a static cache, it carries along a `Visible` that says
  the same, if there is one (`said_by`), and is itself not read. Its lengths are a tensor too, so
  that compiled code is the same for every token.

A static cache has more keys than were written: those behind the last query are cut off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
)


class Visible(NamedTuple):
    """The keys that a query sees: those in the window that are no padding."""

    kv_length: int  # keys that the layer hands over
    end: int  # those up to the last query: fewer in a static cache, whose rest nobody sees
    window: tuple[int, int]  # as fastattn.attention's: bottom-right aligned, -1 = unlimited
    keys: Tensor | None = None  # (B, end) bool, False = padding
    left_padding: Tensor | None = None  # (B,) int32: all keys from here on are visible; or `keys`
    lengths: Tensor | None = None  # (B,) int32: `end`, and in compiled code in place of it

    # Before it fills a static cache, generate() makes the mask, makes it contiguous and hands it to
    # the model, which comes back to `attention_mask` with what has not 2 dimensions.
    @property
    def ndim(self) -> int:
        return 4

    def contiguous(self) -> Visible:
        return self


class Packed(NamedTuple):
    """Sequences that lie one after the other in the flattened batch."""

    cu_seqlens: tuple[Tensor, Tensor]  # of q and k: (sequences + 1,) int32, from 0 to B · S
    max_seqlens: tuple[int, int]
    window: tuple[int, int]


def attention_mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | Visible | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: Any = None,
    **others: Any,
) -> Visible | Packed | Tensor | None:
    """The mask function that `register` registers: called by transformers' create_*_mask.

    Args:
        attention_mask: (B, keys) bool, False = padding; the 4-D ones of users don't get here.
        allow_is_causal_skip: the mask function is transformers' causal one, with a window or chunks
            of `local_size` if that is given, and need not come back as a tensor.
        allow_is_bidirectional_skip: the same for the bidirectional one.
        others: what else `sdpa_mask` takes: of 5.x q_length and q_offset, of 4.57 cache_position.
    """
    if isinstance(attention_mask, Visible):
        return attention_mask
    queries, first = _queries(others)
    end = _end(queries, first, kv_offset, kv_length)
    known = _known(mask_function)
    window = None
    if allow_is_bidirectional_skip and end == kv_length:
        window = (-1, -1) if local_size is None else (local_size, local_size)
    elif allow_is_causal_skip and end is not None and (local_size is None or not _chunked(config)):
        window = (-1 if local_size is None else local_size - 1, 0)
    elif known and known.segments is not None and attention_mask is None and end == kv_length:
        return _offsets(known.segments, known.left)
    if window is None:
        mask = masking_utils.sdpa_mask(
            batch_size=batch_size,
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            config=config,
            **others,
        )
        if end is None and torch.compiler.is_compiling():
            end = kv_length
        if mask is None or queries > 1 or end is None or not known or known.segments is not None:
            return mask
        visible = Visible(kv_length, end, _narrowed((known.left, 0), kv_length))
        return _saying(visible, mask, attention_mask, kv_offset, first)
    assert end is not None
    keys = _real_keys(attention_mask, kv_offset, end)
    if window == (-1, -1):  # complete as it is: models that look into masks can
        return None if keys is None else keys[:, None, None, :]
    left, right = window = _narrowed(window, end)
    # A single query that is given no mask sees all keys; several see those up to them.
    said_by_none = end == kv_length if queries == 1 or right == -1 else queries == end
    if keys is None and left == -1 and right <= 0 and said_by_none:
        return None
    padding = None
    if queries == 1 and keys is not None and not torch.compiler.is_compiling():
        padding = _left_padding(keys)
    return Visible(kv_length, end, window, keys if padding is None else None, padding)


def _queries(others: dict[str, Any]) -> tuple[int, int | Tensor]:
    """How many there are, and the position of the first."""
    positions = others.get("cache_position")
    if positions is None:
        return others["q_length"], others.get("q_offset", 0)
    return positions.shape[0], positions[0]


def _end(queries: int, first: int | Tensor, kv_offset: int, kv_length: int) -> int | None:
    """The number of keys up to the last query; None where that can't be told.

    As windows count, queries are then the last of these keys.
    """
    if isinstance(first, Tensor):  # of a static cache, or of transformers 4
        if torch.compiler.is_compiling():
            return kv_length if queries == kv_offset + kv_length else None
        first = int(first)
    end = first + queries - kv_offset
    return end if queries <= end <= kv_length else None


def _narrowed(window: tuple[int, int], length: int) -> tuple[int, int]:
    left, right = (-1 if side >= length - 1 else side for side in window)
    return left, right


def _saying(
    visible: Visible,
    mask: Tensor,
    attention_mask: Tensor | None,
    kv_offset: int,
    position: int | Tensor,
) -> Tensor:
    """The mask of a decoded token. It carries what says the same, if that is in numbers alone."""
    if attention_mask is not None:
        if torch.compiler.is_compiling():  # where its padding is can't be looked at
            return mask
        padding = _left_padding(_keys(attention_mask, kv_offset, visible.end))
        if padding is None:
            return mask
        visible = visible._replace(left_padding=padding)
    end = position + 1 - kv_offset
    if isinstance(end, Tensor):
        lengths = end.to(mask.device, torch.int32).expand(mask.shape[0]).contiguous()
    else:
        lengths = torch.full(mask.shape[:1], end, dtype=torch.int32, device=mask.device)
    mask = mask.contiguous()  # as generate() will, of a tensor that carries nothing
    mask._fastattn_visible = visible._replace(lengths=lengths)  # type: ignore[attr-defined]
    return mask


def said_by(mask: Any) -> Any:
    """What a mask carries, or itself."""
    return getattr(mask, "_fastattn_visible", mask)


def _chunked(config: Any) -> bool:
    return getattr(config, "attention_chunk_size", None) is not None


def _keys(attention_mask: Tensor, offset: int, length: int) -> Tensor:
    """(B, length) bool, False = padding."""
    keys = attention_mask[:, offset : offset + length]
    if (missing := length - keys.shape[1]) > 0:
        keys = torch.nn.functional.pad(keys, (0, missing))
    return keys


def _real_keys(attention_mask: Tensor | None, offset: int, length: int) -> Tensor | None:
    """The same; None if there is no padding, as far as can be told."""
    if attention_mask is None:
        return None
    keys = _keys(attention_mask, offset, length)
    return None if not torch.compiler.is_compiling() and bool(keys.all()) else keys


def _left_padding(keys: Tensor) -> Tensor | None:
    """(B,) int32: how many keys are padding, if these are the first ones."""
    first = keys.int().argmax(1)
    return first.int() if torch.equal(keys.sum(1), keys.shape[1] - first) else None


# ---- packed sequences ----

_AND = and_masks().__code__
_SAME_SEQUENCE = packed_sequence_mask_function(torch.empty(0)).__code__
_WINDOW = masking_utils.sliding_window_overlay(0).__code__
# 5.x counts positions inside each sequence, 4.57 through all: in one sequence that is the same.
_REMAPPED = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
_REMAPPED = _REMAPPED(causal_mask_function, torch.empty(0)).__code__ if _REMAPPED else None


class Causal(NamedTuple):
    """transformers' causal mask function, with what it is narrowed by."""

    left: int  # keys of its window before the query; -1 = all
    segments: Tensor | None  # (B, S) numbers that tell packed sequences apart


def _known(mask_function: Callable) -> Causal | None:
    """What a mask function says; None if it is of any other make; plain under torch.compile.

    transformers tells by nothing but the function itself. It is known by its code, its contents by
    their names.
    """
    if torch.compiler.is_compiling():  # which can't look into functions
        return Causal(-1, None) if mask_function is causal_mask_function else None
    segments, left = None, -1
    parts = [mask_function]
    while parts:
        part = parts.pop()
        if part is causal_mask_function:
            continue
        contents, code = _contents(part), getattr(part, "__code__", None)
        if code is _AND:
            parts.extend(contents["mask_functions"])
        elif code is _REMAPPED:
            parts.append(contents["mask_function"])
        elif code is _WINDOW:
            left = contents["sliding_window"] - 1
        elif code is _SAME_SEQUENCE and segments is None:
            segments = contents["packed_sequence_mask"]
        else:
            return None
    return Causal(left, segments)


def _contents(function: Callable) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _offsets(segments: Tensor, left: int) -> Packed:
    """Of (B, S) numbers that change where a sequence ends; rows end one, too."""
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = starts.flatten().nonzero().flatten()
    cu_seqlens = torch.cat([first, first.new_tensor([segments.numel()])]).int()
    longest = int(cu_seqlens.diff().max())
    window = (-1 if left >= longest - 1 else left, 0)
    return Packed((cu_seqlens, cu_seqlens), (longest, longest), window)
