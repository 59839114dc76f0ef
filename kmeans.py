"""K-means over the gate activations, the bank that keeps them, and what is read off the clusters
(paper: section 3.2 and figure 2; Inter and Intra of tables 2 and 3).

    bank = ActivationBank(num_samples=len(dataset), dim=backbone.dim, device=images.device)
    bank.update(index, A)                        # every step; index: int64 [b], the numbers of the samples
    clusters = bank.cluster(k=4)                 # now and then
    clusters.centers, clusters.labels, clusters.sigma2
    expert, distance = clusters.nearest(A)       # of any image

    # beyond the paper: what an image's look changes in A(x) counts little
    bank.update_views(A, other)                  # now and then; other: A(x) of the batch with another look
    clusters = bank.cluster(k=4, metric=bank.view_metric())

With torch.distributed every rank keeps the whole bank: `update` gathers what all ranks saw, and the first
rank clusters for all. The bank then lies where the process group can send from: with NCCL, on the GPU.
Sums are in float64, which MPS lacks: with a model there, keep the bank on the CPU. Needs torch alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 2048  # rows worked on at a time where a copy of all would not fit a cache
INTER_FLOOR = 1e-3  # centres closer than this are one architecture


# ============ K-means ============


@torch.no_grad()
def kmeans(
    x: Tensor, k: int, init: Tensor | None = None, max_iter: int = 100, seed: int = 0
) -> tuple[Tensor, Tensor, float]:
    """Lloyd's K-means.

    x:        [n, D] floating point, on any device; half precision is worked on in float32.
    init:     [k, D] centres to start from, or None for greedy K-means++ under `seed`.
    max_iter: most updates of the centres, >= 1; it stops earlier once no sample changes cluster.

    Returns (centers [k, D], labels [n] int64, inertia): labels are the nearest of the returned centres, to
    rounding, the first on a tie; inertia is Σ ‖x − mu(x)‖². The same call gives the same result.

    A cluster that has no sample starts again, where K-means++ would add a centre to the others. With fewer
    distinct samples than k, the centres left over lie on samples of other clusters and have no members.

    Raises ValueError for NaN or inf in x or init, fewer samples than k, and shapes that do not fit.
    """
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [n, D], not {x.dtype} {tuple(x.shape)}")
    if k < 1 or max_iter < 1:
        raise ValueError(f"k and max_iter must be >= 1, not {k} and {max_iter}")
    if len(x) < k:
        raise ValueError(f"{k} clusters need at least {k} samples, not {len(x)}")
    if init is not None and init.shape != (k, x.shape[1]):
        raise ValueError(f"init must be [{k}, {x.shape[1]}], not {tuple(init.shape)}")
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
        if not x.sum().isfinite():  # a sum is finite only if its terms are
            raise ValueError("NaN or inf in the samples")
        centers = _plus_plus(x, k, seed) if init is None else init.to(x, copy=True)
        if not centers.isfinite().all():
            raise ValueError("NaN or inf in the initial centres")
        offset = x.mean(dim=0).double()
        labels = x.new_full((len(x),), -1, dtype=torch.int64)
        sums = x.new_zeros(k, x.shape[1], dtype=torch.float64)
        for _ in range(max_iter):
            nearest = _nearest(x, centers, offset)
            empty = nearest.bincount(minlength=k) == 0
            if empty.any():  # a sync
                centers[empty] = _plus_plus(x, int(empty.sum()), seed, centers[~empty])
                nearest = _nearest(x, centers, offset)
            moved = (nearest != labels).nonzero().squeeze(1)  # a sync; soon hardly any sample moves
            if len(moved) == 0:
                break
            _move(sums, x, moved, labels, nearest)
            labels = nearest
            sizes = labels.bincount(minlength=k)[:, None]
            centers = torch.where(sizes > 0, (sums / sizes.clamp(min=1)).to(x.dtype), centers)
        else:  # the centres have moved since the last assignment
            labels = _nearest(x, centers, offset)
        inertia = _squared_to_own(x, centers, labels).double().sum().item()
    return centers, labels, inertia


def _nearest(x: Tensor, centers: Tensor, offset: Tensor) -> Tensor:
    """Index of the nearest centre, [n], by one matrix product: eight times faster than from differences.

    With c' = c − offset, ‖x − c‖² is −2 x·c' + c'·(c' + 2 offset) and a part that is the same
    for all centres. `offset` [D] is a point amid the data: a large value common to all samples
    would cost precision.
    """
    shifted = centers.double() - offset
    bias = (shifted * (shifted + 2 * offset)).sum(dim=1)
    return torch.addmm(bias.to(x.dtype), x, (-2 * shifted).to(x.dtype).t()).argmin(dim=1)


def _move(sums: Tensor, x: Tensor, moved: Tensor, old: Tensor, new: Tensor) -> None:
    """Moves samples `moved` [m] from the sums [k, D] of their old clusters (-1: none) to their new ones'."""
    clusters = torch.arange(len(sums), device=x.device)[:, None]
    for rows in moved.split(CHUNK):
        sign = (new[rows] == clusters).double() - (old[rows] == clusters).double()  # [k, rows]
        sums += sign @ x[rows].double()


def _squared_to_own(x: Tensor, centers: Tensor, labels: Tensor) -> Tensor:
    """Squared distance of each sample to its own centre, [n]."""
    parts = zip(x.split(CHUNK), labels.split(CHUNK))
    return torch.cat([(part - centers[own]).square_().sum(dim=1) for part, own in parts])


def _plus_plus(x: Tensor, k: int, seed: int, others: Tensor | None = None) -> Tensor:
    """Greedy K-means++ (Arthur and Vassilvitskii, 2007) -> k centres [k, D], beside `others` [m, D] if given.

    Each next centre is drawn with probability ∝ squared distance to the nearest centre so far; of 2 + ln k
    such draws the one that leaves the least inertia is kept.
    """
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws for every device
    uniforms = torch.rand(k, 2 + int(math.log(k)), generator=generator, dtype=torch.float64).to(x.device)

    def draw(weights, uniforms):
        cumulative = weights.double().cumsum(dim=0)
        index = torch.searchsorted(cumulative, uniforms * cumulative[-1], right=True)
        return x[index.clamp(max=len(x) - 1)]

    everyone = x.new_ones(len(x))
    first = draw(everyone, uniforms[0, :1]) if others is None else others
    closest = _distances(x, first).amin(dim=1).square()  # [n]
    centers = [first[0]] if others is None else []
    for j in range(len(centers), k):
        # Inertia 0 means that there are fewer distinct samples than centres: any sample will do.
        drawn = draw(torch.where(closest.sum() > 0, closest, everyone), uniforms[j])
        left = torch.minimum(_distances(x, drawn).square(), closest[:, None])  # [n, draws]
        best = left.double().sum(dim=0).argmin()
        centers.append(drawn[best])
        closest = left[:, best]
    return torch.stack(centers)


def _distances(x: Tensor, centers: Tensor) -> Tensor:
    """Euclidean [n, k], from differences: exact at 0, and without an [n, k, D] temporary."""
    return torch.cdist(x, centers, compute_mode="donot_use_mm_for_euclid_dist")


@torch.no_grad()
def assign(x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centre of each sample, the first on a tie, and the Euclidean distance to it.

    x [n, D], centers [k, D] -> (labels [n] int64, distances [n]).
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    distances, labels = _distances(x, centers.to(x)).min(dim=1)
    return labels, distances


# ============ the bank ============


class Clusters(NamedTuple):
    """What a K-means update leaves for the steps after it."""

    centers: Tensor  # [k, D] float32, the mu_k, in the units of A
    labels: Tensor  # [N] int64, the cluster of each sample of the training set; -1 where it was not seen yet
    sigma2: float  # Σ ‖A − mu(x)‖² / (n − 1) over the n samples clustered, equation (2)
    sizes: list[int]  # of these samples, by cluster
    metric: Tensor | None = None  # [D, D], see `ActivationBank.view_metric`; None: distances are plain

    @classmethod
    def of(cls, A: Tensor, k: int) -> Clusters:
        """The clusters of A [n, D] alone, k or, of fewer samples, as many as there are."""
        centers, labels, inertia = kmeans(A, min(k, len(A)))
        sizes = labels.bincount(minlength=len(centers)).tolist()
        return cls(centers, labels, inertia / max(len(A) - 1, 1), sizes)

    def nearest(self, A: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest centre [n] of each A [n, D], and the distance [n] to it, both in the metric."""
        if self.metric is None:
            return assign(A, self.centers)
        metric = self.metric.to(A.device)
        return assign(A @ metric, self.centers.to(A.device) @ metric)


class ActivationBank:
    """The latest A(x_i) of every training sample by its index, the same on every rank, and its clusters.

    Args:
        num_samples, dim: N of the training set, and D. Takes 4·N·D bytes (COCO: 94 MB).
        device: best the one the model runs on; elsewhere every update waits for the model's.
        age: K-means leaves out samples that the last so many updates did not see; None: it sees all. Where
            an epoch takes longer than gates take to change, old values would blur the centres.

    Attributes: values [N, D] float32, 0 where nothing was seen; seen_at [N] int64, the update that saw a
    sample last, 0 for none; updates, their number; clusters, None before the first K-means update; within
    and between [D, D], and compared, the number of calls of `update_views`.
    """

    def __init__(
        self, num_samples: int, dim: int, device: torch.device | str = "cpu", age: int | None = None
    ):
        self.age = age
        self.values = torch.zeros(num_samples, dim, device=device)
        self.seen_at = torch.zeros(num_samples, dtype=torch.int64, device=device)
        self.updates = 0
        self.clusters: Clusters | None = None
        self.within = torch.zeros(dim, dim, device=device)
        self.between = torch.zeros(dim, dim, device=device)
        self.compared = 0

    @property
    def recent(self) -> Tensor:
        """bool [N]: the samples that K-means sees."""
        oldest = 1 if self.age is None else max(1, self.updates - self.age + 1)
        return self.seen_at >= oldest

    @property
    def count(self) -> int:
        """How many samples K-means sees."""
        return int(self.recent.sum())  # a sync: asked only when clustering

    @torch.no_grad()
    def update(self, index: Tensor, A: Tensor) -> None:
        """Keeps A [b, D] of the samples `index` [b] (int64), from all ranks; all call it with the same b.

        An index that comes twice in a step keeps one of its A. Raises ValueError for shapes that do not fit.
        """
        if index.dim() != 1 or A.shape != (len(index), self.values.shape[1]):
            shapes = f"{tuple(index.shape)} and {tuple(A.shape)}"
            raise ValueError(f"index must be [b] and A [b, {self.values.shape[1]}], not {shapes}")
        device = self.values.device
        index = _gather(index.to(device, non_blocking=True))
        A = _gather(A.detach().float().to(device))
        self.values[index] = A
        self.updates += 1
        self.seen_at.index_fill_(0, index, self.updates)  # [index] = would wait for the device

    @torch.no_grad()
    def update_views(self, A: Tensor, other: Tensor, momentum: float = 0.98) -> None:
        """Takes in the A(x) of some samples, [b, D], and that of the same samples with another look, [b, D].

        Keeps running means, in which a call counts 1 − momentum, over the samples of all ranks: `within` is
        the covariance of A(x) over the looks of a sample, `between` that over samples of what looks share.
        """
        one = _gather(A.detach().float().to(self.values.device))
        two = _gather(other.detach().float().to(self.values.device))
        one, two = one - one.mean(0), two - two.mean(0)
        difference, pairs = one - two, 2 * len(one)
        self.compared += 1
        weight = max(1 - momentum, 1 / self.compared)
        self.within.lerp_(difference.T @ difference / pairs, weight)
        self.between.lerp_((one.T @ two + two.T @ one) / pairs, weight)

    def view_metric(self, ridge: float = 1e-3) -> Tensor | None:
        """M [D, D]: in ‖(A − B) M‖ a direction counts as it tells samples apart whatever their look.

        Directions are scaled to unit variance over the looks of a sample, then by s / (s + 1), where s is
        their variance over samples (Wiener's filter). `ridge` times the largest variance over looks is added
        to all of them. None where looks were not compared, change nothing, or share nothing.
        """
        if not self.compared:
            return None
        noise, axes = torch.linalg.eigh(self.within.double())
        if not noise[-1] > 0:  # a sync: once per K-means update
            return None
        whiten = axes * (noise.clamp(min=0) + ridge * noise[-1]).rsqrt() @ axes.T
        signal, axes = torch.linalg.eigh(whiten @ self.between.double() @ whiten)
        signal = signal.clamp(min=0)
        return (whiten @ axes * (signal / (signal + 1))).float() if signal[-1] > 0 else None

    def cluster(
        self, k: int, seed: int = 0, max_iter: int = 100, restarts: int = 0, metric: Tensor | None = None
    ) -> Clusters:
        """K-means over the recent samples; sets and returns `clusters`.

        It starts from the last centres, if there are k, else from K-means++. An older sample is of the
        cluster whose centre is nearest to its value.

        restarts: how many more starts it tries, from K-means++. The result with the least inertia is kept;
            its clusters take the numbers of the last ones that they are nearest to.
        metric: [D, D], what A is multiplied by to find out which samples belong together. Centres and sigma2
            are in the units of A all the same; a cluster without samples then has its centre at 0.
        Raises ValueError while fewer than k samples are recent.
        """
        recent = self.recent
        index = recent.nonzero().squeeze(1)  # a sync: once per K-means update
        if len(index) < k:
            raise ValueError(f"{k} clusters need at least {k} samples, not {len(index)}")
        start = None
        if self.clusters is not None and len(self.clusters.centers) == k:
            start = self.clusters.centers
        centers = self.values.new_empty(k, self.values.shape[1])
        labels = torch.full_like(self.seen_at, -1)
        inertia = self.values.new_zeros(1, dtype=torch.float64)
        if not _distributed() or dist.get_rank() == 0:
            A, older = self.values[index], ((self.seen_at > 0) & ~recent).nonzero().squeeze(1)
            old = self.values[older]
            if metric is not None:
                A, old = A @ metric, old @ metric
                start = None if start is None else start @ metric
            starts = [start] + [None] * restarts
            results = [kmeans(A, k, init, max_iter, seed + j) for j, init in enumerate(starts)]
            centers, found, inertia[0] = min(results, key=lambda result: result[2])
            if start is not None and centers is not results[0][0]:
                order = _matched(start, centers)
                centers, found = centers[order], order.argsort()[found]
            labels[index] = found
            labels[older] = assign(old, centers)[0]
            if metric is not None:
                centers, inertia[0] = _means(self.values[index], labels[index], k)
        if _distributed():
            for tensor in (centers, labels, inertia):
                dist.broadcast(tensor, 0)
        sizes = labels[index].bincount(minlength=k).tolist()
        self.clusters = Clusters(centers, labels, inertia.item() / max(len(index) - 1, 1), sizes, metric)
        return self.clusters

    def cluster_known(self, labels: Tensor, k: int) -> Clusters:
        """`cluster` for clusters that are known: labels int64 [N] in [0, k) of all samples, seen or not.

        A cluster without a recent sample has its centre at 0.
        """
        labels = labels.to(self.values.device)
        A, own = self.values[self.recent], labels[self.recent]
        centers, inertia = _means(A, own, k)
        sizes = own.bincount(minlength=k).tolist()
        self.clusters = Clusters(centers, labels, inertia / max(len(A) - 1, 1), sizes)
        return self.clusters

    def state_dict(self) -> dict:
        clusters = self.clusters and self.clusters._asdict()
        names = ("values", "seen_at", "updates", "within", "between", "compared")
        return {name: getattr(self, name) for name in names} | {"clusters": clusters}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError if `state` is of a bank of another size."""
        if state["values"].shape != self.values.shape:
            shapes = f"{tuple(self.values.shape)}, the state {tuple(state['values'].shape)}"
            raise ValueError(f"the bank is {shapes}")
        for name in ("values", "seen_at", "within", "between"):
            getattr(self, name).copy_(state[name])
        self.updates, self.compared = state["updates"], state["compared"]
        if state["clusters"] is not None:
            parts = {}
            for name, part in state["clusters"].items():
                parts[name] = part.to(self.values.device) if isinstance(part, Tensor) else part
            self.clusters = Clusters(**parts)


def _matched(old: Tensor, new: Tensor) -> Tensor:
    """Which of the `new` centres [k, D] takes the place of each `old` one [k, D]: int64 [k], nearest pairs
    first."""
    distances, order = _distances(old, new), torch.zeros(len(old), dtype=torch.int64, device=old.device)
    for _ in order:
        i, j = divmod(int(distances.argmin()), len(old))
        order[i] = j
        distances[i], distances[:, j] = torch.inf, torch.inf
    return order


def _means(A: Tensor, labels: Tensor, k: int) -> tuple[Tensor, float]:
    """The mean of the A [n, D] of each label, [k, D], 0 of an empty one; and Σ ‖A − mean‖²."""
    A = A.double()
    sums = A.new_zeros(k, A.shape[1]).index_add_(0, labels, A)
    means = sums / labels.bincount(minlength=k).clamp(min=1)[:, None]
    return means.float(), (A - means[labels]).square().sum().item()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _gather(value: Tensor) -> Tensor:
    """[b, ...] on each rank -> [ranks · b, ...] on all."""
    if not _distributed():
        return value
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts)


# ============ what is read off the clusters ============


@torch.no_grad()
def inter_intra(
    A: Tensor, labels: Tensor, centers: Tensor, max_samples: int | None = None
) -> tuple[float, float]:
    """Inter and Intra of tables 2 and 3, as section 4.1 words them; see also `intra_to_centre`.

    Inter: mean Euclidean distance over pairs of centres, empty clusters' too; 0.0 for a single one.
    Intra: mean distance over pairs of samples in a cluster, averaged over the clusters of at least two
           samples; 0.0 if there is none.

    A [n, D]; labels [n], -1: left out; centers [k, D]. `max_samples`, at least 2, takes that many samples of
    each cluster, evenly spaced in their order.
    """
    intra = []
    for j in range(len(centers)):
        members = (labels == j).nonzero().squeeze(1)  # a sync: this is for the log
        if max_samples is not None and len(members) > max_samples:
            spaced = torch.arange(max_samples, device=members.device) * len(members) // max_samples
            members = members[spaced]
        if len(members) > 1:
            intra.append(_mean_over_pairs(A[members]))
    inter = _mean_over_pairs(centers) if len(centers) > 1 else 0.0
    return inter, sum(intra) / len(intra) if intra else 0.0


@torch.no_grad()
def intra_to_centre(A: Tensor, labels: Tensor, centers: Tensor) -> float:
    """Intra as the caption of table 2 words it, "how close the samples are to the cluster centers".

    The mean Euclidean distance of a cluster's samples to its centre, averaged over the clusters that have
    samples; 0.0 if none has. A [n, D]; labels [n], -1: left out; centers [k, D].
    """
    A, labels = A[labels >= 0], labels[labels >= 0]
    distances = _squared_to_own(A, centers, labels).double().sqrt()
    sizes = labels.bincount(minlength=len(centers))
    sums = distances.new_zeros(len(centers)).index_add_(0, labels, distances)
    means = (sums / sizes)[sizes > 0]
    return means.mean().item() if len(means) else 0.0


def _mean_over_pairs(x: Tensor) -> float:
    """Mean distance over the pairs of samples [n >= 2, D], in blocks of about 64 MiB."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    total = 0.0
    for rows in x.split(max(1, 2**24 // len(x))):
        total = total + _distances(rows, x).sum(dtype=torch.float64)  # every pair twice, and n times 0
    return float(total) / (len(x) * (len(x) - 1))


def describe_collapse(sizes: list[int], inter: float, intra: float) -> str | None:
    """One line of plain words if the clustering has collapsed, else None.

    sizes: samples per cluster. Collapsed is: a cluster without samples, or centres at one place. That is
    inter below 0.001 or below 0.15 intra (a cut through one cloud: K-means on
    uniform 198-dimensional noise, which has no clusters, gives 0.10 to 0.13).
    """
    empty = [str(j) for j, size in enumerate(sizes) if size == 0]
    if empty:
        which = f"(cluster {', '.join(empty)}; sizes {sizes})"
        return f"collapsed: {len(empty)} of {len(sizes)} clusters hold no sample {which}"
    if len(sizes) > 1 and inter < max(INTER_FLOOR, 0.15 * intra):
        numbers = f"(inter {inter:.2g}, intra {intra:.2g}, sizes {sizes})"
        return f"collapsed: the centres are nearly one architecture {numbers}"
    return None
