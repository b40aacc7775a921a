"""Pairs with few distinct positives: no batch is without a negative, whatever the seed."""

from __future__ import annotations

import numpy as np
import pytest
from training_runs import make

from skembed.training import loop
from skembed.training.batches import Batch

SETS = {
    "291 to 9": [(f"question {i}", "yes" if i < 291 else "no") for i in range(300)],
    "30 to 1": [(f"question {i}", "yes" if i else "no") for i in range(31)],
    "three": [(f"question {i}", "abc"[i % 31 % 3 if i % 31 < 2 else 0]) for i in range(93)],
    "two for all": [(f"question {i}", each) for i in range(20) for each in ("yes", "of course")]
    + [("another question", "no")],
    "no room": [(f"question {i}", "yes") for i in range(40)] + [("yes", "no"), ("no", "no idea")],
}


@pytest.mark.parametrize("batch_size", [2, 8, 64])
@pytest.mark.parametrize("name", SETS)
def test_every_batch_has_a_negative(
    name: str, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[Batch] = []
    take_step = loop._take_step

    def keep(learner, plan, step, batch_rows):
        build = plan.build

        def record(*args):
            batches.append(build(*args))
            return batches[-1]

        with monkeypatch.context() as patch:
            patch.setattr(plan, "build", record)
            return take_step(learner, plan, step, batch_rows)

    monkeypatch.setattr(loop, "_take_step", keep)
    for seed in range(3):
        make(batch_size=batch_size, max_steps=12, epochs=3, random_state=seed).fit(SETS[name])
    assert len(batches) >= 3
    for batch in batches:
        assert batch.allowed.sum() > len(batch.anchors)


def test_drawn_negatives_are_no_positives() -> None:
    """Questions have both answers, or neither: a negative may only be the third text."""
    pairs = [(f"question {i}", each) for i in range(20) for each in ("yes", "of course")]
    one = make(batch_size=4, max_steps=10, epochs=5).fit([*pairs, ("another question", "no")])
    same = make(batch_size=4, max_steps=10, epochs=5).fit([*pairs, ("another question", "no")])
    assert np.isfinite(one.history_["loss"]).all()
    np.testing.assert_array_equal(one.history_["loss"], same.history_["loss"])
