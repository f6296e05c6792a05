"""How a causal language model goes on: by its likeliest token for many rows at once, or by chance from a prompt.

    logits of the last token -> / temperature -> top-k -> top-p (Holtzman et al. 2020, arXiv 1904.09751) -> one draw

`likeliest` takes as many whole forward passes as it adds tokens, whatever the rows: so all ranks of a sharded network
call it alike. `write` belongs to a bare network of transformers and keeps what was computed: its own `generate`, where
only the draw is ours, from the generator that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


def likeliest(
    model: Callable[..., Any], inputs: Mapping[str, Tensor], begin: Tensor, turns: int, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """`turns` tokens after the first `begin` [m] ones of each row of `inputs` ("input_ids" and, where documents are
    kept apart, "position_ids", [m, width] each).

    Gives int64 [m, turns], and the logits [m, width, vocabulary] of the rows as they are.

    What is added belongs to the document that `begin` ends in.
    """
    tokens, positions = inputs["input_ids"].clone(), inputs.get("position_ids")
    width = tokens.shape[1]
    row = torch.arange(len(tokens), device=tokens.device)
    added: list[Tensor] = []
    first = torch.empty(0)
    for turn in range(turns):
        place = begin + turn  # attention is causal: what stands from there on in `tokens` is not seen
        own = {} if positions is None else {"position_ids": positions}
        logits = model(input_ids=tokens, **own, use_cache=False).logits[..., :vocabulary]  # [m, width, vocabulary]
        if turn == 0:
            first = logits
            if positions is not None:
                column, last = torch.arange(width, device=tokens.device), (begin - 1)[:, None]
                positions = torch.where(column > last, positions.gather(1, last) + column - last, positions)
        added.append(logits[row, place - 1].argmax(dim=-1))
        tokens[row, place.clamp(max=width - 1)] = added[-1]  # the last one may be behind the end, and is not read
    return torch.stack(added, dim=1), first


def write(
    model: Any,
    prompt: list[int],
    count: int,
    generator: torch.Generator,
    *,
    tokens: int,
    draw: Draw,
    end: int | None,
) -> list[list[int]]:
    """What `model` writes behind `prompt`, `count` times: at most `tokens` tokens each, up to `end` and without it."""
    device = next(model.parameters()).device
    start = torch.tensor([prompt] * count, device=device)  # [count, prompt]
    settings = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, use_cache=True, eos_token_id=end, pad_token_id=0 if end is None else end
    )
    own = LogitsProcessorList([_Chosen(draw, generator)])
    seen = {"attention_mask": torch.ones_like(start)} if "attention_mask" in signature(model.forward).parameters else {}
    whole = model.generate(start, generation_config=settings, logits_processor=own, **seen)
    written = whole[:, len(prompt) :].tolist()
    return [line[: line.index(end)] if end in line else line for line in written]


class Draw:
    """One token of each row by chance: from the `top_k` likeliest ones (None: all), and of these from the fewest that
    have together at least the share `top_p`. Temperature 0: the likeliest one. `vocabulary`: logits beyond it are none.
    """

    def __init__(self, vocabulary: int, temperature: float, top_k: int | None, top_p: float) -> None:
        self.vocabulary, self.temperature, self.top_k, self.top_p = vocabulary, temperature, top_k, top_p

    def __call__(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """logits [m, V] -> tokens int64 [m], on the host."""
        logits = logits[:, : self.vocabulary].float().cpu()
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        shares, tokens = (logits / self.temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            shares[:, self.top_k :] = 0
            shares /= shares.sum(dim=-1, keepdim=True)
        before = shares.cumsum(dim=-1) - shares  # [m, V], what the likelier ones have together
        shares = shares.masked_fill(before >= self.top_p, 0)
        place = torch.multinomial(shares, 1, generator=generator)  # [m, 1]
        return tokens.gather(1, place)[:, 0]


class _Chosen(LogitsProcessor):
    """Leaves one token of each row possible, the one that was drawn."""

    def __init__(self, draw: Draw, generator: torch.Generator) -> None:
        self._draw, self._generator = draw, generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self._draw(scores, self._generator).to(scores.device)  # [m]
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)
