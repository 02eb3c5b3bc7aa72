"""Every window once per pass, whatever the size of the corpus against that of the blocks that are planned."""

from itertools import groupby

import numpy as np
import pytest
from corpora import make_store, random_documents
from denoising import T5_IDS

from fat5.data.corpus_order import CorpusOrder
from fat5.data.denoisers import MIXTURES
from fat5.data.schedule import Budget, Schedule
from fat5.data.span_corruption import Mixture
from fat5.data.windows import WindowDataset


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count", [7, 64, 100])
def test_no_window_comes_again_before_all_have_come(tmp_path, count, packed):
    windows = WindowDataset([make_store(tmp_path / "store", random_documents(0, [40] * count))], 40)
    mixture = Mixture(MIXTURES["ul2_fat5"], T5_IDS)
    budget = Budget(bins=2, inputs=128, labels=128, packed=packed, block=64)
    schedule = Schedule(windows, CorpusOrder(windows, [(0, None)], 0), mixture, budget, 0)
    seen: list[int] = []
    batch = 0
    while len(seen) < 3 * count:
        for block, part in schedule.batch(batch):
            seen += block.index[part].tolist()
        batch += 1
    passes = np.array(seen[: 3 * count]).reshape(3, count)
    assert (np.sort(passes, axis=1) == np.arange(count)).all()
    assert not (passes[0] == passes[1]).all()


def test_weighted_corpora_end_their_passes_too(tmp_path):
    """But for one so small, or so often replayed, that a block holds several of its passes."""
    counts = (400, 150, 3)
    stores = [make_store(tmp_path / str(n), random_documents(n, [40] * c)) for n, c in enumerate(counts)]
    windows = WindowDataset(stores, 40)
    mixture = Mixture(MIXTURES["ul2_fat5"], T5_IDS)
    budget = Budget(bins=2, inputs=128, labels=128, packed=True, block=64)
    schedule = Schedule(windows, CorpusOrder(windows, [(0, (0.6, 0.3, 0.1))], 0), mixture, budget, 0)
    seen: list[tuple[int, int]] = []
    for batch in range(500):
        for block, part in schedule.batch(batch):
            seen += zip(block.index[part].tolist(), block.epoch[part].tolist(), strict=True)
    assert len(set(seen)) == len(seen)
    for first, count in ((0, 400), (400, 150)):
        its = [e for e in seen if first <= e[0] < first + count]
        passes = [[index for index, _ in group] for _, group in groupby(its, key=lambda e: e[1])]
        assert len(passes) > 2
        for one in passes[:-1]:
            assert sorted(one) == list(range(first, first + count))
    assert np.mean([index >= 550 for index, _ in seen]) == pytest.approx(0.1, abs=0.01)


def test_a_stage_leaves_out_a_corpus_that_was_owed_a_window(tmp_path):
    stores = [make_store(tmp_path / str(n), random_documents(n, [40] * 50)) for n in range(3)]
    order = CorpusOrder(WindowDataset(stores, 40), [(0, (0.5, 0.4, 0.1)), (1, (0.0, 0.5, 0.5))], 0)
    owed = 0.0
    for count in range(1, 40):
        _, _, position = order.draw(order.start(), count, 0)
        owed = max(owed, position.credit[0])
        for later in range(1, 5):
            index, _, following = order.draw(position, later, 1)
            assert len(index) == later
            assert index.min() >= 50
            assert following.credit[0] == 0
            assert abs(sum(following.credit)) < 1e-9
    assert owed > 0.4
