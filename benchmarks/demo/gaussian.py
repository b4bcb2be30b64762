"""A baseline to beat: one Gaussian per position on the same backbone features, in the manner of PaDiM (2011.08785)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SHRINKAGE = 0.01
"""Added to each variance, in units of the mean variance, so that few images give a covariance that can be inverted."""


@dataclass(frozen=True)
class PositionGaussians:
    """Mean and whitening matrix of the features at each of N = h w positions; `channels` are those that are used."""

    channels: Tensor
    mean: Tensor
    whitening: Tensor

    @classmethod
    def fit(cls, features: Tensor, channels: int = 100, seed: int = 0) -> "PositionGaussians":
        """Fit to features of good parts.

        Args:
            features: (n, C, h, w) float32.
            channels: how many of the C channels are used, drawn once from `seed`; at most C.
            seed: of the draw.
        """
        drawn = np.random.RandomState(seed).permutation(features.shape[1])[:channels]
        chosen = torch.from_numpy(np.sort(drawn))
        x = features[:, chosen].flatten(2).permute(2, 0, 1).double()
        mean = x.mean(1, keepdim=True)
        centred = x - mean
        covariance = centred.mT @ centred / (x.shape[1] - 1)
        variance = covariance.diagonal(dim1=1, dim2=2).mean()
        covariance += SHRINKAGE * variance * torch.eye(x.shape[2], dtype=x.dtype)
        factor = torch.linalg.cholesky(covariance)
        eye = torch.eye(x.shape[2], dtype=x.dtype).expand_as(factor)
        return cls(chosen, mean.float(), torch.linalg.solve_triangular(factor, eye, upper=False).float())

    def map(self, features: Tensor) -> Tensor:
        """Mahalanobis distances (n, h, w) of features (n, C, h, w)."""
        x = features[:, self.channels].flatten(2).permute(2, 0, 1) - self.mean
        distance = (x @ self.whitening.mT).norm(dim=2)
        return distance.T.unflatten(1, tuple(features.shape[2:]))
