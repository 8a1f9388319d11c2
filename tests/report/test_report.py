"""The page of a run: its numbers against counting by hand, and its form."""

import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gem_ds import cli
from gem_ds.report.main import write_report
from gem_ds.report.spread import NUM_SHARES, NUM_SLICES, Moves, concentration, profile, spreads
from tests.deltas import make_delta

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=200).filter(any)


@settings(deadline=None, max_examples=50)
@given(COUNTS)
def test_slices_and_shares_are_those_counted_one_by_one(counts):
    total, lines = sum(counts), len(counts)
    slices = [
        [c for i, c in enumerate(counts) if i * NUM_SLICES // lines == s] for s in range(NUM_SLICES)
    ]
    even = [sum(part) / (total * len(part) / lines) if part else 0 for part in slices]
    assert profile(torch.tensor(counts)).tolist() == pytest.approx(even)
    fullest = sorted(counts, reverse=True)
    for i, share in enumerate(concentration(torch.tensor(counts)).tolist()):
        whole, part = divmod(i * lines, NUM_SHARES)
        partial = fullest[whole] * part / NUM_SHARES if part else 0
        assert share == pytest.approx((sum(fullest[:whole]) + partial) / total)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_moves_are_those_of_plain_numbers(seed, dtype):
    torch.manual_seed(seed)
    base = (torch.randn(101) * 10.0 ** torch.randint(-2, 2, (101,))).to(dtype)
    base[::10] = 0
    values = torch.where(torch.rand(101) < 0.3, base, base + torch.randn(101).to(dtype))
    moves = Moves()
    for part in (slice(0, 50), slice(50, None)):
        moves.add(values[part], base[part])
    pairs = list(zip(values.tolist(), base.tolist(), strict=True))
    assert (moves.num_entries, moves.num_unchanged) == (101, sum(v == w for v, w in pairs))
    assert moves.num_from_zero == sum(w == 0 != v for v, w in pairs)
    relative = sorted(abs(v - w) / abs(w) for v, w in pairs if w and v != w)
    assert int(moves.histogram.sum()) == len(relative)
    assert moves.median == pytest.approx(relative[(len(relative) - 1) // 2], rel=0.07)


class Page(HTMLParser):
    """Counts tags and takes note of what would be fetched; every tag that opens is closed."""

    VOID = ("meta", "link", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.fetched += [v for k, v in attrs if k in ("src", "href") and v and v != "data:,"]
        for _, value in attrs:
            assert "nan" not in str(value).lower().split(","), (tag, attrs)
        if tag not in self.VOID and not self.get_starttag_text().endswith("/>"):  # type: ignore[union-attr]
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.get_starttag_text() or self.open[-1:] == [tag]:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def a_run(folder: Path) -> nn.Module:
    """With names that would be tags, were they not escaped."""
    torch.manual_seed(0)
    blocks = [nn.ModuleDict({"up": nn.Linear(40, 60), "down": nn.Linear(60, 40)}) for _ in range(3)]
    model = nn.ModuleDict({"h": nn.ModuleList(blocks), "tail": nn.Linear(9, 4)})
    chosen: dict[str, Any] = {f"h.{i}.up.weight": range(0, 2400, 7) for i in range(3)}
    chosen |= {"h.1.down.weight": [], "tail.weight": [3]}
    make_delta(model, chosen, "<script>alert(1)</script>").save(folder / "delta.safetensors")
    history = [
        {"step": 0, "eval_loss": 2.0},
        {"step": 4, "loss": 1.5, "grad_norm": math.nan},
        {"step": 8, "loss": 1.0, "eval_loss": 1.1, "eval_accuracy": 0.75},
    ]
    state = {"log_history": history, "settings": {"<b>": 1}}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "all_results.json").write_text(json.dumps({"eval_metrics": {"accuracy": 0.75}}))
    return model


def test_a_run_is_one_page_that_fetches_nothing(tmp_path, capsys):
    model = a_run(tmp_path)
    assert cli.run("report", [str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert not page.fetched
    assert not re.search(r"https?://|@import|url\(", text)
    assert not page.tags["script"]
    told = " ".join(page.texts)
    assert "<script>alert(1)</script> is not on this disk: pass --model_name_or_path" in told
    assert "h.0.up" not in told  # layers and modules
    num_entries = 3 * len(range(0, 2400, 7)) + 1
    assert f"{num_entries:,}" in told
    without = page.tags["svg"]

    (tmp_path / "base").mkdir()
    torch.save(model.state_dict(), tmp_path / "base" / "pytorch_model.bin")
    flags = [str(tmp_path), "--model_name_or_path", str(tmp_path / "base")]
    assert cli.run("report", flags) == 0
    whole = Page((tmp_path / "report.html").read_text())
    assert whole.tags["svg"] == without + 1
    with torch.no_grad():
        model.get_parameter("tail.weight")[0, 3] += 1
    torch.save(model.state_dict(), tmp_path / "base" / "pytorch_model.bin")
    assert cli.run("report", flags) == 1
    assert "made for other base weights" in capsys.readouterr().err


def test_a_folder_without_a_run_and_a_page_of_others_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        write_report(tmp_path)
    a_run(tmp_path)
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(ValueError, match=r"report\.html is no file of gem_ds"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "mine"
    (tmp_path / "report.html").unlink()
    (tmp_path / "trainer_state.json").write_text("[]")
    with pytest.raises(ValueError, match="damaged"):
        write_report(tmp_path)


def test_modules_are_in_the_order_of_their_entries(tmp_path):
    model = a_run(tmp_path)
    mask = make_delta(model, {"h.0.down.weight": [1], "h.0.up.weight": [2, 5]}).mask
    found = spreads(mask)
    assert list(found) == ["up", "down"]
    assert (found["up"].num_entries, found["up"].num_parameters) == (2, 2400)


def test_the_rows_of_experts_are_those_of_their_matrices():
    """Of two experts of 40 x 60, entries in the row 3 of the first and the row 5 of the second."""
    experts = nn.ParameterDict({"experts": torch.randn(2, 40, 60)})
    flat = [3 * 60 + 7, 40 * 60 + 5 * 60 + 7]
    found = spreads(make_delta(experts, {"experts": flat}).mask)["experts"]
    rows, columns = (profile.nonzero().flatten().tolist() for profile in found.profiles)
    assert rows == [3 * NUM_SLICES // 40, 5 * NUM_SLICES // 40]
    assert columns == [7 * NUM_SLICES // 60]
    assert found.num_parameters == 4800


def test_the_entries_of_biases_are_rows():
    layer = nn.Linear(4, 6)
    (found,) = spreads(make_delta(layer, {"bias": [0, 1, 5]}).mask).values()
    rows, columns = found.curves
    assert found.num_entries == 3
    assert rows[-1] == columns[-1] == 3, "all entries, weighed by how many they are"
    assert rows[1] > columns[1], "three of six rows are full, the one column is even"
