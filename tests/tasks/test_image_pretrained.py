"""Image classification from a pretrained folder: which tensors are taken, which are new, which folders are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import optim
from pipeline.errors import ConfigError
from pipeline.sections import Optim
from tests.tasks.test_image_classification import TINY, built, made_up, task_of


def test_a_pretrained_folder_gives_its_weights_and_a_new_head_for_other_classes(tmp_path: Path) -> None:
    task, pixels = task_of(), made_up()["image"].permute(0, 3, 1, 2).float()
    model = built(task).eval()
    model.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    loaded = built(task_of(architecture=None, model={}, pretrained=tmp_path / "saved"), seed=9).eval()
    assert torch.equal(loaded(pixel_values=pixels).logits, model(pixel_values=pixels).logits)

    seven = built(task_of(architecture=None, model={}, pretrained=tmp_path / "saved", classes=7))
    assert seven.classifier[1].weight.shape[0] == 7  # type: ignore[index]
    name = "resnet.embedder.embedder.convolution.weight"
    assert torch.equal(seven.state_dict()[name], model.state_dict()[name])

    with pytest.raises(ConfigError, match="takes 1 channels, not 3"):
        task_of(architecture=None, model={}, pretrained=tmp_path / "saved", channels=3).build_model()
    with pytest.raises(ConfigError, match=r"nowhere does not exist; give a folder"):
        task_of(architecture=None, model={}, pretrained=tmp_path / "nowhere").build_model()


def test_a_vision_transformer_is_fine_tuned_with_a_new_head_layer_by_layer(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    model = built(task_of(architecture="vit", model=sizes | {"patch_size": 4}))
    model.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    task = task_of(architecture=None, model={}, pretrained=tmp_path / "saved", classes=7)
    tuned, was = built(task, seed=9), dict(model.named_parameters())
    assert task.weights is not None
    assert task.weights.notes == ["new, not from saved: classifier.weight, classifier.bias"]
    for name, parameter in tuned.named_parameters():
        assert name.startswith("classifier.") or torch.equal(parameter, was[name]), name

    config = Optim(name="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75, freeze=("vit.embeddings.patch_*",))
    optim.freeze(tuned, config)
    rates = {n: g["lr_scale"] for g in optim.parameter_groups(tuned, config) for n in g["parameters"]}
    assert rates["classifier.weight"] == rates["vit.layernorm.bias"] == 1.0  # a new head learns at the full rate
    assert [rates[f"vit.layers.{i}.mlp.fc1.weight"] for i in range(3)] == [0.75**3, 0.75**2, 0.75]
    assert rates["vit.embeddings.cls_token"] == 0.75**4
    frozen = {name for name, parameter in tuned.named_parameters() if not parameter.requires_grad}
    assert (
        frozen
        == was.keys() - rates.keys()
        == {f"vit.embeddings.patch_embeddings.projection.{kind}" for kind in ("weight", "bias")}
    )

    task.loss(tuned, made_up(classes=7))[0].backward()
    assert all((parameter.grad is None) == (name in frozen) for name, parameter in tuned.named_parameters())


def test_what_is_new_and_what_is_not_used_is_said(tmp_path: Path) -> None:
    """Also with group norm in place of batch norm, whose statistics then have no place."""
    model = built(task_of())
    statistics = model.resnet.embedder.embedder.normalization.running_mean.fill_(0.25)  # type: ignore[index, union-attr]
    model.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    task = task_of(architecture=None, model={}, pretrained=tmp_path / "saved", classes=7)
    again, seven = built(task), built(task, seed=1)
    assert task.weights is not None
    assert task.weights.notes == ["new, not from saved: classifier.1.weight, classifier.1.bias"]
    assert not torch.equal(again.classifier[1].weight, seven.classifier[1].weight)  # type: ignore[index]
    assert torch.equal(again.resnet.embedder.embedder.normalization.running_mean, statistics)  # type: ignore[union-attr]

    group = built(task_of(architecture=None, model={}, pretrained=tmp_path / "saved", norm="group"))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(group.named_parameters())[name]), name

    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    save_file(tensors | {"resnet.other": torch.zeros(2)}, tmp_path / "saved" / "model.safetensors")
    more = task_of(architecture=None, model={}, pretrained=tmp_path / "saved")
    built(more)
    assert more.weights is not None and more.weights.notes == ["in saved, and not used: resnet.other"]


def test_folders_that_cannot_be_read_are_refused_with_the_mend(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    built(task_of()).save_pretrained(folder, max_shard_size="4kB")  # type: ignore[operator]
    task = task_of(architecture=None, model={}, pretrained=folder)
    file = sorted(folder.glob("model-*.safetensors"))[1]
    content = file.read_bytes()
    for damaged, words in ((content[:-4], "not copied whole"), (b"#" * 40, "does not begin as a safetensors file")):
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match=f"{file.name} cannot be read: .*{words}"):
            task.build_model()
    file.unlink()
    with pytest.raises(ConfigError, match=rf"{file.name} is missing; bring the folder again"):
        task.build_model()
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match=r"only pytorch_model.bin, a pickle.*save_pretrained"):
        task.build_model()


def test_tensors_of_other_shapes_are_named(tmp_path: Path) -> None:
    model = built(task_of())
    model.config.hidden_sizes = [8, 24]  # type: ignore[union-attr]
    model.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    with pytest.raises(ConfigError, match=r"of other shapes than its config.json: resnet\S+ is \[16, .*, not \[24, "):
        task_of(architecture=None, model={}, pretrained=tmp_path / "saved").build_model()


def test_a_pretrained_folder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    deeper = built(task_of(model=TINY | {"depths": [1, 2]}))
    built(task_of()).save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    deeper.config.save_pretrained(tmp_path / "saved")  # type: ignore[union-attr, operator]
    with pytest.raises(
        ConfigError, match=r"no weights for \d+ parameters of \w+, such as resnet.encoder.stages.1.layers.1"
    ):
        task_of(architecture=None, model={}, pretrained=tmp_path / "saved").build_model()
