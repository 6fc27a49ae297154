"""Group sizes chosen per matrix: the rule written out, planted outliers, stacks, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from memjax import codecs, weights
from tests.random_views import array


def outliers(w):
    return w.at[..., 5, :].multiply(60).at[..., 700, :].multiply(60)


def matrices():
    plain = array(0, 1024, 4)
    return {
        "a": {"kernel": plain},
        "b": {"kernel": outliers(plain)},
        "s": {"kernel": jnp.stack([plain, outliers(plain)])},
    }


def mean_range(column_groups):
    return np.mean([group.max() - group.min() for group in column_groups])


def chosen_by_range(w, alpha):
    """The paper's walk from one group per column to finer ones, for a matrix [K, N]."""
    sizes = [len(w), *(size for size in (512, 256, 128, 64, 32) if size < len(w))]
    group = sizes[0]
    for finer in sizes[1:]:
        here, there = (
            mean_range([w[i : i + size, n] for n in range(w.shape[1]) for i in range(0, len(w), size)])
            for size in (group, finer)
        )
        assert there <= here
        if there / here >= alpha ** np.log2(group / finer):
            break
        group = finer
    return group


@pytest.mark.parametrize("alpha", [0.9, 0.93])
def test_groups_are_those_of_the_rule(alpha):
    params = matrices()
    plan = weights.finequant(params, bits=3, alpha=alpha)
    groups = {path: int(np.min(group)) for path, group in plan.chosen.items()}
    for name in "ab":
        assert groups[f"{name}/kernel"] == chosen_by_range(np.asarray(params[name]["kernel"]), alpha)
    assert groups["s/kernel"] == groups["b/kernel"] < groups["a/kernel"]
    assert plan.chosen["s/kernel"].tolist() == [groups["a/kernel"], groups["b/kernel"]]
    scales = {group: 1024 // group * 4 * 2 for group in groups.values()}
    assert plan.waste_bytes == {
        "a/kernel": 0,
        "b/kernel": 0,
        "s/kernel": scales[groups["b/kernel"]] - scales[groups["a/kernel"]],
    }
    for path, group in groups.items():
        assert plan[path] == codecs.int3("channel" if group == 1024 else group)


def test_the_plan_is_what_quantize_takes():
    params = matrices()
    plan = weights.finequant(params)
    adaptive = weights.report(params, weights.quantize(params, plan))
    coarse, fine = (weights.report(params, weights.quantize(params, codecs.int4(g))) for g in ("channel", 32))
    assert adaptive.packed_bytes < fine.packed_bytes
    errors = [{row.path: row.relative_frobenius for row in r.leaves} for r in (adaptive, coarse)]
    assert all(errors[0][path] <= errors[1][path] for path in plan)


def test_fewest_bytes_that_reach_a_signal_to_noise_ratio():
    params = matrices()
    plan = weights.finequant(params, criterion="sqnr", target_db=19)

    def decibels(w, codec):
        off = np.asarray(codec.encode(w).decode()) - np.asarray(w)
        return 10 * np.log10(np.sum(np.asarray(w) ** 2) / np.sum(off**2))

    for name in "ab":
        path, w = f"{name}/kernel", params[name]["kernel"]
        assert decibels(w, plan[path]) >= 19
        coarser = 2 * int(plan.chosen[path])
        assert coarser > 1024 or decibels(w, codecs.int4(coarser)) < 19
    assert plan.chosen["s/kernel"].tolist() == [plan.chosen["a/kernel"], plan.chosen["b/kernel"]]
    with pytest.raises(
        ValueError, match=r"a/kernel: no group of 4-bit codes reaches 60.0 dB; the best is 2\d\.\d\d dB"
    ):
        weights.finequant(params, criterion="sqnr", target_db=60)


def test_axes_and_sizes_that_do_not_divide():
    plan = weights.finequant({"o": array(0, 2, 64, 8), "odd": array(1, 96, 4)}, where="*", axes={"o": ((0, 1), 2)})
    assert plan.chosen["o"] in (128, 64, 32) and plan.chosen["odd"] in (96, 32)
    with pytest.raises(ValueError, match=r"odd: .*cannot be packed at 4 bits"):
        weights.finequant({"odd": array(1, 33, 4)}, where="*")


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"bits": 5}, ValueError, "bits must be 2, 3, 4, 6 or 8, got 5"),
        ({"criterion": "mse"}, ValueError, "criterion must be"),
        ({"criterion": "sqnr"}, ValueError, "target_db belongs to"),
        ({"target_db": 20}, ValueError, "target_db belongs to"),
        ({"alpha": 1.5}, ValueError, "alpha must lie in"),
        ({"where": "**/w"}, ValueError, "matches no leaf"),
        ({"axes": {"x": (0, 1)}}, ValueError, "matches no leaf"),
        ({"where": "packed"}, TypeError, "packed: expected a dense floating-point weight, got PackedWeight"),
        ({"where": "count"}, TypeError, "count: expected a dense floating-point weight"),
    ],
)
def test_bad_settings(settings, error, message):
    packed = weights.quantize({"w": array(0, 64, 4)}, codecs.int4(), "w")["w"]
    with pytest.raises(error, match=message):
        weights.finequant(
            {"a": {"kernel": array(0, 64, 4)}, "packed": packed, "count": jnp.ones((2, 2), int)}, **settings
        )
