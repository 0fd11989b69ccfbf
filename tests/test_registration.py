"""The entry points: what they register, and that every process of vLLM understands it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
import vllm.platforms
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum

import vllm_quest
from vllm_quest.registration import backend_path


def test_entry_points_are_installed() -> None:
    (general,) = entry_points(group="vllm.general_plugins", name="quest")
    (platform,) = entry_points(group="vllm.platform_plugins", name="quest_cpu")
    assert general.load() is vllm_quest.register
    assert platform.load() is vllm_quest.cpu_platform


def test_registering_twice_is_harmless() -> None:
    vllm_quest.register()
    vllm_quest.register()
    assert AttentionBackendEnum["QUEST"].get_class().get_name() == "QUEST"


def test_a_fresh_process_unpickles_the_backend() -> None:
    """vLLM pickles the member into spawned engine processes, before plugins load there."""
    vllm_quest.register()
    data = pickle.dumps(AttentionBackendEnum["QUEST"])
    code = (
        "import pickle, sys; member = pickle.loads(sys.stdin.buffer.read());"
        "assert member is type(member)['QUEST'], member;"
        "print(member.get_class().__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().split()[-1] == "QuestCPUBackend"


def test_the_platform_plugin_acts_on_cpu_builds_only(monkeypatch) -> None:
    assert vllm_quest.cpu_platform() == "vllm_quest.backend.cpu_platform.QuestCpuPlatform"
    monkeypatch.setattr(vllm.platforms, "cpu_platform_plugin", lambda: None)
    assert vllm_quest.cpu_platform() is None


def test_the_platform_is_vllms_own_but_for_three_methods() -> None:
    from vllm.platforms import current_platform
    from vllm.platforms.cpu import CpuPlatform

    assert type(current_platform).__name__ == "QuestCpuPlatform"
    assert isinstance(current_platform, CpuPlatform)
    own = {name for name in vars(type(current_platform)) if not name.startswith("_")}
    assert own == {"check_and_update_config", "get_attn_backend_cls", "register_triton_kernel_overrides"}


@pytest.mark.parametrize(
    ("platform", "path"),
    [
        ("cuda", "vllm_quest.backend.cuda.QuestCUDABackend"),
        ("rocm", "vllm_quest.backend.rocm.QuestROCmBackend"),
        ("cpu", None),  # vLLM's own CPU platform, not ours: it would take the name and attend densely
        ("tpu", None),
    ],
)
def test_the_backend_of_each_platform(monkeypatch, platform, path) -> None:
    kinds = {f"is_{name}": (lambda name=name: name == platform) for name in ("cpu", "cuda", "rocm")}
    with monkeypatch.context() as patch:
        patch.setattr(vllm.platforms, "current_platform", SimpleNamespace(**kinds))
        assert backend_path() == path
    if path:
        assert resolve_obj_by_qualname(path).get_name() == "QUEST"
