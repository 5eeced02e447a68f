"""Losses of anchors against all embeddings, a few rows of the Gram matrix at a time.

The Gram matrix of 4,096 embeddings has 64 MB in float32, and a loss makes about ten of its size. Here a chunk of rows
is multiplied, scored and differentiated while it lies in the cache, and only the gradient of the embeddings is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, wraps
from itertools import product
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

CHUNK_CPU, CHUNK_GPU = 2**20, 2**25  # values of the Gram matrix that are made at a time


@dataclass(frozen=True)
class PairTemperature:
    """A temperature for each pair: ``low + (high - low) sigmoid(keys_i . keys_j + offset)``.

    AMCL (Wang et al., ECCV 2024) weighs each similarity so, and keeps the temperatures from extremes by a penalty.

    Attributes
    ----------
    keys : (..., N, R), learnt from the embeddings.
    center : the temperature of keys that are 0, and the one that ``penalty`` favours.
    low, high : bounds of every temperature.
    penalty : weight of the mean over the pairs of ``log(t / center) + center / t - 1``, which is added to the loss and
        is 0 where every temperature is ``center``.
    """

    keys: torch.Tensor
    center: float
    low: float
    high: float
    penalty: float = 0.1

    def between(self, anchors: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Temperatures (R, N) of pairs of keys (R, K) and (N, K)."""
        share = (self.center - self.low) / (self.high - self.low)
        offset = torch.logit(torch.tensor(share, dtype=keys.dtype)).item()
        return self.low + (self.high - self.low) * torch.sigmoid(anchors @ keys.T + offset)


Temperature = float | torch.Tensor | PairTemperature


class Loss(Protocol):
    """A loss of the family. All take the same arguments, and leave aside those that their formula does not have.

    Parameters
    ----------
    embeddings : (..., N, E); each leading index is a problem of its own (a level, a head) and the loss is their mean.
    positives : bool, broadcast to (..., N, N); [i, j]: j is a positive of i. The diagonal is ignored.
    weights : bool or numbers >= 0, broadcast to (..., N, N); [i, j]: how much j counts as a negative of i. Those of
        positives and of the diagonal are ignored.
    temperature : similarities are divided by it. A tensor with the leading shape gives each problem its own.
    beta : tilt towards hard negatives, where the loss has one.
    labels : integer, broadcast to (..., N); class of each embedding, where the loss has fixed classes.

    Returns a scalar in float32, or in float64 for such embeddings; 0 where no anchor has what the formula needs.
    """

    __name__: str

    def __call__(
        self,
        embeddings: torch.Tensor,
        positives: torch.Tensor,
        weights: torch.Tensor,
        *,
        temperature: Temperature = 0.33,
        beta: float = 5.0,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


@dataclass
class Rows:
    """Some anchors against all embeddings of one problem.

    Attributes
    ----------
    anchors : (R, E), of all the ``embeddings`` (N, E).
    cosines : (R, N), inner products; cosines where the embeddings have unit length.
    similarity : (R, N), the same over the temperature.
    positives : bool (R, N), never the anchor itself.
    weights : bool or numbers (R, N), as the caller gave them.
    index : (R,), which embeddings the anchors are.
    temperature : the one, or the center of those of the pairs.
    point : (R,), number of the point that the anchor is a view of, from 0 to ``points - 1`` within these rows.
    view, views : (R,) and (N,), number of the view among those of its point.
    """

    embeddings: torch.Tensor
    anchors: torch.Tensor
    cosines: torch.Tensor
    similarity: torch.Tensor
    positives: torch.Tensor
    weights: torch.Tensor
    index: torch.Tensor
    temperature: float | torch.Tensor
    beta: float
    point: torch.Tensor
    points: int
    views: torch.Tensor

    @property
    def view(self) -> torch.Tensor:
        return self.views[self.index]

    @cached_property
    def negative(self) -> torch.Tensor:
        """bool (R, N): has a weight, is no positive and not the anchor."""
        weighed = self.weights if self.weights.dtype == torch.bool else self.weights > 0
        return (weighed & ~self.positives).scatter_(1, self.index[:, None], False)

    @cached_property
    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column of every positive pair."""
        row, column = self.positives.nonzero(as_tuple=True)
        return row, column

    @cached_property
    def positive_similarity(self) -> torch.Tensor:
        """Of every positive pair, (P,)."""
        return self.similarity[self.pairs]

    @cached_property
    def has_positives(self) -> torch.Tensor:
        return self.positives.any(1)

    @cached_property
    def has_negatives(self) -> torch.Tensor:
        return self.negative.any(1)

    def mean_of_pairs(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the positives of each anchor, (P,) -> (R,); 0 without positives."""
        row = self.pairs[0]
        counts = torch.bincount(row, minlength=len(self.anchors)).clamp_min(1)
        return values.new_zeros(len(self.anchors)).index_add(0, row, values) / counts

    def log_sum(self, scores: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
        """log sum_j w_ij exp(scores_ij) over a mask of pairs, (R,); -inf, with zero gradient, where it is empty.

        The weights are those of the negatives; positives count once.
        """
        if self.weights.dtype != torch.bool:
            weights = torch.where(self.positives, 1, self.weights.to(scores.dtype))
            scores = scores + weights.log()
        return torch.logsumexp(scores.masked_fill(~among, -torch.inf), 1)

    def log_negatives(self) -> torch.Tensor:
        """log sum_j w_ij exp(s_ij) over the negatives, (R,)."""
        return self.log_sum(self.similarity, self.negative)

    def by_point(self, values: torch.Tensor, row: torch.Tensor | None = None) -> torch.Tensor:
        """log sum exp over the rows (or entries in these rows) of each point, (points,); -inf where there are none."""
        point = self.point if row is None else self.point[row]
        top = values.detach().new_full((self.points,), -torch.inf).scatter_reduce(0, point, values.detach(), "amax")
        top = top.masked_fill(top.isneginf(), 0.0)
        total = values.new_zeros(self.points).index_add(0, point, (values - top[point]).exp())
        empty = total == 0
        return (total.masked_fill(empty, 1).log() + top).masked_fill(empty, -torch.inf)


# Loss of each anchor (or each point) of some rows, and which of them count.
RowLoss = Callable[[Rows], tuple[torch.Tensor, torch.Tensor]]


def points_and_views(positives: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which embeddings are views of one point, (N,), and the number of each among those, (N,), from positives (N, N).

    A point goes by the index of its first view. Positives must be an equivalence, as those of points and of labels are.
    """
    here = torch.arange(len(positives), device=positives.device)
    first = positives.to(torch.uint8).argmax(1) if len(positives) else here
    point = torch.where(positives.any(1), torch.minimum(first, here), here)
    return point, positives.tril(-1).sum(1)


def _chunks(points: torch.Tensor | None, n: int, size: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Indices of anchors, about ``size`` at a time. With ``points`` (N,), all views of a point are in one chunk."""
    if points is None:
        yield from torch.arange(n, device=device).split(size)
        return
    order = points.argsort(stable=True)
    sizes: list[int] = []
    for count in points[order].unique_consecutive(return_counts=True)[1].tolist():
        if sizes and sizes[-1] + count <= size:
            sizes[-1] += count
        else:
            sizes.append(count)
    yield from order.split(sizes)


class _Problem:
    """One leading index: its embeddings and masks, scored and differentiated chunk by chunk."""

    def __init__(self, loss: RowLoss, positives: torch.Tensor, weights: torch.Tensor, beta: float, grouped: bool):
        self.loss, self.positives, self.weights, self.beta, self.grouped = loss, positives, weights, beta, grouped

    def total(
        self, embeddings: torch.Tensor, temperature: Temperature, grads: list[torch.Tensor | None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the losses and their number. ``grads``, of the embeddings and of the temperature, are added to."""
        n, device = len(embeddings), embeddings.device
        if n == 0:
            return embeddings.new_zeros(()), embeddings.new_zeros(())
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        point, views = points_and_views(self._without_diagonal()) if self.grouped else (None, nothing)
        size = max(1, (CHUNK_CPU if device.type == "cpu" else CHUNK_GPU) // n)
        total, count = embeddings.new_zeros(()), embeddings.new_zeros(())
        leaf = temperature.keys if isinstance(temperature, PairTemperature) else temperature
        sources = [embeddings, leaf if isinstance(leaf, torch.Tensor) else None]
        wanted = [k for k, grad in enumerate(grads) if grad is not None]
        for index in _chunks(point, n, size, device):
            with torch.set_grad_enabled(bool(wanted)):
                leaves = [s if s is None else s.detach().requires_grad_(k in wanted) for k, s in enumerate(sources)]
                rows, penalty = self._rows(index, leaves, temperature, point, views)
                values, counted = self.loss(rows)
                part = torch.where(counted, values, 0).sum() + penalty * counted.sum()
            if wanted and part.requires_grad:
                asked = [
                    (leaf, grad)
                    for leaf, grad in zip(leaves, grads, strict=True)
                    if leaf is not None and grad is not None
                ]
                found = torch.autograd.grad(part, [leaf for leaf, _ in asked], allow_unused=True)
                for (_, grad), more in zip(asked, found, strict=True):
                    if more is not None:
                        grad.add_(more)
            total += part.detach()
            count += counted.sum()
        return total, count

    def _without_diagonal(self) -> torch.Tensor:
        return self.positives.clone().fill_diagonal_(False)

    def _rows(
        self,
        index: torch.Tensor,
        leaves: list[torch.Tensor | None],
        temperature: Temperature,
        point: torch.Tensor | None,
        views: torch.Tensor,
    ) -> tuple[Rows, torch.Tensor]:
        """The rows of these anchors, and the penalty of their temperatures."""
        embeddings, leaf = leaves
        assert embeddings is not None
        anchors = embeddings[index]
        cosines = anchors @ embeddings.T
        penalty = cosines.new_zeros(())
        if isinstance(temperature, PairTemperature):
            assert leaf is not None
            temperatures = temperature.between(leaf[index], leaf)
            divisor: float | torch.Tensor = temperatures
            ratio = temperature.center / temperatures
            penalty = temperature.penalty * (ratio - ratio.log() - 1).mean()
            middle: float | torch.Tensor = temperature.center
        else:
            divisor = middle = temperature if leaf is None else leaf
        positives = self.positives[index].scatter_(1, index[:, None], False)
        local, points = index, 0
        if point is not None:
            unique, local = point[index].unique(return_inverse=True)
            points = len(unique)
        scaled, weights = cosines / divisor, self.weights[index]
        given = (embeddings, anchors, cosines, scaled, positives, weights, index, middle, self.beta)
        return Rows(*given, local, points, views), penalty


class _ByRows(torch.autograd.Function):
    """Mean loss over the counted anchors of all problems. The gradient is found on the way, and kept."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: Callable[[tuple[int, ...]], _Problem],
        pair: PairTemperature | None,
        fixed: float,
        embeddings: torch.Tensor,
        leaf: torch.Tensor | None,
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[3:]
        tensors = (embeddings, leaf)
        grads = [torch.zeros_like(t) if t is not None and w else None for t, w in zip(tensors, wanted, strict=True)]
        total, count = embeddings.new_zeros(()), embeddings.new_zeros(())
        for lead in product(*(range(n) for n in embeddings.shape[:-2])):
            own = None if leaf is None else leaf[lead]
            temperature: Temperature = fixed if own is None else own
            if pair is not None:
                assert own is not None
                temperature = PairTemperature(own, pair.center, pair.low, pair.high, pair.penalty)
            parts = problem(lead).total(embeddings[lead], temperature, [None if g is None else g[lead] for g in grads])
            total, count = total + parts[0], count + parts[1]
        count = count.clamp_min(1)
        ctx.save_for_backward(*(None if g is None else g / count for g in grads))
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return None, None, None, *(None if g is None else g * grad for g in ctx.saved_tensors)


def mean_by_rows(
    loss: RowLoss,
    embeddings: torch.Tensor,
    positives: torch.Tensor,
    weights: torch.Tensor,
    temperature: Temperature,
    beta: float,
    grouped: bool = False,
) -> torch.Tensor:
    """Mean of a row loss over all anchors that count, with memory for a few rows of one Gram matrix.

    ``grouped``: the loss is one of points, and sees all views of a point in one chunk.
    """
    check(embeddings, positives, weights)
    embeddings = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    lead, n = embeddings.shape[:-2], embeddings.shape[-2]
    positives, weights = positives.expand(*lead, n, n), weights.expand(*lead, n, n)
    pair, fixed, leaf = None, 0.0, None
    if isinstance(temperature, PairTemperature):
        pair, leaf = temperature, temperature.keys.to(embeddings.dtype)
    elif isinstance(temperature, torch.Tensor):
        leaf = temperature.to(embeddings).expand(lead)
    else:
        fixed = temperature

    def problem(at: tuple[int, ...]) -> _Problem:
        return _Problem(loss, positives[at], weights[at], beta, grouped)

    with torch.autocast(embeddings.device.type, enabled=False):
        value: torch.Tensor = _ByRows.apply(problem, pair, fixed, embeddings, leaf)
    return value


def check(embeddings: torch.Tensor, positives: torch.Tensor, weights: torch.Tensor) -> None:
    """Raises ValueError if the masks do not belong to the embeddings."""
    if embeddings.dim() < 2:
        raise ValueError(f"embeddings are (..., N, E), got shape {tuple(embeddings.shape)}")
    shape = (*embeddings.shape[:-2], embeddings.shape[-2], embeddings.shape[-2])
    for name, mask in (("positives", positives), ("weights", weights)):
        try:
            mask.expand(shape)
        except RuntimeError:
            got = tuple(mask.shape)
            raise ValueError(f"{name} must broadcast to {shape} for these embeddings, got {got}") from None
    if positives.dtype != torch.bool:
        raise ValueError(f"positives must be bool, got {positives.dtype}")


def by_rows(grouped: bool = False) -> Callable[[RowLoss], Loss]:
    """Make a row loss a `Loss`."""

    def wrap(loss: RowLoss) -> Loss:
        @wraps(loss)
        def public(
            embeddings: torch.Tensor,
            positives: torch.Tensor,
            weights: torch.Tensor,
            *,
            temperature: Temperature = 0.33,
            beta: float = 5.0,
            labels: torch.Tensor | None = None,
        ) -> torch.Tensor:
            return mean_by_rows(loss, embeddings, positives, weights, temperature, beta, grouped)

        return public

    return wrap
