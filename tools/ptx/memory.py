"""Memory in which every access is checked."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

__all__ = ["Memory"]


class Memory:
    """Regions of bytes at addresses of their own."""

    def __init__(self, regions: list[tuple[int, np.ndarray]]) -> None:
        """Of each region its first address and its content ``[n]`` uint8; they do not overlap."""
        regions = sorted(regions, key=lambda region: region[0])
        self.starts = np.array([start for start, _ in regions])
        self.ends = self.starts + [len(content) for _, content in regions]
        self.contents = [content for _, content in regions]

    def _regions(
        self, addresses: np.ndarray, size: int, active: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each region its content, the threads ``[m]`` it serves, and their bytes' indices ``[m, size]``.

        Raises:
            IndexError: An address of an active thread outside of every region, or not a multiple of `size`.
        """
        region = np.searchsorted(self.starts, addresses, "right") - 1
        outside = (region < 0) | (addresses + size > self.ends[region])
        for problem, found in ("outside", outside), ("misaligned", addresses % size != 0):
            if (found & active).any():
                thread = np.flatnonzero(found & active)[0]
                raise IndexError(f"thread {thread}: address {addresses[thread]:#x} is {problem}")
        for index in np.unique(region[active]):
            threads = np.flatnonzero(active & (region == index))
            at = (addresses[threads] - self.starts[index])[:, None] + np.arange(size)
            yield self.contents[index], threads, at

    def load(self, addresses: np.ndarray, size: int, active: np.ndarray) -> np.ndarray:
        """``[threads, size]`` uint8; zeros in threads that are not active."""
        loaded = np.zeros((len(addresses), size), np.uint8)
        for content, threads, at in self._regions(addresses, size, active):
            loaded[threads] = content[at]
        return loaded

    def store(self, addresses: np.ndarray, values: np.ndarray, active: np.ndarray) -> None:
        """`values` ``[threads, size]`` uint8."""
        for content, threads, at in self._regions(addresses, values.shape[1], active):
            content[at] = values[threads]
