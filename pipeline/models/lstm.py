"""A language model of LSTM layers (Hochreiter and Schmidhuber 1997), with the face of one of transformers.

    tokens -> embedding -> L times: x + LSTM(norm(x)) -> norm -> logits

Each layer is normalised and has a path around it, as in transformers that are trained today; the output matrix can be
the embedding (Press and Wolf 2017, arXiv 1608.05859). Imported, it is one of transformers' own to `AutoConfig` and
`AutoModelForCausalLM`, so that a pretrained folder, an export and `generate` are what they are for the others. What it
gives up: `from_pretrained` elsewhere needs this file imported first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

State = tuple[tuple[Tensor, Tensor], ...]
"""Of each layer: output and cell after the last token, [1, m, hidden_size] each."""


@strict
class LstmConfig(PreTrainedConfig):
    """`hidden_size` is that of embedding, layers and cells; `dropout` acts before each layer and before the logits."""

    model_type = "lstm"

    vocab_size: int = 8192
    hidden_size: int = 512
    num_hidden_layers: int = 2
    dropout: float = 0.0
    initializer_range: float = 0.02
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


@dataclass
class LstmOutput(ModelOutput):
    """`state`: where the next token goes on, when it was asked for."""

    logits: Tensor | None = None
    state: State | None = None


class _Lstm(nn.LSTM):
    """torch's own, without the weak references to its weights: they forbid that a weight gets its memory later, as
    those of a pretrained folder do. Whether weights were exchanged is seen from themselves.
    """

    def _init_flat_weights(self) -> None:
        super()._init_flat_weights()
        self._flat_weight_refs = []

    def _weights_have_changed(self) -> bool:
        held = zip(self._flat_weights_names, self._flat_weights, strict=True)
        return any(getattr(self, name) is not weight for name, weight in held)


class LstmLayer(GradientCheckpointingLayer):
    """[m, length, hidden] -> the same and the state after the last token."""

    def __init__(self, config: LstmConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.lstm = _Lstm(config.hidden_size, config.hidden_size, batch_first=True)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, after = self.lstm(self.dropout(self.norm(x)), state)
        return x + y, after


class LstmModel(nn.Module):
    """Tokens [m, length] -> the last layer's output [m, length, hidden], and the state of every layer."""

    def __init__(self, config: LstmConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LstmLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        x = self.embed_tokens(input_ids)
        after = []
        for layer, before in zip(self.layers, state or [None] * len(self.layers), strict=True):
            x, own = layer(x, before)
            after.append(own)
        return self.dropout(self.norm(x)), tuple(after)


class LstmForCausalLM(PreTrainedModel, GenerationMixin):
    """`input_ids` [m, length] -> `.logits` [m, length, vocabulary]; a state goes on where another call ended."""

    config_class = LstmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _is_stateful = True

    def __init__(self, config: LstmConfig) -> None:
        super().__init__(config)
        self.model = LstmModel(config)
        self.lm_head: nn.Linear = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.LSTM):
            bound = module.hidden_size**-0.5
            for name, parameter in module.named_parameters():
                if name.startswith("weight"):
                    init.uniform_(parameter, -bound, bound)
                else:
                    init.zeros_(parameter)
            # an open forget gate lets gradients through from the start (Jozefowicz et al. 2015)
            bias: Tensor = module.bias_ih_l0  # type: ignore[assignment]
            init.ones_(bias[module.hidden_size : 2 * module.hidden_size])

    def forward(
        self,
        input_ids: Tensor,
        state: State | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **unused: Any,
    ) -> LstmOutput:
        x, after = self.model(input_ids, state)  # [m, length, hidden]
        logits = self.lm_head(x[:, -logits_to_keep:])  # 0 keeps all
        return LstmOutput(logits=logits, state=after if use_cache else None)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, state: State | None = None, use_cache: bool | None = None, **unused: Any
    ) -> dict[str, Any]:
        """Only the last token, once there is a state of those before it."""
        new = input_ids if state is None else input_ids[:, -1:]
        return {"input_ids": new, "state": state, "use_cache": use_cache, "logits_to_keep": 1}


AutoConfig.register(LstmConfig.model_type, LstmConfig)
AutoModelForCausalLM.register(LstmConfig, LstmForCausalLM)
