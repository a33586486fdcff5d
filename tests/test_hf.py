"""Against Hugging Face's Llama: logits, gradients, an optimizer's path, folders out and in, and what is refused."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import megatron_lite.hf as hf
import megatron_lite.model as model_module
from data_tools.tokenizer import load_tokenizer
from data_tools.train_tokenizer import train_tokenizer
from launch.export import main, read_tokenizer
from megatron_lite.config import ModelConfig, OptimConfig, RopeScaling
from megatron_lite.hf import export_hf, import_hf, verify_export
from megatron_lite.model import GPT
from megatron_lite.optim import build_optimizer, param_groups
from megatron_lite.shape import resolve_shape
from megatron_lite.testing import tiny_config, write_tiny_shards
from megatron_lite.train import train
from megatron_lite.weights import read_weights

transformers = pytest.importorskip("transformers", reason="needs transformers, the reference implementation")
from transformers.models.llama import modeling_llama  # noqa: E402

VOCAB, T = 300, 64
# of 8 frequencies at theta 1e4, an original context of 32 leaves 2 alone, stretches 4 fully and interpolates 2
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
VARIANTS = {
    "mha": {}, "gqa": {"num_heads": 8, "num_kv_heads": 2}, "mqa": {"num_kv_heads": 1}, "tied": {"tie_embeddings": True},
    "theta": {"rope_theta": 5e5}, "eps": {"norm_eps": 1e-6}, "llama3": {"rope_scaling": SCALING},
    "all": {"num_kv_heads": 2, "tie_embeddings": True, "rope_theta": 5e5, "norm_eps": 1e-6, "rope_scaling": SCALING},
}  # fmt: skip
variants = pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS)


def build(scale: float = 1.0, vocab_size: int = VOCAB, **kwargs) -> GPT:
    """A small model with matrices scaled and norms moved from 1, so that a lost weight is seen."""
    sizes = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "ffn_hidden_size": 96} | kwargs
    model = GPT(resolve_shape(ModelConfig(**sizes), T, vocab_size), seed=3)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.mul_(scale if param.dim() > 1 else 1.0)
            if "norm" in name:
                param.add_(torch.linspace(-0.3, 0.3, param.numel()))
    return model


def weights(model: GPT) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def split(s, ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors by Hugging Face's names, written down here a second time: the package's own table is under test."""
    kv = s.num_kv_heads * s.head_dim
    out = {"model.embed_tokens.weight": ours["embedding.weight"], "model.norm.weight": ours["norm.weight"]}
    out["lm_head.weight"] = ours["embedding.weight" if s.tie_embeddings else "head.weight"]
    for i in range(s.num_layers):
        a, b = f"model.layers.{i}.", f"blocks.{i}."
        q, k, v = ours[b + "attention.qkv.weight"].split([s.hidden_size, kv, kv])
        gate, up = ours[b + "mlp.gate_up.weight"].chunk(2)
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        out |= {f"{a}{n}.weight": w for n, w in zip(names, (q, k, v, gate, up), strict=True)}
        out[a + "self_attn.o_proj.weight"] = ours[b + "attention.out.weight"]
        out[a + "mlp.down_proj.weight"] = ours[b + "mlp.down.weight"]
        out[a + "input_layernorm.weight"] = ours[b + "attention_norm.weight"]
        out[a + "post_attention_layernorm.weight"] = ours[b + "mlp_norm.weight"]
    return {name: tensor.detach().clone() for name, tensor in out.items()}


def llama(model: GPT):
    """The same weights in transformers' LlamaForCausalLM, without any code of hf.py."""
    s = model.shape
    rope = {"rope_type": "default", "rope_theta": s.rope_theta}
    if s.rope_scaling:
        rope |= {"rope_type": "llama3", **vars(s.rope_scaling)}
    config = transformers.LlamaConfig(
        vocab_size=s.vocab_size, hidden_size=s.hidden_size, intermediate_size=s.ffn_hidden_size,
        num_hidden_layers=s.num_layers, num_attention_heads=s.num_heads, num_key_value_heads=s.num_kv_heads,
        rms_norm_eps=s.norm_eps, rope_parameters=rope, tie_word_embeddings=s.tie_embeddings,
        max_position_embeddings=s.seq_length, attn_implementation="eager",
    )  # fmt: skip
    reference = transformers.LlamaForCausalLM(config)
    reference.load_state_dict(split(s, weights(model)))
    return reference.to(next(model.parameters()).dtype)


def make_exact(reference, s, monkeypatch):
    """Hugging Face's own code in fp64: it sums norms and softmax in fp32 and rounds angles to fp32, whatever the model.

    Tables are worked out exactly and rounded once to fp32, as ours are; the frequencies are the paper's, one by one.
    """

    def frequency(i: int) -> float:
        f = s.rope_theta ** (-2 * i / s.head_dim)
        if not (c := s.rope_scaling):
            return f
        wavelength, context = 2 * math.pi / f, c.original_max_position_embeddings
        if wavelength < context / c.high_freq_factor:
            return f
        if wavelength > context / c.low_freq_factor:
            return f / c.factor
        smooth = (context / wavelength - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor)
        return (1 - smooth) * f / c.factor + smooth * f

    def tables(x, position_ids):
        inverse = torch.tensor([frequency(i) for i in range(s.head_dim // 2)] * 2, dtype=torch.float64)
        angle = position_ids[..., None].double() * inverse
        return angle.cos().float().double(), angle.sin().float().double()

    class Wide:
        float32 = torch.float64

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr(modeling_llama, "torch", Wide())
    monkeypatch.setattr(reference.model.rotary_emb, "forward", tables)


def sample(rows: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, T + 1), generator=torch.Generator().manual_seed(seed))


@variants
@torch.no_grad()
def test_logits_are_hugging_faces(kwargs):
    model = build(scale=2.0, **kwargs)
    ours, theirs = model.logits(sample()[:, :-1]), llama(model)(sample()[:, :-1]).logits
    assert theirs.std() > 0.8  # logits near zero would agree whatever the model did
    assert (ours - theirs).abs().max() <= 1e-4
    p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    assert (p.exp() * (p - q)).sum(-1).abs().max() <= 1e-8
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@variants
@torch.no_grad()
def test_logits_in_fp64_are_hugging_faces_to_ten_digits(kwargs, monkeypatch):
    model = build(scale=5.0, **kwargs).double()
    reference = llama(model)
    make_exact(reference, model.shape, monkeypatch)
    ours, theirs = model.logits(sample()[:, :-1]), reference(sample()[:, :-1]).logits
    assert theirs.dtype == torch.float64 and (ours - theirs).abs().max() <= 1e-10


@variants
def test_loss_and_every_gradient_are_hugging_faces(kwargs):
    model = build(scale=2.0, **kwargs)
    reference, tokens = llama(model), sample()
    loss = model(tokens[:, :-1], tokens[:, 1:]).mean()
    loss.backward()
    theirs = reference(tokens, labels=tokens).loss
    theirs.backward()
    assert abs(loss.item() - theirs.item()) <= 1e-6
    expected = {name: param.grad for name, param in reference.named_parameters()}
    ours = split(model.shape, {name: param.grad for name, param in model.named_parameters()})
    assert set(expected) == set(ours) - ({"lm_head.weight"} if model.shape.tie_embeddings else set())
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("kwargs", [VARIANTS["mha"], VARIANTS["all"]], ids=["mha", "all"])
def test_twenty_adamw_steps_are_hugging_faces_under_torchs_adamw(kwargs):
    model = build(**kwargs)
    reference = llama(model)
    config = OptimConfig(lr=1e-3)
    optimizer = build_optimizer(param_groups(model, config.weight_decay), config)
    groups = [{"params": [p for n, p in reference.named_parameters() if "norm" not in n], "weight_decay": 0.1}]
    groups += [{"params": [p for n, p in reference.named_parameters() if "norm" in n], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    for step in range(20):
        tokens = sample(4, step)
        loss, expected = model(tokens[:, :-1], tokens[:, 1:]).mean(), reference(tokens, labels=tokens).loss
        assert abs(loss.item() - expected.item()) <= 1e-5, step
        for value, optim in ((loss, optimizer), (expected, theirs)):
            optim.zero_grad()
            value.backward()
            optim.step()
    ours = split(model.shape, weights(model))
    for name, param in reference.named_parameters():
        assert (ours[name] - param).norm() <= 1e-5 * param.norm(), name


def tokenizer_of(folder: Path, kind: str) -> Path:
    text = ["".join(chr(97 + (i * j) % 26) for j in range(60)) + " the cat and the dog" for i in range(200)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in text), encoding="utf-8")
    return train_tokenizer([folder / "text.jsonl"], VOCAB, folder / kind, kind)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return tokenizer_of(tmp_path_factory.mktemp("tokenizer"), "hf")


def files(tokenizer: Path) -> hf.TokenizerFiles:
    return read_tokenizer(str(tokenizer), SimpleNamespace(tokenizer={}, source="nowhere"))


@variants
def test_out_and_in_again_is_bitwise_by_way_of_transformers(tmp_path, tokenizer, kwargs):
    model = build(vocab_size=VOCAB + 20, **kwargs)  # rows beyond the tokenizer's are padding
    difference = export_hf(weights(model), model.shape, tmp_path / "out", files(tokenizer))
    assert difference is not None and difference <= 1e-5
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.vocab_size == VOCAB == loaded.get_input_embeddings().weight.shape[0]
    loaded.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    for folder in ("out", "theirs"):  # transformers 4's form of RoPE and 5's, one file and many
        tensors, _ = import_hf(tmp_path / folder)
        assert set(tensors) == {name for name, _ in model.named_parameters()}
        for name, param in model.named_parameters():
            rows = VOCAB if name in ("embedding.weight", "head.weight") else None
            assert torch.equal(tensors[name], param[:rows]), name
        shape = read_weights(tmp_path / folder).shape
        assert {**vars(shape), "vocab_size": VOCAB + 20} == vars(model.shape)
    assert load_tokenizer(tmp_path / "out").sha256 == load_tokenizer(tokenizer).sha256


@torch.no_grad()
def test_an_export_generates_and_scores_as_ours_does(tmp_path, tokenizer):
    model = build(scale=2.0, **VARIANTS["all"])
    export_hf(weights(model), model.shape, tmp_path / "out", files(tokenizer), verify=False)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    names = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    eod = load_tokenizer(tokenizer).eod_id
    assert (names.bos_token_id, names.eos_token_id, loaded.config.pad_token_id) == (eod, eod, None)
    config = loaded.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (eod, eod, eod)
    ids = torch.tensor([names("the cat and the")["input_ids"]])
    assert ids[0].tolist() == load_tokenizer(tokenizer).encode_batch(["the cat and the"])[0]  # no BOS, no EOS
    theirs, ours = loaded.generate(ids, max_new_tokens=32, do_sample=False), ids
    while ours.shape[1] < theirs.shape[1]:
        ours = torch.cat((ours, model.logits(ours)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(ours, theirs) and theirs.shape[1] == ids.shape[1] + 32
    generator, training = random.Random(1), load_tokenizer(tokenizer)
    for _ in range(50):
        context, continuation = (" ".join(generator.choices(WORDS, k=generator.randint(1, 6))) for _ in range(2))
        whole, start = harness_ids(lambda text: names(text)["input_ids"], context, f" {continuation}")
        assert (whole, start) == harness_ids(lambda text: training.encode_batch([text])[0], context, f" {continuation}")
        item = torch.tensor([whole])
        score = -model(item[:, :-1], item[:, 1:])[:, start - 1 :].sum()
        logits = loaded(item[:, :-1]).logits[:, start - 1 :]
        expected = logits.log_softmax(-1).gather(2, item[:, start:, None]).sum()
        assert abs(score - expected) <= 1e-4 and expected < -1
        ours = model.logits(item[:, :-1])[:, start - 1 :].argmax(-1)
        assert torch.equal(ours, logits.argmax(-1)), "is_greedy would differ"


WORDS = ["the", "cat", "and", "dog", "abcdef", "zebra", "on", "a", "mat,", "quick"]


def harness_ids(encode, context: str, continuation: str) -> tuple[list[int], int]:
    """Ids of both and where the continuation begins, as lm-evaluation-harness's `_encode_pair` has it."""
    blanks = len(context) - len(context.rstrip())
    if blanks:  # spaces go over to the continuation
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    whole = encode(context + continuation)
    return whole, len(encode(context))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_import_reads_half_precision_and_our_bf16_is_transformers(tmp_path, dtype):
    model = build(num_kv_heads=2)
    llama(model).to(dtype).save_pretrained(tmp_path / "theirs")
    tensors, _ = import_hf(tmp_path / "theirs")
    for name, param in model.named_parameters():
        assert tensors[name].dtype == torch.float32 and torch.equal(tensors[name], param.to(dtype).float()), name
    if dtype == torch.bfloat16:
        assert export_hf(weights(model), model.shape, tmp_path / "ours", dtype="bf16") <= 1e-5
        theirs, ours = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "ours"))
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[n], ours[n]) for n in ours)


def test_large_exports_are_split_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD_BYTES", 100_000)
    model = build()
    assert export_hf(weights(model), model.shape, tmp_path / "out") <= 1e-5  # transformers follows the index
    parts = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(parts) > 2 and parts[0].name == f"model-00001-of-{len(parts):05d}.safetensors"
    assert all(sum(t.nbytes for t in load_file(part).values()) <= 100_000 for part in parts)
    tensors, _ = import_hf(tmp_path / "out")
    assert all(torch.equal(tensors[name], param) for name, param in model.named_parameters())


def swap_groups(model: GPT) -> None:
    """Query heads 0 and 1 of one layer trade places with 2 and 3: each then reads the other group's keys."""
    qkv = model.blocks[1].attention.qkv.weight.data
    quarter = model.shape.head_dim * 2
    qkv[: 2 * quarter] = torch.cat((qkv[quarter : 2 * quarter], qkv[:quarter]))


def rms_plus_eps(self, x):
    return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps) * self.weight


def interleaved(x_BHTK, cos_TK, sin_TK):
    first, second = x_BHTK[..., 0::2], x_BHTK[..., 1::2]
    return torch.stack((first * cos_TK - second * sin_TK, second * cos_TK + first * sin_TK), -1).flatten(-2)


@pytest.mark.parametrize("mutant", ["none", "eps", "eps outside", "interleaved", "theta", "scaling", "groups"])
def test_verification_sees_what_conversions_get_wrong(tmp_path, monkeypatch, mutant):
    model = build(num_kv_heads=2)
    config = {"eps": {"rms_norm_eps": 1e-6}, "theta": {"rope_theta": 11000.0}}
    config["scaling"] = {"rope_scaling": {"rope_type": "llama3", **vars(RopeScaling())}}
    export_hf(weights(model), model.shape, tmp_path / "out", verify=False)
    raw = json.loads((tmp_path / "out" / "config.json").read_text()) | config.get(mutant, {})
    (tmp_path / "out" / "config.json").write_text(json.dumps(raw))
    if mutant == "groups":
        swap_groups(model)
    if mutant == "eps outside":
        monkeypatch.setattr(model_module.RMSNorm, "forward", rms_plus_eps)
    if mutant == "interleaved":
        monkeypatch.setattr(model_module, "apply_rope", interleaved)
    if mutant == "none":
        assert verify_export(tmp_path / "out", weights(model), model.shape) <= 1e-5
        return
    with pytest.raises(ValueError, match="logits differ from ours"):
        verify_export(tmp_path / "out", weights(model), model.shape)


REFUSED = [
    ({"attention_bias": True}, "attention_bias=True"),
    ({"mlp_bias": True}, "mlp_bias=True"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"model_type": "qwen2"}, "model_type='qwen2'"),
    ({"head_dim": 32}, "head_dim=32"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "partial_rotary_factor=0.25"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.high_freq_factor|rope_scaling.low_freq"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"auto_map": {"AutoModel": "x.py"}}, "auto_map"),
    ({"num_hidden_layers": 3}, "model.layers.2.*is missing"),
    ({"num_hidden_layers": 1}, "model.layers.1.*has no place"),
    ({"vocab_size": 301}, "says .301, 64"),
    ({"tie_word_embeddings": True}, "lm_head.weight is a tensor of its own"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_our_model_cannot_represent_is_refused_by_name(tmp_path, change, message):
    model = build()
    export_hf(weights(model), model.shape, tmp_path / "out", verify=False)
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        import_hf(tmp_path / "out")


def test_only_safetensors_inside_the_folder_are_read(tmp_path):
    model = build()
    out = tmp_path / "out"
    export_hf(weights(model), model.shape, out, verify=False)
    (out / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (out / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=r"only safetensors are read, never pickles"):
        import_hf(out)
    index = {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"no weight file '../elsewhere.safetensors'"):
        import_hf(out)
    (out / "model.safetensors.index.json").unlink()
    state = load_file(tmp_path / "elsewhere.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(state, out / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight is torch.float8_e4m3fn"):
        import_hf(out)


def test_a_failed_export_leaves_nothing_and_a_full_folder_is_kept(tmp_path, monkeypatch):
    model = build()
    monkeypatch.setattr(hf, "TOLERANCE", 0.0)
    with pytest.raises(ValueError, match="logits differ"):
        export_hf(weights(model), model.shape, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="not an empty folder"):
        export_hf(weights(model), model.shape, tmp_path / "mine", verify=False)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_a_sentencepiece_tokenizer_goes_along(tmp_path, monkeypatch, dummy_prefix):
    import sentencepiece

    train_sp = sentencepiece.SentencePieceTrainer.train
    changed = lambda **kwargs: train_sp(**kwargs | {"add_dummy_prefix": dummy_prefix})  # noqa: E731
    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", changed)
    folder, model = tokenizer_of(tmp_path, "sentencepiece"), build()
    if dummy_prefix:  # transformers then loses the first space of a text that begins with one, and is found out
        with pytest.raises(ValueError, match=r"' two  spaces.*' is .* in training and .* in transformers"):
            export_hf(weights(model), model.shape, tmp_path / "out", files(folder))
    export_hf(weights(model), model.shape, tmp_path / "out", files(folder), verify=not dummy_prefix)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["the cat", "and  the dog\n12"]
    assert [loaded(text)["input_ids"] for text in texts] == load_tokenizer(folder).encode_batch(texts)
    assert loaded.eos_token_id == load_tokenizer(folder).eod_id
    assert load_tokenizer(tmp_path / "out").sha256 == load_tokenizer(folder).sha256


def test_a_tokenizer_that_adds_bos_is_stopped_from_it(tmp_path, tokenizer):
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    eod = load_tokenizer(tokenizer).eod_id
    backend.post_processor = TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", eod)])
    (tmp_path / "llama").mkdir()
    backend.save(str(tmp_path / "llama" / "tokenizer.json"))
    model = build()
    export_hf(weights(model), model.shape, tmp_path / "out", files(tmp_path / "llama"))
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("the cat")["input_ids"] == load_tokenizer(tokenizer).encode_batch(["the cat"])[0]
    wrong = files(tokenizer)
    wrong.probes[0][1].append(5)
    with pytest.raises(ValueError, match=r"in training and .* in transformers"):
        export_hf(weights(model), model.shape, tmp_path / "other", wrong)


def test_without_transformers_an_export_says_that_it_is_not_verified(tmp_path, monkeypatch, capsys):
    train(tiny_config(tmp_path / "run", "checkpoint={every: 10}"), write_tiny_shards(tmp_path / "shards"))
    monkeypatch.setattr(hf.importlib.util, "find_spec", lambda name: None)
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "a")]) == 0
    assert "NOT verified" in capsys.readouterr().out
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "b"), "--no-verify"]) == 0
    assert "verified" not in capsys.readouterr().out
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ValueError, match=r"megatron_lite\[hf\]"):
        hf.import_transformers()


def test_the_command_goes_out_and_back_and_a_run_starts_from_either(tmp_path, tokenizer, capsys):
    mixture = write_tiny_shards(tmp_path / "shards")
    train(tiny_config(tmp_path / "run", "checkpoint={every: 5}"), mixture)
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    assert main([run, "--out", out]) == 0  # the newest of two checkpoints
    assert "verified: transformers' fp32 logits" in capsys.readouterr().out
    assert main([run, "--out", out]) == 2 and main(["--out", out]) == 2
    assert main([run, "--out", out + "2", "--tokenizer", str(tokenizer)]) == 2
    assert "vocab_size is 300" in capsys.readouterr().err  # the shards' sidecars say 64
    assert main(["--from-hf", out, "--out", str(tmp_path / "back")]) == 0
    source = weights_of(tmp_path / "run" / "step_0000010")
    assert weights_of(tmp_path / "back").keys() == source.keys()
    still = ("checkpoint={every: 1}", "schedule={total_tokens: 128, warmup_steps: 0, decay: constant}", "optim.lr=0")
    for number, origin in enumerate((run, out, tmp_path / "back")):
        config = tiny_config(tmp_path / f"next{number}", f"init_from={origin}", *still)
        train(config, mixture)
        started = weights_of(config.run_dir / "step_0000001")
        assert all(torch.equal(started[name], source[name]) for name in source), origin
    config = tiny_config(tmp_path / "wrong", f"init_from={run}", "model.norm_eps=1e-6")
    with pytest.raises(ValueError, match=r"init_from=.*: these weights need model.norm_eps: 1e-06 -> 1e-05"):
        train(config, mixture)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_tokenizer_that_hugging_face_has_no_file_for_is_refused():
    with pytest.raises(ValueError, match=r"bytes: only a tokenizer\.json or a SentencePiece"):
        read_tokenizer("bytes", SimpleNamespace(tokenizer={}, source="run"))
