"""Every window once per pass, whatever the size of the corpus against that of the blocks that are planned."""

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
