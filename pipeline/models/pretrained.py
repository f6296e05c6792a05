"""A pretrained folder: which of its tensors is which parameter of a network, and each of them read when it is wanted.

    network on the meta device + folder --fit--> buffers and new head in memory, `Weights` for all other parameters

A network is built without memory for its parameters, and each is filled on its own by whoever shares them among the
ranks, so that no process ever holds all of it. Only safetensors are read: the older pickles can run any code. The
names of older folders are translated as transformers does it. What it gives up: folders whose tensors must be merged
first (the experts of a mixture, one by one); the error says how to write them anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models import tensor_file
from pipeline.models.tensor_file import DTYPES, Place

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Weights:
    """Where each parameter of a network lies in its folder. `notes`: a line for each thing to know."""

    places: dict[str, tuple[Path, Place]]
    notes: list[str]

    def read_into(self, name: str, target: Tensor) -> None:
        """Fill `target`, on the host, with the parameter of this name; raises DataError when its file is cut short."""
        tensor_file.read_into(target, *self.places[name])


def fit(module: Any, folder: Path, new_head: bool) -> Weights:
    """Give `module`, a network of transformers on the meta device, its buffers, and find its parameters in `folder`.

    `new_head`: what lies outside its base model may be missing or of another shape, and is drawn from torch's generator
    then. Raises ConfigError naming the tensors when any other is missing or of another shape, as a network that is
    silently half random trains well enough to fool, and when there are no safetensors to read.
    """
    found, unused = _translated(module, _tensors(folder), folder)
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    lost, misshapen = [], []
    for name in module.state_dict():
        if name not in tensors or _may_be_missing(module, name):
            continue  # another name of a tied parameter
        if name not in found:
            lost.append(name)
        elif found[name][1].shape != tuple(tensors[name].shape):
            misshapen.append(name)
    base = f"{module.base_model_prefix}."
    new = [name for name in [*lost, *misshapen] if new_head and not name.startswith(base)]
    lost, misshapen = ([name for name in names if name not in new] for names in (lost, misshapen))
    if lost:
        raise ConfigError(
            f"task.pretrained: {folder} has no weights for {len(lost)} parameters of {type(module).__name__}, such as "
            f"{_some(lost)}; give a folder of the same architecture, written whole"
        )
    if misshapen:
        each = (f"{n} is {list(found[n][1].shape)}, not {list(tensors[n].shape)}" for n in misshapen)
        raise ConfigError(f"task.pretrained: {folder} has tensors of other shapes than its config.json: {_some(each)}")
    materialize(module, new)
    for name, buffer in module.named_buffers():
        if name in found and name not in new:
            tensor_file.read_into(buffer, *found[name])
    notes = [f"new, not from {folder.name}: {', '.join(new)}"] if new else []
    notes += [f"in {folder.name}, and not used: {_some(unused)}"] if unused else []
    return Weights({name: found[name] for name, p in module.named_parameters() if p.is_meta}, notes)


def materialize(module: Any, new: Collection[str]) -> None:
    """Bring all buffers of a network on the meta device, and the `new` parameters, to the host as they begin."""
    for prefix, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if f"{prefix}.{name}".lstrip(".") in new:
                owner.register_parameter(name, nn.Parameter(torch.zeros_like(parameter, device="cpu")))
            else:
                parameter._is_hf_initialized = True  # transformers' own mark for "leave it alone"
        for name, buffer in owner.named_buffers(recurse=False):
            owner._buffers[name] = torch.zeros_like(buffer, device="cpu")
    module.initialize_weights()


def _tensors(folder: Path) -> dict[str, tuple[Path, Place]]:
    """All that lies in the safetensors of a folder, by name."""
    files: Iterable[str] = [SINGLE]
    if (folder / INDEX).is_file():
        files = sorted(set(_checked(folder / INDEX, lambda path: json.loads(path.read_text())["weight_map"].values())))
    elif not (folder / SINGLE).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        kind = f"only {pickles[0]}, a pickle, which can run any code when it is read" if pickles else "no weights"
        raise ConfigError(
            f"task.pretrained: {folder} holds {kind}; give a folder with {SINGLE} (`save_pretrained` writes one)"
        )
    found: dict[str, tuple[Path, Place]] = {}
    for name in files:
        path = folder / Path(name).name
        for tensor, place in _checked(path, _header).items():
            found[tensor] = path, place
    return found


def _header(path: Path) -> dict[str, Place]:
    with path.open("rb") as file:
        places = tensor_file.read_header(file)
        size = file.seek(0, 2)
    if max((place.end for place in places.values()), default=0) != size:
        raise ValueError("its size is not what its header says: it was not copied whole")
    return places


def _checked(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except FileNotFoundError:
        raise ConfigError(f"task.pretrained: {path} is missing; bring the folder again, with all its files") from None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"task.pretrained: {path} cannot be read: {error}; bring it again") from error


def _translated(
    module: Any, tensors: dict[str, tuple[Path, Place]], folder: Path
) -> tuple[dict[str, tuple[Path, Place]], list[str]]:
    """Where the tensors of `module` lie, by the one name under which it lists them, and what else there is."""
    from transformers import conversion_mapping, core_model_loading

    state = module.state_dict(keep_vars=True)
    rules = conversion_mapping.get_model_conversion_mapping(module)
    renamings = [rule for rule in rules if not isinstance(rule, core_model_loading.WeightConverter)]
    converters = [rule for rule in rules if isinstance(rule, core_model_loading.WeightConverter)]
    names = {id(tensor): name for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    found, unused = {}, []
    for name, (path, place) in tensors.items():
        own, merged = core_model_loading.rename_source_key(
            name,
            renamings,  # pyright: ignore[reportArgumentType]
            converters,
            module.base_model_prefix,
            state,
        )
        if merged is not None or place.dtype not in DTYPES:
            why = "must be merged with others" if merged else f"is of type {place.dtype}"
            raise ConfigError(
                f"task.pretrained: {folder}: {name} {why}, which is not done here; write the folder anew by "
                "`AutoModel.from_pretrained(FOLDER).save_pretrained(NEW, save_original_format=False)`"
            )
        if own in state:
            found[names[id(state[own])]] = path, place
        elif not _is_ignored(module, own):
            unused.append(name)
    return found, unused


def _may_be_missing(module: Any, name: str) -> bool:
    """Counters that nothing reads, and what the architecture itself says."""
    patterns = module._keys_to_ignore_on_load_missing or ()
    return name.endswith("num_batches_tracked") or any(re.search(pattern, name) for pattern in patterns)


def _is_ignored(module: Any, name: str) -> bool:
    """What older folders hold and nobody needs."""
    patterns = {*(module._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
    return any(re.search(pattern, name) for pattern in patterns)


def _some(names: Iterable[str]) -> str:
    every = list(names)
    return ", ".join(every[:3]) + (f" and {len(every) - 3} more" if len(every) > 3 else "")
