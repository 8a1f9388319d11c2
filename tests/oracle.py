"""All of GEM, dense and naive, in one process: what fast and distributed paths are tested against.

Written from the method's definition, in the order of its lines, sharing no code with gem_ds. Sums
are exactly rounded (``math.fsum``), budgets are fractions, masks come from a Python sort. Slow on
purpose.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn


def summed_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    names: Sequence[str],
    of_each: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> dict[str, Tensor]:
    """fp32 gradient of the sum over the batches of ``loss_fn(model, batch)``, by ordinary autograd.

    ``loss_fn`` returns a *summed* loss. What is summed of a batch's gradient is what ``of_each``
    makes of it. The model is left as it was, its flags included.
    """
    parameters = [model.get_parameter(name) for name in names]
    flags = [parameter.requires_grad for parameter in parameters]
    sums = {name: torch.zeros(p.shape) for name, p in zip(names, parameters, strict=True)}
    for parameter in parameters:
        parameter.requires_grad_(True)
    for batch in batches:
        gradients = torch.autograd.grad(loss_fn(model, batch), parameters)
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total += of_each(gradient.float())
    for parameter, flag in zip(parameters, flags, strict=True):
        parameter.requires_grad_(flag)
    return sums


def ratio(gradient: Tensor, weight: Tensor) -> Tensor:
    """Gradient-to-weight ratio, r = |g| / (|w| + 1e-8) in fp32."""
    return gradient.detach().float().abs() / (weight.detach().float().abs() + 1e-8)


def damped_ratio(gradient: Tensor, weight: Tensor) -> Tensor:
    """|g| / (|w| + 0.1 rms(w)) in fp32; rms(w) over the whole matrix."""
    magnitude = weight.detach().float().abs()
    squares = [w * w for w in magnitude.double().flatten().tolist()]
    damping = max(0.1 * math.sqrt(math.fsum(squares) / len(squares)), 1e-8)
    return gradient.detach().float().abs() / (magnitude + damping)


def principal(weight: Tensor) -> Tensor:
    """The part of w of rank min(128, min(m, n) / 8): magnitudes in 2^-24 of the largest."""
    left, values, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    rank = max(1, min(128, min(weight.shape) // 8))
    part = ((left[:, :rank] * values[:rank]) @ right[:rank]).abs()
    return (part / part.max() * 2**24).round() if part.any() else part


def ratio_sum(r: Tensor) -> float:
    return math.fsum(r.double().flatten().tolist())


def ratio_norm(r: Tensor) -> float:
    return math.sqrt(math.fsum(x * x for x in r.double().flatten().tolist()))


def entropy(r: Tensor) -> float:
    """Entropy, H = max(0, -sum p log(p + 1e-8)), p = r / sum(r); 0 where nothing is."""
    total = ratio_sum(r)
    if total == 0:
        return 0.0
    shares = (x / total for x in r.double().flatten().tolist())
    return max(0.0, -math.fsum(p * math.log(p + 1e-8) for p in shares))


def layer_score(r: Tensor) -> float:
    """Layer score, s = ||r||_2 * H."""
    return ratio_norm(r) * entropy(r)


def total_budget(density: str, num_parameters: int) -> int:
    """Total budget, K = floor(density * N)."""
    return int(Decimal(density) * num_parameters)


def budgets(scores: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Shares in proportion to the scores, capped by the sizes; floors and largest remainders."""
    given: dict[int, int] = {}
    while True:
        rest = [layer for layer in range(len(sizes)) if layer not in given]
        k = total - sum(given.values())
        weight = {layer: Fraction(scores[layer]) for layer in rest}
        if sum(weight.values()) == 0:
            weight = {layer: Fraction(sizes[layer]) for layer in rest}
        whole = sum(weight.values())
        ideal = {layer: k * weight[layer] / whole if whole else Fraction(0) for layer in rest}
        full = [layer for layer in rest if ideal[layer] >= sizes[layer]]
        if not full:
            break
        for layer in full:
            given[layer] = sizes[layer]
    for layer in rest:
        given[layer] = ideal[layer].numerator // ideal[layer].denominator
    while sum(given.values()) < total:
        neediest = max(rest, key=lambda layer: (ideal[layer] - given[layer], -layer))
        given[neediest] += 1
    return [given[layer] for layer in range(len(sizes))]


def mask(r: Tensor, k: int) -> Tensor:
    """The k entries with the largest r, ties to the lowest flat index: bool, of r's shape."""
    values = r.flatten().tolist()
    chosen = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    flat = torch.zeros(len(values), dtype=torch.bool)
    flat[chosen] = True
    return flat.reshape(r.shape).to(r.device)


def masks_at(weights: Mapping[str, Tensor], indices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By name a bool mask of a weight's shape, true at its flat indices."""
    masks = {name: torch.zeros(weights[name].shape, dtype=torch.bool) for name in indices}
    for name, index in indices.items():
        masks[name].view(-1)[index.long()] = True
    return masks


def splitmix64(key: int, i: int) -> int:
    """The i-th number of the generator of Steele, Lea and Flood (2014) from the seed ``key``."""
    z = (key + i * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def words(name: str, seed: int, size: int) -> list[int]:
    """31 bits for each entry: of the i-th number of a splitmix64 seeded by seed and name."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
    return [splitmix64(key, i) % 2**31 for i in range(size)]


def chances(name: str, seed: int, size: int) -> list[int]:
    """For each entry of a weight the bits of a finite fp32 number that is not negative."""
    return [word % 0x7F800000 for word in words(name, seed, size)]


def drawn(name: str, gradient: Tensor, seed: int) -> Tensor:
    """``|g| / u``, u of 24 bits and above 0."""
    u = [(word // 2**7 + 1) / 2**24 for word in words(name, seed, gradient.numel())]
    return gradient.detach().float().abs() / torch.tensor(u).reshape(gradient.shape)


def entry_score(rule: str, name: str, gradient: Tensor | None, weight: Tensor, seed: int) -> Tensor:
    if rule.startswith("random"):
        return torch.tensor(chances(name, seed, weight.numel())).reshape(weight.shape)
    if rule in ("magnitude", "supertuning"):
        return weight.detach().float().abs()
    if rule == "lift":
        return principal(weight)
    assert gradient is not None
    if rule == "drawn":
        return drawn(name, gradient, seed)
    if rule in ("gradient", "entropy_gradient", "gradient_abs", "fish", "surgical", "auto_rgn"):
        return gradient.detach().float().abs()
    return damped_ratio(gradient, weight) if rule == "damped" else ratio(gradient, weight)


def select(
    gradients: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    total: int,
    rule: str = "gem",
    seed: int = 0,
    keep_zeros: bool = False,
) -> dict[str, Tensor]:
    """The whole selection: by name, in the order of ``weights``, the bool mask.

    Of entries that are not 0 only, with ``keep_zeros``.
    """
    may = {n: (w != 0) if keep_zeros else torch.ones_like(w).bool() for n, w in weights.items()}
    scores = {
        n: entry_score(rule, n, gradients.get(n), w, seed).where(may[n], -1)  # after all others
        for n, w in weights.items()
    }
    if rule in ("supertuning", "ratio_global", "fish"):
        return _largest_of_all(scores, total)
    by_rule: dict[str, Callable[[Tensor], float]] = {
        **dict.fromkeys(("gem", "entropy_gradient", "damped", "gem_abs"), layer_score),
        "tempered": lambda s: math.sqrt(1 + layer_score(s)),
        "effective": lambda s: math.exp(entropy(s)) if s.any() else 0.0,
    }
    if rule in ("surgical", "auto_rgn"):
        norms = {n: (ratio_norm(s[may[n]]), ratio_norm(weights[n])) for n, s in scores.items()}
        order = sorted(norms, key=lambda n: -norms[n][0] / max(norms[n][1], 1e-8))
        return _whole(order, scores, may, total)
    of_layers = {n: by_rule.get(rule, _is_any)(s[may[n]]) for n, s in scores.items()}
    if rule in ("random_shira", "lift"):
        of_layers = {n: score * sum(weights[n].shape) for n, score in of_layers.items()}
    shares = budgets([*of_layers.values()], [int(m.sum()) for m in may.values()], total)
    return {name: mask(s, k) for (name, s), k in zip(scores.items(), shares, strict=True)}


def _is_any(scores: Tensor) -> float:
    return float(scores.any())


def _whole(
    order: Sequence[str], scores: Mapping[str, Tensor], may: Mapping[str, Tensor], total: int
) -> dict[str, Tensor]:
    """All that may be selected, matrix after matrix; of the last the largest scores."""
    masks = {}
    for name in order:
        masks[name] = mask(scores[name], min(total, int(may[name].sum())))
        total -= int(masks[name].sum())
    return {name: masks[name] for name in scores}


def _largest_of_all(scores: Mapping[str, Tensor], total: int) -> dict[str, Tensor]:
    """The largest scores of all matrices together, ties to the earlier one, then index."""
    pool = [
        (-value, layer, index, name)
        for layer, (name, score) in enumerate(scores.items())
        for index, value in enumerate(score.flatten().tolist())
    ]
    masks = {name: torch.zeros(score.shape, dtype=torch.bool) for name, score in scores.items()}
    for _, _, index, name in sorted(pool)[:total]:
        masks[name].view(-1)[index] = True
    return masks


def sam_gradients(
    gradients: Callable[[], Mapping[str, Tensor]],
    params: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    rho: float,
) -> Mapping[str, Tensor]:
    """The gradients at w + rho g / ||g||_2, g masked and over all parameters together."""
    found = {name: g * masks[name] for name, g in gradients().items()}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in found.values()))
    before = {name: p.detach().clone() for name, p in params.items()}
    with torch.no_grad():
        for name, p in params.items():
            p += rho * found[name] / norm
    there = gradients()
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(before[name])
    return there


class LayerBandit:
    """Which of n layers a step trains: Sparse-Layer SAM's EXP3, by bisection where it can be."""

    def __init__(self, n: int, share: float, rate: float) -> None:
        self.p, self.total, self.rate = torch.full((n,), share).double(), share * n, rate

    def learn(self, drawn: Tensor, norms: Tensor) -> None:
        """``drawn`` are numbers of layers, ``norms`` those of their gradients; both [drawn]."""
        p = self.p[drawn]
        gain = (norms.double() / p).square()
        self.p[drawn] = p * torch.exp(-self.rate * (gain.max() - gain) / p)
        low, high = 0.0, self.total / float(self.p.min())
        for _ in range(200):
            middle = (low + high) / 2
            is_low = float((middle * self.p).clamp(max=1.0).sum()) < self.total
            low, high = (middle, high) if is_low else (low, middle)
        self.p = (high * self.p).clamp(min=1e-8, max=1.0)


class DenseMaskedAdamW:
    """AdamW with decoupled weight decay that moves, decays and clips by the masked entries only.

    Dense moments, the formula of ``torch.optim.AdamW``::

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
        w = w (1 - lr decay) - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

    ``params`` are updated in place; ``masks`` are bool, of their shapes. The norm of the masked
    gradient of all parameters together is clipped to ``max_norm``, if given.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
    ) -> None:
        self.params, self.masks = dict(params), dict(masks)
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.max_norm = max_norm
        self.first = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.num_steps = dict.fromkeys(self.params, 0)

    @torch.no_grad()
    def step(
        self,
        grads: Mapping[str, Tensor],
        lr: float | Mapping[str, float],
        drawn: Collection[str] | None = None,
    ) -> float:
        """Update every parameter once; the norm of the masked gradient before clipping.

        ``lr`` is one number, or a number by name. The parameters that are not ``drawn`` are as if
        they were not there.
        """
        rates = lr if isinstance(lr, Mapping) else dict.fromkeys(self.params, lr)
        grads = {name: g for name, g in grads.items() if drawn is None or name in drawn}
        grads = {name: g * self.masks[name] for name, g in grads.items()}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        scale = 1.0 if self.max_norm is None else min(1.0, self.max_norm / (norm + 1e-6))
        b1, b2 = self.betas
        for name in grads:
            weight, g, lr = self.params[name], grads[name] * scale, rates[name]
            self.num_steps[name] += 1
            t = self.num_steps[name]
            first, second = self.first[name], self.second[name]
            first.copy_(b1 * first + (1 - b1) * g)
            second.copy_(b2 * second + (1 - b2) * g * g)
            corrected = second.sqrt() / math.sqrt(1 - b2**t) + self.eps
            update = lr / (1 - b1**t) * first / corrected
            moved = weight * (1 - lr * self.weight_decay) - update
            weight.copy_(torch.where(self.masks[name], moved, weight))
        return norm
