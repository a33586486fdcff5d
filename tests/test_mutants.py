"""The mutation gate: known bugs of training stacks, planted one at a time in a copy, and the test that must see each.

Most change a loss curve by less than noise (mean-of-means accumulation: 1.5e-4 at the first step) and gradients by
half. A mutant that survives is a missing test.
"""

import multiprocessing
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOREIGN = 64  # exit code of a run that did not import the copy
pytestmark = pytest.mark.slow

COLLECTIVES, LAYERS, LOSS = (f"tensor_parallel/{room}.py" for room in ("collectives", "layers", "loss"))
ENGINE, LOOP, MODEL, OPTIM = "engine/torch_engine.py", "train.py", "model.py", "optim.py"
LATE = {"watch = Stopwatch()": "watch, late = Stopwatch(), run.step > 0"}  # late: 1 in a run that was resumed

TP2 = "tests/tensor_parallel/test_parity.py::test_an_odd_vocabulary_on_two_ranks_is_one_process_to_twelve_digits[tp2]"
SP2 = TP2.replace("[tp2]", "[tp2+sp]")
HF = "tests/test_hf.py::"
LOGITS, EXPORT = f"{HF}test_logits_are_hugging_faces", f"{HF}test_out_and_in_again_is_bitwise_by_way_of_transformers"
FP64 = f"{HF}test_logits_in_fp64_are_hugging_faces_to_ten_digits[mha]"
RESUME = "tests/test_train.py::test_resume_is_bitwise_at_any_cut[4]"
BATCHES = "tests/test_train.py::test_ranks_and_micro_batches_do_not_change_the_gradient"
ZERO = "tests/test_zero.py::test_slices_updated_by_three_ranks_are_adamw_on_the_whole"


@dataclass(frozen=True)
class Mutant:
    """A bug: each text, found once in megatron_lite/<file>, becomes another; ``killer`` is the test that must fail."""

    name: str
    file: str
    edits: dict[str, str]
    killer: str


MUTANTS = [
    # tensor and sequence parallelism
    Mutant(
        "column-parallel backward without its all-reduce",
        COLLECTIVES,
        {"return all_reduce(grad, ctx.tp), None": "return grad, None"},
        TP2,
    ),
    Mutant(
        "row-parallel forward without its all-reduce",
        LAYERS,
        {"return leave_region(F.linear(x, self.weight), self.tp)": "return F.linear(x, self.weight)"},
        TP2,
    ),
    Mutant(
        "vocabulary-parallel embedding without its all-reduce",
        LAYERS,
        {"leave_region(x_BTD.masked_fill(foreign_BT[..., None], 0), self.tp)": "x_BTD"},
        TP2,
    ),
    Mutant(
        "vocabulary-parallel loss without its all-reduce",
        LOSS,
        {"all_reduce(torch.stack((total * factor, at_label)), tp)": "total * factor, at_label"},
        TP2,
    ),
    Mutant(
        "vocabulary-parallel loss over each rank's own maximum",
        LOSS,
        {"top = all_reduce(largest, tp, dist.ReduceOp.MAX)": "top = largest"},
        TP2,
    ),
    Mutant(
        "padded vocabulary rows take probability",
        LAYERS,
        {"return self.weight[: self.shard.valid_size(self.tp)] if self.shard.padding else": "return"},
        TP2,
    ),
    Mutant("packed q, k, v cut as one chunk", LAYERS, {"Shard(0, tuple(parts))": "Shard(0, (sum(parts),))"}, TP2),
    Mutant(
        "gradients of norms not summed under sequence parallelism",
        COLLECTIVES,
        {"cast(Tensor, _Copy.apply(param, tp)) if tp.sequence_parallel else param": "param"},
        SP2,
    ),
    Mutant("gradient norm of one rank's slices", OPTIM, {"dist.all_reduce(squares, group=tp.group)": "pass"}, TP2),
    Mutant(
        "replicated parameters counted by every rank in the gradient norm",
        OPTIM,
        {"total_norm(sliced)": "total_norm([p.grad for p, _ in with_grad])", "total_norm(whole)": "total_norm([])"},
        TP2,
    ),
    Mutant(
        "slices joined as plain chunks",
        "tensor_parallel/shards.py",
        {"[part // len(pieces) for part in self._padded()]": "[sum(self._padded()) // len(pieces)]"},
        "tests/tensor_parallel/test_shards.py::test_join_undoes_slice_and_every_element_is_held_once",
    ),
    # the step: accumulation, data parallelism, masks, clipping
    Mutant(
        "mean of micro-batch means",
        ENGINE,
        {"self.mesh.dp_size / num_loss_tokens": "self.mesh.dp_size / len(micro_batches) / batch.loss_mask_BT.sum()"},
        f"{BATCHES}[1-2]",
    ),
    Mutant(
        "data-parallel gradients averaged twice",
        ENGINE,
        {"self.mesh.dp_size / num_loss_tokens": "1 / num_loss_tokens"},
        f"{BATCHES}[2-4]",
    ),
    Mutant(
        "data-parallel gradients never reduced",
        ENGINE,
        {"if last or self.mesh.dp_size == 1": "if self.mesh.dp_size == 1"},
        f"{BATCHES}[2-4]",
    ),
    Mutant(
        "data-parallel ranks with the same samples",
        "data/loader.py",
        {"order[:, dp_rank]": "order[:, 0]"},
        "tests/data/test_loader.py::test_global_samples_do_not_depend_on_the_layout[1-2]",
    ),
    Mutant(
        "loss mask ignored",
        ENGINE,
        {"labels_BT, weights_BT, Documents": "labels_BT, torch.ones_like(weights_BT), Documents"},
        "tests/test_train.py::test_the_gradient_is_that_of_the_masked_mean",
    ),
    Mutant(
        "clipping ignored",
        OPTIM,
        {"limit = clip_grad if clip_grad > 0 else math.inf": "limit = math.inf"},
        "tests/test_train.py::test_what_reaches_adamw_is_clipped_to_the_global_norm",
    ),
    Mutant(
        "a non-finite gradient is applied",
        ENGINE,
        {"skipped = not math.isfinite(norm)": "skipped = False"},
        "tests/test_train.py::test_a_non_finite_gradient_stops_before_the_update",
    ),
    Mutant(
        "weight decay on norms",
        OPTIM,
        {'"weight_decay": 0.0}': '"weight_decay": weight_decay}'},
        "tests/test_shape.py::test_weight_decay_reaches_every_matrix_and_no_norm",
    ),
    Mutant(
        "AdamW's betas ignored",
        OPTIM,
        {"betas=config.betas, eps=config.eps, fused=True": "eps=config.eps, fused=True"},
        f"{HF}test_twenty_adamw_steps_are_hugging_faces_under_torchs_adamw[mha]",
    ),
    Mutant(
        "warm-up one step late",
        OPTIM,
        {"lr * (step + 1) / schedule.warmup_steps": "lr * step / schedule.warmup_steps"},
        "tests/test_plan.py::test_learning_rate_table",
    ),
    Mutant(
        "ZeRO-1 shares one bucket too few",
        "engine/zero.py",
        {"in _buckets(self.slices):": "in list(_buckets(self.slices))[1:]:"},
        f"{ZERO}[False]",
    ),
    Mutant(
        "ZeRO-1 loads the first rank's moments",
        "engine/zero.py",
        {"else self._mine(tensor)": "else tensor.reshape(-1)[: self._width(tensor)]"},
        f"{ZERO}[True]",
    ),
    # the model
    Mutant(
        "RMSNorm's epsilon is 1e-6",
        MODEL,
        {"self.eps, self.tp, self.multiplier = eps, tp": "self.eps, self.tp, self.multiplier = 1e-6, tp"},
        FP64,
    ),
    Mutant(
        "RMSNorm's epsilon added to the root",
        MODEL,
        {
            "F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), self.eps)": "x * weight.to(x.dtype)"
            " / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)"
        },
        FP64,
    ),
    Mutant(
        "muP with one learning rate for all",
        OPTIM,
        {'lr * group.get("lr_scale", 1.0)': "lr"},
        "tests/test_mup.py::test_under_mup_activations_do_not_depend_on_the_width",
    ),
    Mutant(
        "muP without the factor of the logits",
        MODEL,
        {"self.tp, 1 / shape.mup_width)": "self.tp)"},
        "tests/test_mup.py::test_under_mup_activations_do_not_depend_on_the_width",
    ),
    Mutant(
        "a row's weight is ignored",
        ENGINE,
        {"mask_BT * batch.weight_B.to(device)[:, None]": "mask_BT.float()"},
        "tests/regmix_search/test_group_dro.py::test_the_gradient_is_that_of_the_objective",
    ),
    Mutant(
        "excess is not clipped",
        "engine/__init__.py",
        {"batch.reference_BT)).clamp_min(0)": "batch.reference_BT))"},
        "tests/regmix_search/test_group_dro.py::test_two_pass_is_algorithm_1",
    ),
    Mutant(
        "loss by domain of the last micro-batch alone",
        "engine/__init__.py",
        {"by_domain += sums": "by_domain[:] = sums"},
        "tests/test_domain_loss.py::test_lines_have_the_domains_of_their_step_and_add_up_to_the_loss",
    ),
    Mutant(
        "RoPE in interleaved pairs",
        "attention.py",
        {"x_BHTK.chunk(2, dim=-1)": "(x_BHTK[..., 0::2], x_BHTK[..., 1::2])"},
        f"{LOGITS}[mha]",
    ),
    Mutant("rope_theta ignored", MODEL, {"shape.rope_theta": "10000.0"}, f"{LOGITS}[theta]"),
    Mutant("RoPE scaling ignored", MODEL, {'"cpu", shape.rope_scaling': '"cpu", None'}, f"{LOGITS}[llama3]"),
    Mutant(
        "GQA groups swapped in one layer",
        MODEL,
        {
            "        self.norm = RMSNorm(": "        self.blocks[-1].attention.qkv.register_forward_hook(\n"
            "            lambda m, x, out: torch.cat((out[..., :D].roll(D // 2, -1), out[..., D:]), -1)\n"
            "        )\n"
            "        D = shape.hidden_size\n"
            "        self.norm = RMSNorm("
        },
        f"{LOGITS}[gqa]",
    ),
    Mutant(
        "tied embeddings without the head's gradient",
        MODEL,
        {
            "labels_N, head_VD = labels_BT.flatten(), self.head.valid_weight": "labels_N = labels_BT.flatten()\n"
            "        head_VD = self.head.valid_weight.detach() if self.shape.tie_embeddings else self.head.valid_weight"
        },
        f"{HF}test_loss_and_every_gradient_are_hugging_faces[tied]",
    ),
    Mutant(
        "causal mask off",
        "attention.py",
        {"is_causal=True": "is_causal=False"},
        "tests/test_model.py::test_no_token_sees_the_future",
    ),
    Mutant(
        "document mask ignored",
        "attention.py",
        {"if documents.cu_seqlens is None:": "if True:"},
        "tests/test_attention.py::test_a_document_leaks_into_no_other",
    ),
    Mutant(
        "positions not reset",
        MODEL,
        {"if places is not None:": "if False:"},
        "tests/test_attention.py::test_hidden_states_and_gradients_are_those_of_eager_attention",
    ),
    Mutant(
        "every parameter drawn from one generator",
        "rng.py",
        {'"init", param_name': '"init"'},
        "tests/test_model.py::test_initialisation_depends_on_seed_and_name_alone",
    ),
    Mutant(
        "the last chunk of rows without a gradient of the head",
        LOSS,
        {
            "if compute == grad_head_VD.dtype:": "if start + size >= len(h_ND) > size:\n"
            "            continue\n"
            "        if compute == grad_head_VD.dtype:"
        },
        "tests/test_kernels.py::test_losses_and_gradients_equal_cross_entropy",
    ),
    Mutant(
        "muP without its learning rate for hidden matrices",
        OPTIM,
        {"return None if mup_width == 1 else 1 / mup_width": "return None"},
        "tests/test_mup.py::test_groups_carry_the_scale_and_keep_the_decay_of_a_step",
    ),
    Mutant(
        "muP without its output multiplier",
        MODEL,
        {"self.tp, 1 / shape.mup_width)": "self.tp)"},
        "tests/test_mup.py::test_multipliers_and_starts_are_those_of_table_8",
    ),
    # exports
    Mutant("an export says 1e-6", "hf_config.py", {'_eps": shape.norm_eps': '_eps": 1e-6'}, f"{EXPORT}[mha]"),
    Mutant(
        "an export swaps keys and values",
        "hf.py",
        {'{"q": q}.get(n, kv)) for n in "qkv"]': '{"q": q}.get(n, kv)) for n in "qvk"]'},
        f"{EXPORT}[mha]",
    ),
    # resume and evaluation
    Mutant("resume without optimizer state", "run.py", {"run.engine.load_state_dict(optim)": "pass"}, RESUME),
    Mutant(
        "resume without AdamW's step count",
        OPTIM,
        {'"step": state["step"].clone()': '"step": torch.zeros(())'},
        RESUME,
    ),
    Mutant(
        "resume with the data of one step before", LOOP, {**LATE, "step(run.step)": "step(run.step - late)"}, RESUME
    ),
    Mutant(
        "resume with the learning rate of one step before",
        LOOP,
        {**LATE, "learning_rate(run.step,": "learning_rate(run.step - late,"},
        RESUME,
    ),
    Mutant(
        "checksums not compared",
        "checkpoint.py",
        {"elif _digest(path / name) != expected.get(name):": "elif False:"},
        "tests/test_checkpoint.py::test_damage_is_named_and_auto_falls_back",
    ),
    Mutant(
        "held-out loss is a mean of batch means",
        "evaluate.py",
        {"mask_BT).sum(), mask_BT.sum())": "mask_BT).sum() / mask_BT.sum(), torch.tensor(1.0).double())"},
        "tests/test_evaluate.py::test_loss_and_bits_per_byte_by_hand",
    ),
]


def copy_tree(folder: Path) -> Path:
    """What the killing tests need, sources and compiled kernels, without bytecode of what will be replaced."""
    for name in ("megatron_lite", "regmix_search", "launch", "data_tools", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    # ranks are forked from the process that has torch already: seconds less for each mutant
    replace_once(folder / "megatron_lite" / "testing.py", 'get_context("spawn")', 'get_context("fork")')
    return folder


def replace_once(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path}: {old!r} is there {text.count(old)} times: the mutant must follow the code"
    path.write_text(text.replace(old, new), encoding="utf-8")


def run_pytest(folder: str, root: str, tests: list[str], log: str) -> None:
    """In a process of its own: the tests of the copy; its exit code is pytest's."""
    sys.path[:] = [folder, *(p for p in sys.path if Path(p or ".").resolve() != Path(root) and "tests" not in p)]
    for name in [n for n in sys.modules if n.partition(".")[0] in ("megatron_lite", "tests", "conftest")]:
        del sys.modules[name]
    os.environ["PYTHONPATH"] = folder
    sys.dont_write_bytecode = True
    os.chdir(folder)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = pytest.main(["-x", "-q", "-n0", "-p", "no:cacheprovider", "-m", "", f"--basetemp={folder}/tmp", *tests])
    import megatron_lite

    ours = Path(megatron_lite.__file__).is_relative_to(folder)
    sys.stdout.flush()
    os._exit(int(code) if ours else FOREIGN)


def exit_code(folder: Path, tests: list[str], seconds: float = 120) -> tuple[int | None, str]:
    """Pytest's exit code on the copy (None: it hung), and what it printed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pytest", "torch", "hypothesis", "safetensors.torch", "transformers.models.llama.modeling_llama"]
    )
    log = folder / "log"
    process = context.Process(target=run_pytest, args=(str(folder), str(ROOT), tests, str(log)))
    process.start()
    process.join(seconds)
    code = process.exitcode
    process.kill()
    return code, log.read_text() if log.is_file() else "nothing was printed"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_known_bug_is_seen(tmp_path, mutant):
    copy = copy_tree(tmp_path)
    for old, new in mutant.edits.items():
        replace_once(copy / "megatron_lite" / mutant.file, old, new)
    code, log = exit_code(copy, [mutant.killer])
    assert code == 1, f"{mutant.name}: exit code {code}, not that of a failed test, of {mutant.killer}\n{log[-3000:]}"


def test_without_a_bug_every_killing_test_passes(tmp_path):
    code, log = exit_code(copy_tree(tmp_path), sorted({mutant.killer for mutant in MUTANTS}), 300)
    assert code == 0, log[-3000:]
