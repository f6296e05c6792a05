"""W&B as a reader of the journal: `sink` feeds it, `segments` reads and mends its files, `sync` sends them later."""

from pipeline.track.wandb.sink import Wandb

__all__ = ["Wandb"]
