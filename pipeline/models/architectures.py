"""The networks of transformers: a model type and options, or a pretrained folder -> nn.Module in fp32.

Options are the fields of that type's own configuration class, so its documentation is the reference. Transformers
takes any keyword and forgets those it does not know; here they are refused, with the nearest field that exists.
Networks of our own with the same face (lstm.py) are model types like the others. Nothing is ever downloaded. What it
gives up: model types whose code is not part of transformers ("remote code").
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

from pipeline.errors import ConfigError
from pipeline.problems import nearest

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

    from pipeline.models.pretrained import Weights

Head = Literal["image classification", "causal language modeling"]
HEADS: tuple[Head, ...] = get_args(Head)
OWN: dict[Head, dict[str, str]] = {"causal language modeling": {"lstm": "LstmForCausalLM"}}  # files here, their classes


def configure(
    head: Head,
    architecture: str,
    options: Mapping[str, Any],
    *,
    follows: Mapping[str, Any] = MappingProxyType({}),
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> PreTrainedConfig:
    """The transformers configuration of `architecture` (a model type such as "resnet" or "llama") with `options` set.

    `follows` are fields whose value follows from other keys of the task: set where the type has them, refused in
    `options`. `defaults` are ours instead of the type's: set where the type has them and `options` say nothing.
    Raises ConfigError, with all unknown options at once, when type, options or their values do not fit.
    """
    import transformers

    known_types = sorted(model_names(head))
    if architecture not in known_types:
        hint = nearest(architecture, known_types) or f"known: {', '.join(known_types)}"
        raise ConfigError(f"task.architecture: transformers has no {architecture!r} for {head}; {hint}")
    _know_own(architecture)
    config_class = transformers.AutoConfig.for_model(architecture).__class__
    fields = option_names(config_class)
    problems = [
        f"task.model.{name}: follows from the task's other keys; remove it" for name in options if name in follows
    ]
    for name in options:
        if name not in fields and name not in follows:
            hint = nearest(name, fields) or f"known: {', '.join(sorted(fields))}"
            problems.append(f"task.model.{name}: {config_class.__name__} has no such field; {hint}")
    if problems:
        raise ConfigError("\n".join(problems))
    ours = {name: value for name, value in {**defaults, **follows}.items() if name in fields or name == "num_labels"}
    return _checked(config_class, {**ours, **options})


def option_names(config_class: type[PreTrainedConfig]) -> set[str]:
    """What may be set for a model type: fields of its own class, not the base class's bookkeeping, and aliases."""
    import transformers

    inherited = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    fields = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    return {name for name in fields - inherited if not name.startswith("_")} - {"use_cache"}


def without_dropout(config: PreTrainedConfig, chosen: Iterable[str]) -> None:
    """Set to 0 every dropout rate that is not among the `chosen` options, in place: pretraining uses none."""
    for name in option_names(type(config)) - set(chosen):
        value = getattr(config, name, None)
        if ("drop" in name and "path" not in name) and isinstance(value, float) and value > 0:
            setattr(config, name, 0.0)


def build(head: Head, config: PreTrainedConfig) -> nn.Module:
    """A network with fresh weights, fp32, drawn from torch's generator. Raises ConfigError when sizes do not fit."""
    import torch

    try:
        return auto_class(head).from_config(config, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        raise ConfigError(f"task.model: {type(config).__name__} cannot be built: {error}") from error


def empty(head: Head, config: PreTrainedConfig) -> nn.Module:
    """A network whose parameters have shapes and no memory, and whose buffers are as they begin. Raises ConfigError."""
    from pipeline.models import pretrained

    module = _on_meta(head, config)
    pretrained.materialize(module, ())
    return module


def pretrained_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a pretrained folder. Raises ConfigError when there is none."""
    import transformers

    if not (folder / "config.json").is_file():
        what = "holds no config.json" if folder.is_dir() else "does not exist"
        raise ConfigError(
            f"task.pretrained: {folder} {what}; give a folder that `save_pretrained` or "
            "`millstream checkpoint export` wrote (nothing is downloaded)"
        )
    try:
        _know_own(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"task.pretrained: {folder}/config.json cannot be read: {error}") from error


def kept_config(description: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration that a checkpoint keeps of its network (exported.describe)."""
    import transformers

    _know_own(description["model_type"])
    values = transformers.PreTrainedConfig._decode_special_floats(dict(description))  # JSON has no infinity
    return transformers.AutoConfig.for_model(values["model_type"]).from_dict(values)


def load(head: Head, folder: Path, config: PreTrainedConfig, new_head: bool = False) -> tuple[nn.Module, Weights]:
    """The network of a pretrained folder: its parameters still on the meta device, and where to read each of them.

    `new_head`: the folder's head is for something else, and may start anew. Raises ConfigError (see pretrained.fit).
    """
    from pipeline.models import pretrained

    module = _on_meta(head, config)
    return module, pretrained.fit(module, folder, new_head)


def has_head(head: Head, config: PreTrainedConfig) -> bool:
    """Whether a pretrained folder with this configuration says that it has this kind of head."""
    return any(name in model_names(head).values() for name in config.architectures or ())


def _know_own(model_type: str | None) -> None:
    if any(model_type in names for names in OWN.values()):
        own_module(str(model_type))


def _on_meta(head: Head, config: PreTrainedConfig) -> nn.Module:
    import torch

    with torch.device("meta"):
        return build(head, config)


def _checked(config_class: type[PreTrainedConfig], values: dict[str, Any]) -> PreTrainedConfig:
    from huggingface_hub.errors import StrictDataclassError

    try:
        return config_class(**values)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"task.model: {config_class.__name__} refuses these options: {reason}") from error


def auto_class(head: Head) -> Any:
    """The class of transformers that opens networks with this head."""
    import transformers

    return {
        "image classification": transformers.AutoModelForImageClassification,
        "causal language modeling": transformers.AutoModelForCausalLM,
    }[head]


def model_names(head: Head) -> Mapping[str, Any]:
    """Model type -> name of its class with this head."""
    from transformers.models.auto import modeling_auto

    theirs = {
        "image classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "causal language modeling": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }[head]
    return {**theirs, **OWN.get(head, {})}


def class_named(name: str) -> Any:
    """The class of a network by its name, of transformers or our own; None when there is none."""
    import transformers

    own = [module for names in OWN.values() for module, each in names.items() if each == name]
    return getattr(own_module(own[0]) if own else transformers, name, None)


def own_module(model_type: str) -> ModuleType:
    """The file of a network that is our own; from then on transformers' automatic classes know it too."""
    return importlib.import_module(f"pipeline.models.{model_type}")
