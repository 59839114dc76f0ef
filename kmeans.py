"""K-means over the gate activations, the bank that keeps them, and what is read off the clusters
(paper: section 3.2, figure 2; Inter and Intra of tables 2 and 3).

One process or many: `group` says. With a torch.distributed group every rank holds its own rows of one data set (any
number of them, none too) and calls the same function at the same time; all ranks get the same centres. With None a
process works alone. `torch.distributed.group.WORLD` is None before init_process_group, so it fits both cases.

Needs torch alone. Sums are in float64, which MPS lacks: with a model there, keep the bank on the CPU.

    python kmeans.py                            # how fast K-means is here, beside scikit-learn and faiss where installed
    python kmeans.py --n 10000 --k 16 --iters 50 --device cuda
"""

import argparse
import itertools
import math
import statistics
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

CHUNK = 8192  # rows worked on at a time where that takes memory
INTER_FLOOR = 1e-3  # centres closer than this are one architecture: A lies in [0, 1] per gate


def _world():
    """The group of all ranks, or None where this process works alone."""
    return dist.group.WORLD if dist.is_available() else None


def _rank_and_size(group) -> tuple[int, int]:
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _gather(value: Tensor, group) -> Tensor:
    """[...] on each rank -> [ranks, ...] on all. Sums over ranks are `_gather(x).sum(0)`: few numbers, and the same
    bits on every rank, which an all-reduce does not promise."""
    if group is None:
        return value[None]
    # NCCL moves CUDA tensors only; with it, a bank on the CPU is gathered by way of the GPU.
    sent = (value.cuda() if dist.get_backend(group) == "nccl" else value).contiguous()
    parts = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, sent, group=group)
    return torch.stack(parts).to(value.device)


def _distances(x: Tensor, centers: Tensor) -> Tensor:
    """Euclidean [n, k], from differences: exact at 0 and untouched by TF32, without an [n, k, D] temporary."""
    return torch.cdist(x, centers, compute_mode="donot_use_mm_for_euclid_dist")


def _nearest(x: Tensor, centers: Tensor, offset: Tensor) -> Tensor:
    """Index of the nearest centre, [n]; the first on a tie."""
    if x.device.type != "cpu":
        return _distances(x, centers).min(dim=1).indices
    # On the CPU the matrix product is 8 times faster. ‖x−c‖² without the terms that all centres share, and with a
    # point amid the data taken off the centres, so that a common offset of the data does not eat the precision:
    # −2 x·c' + c'·(c' + 2 offset), c' = c − offset.
    shifted = centers.double() - offset
    bias = (shifted * (shifted + 2 * offset)).sum(dim=1)
    return torch.addmm(bias.to(x.dtype), x, (-2 * shifted).to(x.dtype).t()).min(dim=1).indices


def _summed(x: Tensor, rows: Tensor, labels: Tensor, k: int) -> Tensor:
    """On the CPU, for samples `rows` [m] with these labels [m], each cluster's sum and count: float64 [k, D + 1]."""
    sums = torch.zeros(k, x.shape[1] + 1, dtype=torch.float64)
    for j in range(k):
        members = rows[labels == j]
        if len(members):  # bags of 64 are added up in x's own precision where they lie: nothing is gathered or widened
            bags = F.embedding_bag(members, x, torch.arange(0, len(members), 64), mode="sum")
            sums[j, :-1], sums[j, -1] = bags.sum(dim=0, dtype=torch.float64), len(members)
    return sums


def _moved(x: Tensor, old: Tensor, new: Tensor, k: int) -> Tensor:
    """What the samples that changed cluster add to each cluster's sum and count: float64 [k, D + 1].
    A label of -1 is no cluster, so the first call (old = -1) gives the whole sums."""
    if x.device.type == "cpu":  # after a few iterations hardly any sample moves; on a GPU finding them costs a sync
        rows = (old != new).nonzero().squeeze(1)
        return _summed(x, rows, new[rows], k) - _summed(x, rows, old[rows], k)
    delta = torch.zeros(k, x.shape[1] + 1, dtype=torch.float64, device=x.device)
    clusters = torch.arange(k, device=x.device)[:, None]
    size = 8 * CHUNK  # few launches; in float64 and with D near 200, 100 MB
    for part, left, entered in zip(x.split(size), old.split(size), new.split(size)):
        signed = (entered == clusters).double() - (left == clusters).double()  # [k, m]
        delta[:, :-1] += signed @ part.double()
        delta[:, -1] += signed.sum(dim=1)
    return delta


def _squared_to_own(x: Tensor, centers: Tensor, labels: Tensor) -> Tensor:
    """Squared distance of each sample to its own centre, [n]."""
    out = torch.empty(len(x), dtype=x.dtype, device=x.device)
    away = x.new_empty(min(len(x), CHUNK), x.shape[1])  # for every chunk: to touch new memory costs more than the rest
    for part, index, squared in zip(x.split(CHUNK), labels.split(CHUNK), out.split(CHUNK)):
        own = torch.index_select(centers, 0, index, out=away[: len(part)])
        torch.sum(own.sub_(part).square_(), dim=1, out=squared)
    return out


def _draw(x: Tensor, weights: Tensor, uniforms: Tensor, group) -> Tensor:
    """Samples drawn with probability ∝ weights over all ranks, one for each number in [0, 1): [len(uniforms), D].
    Rows count in the order of ranks, so contiguous shards give what one process holding all rows gives."""
    rank, _ = _rank_and_size(group)
    cumulative = weights.double().cumsum(dim=0)
    total = cumulative[-1:] if len(x) else cumulative.new_zeros(1)
    ends = _gather(total, group).flatten().cumsum(dim=0)  # [ranks]
    start = ends[rank - 1] if rank else ends.new_zeros(())
    target = torch.minimum(uniforms * ends[-1], torch.nextafter(ends[-1], ends.new_zeros(())))
    drawn = x.new_zeros(len(uniforms), x.shape[1])
    if len(x):
        index = torch.searchsorted(cumulative, target - start, right=True).clamp(max=len(x) - 1)
        mine = (target >= start) & (target < ends[rank])
        drawn = torch.where(mine[:, None], x[index], drawn)
    return _gather(drawn, group).sum(dim=0)  # one rank holds the row, the others zeros


def _plus_plus(x: Tensor, k: int, seed: int, group) -> Tensor:
    """Greedy K-means++ (Arthur and Vassilvitskii, 2007): each next centre is drawn with probability ∝ squared distance
    to the nearest centre so far; of 2 + ln k such draws the one that leaves the least inertia is kept. [k, D]"""
    candidates = 2 + int(math.log(k))
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every rank and device
    uniforms = torch.rand(k, candidates, generator=generator, dtype=torch.float64).to(x.device)
    centers = x.new_empty(k, x.shape[1])
    everyone = x.new_ones(len(x))
    centers[0] = _draw(x, everyone, uniforms[0, :1], group)[0]
    closest = _distances(x, centers[:1]).squeeze(1).square()  # [n]
    inertia = _gather(closest.double().sum(), group).sum()
    for j in range(1, k):
        # Inertia 0 means fewer distinct samples than centres: any sample will do.
        drawn = _draw(x, torch.where(inertia > 0, closest, everyone), uniforms[j], group)
        left = torch.minimum(_distances(x, drawn).square(), closest[:, None])  # [n, candidates]
        inertias = _gather(left.double().sum(dim=0), group).sum(dim=0)
        best = inertias.argmin()
        centers[j], closest, inertia = drawn[best], left[:, best], inertias[best]
    return centers


def _reseed(x: Tensor, centers: Tensor, labels: Tensor, empty: list[int], group) -> None:
    """Puts each empty cluster's centre on the sample farthest from its own centre, in place."""
    far = _squared_to_own(x, centers, labels)
    for j in empty:
        row = x.new_zeros(1 + x.shape[1])  # distance, sample
        row[0] = -1  # what a rank without samples offers
        if len(x):
            distance, index = far.max(dim=0)
            row = torch.cat([distance[None], x[index]])
        rows = _gather(row, group)
        centers[j] = rows[rows[:, 0].argmax(), 1:]
        far = torch.where((x == centers[j]).all(dim=1), 0, far)  # the next one takes a sample at another place


@torch.no_grad()
def kmeans(
    x: Tensor, k: int, init: Tensor | None = None, max_iter: int = 100, seed: int = 0, group=None
) -> tuple[Tensor, Tensor, float]:
    """Lloyd's K-means.

    x:        [n, D] floating point, on any device; half precision is worked on in float32. With `group`, this rank's
              rows: n may differ between ranks and be 0, D, k and max_iter may not.
    init:     [k, D] centres to start from (the first rank's count), or None for greedy K-means++ under `seed`.
    max_iter: most updates of the centres, >= 1; it stops earlier once no sample changes cluster.
    group:    a torch.distributed group that shares the data, or None (see the top of this file).

    Returns (centers [k, D], labels [n] int64 of this rank's rows, inertia): labels are the nearest of the returned
    centres, to rounding, the first on a tie; inertia is Σ ‖x − mu(x)‖² over the samples of all ranks.

    A cluster that loses all its samples moves to the sample farthest from its own (updated) centre; several take the
    farthest, the next farthest, ..., no two at one place. With fewer distinct samples than k, the centres left over
    coincide with samples that are another centre's, and have no members. Where max_iter ends the run right after such
    a move, a cluster can still be empty. The same call gives the same result; sums are in float64 (on a CPU over bags of 64
    samples in x's precision), so shards give the centres of one process to rounding.

    Raises ValueError, on every rank, for NaN or inf in x or init, for fewer samples than k in total, and for shapes
    that do not fit.
    """
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [n, D], not {x.dtype} {tuple(x.shape)}")
    if k < 1 or max_iter < 1:
        raise ValueError(f"k and max_iter must be >= 1, not {k} and {max_iter}")
    if init is not None and init.shape != (k, x.shape[1]):
        raise ValueError(f"init must be [{k}, {x.shape[1]}], not {tuple(init.shape)}")
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
        n, D = x.shape

        # One exchange tells all ranks a point amid the data, the number of samples, the first rank's init and whether all
        # is finite, so that all of them raise or none does. A sum is finite only if its terms are.
        some = x[:: max(1, n // 1024)].double()
        head = torch.cat([some.sum(dim=0), some.new_tensor([len(some), n]), x.sum()[None]])
        if init is not None:
            head = torch.cat([head, init.to(head).flatten()])
        heads = _gather(head, group)
        total = heads[:, : D + 2].sum(dim=0)
        finite, samples = torch.stack([heads.isfinite().all().double(), total[-1]]).tolist()  # the one sync to check
        if not finite:
            raise ValueError("NaN or inf in the samples or the initial centres")
        if samples < k:
            raise ValueError(f"{k} clusters need at least {k} samples, not {int(samples)}")
        offset = total[:D] / total[D]

        centers = _plus_plus(x, k, seed, group) if init is None else heads[0, D + 3 :].view(k, D).to(x.dtype)
        labels = nowhere = torch.full((n,), -1, device=x.device)
        sums = torch.zeros(k, D + 1, dtype=torch.float64, device=x.device)  # last column: counts
        for _ in range(max_iter):
            new = _nearest(x, centers, offset)
            step = torch.cat([_moved(x, labels, new, k).flatten(), (new != labels).sum().double()[None]])
            labels = new
            step = _gather(step, group).sum(dim=0)
            sums += step[:-1].view(k, D + 1)
            counts = sums[:, -1]
            # The iteration's one sync: whether to stop, and which clusters are empty.
            changed, *sizes = torch.cat([step[-1:], counts]).tolist()
            if not changed:  # the sums came about by differences: once more, without what rounding has left in them
                sums = _gather(_moved(x, nowhere, labels, k), group).sum(dim=0)
                means = (sums[:, :-1] / counts.clamp(min=1)[:, None]).to(x.dtype)
                centers = torch.where(counts[:, None] > 0, means, centers)
                break
            centers = (sums[:, :-1] / counts.clamp(min=1)[:, None]).to(x.dtype)
            empty = [j for j, size in enumerate(sizes) if size == 0]
            if empty:
                _reseed(x, centers, labels, empty, group)
        else:  # the cap: the centres have moved since the last assignment
            labels = _nearest(x, centers, offset)
        inertia = _gather(_squared_to_own(x, centers, labels).double().sum(), group).sum()
    return centers, labels, inertia.item()


@torch.no_grad()
def assign(x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centre of each sample, the first on a tie, and the plain Euclidean distance to it.

    x [n, D], centers [k, D] -> (labels [n] int64, distances [n]). Raises ValueError for shapes that do not fit.
    """
    if x.dim() != 2 or centers.dim() != 2 or x.shape[1] != centers.shape[1] or len(centers) == 0:
        raise ValueError(f"x must be [n, D] and centers [k >= 1, D], not {tuple(x.shape)} and {tuple(centers.shape)}")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    distances, labels = _distances(x, centers.to(x)).min(dim=1)
    return labels, distances


def sigma2(inertia: float | Tensor, n: int) -> float | Tensor:
    """sigma2 = Σ ‖A − mu(x)‖² / (N − 1) of equation (2), N all samples clustered, whatever their cluster.
    One sample or none has no spread: 0, which the clustering loss raises to its floor."""
    return inertia / (n - 1) if n > 1 else inertia * 0.0


@torch.no_grad()
def inter_intra(A: Tensor, labels: Tensor, centers: Tensor, max_samples: int | None = None) -> tuple[float, float]:
    """Inter and Intra of tables 2 and 3, as section 4.1 words them.

    Inter: mean Euclidean distance over pairs of centres (empty clusters' too); 0.0 for fewer than two centres.
    Intra: mean distance over pairs of samples in a cluster, averaged over the clusters of at least two samples;
           0.0 if there is none.

    A [n, D], labels [n], centers [k, D]. Works in blocks of about 64 MiB, in time ∝ Σ n_k²; `max_samples` takes that
    many samples of each cluster, evenly spaced in their order, the same ones each time.
    Raises ValueError for shapes that do not fit or max_samples < 2.
    """
    if A.dim() != 2 or labels.shape != A.shape[:1] or centers.dim() != 2 or centers.shape[1] != A.shape[1]:
        raise ValueError(
            f"A [n, D], labels [n] and centers [k, D] do not fit: "
            f"{tuple(A.shape)}, {tuple(labels.shape)}, {tuple(centers.shape)}"
        )
    if max_samples is not None and max_samples < 2:
        raise ValueError(f"max_samples must be at least 2, not {max_samples}")

    def mean_over_pairs(x: Tensor) -> float:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        total = 0.0
        rows = max(1, 2**24 // len(x))
        for start in range(0, len(x), rows):
            block, rest = x[start : start + rows], x[start + rows :]
            # Within the block every pair comes twice, and a sample with itself at distance 0.
            total = total + _distances(block, block).sum(dtype=torch.float64) / 2
            if len(rest):
                total = total + _distances(block, rest).sum(dtype=torch.float64)
        return float(total) / (len(x) * (len(x) - 1) / 2)  # a sync: this is for the log

    intra = []
    for j in range(len(centers)):
        members = (labels == j).nonzero().squeeze(1)  # a sync: the pairs' number depends on it
        if max_samples is not None and len(members) > max_samples:
            spaced = torch.arange(max_samples, device=members.device) * len(members) // max_samples
            members = members[spaced]
        if len(members) > 1:
            intra.append(mean_over_pairs(A[members]))
    inter = mean_over_pairs(centers) if len(centers) > 1 else 0.0
    return inter, sum(intra) / len(intra) if intra else 0.0


def agreement(labels: Tensor, truth: Tensor) -> tuple[float, float, Tensor, list[int]]:
    """How well clusters recover known subsets.

    labels, truth: [n] int64 >= 0; truth < 8.
    Returns (accuracy, adjusted Rand index, table, match): table [subsets, clusters] counts images; match[s] is the
    cluster that the best one-to-one matching gives to subset s (-1 for none), accuracy the share of images in it, in
    0..1; the index (Hubert and Arabie, 1985) is 1 for equal partitions and 0 on average for independent ones.
    """
    subsets, clusters = int(truth.max()) + 1, int(labels.max()) + 1
    if subsets > 8:
        raise ValueError(f"at most 8 subsets can be matched, not {subsets}")
    columns = max(subsets, clusters)
    table = torch.bincount(truth * columns + labels, minlength=subsets * columns).view(subsets, columns)
    matches = torch.tensor(list(itertools.permutations(range(columns), subsets)))  # [.., subsets]
    hits = table[torch.arange(subsets), matches].sum(1)
    best = matches[hits.argmax()]

    def pairs(counts: Tensor) -> float:
        return (counts.double() * (counts - 1) / 2).sum().item()

    by_subset, by_cluster, total = pairs(table.sum(1)), pairs(table.sum(0)), pairs(table.sum())
    expected, most = by_subset * by_cluster / max(total, 1), (by_subset + by_cluster) / 2
    rand = (pairs(table) - expected) / (most - expected) if most != expected else 1.0
    match = [m if m < clusters else -1 for m in best.tolist()]
    return hits.max().item() / len(labels), rand, table[:, :clusters], match


def describe_collapse(sizes, inter: float, intra: float) -> str | None:
    """One line of plain words if the clustering has collapsed, else None.

    sizes: samples per cluster (list or tensor [k]). Collapsed is: a cluster without samples, or centres at one place,
    i.e. inter below 0.001 (A lies in [0, 1] per gate) or below 0.15 intra (a cut through one cloud: K-means on uniform
    198-dimensional noise, which has no clusters, gives 0.10 to 0.13).
    """
    sizes = [int(size) for size in sizes]
    empty = [j for j, size in enumerate(sizes) if size == 0]
    if empty:
        which = ", ".join(map(str, empty))
        return f"collapsed: {len(empty)} of {len(sizes)} clusters hold no sample (cluster {which}; sizes {sizes})"
    if len(sizes) > 1 and inter < max(INTER_FLOOR, 0.15 * intra):
        return (
            f"collapsed: the centres are nearly one architecture "
            f"(inter {inter:.2g}, intra {intra:.2g}, sizes {sizes})"
        )
    return None


class Clusters(NamedTuple):
    """What the training loop keeps between two K-means updates."""

    centers: Tensor  # [k, D] float32, the mu_k, in the units of A
    sigma2: float  # equation (2)
    sizes: list[int]  # samples per cluster, over all ranks
    inertia: float


class ActivationBank:
    """The latest A(x_i) of every training sample, by its index, the same on every rank.

    num_samples: N of the training set; dim: D. Takes N·D·4 bytes (COCO: 94 MB). On the device the model runs on, an
    update does not wait; on the CPU each one waits for the GPU.
    momentum: in [0, 1), the share of what is kept of a sample that stays when it is seen again. Above 0, a sample's
    value is a running mean over its augmented views, of which the last 1 / (1 − momentum) count most.
    `values` [N, D] float32 (zeros where not seen yet), `seen` [N] bool.
    """

    def __init__(self, num_samples: int, dim: int, device: str | torch.device = "cpu", momentum: float = 0.0):
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), not {momentum}")
        self.momentum = momentum
        self.values = torch.zeros(num_samples, dim, device=device)
        self.seen = torch.zeros(num_samples, dtype=torch.bool, device=device)

    @property
    def count(self) -> int:
        """How many samples have been seen."""
        return int(self.seen.sum())  # a sync: asked only when clustering

    @torch.no_grad()
    def update(self, index: Tensor, A: Tensor) -> None:
        """Keeps A [b, D] of the samples `index` [b] (int64), from all ranks; all must call it with the same b.
        An index that comes twice in a step keeps one of its A. Raises ValueError for shapes that do not fit."""
        if index.dim() != 1 or A.shape != (len(index), self.values.shape[1]):
            raise ValueError(
                f"index must be [b] and A [b, {self.values.shape[1]}], not {tuple(index.shape)} and {tuple(A.shape)}"
            )
        group = _world()
        index = _gather(index.to(A.device, non_blocking=True), group).flatten(0, 1).to(self.values.device)
        A = _gather(A.detach().float(), group).flatten(0, 1).to(self.values.device)
        if self.momentum:
            A = torch.lerp(A, self.values[index], self.momentum * self.seen[index, None])
        self.values[index] = A
        self.seen[index] = True

    def shard(self) -> tuple[Tensor, Tensor]:
        """This rank's contiguous share of the seen samples: (index [m], A [m, D]); shares differ by at most one."""
        rank, size = _rank_and_size(_world())
        index = self.seen.nonzero().squeeze(1).tensor_split(size)[rank]  # a sync: once per K-means update
        return index, self.values[index]

    def cluster(
        self, k: int, centers: Tensor | None = None, seed: int = 0, max_iter: int = 100, restarts: int = 0,
        metric: Tensor | None = None,
    ) -> Clusters:  # fmt: skip
        """K-means over the samples seen so far, shared out over the ranks, from `centers` [k, D] (the last update's)
        or K-means++; and from `restarts` further K-means++ starts, of which the result with the least inertia is kept.
        metric: [D] above 0, what each entry of A is multiplied by before distances are taken; sigma2 and inertia are
        in its units, centres in those of A. Raises ValueError while fewer than k are seen."""
        group = _world()
        _, A = self.shard()
        if metric is not None:
            A, centers = A * metric, centers if centers is None else centers * metric
        tries = [kmeans(A, k, centers, max_iter, seed, group)]
        tries += [kmeans(A, k, None, max_iter, seed + j, group) for j in range(1, restarts + 1)]
        centers, labels, inertia = min(tries, key=lambda result: result[2])  # the same on every rank
        centers = centers if metric is None else centers / metric
        sizes = _gather(torch.bincount(labels, minlength=k), group).sum(dim=0).tolist()
        return Clusters(centers, sigma2(inertia, sum(sizes)), sizes, inertia)

    def group(self, labels: Tensor, k: int, metric: Tensor | None = None) -> Clusters:
        """What `cluster` returns, for groups that are known: labels [N] int64 in [0, k) of all samples, seen or not.
        A group of which nothing is seen has its centre at 0."""
        A, labels = self.values[self.seen].double(), labels[self.seen]
        sizes = torch.bincount(labels, minlength=k)
        sums = torch.zeros(k, A.shape[1], dtype=A.dtype, device=A.device).index_add_(0, labels, A)
        centers = sums / sizes.clamp(min=1)[:, None]
        weight = 1.0 if metric is None else metric.double()
        inertia = ((A - centers[labels]) * weight).square().sum().item()
        return Clusters(centers.float(), sigma2(inertia, len(A)), sizes.tolist(), inertia)

    def state_dict(self) -> dict[str, Tensor]:
        return {"values": self.values, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError if `state` is of a bank of another size."""
        if state["values"].shape != self.values.shape or state["seen"].shape != self.seen.shape:
            raise ValueError(f"the bank is {tuple(self.values.shape)}, the state {tuple(state['values'].shape)}")
        self.values.copy_(state["values"])
        self.seen.copy_(state["seen"])


def _example(kind: str, n: int, dim: int) -> Tensor:
    """Data to measure on, [n, dim] in [0, 1): "noise", uniform, or "gates", formed as gate activations are:
    relu(tanh(·)) of logits that follow a dozen factors, in 16 overlapping groups."""
    generator = torch.Generator().manual_seed(0)
    if kind == "noise":
        return torch.rand(n, dim, generator=generator)
    groups, factors = torch.randn(16, 12, generator=generator), torch.randn(12, dim, generator=generator) / 12**0.5
    place = groups[torch.randint(16, (n,), generator=generator)] + 0.6 * torch.randn(n, 12, generator=generator)
    return (place @ factors + 0.1 * torch.randn(n, dim, generator=generator) + 0.5).tanh_().relu_()


def _contenders(x: Tensor, k: int, init: Tensor, iters: int) -> dict:
    """Who can run Lloyd's algorithm here: name -> a function that does so from `init` and returns the inertia."""

    def ours() -> float:
        return kmeans(x, k, init, iters)[2]  # reads a number off the device at the end, so it has finished

    found = {"kmeans.py": ours}
    try:
        from sklearn.cluster import KMeans

        model = KMeans(k, init=init.cpu().numpy(), n_init=1, max_iter=iters, tol=0, algorithm="lloyd")
        rows = x.cpu().numpy()
        found["scikit-learn, CPU"] = lambda: float(model.fit(rows).inertia_)
    except ImportError:
        pass
    try:
        import faiss

        def others() -> float:
            clustering = faiss.Kmeans(x.shape[1], k, niter=iters, min_points_per_centroid=1, max_points_per_centroid=len(x),
                                      gpu=x.is_cuda and faiss.get_num_gpus() > 0)  # fmt: skip
            clustering.train(rows, init_centroids=init.cpu().numpy())
            return float(clustering.assign(rows)[0].sum(dtype="float64"))  # of the centres that it returns

        rows = x.cpu().numpy()
        found["faiss"] = others
    except ImportError:
        pass
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=118_287, help="samples (default: %(default)s, COCO's training set)")
    parser.add_argument("--dim", type=int, default=198, help="their length (default: %(default)s, A(x) of Layer17)")
    parser.add_argument("--k", type=int, nargs="+", default=[2, 4, 8], help="clusters (default: 2 4 8)")
    parser.add_argument("--iters", type=int, default=20, help="iterations at most (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each, in turns (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where kmeans.py runs (default: %(default)s)")
    arguments = parser.parse_args()
    for flag, given, least in (("k", min(arguments.k), 1), ("n", arguments.n, max(arguments.k)), ("dim", arguments.dim, 1),
                               ("iters", arguments.iters, 1), ("runs", arguments.runs, 1)):  # fmt: skip
        if given < least:
            parser.exit(2, f"kmeans.py: --{flag} {given}: must be at least {least}\n")
    try:
        torch.zeros(1, device=arguments.device, dtype=torch.float64).item()
    except (RuntimeError, AssertionError, TypeError):
        parser.exit(2, f"kmeans.py: --device {arguments.device}: not available here, or without float64; try cpu\n")

    print(f"K-means, N = {arguments.n}, D = {arguments.dim}, at most {arguments.iters} iterations from the first K samples; "
          f"torch {torch.__version__}, {arguments.device}, {torch.get_num_threads()} threads")  # fmt: skip
    print(f"{'data':7}{'K':>3}  {'':18}{'median s':>10}{'min':>9}{'max':>9}{'ratio':>8}{'inertia':>14}")
    for kind in ("gates", "noise"):
        x = _example(kind, arguments.n, arguments.dim).to(arguments.device)
        for k in arguments.k:
            contenders = _contenders(x, k, x[:k].clone(), arguments.iters)
            inertias = {name: run() for name, run in contenders.items()}  # also warms up
            seconds = {name: [] for name in contenders}
            for _ in range(arguments.runs):
                for name, run in contenders.items():
                    start = time.perf_counter()
                    run()
                    seconds[name].append(time.perf_counter() - start)
            first = statistics.median(seconds["kmeans.py"])
            for name, times in seconds.items():
                median = statistics.median(times)
                print(f"{kind:7}{k:3}  {name:18}{median:10.3f}{min(times):9.3f}{max(times):9.3f}{median / first:8.2f}{inertias[name]:14.6g}")


if __name__ == "__main__":
    main()
