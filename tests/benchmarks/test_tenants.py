"""The plan for many tenants against what can be counted by hand."""

import math
import random

import pytest

from tenants import Replica, choose, most_load, simulate, waits, zipf


def test_the_least_recently_used_leaves():
    """Two slots: a and b come in, a is there, c takes the place of b, b that of a."""
    replica = Replica(2, running=1)
    assert [replica.ask(adapter) for adapter in "abacb"] == [False, False, True, False, False]
    assert (replica.loads, [*replica.slots.of]) == (4, ["c", "b"])


def test_what_runs_keeps_its_slot():
    """Of two that run a is the older, but it has its slot until its answer ends: c takes that of b, which has ended."""
    replica = Replica(2, running=3)
    for adapter in "aba":
        replica.ask(adapter)
    assert not replica.ask("c")  # a ends, then b; the second a still runs
    assert [*replica.slots.of] == ["a", "c"]


def test_requests_find_the_replica_that_holds_their_adapter():
    """One slot each: a goes to one, b to the one that holds none, and from then on all are found."""
    replicas = [Replica(1, running=1), Replica(1, running=1)]
    assert simulate("abababaabb", replicas, "holder", seed=0) == [False, False] + [True] * 8
    assert sorted(replica.asked for replica in replicas) == [5, 5]
    draw = random.Random(0)
    assert {choose(replicas, "a", "any", draw) for _ in range(20)} == set(replicas)
    assert len({choose(replicas, "a", "holder", draw) for _ in range(20)}) == 1
    assert {choose(replicas, "c", "holder", draw) for _ in range(20)} == set(replicas)


def che(tenants, exponent, slots):
    """The hit rate of a least-recently-used cache in Che's approximation."""
    shares = [k**-exponent for k in range(1, tenants + 1)]
    shares = [share / sum(shares) for share in shares]
    low, high = 0.0, 1e9
    for _ in range(80):  # the time in which so many different ones ask as there are slots
        middle = (low + high) / 2
        full = sum(1 - math.exp(-share * middle) for share in shares) > slots
        low, high = (low, middle) if full else (middle, high)
    return sum(share * (1 - math.exp(-share * low)) for share in shares)


@pytest.mark.parametrize(("count", "route", "seen"), [(1, "any", 40), (2, "any", 40), (2, "holder", 80)])
def test_hit_rates_are_those_of_the_theory(count, route, seen):
    """Replicas asked at random are each a cache of their own slots; those asked by adapter one of all slots."""
    asked = zipf(500, 1.0, 40_000, seed=3)
    found = simulate(asked, [Replica(40, running=1) for _ in range(count)], route, seed=3)[10_000:]
    assert sum(found) / len(found) == pytest.approx(che(500, 1.0, seen), abs=0.015)


def test_waiting_is_erlangs():
    assert waits(1, 0.3) == pytest.approx(0.3)
    assert waits(2, 1.0) == pytest.approx(1 / 3)
    assert waits(3, 2.0) == pytest.approx(4 / 9)
    assert waits(2, 2.0) == 1.0
    load = most_load(16)
    assert waits(16, load) * math.exp(-(16 - load) * 0.1) == pytest.approx(0.01)
