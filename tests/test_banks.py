"""Banks of pictures: what is drawn from them, where their classes come from, and folders of characters good and bad."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import gen, unchecked
from PIL import Image
from scipy import stats

from mechicl.data import banks
from mechicl.data.banks import ImageBank, concept_bank, digit_bank, register
from mechicl.data.gaussian import MultimodalTask, draw, draw_second, second_shape, world
from mechicl.data.omniglot import check_omniglot, omniglot_bank
from mechicl.errors import ImageError, OptionError


def noisy_bank(k: int = 4, m: int = 5, shift: int = 2, **options: Any) -> ImageBank:
    return ImageBank(torch.randint(0, 256, (k, m, 3, 9, 11), dtype=torch.uint8, generator=gen(1)), shift=shift, **options)


# -- drawing --------------------------------------------------------------------------------------------------------------------------------------


def test_a_drawn_picture_is_one_of_its_class_and_any_of_them() -> None:
    bank = noisy_bank(shift=0)
    classes = torch.arange(4).repeat(500).view(50, 40)
    drawn = bank.draw(classes, gen())
    assert drawn.shape == (50, 40, 3, 9, 11)
    assert drawn.dtype == torch.float32
    match = (drawn[:, :, None] == (bank.images / 255)[classes]).flatten(3).all(-1)  # [50, 40, picture]
    assert torch.equal(match.sum(-1), torch.ones(50, 40, dtype=torch.long))
    assert stats.chisquare(match.sum((0, 1)).numpy()).pvalue > 1e-4


def test_moves_are_those_of_a_picture_with_its_border_repeated() -> None:
    bank = noisy_bank(m=1)
    drawn = (bank.draw(torch.zeros(400, dtype=torch.long), gen()) * 255).round().to(torch.uint8).numpy()
    framed = np.pad(bank.images[0, 0].numpy(), ((0, 0), (2, 2), (2, 2)), mode="edge")
    moves = {(i, j): framed[:, i : i + 9, j : j + 11].tobytes() for i in range(5) for j in range(5)}
    found = [next(move for move, pixels in moves.items() if pixels == one.tobytes()) for one in drawn]
    counts = [found.count(move) for move in moves]
    assert stats.chisquare(counts).pvalue > 1e-4


def test_noise_is_normal_and_the_same_generator_gives_the_same_pictures() -> None:
    bank, classes = noisy_bank(m=1, shift=0), torch.zeros(40, dtype=torch.long)
    noise = (bank.draw(classes, gen(), noise=0.2) - bank.draw(classes, gen())) / 0.2
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-4
    assert torch.equal(bank.draw(classes, gen(3), noise=0.1), bank.draw(classes, gen(3), noise=0.1))
    assert not torch.equal(bank.draw(classes, gen(3), noise=0.1), bank.draw(classes, gen(4), noise=0.1))


def test_float_pictures_are_taken_as_they_are() -> None:
    images = torch.rand(2, 3, 1, 8, 8, generator=gen())
    bank = ImageBank(images, ("a", "b"), shift=0)
    assert bool((bank.draw(torch.tensor([1]), gen())[0] == images[1]).flatten(1).all(1).any())
    assert (bank.n_classes, bank.n_each, bank.shape) == (2, 3, (1, 8, 8))


# -- banks that mechicl brings --------------------------------------------------------------------------------------------------------------------


def nearest(bank: ImageBank, names: torch.Tensor) -> float:
    """How often the nearest class mean of half the pictures, blurred, names a picture of the other half rightly."""
    half = bank.n_each // 2
    small = torch.nn.functional.avg_pool2d(bank.images.flatten(0, 1).float(), 2).view(bank.n_classes, bank.n_each, -1)
    means = small[:, :half].mean(1)
    found = torch.cdist(small[:, half:].flatten(0, 1), means).argmin(1)
    return float((found == names.repeat_interleave(bank.n_each - half)).float().mean())


def test_concepts_can_be_told_apart_and_shuffled_names_cannot() -> None:
    bank = concept_bank(24, 12, 20, seed=2)
    assert bank.shape == (3, 20, 20)
    assert bank.n_each == 12
    assert len(set(bank.names)) == 24
    assert nearest(bank, torch.arange(24)) > 0.5  # chance 1/24
    assert nearest(bank, torch.arange(24).roll(5)) < 0.2
    assert torch.equal(bank.images, concept_bank(24, 12, 20, seed=2).images)
    assert set(bank.names) != set(concept_bank(24, 12, 20, seed=3).names)


def test_digits_are_what_they_are_named() -> None:
    from sklearn.datasets import load_digits

    bank, scans = digit_bank(), load_digits()
    assert bank.shape == (1, 16, 16)
    assert bank.n_each == 174
    means = torch.stack([torch.from_numpy(scans.images[scans.target == k].mean(0)) for k in range(10)]).float()  # type: ignore[attr-defined]
    ours = torch.nn.functional.interpolate(bank.images.float().mean(1), size=(10, 10), mode="area")[:, 0, 1:9, 1:9]
    overlap = torch.corrcoef(torch.cat([ours.flatten(1), means.flatten(1)]))[:10, 10:]
    assert torch.equal(overlap.argmax(1), torch.arange(10))
    assert bank.images.amax() == 255  # ink is white
    assert float(bank.images[..., 0, :].float().mean()) < 20


# -- as the second modality -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain() -> str:
    """A bank whose class k is a picture of the constant grey k, so that what is shown can be read off."""
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1, 1).expand(40, 3, 1, 8, 8).contiguous()
    register("greys", ImageBank(images))
    return "greys"


def shown(pictures: torch.Tensor) -> torch.Tensor:
    return (pictures.flatten(-3).mean(-1) * 255).round().long()


def test_pictures_show_the_classes_of_the_sequence_and_novel_ones_are_held_out(plain: str) -> None:
    task = MultimodalTask(K1=64, K2=16, L=8, L2=4, D1=8, B=2, second=plain, eps2=0.0, n_novel=32, p_C=0.4)
    order = world(task).order2
    assert order is not None
    assert second_shape(task) == (1, 8, 8)
    assert task.novel2 == 8
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    for seed in range(6):
        drawn = draw(task, 80, gen(seed))
        assert drawn.second is not None
        assert drawn.item2 is not None
        assert drawn.query2 is not None
        grey = shown(drawn.second)
        classes = torch.cat([drawn.item2, drawn.query2[:, None]], 1)
        known = classes < 16
        assert torch.equal(grey[known], order[classes[known]])
        for new in (True, False):
            seen[new] |= set(grey[known != new].tolist())
        # one grey for each novel class of the draw, and one class for each grey
        pairs = {(int(c), int(g)) for c, g in zip(classes[~known], grey[~known], strict=True)}
        assert len(pairs) == len({c for c, _ in pairs}) == len({g for _, g in pairs}) == 8
    assert seen[False] == set(order[:16].tolist())
    assert seen[True] <= set(order[16:].tolist())
    assert len(seen[True]) > 8  # other held-out classes in other draws
    values, classes = draw_second(task, 200, gen())
    assert torch.equal(shown(values), order[classes])


def test_the_worlds_seed_decides_which_classes_are_held_out(plain: str) -> None:
    task = MultimodalTask(K1=64, K2=16, L=8, L2=4, B=2, second=plain, n_novel=32)
    assert not torch.equal(world(task).order2, world(replace(task, seed=1)).order2)
    with pytest.raises(OptionError, match="at most the 40 classes"):
        draw(replace(task, K2=36), 2, gen())


@pytest.mark.parametrize("split", ["train", "ic", "ic2", "iw"])
def test_concepts_and_digits_serve_as_second_modality(split: Any) -> None:
    for kind, k2, shape in (("concepts", 8, (3, 28, 28)), ("digits", 4, (1, 16, 16))):
        task = MultimodalTask(K1=32, K2=k2, L=16, L2=2, D1=8, second=kind, n_novel=16)
        drawn = draw(task, 4, gen(), split=split)
        assert drawn.second is not None
        assert drawn.second.shape == (4, 9, *shape)
        again = draw(task, 4, gen(), split=split)
        assert torch.equal(drawn.second, again.second)


def test_banks_refuse_what_they_cannot_show(plain: str) -> None:
    with unchecked():
        with pytest.raises(ImageError, match=r"images must be \[class"):
            ImageBank(torch.zeros(3, 8, 8))
        with pytest.raises(ImageError, match=r"floats in 0\.\.1"):
            ImageBank(torch.full((2, 2, 1, 8, 8), 2.0))
        with pytest.raises(ImageError, match=r"floats in 0\.\.1"):
            ImageBank(torch.full((2, 2, 1, 8, 8), float("nan")))
        with pytest.raises(ImageError, match=r"floats in 0\.\.1"):
            ImageBank(torch.zeros(2, 2, 1, 8, 8, dtype=torch.long))
    with pytest.raises(ImageError, match="names must be one for each"):
        noisy_bank(names=("a",))
    with pytest.raises(OptionError, match="shift must be"):
        noisy_bank(shift=9)
    with pytest.raises(OptionError, match="K must be 1"):
        concept_bank(10**6)
    with pytest.raises(OptionError, match="name must not be"):
        register("digits", noisy_bank())
    with pytest.raises(OptionError, match="name must be new"):
        register(plain, noisy_bank())
    with pytest.raises(OptionError, match="Write omniglot:FOLDER"):
        banks.bank_for("omniglot:", 4, 0)
    with pytest.raises(OptionError, match=r"second must be one of gaussian, concepts.*greys"):
        banks.bank_for("pictures", 4, 0)


# -- folders of characters ------------------------------------------------------------------------------------------------------------------------


def stroke(k: int, m: int, side: int = 35) -> Image.Image:
    """Character k: a dark bar on white, its place decided by k, its thickness by the drawer m."""
    pixels = np.full((side, side), 255, np.uint8)
    pixels[4 * k + 2 : 4 * k + 4 + m % 2, 5:-5] = 0
    return Image.fromarray(pixels).convert("1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k in range(6):
        place = tmp_path / f"alphabet_{k // 3}" / f"character{k % 3:02d}"
        place.mkdir(parents=True)
        for m in range(4):
            stroke(k, m).save(place / f"{k:04d}_{m:02d}.png")
    return tmp_path


def test_a_folder_of_characters_becomes_a_bank_of_ink_on_paper(folder: Path) -> None:
    bank = omniglot_bank(folder, size=35)
    assert bank.images.shape == (6, 4, 1, 35, 35)
    assert bank.names[:4] == ("alphabet_0/character00", "alphabet_0/character01", "alphabet_0/character02", "alphabet_1/character00")
    for k in range(6):
        ink = bank.images[k, 1, 0].float().mean(1)
        assert float(ink.argmax()) == pytest.approx(4 * k + 2, abs=2)
        assert bank.images[k, 0, 0].unique().tolist() == [0, 255]
    assert omniglot_bank(folder).shape == (1, 28, 28)
    report = check_omniglot(folder)
    assert (report.n_alphabets, len(report.characters), report.fewest, report.problems) == (2, 6, 4, ())
    assert str(report).endswith("2 alphabets, 6 characters, 4 pictures each.")


def test_the_releases_two_halves_are_found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("release")
    for half, alphabet in (("images_background", "alphabet_0"), ("images_evaluation", "alphabet_1")):
        (root / half).mkdir()
        (folder / alphabet).rename(root / half / alphabet)
    (root / "strokes_background").mkdir()  # the release has more beside them
    assert omniglot_bank(root).n_classes == 6


def test_characters_train_a_task(folder: Path) -> None:
    task = MultimodalTask(K1=16, K2=4, L=8, L2=2, D1=8, second=f"omniglot:{folder}", n_novel=8)
    drawn = draw(task, 6, gen(), split="ic")
    assert drawn.second is not None
    assert drawn.second.shape == (6, 9, 1, 28, 28)


def test_what_is_wrong_with_a_folder_is_said_file_by_file(folder: Path) -> None:
    (folder / "alphabet_0" / "character00" / "notes.txt").write_text("hello")
    (folder / "alphabet_0" / "character01" / "0001_00.png").write_bytes(b"not a picture")
    whole = (folder / "alphabet_1" / "character00" / "0003_00.png").read_bytes()
    (folder / "alphabet_1" / "character00" / "0003_00.png").write_bytes(whole[:40])
    (folder / "empty").mkdir()
    for path in sorted((folder / "alphabet_1" / "character02").iterdir())[1:]:
        path.unlink()
    (folder / ".hidden").mkdir()
    with pytest.raises(ImageError) as caught:
        omniglot_bank(folder)
    text = str(caught.value)
    for piece in (
        "notes.txt: not a picture by its name",
        "0001_00.png: cannot be read",
        "0003_00.png: cannot be read",
        "empty: an alphabet without characters",
        "character02: 1 pictures where at least 2 are needed",
        "strict=False",
    ):
        assert piece in text
    bank = omniglot_bank(folder, strict=False)
    assert bank.images.shape[:2] == (5, 3)  # the poorest character that is left has three
    report = check_omniglot(folder)
    assert len(report.problems) == 5
    assert "5 characters, 3 to 4 pictures each" in str(report)


@pytest.mark.parametrize(("made", "message"), [(False, "there is no such folder"), (True, "no alphabet/character folders")])
def test_a_folder_without_characters_is_refused(tmp_path: Path, made: bool, message: str) -> None:
    place = tmp_path / "characters"
    if made:
        place.mkdir()
    with pytest.raises(ImageError, match=message):
        omniglot_bank(place, strict=False)
    with pytest.raises(OptionError, match="at least 8 pixels"):
        omniglot_bank(place, size=4)


def test_many_problems_are_counted(folder: Path) -> None:
    for k in range(9):
        (folder / "alphabet_0" / "character00" / f"{k}.txt").write_text("")
    with pytest.raises(ImageError, match="and 4 more"):
        omniglot_bank(folder)
