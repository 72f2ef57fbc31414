"""The kept list of defects. Add one when a wrong result was found that no test had noticed."""

from __future__ import annotations

from tests.mutants.runner import Defect

AGREEMENT = "tests/lowering/test_agreement.py::test_the_problems_reach_every_lowering"
ATTENTION = "tests/lowering/test_attention.py"
ALGEBRA = "tests/bias/test_algebra.py"
STATISTICS = "tests/observe/test_statistics.py"
KEY_SHIFT = "tests/steer/test_key_shift.py"
HUB = "tests/hub"
FOLD = "tests/lowering/test_fold.py"
DISTANCE = "tests/bias/test_distance.py"
PROMISES = "tests/bias/test_distance_promises.py"

DEFECTS: tuple[Defect, ...] = (
    # Computing
    Defect(
        "padding-ignored",
        "attnbias/lowering/problem.py",
        "keys.append(KeyBias(to_mask(term.keep)[:, None]))",
        "pass",
        (AGREEMENT,),
    ),
    Defect(
        "padding-of-batch-element-0-only",
        "attnbias/bias/padding.py",
        "return to_mask(self.keep)[:, None, None, :]",
        "return to_mask(self.keep[:1])[:, None, None, :]",
        (f"{ALGEBRA}::test_dense_is_the_matrix",),
    ),
    Defect(
        "gqa-groups-transposed",
        "attnbias/lowering/tiled.py",
        "slice(h // group, (h + together - 1) // group + 1)",
        "slice(h % key.shape[1], h % key.shape[1] + max(together // group, 1))",
        ("tests/lowering/test_agreement.py::test_with_tiny_tiles",),
    ),
    Defect(
        "key-offset-lost-in-a-window",
        "attnbias/bias/window.py",
        "offset=self.offset + rows.start - cols.start,",
        "offset=self.offset + rows.start,",
        (f"{ALGEBRA}::test_parts_keep_structure_and_offset",),
    ),
    Defect(
        "first-key-of-a-block-lost",
        "attnbias/lowering/strided.py",
        "table.storage_offset() + queries - rows[1] + cols[0],",
        "table.storage_offset() + queries - rows[1],",
        (AGREEMENT,),
    ),
    Defect(
        "causal-aligned-to-the-start",
        "attnbias/bias/window.py",
        "self.offset = keys - queries if offset is None else offset",
        "self.offset = 0 if offset is None else offset",
        (AGREEMENT,),
    ),
    Defect(
        "sink-dropped",
        "attnbias/attention.py",
        "out, lse = _with_sink(out, lse, sink)",
        "pass",
        (AGREEMENT,),
    ),
    Defect(
        "sign-of-the-bias",
        "attnbias/forms/alibi.py",
        "table = -slopes[:, None] * distance",
        "table = slopes[:, None] * distance",
        ("tests/forms/test_alibi.py::TestALiBi::test_dense_is_the_entries",),
    ),
    Defect(
        "empty-row-has-lse-zero",
        "attnbias/lowering/flash.py",
        "lse = hide_empty(raw.clone(), mask, causal)",
        "lse = raw.clone()",
        ("tests/lowering/test_empty_rows.py",),
    ),
    Defect(
        "gradient-of-lse-lost",
        "attnbias/lowering/flash.py",
        "    if grad_lse is None:\n        return grad, query, key, value, out, size",
        "    if True:\n        return grad, query, key, value, out, size",
        (AGREEMENT,),
    ),
    Defect(
        "table-kept-in-half-precision",
        "attnbias/bias/base.py",
        "return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()",
        "return tensor",
        (f"{ALGEBRA}::test_half_precision_parameters_are_kept_in_float32",),
    ),
    Defect(
        "merge-takes-the-plain-mean",
        "attnbias/attention.py",
        "weights = torch.where(seen, (safe - total).exp(), 0.0)",
        "weights = torch.where(seen, 1.0 / len(parts), 0.0).expand_as(lses)",
        (f"{ATTENTION}::test_merge_joins_disjoint_keys_with_gradients",),
    ),
    Defect(
        "t5-direction-flipped",
        "attnbias/forms/t5.py",
        "base = (distance > 0).long() * buckets",
        "base = (distance < 0).long() * buckets",
        ("tests/forms/test_t5.py::TestT5Encoder::test_dense_is_the_entries",),
    ),
    # Seeing
    Defect(
        "received-not-transposed",
        "attnbias/observe/exchange.py",
        "        return term.transpose()\n",
        "        return term\n",
        (f"{STATISTICS}::TestReceived",),
    ),
    Defect(
        "received-counts-padding-queries",
        "attnbias/observe/scene.py",
        "weight = torch.where(self.counted, -self.lse, HIDDEN)",
        "weight = torch.where(self.lse > -torch.inf, -self.lse, HIDDEN)",
        (f"{STATISTICS}::TestReceived",),
    ),
    Defect(
        "entropy-forgets-the-sink",
        "attnbias/observe/scene.py",
        "row = torch.exp(-gap) * (gap + row)",
        "row = torch.exp(-gap) * row",
        (f"{STATISTICS}::TestEntropy",),
    ),
    Defect(
        "first-token-is-slot-zero",
        "attnbias/observe/scene.py",
        "return torch.where(here.any(-1), slot, -1)",
        "return torch.full_like(slot, position)",
        (f"{STATISTICS}::TestFirstToken",),
    ),
    # Shifting
    Defect(
        "hook-left-after-an-error",
        "attnbias/hub/adapter.py",
        "    finally:\n        with LOCK:\n            for number",
        "    except ZeroDivisionError:\n        raise\n    else:\n        with LOCK:\n"
        "            for number",
        (f"{KEY_SHIFT}::TestKeyShift::test_restores_on_exit_and_on_exception",),
    ),
    Defect(
        "edit-lands-on-other-heads",
        "attnbias/steer/placing.py",
        "index[head] = own if bias.heads > 1 else 0",
        "index[own] = own if bias.heads > 1 else 0",
        (f"{KEY_SHIFT}::TestKeyShift::test_untouched_heads_are_plain",),
    ),
    Defect(
        "shift-with-the-wrong-sign",
        "attnbias/steer/rules/key_shift.py",
        "weight.masked_fill(chosen, self.strength)",
        "weight.masked_fill(chosen, -self.strength)",
        (f"{KEY_SHIFT}::TestKeyShift::test_equals_the_dense_rewrite",),
    ),
    Defect(
        "factor-added-without-its-logarithm",
        "attnbias/steer/rules/zero_tuning.py",
        "weight.masked_fill(first, math.log(self.factor))",
        "weight.masked_fill(first, self.factor - 1.0)",
        ("tests/steer/test_zero_tuning.py::TestZeroTuning::test_equals_the_dense_rewrite",),
    ),
    # Folding
    Defect(
        "folded-row-constant-not-in-the-lse",
        "attnbias/lowering/fold.py",
        "lse = lse + shift.to(lse.dtype)",
        "pass",
        (f"{FOLD}::test_row_constants_come_back_in_the_lse",),
    ),
    Defect(
        "low-parts-of-a-folded-column-dropped",
        "attnbias/lowering/columns.py",
        "for b in range(parts) if a + b < parts]",
        "for b in range(parts) if a + b < 1]",
        (f"{FOLD}::test_columns_and_what_is_left_out_make_the_bias",),
    ),
    Defect(
        "scale-forgotten-on-folded-factors",
        "attnbias/lowering/columns.py",
        "split(u / self.problem.scale, self.kind, self.parts)",
        "split(u, self.kind, self.parts)",
        (f"{FOLD}::test_row_constants_come_back_in_the_lse",),
    ),
    Defect(
        "rows-of-hidden-columns-not-empty",
        "attnbias/lowering/sums.py",
        "blind = lse < found.key.floor",
        "blind = lse == -torch.inf",
        (f"{FOLD}::test_sums_with_a_relative_bias",),
    ),
    # Distance, read by the query; neighborhoods; groups of heads
    Defect(
        "border-shift-of-a-neighborhood-dropped",
        "attnbias/bias/neighborhood.py",
        "centre = torch.minimum(leader.clamp(min=kernel // 2), count - 1 - right)",
        "centre = leader",
        ("tests/bias/test_neighborhood.py::test_every_query_sees_as_many_keys",),
    ),
    Defect(
        "skew-off-by-one",
        "attnbias/bias/query_bound.py",
        "flat = strip.flatten(-2)[..., n - 1 : n - 1 + n * (width - 1)]",
        "flat = strip.flatten(-2)[..., n : n + n * (width - 1)]",
        ("tests/bias/test_query_relative.py::test_clipped_entries_by_hand",),
    ),
    Defect(
        "query-gets-no-gradient-from-its-relative-term",
        "attnbias/bias/query_bound.py",
        "at(to_query, b, h).addmm_(strip, at(vectors, b, h))",
        "pass",
        ("tests/bias/test_query_relative.py::test_attention_binds_the_query",),
    ),
    Defect(
        "group-slopes-not-restarted",
        "attnbias/forms/penguin.py",
        "table = -slopes[None, :, None] *",
        "table = -alibi_slopes(self.heads).view(len(waves), -1, 1) *",
        ("tests/forms/test_penguin.py::TestPenguin::test_dense_is_the_entries",),
    ),
    Defect(
        "span-of-sorted-segments-one-key-short",
        "attnbias/bias/segments.py",
        "high.expand(batch, 1).contiguous(), right=True",
        "high.expand(batch, 1).contiguous(), right=False",
        ("tests/lowering/test_skipped.py::test_ids_in_any_order_and_tight_spans",),
    ),
    # Works that are more than one bias
    Defect(
        "pair-bias-of-the-ending-node-not-transposed",
        "attnbias/forms/pair.py",
        "entries = entries.mT",
        "pass",
        ("tests/forms/test_pair.py::test_triangle_attention_is_the_published_loop",),
    ),
    Defect(
        "gate-of-positions-the-wrong-way-round",
        "attnbias/forms/convit.py",
        "return (1 - share) * content + share * position",
        "return share * content + (1 - share) * position",
        ("tests/forms/test_convit.py::test_limits_of_the_gate",),
    ),
    Defect(
        "read-only-prompts-are-read",
        "attnbias/forms/prompts.py",
        "seen, carried = key[:, :, :tokens], value[:, :, :tokens]",
        "seen, carried = key, value",
        ("tests/forms/test_prompts.py::test_tokens_never_notice_the_prompts",),
    ),
    Defect(
        "a-complete-number-starts-no-pass",
        "attnbias/lowering/passes.py",
        "(when + 1, False) if whole and touches",
        "(when, False) if whole and touches",
        ("tests/lowering/test_passes.py::test_passes_are_counted",),
    ),
    Defect(
        "compiled-loops-change-the-threads-of-pytorch",
        "attnbias/native/jit.py",
        "torch.set_num_threads(threads)",
        "pass",
        ("tests/native/test_native.py::test_the_first_kernel_leaves_the_threads_of_pytorch_alone",),
    ),
    Defect(
        "a-missing-place-is-seen",
        "attnbias/bias/distance.py",
        "return torch.where(there[:, None], entries, -torch.inf)",
        "return entries",
        (f"{DISTANCE}::TestExponentialWithMissingCoordinates::test_dense_is_the_matrix",),
    ),
    Defect(
        "chord-of-the-sphere-in-float32",
        "attnbias/native/radial.py",
        "rest = 4.0 - chord",
        "rest = f(4.0) - f(chord)",
        (f"{PROMISES}::test_great_circle_near_zero_and_near_the_antipode",),
    ),
    Defect(
        "gradient-of-a-fall-forgets-the-height",
        "attnbias/native/radial.py",
        "db[task, f] -= factor * high * two",
        "db[task, f] -= factor * two",
        (f"{DISTANCE}::TestRBF::test_add_to_and_pull",),
    ),
    Defect(
        "table-of-an-older-training-step",
        "attnbias/bias/learned_radial.py",
        "-1 if p.is_inference() else p._version",
        "0",
        (f"{PROMISES}::test_a_training_step_makes_a_new_table",),
    ),
    Defect(
        "what-was-summed-before-does-not-fade",
        "attnbias/lowering/stream.py",
        "into.mul_(fade.reshape(*units, 1))",
        "pass",
        ("tests/lowering/test_normalisers.py::test_with_tiny_tiles",),
    ),
    Defect(
        "gradient-of-the-log-sum-exp-lost-in-the-tiles",
        "attnbias/lowering/backward.py",
        "delta = delta - self.grad_lse[at]",
        "delta = delta - 0 * self.grad_lse[at]",
        ("tests/lowering/test_stream.py::test_a_forward_given_to_learned_sees_no_gradients",),
    ),
    Defect(
        "gradients-of-broadcast-heads-overwritten",
        "attnbias/lowering/backward.py",
        "into.add_(step.sum_to_size(into.shape))",
        "into.copy_(step.sum_to_size(into.shape))",
        ("tests/lowering/test_stream.py::test_gradients_of_parts_reach_the_whole",),
    ),
    Defect(
        "values-see-weights-that-were-dropped",
        "attnbias/lowering/backward.py",
        "            drop(scores, keys, cols, problem.dropout)\n",
        "            pass\n",
        ("tests/lowering/test_dropout.py::test_tiling_and_route_change_nothing",),
    ),
    Defect(
        "rows-of-the-pattern-are-shifted-copies",
        "attnbias/lowering/dropout.py",
        "    x ^= two\n",
        "    x ^= 0 * two\n",
        ("tests/lowering/test_dropout.py::test_the_pattern_is_the_hash_entry_by_entry",),
    ),
    Defect(
        "one-diagonal-off",
        "attnbias/native/tables.py",
        "line[rows - 1 - i : rows - 1 - i + width]",
        "line[max(rows - 2 - i, 0) : rows - 1 - i + width]",
        ("tests/bias/test_tables.py::TestRelative::test_add_to_and_pull",),
    ),
    Defect(
        "grids-of-queries-and-keys-exchanged",
        "attnbias/bias/grid.py",
        "            n, m = rows.size[dim], cols.size[dim]\n",
        "            m, n = rows.size[dim], cols.size[dim]\n",
        ("tests/bias/test_grid.py::TestPlane::test_dense_is_the_matrix",),
    ),
    Defect(
        "line-of-a-grid-one-key-too-wide",
        "attnbias/lowering/grid.py",
        "    return width * (bias.rows.stride",
        "    return (width + 1) * (bias.rows.stride",
        ("tests/lowering/test_grid.py::test_gradients",),
    ),
    Defect(
        "class-token-row-forgotten",
        "attnbias/lowering/grid.py",
        "    if over:\n",
        "    if over < 0:\n",
        ("tests/lowering/test_grid.py::test_gradients",),
    ),
    Defect(
        "windows-at-the-edge-take-the-mask-of-the-first",
        "attnbias/lowering/windows.py",
        "    return list(order), [order[at] for at in which]",
        "    return list(order), [0 for at in which]",
        ("tests/lowering/test_grid.py::test_kinds_of_windows_in_any_order",),
    ),
    # Benchmarks
    Defect(
        "goal-holds-whatever-its-worst-cell",
        "benchmarks/structure_goals.py",
        "and worst <= WORST * goal.limit",
        "and worst > 0",
        (
            "tests/benchmarks/test_structures.py::test_a_goal_holds_by_its_share_of_cells_and_its_worst",
        ),
    ),
    Defect(
        "goal-held-by-wrong-answers",
        "benchmarks/structure_goals.py",
        '        and not any(cell["wrong"] for cell in cells)\n',
        "",
        (
            "tests/benchmarks/test_structures.py::test_a_goal_falls_short_where_a_cell_is_wrong_failed_or_missing",
        ),
    ),
    Defect(
        "gradient-that-never-came-is-no-error",
        "benchmarks/structures.py",
        "slopes[name] = 1e30  # a gradient that never came",
        "pass",
        (
            "tests/benchmarks/test_structures.py::test_a_gradient_that_is_wrong_or_never_came_is_an_error",
        ),
    ),
    # Hidden states
    Defect(
        "register-of-image-0-for-all",
        "attnbias/steer/rules/test_time_registers.py",
        "self.scale * every.gather(1, largest)",
        "self.scale * every.gather(1, largest)[:1]",
        ("tests/steer/test_test_time_registers.py",),
    ),
    Defect(
        "registers-silence-cls",
        "attnbias/steer/rules/test_time_registers.py",
        "patches = slice(self.prefix, site.length)",
        "patches = slice(0, site.length)",
        (
            "tests/steer/test_test_time_registers.py::test_cls_keeps_its_activations_and_the_register_takes_the_rest",
        ),
    ),
    Defect(
        "added-tokens-in-recorded-states",
        "attnbias/steer/doors.py",
        "one.shape[1] == longer",
        "False",
        ("tests/steer/test_hidden.py::test_added_tokens_are_seen_and_gone",),
    ),
    Defect(
        "recorded-states-before-the-edit",
        "attnbias/steer/doors.py",
        "module.register_forward_hook(_after, with_kwargs=True, prepend=True)",
        "module.register_forward_hook(_after, with_kwargs=True)",
        ("tests/steer/test_hidden.py::test_recorded_states_are_the_edited_ones",),
    ),
    Defect(
        "any-layer-passes-for-a-sum",
        "attnbias/steer/stream.py",
        "if not off <= close * float(wanted.abs().max()):",
        "if False:",
        ("tests/steer/test_hidden.py::test_a_layer_that_is_no_sum_is_refused",),
    ),
    Defect(
        "turned-states-of-length-one",
        "attnbias/steer/rules/vti.py",
        "return normalize(turned, dim=-1) * length",
        "return normalize(turned, dim=-1)",
        ("tests/steer/test_vti.py::test_lengths_stay_and_a_direction_per_token_is_taken",),
    ),
    Defect(
        "persona-on-padding",
        "attnbias/steer/rules/persona_vector.py",
        "chosen = (order == site.last[:, None])[..., None]",
        "chosen = (order == hidden.shape[1] - 1)[None, :, None]",
        ("tests/steer/test_persona_vector.py::test_tokens_of_prompt_and_response",),
    ),
)
