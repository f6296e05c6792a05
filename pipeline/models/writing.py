"""Texts from a language model: a prompt becomes tokens, as the rows of training have them, and tokens become text.

prompt -> (chat template) -> tokens, behind the token that begins a document -> generation.write -> text
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline.data.pack.template import read_template
from pipeline.data.pack.tokenizer import decoder, load_tokenizer
from pipeline.data.vocabulary import Vocabulary
from pipeline.errors import ConfigError
from pipeline.sections import Strict

if TYPE_CHECKING:
    import torch


class Writing(Strict):
    """How text is written; the options of `millstream sample`."""

    tokens: int = Field(default=128, ge=1, description="tokens to add, at the most; the end of the text ends it")
    temperature: float = Field(default=0.8, ge=0, description="0: always the likeliest token; 1: as it was trained")
    top_p: float = Field(default=0.95, gt=0, le=1, description="only the likeliest tokens, with this share together")
    top_k: int | None = Field(default=None, ge=1, description="only so many of the likeliest tokens")
    chat: bool | None = Field(default=None, description="prompts are messages of a user; null: as the rows were packed")


def write_texts(
    model: Any,
    prompts: list[str],
    count: int,
    generator: torch.Generator,
    asked: Writing,
    tokenizer: Path,
    vocabulary: Vocabulary,
) -> list[tuple[str, int]]:
    """(text, tokens added) `count` times for each prompt: the prompt and what follows; in a chat the answer alone.

    Raises ConfigError when the network has no room for so many tokens, DataError when a chat has no template.
    """
    from pipeline.models import generation

    chat = vocabulary.chats if asked.chat is None else asked.chat
    template = read_template(tokenizer) if chat else None
    encoder, decode, end = load_tokenizer(tokenizer), decoder(tokenizer, vocabulary), vocabulary.end_of_text
    encoder.encode_special_tokens = not chat  # a template spells them
    draw = generation.Draw(vocabulary.size, asked.temperature, asked.top_k, asked.top_p)
    found: list[tuple[str, int]] = []
    for prompt in prompts or [""]:
        text = template.render([{"role": "user", "content": prompt}], prompt=True) if template else prompt
        own = encoder.encode(text, add_special_tokens=False).ids
        begin = own if chat or end is None else [end, *own]
        _check_room(model.config, prompt, len(begin), asked.tokens)
        shown = [] if chat else own
        for added in generation.write(model, begin, count, generator, tokens=asked.tokens, draw=draw, end=end):
            found.append((decode([*shown, *added]), len(added)))
    return found


def _check_room(config: Any, prompt: str, begun: int, added: int) -> None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if begun < 1:
        raise ConfigError("this tokenizer has no token that begins a text: give at least one --prompt")
    if isinstance(positions, int) and begun + added > positions:
        mend = f"ask for at most tokens={positions - begun}" if begun < positions else "give a shorter prompt"
        raise ConfigError(
            f"tokens={added} behind the {begun} of the prompt {prompt[:40]!r} need {begun + added} positions, and the "
            f"network has {positions}; {mend}"
        )
