"""Megatron's order: equal to megatron-core's own classes entry by entry, and to numpy where those are not installed."""

import shutil
import types

import numpy as np
import pytest

from megatron_lite.data import native, reference
from megatron_lite.data.indexed_writer import write_index
from megatron_lite.data.loader import BlendedLoader
from megatron_lite.data.megatron_order import (
    SNAPSHOT,
    MegatronBlend,
    MegatronOptions,
    build_indices,
    build_megatron,
    split_documents,
)
from megatron_lite.data.mixture import Mixture
from megatron_lite.testing import tiny_config, write_tiny_shards
from megatron_lite.train import train

SEQ = 16
BOTH = pytest.mark.skipif(native.library() is None, reason="the library is not built: nothing to compare")


def same(ours, theirs):
    """Equal values in equal types."""
    return ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


@BOTH
@pytest.mark.parametrize("num_samples", [None, 1, 300, 900, 2000, 5000])
@pytest.mark.parametrize("seed", [0, 1234, 2**32 - 1])
def test_both_kernels_build_the_same_indices(random_lengths, num_samples, seed):
    lengths = random_lengths(700).astype(np.int32)
    for drop_last in (True, False):
        ours = build_indices([lengths], num_samples, SEQ, seed, native, drop_last)
        theirs = build_indices([lengths[:100], lengths[100:]], num_samples, SEQ, seed, reference, drop_last)
        assert all(map(same, ours, theirs))


@BOTH
@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 65, 128, 1000, 70_001])
def test_the_shuffle_is_that_of_random_state(size):
    """One document a sample, in any number: the shuffle index is RandomState's after it shuffled the documents."""
    ones = np.full(size + 1, SEQ, dtype=np.int32)
    ours = build_indices([ones], None, SEQ, 7, native)
    state = np.random.RandomState(7)
    for array, found in ((np.arange(size + 1), ours.document), (np.arange(size), ours.shuffle)):
        state.shuffle(array)
        assert np.array_equal(found, array)


def test_empty_documents_first_and_last(kernels):
    """Sample 0 starts at the first document even when it is empty, as in Megatron's walk."""
    found = [
        build_indices([np.array([0, 0, 5, 0, 12, 0, 20, 0], np.int32)], None, 4, seed, kernels) for seed in range(20)
    ]
    assert all((indices.sample[0] == 0).all() and len(indices.sample) == 10 for indices in found)
    assert any(indices.document[0] in (0, 1, 3, 5, 7) for indices in found)


@BOTH
@pytest.mark.parametrize("k", [1, 2, 7, 8, 9, 17, 100])
def test_both_kernels_blend_alike(k):
    rng = np.random.default_rng(k)
    for weights in (np.ones(k), rng.lognormal(0, 2, k), np.append(rng.integers(0, 4, k), 1.0)):
        ours, theirs = MegatronBlend(weights, native), MegatronBlend(weights, reference)
        for start, count in ((0, 2000), (777, 100)):
            assert all(map(same, ours.draw(start, count), theirs.draw(start, count)))


def test_the_blend_is_the_same_from_any_start(kernels):
    weights = [0.5, 0, 0.3, 0.2]
    blend = MegatronBlend(weights, kernels)
    whole = blend.draw(0, SNAPSHOT + 500)
    for start, count in ((SNAPSHOT - 3, 7), (SNAPSHOT + 100, 20), (5, 1), (SNAPSHOT, 0)):
        part = MegatronBlend(weights, kernels).draw(start, count)
        assert all(same(p, w[start : start + count]) for p, w in zip(part, whole, strict=True))
        counts = blend.counts(start)
        assert counts.tolist() == np.bincount(whole[0][:start], minlength=4).tolist() and counts[1] == 0


def test_a_split_is_cut_as_megatron_cuts_it():
    assert [split_documents(s, 1000) for s in (None, "99,1,0", "969, 30, 1", "1", "0.5,0.5")] == [
        1000,
        990,
        969,
        1000,
        500,
    ]
    for bad in ("", "0,1,0", "x", "1,2,3,4"):
        with pytest.raises(ValueError, match="--split"):
            split_documents(bad, 10)


# --- against megatron-core itself -------------------------------------------------------------------------------------


def megatron(prefixes, weights, size, seed, split, cache, **options):
    """The train part that BlendedMegatronDatasetBuilder builds: a GPTDataset, or a BlendedDataset of them."""
    pytest.importorskip("megatron.core.datasets.helpers_cpp")
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    tokenizer = types.SimpleNamespace(vocab_size=60_000, eod=0, unique_identifiers={"class": "none"})
    blend = {"blend": (prefixes, weights), "split": split} if split else {}
    blend = blend or {"blend_per_split": [(prefixes, weights), None, None]}
    config = GPTDatasetConfig(
        random_seed=seed, sequence_length=SEQ, tokenizer=tokenizer, path_to_cache=str(cache), reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False, **blend, **options,
    )  # fmt: skip
    return BlendedMegatronDatasetBuilder(GPTDataset, [size, 0, 0], lambda: True, config).build()[0]


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [0.3, 1, 1.5, 1.9, 3, 4, 7.85, 8])
@pytest.mark.parametrize(("seed", "split"), [(1234, None), (0, "99,1,0"), (2**32 - 1, "1,1,1")])
def test_indices_are_megatrons(make_shard, random_lengths, monkeypatch, tmp_path, kernels, epochs, seed, split):
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    lengths = make_shard("a", random_lengths(900)).lengths
    mine = lengths[: split_documents(split, len(lengths))]
    size = round(epochs * mine.sum() / SEQ)
    theirs = megatron([str(tmp_path / "a")], None, size, seed, split, tmp_path / "cache")
    ours = build_indices([mine], size, SEQ, seed, kernels)
    for array, name in zip(ours, ("document_index", "sample_index", "shuffle_index"), strict=True):
        assert same(array, np.asarray(getattr(theirs, name))), name


@pytest.mark.slow
@pytest.mark.parametrize("num_samples", [None, 30, 200])
def test_a_kept_partial_sample_is_megatrons(make_shard, random_lengths, tmp_path, kernels, num_samples):
    datasets = pytest.importorskip("megatron.core.datasets.gpt_dataset")
    from megatron.core.datasets.utils import Split

    like = megatron([str(make_shard("a", random_lengths(90)).prefix)] , None, 5, 3, None, tmp_path / "cache",
                    drop_last_partial_validation_sequence=False)  # fmt: skip
    theirs = datasets.GPTDataset(like.dataset, like.dataset_path, like.indices, num_samples, Split.valid, like.config)
    ours = build_indices([np.asarray(like.dataset.sequence_lengths)], num_samples, SEQ, 3, kernels, drop_last=False)
    assert same(ours.sample, np.asarray(theirs.sample_index)) and same(ours.shuffle, np.asarray(theirs.shuffle_index))


WEIGHTS = {
    "equal": [1.0, 1.0, 1.0, 1.0],
    "percent": [30.0, 70.0],
    "tenths": [0.1, 0.2, 0.3, 0.3, 0.1],
    "ties": [0.9, 0.2, 0.1],  # normalised once, not twice, other samples come third and fourth
    "odd": [0.37, 12.5, 3.1, 1e-3, 7.77, 2.2, 0.9, 4.0, 1.0, 0.3, 5.5],
}


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize(("size", "seed", "split"), [(500, 1234, None), (3001, 5, "99,1,0")])
def test_blends_are_megatrons(make_shard, random_lengths, monkeypatch, tmp_path, kernels, weights, size, seed, split):
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    shards = [make_shard(f"d{i}", random_lengths(60 + 90 * i)) for i in range(len(weights))]
    theirs = megatron([shard.prefix for shard in shards], weights, size, seed, split, tmp_path / "cache")
    blend = MegatronBlend(weights, kernels)
    which, ordinal = blend.draw(0, len(theirs))
    assert len(theirs) == blend.targets(size, surplus=0).sum()
    assert np.array_equal(which, theirs.dataset_index) and same(ordinal, np.asarray(theirs.dataset_sample_index))
    for shard, target, dataset in zip(shards, blend.targets(size).tolist(), theirs.datasets, strict=True):
        assert target == dataset.num_samples
        ours = build_indices([shard.lengths[: split_documents(split, len(shard))]], target, SEQ, seed, kernels)
        for array, name in zip(ours, ("document_index", "sample_index", "shuffle_index"), strict=True):
            assert same(array, np.asarray(getattr(dataset, name))), name


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [0.5, 1.4, 3.1])
@pytest.mark.parametrize("split", [None, "9,1,0"])
def test_every_sample_of_a_blend_is_megatrons(
    make_shard, random_lengths, monkeypatch, tmp_path, kernels, epochs, split
):
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    weights = {"a": 3.0, "b": 0.5, "never": 0.0, "c": 1.5}
    for i, name in enumerate(weights):
        make_shard(f"train_{name}", random_lengths(120 + 50 * i), "uint16", first=1 + 20_000 * i % 60_000)
    mixture = Mixture.from_weights(weights, tmp_path)
    drawn = [domain for domain in mixture.domains if domain.weight]
    size = round(epochs * 1700 * 5 / 3 / SEQ)
    prefixes, given = [domain.prefixes[0] for domain in drawn], [weights[domain.name] for domain in drawn]
    theirs = megatron(prefixes, given, size, 77, split, tmp_path / "cache")
    blend, samples = build_megatron(mixture, SEQ, 1, 77, MegatronOptions(size, split), kernels)
    gather = kernels.Gather([samples.get(name) for name in mixture.names])
    rows = gather.rows(*blend.draw(0, len(theirs)))
    for i in range(len(theirs)):
        sample = theirs[i]
        assert mixture.names[rows.domain[i]] == drawn[sample["dataset_id"]].name, i
        assert np.array_equal(rows.tokens[i], sample["tokens"]) and np.array_equal(rows.labels[i], sample["labels"]), i
    for dataset, mine in zip(theirs.datasets, samples.values(), strict=True):
        assert all(map(same, mine.indices, (dataset.document_index, dataset.sample_index, dataset.shuffle_index)))


@pytest.mark.slow
@pytest.mark.parametrize(("given", "surplus"), [(None, None), ([1.0], 0.005)])
def test_a_single_prefix_is_megatrons_with_and_without_a_weight(
    make_shard, random_lengths, monkeypatch, tmp_path, given, surplus
):
    """--data-path PREFIX is a GPTDataset; --data-path 1.0 PREFIX a blend of one, with its surplus of samples."""
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    prefix = make_shard("train_a", random_lengths(300)).prefix
    size = (
        2 * int(make_shard("train_a", random_lengths(300)).num_tokens / SEQ) - 2
    )  # the surplus asks for one epoch more
    theirs = megatron([prefix], given, size, 3, "1,0,0", tmp_path / "cache")
    built = theirs.datasets[0] if given else theirs
    mixture = Mixture.from_weights({"a": 1.0}, tmp_path)
    blend, samples = build_megatron(mixture, SEQ, 1, 3, MegatronOptions(size, None, surplus), native.kernels())
    assert np.array_equal(samples["a"].indices[2], built.shuffle_index)
    assert np.array_equal(
        native.kernels().Gather([samples["a"]]).rows(*blend.draw(0, 9)).tokens, [theirs[i]["tokens"] for i in range(9)]
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["1", "0"])
def test_the_loader_deals_a_megatron_run_to_any_layout(make_shard, random_lengths, monkeypatch, tmp_path, backend):
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setenv("MEGATRON_LITE_NATIVE", backend)
    shards = [make_shard(f"train_{name}", random_lengths(90 + 60 * i), "uint16") for i, name in enumerate("abc")]
    weights, batch, steps = {"a": 5.0, "b": 2.0, "c": 1.0}, 8, 40
    theirs = megatron([s.prefix for s in shards], [*weights.values()], batch * steps, 9, "97,3,0", tmp_path / "cache")
    mixture, options = Mixture.from_weights(weights, tmp_path), MegatronOptions(batch * steps, "97,3,0")
    for micro, size in ((8, 1), (1, 4), (2, 2)):
        ranks = [
            BlendedLoader(mixture, SEQ, 9, batch, micro, rank, size, sample_order="megatron", megatron=options)
            for rank in range(size)
        ]
        for step in (0, 1, 17, 39, 5):
            by_rank = [rank.step(step) for rank in ranks]
            tokens = np.concatenate([rank[m].tokens_BT for m in range(len(by_rank[0])) for rank in by_rank])
            assert np.array_equal(tokens, [theirs[step * batch + i]["tokens"] for i in range(batch)]), (micro, step)


@pytest.mark.slow
def test_weights_are_rounded_from_what_was_written(make_shard, monkeypatch, tmp_path):
    """These sum to 1.2: made to sum to 1 in another way first, the third sample would come from another domain."""
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    weights = {"a": 0.7, "b": 0.3, "c": 0.1, "d": 0.1}
    prefixes = [make_shard(f"train_{name}", [5000]).prefix for name in weights]
    theirs = megatron(prefixes, [*weights.values()], 100, 1, None, tmp_path / "cache")
    (tmp_path / "mixture.yaml").write_text(f"train: {weights}\n".replace("'", ""))
    for mixture in (Mixture.from_weights(weights, tmp_path), Mixture.load(tmp_path / "mixture.yaml")):
        blend, _ = build_megatron(mixture, SEQ, 1, 1, MegatronOptions(100), native.kernels())
        assert np.array_equal(blend.draw(0, 100)[0], theirs.dataset_index[:100])


@pytest.mark.slow
def test_sequences_are_what_megatron_shuffles(make_shard, random_lengths, tmp_path):
    """A document of several sentences is several entries of Megatron's document index."""
    shard = make_shard("train_a", random_lengths(300))
    indices = np.arange(0, 301, 3)
    write_index(f"{shard.prefix}.idx", shard.dtype, np.array(shard.lengths), indices)
    theirs = megatron([shard.prefix], None, 100, 4, None, tmp_path / "cache")
    mixture = Mixture.from_weights({"a": 1}, tmp_path)
    blend, samples = build_megatron(mixture, SEQ, 1, 4, MegatronOptions(100), native.kernels())
    tokens = native.kernels().Gather([samples["a"]]).rows(*blend.draw(0, 100)).tokens
    assert np.array_equal(tokens, [theirs[i]["tokens"] for i in range(100)])


@pytest.fixture
def loader(make_shard, random_lengths, tmp_path):
    """loader(weights, num_samples, ...): a loader in Megatron's order, batches of 8."""
    for i, name in enumerate("ab"):
        make_shard(f"train_{name}", random_lengths(90 + 60 * i), "uint16")

    def make(weights, num_samples, **options):
        mixture, given = Mixture.from_weights(weights, tmp_path), MegatronOptions(num_samples, **options)
        return BlendedLoader(mixture, SEQ, 9, 8, 8, sample_order="megatron", megatron=given)

    return make


def test_the_fingerprint_knows_what_the_order_depends_on(loader):
    prints = [
        loader({"a": 1, "b": 2}, 80).fingerprint(),
        loader({"a": 1, "b": 2}, 88).fingerprint(),
        loader({"a": 1, "b": 2}, 80, split="99,1,0").fingerprint(),
        loader({"a": 1, "b": 2}, 80, surplus=0.5).fingerprint(),
        loader({"a": 2, "b": 4}, 80).fingerprint(),  # the same weights but for the rounding
    ]
    assert len(set(prints)) == len(prints)
    assert loader({"a": 1, "b": 2}, 80).fingerprint() == prints[0]


def test_a_later_mixture_is_refused(loader):
    one = loader({"a": 1, "b": 2}, 80)
    with pytest.raises(ValueError, match="one mixture from the first step"):
        one.change_mixture(3, one.mixture)


def test_whole_steps_beyond_megatrons_samples_are_refused(loader):
    """A run that is rounded up to whole steps may want samples that Megatron's indices do not hold."""
    held = len(loader({"a": 1}, 8)._samples["a"].indices[2])
    assert held % 8, "another shard, please: this one ends on a whole step"
    with pytest.raises(ValueError, match=f"Megatron's order holds {held}: set schedule.total_tokens"):
        loader({"a": 1}, held)
    assert len(loader({"a": 1}, held // 8 * 8).step(held // 8 - 1)[0].tokens_BT) == 8


def test_a_run_resumes_in_megatrons_order_and_not_in_another(tmp_path):
    mixture = write_tiny_shards(tmp_path / "shards")
    order, every = "data={sample_order: megatron, split: '9,1,0'}", "checkpoint={every: 4, keep: 9}"
    run = tiny_config(tmp_path / "run", order, every)
    whole = train(run, mixture)
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "step_0000010")
    assert train(run, mixture).losses == whole.losses
    for change in ("data.split=8,2,0", "schedule.total_tokens=2560"):
        allow = "checkpoint.allow_change=[schedule.total_tokens]"
        with pytest.raises(ValueError, match=r"(?s)megatron: .*no flag allows it: its order follows from the length"):
            train(tiny_config(tmp_path / "run", order, every, change, allow), mixture)
    with pytest.raises(ValueError, match=r"data.split and .* are for data.sample_order=megatron"):
        train(tiny_config(tmp_path / "other", order, "data.sample_order=documents"), mixture)
