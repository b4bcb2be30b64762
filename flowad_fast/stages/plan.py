"""What runs the matrix products of a velocity field: a plan, made by `engines.products` and followed by its layers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple


class Library(Enum):
    """The GPU's own matrix product, as it is or with GELU in its epilogue; the values are labels."""

    PLAIN = "library"
    GELU = "library with GELU"

    @property
    def label(self) -> str:
        """For people and records."""
        return self.value


class Split(NamedTuple):
    """The product of `kernels.linear_split_k`: rows and columns of a program, parts of the inner dimension."""

    rows: int
    columns: int
    parts: int

    @property
    def label(self) -> str:
        """For people and records."""
        return f"split {self.rows}x{self.columns}/{self.parts}"


class Fused(NamedTuple):
    """The product of `kernels.linear_split_k` in one part, with GELU and e4m3 in its epilogue."""

    rows: int
    columns: int

    @property
    def label(self) -> str:
        """For people and records."""
        return f"own with GELU {self.rows}x{self.columns}"


Product = Library | Split | Fused


@dataclass(frozen=True)
class Plan:
    """What runs each part of a block (qkv, proj, fc1, fc2) at some numbers of rows; the library runs all else."""

    products: Mapping[int, Mapping[str, Product]] = field(default_factory=dict)

    def at(self, rows: int, products: Mapping[str, Product]) -> "Plan":
        """The same plan with other products at a number of rows."""
        return Plan({**self.products, rows: products})

    def of(self, part: str) -> Mapping[int, Product]:
        """What runs one part, by number of rows."""
        return {rows: products[part] for rows, products in self.products.items() if part in products}
