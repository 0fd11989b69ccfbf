"""The GPU benchmark's steps under the interpreter, and what is derived from times; the times are made up."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.kernels.report import break_even, microseconds, ratios, series, summary
from benchmarks.kernels.roofline import GEOMETRIES, Geometry
from tests.kernels.interpreter import DEVICE, TOLERANCE
from vllm_quest.config import QuestConfig
from vllm_quest.formats.auto import reference as auto
from vllm_quest.formats.int4 import reference as int4
from vllm_quest.kernels import reference
from vllm_quest.scorers.minmax import reference as minmax


def row(context: int, speed_up: float, page_size: int = 16, bounds_dtype: str = "auto") -> dict:
    return {
        **{"geometry": "llama-3.1-8b", "batch": 8, "context": context, "token_budget": 2048},
        **{"page_size": page_size, "kv_dtype": "auto", "bounds_dtype": bounds_dtype, "layers": 2},
        **{"milliseconds": {"QUEST": 1.0, "FLASH_ATTN": speed_up}, "left_out": {"FLASHINFER": "not there"}},
        **{"speed_up": speed_up, "dense_speed_up": {}, "speed_up_limit": 8.0},
        **{"gb_per_s": 2000.0, "share_of_limit": 0.7},
    }


ROWS = [row(8192, 1.2), row(2048, 1.1), row(4096, 0.9), row(32768, 5.0)]


@pytest.mark.parametrize(
    ("rows", "context"), [(ROWS, 8192), (ROWS[2:3], None), ([row(4096, 2.0), row(8192, math.nan)], None)]
)
def test_quest_wins_from_a_context_on(rows, context) -> None:
    """A win below a loss is no break-even."""
    assert break_even(rows) == context


def test_the_summary_names_where_it_loses() -> None:
    text = summary([*ROWS, row(4096, 0.5, bounds_dtype="int8")])
    assert "budget 2048, page 16  " in text
    assert "page 16, int8 bounds" in text
    assert "nowhere measured" in text
    worst = text.split("worst: ")[1]
    assert "0.50x" in worst
    assert "no FLASHINFER: not there" in worst


def test_the_picture_is_drawn(tmp_path) -> None:
    plots = pytest.importorskip("benchmarks.kernels.plots", reason="needs the extra 'plot'")
    path = tmp_path / "kernels.png"
    plots.plot_kernels(series(ROWS), path)
    assert path.read_bytes().startswith(b"\x89PNG")


TIMES = {
    **{"QUEST": 0.02, "QUEST dense": 0.1, "FLASH_ATTN": 0.09, "TRITON_ATTN": 0.2},
    **{"int4_per_token_head": 0.05, "turboquant_4bit_nc": 0.4},
}


def test_speed_ups_are_over_dense_kernels_in_the_models_dtype() -> None:
    found = ratios(TIMES)
    assert found["speed_up"] == pytest.approx(4.5)
    assert found["dense_speed_up"] == pytest.approx({"int4_per_token_head": 0.5, "turboquant_4bit_nc": 4.0})
    assert math.isnan(ratios({"QUEST": 0.02, "int4_per_token_head": 0.05})["speed_up"])


def test_all_times_stand_in_one_table() -> None:
    int4 = row(8192, 4.5) | {"kv_dtype": "int4", "milliseconds": TIMES} | ratios(TIMES)
    columns, first, second = [
        re.split("  +", text) for text in microseconds([row(8192, 0.5), int4]).splitlines()[1:]
    ]
    assert columns[:3] == ["batch, context, kv_dtype", "QUEST", "QUEST dense"]
    assert first == ["8, 8192, auto", "1000.0", "-", "500.0", "-", "-", "-", "0.50x"]
    times = ["20.0", "100.0", "90.0", "200.0", "50.0", "400.0"]
    assert second == ["8, 8192, int4", *times, "4.50x", "0.50x 4.00x"]


@pytest.mark.parametrize("kv_dtype", ["auto", "int4"])
def test_steps_attend_over_what_they_stored(kv_dtype) -> None:
    from benchmarks.kernels.steps import DTYPE, QuestLayers, Rows

    torch.manual_seed(3)
    rows = Rows(Geometry(4, 2, 64), 2, 75, 16, device=str(DEVICE))
    config = QuestConfig(token_budget=32, page_size=8, kv_dtype=kv_dtype, bounds_dtype="auto")
    quest = QuestLayers(rows, config, layers=1)
    pages, num_pages = quest.layers[0], quest.decode_rows.num_pages
    kernels = {"auto": auto, "int4": int4}[kv_dtype]
    for step, budget_pages in ((quest.dense_step, None), (quest.step, 4)):
        rows.key.normal_()
        rows.out.fill_(torch.nan)
        step()
        scores = minmax.score_pages(rows.query, pages.summary, rows.block_table, num_pages, rows.scale, "max")
        chosen = budget_pages and reference.select_pages(scores, num_pages, budget_pages, 1, 2)
        expected = kernels.attend_pages(
            rows.query, pages.cache, rows.block_table, rows.seq_lens, chosen, 8, rows.scale
        )
        torch.testing.assert_close(rows.out, expected, rtol=0, atol=TOLERANCE[DTYPE] * expected.abs().max())


def test_each_configuration_is_written_at_once(monkeypatch, tmp_path, capsys) -> None:
    """Dense kernels are measured once for all of QUEST's settings; the last configuration breaks off."""
    from benchmarks.kernels import gpu as kernels

    measured = []
    path = tmp_path / "kernels.json"

    def dense_ms(self, rows, kind):
        measured.append((rows.context, kind))
        if rows.context == 99:
            raise KeyboardInterrupt
        return 1.5

    def layer_ms(self, step, layers):
        step()
        return 1.0

    monkeypatch.setitem(GEOMETRIES, "llama-3.1-8b", Geometry(4, 2, 64))
    monkeypatch.setattr(kernels, "Rows", partial(kernels.Rows, device=str(DEVICE)))
    monkeypatch.setattr(kernels, "MAX_LAYERS", kernels.MIN_LAYERS)
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda: 4000.0)
    monkeypatch.setattr(kernels.Benchmark, "dense_ms", dense_ms)
    monkeypatch.setattr(kernels.Benchmark, "layer_ms", layer_ms)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    options = "--context 70 99 --batch 1 --budget 48 --kv-dtype auto int4 --operations --dense FLASH_ATTN"
    monkeypatch.setattr(sys, "argv", ["kernels", *options.split(), "--json", str(path)])
    with pytest.raises(KeyboardInterrupt):
        kernels.main()
    (written,) = json.loads(path.read_text())["results"]
    assert written["context"] == 70
    assert written["speed_up"] == 1.5
    assert list(written["operations"]) == ["store", "score", "select", "attend", "attend every page"]
    assert "alone: store 1000.0  score" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", [*sys.argv, "--context", "70"])
    measured.clear()
    kernels.main()
    assert measured == [(70, "FLASH_ATTN")]
    assert [row["kv_dtype"] for row in json.loads(path.read_text())["results"]] == ["auto", "int4"]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="vLLM's CUDA build rotates K by a kernel of that device")
def test_vllms_4_bit_kernels_are_called_right() -> None:
    """They agree with their formats written in torch, but for 16-bit arithmetic."""
    kinds = ["int4_per_token_head", "turboquant_4bit_nc"]
    command = [sys.executable, "-m", "tests.benchmarks.interpreted_peers", *kinds]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=dict(os.environ), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for kind in kinds:
        assert found[kind]["error"] < 2**-7 * found[kind]["attention"] < found[kind]["four_bits"]
