"""The functions that the assignment *Magnitude and direction* asks for."""

import torch
from torch import nn


def dora_weight(weight, A, B, magnitude, alpha):
    direction = weight + alpha / len(A) * B @ A
    return magnitude.unsqueeze(1) * direction / direction.norm(dim=1, keepdim=True)


class DoRALinear(nn.Module):
    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        self.A = nn.Parameter(torch.empty(rank, base.in_features))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.magnitude = nn.Parameter(base.weight.norm(dim=1))

    def direction(self):
        return self.base.weight + self.scale * self.B @ self.A

    def forward(self, x):
        direction = self.direction()
        weight = (self.magnitude / direction.norm(dim=1).detach()).unsqueeze(1) * direction
        return nn.functional.linear(x, weight, self.base.bias)


def merged(layer):
    base, direction = layer.base, layer.direction()
    plain = nn.Linear(base.in_features, base.out_features, base.bias is not None)
    with torch.no_grad():
        plain.weight.copy_((layer.magnitude / direction.norm(dim=1)).unsqueeze(1) * direction)
        if base.bias is not None:
            plain.bias.copy_(base.bias)
    return plain


def combine(adapters, coefficients, rank):
    A = torch.cat([A for A, _, _ in adapters])
    B = torch.cat([c * alpha / len(A) * B for c, (A, B, alpha) in zip(coefficients, adapters, strict=True)], dim=1)
    (left, upper), (right, lower) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, sizes, Vt = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return Vt[:rank] @ right.T, left @ U[:, :rank] * sizes[:rank]
