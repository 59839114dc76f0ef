"""The two terms DivDR adds to the task loss (paper: section 3.2, equations 2 and 3).

    L = L_task + lambda1 · L_cost + lambda2 · L_clustering

Needs torch alone.
"""

import torch
from torch import Tensor

SIGMA2_FLOOR = 1e-4  # the clustering loss divides by no less; a cluster of equal samples has sigma2 = 0


def cost_loss(cost: Tensor, total: float | Tensor, budget: float) -> Tensor:
    """L_cost, the mean over images of (C(x) / C_all − mu_budget)² (DivDR, equations 1 and 3).

    Each image is held to the budget by itself, as in Dynamic Routing's recipe of one image per GPU.

    cost:   [B], expected multiply-adds of each image.
    total:  C_all > 0, the same cost with every alpha = 1 (float or 0-dim tensor); of a RoutedBackbone
            `backbone.costs(H, W).full`.
    budget: mu_budget in [0, 1], the share of C_all to aim for.
    Returns a 0-dim tensor. Raises ValueError for a cost that is not [B >= 1] or a budget outside [0, 1].
    """
    if cost.dim() != 1 or len(cost) == 0:
        raise ValueError(f"cost must be [B] with B >= 1, not {tuple(cost.shape)}")
    if not 0 <= budget <= 1:
        raise ValueError(f"budget must lie in [0, 1], not {budget}")
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))  # multiply-adds overflow half precision
    return (cost / total - budget).square().mean()


def budget_ramp(progress: float, start: float = 0.4, length: float = 0.02) -> float:
    """Weight in [0, 1] of the cost loss at `progress` (iteration / iterations): 0 up to `start`, then linear.

    The gates first learn what they are good for; a budget from the first step on closes most of them before
    they do. `length` 0 switches the loss on at `start` at once.
    """
    if length <= 0:
        return float(progress >= start)
    return min(max((progress - start) / length, 0.0), 1.0)


def clustering_loss(
    A: Tensor,
    centers: Tensor,
    sigma2: float | Tensor,
    margin: float,
    own: Tensor | None = None,
    sigma2_floor: float = SIGMA2_FLOOR,
    reduction: str = "mean",
) -> Tensor:
    """L_clustering, equation (2): pulls A(x) to its own centre mu(x), pushes it from the others.

    The mean over the batch of

        { margin + ‖A − mu(x)‖ / (2 sigma2)
                 + log Σ_{k ≠ own} exp(−‖A − mu_k‖ / (2 sigma2)) }₊

    with plain (not squared) Euclidean norms. The loss of an image is 0 only where it is nearer to its own
    centre than to the others by 2 · margin · sigma2, or a little more: at the margin of 5 by 10 sigma2.

    A:       [B, D], gate activations; the gradient goes here, and is 0 where A lies on a centre.
    centers: [K, D], K >= 2, the mu_k of the last K-means update; constants here.
    sigma2:  spread of all samples around their centres at that update (float or 0-dim tensor), taken as at
             least `sigma2_floor`.
    margin:  alpha >= 0 of the equation, in units of distance / (2 sigma2).
    own:     [B] integers < K, the centre each sample belongs to; by default the nearest, the first on a tie.
             -1: a sample that belongs to none yet; its loss is 0. Two centres at one place count as two: only
             the own index is left out of the sum.
    reduction: "mean", or "none" for the loss of each sample, [B]; it is 0 where the margin is kept.
    Returns the loss, computed in float32 at least, under autocast too.
    Raises ValueError for shapes that do not fit, K < 2 or a negative margin.
    """
    if A.dim() != 2 or centers.dim() != 2 or A.shape[1] != centers.shape[1] or len(A) == 0:
        shapes = f"{tuple(A.shape)} and {tuple(centers.shape)}"
        raise ValueError(f"A must be [B >= 1, D] and centers [K, D], not {shapes}")
    if len(centers) < 2:
        raise ValueError(f"the clustering loss needs K >= 2 centres, not {len(centers)}")
    if margin < 0:
        raise ValueError(f"margin must be >= 0, not {margin}")
    if own is not None and own.shape != A.shape[:1]:
        raise ValueError(f"own must be [{len(A)}], not {tuple(own.shape)}")

    A = A.to(torch.promote_types(A.dtype, torch.float32))
    mu = centers.detach().to(A)
    if isinstance(sigma2, Tensor):
        sigma2 = sigma2.detach().clamp(min=sigma2_floor)
    else:
        sigma2 = max(sigma2, sigma2_floor)
    # Differences first, [B, K, D]: exact near a centre, where ‖A‖² − 2A·mu + ‖mu‖² cancels.
    # At 0 the norm has no gradient; torch gives it 0.
    distance = torch.linalg.vector_norm(A[:, None] - mu, dim=2)  # [B, K]
    own = distance.detach().argmin(dim=1) if own is None else own.to(A.device, torch.int64)
    belongs, own = own >= 0, own.clamp(min=0)[:, None]
    distance = distance / (2 * sigma2)
    others = (-distance).scatter(1, own, -torch.inf).logsumexp(dim=1)
    loss = (margin + distance.gather(1, own).squeeze(1) + others).clamp(min=0)
    loss = loss.where(belongs, 0)
    return loss if reduction == "none" else loss.mean()
