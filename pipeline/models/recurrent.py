"""A recurrent classifier: LSTM (Hochreiter and Schmidhuber 1997) or GRU (Cho et al. 2014) over sequences of any length.

    features -> recurrent layers, one way or both -> mean over each sequence's own steps -> norm -> head

Sequences are packed, so no step is taken behind the end of any, in either direction: padding changes nothing, to the
bit.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

Cell = Literal["lstm", "gru"]


class RecurrentClassifier(nn.Module):
    """inputs: features of a step.  width: of the state of each layer and direction.  dropout: between layers, and
    before the head.
    """

    def __init__(
        self,
        *,
        inputs: int,
        classes: int,
        cell: Cell = "lstm",
        width: int = 128,
        layers: int = 2,
        bidirectional: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        kind = nn.LSTM if cell == "lstm" else nn.GRU
        between = dropout if layers > 1 else 0.0  # torch warns where there is nothing between
        self.recurrent = kind(inputs, width, layers, batch_first=True, dropout=between, bidirectional=bidirectional)
        states = width * (2 if bidirectional else 1)
        self.norm = nn.LayerNorm(states)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(states, classes)
        if cell == "lstm":  # at first a gate that forgets nothing (Jozefowicz et al. 2015)
            for name, bias in self.recurrent.named_parameters():
                if name.startswith("bias_ih"):  # the gates stand in the order input, forget, cell, output
                    nn.init.ones_(bias.data[width : 2 * width])

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """features [m, steps, inputs], lengths int64 [m] (1 to steps) -> logits [m, classes]."""
        packed = pack_padded_sequence(features, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.recurrent(packed)[0], batch_first=True)  # [m, longest, states], then 0
        mean = states.sum(dim=1) / lengths[:, None].to(states.dtype)
        return self.head(self.dropout(self.norm(mean)))

    def products(self) -> int:
        """Multiplications of one step forward: one for each weight of the recurrent layers."""
        return sum(weight.numel() for weight in self.recurrent.parameters() if weight.ndim == 2)
