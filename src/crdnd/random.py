"""Random numbers as a pure function of what they are for.

A draw depends on a name (seed, purpose, epoch, restart ...), on the sample's id and on the element's index, and on
nothing else: not on the batch a sample sits in, its neighbours, the process, the device or what was drawn before.
So there is no generator state to save for an exact resume, and splitting a batch changes no verdict.

The generator is SplitMix64 (Steele, Lea and Flood 2014) used as a counter-based hash.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """An unsigned 64-bit constant as the int64 with the same bits: torch has no uint64 arithmetic."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64: a bijection after which every input bit has reached every output bit."""
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True, slots=True)
class Stream:
    """Draws for a batch of samples.

    >>> whole = Stream.of("demo", 0, ids=torch.arange(4)).uniform((2,))
    >>> half = Stream.of("demo", 0, ids=torch.arange(2, 4)).uniform((2,))
    >>> torch.equal(whole[2:], half)
    True
    """

    key: int
    ids: Tensor
    """int64 (B,): which sample each row of the batch is."""

    @classmethod
    def of(cls, *names: str | int, ids: Tensor) -> "Stream":
        """The stream for a purpose, such as `Stream.of("attack", seed, epoch, ids=ids)`."""
        digest = hashlib.blake2b(repr(names).encode(), digest_size=8).digest()
        return cls(int.from_bytes(digest, "little", signed=True), ids)

    def child(self, *names: str | int) -> "Stream":
        """An independent stream for the same samples, such as one for each restart."""
        return Stream.of(self.key, *names, ids=self.ids)

    def take(self, rows: Tensor) -> "Stream":
        """The same stream for some of its samples; `rows` are their places in the batch."""
        return Stream(self.key, self.ids[rows])

    def bits(self, count: int) -> Tensor:
        """`count` words of 64 random bits for each sample, int64 (B, count)."""
        start = _mix(self.ids * _GOLDEN + self.key)[:, None]
        return _mix(start + torch.arange(1, count + 1, device=self.ids.device) * _GOLDEN)

    def uniform(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform draws on [0, 1), (B, *shape)."""
        size = 53 if dtype == torch.float64 else 24  # as many bits as the format resolves, so that 1 is never reached
        words = _shift(self.bits(math.prod(shape)), 64 - size).to(dtype)
        return (words * 2.0**-size).reshape(len(self.ids), *shape)

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal draws, (B, *shape), by Box and Muller's transform."""
        u, v = self.uniform((2, *shape), dtype).unbind(1)
        return (-2 * torch.log1p(-u)).sqrt() * torch.cos(2 * math.pi * v)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        """Uniform integers in [low, high), int64 (B, *shape)."""
        words = _shift(self.bits(math.prod(shape)), 1)
        return (low + words % (high - low)).reshape(len(self.ids), *shape)


def permutation(count: int, *names: str | int) -> Tensor:
    """A random order of 0 .. count - 1 that depends on its names alone, int64 (count,)."""
    return Stream.of(*names, ids=torch.arange(count)).bits(1)[:, 0].argsort(stable=True)
