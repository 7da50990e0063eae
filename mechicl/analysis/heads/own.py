"""A head score of your own: a weight for each exemplar, times the query's attention to it, with the null, interval and p of the named scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechicl.errors import OptionError

Weigh = Callable[[Bool[Tensor, "*draw batch shot"], Bool[Tensor, "*draw batch shot"]], Float[Tensor, "*draw batch shot"]]
"""(right exemplars, wrong exemplars) -> weights. The null calls it with labels shuffled, many draws at once, in front of the batch."""

Of = Literal["label", "turn", "item"]
"""What of an exemplar is looked at: its label's tokens, these and the tokens that close its turn, or its picture and words."""


@dataclass(frozen=True)
class ExemplarScore:
    """Sum over exemplars of weight times the query's attention to it, for `score_heads(..., scores=("induction", ExemplarScore(...)))`.

    Attributes:
        name: What it is called in the result.
        description: What it measures, for tables and figures.
        weigh: The weights; see `Weigh`. Exemplars that a prompt does not have are neither right nor wrong, and need weight 0.
        of: See `Of`.
        source: Who defined it.
    """

    name: str
    description: str
    weigh: Weigh
    of: Of = "label"
    source: str = "own definition"

    def __post_init__(self) -> None:
        if self.of not in ("label", "turn", "item"):
            raise OptionError(f"of must be label, turn or item; got {self.of!r}. Say what of an exemplar the query looks at.")
        if not self.name or "[" in self.name:
            raise OptionError(f"name must be a word without '['; got {self.name!r}. Brackets tell modalities apart.")

    def weights(
        self, right: Bool[Tensor, "*draw batch shot"], wrong: Bool[Tensor, "*draw batch shot"]
    ) -> Float[Tensor, "*draw batch shot"]:
        """The weights, checked.

        Raises:
            OptionError: `weigh` gives another shape, or numbers that are not finite.
        """
        found = self.weigh(right, wrong)
        if found.shape != right.shape or not bool(torch.isfinite(found).all()):
            raise OptionError(
                f"weigh of {self.name!r} must give a finite weight for each exemplar, {tuple(right.shape)}; got {tuple(found.shape)}"
                f"{'' if found.shape != right.shape else ' with NaN or infinities'}. Every prompt has a right and a wrong exemplar, so divide by their numbers."
            )
        return found.float()
