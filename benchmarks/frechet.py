"""How near new pictures are to real ones: the Frechet distance on features of a classifier that is trained here.

    real pictures -> a small convnet learns their classes -> its last features (64) of real and of new pictures
                  -> means m and covariances C -> |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))  (Heusel et al. 2017)

It is not the "FID" of papers, whose features are Inception's: numbers are to be compared with each other only. So
three others stand beside those of the run, from as many pictures each: held-out real ones (as near as can be hoped
for), the same network before training, and a Gaussian for each pixel by itself.

    python benchmarks/frechet.py runs/diffusion-digits --save
    python benchmarks/frechet.py runs/diffusion-digits --guidance 1 --guidance 3       # each a row more
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import report
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from pipeline import task_file
from pipeline.checkpoint import format as checkpoints
from pipeline.checkpoint.export import export
from pipeline.data.reader import open_dataset
from pipeline.tasks.diffusion import Config, Task

FEATURES, BATCH, EPOCHS = 64, 50, 6


class Set(NamedTuple):
    """Pictures float32 [n, C, H, W] in 0..1, and the class of each, int64 [n]."""

    pixels: Tensor
    label: Tensor


class Judge(nn.Module):
    """A convnet: [n, C, H, W] -> logits [n, classes]; `features` are what its last layer sees, [n, 64]."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 24, 5, 2, 2), nn.ReLU(), nn.Conv2d(24, 48, 5, 2, 2), nn.ReLU(), nn.Flatten(),
            nn.LazyLinear(FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, classes)

    def features(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(functional.dropout(self.features(pixels), 0.3, self.training))


def real(folder: Path, task: Task) -> Set:
    """All pictures of a data set, as the task prepares them."""
    dataset = open_dataset(folder)
    rows = [task.prepare(dataset.sample(number), None) for number in range(len(dataset))]
    label = [int(row.get("label", np.int64(0))) for row in rows]
    return Set(as_floats([row["image"] for row in rows]), torch.tensor(label))


def as_floats(pictures: list[Any]) -> Tensor:
    """uint8 [H, W, C] each -> [n, C, H, W] in 0..1."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def trained_judge(train: Set, classes: int) -> Judge:
    """Six epochs of AdamW, pictures moved by up to two pixels."""
    torch.manual_seed(0)
    judge = Judge(train.pixels.shape[1], classes)
    judge(train.pixels[:1])  # the lazy layer learns its size
    steps = EPOCHS * len(train.label) // BATCH
    optimizer = torch.optim.AdamW(judge.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(train.label), (BATCH,))
        down, right = torch.randint(-2, 3, (2,)).tolist()
        loss = functional.cross_entropy(judge(train.pixels[rows].roll((down, right), (2, 3))), train.label[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def frechet(one: Tensor, other: Tensor) -> float:
    """Between the Gaussians of two sets of features [n, d]; the root by eigenvalues, in fp64."""
    one, other = one.double(), other.double()
    cov_1, cov_2 = one.T.cov(), other.T.cov()
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    return float((one.mean(0) - other.mean(0)).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross)


def gaussian(train: Set, count: int) -> Set:
    """Each pixel by itself, with its mean and standard deviation in the real pictures, cut to 0..1."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn((count, *train.pixels.shape[1:]), generator=generator)
    return Set((train.pixels.mean(0) + train.pixels.std(0) * noise).clamp(0, 1), torch.zeros(count, dtype=torch.int64))


@torch.no_grad()
def drawn(task: Task, network: nn.Module, count: int, steps: int, guidance: float) -> Set:
    """As many pictures of each class, from a seed."""
    classes = task.config.classes
    prompts = [str(each) for each in range(classes)] if classes else []
    options = {"steps": str(steps), "guidance": str(guidance)}
    generator = torch.Generator().manual_seed(0)
    rows: list[Any] = task.sample(network.eval(), prompts, -(-count // max(1, len(prompts))), generator, options)
    return Set(as_floats([row["picture"] for row in rows]), torch.tensor([row.get("label", 0) for row in rows]))


def save_grid(new: Set, path: Path, columns: int = 12) -> None:
    """The first pictures of each class, a line each, a pixel apart on white."""
    lines = [new.pixels[new.label == each][:columns] for each in new.label.unique()]
    framed = [
        functional.pad(torch.cat(list(functional.pad(line, (0, 1, 0, 1), value=1.0)), -1), (1, 0)) for line in lines
    ]
    pixels = (torch.cat(framed, -2) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(path, optimize=True)


def networks(run: Path) -> tuple[Task, Any, Any]:
    """The task of a run, its network (the averages of its weights if there are), and the same one before training."""
    newest = checkpoints.list_checkpoints(run / "checkpoints")[-1]
    assert newest.manifest is not None, newest.damage
    config = task_file.validate(newest.manifest.config["task"])
    assert isinstance(config, Config), "frechet.py is for runs of the task diffusion"
    task = Task(config)
    with tempfile.TemporaryDirectory(prefix="millstream-frechet-") as folder:
        done = export(run, Path(folder) / "exported", ema=newest.manifest.config.get("ema") is not None)
        cls: Any = diffusers.UNet2DModel if config.architecture == "unet" else diffusers.DiTTransformer2DModel
        trained = cls.from_pretrained(done.folder, subfolder="unet", local_files_only=True)
    torch.manual_seed(0)
    return task, trained, task.build_model()


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare new pictures of a run with real ones")
    parser.add_argument("run", type=Path, help="a run of the task diffusion, with classes")
    parser.add_argument("--samples", type=int, default=1000, help="of each kind")
    parser.add_argument("--steps", type=int, default=25, help="of DDIM")
    parser.add_argument("--guidance", type=float, action="append", help="instead of the run's own; may be repeated")
    parser.add_argument("--grid", type=Path, help="PNG to write: some of the new pictures")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/frechet-<date>.md")
    plan = parser.parse_args()
    load, began = os.getloadavg()[0], time.perf_counter()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    task, trained, untrained = networks(plan.run)
    settings = checkpoints.list_checkpoints(plan.run / "checkpoints")[-1].manifest
    assert settings is not None
    [source, *_] = settings.config["data"]["train"].values()
    train = real(Path(source["folder"]), task)
    held_out = real(Path(next(iter(settings.config["data"]["evaluate"].values()))), task)
    judge = trained_judge(train, task.config.classes or 1)
    print(f"judge trained, {time.perf_counter() - began:.0f} s", flush=True)
    sets = {"held-out real pictures": Set(held_out.pixels[: plan.samples], held_out.label[: plan.samples])}
    for guidance in plan.guidance or [task.config.guidance]:
        sets[f"new, guidance {guidance:g}"] = drawn(task, trained, plan.samples, plan.steps, guidance)
        print(f"drawn with guidance {guidance:g}, {time.perf_counter() - began:.0f} s", flush=True)
    if plan.grid:
        save_grid(sets[f"new, guidance {(plan.guidance or [task.config.guidance])[0]:g}"], plan.grid)
    sets["new, before training"] = drawn(task, untrained, plan.samples, plan.steps, 1.0)
    sets["a Gaussian for each pixel"] = gaussian(train, plan.samples)
    rows = []
    with torch.no_grad():
        reference = judge.features(train.pixels)
        for name, each in sets.items():
            right = f"{float((judge(each.pixels).argmax(1) == each.label).float().mean()):.1%}"
            asked = "-" if "Gaussian" in name else right
            rows.append([name, f"{len(each.label):,}", f"{frechet(judge.features(each.pixels), reference):.2f}", asked])
    body = report.table(["pictures", "how many", "Frechet distance to the training set", "judged as their class"], rows)
    print(body)
    if plan.save:
        facts = [
            f"Features: the last {FEATURES} of a convnet trained here on the {len(train.label):,} training pictures, "
            f"right on {rows[0][3]} of the held-out ones; not Inception's, so no FID of a paper compares with it",
            f"Run {plan.run.name}, step {settings.step}, {plan.steps} steps of DDIM, seed 0, classes in equal shares"
            + (", averages of the weights" if settings.config.get("ema") else ""),
        ]
        page = report.page("How near new pictures are to real ones", facts, body + "\n", load)
        print(f"saved in {report.save('frechet', page)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
