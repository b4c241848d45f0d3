"""Maps of one sample, and batches of them, for solves that stop per sample."""

import math

import torch


class Sample:
    """(D,) -> (D,): scale * (h(A z / scale) + b) with |A| = radius; h is tanh, or the identity."""

    def __init__(self, seed, radius=0.5, scale=1.0, linear=False, size=12):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(size, size, generator=generator, dtype=torch.float64)
        self.matrix = radius * noise / torch.linalg.matrix_norm(noise, 2)
        self.shift = torch.randn(size, generator=generator, dtype=torch.float64)
        self.scale, self.linear = scale, linear

    def __call__(self, z):
        y = self.matrix @ (z.double().flatten() / self.scale)
        y = self.scale * ((y if self.linear else torch.tanh(y)) + self.shift)
        return y.to(z.dtype).view(z.shape)


class Failing:
    """A sample whose value is NaN from its own call number ``call`` on."""

    def __init__(self, sample, call):
        self.sample, self.call, self.calls = sample, call, 0

    def __call__(self, z):
        self.calls += 1
        return self.sample(z) * (1.0 if self.calls <= self.call else math.nan)


class Diverging:
    """The residual grows ninefold at every call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, z):
        self.calls += 1
        return z + 9.0**self.calls


class Batch:
    """A map of these samples, which notes the samples, points and values of every call."""

    def __init__(self, samples, log=None, rows=None):
        self.samples, self.log = samples, [] if log is None else log
        self.rows = list(range(len(samples))) if rows is None else rows

    def __call__(self, z):
        assert len(z) == len(self.rows)
        value = torch.stack([self.samples[i](z[k]) for k, i in enumerate(self.rows)])
        self.log.append((self.rows, z.detach().clone(), value.detach().clone()))
        return value

    def select(self, rows):
        return Batch(self.samples, self.log, [self.rows[i] for i in rows.tolist()])
