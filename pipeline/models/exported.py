"""What transformers or diffusers expect in a folder that `from_pretrained` opens: tensors, their names, and settings.

    description (kept in a checkpoint) -> rebuild: the network without its weights -> stored: names in the folder
                                                                                   -> write_settings: config.json

A description is the network's config.json. The names are those that the library's own `save_pretrained` would give:
for transformers tied weights once, and for some architectures other names than in the module. A network of diffusers is
one part of a pipeline, in a folder of its own (`unet`, as its pipelines of pixels call it); a task that knows the
scheduler adds it and model_index.json. What it gives up: where `save_pretrained` would also split tensors (the experts
of a mixture), they stay as the module has them; transformers opens both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.models import architectures

if TYPE_CHECKING:
    from torch import Tensor, nn


PIPELINE = "model_index.json"  # what makes a folder a pipeline of diffusers
PART = "unet"  # folder and name of the network in it


def describe(module: nn.Module) -> dict[str, Any]:
    """The config.json of a network of transformers or diffusers; {} of any other module."""
    config: Any = getattr(module, "config", None)
    if package(module) == "diffusers" and hasattr(module, "to_json_string"):
        return json.loads(module.to_json_string())  # type: ignore[operator]
    if not hasattr(config, "to_json_string") or not hasattr(module, "all_tied_weights_keys"):
        return {}
    return json.loads(config.to_json_string(use_diff=False)) | {"architectures": [type(module).__name__]}


def rebuild(description: Mapping[str, Any]) -> nn.Module:
    """The network that was described: parameters on the meta device, buffers as they are before training.

    Raises ValueError when the installed library has no such class or it refuses the description.
    """
    import torch

    if "_class_name" in description:
        import diffusers

        cls = getattr(diffusers, description["_class_name"], None)
        if cls is None:
            raise ValueError(f"diffusers {diffusers.__version__} has no {description['_class_name']}")
        with torch.device("meta"):  # its buffers are tables that follow from the description, and are not stored
            return cls.from_config(dict(description))
    import transformers

    from pipeline.models import pretrained

    [name] = description["architectures"]
    cls = architectures.class_named(name)
    if cls is None:
        raise ValueError(f"transformers {transformers.__version__} has no {name}")
    config = architectures.kept_config(description)
    with torch.device("meta"):
        module = cls._from_config(config, dtype=torch.float32)
    pretrained.materialize(module, ())
    return module


def stored(module: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Name in the folder -> (name in the module, tensor), each tensor once, in the module's order."""
    if package(module) == "diffusers":
        return {name: (name, tensor) for name, tensor in module.state_dict(keep_vars=True).items()}
    from transformers.core_model_loading import revert_weight_conversion

    tied, ignored = module.all_tied_weights_keys, module._keys_to_ignore_on_save or ()
    chosen: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name not in ignored and (id(tensor) not in chosen or chosen[id(tensor)][0] in tied):  # type: ignore[operator]
            chosen[id(tensor)] = name, tensor
    own = dict(chosen.values())
    renamed = {id(tensor): name for name, tensor in revert_weight_conversion(module, dict(own)).items()}  # type: ignore[arg-type]
    return {renamed.get(id(tensor), name): (name, tensor) for name, tensor in own.items()}


def write_settings(module: nn.Module, folder: Path, dtype: str) -> None:
    """config.json, and generation_config.json where the network can generate."""
    if package(module) == "diffusers":
        module.save_config(folder / PART)  # type: ignore[operator]
        return
    from transformers import GenerationConfig

    config: Any = module.config
    config.dtype = dtype
    if hasattr(config, "use_cache"):
        config.use_cache = True  # training has no use for it; generating text has
    config.architectures = [type(module).__name__]
    config.save_pretrained(folder)
    if module.can_generate():  # type: ignore[operator]
        GenerationConfig.from_model_config(config).save_pretrained(folder)


def needs(module: nn.Module) -> str | None:
    """What must be imported before transformers opens the folder: the file of a network that is our own."""
    place = type(module).__module__
    return place if place.startswith("pipeline.") else None


def write_image_processor(folder: Path, size: int, share: float, mean: list[float], std: list[float]) -> None:
    """preprocessor_config.json: images cut, resized and normalised as in training, for transformers' image processor.

    share: of the side of the largest centred square, which is cut out and becomes [size, size]. mean, std: by channel.
    """
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": round(size / share)},
        "resample": 2,  # Pillow's bilinear, as wide as the image is shrunk
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
        "do_convert_rgb": len(mean) == 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def package(module: nn.Module) -> str:
    """The package that opens its folder: "diffusers" for a class of that, else "transformers"."""
    return "diffusers" if type(module).__module__.startswith("diffusers.") else "transformers"


def weights_name(module: nn.Module) -> str:
    """Where the weights lie in the folder, without the extension and the number of a part."""
    return f"{PART}/diffusion_pytorch_model" if package(module) == "diffusers" else "model"


def opener(module: nn.Module, folder: Path) -> str:
    """The class of its library to open the folder with, once all but the tensors has been written into it."""
    name = type(module).__name__
    if package(module) == "diffusers":
        if not (folder / PIPELINE).is_file():
            return name
        return json.loads((folder / PIPELINE).read_text(encoding="utf-8"))["_class_name"]
    for head in architectures.HEADS:
        if name in architectures.model_names(head).values():
            return architectures.auto_class(head).__name__
    return name
