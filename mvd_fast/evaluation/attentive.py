"""The attentive probe: one cross-attention layer that pools frozen tokens, and a linear head.

As in V-JEPA (Bardes et al. 2024, arXiv 2404.08471, section 4): a learned query attends to the tokens of a clip; what
it reads is added to the query, normed and classified. Only this is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .probe import AttentiveSettings

INIT_STD = 0.02


class AttentiveProbe(nn.Module):
    """tokens [B, N, C] -> logits [B, classes]."""

    def __init__(self, dim: int, num_heads: int, num_classes: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(1, 1, dim))
        self.norm = nn.LayerNorm(dim)
        self.to_query, self.to_key_value = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj, self.pooled_norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.query, std=INIT_STD)
        for layer in (self.to_query, self.to_key_value, self.proj, self.head):
            nn.init.trunc_normal_(layer.weight, std=INIT_STD)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.to_query(self.query).expand(len(tokens), -1, -1)
        key, value = self.to_key_value(self.norm(tokens)).chunk(2, dim=-1)
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.pooled_norm(self.query + self.proj(read))[:, 0])


def attentive_scores(
    train_x: Tensor,
    train_y: np.ndarray,
    test_x: Tensor,
    num_heads: int,
    seed: int,
    settings: AttentiveSettings,
    device: torch.device | None = None,
    on_epoch: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Trains on tokens [S, N, C] (any float type) with labels int [S]; probabilities float32 [S_test, classes].

    Classes in the order of `np.unique(train_y)`. Initial weights and the order of samples follow from `seed` alone.
    `device`: where the probe is trained, the CPU by default; tokens are moved there batch by batch.
    """
    classes, targets = np.unique(train_y, return_inverse=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = AttentiveProbe(train_x.shape[2], num_heads, len(classes)).to(device)
    target = torch.from_numpy(targets)
    shuffle = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    steps = settings.epochs * math.ceil(len(train_x) / settings.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(settings.epochs):
        for index in torch.randperm(len(train_x), generator=shuffle).split(settings.batch):
            loss = F.cross_entropy(probe(train_x[index].to(device).float()), target[index].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        on_epoch()
    probe.eval()
    with torch.inference_mode():
        parts = [probe(x.to(device).float()).softmax(1).cpu() for x in test_x.split(settings.batch)]
    return torch.cat(parts).numpy()
