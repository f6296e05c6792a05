"""Whether ranks that must hold the same weights do: one that computes wrongly is found before it spoils a checkpoint.

ZeRO 0 to 2 keep whole weights on every rank, ZeRO 3 small ones. Each rank reduces what it holds to one number a tensor
(torch.hash_tensor: the exclusive or of all elements, on the device), and the numbers of all ranks are compared. One bit
that differs is always seen. What it gives up: ZeRO's shards, which one rank alone holds; of those, every save checks
that they are what the forward pass reads.
"""

from __future__ import annotations

from collections import Counter

import torch
import xxhash

from pipeline.engine import Engine
from pipeline.session import World


class Diverged(RuntimeError):
    """Ranks hold other weights than they should. The attempt ends; the next goes on from the last checkpoint."""


def compare(engine: Engine, world: World, step: int) -> None:
    """Raises Diverged on all ranks, naming ranks and a tensor, unless all hold the same. All ranks call it together."""
    digests = _digests(engine)
    number = xxhash.xxh3_64_intdigest(b"".join(digest.to_bytes(8, "little") for digest in digests.values())) >> 24
    if len(set(world.gather([number])[:, 0])) == 1:
        return
    everyone = world.gather_objects(digests)
    for name in digests:
        values = [each[name] for each in everyone]
        if len(set(values)) > 1:
            raise Diverged(f"step {step}: {who(values)} in {name}; memory or arithmetic of a device is at fault")


def who(values: list[int]) -> str:
    """The ranks that are not like the most; all, when none are the most."""
    [(usual, count), *rest] = Counter(values).most_common()
    if rest and rest[0][1] == count:
        return f"ranks {', '.join(map(str, range(len(values))))} differ"
    odd = [str(rank) for rank, value in enumerate(values) if value != usual]
    return f"rank{'s' * (len(odd) > 1)} {', '.join(odd)} differ{'s' * (len(odd) == 1)} from the others"


def _digests(engine: Engine) -> dict[str, int]:
    held = [(name, p) for name, p in engine.module.named_parameters() if p.numel()]  # at stage 3 most are empty
    return {name: int(torch.hash_tensor(p.detach()).view(torch.int64).item()) % 2**64 for name, p in held}
