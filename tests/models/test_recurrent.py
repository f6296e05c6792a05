"""The recurrent classifier: padding changes nothing, to the bit; both cells, one way and both, bf16."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from pipeline.models.recurrent import RecurrentClassifier

KINDS = list(product(("lstm", "gru"), (True, False)))


def network(cell: str, both: bool) -> RecurrentClassifier:
    torch.manual_seed(0)
    return RecurrentClassifier(inputs=6, classes=3, cell=cell, width=8, layers=2, bidirectional=both, dropout=0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize(("cell", "both"), KINDS)
def test_what_lies_behind_a_sequence_changes_nothing(cell: str, both: bool) -> None:
    """More of it, and other numbers in it: the same logits and gradients."""
    model = network(cell, both).eval()
    features, lengths = torch.randn(3, 9, 6), torch.tensor([4, 9, 1])
    found = []
    for longer, noise in ((0, 0.0), (5, 1e6)):
        given = torch.full((3, 9 + longer, 6), noise)
        for row, length in enumerate(lengths.tolist()):
            given[row, :length] = features[row, :length]
        model.zero_grad()
        logits = model(given, lengths)
        logits.square().sum().backward()
        found.append([logits, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) > 8 and all(map(torch.equal, *found))


@pytest.mark.parametrize(("cell", "both"), KINDS)
def test_a_sequence_alone_gives_what_it_gives_among_others(cell: str, both: bool) -> None:
    model = network(cell, both).eval()
    features, lengths = torch.randn(3, 9, 6), torch.tensor([4, 9, 1])
    together = model(features, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = model(features[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(alone[0], together[row])


@pytest.mark.parametrize("both", [True, False])
def test_states_are_those_of_the_published_equations(both: bool) -> None:
    """One layer of LSTM, step by step; backwards for the other way."""
    torch.manual_seed(0)
    model = RecurrentClassifier(inputs=6, classes=3, width=8, layers=1, bidirectional=both)
    features = torch.randn(1, 5, 6)
    means = []
    for way in ("", "_reverse")[: 1 + both]:
        w_in, w_state, b_in, b_state = (
            getattr(model.recurrent, f"{name}_l0{way}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        assert b_in[8:16].tolist() == [1.0] * 8  # forgets nothing at first
        state, memory, states = torch.zeros(8), torch.zeros(8), []
        for step in features[0].flip(0) if way else features[0]:
            i, f, g, o = (w_in @ step + b_in + w_state @ state + b_state).chunk(4)
            memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
            state = o.sigmoid() * memory.tanh()
            states.append(state)
        means.append(torch.stack(states).mean(dim=0))
    expected = model.head(model.norm(torch.cat(means)))
    torch.testing.assert_close(model(features, torch.tensor([5]))[0], expected)


def test_it_runs_in_bf16() -> None:
    model = network("lstm", True).bfloat16()
    logits = model(torch.randn(2, 4, 6, dtype=torch.bfloat16), torch.tensor([2, 4]))
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
