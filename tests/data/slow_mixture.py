"""The order of a mixture by moving things about in lists: slow, and written from the rules, not from the formulas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain, count, islice

from pipeline.data.draws import DEALS, HANDS
from pipeline.data.order import Order
from tests.data.test_order import slow_epoch, slow_key, slow_place

Row = tuple[int, int, int]  # source, epoch, number


def slow_draws(counts: tuple[int, ...], seed: int, lane: int) -> Iterator[int]:
    """The sources of a lane's draws, for ever."""
    tickets = [source for source, tickets in enumerate(counts) for _ in range(tickets)]
    hands_of_block = len(tickets) // 1024
    bits = hands_of_block.bit_length() - 1
    for block in count():
        turn = slow_key(seed, DEALS, lane, block) % hands_of_block
        hands: list[list[int]] = [[] for _ in range(hands_of_block)]
        for number, ticket in enumerate(tickets):
            digits = [number >> bit & 1 for bit in range(bits)]  # the lowest first: read as if it were the highest
            turned = sum(digit << place for place, digit in enumerate(reversed(digits)))
            hands[turned ^ turn].append(ticket)
        for h, hand in enumerate(hands):
            key = slow_key(seed, HANDS, lane, block * hands_of_block + h)
            yield from (hand[slow_place(card, 1024, key)] for card in range(1024))


class SlowSource:
    """A source's lanes, and how far each has come. parts: (first epoch, the order of a data set from there on)."""

    def __init__(self, order: Order, epoch: int = 0) -> None:
        self.parts = [(epoch, order)]
        self.taken = [0] * order.lanes
        self.seen: Counter[tuple[int, int]] = Counter()  # (epoch, number)
        self._begin()

    def _begin(self) -> None:
        self.lanes = [islice(self._lane(lane), taken, None) for lane, taken in enumerate(self.taken)]

    def _lane(self, lane: int) -> Iterator[tuple[int, int]]:
        for (first, order), (end, _) in zip(self.parts, [*self.parts[1:], (None, None)]):
            for epoch in count(first) if end is None else range(first, end):
                yield from ((epoch, number) for number in slow_epoch(order, epoch)[lane])

    def next(self, lane: int) -> tuple[int, int]:
        found = next(self.lanes[lane])
        self.taken[lane] += 1
        self.seen[found] += 1
        return found

    @property
    def reached(self) -> int:
        return max((epoch for epoch, _ in self.seen), default=self.parts[0][0] - 1)

    def grow(self, order: Order) -> int:
        """The samples of `order` from the next epoch edge on; returns the epoch."""
        edge = self.reached + 1
        self.parts = [part for part in self.parts if part[0] < edge] + [(edge, order)]
        self._begin()
        return edge

    def check(self) -> None:
        """Nothing came twice in its epoch, and in those that all lanes have left behind all samples came."""
        assert set(self.seen.values()) <= {1}
        coming = min(next(self._peek(lane))[0] for lane in range(len(self.taken)))
        ends = [epoch for epoch, _ in self.parts[1:]] + [coming]
        for (first, order), end in zip(self.parts, ends):
            for epoch in range(first, min(end, coming)):
                assert all(self.seen[epoch, number] == 1 for number in range(order.samples))
                assert sum(when == epoch for when, _ in self.seen) == order.samples

    def _peek(self, lane: int) -> Iterator[tuple[int, int]]:
        return islice(self._lane(lane), self.taken[lane], None)


class SlowMixture:
    """Steps of sources that carry on; `sources` and `counts` may be changed between two steps by `again`."""

    def __init__(self, sources: list[SlowSource], counts: tuple[int, ...], seed: int, global_batch: int) -> None:
        self.again(sources, counts, seed, global_batch)

    def again(self, sources: list[SlowSource], counts: tuple[int, ...], seed: int, global_batch: int) -> None:
        self.sources, self.global_batch = sources, global_batch
        self.draws = [slow_draws(counts, seed, lane) for lane in range(len(sources[0].taken))]

    def step(self) -> list[Row]:
        depth = self.global_batch // len(self.draws)
        rows = ((lane, source) for lane, draws in enumerate(self.draws) for source in islice(draws, depth))
        return [(source, *self.sources[source].next(lane)) for lane, source in rows]

    def steps(self, number: int) -> list[Row]:
        return list(chain.from_iterable(self.step() for _ in range(number)))
