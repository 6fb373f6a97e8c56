"""What a user may give as a prompt, brought to the one form the wire knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ndif_client.errors import graph_error
from ndif_client.wire.graph import MAX_PATH, MAX_PROMPTS, Chat, Invoke, Message
from ndif_client.wire.tensors import is_array

#: A text, token ids, or several of either; arrays and tensors of ids are taken too.
Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Any

#: A conversation, or several: each a list of `{"role": ..., "content": ...}`.
Messages = Sequence[Mapping[str, str]] | Sequence[Sequence[Mapping[str, str]]]


def as_invoke(
    prompt: Prompt | None, messages: Messages | None = None, decoder: Prompt | None = None
) -> Invoke:
    """Return the invoke for a prompt, or for conversations.

    Args:
        prompt: one or several.
        messages: a conversation in their place, or several.
        decoder: what the decoder of an encoder-decoder model reads, as many as prompts.

    Raises:
        GraphError: it is empty, neither text nor token ids, or there are both or neither.
    """
    prompts: list[str | list[int] | Chat]
    if messages is None:
        prompts = [*_several(prompt)]
    elif prompt is None:
        prompts = [*_chats(messages)]
    else:
        raise graph_error("give a prompt or messages=..., not both")
    if len(prompts) > MAX_PROMPTS:
        raise graph_error(f"{len(prompts)} prompts in one invoke; the limit is {MAX_PROMPTS}")
    beside = [] if decoder is None else _several(decoder)
    if decoder is not None and len(beside) != len(prompts):
        raise graph_error(
            f"decoder=... has {len(beside)} prompts, the encoder {len(prompts)}; give one for each"
        )
    return Invoke(prompts, beside)


def as_ids(ids: Any) -> list[int]:
    """Return token ids as a list: of one id, a list of them, or an array or tensor.

    Raises:
        GraphError: these are no token ids, or several rows of them.
    """
    if _is_id(ids):
        return _ids([ids])
    items = _items(ids)
    if len(items) == 1 and not _is_id(items[0]):
        items = _items(items[0])
    return _ids(items)


def _several(prompt: Prompt) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, Mapping):
        return _unpadded(prompt)
    items = _items(prompt)
    if not items:
        raise graph_error("the prompt is empty; give a text or at least one token id")
    if all(_is_id(item) for item in items):
        return [_ids(items)]
    return [item if isinstance(item, str) else _ids(_items(item)) for item in items]


def _unpadded(encoding: Mapping[str, Any]) -> list[str | list[int]]:
    """Return the ids of what a tokenizer returns, without its padding."""
    if "input_ids" not in encoding:
        raise graph_error(
            f"a prompt of several parts has input_ids, as tokenizers return it, not "
            f"{', '.join(map(str, encoding))}"
        )
    rows = _several(encoding["input_ids"])
    mask = encoding.get("attention_mask")
    if mask is None:
        return rows
    masks = _items(mask)
    if masks and _is_id(masks[0]):
        masks = [masks]
    if [len(row) for row in rows] != [len(own) for own in masks]:
        raise graph_error("attention_mask has not the shape of input_ids")
    return [_between(row, own) for row, own in zip(rows, masks, strict=True)]


def _between(row: str | list[int], mask: Sequence[int]) -> list[int]:
    """Return the ids between the padding before and after them."""
    kept = [place for place, counts in enumerate(mask) if counts]
    if not kept or kept[-1] - kept[0] + 1 != len(kept):
        raise graph_error("attention_mask leaves out more than padding before and after a prompt")
    assert not isinstance(row, str)
    return row[kept[0] : kept[-1] + 1]


def _chats(messages: Any) -> list[Chat]:
    if not isinstance(messages, list | tuple) or not messages:
        raise graph_error(
            'messages=... is a list of {"role": ..., "content": ...}, or a list of such lists'
        )
    if isinstance(messages[0], list | tuple):
        return [_chat(chat) for chat in messages]
    return [_chat(messages)]


def _chat(messages: Any) -> Chat:
    if not isinstance(messages, list | tuple) or not 0 < len(messages) <= MAX_PROMPTS:
        raise graph_error(f"a conversation is a list of 1 to {MAX_PROMPTS} messages")
    return Chat([_message(message) for message in messages])


def _message(message: Any) -> Message:
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise graph_error(
            f'a message is {{"role": ..., "content": ...}} and nothing else, not {message!r:.80}'
        )
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or not isinstance(content, str) or len(role) > MAX_PATH:
        raise graph_error(f"role and content of a message are texts, not {message!r:.80}")
    return Message(role, content)


def _items(prompt: Any) -> list[Any]:
    if is_array(prompt):
        if prompt.ndim not in (1, 2):
            raise graph_error(f"an array of token ids has one or two dimensions, not {prompt.ndim}")
        listed: list[Any] = prompt.tolist()
        return listed
    if isinstance(prompt, list | tuple | range):
        return list(prompt)
    if prompt is None:
        raise graph_error(
            "which prompt? every invoke has one of its own; what several invokes compute is joined "
            "by ops.cat([...])"
        )
    raise graph_error(
        f"a prompt is a text, a list of token ids, or a list of either, not {type(prompt).__name__}"
    )


def _ids(items: list[Any]) -> list[int]:
    if not items:
        raise graph_error("a prompt has no token ids; give at least one")
    for item in items:
        if not _is_id(item) or item < 0:
            raise graph_error(f"token ids are integers from 0, not {item!r}")
    return [int(item) for item in items]


def _is_id(item: Any) -> bool:
    if isinstance(item, bool | str | float) or not hasattr(item, "__index__"):
        return False
    return not is_array(item) or item.ndim == 0
