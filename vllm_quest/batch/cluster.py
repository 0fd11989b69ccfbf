"""The machines: a Ray cluster, of our own or already there, what must be true of its nodes, and counters."""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vllm_quest import metrics

# What a worker must have of the driver's environment.
CARRIED = ("VLLM_", "QUEST_", "HF_", "OMP_", "TRITON_")
PIPELINE_CPUS = 2  # for reading, checking and writing rows, beside the engines
CONNECT_SECONDS = 10


class ClusterError(RuntimeError):
    """The cluster cannot run the batch; says what lacks and where."""


@contextmanager
def connected(address: str | None, counters: str, verbose: bool = False) -> Iterator[None]:
    """A connection to Ray while the body runs.

    Args:
        address: Of a running cluster: ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT``. None starts one on this
            machine, for loopback only, and ends it afterwards.
        counters: Folder for QUEST's counters on every node.
        verbose: Prints what Ray and the engines log.

    Raises:
        ClusterError: The cluster does not answer.
    """
    carried = {key: value for key, value in os.environ.items() if key.startswith(CARRIED)}
    # vLLM binds every CPU engine of a machine to the same cores. Ray tells each how many threads it may use.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} | carried | {metrics.DIRECTORY_VARIABLE: counters}
    arguments: dict[str, Any] = {
        "runtime_env": {"env_vars": environment},
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
    }
    if address is None:
        cores = len(os.sched_getaffinity(0))
        arguments |= {"address": "local", "num_cpus": cores + PIPELINE_CPUS, "include_dashboard": False}
        environment.setdefault("VLLM_HOST_IP", "127.0.0.1")
    else:
        _check_reachable(address)
        arguments |= {"address": address}
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(arguments["logging_level"])
    try:
        ray.init(**arguments)
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        raise ClusterError(f"--address {address}: no connection to a Ray cluster: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself waits for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # auto, or a name that Ray knows
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(f"--address {address}: nothing answers there: {error}") from error


def has_gpus() -> bool:
    """Whether the cluster offers GPUs; if so, engines run there."""
    return ray.cluster_resources().get("GPU", 0) > 0


def check_room(bundle: dict[str, float], replicas: int, workers: int) -> None:
    """Refuses what could never be placed; Ray would wait for it forever.

    Args:
        bundle: What one worker needs, by resource.
        replicas: Engines.
        workers: Workers of one engine.

    Raises:
        ClusterError: Says which resource lacks, how much is needed and how much there is.
    """
    nodes = [node["Resources"] for node in _alive_nodes()]
    total = {name: sum(node.get(name, 0) for node in nodes) for name in {"CPU", *bundle}}
    needed = {name: amount * replicas * workers for name, amount in bundle.items()}
    needed["CPU"] = needed.get("CPU", 0) + PIPELINE_CPUS
    lacking = [name for name in needed if needed[name] > total[name]]
    what = f"--replicas {replicas} with {workers} worker(s) each"
    if lacking:
        parts = ", ".join(f"{name}: {needed[name]:g} needed, {total[name]:g} there" for name in lacking)
        raise ClusterError(
            f"{what} cannot be placed, the cluster lacks {parts} ({PIPELINE_CPUS} CPUs are for the pipeline)"
        )
    room = sum(_fits(node, bundle) for node in nodes)
    if room < replicas * workers:
        per_node = ", ".join(f"{name}: {amount:g}" for name, amount in bundle.items())
        raise ClusterError(f"{what} cannot be placed: each worker needs {per_node} on one node; {room} fit")


def _fits(node: dict[str, float], bundle: dict[str, float]) -> int:
    return min(int(node.get(name, 0) // amount) for name, amount in bundle.items())


def check_nodes(model: str, bundle: dict[str, float]) -> None:
    """Refuses nodes on which an engine could not start, and removes old counters there.

    Raises:
        ClusterError: Names the node, and what it lacks.
    """
    nodes = [node for node in _alive_nodes() if _fits(node["Resources"], bundle)]
    for node, problem in _on_each(_prepare_node, nodes, model if os.path.isabs(model) else None):
        if problem:
            raise ClusterError(f"node {node}: {problem}")


def address_for_engines() -> str:
    """How a process on a node finds this cluster, also one that Ray did not start, as vLLM's engines."""
    return ray.get(_gcs_address.remote())


def take_counters() -> dict[str, dict[str, int]]:
    """QUEST's counters of this run by node, those of nodes without an engine left out."""
    found = dict(_on_each(_take_counters, _alive_nodes()))
    return {node: counters for node, counters in found.items() if any(counters.values())}


def _alive_nodes() -> list[dict]:
    return [node for node in ray.nodes() if node["Alive"]]


def _on_each(function: Any, nodes: list[dict], *arguments: object) -> list[tuple[str, Any]]:
    """The node's name and what the remote `function` returns there, for each node."""
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    calls = [function.options(scheduling_strategy=place).remote(*arguments) for place in places]
    results = []
    for node, call in zip(nodes, calls, strict=True):
        name = node["NodeManagerHostname"]
        try:
            results.append((f"{name} ({node['NodeManagerAddress']})", ray.get(call)))
        except ray.exceptions.RayError as error:
            reason = str(error).strip().rpartition("\n")[2]
            raise ClusterError(f"node {name}: vllm-quest does not run there: {reason}") from error
    return results


@ray.remote(num_cpus=0)
def _gcs_address() -> str:
    return ray.get_runtime_context().gcs_address


@ray.remote(num_cpus=0)
def _prepare_node(model: str | None) -> str | None:
    """Runs on a node. Why an engine could not start there; None where it could."""
    from importlib.util import find_spec

    shutil.rmtree(os.environ[metrics.DIRECTORY_VARIABLE], ignore_errors=True)
    if find_spec("vllm") is None:
        return "vLLM is not installed"
    if model is not None and not Path(model).exists():
        return f"the model {model} is not there (--model: a path that every node has, or a model's name)"
    return None


@ray.remote(num_cpus=0)
def _take_counters() -> dict[str, int]:
    """Runs on a node: what the workers there have counted."""
    counters = metrics.read_counters()
    shutil.rmtree(os.environ[metrics.DIRECTORY_VARIABLE], ignore_errors=True)
    return counters
