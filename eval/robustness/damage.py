"""One thing wrong in the files of a checkpoint folder, by kind: damage, and malice."""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from eval.robustness.file_edits import (
    edit_entry,
    edit_json,
    flip,
    join,
    replace_inside,
    split,
    weights_of,
    write_inside,
)
from qrefta.files.checksums import KEY
from qrefta.files.layout import INDEX, SINGLE

Mutation = Callable[[Path, random.Random], None]
MUTATIONS: dict[str, Mutation] = {}
# Kinds that a dense folder has nothing for.
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
VALUES = [  # in place of a setting
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

    edit_entry(folder, rng, change)


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
    edit_entry(folder, rng, lambda entry, _: entry.update(dtype=rng.choice(kinds)))


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

    edit_entry(folder, rng, change)


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
    write_inside(folder, rng, fits, lambda size: (4 * rng.randrange(size // 4), bad))


@mutation("codes")
def _codes(folder: Path, rng: random.Random) -> None:
    """All 16 codes stand for a level, all 256 of a scale too: any bytes are a matrix."""
    write_inside(
        folder,
        rng,
        lambda name: name.endswith((".weight", ".absmax")),
        lambda size: (0, rng.randbytes(size)),
    )


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
