"""The summary and the picture of a run."""

import html
import re
from html.parser import HTMLParser

import pytest

from fat5.train.figures import held_out_curves, loss_figure
from fat5.train.page import write_page
from fat5.train.report import describe_run, summarise_run

LOG = [
    {"step": 0, "eval_loss": 4.0, "eval_loss_se": 0.1, "eval_S_loss": 5.0, "eval_S_loss_se": 0.2, "eval_R_loss": 3.0},
    {"step": 1, "loss": 3.9, "learning_rate": 1e-3},
    {"step": 2, "loss": 3.5, "learning_rate": 1e-3},
    {"step": 2, "eval_loss": 3.0, "eval_loss_se": 0.1, "eval_S_loss": 4.0, "eval_S_loss_se": 0.3, "eval_R_loss": 2.5},
    {"step": 2, "train_runtime": 1.0, "train_loss": 3.7},
]


def test_the_curves_are_collected_by_denoiser():
    assert held_out_curves(LOG) == {
        "": ([0, 2], [4.0, 3.0], [0.1, 0.1]),
        "R": ([0, 2], [3.0, 2.5], [0.0, 0.0]),
        "S": ([0, 2], [5.0, 4.0], [0.2, 0.3]),
    }


def test_the_table_gives_first_and_last_with_their_errors():
    lines = [line.split() for line in describe_run(LOG).splitlines()]
    assert lines[1] == ["all", "denoisers", "4.0000", "±", "0.1000", "3.0000", "±", "0.1000"]
    assert lines[2] == ["R", "3.0000", "2.5000"]
    assert describe_run(LOG[1:3]) == ""


def test_the_summary():
    summary = summarise_run(LOG)
    assert (summary["steps"], summary["last_training_loss"]) == (2, 3.5)
    assert (summary["first_evaluation"], summary["last_evaluation"]) == (LOG[0], LOG[3])
    assert summarise_run(LOG[1:3])["last_evaluation"] is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("log", [LOG, LOG[1:3]], ids=["evaluated", "not evaluated"])
def test_the_picture_is_drawn(tmp_path, log):
    loss_figure(log, "a run").savefig(tmp_path / "loss.png", dpi=120)
    data = (tmp_path / "loss.png").read_bytes()
    width, height = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert data.startswith(b"\x89PNG")
    assert (width, height) == (1560, 576)


WHOLE = [
    {"step": 0, "eval_loss": 4.0, "eval_loss_se": 0.1, "eval_accuracy": 0.1, "eval_log_z_squared": 9.0},
    {
        "step": 1,
        "loss": 3.9,
        "learning_rate": 1e-3,
        "grad_norm": 2.0,
        "tokens": 700,
        "tokens_per_second": 10.0,
        "padding": 0.5,
    },
    {"step": 2, "loss": 3.5, "learning_rate": 1e-3, "grad_norm": 2.5, "tokens": 1400, "tokens_per_second": 1234.5},
    {"step": 2, "eval_loss": 3.0, "eval_loss_se": 0.1, "eval_accuracy": 0.25, "eval_log_z_squared": 8.0},
]


def test_a_loss_beyond_what_its_perplexity_could_be_is_shown(tmp_path):
    log = [{"step": 0, "eval_loss": 800.0, "eval_accuracy": 0.0}]
    write_page(tmp_path / "p.html", title="", log=log, recipe="", samples={}, facts={})
    page = Page()
    page.feed((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert {"800.0000", "inf"} <= set(page.cells)


class Page(HTMLParser):
    """Collects the texts of a page's cells, and what it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.open += [] if tag in ("meta", "img") else [tag]
        self.fetched += [value for name, value in attrs if name in ("src", "href")]
        self.cells += [""] if tag in ("td", "th") else []

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("log", [WHOLE, WHOLE[1:3], []], ids=["evaluated", "not evaluated", "empty"])
def test_the_page_is_one_file_that_fetches_nothing_and_escapes_what_it_shows(tmp_path, log):
    nasty = "<script>alert(1)</script> & <extra_id_0>"
    example = {"denoiser": "[S] prefix", "input": nasty, "target": "t", "output": "early"}
    samples = {"before": [example], "after": [example | {"output": "late"}]}
    facts = {"device": "a <device>"}
    write_page(tmp_path / "p.html", title="a & b", log=log, recipe="a: <b>", samples=samples, facts=facts)
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "<script>" not in text
    assert html.escape(nasty) in text
    page = Page()
    page.feed(text)
    assert page.open == []
    assert len(page.fetched) == 3
    assert all(place.startswith("data:image/svg+xml;base64,") for place in page.fetched)
    assert not re.search(r"https?://", text)
    assert {"early", "late", "a <device>"} <= set(page.cells)
    if log is WHOLE:  # perplexities are exp of the losses; the first throughput is left out
        row = page.cells[page.cells.index("all denoisers") :][:7]
        assert row[1:] == ["4.0000 ± 0.1000", "54.60", "10.0%", "3.0000 ± 0.1000", "20.09", "25.0%"]
        assert page.cells[page.cells.index("real tokens per second") + 1] == "1,234"
        assert "1,400 real tokens seen" in text
