"""python -m eval.robustness.hostile: damaged and hostile checkpoints, thousands of them, read in
processes with limits.

Each mutant is a copy of a tiny checkpoint with one thing wrong. A prepared folder is read by
`qrefta.load` and by `from_pretrained`, with its checksums kept as they were (damage), removed (an
older folder) or written again (malice); a dense folder by `qrefta.prepare_checkpoint`. The
outcomes:

- refused: a ValueError or OSError of ours; by_transformers: one of transformers', before the
plug-in is asked;
- identical: the model that was saved, bit for bit;
- as_written: other tensors or settings, and the files say so (safetensors' own reader is the
witness). Nothing can tell
  such a file from a good one without checksums; with them it must not happen;
- unclear: another exception; a fault but in `from_pretrained`, where transformers reads config.json
before the plug-in
  is asked;
- differs (from what the files say, or from what was saved although the checksums were kept),
crashed, hung, memory (over
  2 GB), wrote (outside of its folder): faults.
"""

import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
)

import qrefta
from eval.memory import peak, resident, restart_peak
from eval.rows import append, find, read
from qrefta.cli import guarded, quiet_libraries
from qrefta.files.checksums import KEY
from qrefta.files.layout import INDEX, SINGLE
from qrefta.files.safetensors import Checkpoint
from qrefta.files.verify import write_checksums

READERS = ("load", "from_pretrained", "prepare")
STATES = ("kept", "removed", "rewritten")  # of the checksums
FAULTS = ("unclear", "differs", "crashed", "hung", "memory", "wrote")
GOOD: dict[Path, tuple[dict[str, Tensor], str]] = {}  # what each prepared folder holds
OUTCOMES = ("refused", "by_transformers", "identical", "as_written", *FAULTS)
LIMIT_S, LIMIT_BYTES, ADDRESS_BYTES = (
    20,
    2 << 30,
    8 << 30,
)  # of one mutant, beyond what the process held before
_LINE = 32
console = Console()

Mutation = Callable[[Path, random.Random], None]
MUTATIONS: dict[str, Mutation] = {}
PREPARED_ONLY = {
    "list",
    "newer config",
    "settings",
    "rows",
    "NaN scales",
    "codes",
    "other save",
    "adapter",
}
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    3,
    1.5,
    -0.0,
    float("nan"),
    10**6,
    2**31,
    2**63,
    10**30,
    "",
    "abc",
    "../..",
    "\0",
    [],
    {},
    [1],
    ["a"],
    {"a": 1},
    [[]],
    "x" * 10_000,
]


def mutation(name: str) -> Callable[[Mutation], Mutation]:
    """Enter a function in `MUTATIONS`."""
    return lambda function: MUTATIONS.setdefault(name, function)


def weights_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(path: Path, header: dict[str, Any] | str, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def flip(path: Path, rng: random.Random, start: int = 0, stop: int | None = None) -> None:
    """One to three bits of a part of a file."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(start, len(data) if stop is None else stop)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def replace_inside(content: Any, rng: random.Random, values: list[Any]) -> None:
    """One value somewhere in nested dicts and lists, or one key."""
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = rng.choice(keys)
        if isinstance(content[key], dict | list) and content[key] and rng.random() < 0.8:
            content = content[key]
        elif isinstance(content, dict) and rng.random() < 0.1:
            content[rng.choice(["", "zzz", "a" * 5000])] = content.pop(key)
            return
        else:
            content[key] = rng.choice(values)
            return


@mutation("truncated")
def _truncated(folder: Path, rng: random.Random) -> None:
    path = rng.choice([*weights_of(folder), *folder.glob("*.json")])
    data = path.read_bytes()
    path.write_bytes(data[: rng.choice([0, 1, 7, 8, 9, rng.randrange(len(data)), len(data) - 1])])


@mutation("appended")
def _appended(folder: Path, rng: random.Random) -> None:
    path = rng.choice([*weights_of(folder), *folder.glob("*.json")])
    path.write_bytes(path.read_bytes() + rng.choice([b" ", b"\0", b"{}", rng.randbytes(100)]))


@mutation("missing")
def _missing(folder: Path, rng: random.Random) -> None:
    rng.choice([*weights_of(folder), *folder.glob("*.json")]).unlink()


@mutation("bits of a header")
def _header_bits(folder: Path, rng: random.Random) -> None:
    path = rng.choice(weights_of(folder))
    flip(path, rng, 0, 8 + struct.unpack("<Q", path.read_bytes()[:8])[0])


@mutation("bits of tensors")
def _tensor_bits(folder: Path, rng: random.Random) -> None:
    path = rng.choice(weights_of(folder))
    flip(path, rng, 8 + struct.unpack("<Q", path.read_bytes()[:8])[0])


@mutation("bits of the index or config")
def _json_bits(folder: Path, rng: random.Random) -> None:
    flip(rng.choice(list(folder.glob("*.json"))), rng)


@mutation("random bytes")
def _random_bytes(folder: Path, rng: random.Random) -> None:
    rng.choice([*weights_of(folder), *folder.glob("*.json")]).write_bytes(
        rng.randbytes(rng.choice([0, 8, 64, 4096]))
    )


@mutation("header length")
def _header_length(folder: Path, rng: random.Random) -> None:
    path = rng.choice(weights_of(folder))
    length = rng.choice(
        [0, 1, 2, 100, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1, path.stat().st_size]
    )
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


def _edit_entry(
    folder: Path, rng: random.Random, change: Callable[[dict[str, Any], list[Any]], None]
) -> None:
    path = rng.choice(weights_of(folder))
    header, data = split(path)
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    change(entry, list(header.values()))
    join(path, header, data)


@mutation("shapes")
def _shapes(folder: Path, rng: random.Random) -> None:
    def change(entry: dict[str, Any], _: list[Any]) -> None:
        shape = entry["shape"]
        entry["shape"] = rng.choice(
            [
                shape[::-1],
                [*shape, 1],
                shape[1:],
                [-n for n in shape],
                [float(n) for n in shape],
                list(map(str, shape)),
                [0, 2**62],
                [2**32, 2**32],
                [1, *shape],
                [True, *shape],
                None,
                5,
                "22",
                [shape],
            ]
        )

    _edit_entry(folder, rng, change)


@mutation("dtypes")
def _dtypes(folder: Path, rng: random.Random) -> None:
    kinds = [
        "F64",
        "F32",
        "F16",
        "BF16",
        "I64",
        "I32",
        "I16",
        "I8",
        "U8",
        "BOOL",
        "F8_E4M3",
        "X",
        "",
        None,
        5,
        [],
        {},
    ]
    _edit_entry(folder, rng, lambda entry, _: entry.update(dtype=rng.choice(kinds)))


@mutation("offsets")
def _offsets(folder: Path, rng: random.Random) -> None:
    def change(entry: dict[str, Any], others: list[Any]) -> None:
        start, end = entry["data_offsets"]
        other = rng.choice([one for one in others if "data_offsets" in one])["data_offsets"]
        entry["data_offsets"] = rng.choice(
            [
                other,
                [end, start],
                [start + 1, end + 1],
                [start, end - 1],
                [-1, end],
                [2**63, 2**63 + end - start],
                [start],
                [start, end, end],
                [None, end],
                "ab",
                [float(start), float(end)],
                [start, 2**64],
            ]
        )

    _edit_entry(folder, rng, change)


@mutation("huge sizes")
def _huge(folder: Path, rng: random.Random) -> None:
    """A tensor of gigabytes; half of the time in a sparse file that is as long as it says."""
    path = rng.choice(weights_of(folder))
    header, data = split(path)
    last = max(
        (one for one in header.values() if "data_offsets" in one),
        key=lambda one: one["data_offsets"][1],
    )
    rows = rng.choice([10**7, 10**9, 10**12])
    last["shape"] = [rows, *last["shape"][1:]]
    width = {"F32": 4, "BF16": 2}.get(last["dtype"], 1)
    last["data_offsets"][1] = last["data_offsets"][0] + rows * width * max(1, *last["shape"][1:], 1)
    join(path, header, data)
    if rng.random() < 0.5:
        os.truncate(path, min(path.stat().st_size - len(data) + last["data_offsets"][1], 1 << 42))


@mutation("duplicate keys")
def _duplicates(folder: Path, rng: random.Random) -> None:
    """In a header, an index, a config; or one tensor in two files."""
    paths = [*folder.glob("*.json"), *weights_of(folder)]
    path = rng.choice(paths)
    if path.suffix == ".json":
        text = path.read_text().rstrip()
        key, value = rng.choice(list(json.loads(text).items()))
        path.write_text(
            text[:-1] + f", {json.dumps(key)}: {json.dumps(rng.choice([value, *VALUES[:9]]))}}}"
        )
        return
    header, data = split(path)
    names = [name for name in header if name != "__metadata__"]
    text = json.dumps(header)
    other = rng.choice(names)
    join(
        path, text[:-1] + f", {json.dumps(rng.choice(names))}: {json.dumps(header[other])}}}", data
    )


@mutation("nesting")
def _nesting(folder: Path, rng: random.Random) -> None:
    path = rng.choice([*weights_of(folder), *folder.glob("*.json")])
    depth = rng.choice([200, 3000, 100_000])
    deep = '{"a":' * depth + "1" + "}" * depth if rng.random() < 0.5 else "[" * depth + "]" * depth
    text = rng.choice(
        [
            deep,
            f'{{"weight_map": {deep}}}',
            f'{{"__metadata__": {deep}}}',
            f'{{"model_type": {deep}}}',
        ]
    )
    if path.suffix == ".json":
        path.write_text(text)
    else:
        join(path, text, split(path)[1])


@mutation("metadata of a header")
def _metadata(folder: Path, rng: random.Random) -> None:
    path = rng.choice(weights_of(folder))
    header, data = split(path)
    header["__metadata__"] = rng.choice([*VALUES, {"format": "tf"}, {"format": "x"}, {"format": 5}])
    join(path, header, data)


@mutation("names of tensors")
def _names(folder: Path, rng: random.Random) -> None:
    path = rng.choice(weights_of(folder))
    header, data = split(path)
    name = rng.choice([name for name in header if name != "__metadata__"])
    new = rng.choice(
        ["", "../../x", "a" * 10**5, "\0", name + ".", name.upper(), "__class__", "config.x", "0"]
    )
    join(path, {new if key == name else key: entry for key, entry in header.items()}, data)


@mutation("index values")
def _index(folder: Path, rng: random.Random) -> None:
    if not (folder / INDEX).exists():  # beside the one file an index is not read
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": SINGLE}, "metadata": {}}))
    edit_json(folder / INDEX, lambda index: replace_inside(index, rng, VALUES))


@mutation("paths in the index")
def _paths(folder: Path, rng: random.Random) -> None:
    """To a good file outside of the folder, and to what would be read for ever."""
    shutil.copy(weights_of(folder)[0], folder.parent / "outside.safetensors")
    paths = [
        "../outside.safetensors",
        str(folder.parent / "outside.safetensors"),
        "/dev/zero",
        "/dev/stdin",
        "..",
        ".",
        "",
        "a\0b",
        "x" * 5000 + ".safetensors",
        f"../{folder.name}/{SINGLE}",
        "sub/../../outside.safetensors",
        "//outside.safetensors",
        "~/x.safetensors",
        "%2e%2e/outside.safetensors",
        "model.bin",
    ]
    if not (folder / INDEX).exists():
        _to_index(folder)

    def change(index: dict[str, Any]) -> None:
        every = rng.random() < 0.3
        chosen = rng.choice(list(index["weight_map"]))
        path = rng.choice(paths)
        index["weight_map"] = {
            k: path if every or k == chosen else v for k, v in index["weight_map"].items()
        }

    edit_json(folder / INDEX, change)


def _to_index(folder: Path) -> None:
    """The one file as a shard with an index."""
    shard = (folder / SINGLE).rename(folder / "model-00001-of-00001.safetensors")
    names = [name for name in split(shard)[0] if name != "__metadata__"]
    (folder / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(names, shard.name), "metadata": {}})
    )


@mutation("links, pipes and devices")
def _links(folder: Path, rng: random.Random) -> None:
    path = rng.choice([*weights_of(folder), *folder.glob("*.json")])
    outside = folder.parent / f"outside{path.suffix}"
    shutil.copy(path, outside)
    if rng.random() < 0.3:  # a good link, to a file that is another
        outside.write_bytes(outside.read_bytes()[:-1] + b" ")
    path.unlink()
    target = rng.choice(
        [outside, "/dev/zero", "/dev/null", path, folder, "nowhere", "pipe", "folder"]
    )
    if target == "pipe":
        os.mkfifo(path)
    elif target == "folder":
        path.mkdir()
    else:
        path.symlink_to(target)


@mutation("pickle")
def _pickle(folder: Path, rng: random.Random) -> None:
    """Weights as a pickle that would write a file."""

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {folder.parent / 'pwned'}",))

    paths = weights_of(folder)
    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    if rng.random() < 0.3:
        shutil.copy(folder / "pytorch_model.bin", paths[0])
        return
    for path in [*paths, folder / INDEX]:
        path.unlink(missing_ok=True)
    if rng.random() < 0.3:
        index = {"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}}
        (folder / rng.choice([INDEX, "pytorch_model.bin.index.json"])).write_text(json.dumps(index))
    if rng.random() < 0.3:
        edit_json(folder / "config.json", lambda config: config.pop("dtype", None))


@mutation("code in the config")
def _remote_code(folder: Path, rng: random.Random) -> None:
    """Modules beside the weights that a config names; nobody passed trust_remote_code."""
    code = f"open({str(folder.parent / 'pwned')!r}, 'w')\n"
    for name in ("evil", "modeling_evil", "configuration_evil"):
        (folder / f"{name}.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    autos = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification")
    keys = rng.choice(
        [
            {"auto_map": dict.fromkeys(autos, "evil.Evil")},
            {"architectures": ["evil.Evil"]},
            {"architectures": ["__import__('evil')"]},
            {"auto_map": dict.fromkeys(autos, f"{folder}--evil.Evil")},
            {"model_type": "evil", "auto_map": dict.fromkeys(autos, "evil.Evil")},
            {"custom_pipelines": {"x": "evil"}},
            {"attn_implementation": "evil/evil"},
            {"_attn_implementation": "evil/evil"},
            {"architectures": ["os"]},
            {"quantization_config": {"quant_method": "evil.Evil"}},
        ]
    )
    edit_json(folder / "config.json", lambda config: config.update(keys))


@mutation("foreign config")
def _foreign(folder: Path, rng: random.Random) -> None:
    keys = rng.choice(
        [
            {"model_type": rng.choice(["llama", "t5", "gpt2", "vit", "nothing", "clip"])},
            {
                "architectures": rng.choice(
                    [["LlamaForCausalLM"], ["BertModel"], ["AutoModel"], [], None, "x", [5], [""]]
                )
            },
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            {"quantization_config": None},
            {"quantization_config": rng.choice(VALUES)},
            {"transformers_weights": "../outside.safetensors"},
        ]
    )
    edit_json(folder / "config.json", lambda config: config.update(keys))


@mutation("numbers of the config")
def _numbers(folder: Path, rng: random.Random) -> None:
    numbers = [-1, 0, 1, 7, 33, 10**4, 10**5, 10**6, 10**7, 10**9, 2**31, 2**63, 10**30, 0.5, 1e300]

    def change(config: dict[str, Any]) -> None:
        keys = [key for key, value in config.items() if isinstance(value, int | float)] + [
            "num_labels"
        ]
        config[rng.choice(keys)] = rng.choice(numbers)

    edit_json(folder / "config.json", change)


@mutation("values of the config")
def _values(folder: Path, rng: random.Random) -> None:
    def change(config: dict[str, Any]) -> None:
        config[rng.choice(list(config))] = rng.choice(VALUES)

    edit_json(folder / "config.json", change)


@mutation("newer config")
def _newer(folder: Path, rng: random.Random) -> None:
    keys = [{"format_version": version} for version in (2, 99, "1", None, 1.5, -1, 0)]
    keys += [{"new_setting": value} for value in (1, None, "x")]
    edit_json(
        folder / "config.json",
        lambda config: config["quantization_config"].update(rng.choice(keys)),
    )


@mutation("settings")
def _settings(folder: Path, rng: random.Random) -> None:
    def change(config: dict[str, Any]) -> None:
        settings = config["quantization_config"]
        settings[rng.choice([key for key in settings if key != "stacks"])] = rng.choice(VALUES)

    edit_json(folder / "config.json", change)


@mutation("rows")
def _rows(folder: Path, rng: random.Random) -> None:
    def change(config: dict[str, Any]) -> None:
        replace_inside(
            config["quantization_config"]["stacks"], rng, [*VALUES, 1, 2, 4, 5, 32, 64, 10**4]
        )

    edit_json(folder / "config.json", change)


@mutation("NaN scales")
def _nan(folder: Path, rng: random.Random) -> None:
    def fits(name: str) -> bool:
        return name.endswith((".absmax", ".absmax_state", ".mix"))

    bad = rng.choice(
        [b"\xff\xff\xff\xff", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff", b"\x01\x00\x80\x7f"]
    )
    _write_inside(folder, rng, fits, lambda size: (4 * rng.randrange(size // 4), bad))


@mutation("codes")
def _codes(folder: Path, rng: random.Random) -> None:
    """All 16 codes stand for a level, all 256 of a scale too: any bytes are a matrix."""
    _write_inside(
        folder,
        rng,
        lambda name: name.endswith((".weight", ".absmax")),
        lambda size: (0, rng.randbytes(size)),
    )


def _write_inside(
    folder: Path,
    rng: random.Random,
    fits: Callable[[str], bool],
    make: Callable[[int], tuple[int, bytes]],
) -> None:
    paths = [path for path in weights_of(folder) if any(map(fits, split(path)[0]))]
    path = rng.choice(paths)
    header, data = split(path)
    name = rng.choice([name for name in header if fits(name)])
    start, end = header[name]["data_offsets"]
    place, new = make(end - start)
    join(path, header, data[: start + place] + new + data[start + place + len(new) :])


@mutation("other save")
def _other_save(folder: Path, rng: random.Random) -> None:
    """Files of two saves side by side."""
    other = folder.parent.parent / "bases" / "other"
    name = rng.choice(["config.json", SINGLE])
    shutil.copy(other / name, folder / name)


@mutation("list")
def _list(folder: Path, rng: random.Random) -> None:
    """The checksums in a header: bits, or one of the values."""
    path = rng.choice(weights_of(folder))
    header, data = split(path)
    if rng.random() < 0.5:
        place = path.read_bytes().index(KEY.encode())
        flip(path, rng, place, place + len(header["__metadata__"][KEY]))
    else:
        checksums = json.loads(header["__metadata__"][KEY])
        replace_inside(checksums, rng, VALUES)
        header["__metadata__"][KEY] = json.dumps(checksums)
        join(path, header, data)


@mutation("adapter")
def _adapter(folder: Path, rng: random.Random) -> None:
    (folder / "adapter_model.safetensors").write_bytes(rng.randbytes(rng.choice([0, 8, 100])))
    (folder / "adapter_model.bin").write_bytes(rng.randbytes(rng.choice([0, 8, 100])))


# Running


def make_bases(root: Path) -> None:
    """The good folders, in `root`/bases: prepared ones, one file and shards, and dense ones."""
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=3,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = BertForSequenceClassification(config)
        other = BertForSequenceClassification(config)
    for name, options in {"one file": {}, "shards": {"max_shard_size": "15KB"}}.items():
        dense.save_pretrained(root / "bases" / f"dense, {name}", **options)
        model = BertForSequenceClassification.from_pretrained(
            root / "bases" / f"dense, {name}", dtype=torch.float32
        )
        qrefta.prepare(model, rank=3, refine=0, double_quant=name == "shards", progress=False)
        model.save_pretrained(root / "bases" / f"prepared, {name}", **options)
    qrefta.prepare(other, rank=3, refine=0, progress=False).save_pretrained(
        root / "bases" / "other"
    )
    for base in (root / "bases").glob("prepared*"):
        model = qrefta.load(base)
        GOOD[base] = model.state_dict(), _settings_of(model)
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy every page


def _settings_of(model: PreTrainedModel) -> str:
    """Without `auto_map`, which checksums leave out: it only names code, and no code has run."""
    left_out = ("_name_or_path", "auto_map")
    return json.dumps(
        {key: value for key, value in model.config.to_dict().items() if key not in left_out}
    )


def mutate(root: Path, reader: str, kind: str, state: str, seed: int) -> tuple[Path, Path]:
    """A mutant's folder and the good one that it is made of."""
    rng = random.Random(f"{kind} {seed}")
    layout = rng.choice(["one file", "shards"])
    base = root / "bases" / f"{'dense' if reader == 'prepare' else 'prepared'}, {layout}"
    home = root / "mutant"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    folder = Path(shutil.copytree(base, home / "model"))
    MUTATIONS[kind](folder, rng)
    if state == "removed":
        _strip(folder)
    elif state == "rewritten":
        _rewrite(folder)
    return folder, base


def _rewrite(folder: Path) -> None:
    """As one would who means harm; not over files that cannot be read, or only in hours."""
    files = [folder / "config.json", *weights_of(folder)]
    if all(path.is_file() and path.stat().st_size < 1 << 30 for path in files):
        with suppress(ValueError, OSError, AttributeError, RecursionError):
            write_checksums(folder)


def _strip(folder: Path) -> None:
    """Make of it a folder of format version 1 without a list, as far as its files can be read."""
    for path in weights_of(folder):
        with suppress(
            ValueError, OSError, AttributeError, TypeError, KeyError, RecursionError, struct.error
        ):
            if path.is_file() and path.stat().st_size < 1 << 30:
                header, data = split(path)
                del header["__metadata__"][KEY]
                join(path, header, data)
    with suppress(ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError):
        if (folder / "config.json").is_file():
            edit_json(folder / "config.json", _older)


def _older(config: Any) -> None:
    config["quantization_config"]["format_version"] = 1


def outcome(folder: Path, base: Path, reader: str, state: str) -> str:
    """Read a mutant; one of `OUTCOMES`."""
    try:
        if reader == "prepare":
            out = folder.parent / "out"
            qrefta.prepare_checkpoint(
                folder, out, rank=1, refine=0, transform="dct", progress=False
            )
            return _compared_source(folder, base, out)
        load = (
            qrefta.load if reader == "load" else AutoModelForSequenceClassification.from_pretrained
        )
        return _compared(load(folder), folder, base, state)
    except (MemoryError, torch.OutOfMemoryError):
        return "memory"
    except Exception as error:
        if "allocate memory" in str(error):
            return "memory"
        if not isinstance(error, ValueError | OSError):
            print(f"unclear: {type(error).__name__}: {error}"[:300], file=sys.stderr)
            return "unclear"
        trace = error.__traceback__
        while trace.tb_next is not None:
            trace = trace.tb_next
        ours = Path(trace.tb_frame.f_code.co_filename).is_relative_to(Path(qrefta.__file__).parent)
        return "refused" if ours else "by_transformers"


def _compared(model: PreTrainedModel, folder: Path, base: Path, state: str) -> str:
    """A loaded model beside the good folder's, and beside what the files say."""
    state_dict, settings = GOOD[base]
    if _same(model.state_dict(), state_dict) and _settings_of(model) == settings:
        return "identical"
    files = weights_of(folder)
    files = [folder / SINGLE] if folder / SINGLE in files else files
    written = {
        name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()
    }
    read_in = {name: tensor for name, tensor in model.state_dict().items() if name in written}
    says = {name: written[name].to(tensor.dtype) for name, tensor in read_in.items()}
    return "as_written" if state != "kept" and _same(read_in, says) else "differs"


def _compared_source(folder: Path, base: Path, out: Path) -> str:
    """Compare the tensors read from a dense folder with safetensors' reader and the good folder."""
    checkpoint = Checkpoint(folder)
    written = Checkpoint(out)
    files = {checkpoint.file(name) for name in checkpoint.names}
    says = {
        name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()
    }
    found = {name: checkpoint.read(name) for name in checkpoint.names}
    copied = {
        name: written.read(name)
        for name in found
        if name in written.names and name.endswith("norm.weight")
    }
    if not _same(found, {name: says[name] for name in found}) or not _same(
        copied, {n: says[n] for n in copied}
    ):
        return "differs"
    good = Checkpoint(base)
    return (
        "identical"
        if _same(found, {name: good.read(name) for name in good.names})
        else "as_written"
    )


def _same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Names, dtypes and bits."""
    return state.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype
        and tensor.shape == other[name].shape
        and _bytes(tensor) == _bytes(other[name])
        for name, tensor in state.items()
    )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def run_mutants(
    root: Path, reader: str, kind: str, state: str, seeds: range
) -> Iterator[tuple[int, str, int]]:
    """Seed, outcome and memory taken, bytes, of mutants that a forked process reads one after the
    other.

    A process that dies or stands still is answered for by its last mutant, and the next one goes on
    after that.
    """
    left = list(seeds)
    while left:
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receiver)
            _read_and_exit(sender, root, reader, kind, state, left)
        os.close(sender)
        try:
            with os.fdopen(receiver, "rb", buffering=0) as lines:
                while left:
                    ready = select.select([lines], [], [], LIMIT_S)[0]
                    line = lines.read(_LINE) if ready else b""
                    seed = left.pop(0)
                    if line:
                        code, peak = map(int, line.split())
                        yield seed, OUTCOMES[code], peak
                    else:
                        yield seed, "crashed" if ready else "hung", 0
                        break
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _read_and_exit(
    sender: int, root: Path, reader: str, kind: str, state: str, seeds: list[int]
) -> None:
    """In the forked process: without a terminal, in a separate folder, with limits; a line a
    mutant.
    """
    try:
        home = root / "tmp"
        home.mkdir(exist_ok=True)
        tempfile.tempdir = str(home)
        os.chdir(home)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + ADDRESS_BYTES, held + ADDRESS_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        warnings.simplefilter("ignore")
        torch.set_num_threads(
            1
        )  # else several threads at once find torch's pool gone after the fork, and it fails
        for seed in seeds:
            folder, base = mutate(root, reader, kind, state, seed)
            before = _listing(root)
            resident_before = resident()
            restart_peak()
            found = outcome(folder, base, reader, state)
            taken = max(0, peak() - resident_before)
            found = (
                "wrote" if _listing(root) != before else "memory" if taken > LIMIT_BYTES else found
            )
            os.write(sender, f"{OUTCOMES.index(found)} {taken}".ljust(_LINE).encode())
    finally:
        os._exit(1)


def _listing(root: Path) -> list[tuple[Any, ...]]:
    """Everything under `root` but what the reader may write: the output and its temporary files."""
    found = []
    for path, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in ("out", "tmp")]
        states = [(name, os.lstat(os.path.join(path, name))) for name in [*folders, *files]]
        found += sorted(
            (path, name, s.st_mode, s.st_size, s.st_mtime_ns * (name in files))
            for name, s in states
        )
    return found


def combinations(reader: str) -> list[tuple[str, str]]:
    """Kinds and states of the digests that a reader meets."""
    if reader == "prepare":
        return [(kind, "removed") for kind in MUTATIONS if kind not in PREPARED_ONLY]
    return [
        (kind, state) for kind in MUTATIONS for state in STATES if kind != "list" or state == "kept"
    ]


def is_fault(reader: str, state: str, result: str) -> bool:
    allowed = reader == "from_pretrained" and result == "unclear"
    return result in FAULTS and not allowed


def run_kind(root: Path, reader: str, kind: str, state: str, seeds: range) -> dict[str, Any]:
    """A row: how many mutants came to what, and the most memory."""
    start, found, most = time.monotonic(), Counter(), 0
    for seed, result, held in run_mutants(root, reader, kind, state, seeds):
        if is_fault(reader, state, result):
            console.print(f"{reader}, {kind}, digests {state}, seed {seed}: {result}")
        found[result] += 1
        most = max(most, held)
    counts = {name: found[name] for name in OUTCOMES}
    return {
        "n": len(seeds),
        **counts,
        "peak_mb": round(most / 1e6, 1),
        "seconds": round(time.monotonic() - start, 1),
    }


def run(
    count: Annotated[
        int,
        typer.Option(help="Mutants of a kind, for a prepared folder and one state of its list."),
    ] = 60,
    dense: Annotated[int, typer.Option(help="Likewise, of a dense folder.")] = 60,
    only: Annotated[str, typer.Option(help="Kinds whose name holds this text.")] = "",
    readers: Annotated[str, typer.Option(help="With commas.")] = ",".join(READERS),
    seed: Annotated[int, typer.Option(help="Of the first mutant.")] = 0,
    rows: Annotated[
        Path | None, typer.Option(help="File to add rows to; what it has is left out.")
    ] = None,
) -> None:
    """Every kind of mutant through every reader."""
    quiet_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        root = Path(home)
        make_bases(root)
        for reader in (reader for reader in READERS if reader in readers.split(",")):
            for kind, state in combinations(reader):
                n = dense if reader == "prepare" else count
                key = {"study": "hostile", "reader": reader, "kind": kind, "digests": state, "n": n}
                if only not in kind or (
                    rows is not None and rows.exists() and find(read(rows), key)
                ):
                    continue
                row = key | run_kind(root, reader, kind, state, range(seed, seed + n))
                console.print({name: value for name, value in row.items() if value})
                if rows is not None:
                    append(rows, [row], seed=seed)


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
