"""Verification sets: the file format, files that are attacks, and the ten-fold protocol."""

from __future__ import annotations

import copyreg
import io
import json
import os
import pickle
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz.mutation import outcome
from PIL import Image
from support.evaluation_formats import array_bin, orl_pairs, python2_bin, python2_text_bin
from support.training import arguments, tiny, train, write_faces

from train import evaluate, main
from train.config import make_config
from train.data.dataset import open_dataset
from train.errors import UserError
from train.evaluation import plain_pickle
from train.evaluation.embed import embed
from train.evaluation.plain_pickle import read_plain
from train.evaluation.test_sets import BinSet, open_bin_set, open_test_sets
from train.evaluation.verification import best_threshold

WRITERS: dict[str, Callable[[list[bytes], list[bool]], bytes]] = {
    "Python 2": python2_bin,
    "Python 2, text": python2_text_bin,
    **{f"protocol {p}": lambda i, s, p=p: pickle.dumps((i, s), p) for p in (2, 4, 5)},
    **{f"arrays, protocol {p}": lambda i, s, p=p: array_bin(i, s, p) for p in (0, 2, 4, 5)},
    "flags in an array": lambda i, s: pickle.dumps((i, np.array(s)), 4),
    "flags 0 and 1": lambda i, s: pickle.dumps([tuple(i), [int(x) for x in s]], 2),
}


def _open(path: Path, on_error: str = "fail") -> BinSet:
    keys = {"model": {"input_size": 16}, "data": {"on_error": on_error, "workers": 0}}
    return open_bin_set(path, make_config(("test", keys)))


@pytest.mark.parametrize("writer", WRITERS)
def test_every_way_such_sets_were_written(writer: str, tmp_path: Path) -> None:
    images, same = orl_pairs()
    path = tmp_path / "lfw.bin"
    path.write_bytes(WRITERS[writer](images, same))
    read = _open(path)
    assert read.name == "lfw"
    assert read.same.tolist() == same
    assert [read.source.images.read(i) for i in range(len(images))] == images


def test_python_2s_pickle_is_what_python_reads() -> None:
    """The generator of the tests against the standard library."""
    images, same = orl_pairs()
    for written in (python2_bin(images, same), python2_text_bin(images, same)):
        assert pickle.loads(written, encoding="bytes") == (images, same)


class _Call:
    """Pickles to a call of whatever."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.value = (function, arguments, *([] if state is None else [state]))

    def __reduce__(self) -> Any:
        return self.value


def _text(module: str, name: str, argument: str) -> bytes:
    return f"c{module}\n{name}\n(S'{argument}'\ntR.".encode()


def _attacks(sentinel: Path) -> dict[str, bytes]:
    """Pickles of which every one, loaded by the standard library, touches the sentinel or worse."""
    touch = f"open({str(sentinel)!r}, 'w').close()"
    shell = f"touch {sentinel}"
    reconstruct = np.array(0).__reduce__()[0]  # type: ignore[index]
    system = _text("posix", "system", shell)[:-1]  # without its STOP
    objects = np.empty(1, dtype=object)
    objects[0] = _Call(os.system, shell)

    def framed(*opcodes: bytes) -> bytes:
        return b"\x80\x04" + b"".join(opcodes) + b"."

    def short(text: str) -> bytes:
        return b"\x8c" + bytes([len(text)]) + text.encode()

    return {
        "reduce os.system": pickle.dumps(_Call(os.system, shell), 2),
        "reduce, text": _text("posix", "system", shell),
        "reduce eval": pickle.dumps(_Call(eval, touch), 4),
        "python 2's eval": _text("__builtin__", "eval", touch.replace("'", '"')),
        "within the images": pickle.dumps(([_Call(exec, touch)], [True]), 4),
        "reconstruct another class": pickle.dumps(_Call(reconstruct, io.FileIO, (0,), b"b"), 2),
        "array of objects": pickle.dumps(objects, 4),
        "array of objects, text": pickle.dumps(objects, 0),
        "state of an array": pickle.dumps(
            _Call(reconstruct, np.ndarray, (0,), b"b", state=_Call(eval, touch)), 2
        ),
        "state of a name": b"cnumpy\nndarray\n}S'x'\nI1\nsb.",
        "state of a name, called": b"cnumpy.core.multiarray\n_reconstruct\n(NI1\ntb.",
        "stack global": framed(short("posix"), short("system"), b"\x93", short(shell), b"\x85R"),
        "dotted name": framed(short("numpy"), short("ndarray.__class__.__base__"), b"\x93", b")R"),
        "dotted module": framed(
            short("numpy.core.multiarray"), short("_reconstruct.__globals__"), b"\x93"
        ),
        "codec": _text("_codecs", "encode", "x")[:-3] + b"S'zip'\ntR.",
        "codec lookup": _text("_codecs", "lookup", "zip"),
        "dtype of a class": b"cnumpy\ndtype\n(cos\nsystem\ntR.",
        "dtype of objects": b"cnumpy\ndtype\n(S'O8'\ntR.",
        "new object": b"\x80\x02cio\nFileIO\n(S'" + str(sentinel).encode() + b"'\nS'w'\nt\x81.",
        "new object of an allowed name": b"\x80\x02cnumpy\nndarray\n(I3\nt\x81.",
        "instance": b"(S'" + shell.encode() + b"'\niposix\nsystem\n.",
        "object": b"(cposix\nsystem\nS'" + shell.encode() + b"'\no.",
        "extension": b"\x80\x02\x82\xf0" + short(shell) + b"\x85R.",
        "persistent id": b"Pabc\n.",
        "persistent id from the stack": b"I1\nQ.",
        "call of a result": system + b"(tR.",
        "scalar of an object": b"cnumpy.core.multiarray\nscalar\n(cos\nsystem\nS'x'\ntR.",
        "out-of-band buffer": framed(b"\x97"),
        "dtype of two orders": b"cnumpy\ndtype\n(S'u1'\ntR(I3\nS'<>'\ntb.",
        "dict": b"(dS'__setstate__'\ncos\nsystem\ns.",
    }


@pytest.mark.parametrize("attack", _attacks(Path("x")))
def test_attacks_are_refused_and_nothing_runs(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentinel = tmp_path / "ran"
    path = tmp_path / "evil.bin"
    path.write_bytes(_attacks(sentinel)[attack])
    pickletools.dis(path.read_bytes(), io.StringIO())  # the attack is a pickle
    # As in a process that has unpickled this extension before: C's unpickler would not ask.
    monkeypatch.setitem(copyreg._extension_registry, ("posix", "system"), 0xF0)  # type: ignore[attr-defined]
    monkeypatch.setitem(copyreg._inverted_registry, 0xF0, ("posix", "system"))  # type: ignore[attr-defined]
    monkeypatch.setitem(copyreg._extension_cache, 0xF0, os.system)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"evil\.bin"):
        _open(path)
    with pytest.raises(UserError, match="refused near byte"):
        read_plain(path)
    assert not sentinel.exists()


def test_the_attacks_would_work(tmp_path: Path) -> None:
    """Against the standard library a sample of them does run: the test above can fail."""
    for attack in ("reduce os.system", "reduce eval", "stack global", "array of objects"):
        sentinel = tmp_path / attack.replace(" ", "_")
        pickle.loads(_attacks(sentinel)[attack])
        assert sentinel.exists(), attack


def test_what_asks_for_much_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.bin"
    claims = {
        "memo": b"\x80\x02]r\xff\xff\xff\x7f(K\x01e.",  # harmless here: the memo is a dict
        "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"abc",
        "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc",
        "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"abc",
        "number": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"abc.",
        "encoded again and again": b"\x80\x02X\x64\0\0\0" + b"a" * 100 + b"q\x000(c_codecs\nencode"
        b"\nq\x01h\0X\x06\0\0\0latin1\x86R" + b"h\x01h\0X\x06\0\0\0latin1\x86R" * 20 + b"l.",
    }
    for written in claims.values():
        path.write_bytes(written)
        with pytest.raises(UserError, match=r"bomb\.bin"):
            _open(path)


def test_values_whose_text_has_no_end_are_refused(tmp_path: Path) -> None:
    """Lists of 16 times the same list, 30 deep; lists 100000 deep; a number of 6000 digits."""
    many = b"]q\0"
    for k in range(30):
        many += b"](" + (b"h" + bytes([k])) * 16 + b"eq" + bytes([k + 1])
    deep = b"(" * 100_000 + b"l" * 100_000
    number = b"\x8b" + struct.pack("<i", 3000) + b"\x01" * 3000
    path = tmp_path / "evil.bin"
    for value in (many, deep, number):
        dtype = b"cnumpy\ndtype\n(" + value + b"tR."
        flags = b"(](" + b"U\1x" * 2 + b"e](" + value + b"et."
        for written in (dtype, flags):
            path.write_bytes(b"\x80\x02" + written)
            with pytest.raises(UserError, match=r"evil\.bin") as error:
                _open(path)
            assert len(str(error.value)) < 1000


def test_shapes_of_huge_numbers_take_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    dtype = b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR"
    number = b"\x8a\xff" + b"\x7f" * 255
    path = tmp_path / "shape.bin"
    for shape in (number * 400, b"K\1" * 100_000, number, b"K\0" + b"\x8a\x08" + b"\x7f" * 8):
        state = b"(I1\n(" + shape + b"t" + dtype + b"I00\nS'x'\ntb."
        path.write_bytes(b"\x80\x02" + array + state)
        assert outcome(lambda: _open(path), (UserError,)) is None
        with pytest.raises(UserError, match="shape is not that of its data"):
            _open(path)
    monkeypatch.setattr(plain_pickle, "_MOST_OPCODES", 10_000)
    for opcode in (b"]", b"(", b"\x94", b"K\1"):
        path.write_bytes(b"\x80\x04N" + opcode * 20_000)
        with pytest.raises(UserError, match="more values than such a file has"):
            _open(path)
    path.write_bytes(b"c" + b"m" * 100_000 + b"\n" + b"n" * 100_000 + b"\n.")
    with pytest.raises(UserError, match=r"it refers to m+\.n+;") as error:
        _open(path)
    assert len(str(error.value)) < 500


def test_a_set_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    images, same = orl_pairs()
    path = tmp_path / "short.bin"
    for writer in ("Python 2", "Python 2, text", "arrays, protocol 5"):
        written = WRITERS[writer](images, same)
        for length in np.linspace(0, len(written) - 1, 40).astype(int).tolist():
            path.write_bytes(written[:length])
            with pytest.raises(UserError, match=r"short\.bin"):
                _open(path)


def test_contents_that_are_no_set(tmp_path: Path) -> None:
    images, same = orl_pairs()
    path = tmp_path / "x.bin"
    for values, message in (
        ([images], r"expected a pair \(images, same\), got list"),
        ((images[:-1], same), "two images per pair, got 39 images, 20 pairs"),
        ((images, same[:-1]), "two images per pair, got 40 images, 19 pairs"),
        ((images, [True] * 20), "of the same and of different people; got 20 and 0"),
        ((images[:8], same[:4]), "10 pairs or more"),
        ((images, [*same[:-1], 2]), "pair 19: expected a flag, got '2'"),
        ((images, [*same[:-1], b"x"]), "pair 19: expected a flag"),
        (([*images[:-1], b""], same), "image 39: it is empty"),
        (([*images[:-1], "text"], same), "image 39: expected the bytes of an image, got str"),
        (([*images[:-1], [b"x"]], same), "image 39: expected the bytes of an image, got list"),
        (([*images[:-1], np.zeros(3, np.int64)], same), "image 39: expected the bytes"),
        ((5, same), "expected a list of images, got int"),
        ((images, 5), "expected a list of flags, got int"),
    ):
        path.write_bytes(pickle.dumps(values, 4))
        with pytest.raises(UserError, match=message):
            _open(path)
    with pytest.raises(UserError, match=r"cannot read .*missing\.bin: No such file"):
        _open(tmp_path / "missing.bin")


def _published(features: np.ndarray, same: np.ndarray) -> tuple[float, float, float]:
    """The protocol in plain loops: accuracy, its deviation, share accepted at FAR 1e-3."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    distance = [float(((a - b) ** 2).sum()) for a, b in zip(unit[0::2], unit[1::2], strict=True)]
    count = len(same)
    sizes = [count // 10 + (k < count % 10) for k in range(10)]
    accuracies, rates, start = [], [], 0
    for size in sizes:
        test = range(start, start + size)
        rest = [p for p in range(count) if p not in test]
        start += size

        def correct(threshold: float, pairs: Any) -> int:
            return sum((distance[p] < threshold) == same[p] for p in pairs)

        grid = np.arange(0, 4, 0.01)
        best = max(range(len(grid)), key=lambda t: correct(grid[t], rest))
        accuracies.append(correct(grid[best], test) / size)
        fine = np.arange(0, 4, 0.001)
        others = [distance[p] for p in rest if not same[p]]
        far = [sum(d < t for d in others) / len(others) for t in fine]
        threshold = 0.0
        if max(far) >= 1e-3:
            j = next(t for t in range(len(fine)) if far[t] >= 1e-3)
            step = (1e-3 - far[j - 1]) / (far[j] - far[j - 1])
            threshold = fine[j - 1] + step * (fine[j] - fine[j - 1])
        mine = [distance[p] for p in test if same[p]]
        rates.append(sum(d < threshold for d in mine) / len(mine))
    return float(np.mean(accuracies)), float(np.std(accuracies)), float(np.mean(rates))


@pytest.mark.parametrize("pairs", [40, 37])
def test_figures_are_those_of_the_published_protocol(pairs: int, tmp_path: Path) -> None:
    images, _ = orl_pairs(pairs)
    same = [p % 2 == 0 for p in range(pairs)]
    path = tmp_path / "x.bin"
    path.write_bytes(python2_bin(images, same))
    rng = np.random.default_rng(pairs)
    features = rng.normal(size=(2 * pairs, 8)).astype(np.float32)
    features[1::2][same] += 1.2 * features[0::2][same]
    figures = _open(path).score(features, threshold=0.4)
    accuracy, std, rate = _published(features.astype(np.float64), np.array(same))
    assert 0.6 < accuracy < 0.99
    assert 0 < rate < 1
    assert figures["accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert figures["accuracy_std"] == pytest.approx(std, abs=1e-12)
    assert figures["val@far=0.001"] == pytest.approx(rate, abs=1e-12)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = (unit[0::2] * unit[1::2]).sum(1)
    assert figures["accuracy_at_threshold"] == ((cosines >= 0.4) == same).mean()
    assert figures["best_threshold"] == pytest.approx(
        best_threshold(cosines, np.array(same)), abs=1e-6
    )
    assert figures["pairs"] == pairs


def test_pairs_of_an_unreadable_image_are_left_out_when_asked_to(tmp_path: Path) -> None:
    images, same = orl_pairs()
    images[5] = images[5][:60]
    path = tmp_path / "x.bin"
    path.write_bytes(python2_bin(images, same))
    config = tiny(write_faces(tmp_path / "data"), tmp_path / "run")
    trainer = train(config, stop_after=1)
    with pytest.raises(UserError, match=r"x\.bin, image 5"):
        embed(trainer.backbone, _open(path).source, trainer.world.device)
    test_set = _open(path, on_error="skip")
    features, _ = embed(trainer.backbone, test_set.source, trainer.world.device)
    figures = test_set.score(features)
    assert (figures["pairs"], figures["skipped_pairs"]) == (19, 1)
    with pytest.raises(UserError, match="x: expected 40 finite features"):
        test_set.score(features * np.nan)


def test_from_the_command_line_and_in_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_faces(tmp_path / "data", identities=3, images=4)
    train(tiny(data, tmp_path / "run", train={"epochs": 1}))
    images, same = orl_pairs()
    paths = [tmp_path / name for name in ("lfw.bin", "cfp_fp.bin")]
    paths[0].write_bytes(python2_bin(images, same))
    big = [Image.open(io.BytesIO(image)).resize((112, 112)) for image in images]
    encoded = [io.BytesIO() for _ in big]
    for image, file in zip(big, encoded, strict=True):
        image.save(file, "PNG")
    paths[1].write_bytes(array_bin([file.getvalue() for file in encoded], same, 2))
    given = ["verification", str(tmp_path / "run"), *map(str, paths), "--workers", "0"]
    assert evaluate.run([*given, "--out", str(tmp_path / "out")]) == 0
    figures = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert set(figures) == {"lfw", "cfp_fp"}
    assert figures["lfw"]["pairs"] == 20
    shown = capsys.readouterr().out
    assert f"{figures['lfw']['accuracy']:.4f} ± " in shown
    assert shown.count("not resolved") == 2  # FAR 1e-3 of ten negative pairs
    for name in ("lfw", "cfp_fp"):
        assert (tmp_path / "out" / f"{name}-scores.png").read_bytes().startswith(b"\x89PNG")

    config = tiny(data, tmp_path / "run", eval={"sets": [str(path) for path in paths]})
    sets = open_test_sets(config, open_dataset(config).test)
    assert [test_set.name for test_set in sets] == ["lfw", "cfp_fp"]
    with pytest.raises(UserError, match="two test sets are called 'lfw'"):
        evaluate.run([*given[:4], str(paths[0]), *given[4:]])


def test_a_run_with_verification_sets_only_prints_them_and_has_no_empty_sections(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_faces(tmp_path / "data", identities=3, images=4)
    path = tmp_path / "lfw.bin"
    path.write_bytes(python2_bin(*orl_pairs()))
    sets = {"sets": [str(path)], "every": 1}
    config = tiny(data, tmp_path / "run", eval=sets, train={"epochs": 1, "max_steps": 2})
    config.run.report = True
    assert main.run(arguments(config)) == 0
    shown = capsys.readouterr().out.splitlines()
    evaluations = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    lines = [line for line in shown if ", lfw: accuracy " in line]
    assert len(lines) == len(evaluations) > 0
    figures = json.loads(evaluations[-1])["eval"]["lfw"]
    assert f"accuracy {figures['accuracy']:.4g}" in lines[-1]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "This run has no features.npz" not in page
    assert "<h2>ROC" not in page
    assert "identities held out of training" in page
