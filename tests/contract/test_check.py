"""A change in vLLM is found, and said so that one knows what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.check import breaches
from tests.contract.conftest import installed
from tests.contract.contract import CONTRACT
from tests.contract.reliance import On
from tests.contract.tree import Tree

_ATTENTION = "vllm/v1/attention"
_LAYERS = "vllm/model_executor/layers/attention/attention.py"


def changed(folder: Path, file: str, old: str, new: str) -> Tree:
    """The installed vLLM with `old` replaced in `file`; the rest of it is linked."""
    root = installed().root
    source, target = root, folder
    for part in Path(file).parts:
        target.mkdir()
        neighbours = source.iterdir() if source != root else ()  # around vllm/ lie all installed packages
        for neighbour in neighbours:
            if neighbour.name != part:
                (target / neighbour.name).symlink_to(neighbour)
        source, target = source / part, target / part
    text = source.read_text()
    assert old in text, f"{file} has no {old!r} to change"
    target.write_text(text.replace(old, new))
    return Tree(folder, "vLLM as changed")


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        pytest.param(
            f"{_ATTENTION}/backends/cpu_attn.py",
            "_set_isa_to_layers",
            "_set_isa_on_layers",
            [
                "vLLM as changed: vllm.v1.attention.backends.cpu_attn.CPUAttentionMetadataBuilder\n",
                "we rely on   _set_isa_to_layers(layer_names)",
                "near: _set_isa_on_layers(self, layer_names)",
                "relied on by vllm_quest/backend/cpu.py",
            ],
            id="method renamed",
        ),
        pytest.param(
            f"{_ATTENTION}/backends/flash_attn.py",
            "        kv_cache: torch.Tensor,\n        slot_mapping: torch.Tensor,\n    ) -> None:",
            "        kv_cache: torch.Tensor,\n        slots: torch.Tensor,\n    ) -> None:",
            [
                "we rely on   do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping)",
                "there is     do_kv_cache_update(self, layer, key, value, kv_cache, slots)",
                "flash_attn.py:",
                "relied on by vllm_quest/backend/impl.py",
            ],
            id="parameter renamed",
        ),
        pytest.param(
            f"{_ATTENTION}/backend.py",
            "        fast_build: bool = False,\n    ) -> M:",
            "        fast_build: bool = False,\n        draft: bool = False,\n    ) -> M:",
            ["fast_build=False, draft=False)"],
            id="parameter added to what we override",
        ),
        pytest.param(
            f"{_ATTENTION}/backend.py",
            "        use_rswa: bool = False,\n    ) -> list[str]:",
            "    ) -> list[str]:",
            ["validate_configuration", "takes no use_rswa", "vllm_quest/backend/cpu_platform.py"],
            id="keyword dropped that a NamedTuple is spread into",
        ),
        pytest.param(
            f"{_ATTENTION}/backend.py",
            "    is_prefilling: torch.Tensor",
            "    prefilling: torch.Tensor",
            ["the attribute is_prefilling", "vllm_quest/backend/cpu.py", "the attribute is_prefilling"],
            id="field renamed",
        ),
        pytest.param(
            f"{_ATTENTION}/backend.py",
            "    is_prefilling: torch.Tensor | None",
            "    is_prefilling: list[bool] | None",
            ["is_prefilling: torch.Tensor | None", "is_prefilling: list[bool] | None"],
            id="type of a field changed",
        ),
        pytest.param(
            f"{_ATTENTION}/backend.py",
            "    UNIFORM_BATCH = 2",
            "    UNIFORM_BATCH = 4",
            ["the member UNIFORM_BATCH = 2", "UNIFORM_BATCH = 4", "vllm_quest/backend/gpu.py"],
            id="enum value changed",
        ),
        pytest.param(
            f"{_ATTENTION}/backends/cpu_attn.py",
            "class CPUAttentionBackendImpl(AttentionImpl):",
            "class CPUAttentionBackendImpl:",
            ["the base class AttentionImpl"],
            id="base class gone",
        ),
        pytest.param(
            "vllm/plugins/__init__.py",
            '"vllm.general_plugins"',
            '"vllm.plugins"',
            ["the value 'vllm.general_plugins'", "'vllm.plugins'", "relied on by pyproject.toml"],
            id="entry-point group renamed",
        ),
        pytest.param(
            _LAYERS,
            "            attn_layer,\n            key,\n            value,\n            kv_cache,",
            "            attn_layer,\n            kv_cache,\n            key,\n            value,",
            [
                "attn_layer.impl.do_kv_cache_update(attn_layer, key, value, kv_cache, layer_slot_mapping)",
                "near:",
            ],
            id="called with other arguments",
        ),
        pytest.param(
            "vllm/config/__init__.py",
            "    get_current_vllm_config_or_none,\n",
            "",
            ["vllm.config.get_current_vllm_config_or_none", "vllm_quest/config.py"],
            id="no longer exported",
        ),
    ],
)
def test_a_change_in_vllm_is_found(
    tmp_path: Path, file: str, old: str, new: str, expected: list[str]
) -> None:
    text = "\n\n".join(map(str, breaches(changed(tmp_path / "site", file, old, new), CONTRACT)))
    for part in expected:
        assert part in text


def _small(folder: Path, version: str, source: str) -> Tree:
    (folder / "vllm").mkdir(parents=True)
    (folder / "vllm" / "_version.py").write_text(f"version: str\n__version__ = version = '{version}'\n")
    (folder / "vllm" / "cache.py").write_text(source)
    return Tree(folder)


def test_what_only_newer_versions_have(tmp_path: Path) -> None:
    contract = {"ours.py": (On("vllm.cache.register", since="0.33", called=("register(name)",)),)}
    has, lacks = "def register(name): ...", ""
    assert not breaches(_small(tmp_path / "a", "0.33.1", has), contract)
    assert not breaches(_small(tmp_path / "b", "0.32.0", lacks), contract)
    (absent,) = breaches(_small(tmp_path / "c", "0.34.0", lacks), contract)
    assert str(absent).startswith("vLLM 0.34.0: vllm.cache.register\n    we rely on   the name\n")
    (early,) = breaches(_small(tmp_path / "d", "0.32.0", has), contract)
    assert "absence before 0.33" in early.relied_on


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ("f(a, b)", ""),
        ("f(a, b, c=...)", ""),
        ("f(a, b=..., d=...)", ""),
        ("f(b, a)", "argument 1 is not b"),
        ("f(a)", "wants b"),
        ("f(a, b, e=...)", "takes no e"),
        ("f(a, b, c, d)", "takes no argument 4"),
    ],
)
def test_a_call_is_bound_to_the_signature(tmp_path: Path, call: str, problem: str) -> None:
    tree = _small(tmp_path, "0.32.0", "def f(a, b, c=1, *, d=2): ...")
    found = breaches(tree, {"ours.py": (On("vllm.cache.f", called=(call,)),)})
    assert [problem in breach.relied_on for breach in found] == ([True] if problem else [])
