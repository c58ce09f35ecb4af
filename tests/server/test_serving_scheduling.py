"""Who takes part in a tick: fair shares, short requests first, nobody waits for ever."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalti.serving.scheduling import Candidate, FairClock, SchedulingSettings, choose

SETTINGS = SchedulingSettings(max_rows=8, express_calls=4, express_seconds=1.0, aged_seconds=10.0)


def candidate(number, tenant="a", key="k", rows=2, weight=1.0, calls=20, left=None, arrived=0.0, **more):
    moments = {"last_step": arrived, "deadline": None} | more
    left = calls if left is None else left
    return Candidate(number, tenant, key, rows, 49.0 * rows, weight, calls, left, arrived, **moments)


def clock_of(*tenants):
    clock = FairClock()
    for tenant in tenants:
        clock.arrive(tenant)
    return clock


def chosen(candidates, clock=None, now=1.0, lead=0.0, settings=SETTINGS, step=0.01):
    clock = clock or clock_of(*{c.tenant for c in candidates})
    return choose(candidates, clock, settings, now, step, lead)


def simulate(candidates, ticks, settings=SETTINGS):
    """Rows x tokens that each tenant received."""
    clock = clock_of(*{c.tenant for c in candidates})
    received = dict.fromkeys(clock.tenants, 0.0)
    for tick in range(ticks):
        picked = set(chosen(candidates, clock, now=0.01 * tick, settings=settings).numbers)
        for c in candidates:
            if c.number in picked:
                received[c.tenant] += c.step_cost
                clock.charge(c.tenant, c.step_cost, c.weight)
        clock.settle(clock.tenants)
    return received


def test_nothing_gives_nothing():
    assert chosen([], clock_of()).numbers == ()


def test_the_oldest_of_a_tenant_go_first():
    assert chosen([candidate(i, arrived=-i) for i in range(6)]).numbers == (5, 4, 3, 2)


def test_a_flood_does_not_drown_another_tenant():
    flood = [candidate(i) for i in range(50)]
    received = simulate([*flood, candidate(90, "b"), candidate(91, "b")], 200)
    assert received["b"] == pytest.approx(received["a"], rel=0.05)


def test_weights_are_shares():
    many = [candidate(i, "a", weight=3.0) for i in range(20)] + [candidate(i, "b") for i in range(20, 40)]
    received = simulate(many, 400)
    assert received["a"] / received["b"] == pytest.approx(3.0, rel=0.05)


def test_having_been_away_earns_no_credit():
    clock = clock_of("a")
    for _ in range(100):
        clock.charge("a", 98.0, 1.0)
        clock.settle(["a"])
    clock.arrive("b")
    assert clock.tenants["b"] == clock.tenants["a"]


def test_short_plans_have_ticks_of_their_own():
    mix = [candidate(i) for i in range(4)] + [candidate(9, calls=4, arrived=5.0)]
    choice = chosen(mix)
    assert (choice.numbers, choice.express) == ((9,), True)


def test_express_ticks_cannot_starve_the_others():
    mix = [candidate(i) for i in range(4)] + [candidate(9, calls=4, arrived=5.0)]
    choice = chosen(mix, lead=1.0)
    assert choice.numbers == (0, 1, 2, 3)
    assert not choice.express
    alone = chosen([candidate(9, calls=4)], lead=1.0)  # nobody waits for it
    assert alone.numbers == (9,)


def test_the_aged_go_first():
    mix = [candidate(i, "a", calls=4) for i in range(8)] + [candidate(9, "b", last_step=-20.0)]
    assert chosen(mix).numbers[0] == 9


def test_a_deadline_that_is_near_goes_first():
    mix = [candidate(i) for i in range(8)]
    late = candidate(9, arrived=0.5, deadline=1.2)
    assert chosen([*mix, late], step=0.01).numbers[0] == 9
    assert 9 not in chosen([*mix, replace(late, deadline=100.0)], step=0.01).numbers


candidates = st.lists(
    st.builds(
        candidate,
        number=st.integers(0, 10**6),
        tenant=st.sampled_from("abc"),
        key=st.sampled_from("kl"),
        rows=st.integers(1, 10),
        weight=st.sampled_from([0.5, 1.0, 4.0]),
        calls=st.integers(1, 50),
        arrived=st.floats(-30, 1),
        deadline=st.none() | st.floats(0, 3),
    ),
    max_size=30,
    unique_by=lambda c: c.number,
)


@given(candidates, st.floats(0, 3))
def test_a_tick_is_of_one_key_and_fits(mix, lead):
    choice = chosen(mix, clock_of("a", "b", "c"), lead=lead)
    by_number = {c.number: c for c in mix}
    picked = [by_number[number] for number in choice.numbers]
    assert bool(picked) == bool(mix)
    assert len(set(choice.numbers)) == len(choice.numbers)
    assert len({c.key for c in picked}) <= 1
    assert sum(c.rows for c in picked) <= 8 or len(picked) == 1
