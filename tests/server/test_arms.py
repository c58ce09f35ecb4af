"""Arms: the split, its stickiness, rollback, shadows and swaps, over a double whose versions come and go."""

import asyncio
import contextlib
import random
from collections import Counter, deque
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from server.double_service import card, picture
from server.doubles_jobs import VersionedDouble, ended, new_job, running_jobs, until
from server.ticket_ends import end_of, ends_of

from smalti.errors import UserError
from smalti.serving.arms import Arms, ArmSettings, choose_arm, experiment_id, is_worse, sticky_point
from smalti.serving.messages import Failed, Finished, PictureOrder
from smalti.serving.service import NotReady, QueueFull, Unavailable
from smalti.serving.shadow import TENANT, compare_pictures

A, B, C = (card(version=letter * 12) for letter in "abc")
EAGER = ArmSettings(window=40, min_outcomes=20, max_excess=0.2)


def order(seed=0, **changes) -> PictureOrder:
    return PictureOrder(**(dict(seed=seed, class_label=1, num_inference_steps=1) | changes))


async def drawn(arms, seeds, model="digits", **changes):
    """The last events of pictures, one request each, 30 at a time."""
    ends = []
    for begin in range(0, len(seeds), 30):
        batch = seeds[begin : begin + 30]
        tickets = [arms.submit(model, [order(seed, request_id=f"r{seed}", **changes)])[0] for seed in batch]
        ends += await ends_of(tickets)
    return ends


def run(work):
    return asyncio.run(asyncio.wait_for(work, 20))


def state_of(arms):
    (state,) = arms.arms_state()
    return state


@contextlib.asynccontextmanager
async def two_arms(weights, settings=EAGER, **rest):
    service = VersionedDouble(A, B, step_seconds=0.0, **rest)
    arms = Arms(service, settings)
    arms.set_arms("digits", dict(zip((A.key, B.key), weights, strict=True)))
    yield service, arms
    await arms.close()


# --- the split


@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=6).filter(lambda weights: sum(weights) > 1e-3),
    st.floats(0, 1, exclude_max=True),
)
def test_only_arms_with_weight_are_chosen(weights, point):
    chosen = choose_arm(weights, point)
    assert weights[chosen] > 0
    assert (
        choose_arm([weight * 3 for weight in weights], point) == chosen
        or point > 0.99
        or min(abs(point - sum(weights[: i + 1]) / sum(weights)) for i in range(len(weights))) < 1e-9
    )


@pytest.mark.parametrize("weights", [(1, 1), (9, 1), (0.2, 0.5, 0.3), (99, 1)])
def test_keys_are_split_by_weight(weights):
    """Keys are as if drawn: three deviations of 1,000 fair ones are 4.7 points, those of 10,000 are 1.5."""
    for experiment in ("one", "two", "three", experiment_id("digits", [A.key, B.key])):
        for count in (1000, 10_000):
            chosen = Counter(choose_arm(weights, sticky_point(experiment, f"user-{i}")) for i in range(count))
            for i, weight in enumerate(weights):
                share = weight / sum(weights)
                assert abs(chosen[i] / count - share) < 3.5 * (share * (1 - share) / count) ** 0.5
                assert count < 10_000 or abs(chosen[i] / count - share) < 0.02


@pytest.mark.parametrize("weights", [(1, 1), (9, 1), (2, 5), (99, 1)])
def test_a_thousand_requests_are_split_within_a_point(weights):
    async def work():
        async with two_arms(weights, room=2000) as (_, arms):
            for i in range(1000):
                arms.submit("digits", [order(i)])
                for arm, weight in zip(state_of(arms).arms, weights, strict=True):
                    # From the beginning on, not only in the end.
                    assert abs(arm.accepted - (i + 1) * weight / sum(weights)) < 5
            await asyncio.sleep(0.05)

    run(work())


@settings(max_examples=30)
@given(st.text(max_size=20), st.text(max_size=20))
def test_points_are_fixed_and_inside(experiment, key):
    assert 0 <= sticky_point(experiment, key) == sticky_point(experiment, key) < 1


def test_an_arm_that_is_taken_out_moves_only_its_own_keys():
    points = [sticky_point("x", str(i)) for i in range(1000)]
    before = [choose_arm((0.5, 0.5), point) for point in points]
    after = [choose_arm((0.5, 0.0), point) for point in points]
    assert all(now == then for now, then in zip(after, before, strict=True) if then == 0)
    # From 10 % to 20 %: nobody leaves the new arm.
    few, more = ([choose_arm((1 - w, w), point) for point in points] for w in (0.1, 0.2))
    assert all(now == 1 for now, then in zip(more, few, strict=True) if then == 1)


def test_requests_stick_by_user_then_by_tenant():
    async def work():
        async with two_arms((1, 1)) as (service, arms):

            def arm_of(**changes):
                return arms.submit("digits", [order(**changes)])[0].card.key

            for i in range(20):
                by_user = {arm_of(user=f"u{i}", tenant=f"t{j}", request_id=f"r{j}") for j in range(3)}
                by_tenant = {arm_of(tenant=f"t{i}", request_id=f"r{j}") for j in range(3)}
                assert len(by_user) == len(by_tenant) == 1
                await until(lambda: not service.live)
            assert {key for key, _ in service.orders} == {A.key, B.key}
            assert not any(o.user for _, o in service.orders)  # who asked is not the workers' to know
            # All pictures of one request come from one arm.
            for i in range(10):
                tickets = arms.submit("digits", [order(seed, request_id=f"x{i}") for seed in range(4)])
                assert len({ticket.card.key for ticket in tickets}) == 1
                await ends_of(tickets)
            again = Arms(VersionedDouble(A, B))
            again.set_arms("digits", {B.key: 1.0, A.key: 1.0})
            assert state_of(again).id == state_of(arms).id == experiment_id("digits", [A.key, B.key])

    run(work())


def test_a_pinned_version_passes_by():
    async def work():
        async with two_arms((1, 0)) as (_, arms):
            assert {t.card.key for i in range(9) for t in arms.submit("digits", [order(i)])} == {A.key}
            assert arms.submit(B.key, [order()])[0].card.key == B.key
            with pytest.raises(UserError, match="unknown model"):
                arms.submit("letters", [order()])
            assert [c.key for c in arms.cards()] == [A.key, B.key]

    run(work())


@pytest.mark.parametrize(
    ("weights", "shadow", "message"),
    [
        ({"digits@ffffffffffff": 1.0}, None, "unknown version"),
        ({A.key: 0.0}, None, "must be numbers"),
        ({A.key: -1.0, B.key: 2.0}, None, "must be numbers"),
        ({A.key: float("nan")}, None, "must be numbers"),
        ({A.key: 1.0}, "digits@ffffffffffff", "unknown version"),
    ],
)
def test_wrong_arms_are_refused_and_change_nothing(weights, shadow, message):
    async def work():
        async with two_arms((1, 0)) as (_, arms):
            before = state_of(arms)
            with pytest.raises(UserError, match=message):
                arms.set_arms("digits", weights, shadow)
            assert state_of(arms) == before

    run(work())


# --- rollback


def test_an_arm_that_fails_is_rolled_back_and_says_why():
    async def work():
        async with two_arms((1, 1)) as (service, arms):
            service.failing[B.key] = 0.5
            await drawn(arms, range(300))
            state = state_of(arms)
            assert [arm.weight for arm in state.arms] == [1, 0]
            (event,) = [event for event in state.events if event.kind == "rolled_back"]
            assert B.key in event.message
            assert "%" in event.message
            accepted = state.arms[1].accepted
            assert 20 <= accepted <= 60  # soon: of the 150 it would have had
            await drawn(arms, range(300, 330))
            assert state_of(arms).arms[1].accepted == accepted

    run(work())


def test_what_ails_both_arms_rolls_back_none():
    async def work():
        async with two_arms((1, 1)) as (service, arms):
            service.failing = {A.key: 0.5, B.key: 0.5}
            await drawn(arms, range(300))
            assert [arm.weight for arm in state_of(arms).arms] == [1, 1]

    run(work())


def test_the_callers_mistakes_and_cancels_are_no_arms_fault():
    async def work():
        async with two_arms((1, 1)) as (_, arms):
            ends = await drawn(arms, range(150), solver="none_such")
            assert {end.code for end in ends} == {"invalid_request"}
            for i in range(60):
                (ticket,) = arms.submit("digits", [order(i, request_id=f"c{i}", num_inference_steps=1000)])
                ticket.cancel()
                assert (await end_of(ticket)).code == "cancelled"
            state = state_of(arms)
            assert [(arm.weight, arm.outcomes) for arm in state.arms] == [(1, 0), (1, 0)]

    run(work())


def test_an_arm_without_workers_is_rolled_back():
    async def work():
        async with two_arms((1, 1)) as (service, arms):
            submit = service.submit

            def submit_to_some(model, orders):
                if model == B.key:
                    raise NotReady("no worker stays alive", 1.0)
                return submit(model, orders)

            service.submit = submit_to_some
            refused = 0
            for i in range(200):
                try:
                    await end_of(arms.submit("digits", [order(i, request_id=f"r{i}")])[0])
                except Unavailable:
                    refused += 1
            assert 20 <= refused <= 30
            assert [arm.weight for arm in state_of(arms).arms] == [1, 0]

    run(work())


OUTCOMES = st.tuples(st.integers(0, 40), st.sampled_from([1, 2, 3, 5, 20])).map(
    lambda t: [i % t[1] == 0 for i in range(3 * t[0])]
)


@given(OUTCOMES, OUTCOMES)
@example([], [True] * 30)
@example([False] * 19, [True] * 30)
def test_rollback_happens_exactly_by_its_rule(control_fails, arm_fails):
    """The windows, kept here once more by hand, tell when."""
    arms = Arms(VersionedDouble(A, B), EAGER)
    arms.set_arms("digits", {A.key: 1.0, B.key: 1.0})
    arm_set = arms._set("digits")
    done, failed = Finished(1, b"", 1, 1, 1, 1.0, 0, 0.0, 0.0), Failed(1, "not_finite", "")
    for fails in control_fails:
        arms._ended(arm_set, arm_set.arms[0], failed if fails else done)
    window = control_fails[-40:]
    for i, fails in enumerate(arm_fails, 1):
        own = arm_fails[max(0, i - 40) : i]
        arms._ended(arm_set, arm_set.arms[1], failed if fails else done)
        if len(own) >= 20 and len(window) >= 20 and is_worse(own, window, 0.2):
            assert arm_set.arms[1].weight == 0
            return
        assert arm_set.arms[1].weight == 1


def test_worse_is_more_than_the_threshold_and_more_than_chance():
    def outcomes(failures, count):
        return [True] * failures + [False] * (count - failures)

    assert is_worse(outcomes(20, 100), outcomes(2, 100), 0.1)
    assert not is_worse(outcomes(11, 100), outcomes(2, 100), 0.1)  # not beyond the threshold
    assert not is_worse(outcomes(12, 20), outcomes(9, 20), 0.1)  # 15 points, of which chance makes as many
    assert is_worse(outcomes(20, 20), [], 0.1) == is_worse(outcomes(20, 20), outcomes(0, 20), 0.1) == True  # noqa: E712


def test_equal_arms_are_seldom_rolled_back():
    """How often chance takes an arm out, of 100 experiments of 1,000 pictures an arm that fail at the same share."""
    generator = random.Random(0)
    for share, most in ((0.02, 0), (0.2, 1), (0.5, 1)):
        wrong = 0
        for _ in range(100):
            windows = [deque(maxlen=200), deque(maxlen=200)]
            for i in range(1000):
                for window in windows:
                    window.append(generator.random() < share)
                if i >= 50 and is_worse(*windows, 0.1):
                    wrong += 1
                    break
        assert wrong <= most, (share, wrong)


# --- shadows


def test_a_shadow_draws_the_same_orders_and_is_compared():
    async def work():
        service = VersionedDouble(A, B, step_seconds=0.0)
        arms = Arms(service)
        arms.set_arms("digits", {A.key: 1.0}, shadow=B.key)
        ends = []
        for seed in range(20):
            ends += await drawn(arms, [seed], tenant="alice", partial_images=2)
            await arms.settled()
        live, shadows = ([o for key, o in service.orders if key == c.key] for c in (A, B))
        assert [(o.seed, o.class_label) for o in shadows] == [(o.seed, o.class_label) for o in live]
        assert {(o.tenant, o.weight, o.partial_images) for o in shadows} == {(TENANT, 0.05, 0)}
        shadow = state_of(arms).shadow
        assert (shadow.compared, shadow.skipped, shadow.failed) == (20, 0, 0)
        pairs = [(picture(o, A.version), picture(o, B.version)) for o in live]
        found = [compare_pictures(*pair) for pair in pairs]
        assert shadow.mean_difference == pytest.approx(sum(d.mean for d in found) / 20)
        assert shadow.equal_share == pytest.approx(sum(d.equal for d in found) / 20)
        assert shadow.mean_difference > 0
        assert all(isinstance(end, Finished) for end in ends)

    run(work())


def test_a_shadow_never_delays_or_fails_the_live_one():
    async def work():
        service = VersionedDouble(A, B, step_seconds=0.001, room=8)
        arms = Arms(service, ArmSettings(shadow_limit=8, shadow_room=0.1))
        arms.set_arms("digits", {A.key: 1.0}, shadow=B.key)
        submit = service.submit

        def broken(model, orders):
            if model == B.key:
                raise RuntimeError("the shadow is broken")
            return submit(model, orders)

        service.submit = broken
        for batch in range(4):
            assert all(isinstance(end, Finished) for end in await drawn(arms, range(batch, batch + 5)))
        assert state_of(arms).shadow.skipped == 20
        service.submit = submit
        service.failing[B.key] = 1.0
        assert all(isinstance(end, Finished) for end in await drawn(arms, range(4)))
        await arms.settled()
        assert state_of(arms).shadow.failed == 4
        assert [arm.weight for arm in state_of(arms).arms] == [1]

    run(work())


def test_shadows_give_their_place_in_the_queue_to_the_live():
    async def work():
        service = VersionedDouble(A, B, step_seconds=0.0, room=8)
        # As the supervisor does, the double forgets a cancelled picture at once.
        arms = Arms(service, ArmSettings(shadow_limit=6, shadow_room=0.0))
        arms.set_arms("digits", {A.key: 1.0}, shadow=B.key)
        service.step_seconds = 0.02
        ends = await ends_of(arms.submit("digits", [order(i)])[0] for i in range(6))
        assert all(isinstance(end, Finished) for end in ends)
        assert sum(ticket.card.key == B.key for ticket in service.live.values()) == 6
        for ticket in list(service.live.values()):
            drop = ticket.cancel
            ticket.cancel = lambda drop=drop, number=ticket.number: (drop(), service.live.pop(number, None))
        tickets = arms.submit("digits", [order(seed) for seed in range(8)])
        assert len(tickets) == 8
        with pytest.raises(QueueFull):
            arms.submit("digits", [order()])
        assert all(isinstance(end, Finished) for end in await ends_of(tickets))
        await arms.settled()
        assert state_of(arms).shadow.skipped >= 6

    run(work())


def test_pictures_are_compared_by_their_values():
    import io

    from PIL import Image

    def file(value, size=(4, 2), format="png", mode="L"):
        written = io.BytesIO()
        Image.new(mode, size, value).save(written, format)
        return written.getvalue()

    assert compare_pictures(file(10), file(10)).mean == 0
    found = compare_pictures(file((10, 20, 30), mode="RGB"), file((10, 26, 30), mode="RGB"))
    assert (found.mean, found.equal) == (pytest.approx(2.0), pytest.approx(2 / 3))
    found = compare_pictures(file(10, mode="L"), file((13, 13, 13), mode="RGB"))
    assert (found.mean, found.equal) == (3.0, 0.0)
    assert compare_pictures(file(10), file(10, (5, 2))) is None


# --- swaps


def test_a_swap_loses_no_request(tmp_path):
    async def work():
        service = VersionedDouble(A, step_seconds=0.001, room=10_000, load_seconds=0.05)
        arms = Arms(service)
        ends, stop = [], False

        async def ask():
            seed = 0
            while not stop:
                seed += 1
                (ticket,) = arms.submit("digits", [order(seed, num_inference_steps=20)])
                ends.append((ticket.card.key, await end_of(ticket)))

        asking = [asyncio.create_task(ask()) for _ in range(5)]
        await asyncio.sleep(0.05)
        assert (await arms.swap("digits", Path("b" * 12))).key == B.key
        assert {arms.submit("digits", [order(i)])[0].card.key for i in range(5)} == {B.key}
        assert state_of(arms).retiring == (A.key,)
        await asyncio.sleep(0.05)
        stop = True
        await asyncio.gather(*asking)
        await arms.settled()
        assert all(isinstance(end, Finished) for _, end in ends)
        keys = [key for key, _ in ends]
        assert set(keys) == {A.key, B.key}
        assert service.retired == [A.key]
        assert [c.key for c in arms.cards()] == [B.key]
        assert [event.kind for event in state_of(arms).events] == ["swapped", "retired"]

    run(work())


def test_a_run_that_cannot_be_loaded_leaves_the_old_one():
    async def work():
        service = VersionedDouble(A)
        arms = Arms(service)
        for change in (arms.swap, arms.add_version):
            with pytest.raises(UserError, match="checksum"):
                await change("digits", Path("broken"))
        assert arms.submit("digits", [order()])[0].card.key == A.key
        with pytest.raises(UserError, match="served already"):
            await arms.swap("digits", Path("a" * 12))
        assert not service.retired
        with pytest.raises(UserError, match="unknown model"):
            await arms.swap("letters", Path("b" * 12))

    run(work())


def test_swaps_at_once_happen_one_after_the_other():
    async def work():
        service = VersionedDouble(A)
        arms = Arms(service)
        await asyncio.gather(*(arms.swap("digits", Path(letter * 12)) for letter in "bcde"))
        await arms.settled()
        assert len(service.cards()) == 1
        assert len(service.retired) == 4
        assert service.most_loading == 1  # each needs memory of its own
        assert arms.submit("digits", [order()])[0].card.key == service.cards()[0].key

    run(work())


def test_a_version_that_is_added_waits_for_its_weight():
    async def work():
        arms = Arms(VersionedDouble(A))
        await arms.add_version("digits", Path("b" * 12))
        assert {arms.submit("digits", [order(i)])[0].card.key for i in range(20)} == {A.key}
        arms.set_arms("digits", {A.key: 0.0, B.key: 1.0})
        assert {arms.submit("digits", [order(i)])[0].card.key for i in range(20)} == {B.key}
        with pytest.raises(UserError, match="is an arm"):
            await arms.retire_version(B.key)
        arms.set_arms("digits", {B.key: 1.0}, shadow=A.key)
        await arms.retire_version(A.key)
        assert state_of(arms).shadow is None
        assert [c.key for c in arms.cards()] == [B.key]

    run(work())


def test_jobs_go_through_arms_and_keep_their_version(tmp_path):
    async def work():
        service = VersionedDouble(A, step_seconds=0.01)
        arms = Arms(service)
        async with running_jobs(tmp_path / "jobs.db", arms) as jobs:
            made, _ = await jobs.create(new_job(n=3, steps=20))
            await arms.swap("digits", Path("b" * 12))
            later, _ = await jobs.create(new_job(steps=1))
            assert (made.card, later.card) == (A.key, B.key)
            job, _ = await ended(jobs, made.id)
            assert (job.status, {p.card for p in job.pictures}) == ("succeeded", {A.key})
            await arms.settled()

    run(work())
