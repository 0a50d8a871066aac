"""The faults of `eval.mutants`: one-line changes of qrefta, each with the tests that ought to find it."""

from typing import NamedTuple


class Fault(NamedTuple):
    """One line of qrefta made wrong.

    Attributes:
        file: path in qrefta.
        old: text that the file has once.
        new: what takes its place.
        tests: pytest's arguments: one or two test files, and -k where a part of them is enough.
    """

    file: str
    old: str
    new: str
    tests: str


FAULTS = [
    Fault(
        "product.py",
        "grad_x.addmm_(back, wide_down)",
        "grad_x.addmm_(back, wide_down, alpha=-1)",
        "tests/test_product.py -k 'gradcheck or dense_definition'",
    ),
    Fault(
        "product.py",
        "(0 if gradients else contracted)",
        "contracted",
        "tests/test_product.py -k 'form_that_runs or without_gradients'",
    ),
    Fault(
        "product.py",
        "x.reshape(-1, shape[1]) if need_down else None",
        "x.reshape(-1, shape[1])",
        "tests/test_product.py -k keeps_no_more",
    ),
    Fault(
        "product.py",
        "_core_gradient(back.to(core.dtype), narrow.to(core.dtype), core)",
        "_core_gradient(back, narrow, core)",
        "tests/test_product.py -k overflow",
    ),
    Fault("product.py", "(core.T if transposed else core)", "core", "tests/test_methods.py -k 'output_and_gradients'"),
    Fault(
        "product.py",
        "return factor.to(rounding).to(like)",
        "return factor.to(like)",
        "tests/test_methods.py -k 'rounding_masters'",
    ),
    Fault(
        "quantize.py",
        "blocks = -(-values // self.block_size)",
        "blocks = values // self.block_size",
        "tests/test_quantize.py -k packed_sizes",
    ),
    Fault(
        "quantize.py",
        "return codes[:, 0] << 4 | codes[:, 1]",
        "return codes[:, 1] << 4 | codes[:, 0]",
        "tests/test_quantize.py -k int4",
    ),
    Fault(
        "quantize.py",
        "cells += scaled > torch.take",
        "cells += scaled >= torch.take",
        "tests/test_quantize.py -k rounded",
    ),
    Fault(
        "quantize.py",
        "blocksize=_SCALE_BLOCK) + offset",
        "blocksize=_SCALE_BLOCK)",
        "tests/test_quantize.py -k equals_bitsandbytes",
    ),
    Fault("quantize.py", " or shape[1] % fmt.block_size:", ":", "tests/test_quantize.py -k linear"),
    Fault(
        "quantize.py",
        "state.offset, state.nested = offset.squeeze(0), True",
        "state.offset, state.nested = -offset.squeeze(0), True",
        "tests/test_quantize.py -k linear",
    ),
    Fault(
        "tensor.py",
        "mode3_gram(blocks, layers)).eigenvectors.flip(1)",
        "mode3_gram(blocks, layers)).eigenvectors",
        "tests/test_tensor.py -k lsm3",
    ),
    Fault(
        "tensor.py",
        "return torch.from_numpy(rows).T.contiguous()",
        "return torch.from_numpy(rows).contiguous()",
        "tests/test_tensor.py -k dct_is",
    ),
    Fault("tensor.py", "return (columns.T @ block", "return (columns @ block", "tests/test_tensor.py -k tensorly"),
    Fault("tensor.py", "chunk = columns.double()", "chunk = columns", "tests/test_tensor.py -k gram"),
    Fault(
        "tensor.py",
        "torch.where(peak < 0, -1.0, 1.0)",
        "torch.where(peak > 0, -1.0, 1.0)",
        "tests/test_tensor.py -k signs",
    ),
    Fault(
        "tensor.py",
        "kept, moved = start @ turn, further.double() @ turn",
        "kept, moved = start @ turn, start @ turn",
        "tests/test_tensor.py -k refits",
    ),
    Fault(
        "tensor.py",
        "return directions - self.basis @ (self.basis.mT @ directions)",
        "return directions",
        "tests/test_tensor.py -k 'block_method or any_stack or seed_decides'",
    ),
    Fault(
        "tensor.py",
        "if _LEAST_SQUARE < total < math.inf:",
        "if total < math.inf:",
        "tests/test_properties.py -k squared_norm",
    ),
    Fault(
        "tucker.py",
        "gram = slices.metric.apply(slices.metric.apply(gram).T)",
        "gram = slices.metric.apply(gram)",
        "tests/test_methods.py -k metric",
    ),
    Fault(
        "tucker.py",
        "torch.linalg.eigh(gram).eigenvectors.flip(1)",
        "torch.linalg.eigh(gram).eigenvectors",
        "tests/test_methods.py -k 'hosvd or iterated or metric'",
    ),
    Fault(
        "tucker.py",
        "if captured - before <= _TOLERANCE",
        "if captured - before >= _TOLERANCE",
        "tests/test_methods.py -k 'hosvd or iterated or metric'",
    ),
    Fault(
        "factors.py",
        "return moved if moved.dtype.itemsize >= tensor.dtype.itemsize else tensor.to(moved.device)",
        "return moved",
        "tests/test_quantizer.py -k 'casting_the_model'",
    ),
    Fault(
        "factors.py",
        "if kept is None or kept.state != state:",
        "if kept is None:",
        "tests/test_linear.py -k rounded_factors",
    ),
    Fault("factors.py", "self._forget(settled=False)", "pass", "tests/test_linear.py -k rounded_factors"),
    Fault(
        "factors.py", "else up @ core, down", "else up @ core.T, down", "tests/test_methods.py -k delta_is_the_dense"
    ),
    Fault(
        "factors.py",
        "return rounded if torch.equal(rounded.to(tensor.dtype), tensor) else tensor",
        "return rounded",
        "tests/test_quantizer.py -k masters",
    ),
    Fault(
        "factors.py",
        "parameter.copy_(parameter.to(self.dtype))",
        "parameter.copy_(parameter)",
        "tests/test_factors.py -k rounding_masters",
    ),
    Fault(
        "factors.py",
        'options.get("use_reentrant") is not False',
        'options.get("use_reentrant") is True',
        "tests/test_modes.py -k reentrant",
    ),
    Fault(
        "methods/craft.py",
        "return core + core @ self._seen(self.in_square).T",
        "return core + core @ self._seen(self.in_square)",
        "tests/test_methods.py -k 'delta_is_the_dense or output_and_gradients'",
    ),
    Fault(
        "methods/craft.py",
        "weights @ self._seen(self.layer_square)",
        "weights @ self._seen(self.layer_square).T",
        "tests/test_methods.py -k 'delta_is_the_dense or output_and_gradients'",
    ),
    Fault(
        "methods/craft.py",
        "r_out, r_in = min(r_out, r_layer * r_in), min",
        "r_out, r_in = r_out, min",
        "tests/test_methods.py -k capped",
    ),
    Fault(
        "methods/craft.py",
        "transform[:, : ranks[0]]",
        "transform[:, -ranks[0] :]",
        "tests/test_methods.py -k what_a_fit",
    ),
    Fault(
        "methods/lorta.py",
        "return 1 + self._seen(self.C[layer])",
        "return 1 + self.C[layer]",
        "tests/test_methods.py -k 'delta_is_the_dense or output_and_gradients'",
    ),
    Fault(
        "methods/lorta.py",
        "normalize(drawn, dim=1)",
        "normalize(drawn, dim=0)",
        "tests/test_methods.py -k random_factors",
    ),
    Fault(
        "methods/lotr.py",
        "torch.linalg.qr(drawn).Q.to(self.dtype)",
        "drawn.to(self.dtype)",
        "tests/test_methods.py -k random_factors",
    ),
    Fault(
        "methods/lotr.py",
        "return self._seen(self.G[layer])",
        "return self._seen(self.G[layer]).T",
        "tests/test_methods.py -k 'delta_is_the_dense or output_and_gradients'",
    ),
    Fault(
        "methods/refta.py",
        "mix = transform.to(slices.device)[:, found.slices]",
        "mix = transform.T.to(slices.device)[:, found.slices]",
        "tests/test_factors.py -k 'delta or core_is'",
    ),
    Fault(
        "methods/refta.py",
        "found.values.square().sum().item(), starts",
        "found.values.sum().item(), starts",
        "tests/test_methods.py -k what_a_fit",
    ),
    Fault(
        "methods/refta.py",
        "torch.bincount(found.slices, minlength=len(transform))",
        "torch.bincount(found.slices)",
        "tests/test_factors.py -k slice_ranks",
    ),
    Fault(
        "methods/tera.py",
        "self.sizes[0], a_1, 1 + b_1)",
        "self.sizes[0], a_1, b_1)",
        "tests/test_methods.py -k 'delta_is_the_dense or output_and_gradients'",
    ),
    Fault(
        "methods/tera.py",
        "drawn[-into:] *= math.sqrt(self.rank / into)",
        "drawn[-into:] *= math.sqrt(into / self.rank)",
        "tests/test_methods.py -k tera_starts",
    ),
    Fault(
        "methods/tera.py",
        "torch.kron(block, second)[start % inner :]",
        "torch.kron(block, second)[start:]",
        "tests/test_methods.py -k 'delta_is_the_dense or output_and_gradients'",
    ),
    Fault(
        "methods/tera.py",
        "for size in range(root, root // 2, -1):",
        "for size in range(root, 1, -1):",
        "tests/test_methods.py -k mode_sizes",
    ),
    Fault(
        "methods/tera.py",
        "(0, first * second - flat.shape[1])",
        "(first * second - flat.shape[1], 0)",
        "tests/test_methods.py -k 'delta_is_the_dense or output_and_gradients'",
    ),
    Fault(
        "methods/tera.py",
        "grad_first = sum((ours @ theirs.mT).sum(0) for ours",
        "grad_first = next((ours @ theirs.mT).sum(0) for ours",
        "tests/test_methods.py -k 'output_and_gradients and TeRA or tera'",
    ),
    Fault(
        "stack.py",
        "if 0 < count < len(stack.modules):",
        "if 1 < count < len(stack.modules):",
        "tests/test_stack.py -k some_layers",
    ),
    Fault(
        "stack.py",
        "module, expert = divmod(index, max(self.experts, 1))",
        "expert, module = divmod(index, max(self.experts, 1))",
        "tests/test_experts.py -k 'as_many_slices'",
    ),
    Fault(
        "stack.py",
        "if max(-low, high) > LARGEST_WEIGHT:",
        "if high > LARGEST_WEIGHT:",
        "tests/test_properties.py -k overflow",
    ),
    Fault(
        "stack.py",
        'return path == name or path.endswith("." + name)',
        "return path.endswith(name)",
        "tests/test_stack.py -k name_matches",
    ),
    Fault(
        "stack.py",
        "return len(children) == 1 or len(classes)",
        "return len(classes)",
        "tests/test_stack.py -k one_block",
    ),
    Fault(
        "sources.py", "if len(own) != max(stack.experts, 1):", "if not own:", "tests/test_convert.py -k missing_expert"
    ),
    Fault(
        "sources.py",
        "[*stacked, (Concatenate, 1)]",
        "[*stacked, (Concatenate, 0)]",
        "tests/test_convert.py -k experts_are_read",
    ),
    Fault("sources.py", "[:: -1 if stack.transposed else 1]", "[::1]", "tests/test_convert.py -k conv1d"),
    Fault(
        "sources.py",
        "for expert in range(shape[0])]",
        "for expert in reversed(range(shape[0]))]",
        "tests/test_convert.py -k experts_are_read",
    ),
    Fault(
        "sources.py",
        "if not fits or sum(rows for rows, _ in shapes) != wanted[0]:",
        "if not fits:",
        "tests/test_convert.py -k damaged",
    ),
    Fault(
        "shards.py",
        "offset=self.offset + index * nbytes",
        "offset=self.offset",
        "tests/test_convert.py -k 'rows_are_read'",
    ),
    Fault("shards.py", "first += height", "first += low", "tests/test_convert.py -k 'rows_are_read'"),
    Fault(
        "shards.py",
        "file.seek(stored.offset + start * row_bytes)",
        "file.seek(stored.offset)",
        "tests/test_convert.py -k 'rows_and_columns'",
    ),
    Fault(
        "moments.py",
        "(moment / mean + RIDGE * identity) / (1 + RIDGE)",
        "(moment / mean + RIDGE * identity)",
        "tests/test_moments.py -k 'roots or dead'",
    ),
    Fault(
        "moments.py",
        "by_encoder = inside or (bool(encoded) and x is encoded[0])",
        "by_encoder = inside",
        "tests/test_moments.py -k t5",
    ),
    Fault("moments.py", "or version != self._version or", "or", "tests/test_moments.py -k 'same_input or sharing'"),
    Fault(
        "moments.py",
        "total += (_times(moment, rows.T) * rows.T)",
        "total += (rows.T * rows.T)",
        "tests/test_moments.py -k output_error",
    ),
    Fault("moments.py", "module.training = training", "pass", "tests/test_moments.py -k mode"),
    Fault(
        "split.py",
        "error = target.norm - found.energy",
        "error = target.norm + found.energy",
        "tests/test_split.py -k 'error_is_that or refined or blocks_of_rows'",
    ),
    Fault(
        "split.py",
        "Split(found.factors, base), error",
        "Split(found.factors, found.factors), error",
        "tests/test_split.py -k nearest_to",
    ),
    Fault(
        "split.py",
        "together = 1 if fmt is None else fmt.block_size // math.gcd(in_features, fmt.block_size)",
        "together = 1",
        "tests/test_split.py -k blocks_of_rows",
    ),
    Fault(
        "split.py",
        "self.error += squared_norm(delta.sub_(weight))",
        "self.error += squared_norm(delta.add_(weight))",
        "tests/test_split.py -k states_the_errors",
    ),
    Fault(
        "report.py",
        "self.principal_norm += layer.principal_norm",
        "self.principal_norm += layer.norm",
        "tests/test_report.py tests/test_identities.py -k 'row or energy_add'",
    ),
    Fault("report.py", "bits_per_weight=8 * self.bytes", "bits_per_weight=self.bytes", "tests/test_report.py"),
    Fault(
        "report.py",
        "self.output_error += output_error(layer.error, moment)",
        "self.output_error += output_error(layer.whole_error, moment)",
        "tests/test_report.py",
    ),
    Fault(
        "rank.py",
        "(-self._removed(index, component) / self.costs[index], index)",
        "(-self._removed(index, component), index)",
        "tests/test_rank.py -k order_of_error",
    ),
    Fault(
        "rank.py", "gain = _CAUTION * (1 - reached)", "gain = _CAUTION * reached", "tests/test_rank.py -k error_ratio"
    ),
    Fault(
        "rank.py",
        "bisect_right(range(1, largest + 1), most, key=count)",
        "bisect_right(range(1, largest + 1), most // 2, key=count)",
        "tests/test_methods.py -k trained_params",
    ),
    Fault(
        "linear.py",
        "weight + self.factors.delta",
        "weight - self.factors.delta",
        "tests/test_linear.py -k dense_weight",
    ),
    Fault("linear.py", 'if "_is_replica" in self.__dict__:', "if False:", "tests/test_misuse.py -k data_parallel"),
    Fault("linear.py", "x = x.to(torch.get_autocast_dtype(kind))", "pass", "tests/test_linear.py -k autocast"),
    Fault("build.py", "new.train(old.training)", "new.train()", "tests/test_prepare.py -k training_mode"),
    Fault(
        "build.py",
        "return list(dict.fromkeys(task_head(model) + named))",
        "return named",
        "tests/test_prepare.py -k 'task_heads or modules_to_save'",
    ),
    Fault(
        "experts.py",
        "hidden_states[order // top_k_index.shape[1]]",
        "hidden_states[order % len(hidden_states)]",
        "tests/test_experts.py -k 'pass_through'",
    ),
    Fault(
        "experts.py",
        "top_k_weights.reshape(-1)[order].unsqueeze(1)",
        "top_k_weights.reshape(-1).unsqueeze(1)",
        "tests/test_experts.py -k 'pass_through'",
    ),
    Fault("experts.py", "weighted[order.argsort()]", "weighted[order]", "tests/test_experts.py -k 'pass_through'"),
    Fault(
        "experts.py",
        'if getattr(self, "has_post_expert_norm", False):',
        "if False:",
        "tests/test_experts.py -k 'pass_through'",
    ),
    Fault(
        "experts.py", "product + bias[expert].to(product.dtype)", "product", "tests/test_experts.py -k 'pass_through'"
    ),
    Fault(
        "experts.py",
        "weight = weight.T if experts.is_transposed else weight",
        "weight = weight",
        "tests/test_experts.py -k 'fused_again'",
    ),
    Fault(
        "experts.py",
        "experts._is_hf_initialized = True",
        "experts._is_hf_initialized = False",
        "tests/test_experts.py -k 'round_trip'",
    ),
    Fault("experts.py", ".remainder(experts).view(", ".clamp(max=experts - 1).view(", "tests/test_experts.py -k dealt"),
    Fault(
        "experts.py", "yield first, hidden_states", "yield first, hidden_states[1:]", "tests/test_experts.py -k moments"
    ),
    Fault(
        "config.py",
        "QuantFormat(self.quant_type, self.block_size, self.double_quant) if",
        "QuantFormat(self.quant_type, self.block_size) if",
        "tests/test_config.py",
    ),
    Fault(
        "config.py",
        "*self.shape, self.transposed, self.experts)",
        "*self.shape, self.transposed)",
        "tests/test_experts.py -k 'round_trip'",
    ),
    Fault("convert.py", "if index >= len(journal.rows):", "if True:", "tests/test_convert.py -k 'interrupted'"),
    Fault("convert.py", "if name not in written]", "]", "tests/test_convert.py -k 'bit_for_bit and bert'"),
    Fault(
        "quantizer.py",
        "config.modules_to_save + task_head(model)",
        "config.modules_to_save",
        "tests/test_quantizer.py -k 'fresh_and_trains'",
    ),
    Fault("quantizer.py", "stored(tensor, factors.dtype)", "tensor", "tests/test_quantizer.py -k 'masters or small'"),
    Fault(
        "prepare.py",
        "residual = residual.to(dense.device, dense.dtype)",
        "residual = residual.to(dense.device)",
        "tests/test_prepare.py -k 16_bit",
    ),
    Fault(
        "prepare.py", "config.base_model = model.name_or_path or None", "config.base_model = None", "tests/test_card.py"
    ),
    Fault(
        "prepare.py",
        "rank = ranks.get(stack, 0)",
        "rank = ranks.get(stack, config.rank)",
        "tests/test_prepare.py -k only_targets",
    ),
    Fault(
        "compare.py",
        "expected.float().norm().clamp(min=1e-30)",
        "found.float().norm().clamp(min=1e-30)",
        "tests/test_compare.py -k difference",
    ),
    Fault(
        "compare.py",
        'difference.item() if torch.isfinite(difference) else float("inf")',
        "difference.item()",
        "tests/test_compare.py -k difference",
    ),
    Fault("compare.py", "model.train(training)", "model.train()", "tests/test_compare.py -k mode"),
    Fault(
        "compare.py",
        "ids = ids[ids != (-1 if token is None else token)]",
        "ids = ids[ids != -1]",
        "tests/test_compare.py -k special",
    ),
    Fault("compare.py", "frames = 2 * getattr", "frames = getattr", "tests/test_compare.py -k sound"),
    Fault(
        "compare.py", " and ids.max() < model.config.get_text_config().vocab_size", "", "tests/test_compare.py -k text"
    ),
    Fault("compare.py", "for name in buffers & found.keys():", "for name in ():", "tests/test_export.py -k statistics"),
    Fault("export.py", "kept |= set(model._keep_in_fp32_modules or ())", "pass", "tests/test_export.py -k in_float32"),
    Fault("export.py", "if id(tensor) not in seen and key", "if key", "tests/test_export.py -k one_file"),
    Fault("export.py", "folder.chmod(0o755)", "folder.chmod(0o700)", "tests/test_export.py -k one_file"),
    Fault("export.py", "if difference <= tolerance:", "if True:", "tests/test_export.py -k leave_nothing"),
    Fault("export.py", "shutil.rmtree(folder, ignore_errors=True)", "pass", "tests/test_export.py -k leave_nothing"),
    Fault(
        "export.py",
        "weight = layer.dense_weight()",
        "weight = layer.residual(torch.float32)",
        "tests/test_export.py -k layers_own",
    ),
    Fault("export.py", "return model.requires_grad_(True)", "return model", "tests/test_export.py -k take_gradients"),
    Fault(
        "export.py",
        '{"weight": weight.T if row.transposed else weight}',
        '{"weight": weight}',
        "tests/test_export.py -k layers_own",
    ),
    Fault(
        "export.py",
        'if kept.intersection(name.split(".")) and dtype.itemsize < 4 else dtype',
        "if dtype.itemsize < 4 else dtype",
        "tests/test_export.py -k bf16_by_default",
    ),
    Fault("lora.py", "left, -first.to(left)]", "left, first.to(left)]", "tests/test_lora.py -k what_training_changed"),
    Fault(
        "lora.py",
        "first @ second.T, full_matrices",
        "first @ second, full_matrices",
        "tests/test_lora.py -k what_training_changed",
    ),
    Fault("lora.py", "roots = core.S[kept].sqrt()", "roots = core.S[kept]", "tests/test_lora.py -k nearest_of_a_rank"),
    Fault(
        "lora.py", "squares[kept.stop :].sum()", "squares[: kept.stop].sum()", "tests/test_lora.py -k nearest_of_a_rank"
    ),
    Fault(
        "lora.py",
        'if base != "residual-4bit" or isinstance(error',
        'if base == "residual-4bit" or isinstance(error',
        "tests/test_lora.py -k gets_wrong",
    ),
    Fault("lora.py", "lora_alpha=commonest", "lora_alpha=2 * commonest", "tests/test_lora.py -k float32_residual"),
    Fault("lora.py", "alpha_pattern=others", "alpha_pattern={}", "tests/test_lora.py -k ranks_that_differ"),
    Fault(
        "lora.py",
        "llm_int8_skip_modules=sorted(dense)",
        "llm_int8_skip_modules=None",
        "tests/test_lora.py -k 'same_bits or targets_alone'",
    ),
    Fault(
        "lora.py",
        "if max(ranks) > _LARGEST_SERVED:",
        "if max(ranks) >= _LARGEST_SERVED:",
        "tests/test_lora.py -k beyond_what_servers",
    ),
    Fault(
        "lora.py",
        "return sorted(names if named == paths else paths)",
        "return sorted(names)",
        "tests/test_lora.py -k whose_names",
    ),
    Fault(
        "lora.py",
        'exact = base != "original" and not written.error',
        'exact = base != "original"',
        "tests/test_lora.py -k lacks_rank",
    ),
    Fault(
        "lora.py",
        "own is not None and not torch.equal(own, other.to(own.device))",
        "own is not None and own.shape != other.shape",
        "tests/test_lora.py -k start_that_is_another",
    ),
    Fault("lora.py", "lacking / norm if norm else 0.0", "lacking", "tests/test_lora.py -k 'nearest_of_a_rank or tera'"),
    Fault("card.py", "*([config.quant_type] if config.bits == 4 else [])]", "]", "tests/test_card.py -k header"),
    Fault("card.py", "if not (folder / NAME).exists():", "if True:", "tests/test_card.py -k kept"),
    Fault("card.py", "{row.stack.replace('*', '&#42;')}", "{row.stack}", "tests/test_card.py -k errors"),
    Fault(
        "card.py",
        "{row.rank} | {row.baseline_error:.4g}",
        "{row.rank} | {row.residual_error:.4g}",
        "tests/test_card.py -k errors",
    ),
    Fault("card.py", "if config.bits == 4 and config.double_quant:", "if config.bits == 4:", "tests/test_card.py"),
    Fault(
        "card.py", "file = Path(cached) if isinstance(cached, str) else file", "pass", "tests/test_card.py -k licence"
    ),
    Fault("evaluate.py", '"dtype": "auto"', '"dtype": "float16"', "tests/test_evaluate.py -k score"),
    Fault("evaluate.py", "limit=limit", "limit=None", "tests/test_evaluate.py -k score"),
    Fault("evaluate.py", "if unknown or not tasks:", "if unknown:", "tests/test_evaluate.py -k unknown"),
    Fault("checkpoints.py", 'int(path.name.split("-")[1])', "path.name", "tests/test_distributed.py -k in_parts"),
    Fault("checkpoints.py", "_sync(checkpoint)", "pass", "tests/test_checkpoints.py -k on_the_disk"),
    Fault("checkpoints.py", "_sync(folder)", "pass", "tests/test_checkpoints.py -k older_model_goes"),
    Fault(
        "checkpoints.py",
        "and not any(text in str(error)",
        "and any(text in str(error)",
        "tests/test_checkpoints.py -k stays_what_it_is",
    ),
    Fault(
        "checkpoints.py",
        "key=lambda path: path.name in _CONFIGS)",
        "key=lambda path: path.name not in _CONFIGS)",
        "tests/test_checkpoints.py -k between",
    ),
    Fault(
        "checkpoints.py",
        "rotate_checkpoints(str(run), self.args.save_total_limit, use_mtime=True)",
        "pass",
        "tests/test_checkpoints.py -k no_more_than_asked",
    ),
    Fault("checkpoints.py", "old.unlink()", "pass", "tests/test_checkpoints.py -k takes_the_place"),
    Fault(
        "finite.py",
        "if not losses.isfinite().all():",
        "if losses.isnan().any():",
        "tests/test_finite.py -k infinite_loss",
    ),
    Fault("finite.py", "{self.state.global_step + 1}", "{self.state.global_step}", "tests/test_finite.py"),
    Fault("finite.py", "        if origin is None:\n", "        if origin:\n", "tests/test_finite.py -k backwards"),
    Fault(
        "finite.py",
        "finite = _all_finite(parameter.grad for",
        "finite = all(parameter.grad for",
        "tests/test_finite.py -k gradient",
    ),
    Fault(
        "finite.py",
        "for flag in flags]).all()",
        "for flag in flags]).any()",
        "tests/test_finite.py -k one_tensor",
    ),
    Fault("finite.py", "[flag.to(flags[0].device) for flag in flags]", "flags", "tests/test_finite.py -k several"),
    Fault("finite.py", "            handle.remove()", "            pass", "tests/test_finite.py -k backwards"),
    Fault(
        "outline.py",
        "linears = sum(stack.layers * _linear",
        "linears = sum(len(stack.modules) * _linear",
        "tests/test_plan.py -k what_a_step_takes",
    ),
    Fault(
        "outline.py",
        "for block in list(blocks)[1:]",
        "for block in list(blocks)[2:]",
        "tests/test_plan.py -k differ_or_train",
    ),
    Fault("outline.py", "if seq > positions:", "if seq >= positions:", "tests/test_plan.py -k cannot_be_planned"),
    Fault("outline.py", " == 1 and not whole:", " == 1:", "tests/test_plan.py -k differ_or_train"),
    Fault(
        "outline.py",
        "self.rest_numbers * dtype.itemsize + self.rest_bytes",
        "self.rest_numbers * dtype.itemsize",
        "tests/test_plan.py -k integers",
    ),
    Fault(
        "footprint.py",
        "(segment.times - 1) * max(segment.change, 0)",
        "segment.times * max(segment.change, 0)",
        "tests/test_plan.py -k 'three_blocks'",
    ),
    Fault(
        "footprint.py",
        "ledger.begin(times if index == 2 else 1)",
        "ledger.begin(times if index == 1 else 1)",
        "tests/test_plan.py -k 'three_blocks'",
    ),
    Fault("footprint.py", "self._add(-nbytes)", "pass", "tests/test_plan.py -k 'what_a_step_takes'"),
    Fault(
        "footprint.py",
        "rows = logits.float().flatten(0, -2)",
        "rows = logits.flatten(0, -2)",
        "tests/test_plan.py -k logits_are",
    ),
    Fault(
        "footprint.py", "if training and p > 0 else x", "if training and p > 1 else x", "tests/test_plan.py -k dropout"
    ),
    Fault(
        "footprint.py",
        "summed = torch.empty_like(query, dtype=torch.float32)",
        "summed = torch.empty_like(query)",
        "tests/test_plan.py -k attention",
    ),
    Fault(
        "plan.py",
        "temporary_bytes=step.peak - step.kept - step.optimizer",
        "temporary_bytes=step.peak - step.kept",
        "tests/test_plan.py -k 'what_a_step_takes'",
    ),
    Fault("plan.py", "(last[0], most + 1)", "(last[0], most)", "tests/test_plan.py -k few_tries"),
    Fault("plan.py", "key=lambda saving: -saving[1]", "key=lambda saving: saving[1]", "tests/test_plan.py -k savings"),
    Fault(
        "plan.py", '_bytes("gpu", gpu) - _bytes', '_bytes("gpu", gpu) + _bytes', "tests/test_plan.py -k 'largest_batch'"
    ),
    Fault("plan.py", "foreach=True", "foreach=False", "tests/test_plan.py -k tokens_are_few"),
    Fault(
        "plan.py",
        "parameter.nbytes for parameter in model.parameters() if parameter.requires_grad",
        "parameter.nbytes for parameter in model.parameters()",
        "tests/test_plan.py -k 'what_a_step_takes or tied'",
    ),
    Fault("tasks.py", "[*text, *end]", "text", "tests/test_tasks.py -k blocks"),
    Fault("tasks.py", "len(ids) - length + 1, length)", "len(ids) - length, length)", "tests/test_tasks.py -k blocks"),
    Fault(
        "tasks.py",
        '{"prompt": turns[:-1], "completion"',
        '{"prompt": turns[:1], "completion"',
        "tests/test_tasks.py -k several_turns",
    ),
    Fault(
        "tasks.py", '"completion_only_loss": True', '"completion_only_loss": False', "tests/test_tasks.py -k sft_learns"
    ),
    Fault("tasks.py", 'picture.convert("RGB")', "picture", "tests/test_tasks.py -k pictures_come"),
    Fault("tasks.py", 'row.get("input")', "None", "tests/test_tasks.py -k usual_columns"),
    Fault("tasks.py", '"gpt": "assistant"', '"gpt": "user"', "tests/test_tasks.py -k 'usual_columns'"),
    Fault("tasks.py", "np.argmax(logits, axis=-1)", "np.argmin(logits, axis=-1)", "tests/test_finetune.py -k learns"),
    Fault(
        "tasks.py",
        "if model.config.num_labels != feature.num_classes:",
        "if model.config.num_labels < feature.num_classes:",
        "tests/test_finetune.py -k do_not_fit",
    ),
    Fault("distributed.py", 'if fsdp == "1":', 'if fsdp == "0":', "tests/test_distributed.py -k 'refuses_before'"),
    Fault("distributed.py", 'if zero == "3" or', "if", "tests/test_distributed.py -k 'refuses_before'"),
    Fault(
        "distributed.py",
        "torch.__version__ < (2, 12)",
        "torch.__version__ < (2, 10)",
        "tests/test_distributed.py -k needs_a_torch",
    ),
    Fault(
        "distributed.py",
        'os.environ.get(variable, "false").lower() == "true"',
        'os.environ.get(variable, "false") == "True"',
        "tests/test_distributed.py -k 'refuses_before'",
    ),
    Fault("data.py", "csv.QUOTE_NONE", "csv.QUOTE_MINIMAL", "tests/test_data.py"),
    Fault("data.py", "ordered = sorted(found)", "ordered = sorted(found, reverse=True)", "tests/test_data.py"),
    Fault(
        "data.py",
        "train_test_split(test_share, seed=seed)",
        "train_test_split(test_share)",
        "tests/test_data.py -k single",
    ),
    Fault("data.py", "tokenizer = copy.deepcopy(tokenizer)", "pass", "tests/test_moments.py -k without_pad"),
    Fault(
        "data.py",
        "min(samples, len(texts))), key=len)",
        "min(samples, len(texts))))",
        "tests/test_moments.py -k calibration",
    ),
    Fault("finetune.py", "    round_masters(model)", "    pass", "tests/test_finetune.py -k final_model"),
    Fault("finetune.py", "if resume and checkpoint is None:", "if False:", "tests/test_finetune.py -k do_not_fit"),
    Fault(
        "finetune.py",
        "if checkpoint is not None and not resume:",
        "if False:",
        "tests/test_finetune.py -k do_not_fit",
    ),
    Fault("finetune.py", "before = evaluated[0]", "before = evaluated[-1]", "tests/test_finetune.py -k resumed"),
    Fault(
        "finetune.py", "trainer.model_accepts_loss_kwargs = False", "pass", "tests/test_modes.py -k recipe_accumulates"
    ),
    Fault(
        "cli.py",
        "raise SystemExit(2) from error",
        "raise SystemExit(1) from error",
        "tests/test_cli.py -k expected_errors",
    ),
    Fault("cli.py", "torch.manual_seed(seed)", "torch.manual_seed(0)", "tests/test_cli.py -k head"),
    Fault("cli.py", "if state.is_main_process and not resume:", "if resume:", "tests/test_cli.py -k never_overwritten"),
    Fault(
        "cli.py",
        'for part in text.split(",")]',
        'for part in text.split(",")][::-1]',
        "tests/test_cli.py -k other_methods",
    ),
    Fault(
        "digests.py", 'if digest != entries[path.name]["sha256"]:', "if False:", "tests/test_digests.py -k flipped_bit"
    ),
    Fault("digests.py", "if saves and not adapter_alone", "if saves", "tests/test_digests.py"),
    Fault(
        "digests.py",
        "if is_prepared(self):\n                _remove",
        "if True:\n                _remove",
        "tests/test_digests.py -k merged_model",
    ),
    Fault("quantizer.py", "if (folder / DIGESTS).is_file():", "if False:", "tests/test_digests.py -k changed_config"),
    Fault("quantizer.py", "check_config(config)\n", "pass\n", "tests/test_digests.py -k numbers_of_the_config"),
    Fault("digests.py", "_remove_replaced(folder, before)", "pass", "tests/test_digests.py -k other_layout"),
    Fault("digests.py", 'if path.stat().st_size != entry["bytes"]:', "if False:", "tests/test_digests.py -k length"),
    Fault(
        "guard.py", "if inside.startswith(os.pardir):", "if False:", "tests/test_hostile.py -k outside_of_the_folder"
    ),
    Fault("guard.py", "if row.layers != row.layer_stack.layers:", "if False:", "tests/test_hostile.py -k rows_of_the"),
    Fault(
        "guard.py", "not codes and not torch.isfinite", "codes and not torch.isfinite", "tests/test_hostile.py -k nan"
    ),
    # What works around a trap of a library, taken away
    Fault(
        "quantizer.py",
        "freeze(model, config.modules_to_save)",
        "pass",
        "tests/test_quantizer.py -k freezes_what_was_frozen",
    ),
    Fault("quantizer.py", "check_form(model, self._expected)", "pass", "tests/test_quantizer.py -k transformers_5_0"),
    Fault(
        "quantizer.py",
        'f_locals.get("state_dict")',
        'f_locals.get("nothing")',
        "tests/test_quantizer.py -k state_dict_that_is_passed",
    ),
    Fault("quantize.py", "(blocks, fmt.block_size), kernel_dtype", "shape, kernel_dtype", "tests/test_quantize.py"),
    Fault("quantize.py", "for clip in _INT4_CLIPS:", "for clip in _INT4_CLIPS[-1:]:", "tests/test_quantize.py -k int4"),
    Fault(
        "factors.py",
        'options.get("use_reentrant") is not False',
        'options.get("use_reentrant") is None',
        "tests/test_modes.py -k reentrant",
    ),
    Fault("stack.py", "LARGEST_WEIGHT = 1e12", "LARGEST_WEIGHT = 1e39", "tests/test_properties.py -k overflow"),
    Fault("tensor.py", "if _LEAST_SQUARE < total < math.inf:", "if True:", "tests/test_properties.py -k squared_norm"),
]
