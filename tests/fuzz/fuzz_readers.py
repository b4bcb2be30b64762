"""Fuzzers of everything that is read from disk: only the project's own errors may come out of a reader.

    python tests/fuzz/fuzz_readers.py --seconds 300

Each fuzzer damages a valid file (values, keys, bytes) and gives it to the reader. A finding is printed with the input
that led to it, and the exit code is 1.
"""

import argparse
import copy
import json
import string
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from flowad_fast import bundle
from flowad_fast.bundle import Artefact, Manifest
from flowad_fast.checkpoints.load import load_checkpoint, save_checkpoint
from flowad_fast.config import IMAGENET_MEAN, ModelConfig, VelocityConfig
from flowad_fast.data.images import frame_bytes, read_stamped
from flowad_fast.data.layouts import read_dataset
from flowad_fast.data.walk import find_photos
from flowad_fast.engines.onnx_file import check_external_data
from flowad_fast.errors import FlowADError
from flowad_fast.evaluation.inspection import FORMATS, Result, ResultFile
from flowad_fast.files import sha256
from flowad_fast.model import FlowModel
from flowad_fast.stages.decision import Calibration, ClassCalibration, Range
from flowad_fast.stages.features import FeatureExtractor
from flowad_fast.stages.scorers import Density
from flowad_fast.stages.velocity import DiT

VELOCITY = VelocityConfig(channels=192, height=4, width=4, hidden_size=8, depth=1, num_heads=2, num_classes=2,
                          use_class_labels=True)  # fmt: skip
SPEC = ModelConfig(
    velocity=VELOCITY,
    backbone="efficientnet-lite0",
    image={"size": 64},  # type: ignore[arg-type]
    class_names=("nut", "screw"),
)
TRAINING = {
    "data": {"dataset_name": "x", "category": "all", "img_size": 64, "transform_type": "imagenet"},
    "flow_matching": {"pred_type": "velocity", "scheduler": {"name": "ot"}, "solver": {"name": "euler"}},
    "model": {
        "backbone": {
            "model_name": "efficientnet-lite0", "outblocks": [0, 2, 4, 10], "outstrides": [2, 4, 8, 16],
            "normalization": None,
        },
        "model_name": "dit", "patch_size": 1, "hidden_size": 8, "depth": 1, "num_heads": 2, "mlp_ratio": 4,
        "class_dropout_prob": 0.0, "use_class_labels": True, "learn_sigma": False, "t_scale": 1000,
    },
}  # fmt: skip
INVAD = {
    "data": TRAINING["data"],
    "backbone": {"model_type": "efficientnet-lite0", "outblocks": [0, 2, 4, 10], "outstrides": [2, 4, 8, 16]},
    "diffusion": {
        "depth": 1,
        "width": 8,
        "patch_size": 1,
        "num_sampling_steps": 3,
        "learn_sigma": False,
        "num_heads": 2,
    },
}

scalars = (
    st.none() | st.booleans() | st.integers() | st.integers(-3, 70) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["", ".", "..", "../x", "a/b", "\0", "1e999", "nan", "1_0", "0x10", "inf", 10**400, -0.0, 2**63])
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(string.ascii_letters, max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def damaged(draw: st.DrawFn, valid: Any) -> Any:
    """A copy of a nested mapping with one to three of its parts replaced, removed, renamed or repeated."""
    data = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        parent, node = None, data
        while isinstance(node, (dict, list)) and node and (parent is None or draw(st.integers(0, 2))):
            key = draw(st.sampled_from(sorted(node, key=str) if isinstance(node, dict) else range(len(node))))
            parent, node = (node, key), node[key]
        if parent is None:
            return draw(values)
        holder, key = parent
        act = draw(st.sampled_from(["replace", "replace", "remove", "rename", "wrap"]))
        if act == "replace":
            holder[key] = draw(values)
        elif act == "wrap":
            holder[key] = [holder[key]]
        elif isinstance(holder, list):
            holder.append(draw(values))
        else:
            moved = holder.pop(key)
            if act == "rename":
                holder[draw(st.text(max_size=8))] = moved
    return data


@st.composite
def damaged_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """A copy of a file with some bytes changed, inserted or cut, mostly where its structure is: start and end."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        edge = st.integers(0, min(len(data), 600) - 1)
        at = draw(edge | edge.map(lambda i: len(data) - 1 - i) | st.integers(0, len(data) - 1))
        act = draw(st.sampled_from(["change", "change", "insert", "cut", "truncate"]))
        if act == "change":
            data[at] = draw(st.integers(0, 255))
        elif act == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif act == "cut":
            del data[at : at + draw(st.integers(1, 64))]
        else:
            del data[at:]
    return bytes(data)


ODD_NAMES = (
    "good", "train", "test", "ground_truth", "dent", "0.png", "0_mask.png", "1.JPG", "._0.png", "[x]", "[/y]", "$$",
    "%s", "=1+1", "a\nb.png", "\udcff.png", "\u202egnp.exe", "@eaDir", "..png", "é.pgm", "-",
)  # fmt: skip
anything = st.text(st.characters(blacklist_characters="/\0"), min_size=1, max_size=9)
NAMES = anything.filter(lambda name: name.strip(".")) | st.sampled_from(ODD_NAMES)  # `..` would lead out of the folder
TREES = st.lists(
    st.tuples(st.lists(NAMES, min_size=1, max_size=4), st.sampled_from(["photo", "empty", "folder", "link", "loop"])),
    max_size=9,
)
TABLE = "object,split,label,image,mask\nc,train,normal,a.png,\nc,test,anomaly,a.png,a.png\n"


def plant(root: Path, tree: list[tuple[list[str], str]], photo: bytes) -> None:
    """Make what a tree lists, as far as the file system takes it."""
    root.mkdir()
    for names, kind in tree:
        place = root.joinpath(*names)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if kind == "folder":
                place.mkdir(exist_ok=True)
            elif kind in ("link", "loop"):
                place.symlink_to(root / names[0] if kind == "loop" else root / "nowhere")
            else:
                place.write_bytes(photo if kind == "photo" else b"")
        except (OSError, ValueError):
            continue


class Readers:
    """Valid files in a folder, a way to damage each, and the reader that gets it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(0)
        model = FlowModel(SPEC, DiT(VELOCITY), FeatureExtractor("efficientnet-lite0"))
        save_checkpoint(model, folder / "own.safetensors")
        self.spec = json.loads((folder / "own.json").read_text())
        self.tensors = (folder / "own.safetensors").read_bytes()
        state = {f"model.{key}": value for key, value in model.dit.state_dict().items()}
        torch.save({"model": state}, folder / "flowad.pth")
        torch.save({key.replace("model.", "net.", 1): value for key, value in state.items()}, folder / "invad.pth")
        self.zip = (folder / "flowad.pth").read_bytes()
        torch.save({"model": state}, folder / "old.pth", _use_new_zipfile_serialization=False)
        self.pickle = (folder / "old.pth").read_bytes()
        tensor = onnx.TensorProto(name="w", dims=[4], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
        for key, value in {"location": "weights", "offset": "0", "length": "16"}.items():
            tensor.external_data.add(key=key, value=value)
        constant = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
        self.onnx = onnx.helper.make_model(
            onnx.helper.make_graph([constant], "g", [], [], [tensor])
        ).SerializeToString()
        (folder / "weights").write_bytes(bytes(16))
        (folder / "training.yaml").write_text(yaml.safe_dump(TRAINING))
        (folder / "bundle").mkdir()
        (folder / "bundle" / "engine").write_bytes(b"engine")
        files = {"engine": sha256(folder / "bundle" / "engine")}
        ranges = (Range(low=0, high=1), Range(low=0, high=1))
        manifest = Manifest(
            project_version="0", created=bundle.now(), source={"mean": IMAGENET_MEAN}, model=SPEC, scorer=Density(),
            frame_size=(64, 64), artefacts={"onnx": Artefact(engine="onnxruntime", files=files)},
            calibration=Calibration(alpha=0.1, classes={"nut": ClassCalibration(threshold=1, parts=9, ranges=ranges)}),
        )  # fmt: skip
        self.manifest = json.loads(manifest.model_dump_json())
        for reader in (self.read_manifest, self.read_spec, self.read_flowad_yaml, self.read_invad_yaml):
            reader(copy.deepcopy({self.read_manifest: self.manifest, self.read_spec: self.spec,
                                  self.read_flowad_yaml: TRAINING, self.read_invad_yaml: INVAD}[reader]))  # fmt: skip
        Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(folder / "a.png")
        self.photo = (folder / "a.png").read_bytes()
        self.results = {}
        for format in FORMATS:
            with ResultFile(folder / f"valid.{format}", format, "b") as file:
                file.append(Result(folder / "a.png", "good", 1.5, "nut"))
                file.append(Result(folder / 'b,"\n\udcff.png', "error", reason="=1"))
            self.results[format] = (folder / f"valid.{format}").read_bytes()
        self.read_table(TABLE.encode())
        self.read_safetensors(self.tensors)
        self.read_pth(self.zip)
        self.read_pth(self.pickle)
        self.read_onnx(self.onnx)
        (folder / "own.safetensors").write_bytes(self.tensors)  # what was valid is valid: the fuzzers start from here

    def read_manifest(self, data: Any) -> None:
        (self.folder / "bundle" / "manifest.json").write_text(json.dumps(data))
        bundle.read(self.folder / "bundle")

    def read_manifest_bytes(self, data: bytes) -> None:
        (self.folder / "bundle" / "manifest.json").write_bytes(data)
        bundle.read(self.folder / "bundle")

    def read_spec(self, data: Any) -> None:
        (self.folder / "own.safetensors").write_bytes(self.tensors)
        (self.folder / "own.json").write_text(json.dumps(data))
        load_checkpoint(self.folder / "own.safetensors")

    def read_flowad_yaml(self, data: Any) -> None:
        (self.folder / "flowad.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
        load_checkpoint(self.folder / "flowad.pth", self.folder / "flowad.yaml")

    def read_invad_yaml(self, data: Any) -> None:
        (self.folder / "invad.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
        load_checkpoint(self.folder / "invad.pth", self.folder / "invad.yaml")

    def read_yaml_bytes(self, data: bytes) -> None:
        (self.folder / "flowad.yaml").write_bytes(data)
        load_checkpoint(self.folder / "flowad.pth", self.folder / "flowad.yaml")

    def read_safetensors(self, data: bytes) -> None:
        (self.folder / "own.json").write_text(json.dumps(self.spec))
        (self.folder / "own.safetensors").write_bytes(data)
        load_checkpoint(self.folder / "own.safetensors")

    def read_pth(self, data: bytes) -> None:
        (self.folder / "damaged.pth").write_bytes(data)
        load_checkpoint(self.folder / "damaged.pth", self.folder / "training.yaml")

    def read_onnx(self, data: bytes) -> None:
        (self.folder / "model.onnx").write_bytes(data)
        check_external_data(self.folder / "model.onnx")

    def read_tree(self, tree: list[tuple[list[str], str]]) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            root = Path(name) / "root"
            plant(root, tree, self.photo)
            found = find_photos(root)
            judged = [Result(path, "error", reason=str(read_stamped(path)[0])) for path in found.paths]
            for format in FORMATS:
                target = Path(name) / format
                with ResultFile(target, format, "b") as file:
                    for result in judged:
                        file.append(result)
                if judged:
                    with ResultFile(target, format, "b") as file:
                        assert [row["path"] for row in file.rows] == [str(path) for path in found.paths]
            for layout in ("mvtec", "folder"):
                try:
                    read_dataset(layout, root)
                except FlowADError:
                    continue

    def read_result_rows(self, data: bytes, format: str) -> None:
        path = self.folder / "results"
        path.write_bytes(data)
        with ResultFile(path, format, "b") as file:
            file.done({self.folder / "a.png": "nut"})
            file.append(Result(self.folder / "a.png", "good", 1.0, "nut"))

    def read_csv(self, data: bytes) -> None:
        self.read_result_rows(data, "csv")

    def read_jsonl(self, data: bytes) -> None:
        self.read_result_rows(data, "jsonl")

    def read_table(self, data: bytes) -> None:
        root = self.folder / "visa"
        (root / "split_csv").mkdir(parents=True, exist_ok=True)
        (root / "a.png").write_bytes(self.photo)
        (root / "split_csv" / "1cls.csv").write_bytes(data)
        read_dataset("visa", root)

    def read_photo(self, data: bytes) -> None:
        path = self.folder / "photo.png"
        path.write_bytes(data)
        frame_bytes(path)
        frame, found = read_stamped(path)
        assert found is not None
        if isinstance(frame, FlowADError):
            raise frame

    def fuzzers(self) -> dict[str, tuple[Callable[[Any], None], st.SearchStrategy[Any]]]:
        """By name: a reader and what it is given."""
        text = json.dumps(self.manifest).encode()
        return {
            "manifest": (self.read_manifest, damaged(self.manifest)),
            "manifest bytes": (self.read_manifest_bytes, damaged_bytes(text)),
            "own JSON": (self.read_spec, damaged(self.spec)),
            "FlowAD YAML": (self.read_flowad_yaml, damaged(TRAINING)),
            "InvAD YAML": (self.read_invad_yaml, damaged(INVAD)),
            "YAML bytes": (self.read_yaml_bytes, damaged_bytes(yaml.safe_dump(TRAINING).encode())),
            "safetensors": (self.read_safetensors, damaged_bytes(self.tensors)),
            "zip .pth": (self.read_pth, damaged_bytes(self.zip)),
            "pickle .pth": (self.read_pth, damaged_bytes(self.pickle)),
            "ONNX": (self.read_onnx, damaged_bytes(self.onnx)),
            "folders": (self.read_tree, TREES),
            "tables": (self.read_table, damaged_bytes(TABLE.encode()) | damaged_bytes(TABLE.encode("utf-16"))),
            "CSV results": (self.read_csv, damaged_bytes(self.results["csv"])),
            "JSONL results": (self.read_jsonl, damaged_bytes(self.results["jsonl"])),
            "photos": (self.read_photo, damaged_bytes(self.photo)),
        }


def fuzz(seconds: float, report: Callable[[str], None] = print) -> list[str]:
    """Run every fuzzer for its share of the time; returns the findings."""
    findings = []
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzzers = Readers(Path(name)).fuzzers()
        for title, (read, strategy) in fuzzers.items():
            counts = {"tried": 0, "refused": 0}
            finding = fuzz_one(read, strategy, time.monotonic() + seconds / len(fuzzers), counts)
            if finding:
                findings.append(f"{title}: {finding}")
            report(
                f"{title}: {counts['tried']} files, {counts['refused']} refused{': FOUND ' if finding else ''}{finding}"
            )
    return findings


def fuzz_one(read: Callable[[Any], None], strategy: st.SearchStrategy[Any], end: float, counts: dict[str, int]) -> str:
    """Run one fuzzer until the time `end`; returns what it found, or an empty text."""

    @settings(
        max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
    )
    @given(strategy)
    def attempt(data: Any) -> None:
        if time.monotonic() > end:
            return
        counts["tried"] += 1
        try:
            read(data)
        except FlowADError:
            counts["refused"] += 1
        except Exception as error:  # anything else than the project's own errors is a finding
            raise AssertionError(f"{''.join(traceback.format_exception(error)[-3:])} from {data!r:.1500}") from error

    while time.monotonic() < end:
        try:
            attempt()
        except AssertionError as error:
            return str(error)
    return ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30)
    sys.exit(1 if fuzz(parser.parse_args().seconds) else 0)
