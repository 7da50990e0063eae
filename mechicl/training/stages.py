"""The curriculum: each stage goes on until fixed probe episodes are answered, then the next begins.

Repeated sequences first, because copying what followed an earlier token is all that in-context learning needs and pictures hide it; then words as
items, then pictures in place of words, then everything at once with a falling step size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from mechicl.data.compose import INSTRUCTION, QUESTION
from mechicl.errors import OptionError
from mechicl.training.assembly import Shape
from mechicl.training.tasks import Choice

Preset = Literal["demo", "quick", "micro"]


@dataclass(frozen=True)
class Probe:
    """Fixed held-out episodes that say whether a stage is done. `shape` None: repeated sequences."""

    name: str
    shape: Shape | None
    glyphs: float = 0.5
    n: int = 64


@dataclass(frozen=True)
class Stage:
    """A stretch of training.

    It ends when the probe `probe` reaches `criterion` (share of full labels right), at the latest after `cap` steps. With `decay` it runs all its
    `cap` steps while the step size falls along a cosine.
    """

    name: str
    choices: tuple[Choice, ...]
    probe: Probe
    criterion: float
    cap: int
    decay: bool = False
    every: int = 50


@dataclass(frozen=True)
class Plan:
    """A preset: the stages and the optimizer's settings. `tokens`: size of a training batch. `growth`: probes of the growth
    curve, `heads` the one on which heads are scored. `vision`: entries of Qwen2.5-VL's vision
    configuration to override (other families keep theirs)."""

    stages: tuple[Stage, ...]
    learning_rate: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup: int = 50
    tokens: int = 4096
    growth_points: int = 24
    checkpoint_every: int = 200
    growth: tuple[Probe, ...] = ()
    heads: Probe = Probe("pictures 4 x 2", None)
    vision: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return asdict(self)


TOLD = Shape(4, 2, size=28, instruction=INSTRUCTION, question=QUESTION)
"""What `mechicl.data` asks by default."""

REPEATS = Probe("repeated sequences", None)
WORDS = Probe("words 4 x 2", Shape(4, 2, size=0, words=True))
LEAN_WORDS = Probe("bare words 4 x 2", Shape(4, 2, size=0, words=True, lean=True))
LEAN_PICTURES = Probe("bare pictures 4 x 2", Shape(4, 2, size=28, lean=True), glyphs=0.0)
PICTURES = Probe("pictures 4 x 2", TOLD, glyphs=0.0)
MANY = Probe("pictures 8 x 1", replace(TOLD, n_classes=8, n_shots=1), glyphs=0.0)
LARGE = Probe("larger pictures 4 x 2", replace(TOLD, size=56), glyphs=0.0)
PENS = Probe("pen strokes 4 x 2", TOLD, glyphs=1.0)

REPEAT = Choice(1.0, "repeat")
BARE_WORDS = Choice(0.75, n_classes=(2, 3, 4), n_shots=(1, 2, 3), sizes=(0,), lean=1.0)


def demo(wide: int = 1900) -> Plan:
    """The bundled model's plan. `wide`: steps of the last stage."""
    few = Choice(0.10, n_classes=(4,), n_shots=(2,), sizes=(0,), lean=1.0)
    both = Choice(0.10, n_classes=(4,), n_shots=(2,), sizes=(28,), words=(True,), lean=1.0)
    seen = Choice(0.80, n_classes=(3, 4, 5), n_shots=(2, 3), sizes=(28,), glyphs=0.4, lean=1.0)
    everything = (
        Choice(0.02, "repeat"),
        Choice(0.05, n_classes=(2, 4, 6, 8), n_shots=(1, 2, 3), sizes=(0,), instructed=0.5, lean=0.2),
        Choice(0.05, n_classes=(2, 4, 6), n_shots=(1, 2), sizes=(28, 56), words=(True,), instructed=0.5, lean=0.2),
        Choice(0.32, n_classes=(3, 4, 5), n_shots=(2, 3), sizes=(28,), glyphs=0.5, instructed=0.7, lean=0.6),
        Choice(0.18, n_classes=(6, 8), n_shots=(1,), sizes=(28,), glyphs=0.4, instructed=0.7, lean=0.5),
        Choice(0.10, n_classes=(2, 3, 4, 6, 8), n_shots=(1, 2, 3, 4), sizes=(28,), glyphs=0.5, instructed=0.7, lean=0.4),
        Choice(0.23, n_classes=(2, 4, 6, 8), n_shots=(1, 2), sizes=(56,), glyphs=0.4, instructed=0.7, lean=0.5),
        Choice(0.05, n_classes=(2, 4), n_shots=(1, 2), sizes=(84, 112), glyphs=0.3, instructed=0.7, lean=0.5),
    )
    return Plan(
        (
            Stage("repeated sequences", (REPEAT,), REPEATS, 0.95, 3000),
            Stage("bare words", (BARE_WORDS, replace(REPEAT, weight=0.25)), LEAN_WORDS, 0.97, 4000),
            Stage("bare pictures", (few, both, seen), LEAN_PICTURES, 0.90, 3000),
            Stage("everything", everything, PICTURES, 1.1, wide, decay=True, every=100),
        ),
        growth=(REPEATS, WORDS, LEAN_PICTURES, PICTURES, MANY, LARGE, PENS),
        heads=replace(PICTURES, n=48),
        vision={"hidden_size": 80, "intermediate_size": 160},
        tokens=3072,
        checkpoint_every=100,
    )


def quick(settle: int = 400) -> Plan:
    """Minutes: an organism that names pictures of one size in prompts of its chat template, for studies across families.

    Families differ in how long they need: the template's stage ends where its probe is answered, and only then does the step size fall. In some of its
    prompts only a part of the template stands between picture and label: where all of it came at once, Gemma 3's long one was not learnt.
    """
    long = demo()
    few = Choice(0.1, n_classes=(2, 4), n_shots=(2,), sizes=(0,), instructed=0.5, lean=0.3)
    bare = Choice(0.3, n_classes=(3, 4, 5), n_shots=(2, 3), sizes=(28,), glyphs=0.3, lean=1.0)
    asked = Choice(0.6, n_classes=(3, 4, 5), n_shots=(2, 3), sizes=(28,), glyphs=0.3, instructed=0.7)
    partly = replace(bare, weight=0.4, kept=(1, 2, 4, 7, 11))
    last = (
        Stage("template", (few, bare, partly, replace(asked, weight=0.3)), PICTURES, 0.85, 2500),
        Stage("settling", (few, bare, asked), PICTURES, 1.1, settle, decay=True, every=100),
    )
    return replace(long, stages=(*long.stages[:3], *last), growth_points=12)


def micro() -> Plan:
    """Seconds: for tests of the machinery, too short to learn anything."""
    tiny = Choice(1.0, n_classes=(2,), n_shots=(1,), sizes=(28,), glyphs=1.0)
    return Plan(
        (
            Stage("repeated sequences", (REPEAT,), Probe("repeated sequences", None, n=8), 1.1, 4, every=2),
            Stage(
                "words",
                (Choice(1.0, n_classes=(2,), n_shots=(1,), sizes=(0,)),),
                Probe("words", Shape(2, 1, 0, True), n=8),
                1.1,
                4,
                every=2,
            ),
            Stage("pictures", (tiny,), Probe("pictures", Shape(2, 1), glyphs=1.0, n=8), 1.1, 6, decay=True, every=2),
        ),
        tokens=256,
        growth_points=4,
        checkpoint_every=2,
        warmup=2,
        growth=(Probe("words", Shape(2, 1, 0, True), n=8),),
        heads=Probe("pictures", Shape(2, 1), glyphs=1.0, n=8),
    )


def plan(preset: str) -> Plan:
    """The plan of a preset.

    Raises:
        OptionError: there is no such preset.
    """
    plans = {"demo": demo, "quick": quick, "micro": micro}
    if preset not in plans:
        raise OptionError(f"preset must be one of {', '.join(plans)}; got {preset!r}. Use 'demo' for a model that learns from examples.")
    return plans[preset]()
