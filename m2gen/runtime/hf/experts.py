"""Mixtures of experts of the published models, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import ExpertsBlock
from .initialise import Experts, deep
from .mlp import activation_of


class MixtureOfExperts(nn.Module):
    """Experts of layer i: each token's result is the weighted sum of those that its gate chooses, and a shared one."""

    def __init__(self, hidden_size: int, block: ExpertsBlock, i: int) -> None:
        super().__init__()
        self.block, self.activation = block, activation_of(block.expert, i)
        wider = 1 + block.expert.gated
        self.gate = nn.Linear(hidden_size, block.count, bias=False)
        self.c_fc = Experts(block.count, hidden_size, wider * block.expert.size)
        self.c_proj = deep(Experts(block.count, block.expert.size, hidden_size))
        if block.shared is not None:
            self.c_fc_shared = nn.Linear(hidden_size, wider * block.shared.size, bias=False)
            self.c_proj_shared = deep(nn.Linear(block.shared.size, hidden_size, bias=False))
        if block.shared_gate:
            self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map x (..., hidden_size) to the same shape; also return, in training, how unevenly tokens choose."""
        tokens = x.reshape(-1, x.shape[-1])
        logits = self.gate(tokens)
        weights, chosen = self._route(logits)
        # A step of decoding reads the weights of the experts that it has, and is one graph; else each is read once.
        mixed = self._gathered if chosen.numel() <= self.block.count else self._sorted
        y = mixed(tokens, weights.to(x.dtype), chosen)
        if self.block.shared is not None:
            y = y + self._shared(tokens)
        uneven = imbalance(logits, chosen) if self.training else None
        return F.dropout(y.view_as(x), self.block.dropout, self.training), uneven

    def _route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights and numbers (T, chosen) of each token's experts."""
        if self.block.normalised:
            highest, chosen = logits.topk(self.block.chosen, dim=-1)
            return highest.float().softmax(-1), chosen
        weights, chosen = logits.float().softmax(-1).to(logits.dtype).topk(self.block.chosen, dim=-1)
        return weights, chosen

    def _gathered(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Return the experts' sum with a copy of its experts for each token."""
        inner = self.activation((self.c_fc.weight[chosen] @ x[:, None, :, None])[..., 0])
        y: Tensor = (self.c_proj.weight[chosen] @ inner[..., None])[..., 0]
        return (y * weights[..., None]).sum(1)

    def _sorted(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Return the experts' sum with the tokens of each expert together; waits for their counts."""
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.block.count).tolist()
        token = order // self.block.chosen
        y = self.c_proj(self.activation(self.c_fc(x[token], counts)), counts)
        return torch.zeros_like(x).index_add(0, token, y * weights.flatten()[order, None])

    def _shared(self, x: Tensor) -> Tensor:
        y: Tensor = self.c_proj_shared(self.activation(self.c_fc_shared(x)))
        return y * self.shared_expert_gate(x).sigmoid() if self.block.shared_gate else y


def imbalance(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return the published auxiliary loss of logits (T, experts) and choices (T, chosen): of balance, and of size."""
    counts = F.one_hot(chosen, logits.shape[-1]).sum((0, 1)).to(logits.dtype)
    probability, frequency = (F.normalize(x, p=1, dim=0) for x in (logits.softmax(-1).sum(0), counts))
    return logits.shape[-1] * (probability * frequency).sum() + 0.1 * logits.logsumexp(-1).square().mean()
