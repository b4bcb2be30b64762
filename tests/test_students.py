"""Students: what they learn, that training goes on as any other, what they are refused for, and their certificate."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from flowad_fast import bundle
from flowad_fast.benchmarks.record.report import RESULTS
from flowad_fast.checkpoints.load import load_checkpoint, save_checkpoint
from flowad_fast.cli import train as cli
from flowad_fast.config import Student
from flowad_fast.errors import ConfigError
from flowad_fast.evaluation.certificate import ranking
from flowad_fast.export import cli as export_cli
from flowad_fast.export.exporter import export_bundle
from flowad_fast.files import sha256
from flowad_fast.shipped import weight_file
from flowad_fast.stages.integration import from_tokens
from flowad_fast.stages.scorers import Density, Inversion, Mismatch, Reconstruction, Scorer
from flowad_fast.training.certify import operations
from flowad_fast.training.config import TrainConfig
from flowad_fast.training.loop import CHECKPOINT, LOG, STATE, TrainResult, train
from flowad_fast.training.students import Teacher, perturbed
from tests.models import PARTS, tiny_frames, tiny_model

SMALL = {
    "layout": "mvtec", "hidden_size": 16, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0, "batch_size": 4, "steps": 6,
    "lr": 3e-3, "warmup_steps": 1, "ema_decay": 0.5, "log_every": 2, "save_every": 2,
}  # fmt: skip
TEACHER_SIZE = 64


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The categories of `PARTS` in MVTec's layout; the first has defective test parts too."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.RandomState(0)
    for i, category in enumerate(PARTS[:2]):
        kinds = [("train/good", 8), ("test/good", 4), ("test/scratch", 5)][: 3 - i]
        for folder, count in kinds:
            place = root / category / folder
            place.mkdir(parents=True)
            for number in range(count):
                coarse = random.randint(0, 256, (8, 8, 3)).astype(np.uint8)
                Image.fromarray(coarse).resize((64, 64)).save(place / f"{number:03d}.png")
            if folder == "test/scratch":
                masks = root / category / "ground_truth" / "scratch"
                masks.mkdir(parents=True)
                for number in range(count):
                    Image.fromarray(np.full((64, 64), 255, np.uint8)).save(masks / f"{number:03d}_mask.png")
    return root


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_checkpoint(tiny_model(2, real_backbone=True, hidden_size=TEACHER_SIZE), path, include_backbone=True)
    return path


def config(root: Path, teacher: Path, **fields: object) -> TrainConfig:
    return TrainConfig(**{**SMALL, "root": root, "teacher": str(teacher), "categories": PARTS[:1], **fields})


@pytest.fixture(scope="module")
def whole(root: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    assert train(config(root, teacher), output, device="cpu").finished
    return output


# What is learned


@pytest.mark.parametrize(
    "scorer",
    [
        Mismatch(tau=0.3, draws=2, seed=5),
        Inversion(steps=3),
        Reconstruction(steps=6),
        Reconstruction(start="inversion"),
    ],
    ids=lambda one: f"{one.kind}-{getattr(one, 'start', '')}",
)
@pytest.mark.parametrize("prediction", ["velocity", "data"])
def test_lessons_are_the_scorers_own_evaluations(scorer: Scorer, prediction: str) -> None:
    """Each state and output is one of those that the scorer's map of this part is computed from."""
    model = tiny_model(2, pred_type=prediction)
    x1 = torch.randn(5, 16, 192, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 0, 1, 1])
    lesson = Teacher(model, scorer, "", 0.0).lesson(x1, y, torch.Generator().manual_seed(1))
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    forward = model.dit.forward
    model.dit.forward = lambda x, t, y: (seen.append((x, t, out := forward(x, t, y))), out)[1]  # type: ignore[assignment]
    if isinstance(scorer, Mismatch):  # the draws are one batch there
        for noise in scorer.draw(model.config):
            x = scorer.tau * x1 + (1 - scorer.tau) * noise
            model.dit(x, torch.full((5,), scorer.tau), y)
    else:
        scorer.expected(model, from_tokens(x1, 4, 4), y)
    assert len(seen) == scorer.evaluations(model.config)
    count = len(lesson.x) // 5
    for i, (x, t, out) in enumerate(zip(lesson.x, lesson.t, lesson.target, strict=True)):
        step, part = divmod(i, 5)
        same = [torch.allclose(x, s[part], atol=1e-5) and torch.allclose(out, o[part], atol=1e-5) for s, _, o in seen]
        if isinstance(scorer, Mismatch):
            assert count == 1 and sum(same) == 1 and t == pytest.approx(0.3)
        else:
            assert count == len(seen) and same[step] and t == seen[step][1][0]
    assert lesson.y is not None and torch.equal(lesson.y, y.repeat(count))
    if isinstance(scorer, Mismatch):  # every draw gets its turn
        many = Teacher(model, scorer, "", 0.0).lesson(x1[:1].repeat(32, 1, 1), y[:1].repeat(32), torch.Generator())
        assert len(torch.unique(many.x[:, 0, 0])) == 2


def test_perturbations_leave_their_share_and_change_the_rest() -> None:
    x = torch.randn(64, 48, 7, generator=torch.Generator().manual_seed(0))
    out = perturbed(x, (6, 8), 0.5, torch.Generator().manual_seed(3))
    assert out.shape == x.shape and torch.isfinite(out).all()
    changed = (out != x).flatten(1).any(1).float().mean()
    assert 0.3 < changed < 0.7
    assert torch.equal(out, perturbed(x, (6, 8), 0.5, torch.Generator().manual_seed(3)))
    assert torch.equal(perturbed(x, (6, 8), 0.0, torch.Generator()), x)
    everything = perturbed(x, (6, 8), 1.0, torch.Generator().manual_seed(3))
    cells = (everything != x).any(-1).float().mean(1)  # some everywhere, most in a part of the cells
    assert (cells == 1).any() and ((cells > 0) & (cells < 1)).sum() > 20
    assert not torch.equal(x, everything) and perturbed(x[:1], (6, 8), 1.0, torch.Generator()).shape == (1, 48, 7)


def test_a_student_learns_its_teacher(root: Path, teacher: Path, tmp_path: Path) -> None:
    """More steps bring it closer, by far more than chance."""
    train(config(root, teacher, steps=150, hidden_size=32, log_every=10, save_every=150), tmp_path, device="cpu")
    log = [json.loads(line)["loss"] for line in (tmp_path / LOG).read_text().splitlines()]
    assert log[-1] < 0.5 * log[0]


# As any training


def test_interrupted_students_go_on_to_the_same_result(
    root: Path, teacher: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def kill(stage: str, done: int, total: int, loss: float | None) -> None:
        if stage == "training" and done == 5:
            raise Killed

    with pytest.raises(Killed):
        train(config(root, teacher), tmp_path, device="cpu", progress=kill)
    result: TrainResult = train(config(root, teacher), tmp_path, device="cpu")
    assert result.finished and result.resumed_from == 4
    for name in (CHECKPOINT, "model.json", LOG):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name


def test_another_teacher_or_scorer_does_not_go_on(root: Path, teacher: Path, whole: Path, tmp_path: Path) -> None:
    for name in (STATE, LOG):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    other = tmp_path / "other.safetensors"
    save_checkpoint(tiny_model(2, real_backbone=True, seed=1), other, include_backbone=True)
    with pytest.raises(ConfigError, match="teacher_sha256"):
        train(config(root, other), tmp_path, device="cpu")
    with pytest.raises(ConfigError, match="another configuration"):
        train(config(root, teacher, scorer={"kind": "mismatch", "tau": 0.4}), tmp_path, device="cpu")
    moved = tmp_path / "moved.safetensors"
    for suffix in (".safetensors", ".json"):
        moved.with_suffix(suffix).write_bytes(teacher.with_suffix(suffix).read_bytes())
    assert train(config(root, moved), tmp_path, device="cpu").resumed_from == 6


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scorer": {"kind": "density"}}, "mismatch, inversion or reconstruction"),
        ({"loss": "data"}, "a teacher and its scorer set it"),
        ({"class_dropout": 0.1}, "a teacher and its scorer set it"),
    ],
)
def test_settings_that_contradict_a_teacher(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(layout="elpv", teacher="demo", **fields)
    with pytest.raises(ValueError, match="got no teacher"):
        TrainConfig(layout="elpv", scorer={"kind": "mismatch"})


def test_what_a_student_has_from_its_teacher_cannot_be_set(root: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="image_size 128: a student has its teacher's, which is 64"):
        train(config(root, teacher, image_size=128), tmp_path, device="cpu")
    with pytest.raises(ConfigError, match="teacher has no class 'pen'"):
        train(config(root, teacher, categories=("pen",)), tmp_path, device="cpu")
    with pytest.raises(ConfigError, match=r"expected a checkpoint of this project .* save_checkpoint"):
        train(config(root, tmp_path / "net.pth"), tmp_path, device="cpu")
    with pytest.raises(ConfigError, match="num_heads"):
        train(config(root, teacher, num_heads=3), tmp_path, device="cpu")


def test_a_scorer_that_evaluates_otherwise_is_refused(whole: Path, tmp_path: Path) -> None:
    student = load_checkpoint(whole / CHECKPOINT)
    x1, y = torch.randn(1, 192, 4, 4), torch.tensor([0])
    assert Mismatch().map(student, x1, y).shape == (1, 4, 4)
    for scorer in (Mismatch(tau=0.4), Mismatch(seed=1), Mismatch(draws=2), Inversion(), Reconstruction(), Density()):
        for use in (scorer.map, scorer.expected):
            with pytest.raises(
                ConfigError, match=r"student trained for Mismatch\(.* alone, got .*--scorer " + scorer.kind
            ):
                use(student, x1, y)
    frames = tiny_frames(3)
    with pytest.raises(ConfigError, match="student trained for"):
        export_bundle(student, Inversion(), tmp_path / "b", formats=("eager",), frames=frames, quiet=True)
    assert not bundle.is_bundle(tmp_path / "b")


def test_which_evaluations_another_scorer_has() -> None:
    assert Mismatch(draws=3).covers(Mismatch(draws=2)) and not Mismatch(draws=2).covers(Mismatch(draws=3))
    assert torch.equal(Mismatch(draws=3).draw(tiny_model().config)[:2], Mismatch(draws=2).draw(tiny_model().config))
    assert Inversion(power=1).covers(Inversion(power=2)) and not Inversion(steps=3).covers(Inversion(steps=2))
    assert not Mismatch().covers(Inversion()) and not Inversion().covers(Mismatch())
    assert not Reconstruction(steps=6).covers(Reconstruction(steps=6, start="inversion"))


# The certificate


def test_a_ranking_is_what_sklearn_says_and_its_interval_is_paired() -> None:
    random = np.random.RandomState(0)
    labels = np.repeat([0, 1], (60, 40))
    groups = np.tile([0, 1], 50)
    teacher = labels + random.standard_normal(100)
    student = teacher + 0.2 * random.standard_normal(100)
    one = ranking(teacher, student, labels, groups)
    expected = [
        np.mean([roc_auc_score(labels[groups == g], s[groups == g]) for g in (0, 1)]) for s in (teacher, student)
    ]
    assert (one.teacher_auroc, one.student_auroc) == pytest.approx(expected)
    assert one.low is not None and one.high is not None and one.difference == pytest.approx(expected[1] - expected[0])
    assert one.low <= one.difference <= one.high and one.high - one.low < 0.06
    unrelated = ranking(teacher, random.permutation(teacher), labels, groups)
    assert unrelated.low is not None and unrelated.high is not None and unrelated.high - unrelated.low > 0.1
    assert unrelated.spearman < 0.5 < one.spearman
    same = ranking(teacher, 3 * teacher + 1, labels, groups)
    assert (same.spearman, same.difference, same.low, same.high) == pytest.approx((1, 0, 0, 0))
    assert ranking(teacher, student, None, groups).student_auroc is None


def test_the_certificate_lies_with_the_checkpoint(whole: Path, teacher: Path) -> None:
    spec = load_checkpoint(whole / CHECKPOINT).spec
    known = spec.student
    assert known is not None and known.teacher == sha256(teacher) == spec.provenance["teacher_sha256"]
    assert known.scorer == {"tau": 0.5, "draws": 1, "seed": 0, "kind": "mismatch"}
    one = known.certificate
    assert one is not None and (one.labelled, one.good, one.others) == (True, 4, 5)
    assert set(one.rankings) == {"max", "top"} and one.resamples == 2000
    big, small = load_checkpoint(teacher).config, spec.velocity
    assert one.operations == operations(small) / operations(big) < 0.5  # the map and the ends cost both the same
    assert all(r.low is not None and r.high is not None and r.low <= r.high for r in one.rankings.values())


def test_without_labels_good_parts_are_compared_with_perturbed_ones(root: Path, teacher: Path, tmp_path: Path) -> None:
    train(config(root, teacher, categories=PARTS[1:2]), tmp_path, device="cpu")
    known = load_checkpoint(tmp_path / CHECKPOINT).spec.student
    assert known is not None and known.certificate is not None
    one = known.certificate
    assert (one.labelled, one.good, one.others, one.resamples) == (False, 4, 4, 0)
    assert all(r.student_auroc is None and -1 <= r.spearman <= 1 for r in one.rankings.values())


def test_bundles_carry_and_show_the_certificate(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = load_checkpoint(whole / CHECKPOINT)
    target = tmp_path / "bundle"
    result = export_bundle(student, Mismatch(), target, formats=("onnx",), frames=tiny_frames(3), quiet=True)
    assert result.ok, result.status
    assert bundle.read(target)[1].model.student == student.spec.student
    export_cli.show(target)
    shown = " ".join(capsys.readouterr().out.split())
    assert "student of" in shown and "AUROC" in shown and "certificate against the teacher" in shown
    assert "certificate against the teacher" in (target / "README.md").read_text()


def test_the_command_takes_the_scorers_options(
    root: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = "--hidden-size 16 --depth 1 --num-heads 2 --steps 2 --warmup-steps 1 --batch-size 2 --device cpu --json"
    words = f"flowad-train --teacher {teacher} --layout mvtec --data {root} --category {PARTS[0]} --output {tmp_path}"
    monkeypatch.setattr("sys.argv", [*words.split(), *sizes.split(), "--scorer", "inversion", "--scorer-steps", "2"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code and json.loads(capsys.readouterr().out)["finished"]
    known = load_checkpoint(tmp_path / CHECKPOINT).spec.student
    assert known is not None and known.scorer == {"steps": 2, "power": 2, "kind": "inversion"}


def test_the_demos_student_is_within_a_point_of_the_shipped_teacher_at_a_third_of_its_operations() -> None:
    recorded = json.loads((RESULTS / "demo" / "student.json").read_text(encoding="utf-8"))
    known = Student.model_validate(recorded["student"])
    assert known.teacher == sha256(weight_file("demo"))
    assert known.certificate is not None and known.certificate.labelled
    assert known.certificate.operations <= 1 / 3
    for ranking_ in known.certificate.rankings.values():
        assert ranking_.difference is not None and abs(ranking_.difference) <= 0.01
    top = known.certificate.rankings["top"]
    assert top.difference is not None and top.low is not None and top.high is not None
    pair = json.loads((RESULTS / "cpu-student.json").read_text(encoding="utf-8"))["pairs"][0]["ratio"]
    said = " ".join((RESULTS.parents[1] / "README.md").read_text(encoding="utf-8").split())
    assert f"has {known.certificate.operations:.0%} of its teacher's operations".replace("%", " %") in said
    assert (
        f"AUROC is {-100 * top.difference:.2f} points lower (95 %: {-100 * top.low:.2f} lower to {100 * top.high:.2f} "
        f"higher; image score `top`), and whole frames are {pair['speed']:.2f} times as fast on two cores "
        f"({pair['low']:.2f}–{pair['high']:.2f}, in turns"
    ) in said
    lines = (RESULTS / "demo" / "training-student.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["step"] == recorded["provenance"]["config"]["steps"]
    assert json.loads(lines[-1])["loss"] == recorded["provenance"]["loss"]
