"""Stages: weights that change at a step, no sample lost or repeated, whatever the cut, layout and resume."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite import resume, tally
from megatron_lite.data.blend import Blend
from megatron_lite.data.loader import BlendedLoader
from megatron_lite.data.mixture import Mixture
from megatron_lite.data.native import kernels as default_kernels
from megatron_lite.data.quota import QuotaTree
from megatron_lite.data.sidecar import read_meta, write_meta
from megatron_lite.data.stages import Stage, StagedBlend

SEQ = 4


def staged(weights, starts, window=8, kernels=None, seed=0):
    """A blend of stages with these weights, by name or by position."""
    named = [w if isinstance(w, dict) else {str(i): x / sum(w) for i, x in enumerate(w)} for w in weights]
    stages = [Stage(first, w, SEQ) for first, w in zip(starts, named, strict=True)]
    return StagedBlend(stages, seed, kernels or default_kernels(), window)


@st.composite
def some_stages(draw):
    """Up to six stages over up to nine domains, of which some have weight 0, at steps 0 < a < b < ..."""
    count = draw(st.integers(1, 6))
    weight = st.sampled_from([0.0, 0.0, 1e-9, 0.01, 0.3]) | st.floats(1e-3, 1)
    weights = [draw(st.lists(weight, min_size=1, max_size=9).filter(any)) for _ in range(count)]
    starts = np.cumsum([0, *(draw(st.integers(1, 9)) for _ in range(count - 1))]).tolist()
    return weights, starts


@settings(max_examples=60, deadline=None)
@given(some_stages(), st.sampled_from([1, 4, 8]), st.data())
def test_every_ordinal_of_a_domain_comes_once_and_in_order_for_any_cut(plan, window, data):
    blend = staged(*plan, window)
    total = (plan[1][-1] + 5) * window
    domains, ordinals = blend.draw(0, total)
    for domain in range(len(blend.names)):
        mine = ordinals[domains == domain]
        assert mine.tolist() == list(range(len(mine)))
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=6))})
    parts = [blend.draw(a, b - a) for a, b in itertools.pairwise(cuts)]
    assert np.array_equal(domains, np.concatenate([part[0] for part in parts]))
    assert np.array_equal(ordinals, np.concatenate([part[1] for part in parts]))
    for cut in cuts:
        counts = np.bincount(domains[:cut], minlength=len(blend.names))
        assert blend.counts(cut).tolist() == counts.tolist()
    one_by_one = staged(plan[0][:1], plan[1][:1], window)
    for stage in blend.stages[1:]:
        one_by_one.add(stage)
    assert all(np.array_equal(a, b) for a, b in zip(one_by_one.draw(0, total), (domains, ordinals), strict=True))
    for stage, drawn in blend.by_stage(total):
        assert not any(drawn[i] for i, name in enumerate(blend.names) if not stage.weights.get(name))


def test_both_kernels_draw_the_same_stages(kernels):
    weights, starts = [[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0, 1 / 3, 2 / 3, 1e-6]], [0, 3, 4]
    ours, theirs = staged(weights, starts, 512, kernels), staged(weights, starts, 512)
    assert all(np.array_equal(a, b) for a, b in zip(ours.draw(0, 4096), theirs.draw(0, 4096), strict=True))


def drift(weights, window, steps_each):
    """Largest distance of any domain's count from the sum of weight * samples: within a stage, and over all of them."""
    weights = np.array(weights) / np.sum(weights, axis=1, keepdims=True)
    blend = staged(list(weights), np.arange(len(weights)) * steps_each, window)
    drawn = np.array([counts for _, counts in blend.by_stage(len(weights) * steps_each * window)])
    off = drawn - weights * steps_each * window
    return np.abs(off).max(), np.abs(np.cumsum(off, axis=0)).max()


@pytest.mark.parametrize("window", [8, 512])
@pytest.mark.parametrize("domains", [3, 17, 100])
@pytest.mark.parametrize("kind", ["constant", "walk", "fresh", "some dropped"])
def test_three_hundred_short_stages_do_not_drift(kind, domains, window):
    """Without the debts of a stage's start the distance here is 7 to 300 samples; a stage alone: below 3, proved."""
    rng = np.random.default_rng([domains, window])
    base = rng.dirichlet([0.3] * domains, 300)
    if kind == "constant":
        base[:] = base[0]
    if kind == "walk":
        base = base[0] * np.exp(np.cumsum(0.2 * rng.normal(size=base.shape), axis=0))
    if kind == "some dropped":
        base = np.where(rng.random(base.shape) < 0.3, 0, base)
        base[:, 0] += 1e-6
    within, over = drift(base, window, 1)
    assert within < 3 and over < 3


def test_a_small_weight_gets_its_share_over_stages_of_one_step():
    """0.4 samples a step rounds to none, 0.6 to one: begun afresh each time, that is 0 and 1,000 samples."""
    weights = [0.4 / 512, 0.6 / 512, 511 / 512]
    blend = staged([weights] * 1000, range(1000), 512)
    assert np.abs(blend.counts(512_000)[:2] - [400, 600]).max() <= 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-9, 1), st.floats(-3, 3)), min_size=1, max_size=40), st.integers(1, 10**12))
def test_no_debt_moves_a_stage_by_three(pairs, total):
    weights, owed = np.array([w for w, _ in pairs]), np.array([d for _, d in pairs])
    tree = QuotaTree.build(weights.tolist(), owed.tolist())
    assert (tree.round_up >= 0).all() and (tree.round_up < 1).all()
    totals = np.array([0, 1, 2, total + 1, total + 2])
    counts = default_kernels().counts(tree, totals)
    assert (counts[0] == 0).all() and (np.diff(counts, axis=0) >= 0).all() and (counts.sum(axis=1) == totals).all()
    off = counts - totals[:, None] * (weights / weights.sum())
    assert np.abs(off).max() < 3 + 1e-3  # doubles: 1e12 * 2^-53


def test_saying_the_same_weights_again_changes_no_count():
    weights = [0.5, 0.25, 0.125, 0.125]
    once, often = staged([weights], [0], 24), staged([weights] * 20, range(20), 24)
    for samples in range(0, 480, 24):
        assert once.counts(samples).tolist() == often.counts(samples).tolist()


def test_a_domain_that_leaves_and_returns_goes_on_where_it_was():
    blend = staged([{"a": 0.5, "b": 0.5}, {"b": 1.0}, {"c": 0.5, "a": 0.5}], [0, 2, 4])
    assert blend.names == ("a", "b", "c")
    domains, ordinals = blend.draw(0, 48)
    assert set(domains[16:32].tolist()) == {1} and set(domains[32:].tolist()) == {0, 2}
    assert ordinals[domains == 0].tolist() == list(range(16))


@pytest.mark.parametrize("longer, first", [(8, 20), (6, 27)])
def test_longer_samples_go_on_at_the_same_token(longer, first):
    """After 160 tokens in samples of 4: the next sample of 8 is number 20; of 6 it is 27, since 26 was begun."""
    blend = StagedBlend([Stage(0, {"a": 1.0}, 4), Stage(5, {"a": 1.0}, longer)], 0, default_kernels(), 8)
    assert blend.draw(39, 2)[1].tolist() == [39, first]
    assert blend.counts(56).tolist() == [56]


# -- the blend's own promises, one sample at a time --------------------------------------------------------------------


@pytest.mark.parametrize("domains", [2, 17, 1000])
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_in_windows_of_one_every_prefix_is_within_one_and_a_half(domains, data):
    """Every sample count from 0 to 4,000, weights down to 1e-9; the loader has this at every step."""
    seed = data.draw(st.integers(0, 2**32))
    weights = 10.0 ** np.random.default_rng(seed).uniform(-9, 0, domains)
    drawn, _ = Blend(weights, 0, default_kernels(), window=1).draw(0, 4000)
    counts, share = np.zeros(domains), weights / weights.sum()
    for i, domain in enumerate(drawn.tolist(), start=1):
        counts[domain] += 1
        worst = counts[domain] - share[domain] * i  # only this one can have gone up; the others fall by their share
        assert worst <= 1.5
        assert i % 97 or np.abs(counts - share * i).max() <= 1.5


@pytest.mark.parametrize("weights", [[1e-9, 1.0], [1.0] * 999 + [1e-9], [1e-300, 1.0], [5e-324, 1.0], [1e300, 1e300]])
def test_extreme_weights_draw_what_was_asked_and_no_more(weights):
    """Megatron-LM's IndexError for extreme weights (issue 705): there is no size that could be overdrawn."""
    blend = Blend(weights, 0, default_kernels())
    for samples in (1024, 2**20, 2**40):
        counts = blend.counts(samples)
        share = np.array(weights) / np.sum(weights)
        assert counts.sum() == samples and np.abs(counts - share * samples).max() <= 1.5


# -- the loader --------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path, make_shard):
    for i, name in enumerate(["a", "b", "late"]):
        make_shard(f"train_{name}", [801], "uint16", first=10_000 * i)  # 200 samples of 4 tokens
    make_shard("valid_a", [10, 10], "uint16")
    return tmp_path


def loader(shards, weights, batch=8, rank=0, size=1, micro=1, seed=7, seq=SEQ, **kwargs):
    return BlendedLoader(Mixture.from_weights(weights, shards, **kwargs), seq, seed, batch, micro, rank, size)


def with_stages(shards, *changes, **kwargs):
    """changes: (step, weights), the first at step 0."""
    ours = loader(shards, changes[0][1], **kwargs)
    for step, weights in changes[1:]:
        ours.change_mixture(step, Mixture.from_weights(weights, shards))
    return ours


CHANGES = ((0, {"a": 0.75, "b": 0.25}), (10, {"late": 0.5, "a": 0.5}), (13, {"b": 1.0}), (14, {"late": 0.1, "b": 0.9}))


@pytest.mark.parametrize("size, micro", [(1, 8), (2, 2), (4, 1), (8, 1)])
def test_global_samples_over_stages_do_not_depend_on_the_layout(shards, size, micro):
    whole = with_stages(shards, *CHANGES, micro=8)
    ranks = [with_stages(shards, *CHANGES, rank=rank, size=size, micro=micro) for rank in range(size)]
    for step in (0, 9, 10, 12, 13, 14, 500):
        batches = list(zip(*(rank.step(step) for rank in ranks), strict=True))
        (expected,) = whole.step(step)
        for name in ("tokens_BT", "labels_BT", "domain_B"):
            assert torch.equal(torch.cat([getattr(b, name) for m in batches for b in m]), getattr(expected, name))


def test_no_sample_is_lost_or_repeated_where_weights_change(shards):
    ours = with_stages(shards, *CHANGES, micro=8)
    assert ours.names == ("a", "b", "late")
    seen = {name: [] for name in ours.names}
    for step in range(20):
        (batch,) = ours.step(step)
        for domain, tokens in zip(batch.domain_B.tolist(), batch.tokens_BT.tolist(), strict=True):
            assert tokens[0] // 10_000 == domain, "the index of a domain holds for all stages"
            seen[ours.names[domain]].append(tokens[0] % 10_000)
    assert {name: len(starts) for name, starts in seen.items()} == ours.realised(160)
    for starts in seen.values():
        assert len(set(starts)) == len(starts) < 200, "within an epoch each sample comes once, over all stages"


def test_twenty_short_stages_as_doremi_makes_them(shards):
    rng = np.random.default_rng(0)
    changes = [(3 * i, dict(zip("ab", rng.dirichlet([1, 1]).tolist(), strict=True))) for i in range(20)]
    whole, cut = with_stages(shards, *changes, micro=8), with_stages(shards, changes[0], micro=8)
    for step in range(60):  # weights that become known as training goes on give what was known from the start
        for first, weights in changes[1:]:
            if first == step:
                cut.change_mixture(first, Mixture.from_weights(weights, shards))
        assert torch.equal(whole.step(step)[0].tokens_BT, cut.step(step)[0].tokens_BT)
    target = sum(3 * 8 * weights["a"] for _, weights in changes)
    assert abs(whole.realised(480)["a"] - target) <= 1.5


def test_a_change_in_the_past_and_other_shards_under_an_old_name_are_refused(shards, make_shard):
    ours = with_stages(shards, *CHANGES)
    with pytest.raises(ValueError, match="step 13 would rewrite the stage from step 14"):
        ours.change_mixture(13, Mixture.from_weights({"a": 1}, shards))
    ours.change_mixture(14, Mixture.from_weights({"a": 1}, shards))  # nothing drawn of it yet: it takes the place
    assert [stage.first_step for stage in ours.stages] == [0, 10, 13, 14] and ours.stages[-1].drawn == {"a": 1.0}
    (shards / "other").mkdir()
    for end in (".bin", ".idx"):
        shutil.copy(shards / f"train_a{end}", shards / "other")
    with pytest.raises(ValueError, match=r"domain 'a' is .*other/train_a, before step 20 it was .* give it a new name"):
        ours.change_mixture(20, Mixture.from_weights({"a": 1}, shards / "other"))


@pytest.mark.parametrize("window", [8, 64, 512])
@pytest.mark.parametrize("domains", [8, 17])
def test_no_rank_of_a_loader_sees_a_biased_mixture(tmp_path, make_shard, domains, window):
    """dp 8, micro-batch 1, equal weights: total variation distance of each rank's 25,000 samples at most 0.03."""
    for i in range(domains):
        make_shard(f"train_{i:02}", [30], "uint16")
    weights = {f"{i:02}": 1.0 for i in range(domains)}
    for rank in range(8):
        ours = loader(tmp_path, weights, batch=window, rank=rank, size=8)
        steps = 200_000 // window
        drawn = ours.blend.draw(0, steps * window)[0].reshape(steps, window)[:, ours._mine]
        assert [b.domain_B.item() for b in ours.step(3)] == drawn[3].tolist(), "this is what step() deals out"
        realised = np.bincount(drawn.reshape(-1), minlength=domains) / drawn.size
        assert np.abs(realised - 1 / domains).sum() / 2 <= 0.03


# -- state and resume --------------------------------------------------------------------------------------------------


def saved(ours):
    return json.loads(json.dumps(ours.state_dict()))


def changes(ours, state, step):
    return resume.changes(state, saved(ours), step)


def resume_at(ours, state, step, *allowed):
    resume.refuse("here", changes(ours, state, step), allowed)
    ours.load_state_dict(state, step)


def test_a_resumed_loader_goes_on_with_the_stages_of_the_state(shards):
    whole = with_stages(shards, *CHANGES, micro=8)
    fresh = with_stages(shards, CHANGES[-1], micro=8)  # what the user writes now; what happened is in the state
    fresh.load_state_dict(saved(whole), 15)
    assert fresh.stages == whole.stages and fresh.names == whole.names and fresh.fingerprint() == whole.fingerprint()
    assert torch.equal(fresh.step(15)[0].tokens_BT, whole.step(15)[0].tokens_BT)


def test_new_weights_at_a_resume_are_a_new_stage(shards):
    first = with_stages(shards, CHANGES[0], micro=8)
    fresh = with_stages(shards, (0, {"late": 0.5, "a": 0.5}), micro=8)
    assert changes(fresh, saved(first), 10) == {"mixture": ["from step 10: a 0.75 -> 0.5, b 0.25 -> 0, late 0 -> 0.5"]}
    with pytest.raises(ValueError, match=r"from step 10: a 0.75 .*\n.*--allow-change mixture\n"):
        resume_at(fresh, saved(first), 10)
    resume_at(fresh, saved(first), 10, "mixture")
    planned = with_stages(shards, *CHANGES[:2], micro=8)
    assert fresh.stages == planned.stages
    for step in (10, 11, 30):
        assert torch.equal(fresh.step(step)[0].tokens_BT, planned.step(step)[0].tokens_BT)
    again = with_stages(shards, (0, {"late": 0.5, "a": 0.5}))
    assert changes(again, saved(fresh), 20) == {}, "allowed once, it is what happened"


def test_planned_stages_are_part_of_what_may_not_change_unsaid(shards):
    planned = with_stages(shards, *CHANGES[:2])
    other = with_stages(shards, CHANGES[0], (11, CHANGES[1][1]))
    (line,) = changes(other, saved(planned), 5)["mixture"]
    assert line.startswith("from step 10 -> step 11")
    assert changes(with_stages(shards, CHANGES[0]), saved(planned), 5)["mixture"][0].startswith(
        "from step 10 -> no stage"
    )
    assert changes(with_stages(shards, (0, CHANGES[1][1])), saved(planned), 10) == {}
    zero = with_stages(shards, (0, {**CHANGES[0][1], "late": 0}), *CHANGES[1:2])
    assert changes(zero, saved(planned), 5) == {}, "a domain with weight 0 draws nothing"


def test_a_stage_that_was_to_begin_now_gives_way(shards):
    planned = with_stages(shards, *CHANGES[:2])
    fresh = with_stages(shards, (0, {"b": 1.0}))
    resume_at(fresh, saved(planned), 10, "mixture")
    assert [(stage.first_step, stage.drawn) for stage in fresh.stages] == [
        (0, {"a": 0.75, "b": 0.25}),
        (10, {"b": 1.0}),
    ]


def test_a_dropped_domain_may_be_deleted_and_still_counts(shards):
    whole = with_stages(shards, (0, {"a": 0.5, "b": 0.5}), (10, {"b": 1.0}), micro=8)
    expected, state = whole.step(12)[0].tokens_BT, saved(whole)
    for path in shards.glob("train_a.*"):
        path.unlink()
    fresh = with_stages(shards, (0, {"b": 1.0}), micro=8)
    fresh.load_state_dict(state, 11)
    assert torch.equal(fresh.step(12)[0].tokens_BT, expected)
    assert fresh.realised(96) == {"a": 40, "b": 56} and {
        n: row["epochs"] for n, row in tally.report(fresh, 12)["domains"].items()
    } == pytest.approx({"a": 160 / 801, "b": 224 / 801})
    assert saved(fresh)["domains"] == state["domains"]


def test_every_difference_is_named_with_the_flag_that_allows_it(shards, make_shard):
    before = saved(loader(shards, {"a": 1, "b": 3}))
    make_shard("train_a", [801, 9], "uint16")
    make_shard("train_b", [801], "uint16", first=1)
    other = loader(shards, {"a": 1, "b": 3}, seed=8, seq=8)
    with pytest.raises(ValueError) as caught:
        resume_at(other, before, 5)
    text = str(caught.value)
    for line in (
        "seed: 7 -> 8\n      to allow it: --allow-change seed",
        "data.seq_length: 4 -> 8\n      to allow it: --allow-change data.seq_length",
        "data: train_a: shard train_a: bin 1,602 -> 1,620 bytes, idx 62 -> 82 bytes, probe ",
        "data: train_b: shard train_b: probe ",
        "to allow it: --allow-change data\n",
    ):
        assert line in text
    assert "mixture:" not in text and "tokenizer:" not in text
    resume_at(other, before, 5, "seed", "data.seq_length", "data")
    assert other.realised(40) == {"a": 10, "b": 30}
    other = loader(shards, {"a": 1, "b": 3}, batch=16)
    with pytest.raises(
        ValueError, match=r"batch.global_batch_size: 8 -> 16\n      no flag allows it: a step is counted"
    ):
        resume_at(other, before, 5, "batch.global_batch_size", "data")


def test_a_tokenizer_never_changes(tmp_path, make_shard):
    make_shard("train_a", [801], "uint16", vocab_size=60_000)
    before = saved(loader(tmp_path, {"a": 1}))
    meta = read_meta(tmp_path / "train_a")
    write_meta(tmp_path / "train_a", type(meta)(**{**meta.__dict__, "tokenizer_sha256": "cd" * 32}))
    with pytest.raises(
        ValueError, match=r"tokenizer: tokenizer_sha256 abab.* -> cdcd.*\n      no flag allows it: the same"
    ):
        resume_at(loader(tmp_path, {"a": 1}), before, 5, "tokenizer", "data")


# -- epochs and the report ---------------------------------------------------------------------------------------------


def test_the_cap_on_epochs_counts_all_stages(shards):
    ours = loader(shards, {"a": 0.5, "b": 0.5})
    capped = Mixture.from_weights({"a": 1, "b": 0}, shards, max_epochs={"a": 2})
    ours.change_mixture(25, capped)
    tally.check_epochs(ours, 500)  # 100 + 300 samples of 200
    with pytest.raises(ValueError) as caught:
        tally.check_epochs(ours, 600)
    text = str(caught.value)
    assert "train_a has 801 tokens and weight 0.5 from step 0, 1 from step 25" in text
    assert (
        "need 2.50 epochs of it, max_epochs is 2. The largest weight allowed in the last of these stages is 0.75"
        in text
    )


def test_the_report_has_what_was_asked_and_what_was_drawn(shards):
    ours = with_stages(shards, *CHANGES, micro=8)
    found = tally.report(ours, 20)
    assert {n: row["samples"] for n, row in found["domains"].items()} == ours.realised(160)
    assert [stage["first_step"] for stage in found["stages"]] == [0, 10, 13, 14]
    late = found["domains"]["late"]
    assert late["requested"] == pytest.approx((3 * 0.5 + 6 * 0.1) / 20) and late["tokens"] == late["samples"] * SEQ
    assert late["realised"] == late["samples"] / 160 and late["epochs"] == pytest.approx(late["tokens"] / 801)
    assert sum(row["samples"] for stage in found["stages"] for row in stage["domains"].values()) == 160
    text = tally.table(found)
    assert "steps 1 to 20" in text and "steps 15 to 20" in text
    assert "steps 15 to 20" not in tally.table(tally.report(ours, 14)), "a stage that has not begun is not shown"
    rows = found["domains"]
    many = {"steps": 30, "domains": rows, "stages": [{"first_step": i, "domains": rows} for i in range(30)]}
    shown = [line.split() for line in tally.table(many).splitlines() if "steps" in line]
    assert [words[1] for words in shown] == ["1", *map(str, range(23, 31))] and "22 stages before" in tally.table(many)
