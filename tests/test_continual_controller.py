"""AIMMerging's controller: the published recurrences to the letter, and each fix by its switch."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from arma_mergekit.continual.controller import TRAIN, Controller, ControllerSettings, Replay, weights

PUBLISHED = ControllerSettings(controller="published")


def run(controller, losses, changes):
    """(step, replay, weights, interval after) of every merge."""
    changes, found = iter(changes), []
    for loss in losses:
        answer = controller.after_step(loss)
        if answer != TRAIN:
            merge = controller.merge(next(changes))
            assert merge.replay == answer.steps
            found.append((merge.step, answer.steps, (merge.inner, merge.outer), controller.state.interval))
    return found


# --- a trace worked by hand


def test_the_worked_trace_of_a_calm_task():
    """h never reaches twice its mean, so every merge is forced, 2 S steps after the last: flag 1, weights .6 and .4.

    Lambda = change / S: 1, 1, 2 (cold start), then 4 >= 2: S = int(8 * 2/4) = 4, M = 4, J = 64 + 4, forced at 72;
    then 2 < 4 : S = min(128, int(4 * (4/2 + 1))) = 12, M = 12, J = 72 + 12, forced at 96.
    """
    changes = [8, 8, 16, 32, 8]
    assert run(Controller(PUBLISHED), [1.0] * 96, [*changes, 12.0]) == [
        (16, 8, (0.6, 0.4), 8),
        (32, 8, (0.6, 0.4), 8),
        (48, 8, (0.6, 0.4), 8),
        (64, 8, (0.6, 0.4), 4),
        (72, 4, (0.6, 0.4), 12),
        (96, 12, (0.6, 0.4), 36),  # Lambda 1 < 2: int(12 * (2 + 1))
    ]


def test_one_spike_merges_when_due_and_two_change_the_weights():
    calm = [1.0] * 6  # int(2*8/3)+1 losses, so delta = 2 from the seventh step on
    assert run(Controller(PUBLISHED), [*calm, 2.0, 1.0], [1]) == [(8, 8, (0.6, 0.4), 8)]
    assert run(Controller(PUBLISHED), [*calm, 2.0, 2.0], [1]) == [(8, 8, (0.5, 0.5), 8)]
    assert run(Controller(PUBLISHED), [*calm, 1.99, 1.0], []) == []


def test_a_step_without_a_measurement_says_nothing():
    sparse = [1.0, None, None, None, 1.0, None, None, None]  # delta = 2, from the seventh step on
    assert run(Controller(PUBLISHED), [*sparse, 3.0], [1]) == [(9, 8, (0.6, 0.4), 8)]
    assert run(Controller(PUBLISHED), [*sparse, 1.0, *[None] * 7], [1]) == [(16, 8, (0.6, 0.4), 8)]


def test_three_spikes_do_not_wait():
    chosen = ControllerSettings(controller="published", interval=16)
    calm = [1.0] * 11
    assert run(Controller(chosen), [*calm, 2, 2, 2], [1]) == [(14, 8, (0.5, 0.5), 16)]


def test_a_spike_among_the_first_losses_raises_the_threshold_only():
    assert run(Controller(PUBLISHED), [1, 1, 1, 1, 1, 9, 4.0, 1.0], []) == []  # delta = 2 * 14/6 = 4.67


@pytest.mark.parametrize(
    ("interval", "flag", "wanted"),
    [(70, 1, (0.6, 0.4)), (70, 2, (0.5, 0.5)), (71, 1, (0.5, 0.5)), (71, 2, (0.4, 0.6)), (8, 3, (0.5, 0.5))],
)
def test_weights_depend_on_interval_and_flag(interval, flag, wanted):
    assert weights(interval, flag) == wanted


@pytest.mark.parametrize(
    ("interval", "last", "new", "wanted"),
    [
        (8, 1.0, 1.0, 8),  # as large: int(8 * 1)
        (8, 1.0, 2.0, 4),
        (8, 1.0, 100.0, 2),  # not below S_min
        (100, 1.0, 1.25, 40),  # int(80) is still >= 64: halved
        (100, 1.0, 2.0, 50),
        (8, 2.0, 1.0, 24),  # int(8 * (2 + 1))
        (63, 1.1, 1.0, 128),  # not above S_max
        (64, 1.2, 1.0, 108),  # int(64 * (1.2 + .5))
        (8, 1.0, 0.0, 128),  # nothing was learned: the longest
        (8, 0.0, 0.0, 8),
    ],
)
def test_the_next_interval(interval, last, new, wanted):
    controller = Controller(ControllerSettings(controller="published", cold_start=1))
    controller.state.interval, controller.state.signals = interval, [last]
    controller.state.waiting, controller.state.step = True, 1
    controller.merge(new * interval)
    assert controller.state.interval == wanted


def reference(losses, changes, s0=8, m0=8, s_min=2, s_max=128, factor=2.0, cold=3):
    """The recurrences as one loop, written from the formulas."""
    S, M, J, flag, buffer, signals, found = s0, m0, s0, 0, [], [], []
    changes = iter(changes)
    for k, h in enumerate(losses, 1):
        n = int(2 * S / 3) + 1
        if len(buffer) < n:
            buffer.append(h)
        else:
            delta = factor * sum(buffer) / n
            if h >= delta or k >= J + S:
                flag += 1
        if (k >= J and flag >= 1) or flag >= 3:
            pair = (
                ((0.5, 0.5) if S <= 70 else (0.4, 0.6)) if flag > 1 else (0.6, 0.4) if S <= 70 else (0.5, 0.5)
            )
            found.append((k, M, pair))
            signals.append(next(changes) / S)
            if len(signals) > cold:
                last, new = signals[-2:]
                if new >= last:
                    S = max(s_min, int(S * last / new))
                    S = S // 2 if S >= 64 else S
                else:
                    S = min(s_max, int(S * (last / new + (1 if S < 64 else 0.5))))
            M, J, flag, buffer = int(S * m0 / s0), k + S, 0, []
    return found


@settings(max_examples=40)
@given(
    st.lists(st.floats(0.01, 10), max_size=400),
    st.lists(st.integers(0, 10), min_size=250, max_size=250),
)
def test_published_is_the_recurrences_to_the_letter(losses, exponents):
    changes = [float(2**e) for e in exponents]  # powers of two, so that S Lambda_last/Lambda has no rounding
    found = run(Controller(PUBLISHED), losses, changes)
    assert [merge[:3] for merge in found] == reference(losses, changes)


# --- switches


def test_the_signal_divides_by_elapsed_or_planned_steps():
    for signal, wanted in (("elapsed", 1.0), ("planned", 2.0)):
        controller = Controller(ControllerSettings(signal=signal))
        for _ in range(16):
            controller.after_step(1.0)
        assert controller.merge(16.0).signal == wanted


def test_the_last_steps_are_merged_unless_published():
    for given_, wanted in ((ControllerSettings(), Replay(8)), (PUBLISHED, TRAIN)):
        controller = Controller(given_)
        controller.after_step(1.0)
        assert controller.at_end() == wanted
    assert Controller(ControllerSettings()).at_end() == TRAIN  # nothing happened


@pytest.mark.parametrize(("trained", "wanted"), [(0, 0), (1, 1), (5, 5), (8, 8), (13, 8)])
def test_the_replay_of_a_last_interval_is_in_proportion_to_what_was_trained(trained, wanted):
    controller = Controller(ControllerSettings())
    for _ in range(trained):
        assert controller.after_step(1.0) == TRAIN
    assert controller.last_replay() == wanted


def test_published_sets_switches_that_are_not_given():
    assert (PUBLISHED.signal, PUBLISHED.merge_at_end) == ("planned", False)
    assert ControllerSettings(controller="published", merge_at_end=True).merge_at_end


def window(changes, **given):
    first = {
        "controller": "window",
        "window": 3,
        "shrink": 2,
        "grow": 1.5,
        "cold_start": 1,
        "signal": "planned",
    }
    controller, intervals = Controller(ControllerSettings(**(first | given))), []
    for change in changes:
        while controller.after_step(1.0) == TRAIN:
            pass
        controller.merge(change * controller.state.interval)
        intervals.append(controller.state.interval)
    return intervals


def test_a_window_shrinks_on_rising_and_grows_on_falling_signals():
    assert window([1, 2, 3, 4]) == [8, 4, 2, 2]
    assert window([4, 3, 2, 1]) == [8, 12, 18, 27]
    assert window([1, 1, 1]) == [8, 8, 8]
    assert window([1, 2, 1], window=2) == [8, 4, 4]  # one rise, one fall


def test_a_window_needs_its_factors_and_they_need_a_window():
    with pytest.raises(ValidationError, match="needs window, shrink and grow"):
        ControllerSettings(controller="window", window=3)
    with pytest.raises(ValidationError, match="grow needs controller: window"):
        ControllerSettings(grow=2)
    with pytest.raises(ValidationError, match="must lie between"):
        ControllerSettings(interval=1)


# --- state


@settings(max_examples=40)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=120), st.integers(0, 119))
def test_a_controller_goes_on_from_its_json_exactly(losses, cut):
    changes = [1.0 + k % 5 for k in range(120)]
    whole = run(Controller(ControllerSettings(interval=3)), losses, changes)
    first = Controller(ControllerSettings(interval=3))
    before = run(first, losses[:cut], changes)
    second = Controller(ControllerSettings(interval=3), json.loads(json.dumps(first.to_json())))
    assert before + run(second, losses[cut:], changes[len(before) :]) == whole


def test_what_is_out_of_turn_or_no_number_is_refused():
    controller = Controller(ControllerSettings())
    with pytest.raises(ValueError, match="nothing to merge"):
        controller.merge(1.0)
    with pytest.raises(ValueError, match="must be finite"):
        controller.after_step(float("nan"))
    controller.after_step(1.0)
    controller.at_end()
    with pytest.raises(ValueError, match="waits for a merge"):
        controller.after_step(1.0)
    with pytest.raises(ValueError, match="state has"):
        Controller(ControllerSettings(), {"step": 1})
