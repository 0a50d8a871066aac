import json
from errno import ENOSPC

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModel,
    BertForMultipleChoice,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Wav2Vec2Config,
    Wav2Vec2Model,
    XLNetConfig,
    XLNetModel,
)

from qrefta.config.stack import LayerStack
from qrefta.linalg.metric import normalized, roots
from qrefta.model.stacks import find_stacks
from qrefta.split import moment_sums
from qrefta.split import moments as moments_module
from qrefta.split.calibrate import gather_moments
from qrefta.split.moments import Moments, load_moments, shared_metric
from tests.models import (
    ARCHITECTURES,
    TOWERS,
    VOCAB,
    inputs,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
)

DOUBLE = torch.float64


def gather(model, batches, **options):
    return gather_moments(model, find_stacks(model), batches, progress=False, **options)


def paths_of(model):
    return [path for stack in find_stacks(model) for path in stack.modules]


def captured(model, batches):
    """Every input of every stacked linear, one list a linear."""
    found = {path: [] for path in paths_of(model)}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: found[path].append(args[0])
        )
        for path in found
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return found


def explicit(tensors):
    """(E[x^T x], tokens) in float64 of inputs (..., in)."""
    rows = torch.cat([x.double().reshape(-1, x.shape[-1]) for x in tensors])
    return (rows.T @ rows / len(rows)), len(rows)


def second(batch):
    """Another batch like it."""
    return {
        name: (x.flip(0, 1) + 3) % VOCAB if "ids" in name else x.flip(-1) * 1
        for name, x in batch.items()
    }


def padded_batch(lengths, length, generator_seed=3):
    generator = torch.Generator().manual_seed(generator_seed)
    mask = (torch.arange(length)[None] < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(2, VOCAB, (len(lengths), length), generator=generator)
    return ids * mask, mask


@pytest.mark.parametrize("name", ARCHITECTURES | TOWERS)
def test_moments_are_those_of_the_captured_inputs(name):
    model = (ARCHITECTURES | TOWERS)[name]()
    batches = [inputs(model), second(inputs(model))]
    moments = gather(model, batches)
    for path, tensors in captured(model, batches).items():
        expected, tokens = explicit(tensors)
        assert_close(
            moments.of(path), expected.float(), rtol=1e-5, atol=1e-5 * expected.abs().max().item()
        )
        assert moments.tokens[moments.owners[path]] == tokens


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama, tiny_gpt2])
def test_padding_is_left_out(build):
    model = build()
    ids, mask = padded_batch([5, 9], 9)
    batch = {"input_ids": ids, "attention_mask": mask}
    moments = gather(model, [batch])
    for path, (x,) in captured(model, [batch]).items():
        expected, tokens = explicit([x[mask.bool()]])
        assert_close(
            moments.of(path), expected.float(), rtol=1e-5, atol=1e-5 * expected.abs().max().item()
        )
        assert moments.tokens[moments.owners[path]] == tokens == 14


@pytest.mark.parametrize("decoder_length", [7, 9])
def test_t5_counts_encoder_and_decoder_tokens_by_their_own_masks(decoder_length):
    """Also where both are of one length: cross-attention's keys and values read the encoder's
    output.
    """
    model = tiny_t5()
    ids, mask = padded_batch([5, 9], 9)
    decoder_ids, decoder_mask = padded_batch([decoder_length, 2], decoder_length, 4)
    batch = {"input_ids": ids, "attention_mask": mask}
    batch |= {"decoder_input_ids": decoder_ids, "decoder_attention_mask": decoder_mask}
    moments = gather(model, [batch])
    for path, (x,) in captured(model, [batch]).items():
        by_encoder = path.startswith("encoder") or path.endswith(
            ("EncDecAttention.k", "EncDecAttention.v")
        )
        expected, _ = explicit([x[(mask if by_encoder else decoder_mask).bool()]])
        assert_close(
            moments.of(path), expected.float(), rtol=1e-5, atol=1e-5 * expected.abs().max().item()
        )


def test_t5_gets_decoder_inputs_from_labels_or_from_its_encoder():
    model = tiny_t5()
    ids, mask = padded_batch([5, 9], 9)
    labels = torch.tensor([[5, 6, 7, 8], [9, 1, -100, -100]])
    path = "decoder.block.0.layer.0.SelfAttention.q"
    for extra, expected in ({"labels": labels}, 6), ({}, 14):
        moments = gather(model, [{"input_ids": ids, "attention_mask": mask} | extra])
        assert moments.tokens[moments.owners[path]] == expected


def test_linear_layers_with_the_same_input_share_one_moment():
    moments = gather(tiny_llama(), [inputs(tiny_llama())])
    layer = "model.layers.1."
    owners = [moments.owners[f"{layer}self_attn.{name}_proj"] for name in "qkv"]
    assert len(set(owners)) == 1
    assert moments.owners[layer + "mlp.gate_proj"] == moments.owners[layer + "mlp.up_proj"]
    assert moments.owners[layer + "mlp.down_proj"] not in owners
    assert len(moments.tokens) == 4 * 3  # q k v, o, gate up, down


class Fickle(nn.Module):
    """Two linear layers that share their input in some calls only, once written to in between."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids):
        x = input_ids
        if x[0, 0] > 0:
            self.left(x), self.right(x)
        elif x[0, 0] > -1:
            self.left(x), self.right(x.clone() * 2), self.left(x), self.left(x)
        else:
            self.left(x), self.right(x.mul_(2))


@pytest.mark.parametrize(("width", "tokens"), [(40, 3), (300, 900), (1100, 500)])
def test_many_batches_differ_from_float64_by_rounding_alone(width, tokens):
    """Below, between and beyond the widths of one panel and of float64 sums; measured: 2e-7."""
    stacks = [LayerStack("*", ("left",), 2, width)]
    model = Fickle()
    model.left = nn.Linear(width, 2)
    model.forward = lambda input_ids: model.left(input_ids)
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(tokens, width, generator=generator) + 0.5 for _ in range(4)]
    moment = gather_moments(model, stacks, xs, progress=False).of("left")
    expected, _ = explicit(xs)
    assert torch.equal(moment, moment.T)
    assert (moment - expected).norm() / expected.norm() < 1e-6


def test_the_upper_half_completes_a_matrix():
    """Also where a product's panels on the diagonal are not symmetric to the last bit."""
    matrix = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    expected = matrix.triu() + matrix.triu(1).T
    assert torch.equal(moment_sums.mirror_(matrix.clone()), expected)


def test_progress_counts_rows_and_tokens(capsys):
    model = tiny_llama()
    gather_moments(model, find_stacks(model), [inputs(model)] * 3)
    shown = capsys.readouterr().err
    assert "Calibrating" in shown
    assert "6 rows, 48 tokens" in shown


def test_sharing_that_ends_changes_no_moment():
    model = Fickle()
    stacks = [LayerStack("*", ("left", "right"), 4, 4)]
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(5, 4, generator=generator) for _ in range(3)]
    for x, value in zip(xs, (1.0, -0.5, -2.0)):
        x[0, 0] = value
    moments = gather_moments(model, stacks, [x.clone() for x in xs], progress=False)
    assert moments.tokens == {"left": 25, "right": 15}
    assert_close(moments.of("left"), explicit([xs[0], xs[1], xs[1], xs[1], xs[2]])[0].float())
    assert_close(moments.of("right"), explicit([xs[0], xs[1] * 2, xs[2] * 2])[0].float())


def test_inputs_beyond_full_width_keep_their_diagonal(monkeypatch):
    model = tiny_bert()
    full = gather(model, [inputs(model)])
    monkeypatch.setattr(moment_sums, "FULL_WIDTH", 32)
    moments = gather(model, [inputs(model)])
    for path in paths_of(model):
        if "output.dense" in path and "attention" not in path:
            assert_close(moments.of(path), full.of(path).diagonal())
        else:
            assert torch.equal(moments.of(path), full.of(path))


def test_sums_are_the_same_in_single_precision(monkeypatch):
    model = tiny_bert()
    batches = [inputs(model), second(inputs(model))]
    full = gather(model, batches)
    monkeypatch.setattr(moment_sums, "DOUBLE_WIDTH", 0)
    for path in paths_of(model):
        assert_close(gather(model, batches).of(path), full.of(path))


def test_batches_may_be_tensors_and_hold_unused_keys():
    model = tiny_llama()
    batch = inputs(model)
    expected = gather(model, [batch])
    for other in (
        batch["input_ids"],
        batch | {"labels": batch["input_ids"], "token_type_ids": batch["input_ids"], "n": 3},
    ):
        moments = gather(model, [other])
        assert all(torch.equal(moments.of(path), expected.of(path)) for path in paths_of(model))


def test_saved_moments_come_back_bit_equal_and_one_at_a_time(tmp_path):
    model = tiny_gpt2()
    moments = gather(model, [inputs(model)])
    moments.save(tmp_path / "m.safetensors")
    loaded = load_moments(tmp_path / "m.safetensors")
    assert (loaded.owners, loaded.tokens) == (moments.owners, moments.tokens)
    assert all(torch.equal(loaded.of(path), moments.of(path)) for path in paths_of(model))
    loaded.save(tmp_path / "m.safetensors")  # over the file that it reads
    assert torch.equal(
        load_moments(tmp_path / "m.safetensors").of("transformer.h.0.attn.c_attn"),
        moments.of("h.0.attn.c_attn"),
    )
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "m.safetensors"
    model = tiny_bert()
    moments = gather(model, [inputs(model)])
    moments.save(file)
    before = file.read_bytes()

    def fail(*_):
        raise OSError(ENOSPC, "no space")

    monkeypatch.setattr(moments_module, "save_file", fail)
    with pytest.raises(OSError, match=r"cannot write .*m\.safetensors .* no space"):
        moments.save(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_missing_damaged_and_foreign_files_are_refused(tmp_path):
    file = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match="no file"):
        load_moments(file)
    model = tiny_bert()
    gather(model, [inputs(model)]).save(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load_moments(file)
    save_file({"weight": torch.ones(2)}, file)
    with pytest.raises(ValueError, match="format None"):
        load_moments(file)
    metadata = {
        "format": moments_module.FORMAT,
        "owners": json.dumps({"a": "b"}),
        "tokens": json.dumps({"b": 1}),
    }
    save_file({"c": torch.ones(2)}, file, metadata)
    with pytest.raises(ValueError, match="are not the moments that it lists"):
        load_moments(file)


def test_a_base_models_prefix_may_be_missing_on_either_side(tmp_path):
    model = tiny_bert()
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    from_head, from_base = gather(model, [inputs(model)]), gather(base, [inputs(model)])
    for path in paths_of(base):
        assert torch.equal(from_head.of(path), from_base.of("bert." + path))
    with pytest.raises(ValueError, match="has none"):
        from_head.of("encoder.layer.9.attention.self.query")
    with pytest.raises(ValueError, match="several"):
        from_head.of("dense")


def test_errors_leave_no_hooks_and_the_mode_as_it_was():
    model = tiny_bert().train()
    model.bert.embeddings.eval()
    model.bert.encoder.layer[1].intermediate.dense.weight.data[0, 0] = float("nan")
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense holds NaN"):
        gather(model, [inputs(model)])
    with pytest.raises(ValueError, match="no batches"):
        gather(model, [])
    with pytest.raises(ValueError, match="no tensors"):
        gather(model, [{"text": ["a"], "labels": torch.ones(1)}])
    with pytest.raises(ValueError, match="A batch is a list"):
        gather(model, [["a"]])
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_eval_mode_is_used_and_the_mode_restored():
    model = tiny_bert()
    expected = gather(model, [inputs(model)])
    model.train()
    moments = gather(model, [inputs(model)])
    assert all(torch.equal(moments.of(path), expected.of(path)) for path in paths_of(model))
    assert all(module.training for module in model.modules())


def test_a_linear_layer_that_no_token_reached_has_a_moment_of_zeros(tmp_path):
    stacks = [LayerStack("*", ("left", "right"), 4, 4)]
    model = Fickle()
    model.forward = lambda input_ids: model.left(input_ids)
    moments = gather_moments(model, stacks, [torch.randn(3, 4)], progress=False)
    moments.save(tmp_path / "moments.safetensors")
    for one in (moments, load_moments(tmp_path / "moments.safetensors")):
        assert [one.reached(path) for path in ("left", "right")] == [True, False]
        assert torch.equal(one.of("right"), torch.zeros(4))
        one.check(stacks)
        assert one.of("left").diagonal().min() > 0
        # It does not count in the metric of its stack.
        metric = shared_metric(one, stacks[0])
        expected = normalized(one.of("left"))
        assert_close(metric.root @ metric.root, expected, atol=1e-5, rtol=1e-5)


def test_batches_that_reach_no_linear_layer_are_refused():
    model = Fickle()
    model.forward = lambda input_ids: input_ids
    stacks = [LayerStack("*", ("left", "right"), 4, 4)]
    with pytest.raises(ValueError, match="No token of the calibration reached any linear layer"):
        gather_moments(model, stacks, [torch.randn(3, 4)], progress=False)


def fixed_moments(*tensors):
    names = [f"layers.{index}.q" for index in range(len(tensors))]
    found = dict(zip(names, tensors, strict=True))
    stack = LayerStack("layers.*.q", tuple(names), 8, tensors[0].shape[0])
    return Moments(
        {name: name for name in names}, dict.fromkeys(names, 1), found.__getitem__
    ), stack


def random_moment(width, rank, seed):
    x = torch.randn(rank, width, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return x.T @ x


def explicit_shared(*tensors):
    """The definition, matrix by matrix."""
    parts = []
    for moment in tensors:
        ridged = moment.double() + 1e-4 * moment.diagonal().mean() * torch.eye(
            len(moment), dtype=DOUBLE
        )
        parts.append(ridged / ridged.diagonal().mean())
    return torch.stack(parts).mean(0)


@pytest.mark.parametrize("ranks", [(40, 40), (3, 5), (1, 1)])
def test_roots_are_those_of_the_definition(ranks):
    tensors = [random_moment(24, rank, seed) * 10.0**seed for seed, rank in enumerate(ranks)]
    expected = explicit_shared(*tensors)
    root, inverse = roots(expected)
    assert_close(root @ root, expected)
    assert_close(root @ inverse, torch.eye(24, dtype=DOUBLE))
    metric = shared_metric(*fixed_moments(*(tensor.float() for tensor in tensors)))
    assert metric.root.dtype == torch.float32
    assert_close(metric.root, root.float(), rtol=1e-4, atol=1e-5)
    assert metric.root.double().square().sum().item() / 24 == pytest.approx(
        1, rel=1e-5
    )  # mean(diag S)
    V = torch.randn(24, 3, generator=torch.Generator().manual_seed(9), dtype=DOUBLE)
    assert_close(metric.apply(V), metric.root.double() @ V)
    assert_close(metric.apply_inverse(metric.apply(V)), V, rtol=1e-3, atol=1e-3)


def test_a_diagonal_metric_is_the_full_one_of_a_diagonal_matrix():
    diagonals = [random_moment(24, 40, seed).diagonal().float() for seed in range(2)]
    diagonals[0][:4] = 0
    V = torch.randn(24, 3, generator=torch.Generator().manual_seed(9))
    thin, full = (
        shared_metric(*fixed_moments(*x)) for x in (diagonals, [d.diag() for d in diagonals])
    )
    assert thin.root.shape == (24,)
    assert_close(thin.apply(V), full.apply(V))
    assert_close(thin.apply_inverse(V), full.apply_inverse(V))


@pytest.mark.parametrize("second_is_full", [True, False])
def test_a_wide_stack_shares_the_diagonal_of_full_moments(monkeypatch, second_is_full):
    """Also with diagonals from files that were written when wide inputs kept no more."""
    tensors = [random_moment(24, 40, seed).float() for seed in range(2)]
    expected = shared_metric(*fixed_moments(*(tensor.diagonal() for tensor in tensors)))
    if not second_is_full:
        tensors[1] = tensors[1].diagonal()
    monkeypatch.setattr(moments_module, "METRIC_WIDTH", 23)
    metric = shared_metric(*fixed_moments(*tensors))
    assert_close(metric.root, expected.root)


def test_full_moments_are_kept_up_to_16384_and_used_up_to_4096():
    """The error feedback of wide layers needs them; the shared factors do not."""
    assert moment_sums.FULL_WIDTH == 16384
    assert moments_module.METRIC_WIDTH == 4096


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_moment_with_nan_or_infinity_names_its_layer(value, tmp_path):
    broken = random_moment(24, 40, 0).float()
    broken[3, 5] = value
    moments, stack = fixed_moments(random_moment(24, 40, 1).float(), broken)
    moments.save(tmp_path / "m.safetensors")
    for found in moments, load_moments(tmp_path / "m.safetensors"):
        with pytest.raises(ValueError, match=r"layers\.1\.q holds NaN or infinity"):
            found.check([stack])
        with pytest.raises(ValueError, match=r"layers\.1\.q holds NaN or infinity"):
            shared_metric(found, stack)


def test_check_refuses_moments_of_another_model():
    moments, stack = fixed_moments(random_moment(24, 40, 0).float())
    moments.check([stack])
    with pytest.raises(ValueError, match="24 wide and its weight 32"):
        moments.check([LayerStack(stack.name, stack.modules, 8, 32)])
    with pytest.raises(ValueError, match="has none"):
        moments.check([LayerStack(stack.name, ("layers.7.q",), 8, 24)])


def test_stacks_with_the_same_inputs_share_a_metric():
    model = tiny_bert()
    moments = gather(model, [inputs(model)])
    query, key, _, output, *_ = find_stacks(model)
    assert shared_metric(moments, key) is shared_metric(moments, query)
    assert not torch.equal(shared_metric(moments, output).root, shared_metric(moments, query).root)


@pytest.mark.parametrize("shape", [(24,), (24, 24)])
def test_dead_inputs_count_as_the_identity(shape):
    metric = shared_metric(*fixed_moments(torch.zeros(shape), torch.zeros(shape)))
    V = torch.randn(24, 3, generator=torch.Generator().manual_seed(9))
    assert_close(metric.apply(V), V)
    assert_close(metric.apply_inverse(V), V)
    alive = random_moment(24, 40, 0).float()
    mixed = shared_metric(
        *fixed_moments(torch.zeros(shape), alive if len(shape) == 2 else alive.diagonal())
    )
    assert all(part.isfinite().all() for part in mixed)


def test_a_metric_needs_moments_of_the_stacks_width():
    moments, stack = fixed_moments(random_moment(24, 40, 0))
    wider = LayerStack(stack.name, stack.modules, 8, 32)
    with pytest.raises(ValueError, match="24 wide and its weight 32"):
        shared_metric(moments, wider)


def test_layers_that_share_keys_see_every_token():
    """Gemma 4 runs them on the last token only, if a whole number of logits is asked for."""
    config = Gemma4TextConfig(
        vocab_size=VOCAB,
        vocab_size_per_layer_input=VOCAB,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=64,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        global_head_dim=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    model = Gemma4ForCausalLM(config)
    tokens = gather(model, [inputs(model)]).tokens
    assert set(tokens.values()) == {inputs(model)["input_ids"].numel()}


# Masks of other shapes than the inputs


def assert_same_moments(found, expected, paths, tolerance=1e-4):
    for path in paths:
        one, other = found.of(path), expected.of(path)
        assert_close(one, other, rtol=tolerance, atol=tolerance * other.abs().max().item())
    assert sorted(found.tokens.values()) == sorted(expected.tokens.values())


def test_padding_of_choices_does_not_count():
    model = BertForMultipleChoice(tiny_bert().config).eval()
    ids, mask = padded_batch([5, 9, 3, 7], 9)
    choices = {"input_ids": ids.view(2, 2, 9), "attention_mask": mask.view(2, 2, 9)}
    rows = [
        {"input_ids": row[keep.bool()].view(1, 1, -1)} for row, keep in zip(ids, mask, strict=True)
    ]
    assert_same_moments(gather(model, [choices]), gather(model, rows), paths_of(model))


def test_padding_does_not_count_where_the_batch_is_the_second_axis():
    config = XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=2, n_head=2, d_inner=64)
    model = XLNetModel(config).eval()
    ids, mask = padded_batch([5, 9, 3], 9)
    found = gather(model, [{"input_ids": ids, "attention_mask": mask}])
    assert set(found.tokens.values()) == {17}


def test_padding_of_sound_does_not_count():
    config = Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )
    model = Wav2Vec2Model(config).eval()
    mask = (torch.arange(400)[None] < torch.tensor([[400], [200]])).long()
    found = gather(model, [{"input_values": torch.randn(2, 400) * mask, "attention_mask": mask}])
    frames = model._get_feat_extract_output_lengths(torch.tensor([400, 200])).sum().item()
    assert {found.tokens[found.owners[path]] for path in paths_of(model)} == {frames}


def test_sequences_that_are_packed_into_a_row_do_not_see_each_other():
    model = tiny_llama().eval()
    assert model.config.use_cache
    first, second = torch.randint(1, VOCAB, (1, 6)), torch.randint(1, VOCAB, (1, 4))
    packed = {
        "input_ids": torch.cat([first, second], dim=1),
        "position_ids": torch.cat([torch.arange(6), torch.arange(4)])[None],
    }
    found = gather(model, [packed])
    expected = gather(model, [{"input_ids": first}, {"input_ids": second}])
    assert_same_moments(found, expected, paths_of(model))
    assert model.config.use_cache
