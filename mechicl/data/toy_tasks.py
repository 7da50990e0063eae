"""What the toy sequences are made of: the settings of a task, checked, and where everything stands in a sequence.

Names are the paper's (METHODS of Huang et al. 2026): K classes, L labels, N exemplars, D dimensions, B copies of each class in a bursty sequence,
p_B and p_C the shares of bursty sequences and of sequences of novel classes, eps the spread within a class, alpha the exponent of the class
frequencies. In multimodal tasks 1 is the first modality (vectors that are tokens as they are) and 2 the second (what an encoder reads).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from mechicl.data.toy_checks import at_least_two, burst, choice, counts, divides, not_negative, shares
from mechicl.errors import OptionError

Split = Literal["train", "ic", "ic2", "iw"]
"""train: the task as it is. ic: novel classes, bursty. ic2: the task's own classes, bursty, every label one further than in training. iw: the task's
own classes, items and query independent of one another, so that only the weights know the answer."""
Labels = Literal["pair", "joint", "crossed"]
M1Query = Literal["on", "off", "mismatched"]
IidPairs = Literal["label", "independent"]
Real = float | int


@dataclass(frozen=True)
class UnimodalTask:
    """Sequences [x1, l1, ..., xN, lN, xq] of vectors; the label of xq is asked. Defaults are the paper's first stage.

    Attributes:
        K: Classes; class k has label k mod L.
        L: Labels; divides K.
        N: Exemplars in a sequence.
        D: Width of items and labels.
        B: How often each class is shown in a bursty sequence; divides N, below N.
        p_B: Share of bursty sequences. In the others items and query are drawn independently of one another.
        p_C: Share of sequences of novel classes; these are always bursty.
        eps: Spread within a class, as a multiple of the spread of the class means.
        alpha: Class k (from 1) is drawn in proportion to k^-alpha.
        no_repeats: The N / B classes of a bursty sequence have different labels. Else two may share a label, or be the same class.
        swap: All labels of training are one further (mod L) than the class's own.
        n_novel: Novel classes, new in every draw; rounded down to a multiple of L, at least L.
        seed: Decides the world: class means and label vectors.

    Raises:
        OptionError: settings that no sequence can meet.
    """

    K: int = 8192
    L: int = 32
    N: int = 8
    D: int = 64
    B: int = 2
    p_B: Real = 1.0
    p_C: Real = 0.0
    eps: Real = 0.1
    alpha: Real = 0.0
    no_repeats: bool = False
    swap: bool = False
    n_novel: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        counts(self, "K", "L", "N", "D", "B", "n_novel")
        shares(self, "p_B", "p_C")
        not_negative(self, "eps", "alpha", "seed")
        at_least_two("L", self.L)
        divides("L", self.L, "K", self.K)
        burst(self.N, self.B)
        if self.no_repeats and self.N // self.B > self.L:
            raise OptionError(
                f"N / B must be at most L for sequences without repeated labels; got {self.N // self.B} and {self.L}. Raise B or L, or allow repeats."
            )

    @property
    def width(self) -> int:
        """Width of a token."""
        return self.D

    @property
    def n_items(self) -> int:
        """Classes of the items that are tokens."""
        return self.K

    @property
    def n_labels(self) -> int:
        """Labels that can be right."""
        return self.L

    @property
    def novel(self) -> int:
        """Novel classes of a draw."""
        return _whole(self.n_novel, self.L)


@dataclass(frozen=True)
class MultimodalTask:
    """Sequences [a1, b1, l1, ..., aN, bN, lN, aq, bq] of two modalities; the label is asked at bq. Defaults are the paper's second stage.

    a is a vector of modality 1, the token as it is. b is of modality 2, a vector or a picture; its token is empty until an encoder fills it.

    Attributes:
        K1, K2: Classes of the modalities.
        L: Labels that the model tells apart; class k of modality 1 has label k mod L.
        L2: Labels that modality 2 knows, the first L2 of L; None for all. Class k of modality 2 has label k mod L2.
        N, B, p_B, p_C, no_repeats, swap, seed: As in `UnimodalTask`; what is repeated is the pair of classes.
        D1, D2: Widths. D2 counts for `second="gaussian"` only.
        eps1, eps2: Spreads within a class; for pictures eps2 is the standard deviation of the noise on every pixel.
        alpha1, alpha2: Exponents of the class frequencies.
        labels: "pair": the modalities agree, an item of either tells the label; modality 2's class is drawn first, and gets a partner with its label.
            "joint": both classes are drawn independently; with g1 = k1 mod G1 and g2 = k2 mod G2 the label is g1 * G2 + g2.
            "crossed" (ours): joint labels whose context is a full grid of classes, so that neither modality alone tells which exemplar is meant. In a
            bursty joint sequence the pair comes back whole, and either modality alone usually tells.
        G1, G2: Groups of joint and crossed labels, L = G1 * G2.
        m1_query: What stands at aq. "on": the item of modality 1. "off": an empty token (zeros). "mismatched" (ours): an item of another exemplar with
            another label, so that a model that listens to modality 1 answers wrongly, and one that listens to modality 2 does not.
        second: "gaussian", or a bank of pictures: "concepts", "digits", "omniglot:FOLDER", or a name given to `mechicl.data.banks.register`.
        iid_pairs: How classes pair in sequences that are not bursty (pair labels): "label", with the same label; "independent", as in the released
            code, where modality 1 says nothing about the label then.
        n_novel: Novel classes of modality 1, a multiple of L; modality 2 gets as many as keeps K2 / K1, a multiple of L2 and at least L2.

    Raises:
        OptionError: settings that no sequence can meet.
    """

    K1: int = 8192
    K2: int = 256
    L: int = 32
    L2: int | None = None
    N: int = 8
    D1: int = 64
    D2: int = 64
    B: int = 4
    p_B: Real = 1.0
    p_C: Real = 0.0
    eps1: Real = 0.1
    eps2: Real = 0.1
    alpha1: Real = 0.0
    alpha2: Real = 0.0
    no_repeats: bool = False
    swap: bool = False
    labels: Labels = "pair"
    G1: int | None = None
    G2: int | None = None
    m1_query: M1Query = "on"
    second: str = "gaussian"
    iid_pairs: IidPairs = "label"
    n_novel: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        counts(self, "K1", "K2", "L", "N", "D1", "D2", "B", "n_novel")
        shares(self, "p_B", "p_C")
        not_negative(self, "eps1", "eps2", "alpha1", "alpha2", "seed")
        choice("labels", self.labels, get_args(Labels))
        choice("m1_query", self.m1_query, get_args(M1Query))
        choice("iid_pairs", self.iid_pairs, get_args(IidPairs))
        at_least_two("L", self.L)
        burst(self.N, self.B)
        if self.labels == "pair":
            self._check_pair()
        else:
            self._check_joint()
        if self.no_repeats and self.n_labels < self.N // self.B:
            raise OptionError(
                f"N / B must be at most the {self.n_labels} labels for sequences without repeated labels; got {self.N // self.B}. "
                "Raise B or the labels, or allow repeats."
            )

    def _check_pair(self) -> None:
        if self.G1 is not None or self.G2 is not None:
            raise OptionError(f'G1 and G2 must be None with labels="pair"; got {self.G1} and {self.G2}. Use labels="joint".')
        if not 2 <= self.n_labels <= self.L:
            raise OptionError(f"L2 must be 2..L = {self.L}; got {self.L2}. Modality 2's labels are some of modality 1's.")
        divides("L", self.L, "K1", self.K1)
        divides("L2", self.n_labels, "K2", self.K2)

    def _check_joint(self) -> None:
        if self.L2 is not None:
            raise OptionError(f"L2 must be None with labels={self.labels!r}; got {self.L2}. Both modalities make the label together.")
        if self.G1 is None or self.G2 is None or self.G1 < 1 or self.G2 < 1 or self.G1 * self.G2 != self.L:
            raise OptionError(f"G1 * G2 must be L = {self.L} with labels={self.labels!r}; got {self.G1} and {self.G2}. Change one.")
        divides("G1", self.G1, "K1", self.K1)
        divides("G2", self.G2, "K2", self.K2)
        if self.m1_query == "mismatched":
            raise OptionError(
                'm1_query must be "on" or "off" unless labels="pair"; got "mismatched". With joint labels another item of modality 1 is another answer.'
            )
        if self.labels == "crossed":
            rows, columns = self.grid
            if rows < 2 or rows > self.G1 or columns > self.G2:
                raise OptionError(
                    f"N / B must be the cells of a grid of at least 2 x 2 classes of different groups with crossed labels; got {self.N // self.B} = "
                    f"{rows} x {columns} for {self.G1} x {self.G2} groups. N = 8 and B = 2 make 2 x 2."
                )

    @property
    def grid(self) -> tuple[int, int]:
        """Classes of modality 1 and of modality 2 in a crossed context: as square as N / B allows, modality 1 having the fewer."""
        cells = self.N // self.B
        rows = max(k for k in range(1, int(cells**0.5) + 1) if cells % k == 0)
        return rows, cells // rows

    @property
    def width(self) -> int:
        """Width of a token."""
        return self.D1

    @property
    def n_items(self) -> int:
        """Classes of the items that are tokens: K1."""
        return self.K1

    @property
    def n_labels(self) -> int:
        """Labels that can be right: L2 for pairs, L else."""
        return self.L2 if self.L2 is not None else self.L

    @property
    def novel(self) -> int:
        """Novel classes of modality 1 in a draw."""
        return _whole(self.n_novel, self.L if self.labels == "pair" else self.G1 or 1)

    @property
    def novel2(self) -> int:
        """Novel classes of modality 2 in a draw."""
        return _whole(self.n_novel * self.K2 // self.K1, self.n_labels if self.labels == "pair" else self.G2 or 1)


Task = UnimodalTask | MultimodalTask


@dataclass(frozen=True)
class Layout:
    """Where everything stands in a sequence; the last position predicts.

    Attributes:
        item, second, label: Position of every exemplar's item, second item (none in unimodal tasks) and label.
        query, query_second: Positions of the query's item and second item.
        n_pos: Length.
    """

    item: tuple[int, ...]
    second: tuple[int, ...]
    label: tuple[int, ...]
    query: int
    query_second: int | None
    n_pos: int

    @property
    def last(self) -> int:
        """The position that predicts."""
        return self.n_pos - 1

    @property
    def step(self) -> int:
        """Tokens of an exemplar."""
        return 2 if self.query_second is None else 3


@lru_cache(maxsize=256)
def layout(task: Task) -> Layout:
    """Where everything stands in the sequences of a task: 2N + 1 positions, or 3N + 2 with a second modality."""
    n = task.N
    if isinstance(task, UnimodalTask):
        return Layout(tuple(range(0, 2 * n, 2)), (), tuple(range(1, 2 * n, 2)), 2 * n, None, 2 * n + 1)
    starts = range(0, 3 * n, 3)
    return Layout(tuple(starts), tuple(k + 1 for k in starts), tuple(k + 2 for k in starts), 3 * n, 3 * n + 1, 3 * n + 2)


def check_split(split: str) -> None:
    """Raises OptionError for a split that does not exist."""
    choice("split", split, get_args(Split))


def _whole(n: int, part: int) -> int:
    return max(n // part * part, part)
