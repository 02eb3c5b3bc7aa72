"""The warm-up, stable, decay schedule."""

import math

import pytest

from fat5.optim import WarmupStableDecay


def test_its_three_phases():
    factor = WarmupStableDecay(steps=100, warmup_steps=10, decay_steps=20, decay="linear", final=0.1)
    assert [factor(s) for s in (0, 5, 10, 50, 80)] == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert factor(90) == pytest.approx(0.55)
    assert factor(99) == pytest.approx(0.1 + 0.9 * 0.05)
    assert factor(100) == factor(1000) == 0.1


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_the_shapes_of_the_decay(shape, half):
    factor = WarmupStableDecay(100, 0, 40, decay=shape)
    assert factor(60) == 1.0
    assert factor(80) == pytest.approx(half)
    values = [factor(s) for s in range(60, 101)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == 0.0


def test_a_longer_run_begins_as_the_shorter_one_up_to_its_decay():
    short, long = WarmupStableDecay(100, 10, 20), WarmupStableDecay(300, 10, 20)
    assert [short(s) for s in range(80)] == [long(s) for s in range(80)]
    assert short(99) != long(99)


def test_after_a_decay_the_rate_rises_again_and_decays_at_the_new_end():
    first = WarmupStableDecay(100, 10, 20, final=0.1)
    second = WarmupStableDecay(300, 10, 20, final=0.1, earlier_ends=[100], rewarm_steps=10)
    assert [first(s) for s in range(100)] == [second(s) for s in range(100)]
    assert second(100) == pytest.approx(0.1)
    assert second(105) == pytest.approx(0.55)
    assert {second(s) for s in range(110, 281)} == {1.0}
    assert second(300) == 0.1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"decay_steps": 95}, "from step 0 to 100 there is no room for 10 steps of warm-up and 95 of decay"),
        ({"earlier_ends": [90]}, "from step 90 to 100 there is no room"),
        ({"decay": "steep"}, "decay must be one of linear, cosine, sqrt"),
        ({"final": 1.0}, "final must be"),
        ({"decay_steps": 0}, "decay_steps must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        WarmupStableDecay(**({"steps": 100, "warmup_steps": 10, "decay_steps": 20} | wrong))
