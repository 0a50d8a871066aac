"""Files next to a model's weights: the model's are copied, others stay where they are."""

import json
from fnmatch import fnmatch

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import ByT5Tokenizer

import qrefta
from qrefta.export.examples import example_inputs
from qrefta.files.companions import companion_files
from qrefta.files.sources import dense_bytes, load_tokenizer, resolve_folder, tokenizer_of
from tests.models import tiny_bert, tiny_llama
from tests.tiny import tiny_tokenizer

STRANGERS = ["train.json", "rows.txt", "credentials.json", "notes.txt", ".netrc.json", "setup.py"]
OWN = [
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "merges.txt",
    "preprocessor_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
    "generation_config.json",
    "custom_generate/generate.py",
    "LICENSE.txt",
    "USE_POLICY.md",
]


def put(folder, *names, text="{}"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_training_data_and_credentials_next_to_a_model_are_not_published(tmp_path):
    dense = tmp_path / "dense"
    tiny_bert().save_pretrained(dense)
    put(dense, *STRANGERS, *OWN)
    prepared = qrefta.prepare_checkpoint(dense, tmp_path / "4bit", rank=2, progress=False)
    qrefta.merge(qrefta.load(prepared), out=tmp_path / "merged")
    for out in (prepared, tmp_path / "merged"):
        assert names(out).isdisjoint(STRANGERS)
        assert names(out) >= set(OWN)


def test_code_is_taken_where_auto_map_names_it(tmp_path):
    """With its relative imports; a path out of the folder and another repository are not read."""
    folder = tmp_path / "model"
    put(folder, "stray.py", "b.py", "tokenization_x.py", "processing_x.py", text="")
    put(tmp_path, "outside.py", text="")
    put(folder, "a.py", text="from .b import B\nimport .missing\nfrom ..outside import C\n")
    auto_map = {"AutoConfig": "a.Config", "AutoModel": "other/repo--stray.Model"}
    auto_map["AutoModelForCausalLM"] = "../outside.Model"
    put(folder, "config.json", text=json.dumps({"auto_map": auto_map}))
    auto_map = {"AutoTokenizer": ["tokenization_x.Slow", None]}
    put(folder, "tokenizer_config.json", text=json.dumps({"auto_map": auto_map}))
    put(folder, "processor_config.json", text="{damaged")
    found = {path.name for path in companion_files(folder)} - {
        "tokenizer_config.json",
        "processor_config.json",
    }
    assert found == {"a.py", "b.py", "tokenization_x.py"}


def test_a_sentence_transformer_keeps_its_modules(tmp_path):
    """The pooling and the norm that follow the model; without modules.json others are guessed."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules

    tiny_bert().save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    transformer = modules.Transformer(str(tmp_path / "bert"))
    pooling = modules.Pooling(32, pooling_mode="cls")
    parts = [transformer, pooling, modules.Normalize()]
    sentence_transformers.SentenceTransformer(modules=parts).save_pretrained(
        str(tmp_path / "dense")
    )
    put(tmp_path / "dense", "1_Pooling/.netrc.json")
    prepared = qrefta.prepare_checkpoint(tmp_path / "dense", tmp_path / "4bit", rank=2, bits=16)
    qrefta.merge(qrefta.load(prepared), torch.float32, out=tmp_path / "merged")

    def embedding(folder):
        model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
        return torch.from_numpy(model.encode("red green"))

    for out in (prepared, tmp_path / "merged"):
        assert_close(embedding(out), embedding(tmp_path / "dense"), rtol=1e-4, atol=1e-5)
        assert "1_Pooling/.netrc.json" not in names(out)


def test_modules_outside_the_folder_are_not_read(tmp_path):
    put(tmp_path, "1_Pooling/config.json", "[x]/config.json", "a/b/config.json")
    paths = ["1_Pooling", "[x]", "a/b", "..", "", None, "/"]
    put(tmp_path, "modules.json", text=json.dumps([{"path": path} for path in paths] + ["x"]))
    found = {str(file.relative_to(tmp_path)) for file in companion_files(tmp_path)}
    assert found == {"modules.json", "1_Pooling/config.json", "[x]/config.json"}
    put(tmp_path, "modules.json", text="5")
    assert [file.name for file in companion_files(tmp_path)] == ["modules.json"]


def test_the_code_of_a_pipeline_is_taken(tmp_path):
    pipelines = {"pairs": {"impl": "pairs.Pairs", "pt": ["AutoModel"]}, "other": None}
    put(tmp_path, "config.json", text=json.dumps({"custom_pipelines": pipelines}))
    put(tmp_path, "pairs.py", "stray.py", text="")
    assert [file.name for file in companion_files(tmp_path)] == ["pairs.py"]


# Tokenizers


def test_a_vocabulary_alone_is_a_tokenizer(tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path) is None
    put(
        tmp_path, "vocab.txt", text="\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red"])
    )
    assert load_tokenizer(tmp_path)("red")["input_ids"] == [2, 5, 3]


def test_settings_without_their_vocabulary_are_no_tokenizer(tmp_path):
    """transformers makes an empty one of them. ByT5 reads bytes, and no vocabulary."""
    tiny_bert().save_pretrained(tmp_path / "bert")
    put(tmp_path / "bert", "tokenizer_config.json", text='{"tokenizer_class": "BertTokenizer"}')
    assert load_tokenizer(tmp_path / "bert") is None
    ByT5Tokenizer().save_pretrained(tmp_path / "bytes")
    assert load_tokenizer(tmp_path / "bytes")("a")["input_ids"] == [100, 1]


def damaged(folder):
    put(folder, "tokenizer.json", text="{damaged")


def with_code(folder):
    auto_map = {"AutoTokenizer": ["code.Mine", None]}
    put(folder, "tokenizer_config.json", text=json.dumps({"auto_map": auto_map}))
    put(folder, "code.py", "vocab.mine", text="")


def of_a_missing_package(folder):
    (folder / "config.json").write_text('{"model_type": "t5"}')
    put(folder, "spiece.model", text="damaged")


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (damaged, "JSONDecodeError"),
        (with_code, "trust_remote_code"),
        (of_a_missing_package, "tokenizer of .* cannot be loaded"),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_refused_with_its_cause(spoil, cause, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=cause) as refused:
        load_tokenizer(tmp_path)
    assert refused.value.__cause__ is not None


def test_a_model_of_this_process_has_no_tokenizer_of_the_current_folder(tmp_path, monkeypatch):
    tiny_tokenizer().save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert tokenizer_of(tiny_llama()) is None
    with pytest.raises(ValueError, match="none was found with the model"):
        qrefta.export_gguf(tiny_llama(), tmp_path / "out.gguf")


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of a repository's commits, which are folders in it."""
    folder = tmp_path / "repository"

    def download(name, *, revision=None, allow_patterns):
        commit = revision or "newest"
        snapshot = tmp_path / "snapshots" / commit
        for path in (folder / commit).rglob("*"):
            inside = str(path.relative_to(folder / commit))
            if path.is_file() and any(fnmatch(inside, pattern) for pattern in allow_patterns):
                (snapshot / inside).parent.mkdir(parents=True, exist_ok=True)
                (snapshot / inside).write_bytes(path.read_bytes())
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return folder


@pytest.mark.parametrize("shards", [False, True])
def test_a_second_copy_of_the_weights_is_neither_downloaded_nor_counted(shards, hub):
    """Repositories of Mistral hold consolidated.safetensors too."""
    newest = hub / "newest"
    model = tiny_llama()
    model.save_pretrained(newest, max_shard_size="100KB" if shards else "1GB")
    weights = {name for name in names(newest) if name.endswith(".safetensors")}
    assert (len(weights) > 1) == shards
    size = sum((newest / name).stat().st_size for name in weights)
    save_file({"a": torch.zeros(9)}, newest / "consolidated.safetensors")
    put(newest, *OWN, "1_Pooling/config.json", "2_Other/config.json", "train.json")
    put(newest, "modules.json", text='[{"path": ""}, {"path": "1_Pooling"}]')
    folder = resolve_folder("org/name")
    around = {"modules.json", "1_Pooling/config.json"}
    index = {"model.safetensors.index.json"} if shards else set()
    assert names(folder) == {"config.json", *OWN, *around, *weights, *index}
    assert dense_bytes("org/name") == size
    assert dense_bytes(newest) == size


def test_tokenizer_and_code_are_of_the_commit_of_the_model(hub, tmp_path):
    for commit, word in (("newest", "river"), ("abc123", "film")):
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens([word])
        tokenizer.save_pretrained(hub / commit)
    model = qrefta.prepare(tiny_llama(), rank=2, progress=False)
    model.name_or_path = "org/name"
    model.config._commit_hash = "abc123"
    film = tokenizer_of(model).get_vocab()["film"]
    sentences = example_inputs(model)["input_ids"]  # by which exports are checked
    assert (sentences == film).any(1).tolist() == [False, True]
    qrefta.merge(model, out=tmp_path / "merged")
    assert "film" in load_tokenizer(tmp_path / "merged").get_vocab()
