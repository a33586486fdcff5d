"""Repetition-matched proxies: same epochs as the target run, from exact subsets that all proxies share."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.loader import BlendedLoader
from megatron_lite.data.mixture import Mixture
from megatron_lite.testing import write_tiny_shards
from regmix_search import run as cli
from regmix_search.config import load_search
from regmix_search.repetition import Exposure, exposure, match, proxy_shards, with_epochs, write_subset
from regmix_search.search import Search
from regmix_search.stages import settings
from regmix_search.tables import Runs

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ["--config", str(ROOT / "configs/search/demo.yaml"), "--preset", "smoke"]
SEQ = 16


def search_over(folder: Path, matched: bool = True, target: int = 40_960, proxy: int = 2_048) -> Search:
    write_tiny_shards(folder / "data", documents=200)
    keys = {"shards.data_dir": str(folder / "data"), "shards.match_repetition": matched, "target_tokens": target}
    keys |= {"proxy.schedule.total_tokens": proxy, "proxy.data.seq_length": SEQ, "train.enabled": False}
    overrides = tuple(f"{key}={json.dumps(value)}" for key, value in keys.items())
    return Search(load_search(None, None, (f"out_dir={folder / 'out'}", *overrides)), io.StringIO())


@given(st.integers(1, 10**6), st.integers(1, 10**5), st.lists(st.integers(100, 10**6), min_size=1, max_size=6))
def test_matched_proxies_repeat_as_often_as_the_target(target, proxy, counts):
    tokens = {f"d{i}": n for i, n in enumerate(counts)}
    read = match(tokens, target, proxy, SEQ)
    assert all(min(SEQ + 1, tokens[d]) <= n <= tokens[d] for d, n in read.items())
    seen = Exposure(target, proxy, tokens, read)
    for domain, (wanted, found) in seen.epochs(dict.fromkeys(tokens, 1.0)).items():
        if SEQ + 1 < read[domain] < tokens[domain] and wanted > 1:
            assert found == pytest.approx(wanted, rel=1 / read[domain] + 1e-9)
        if wanted <= 1 and SEQ + 1 < read[domain] < tokens[domain]:
            assert found <= 1, "a proxy repeats what the target never does"


def test_a_subset_is_exact_and_made_of_the_documents(tmp_path):
    write_tiny_shards(tmp_path, documents=200)
    whole = IndexedDataset(tmp_path / "train_a")
    write_subset(tmp_path / "train_a", tmp_path / "sub" / "train_a", 1_234, "a")
    subset = IndexedDataset(tmp_path / "sub" / "train_a")
    subset.check()
    assert subset.num_tokens == subset.meta.num_tokens == 1_234
    assert subset.meta.tokenizer_sha256 == whole.meta.tokenizer_sha256 and subset.meta.eod_id == whole.meta.eod_id
    known = [whole[i].tolist() for i in range(len(whole))]
    cut = [d for i in range(len(subset)) if (d := subset[i].tolist()) not in known]
    assert len(cut) <= 1 and all(any(k[: len(d)] == d for k in known) for d in cut)
    places = [known.index(d) for i in range(len(subset)) if (d := subset[i].tolist()) in known]
    assert max(places) > len(known) / 2, "only the first documents of the file were taken"
    write_subset(tmp_path / "train_a", tmp_path / "more" / "train_a", 2_000, "a")
    more = IndexedDataset(tmp_path / "more" / "train_a")
    larger = {tuple(more[i].tolist()) for i in range(len(more))}
    assert {tuple(d) for d in map(known.__getitem__, places)} <= larger, "a longer proxy reads other documents"


def test_a_proxy_really_draws_each_sample_as_often_as_the_target_would(tmp_path):
    search = search_over(tmp_path)
    seen, folder = exposure(search, search.inventory), proxy_shards(search)
    assert folder != search.shards_dir and set(seen.tokens) == {"a", "b", "c"}
    mixture = Mixture.from_weights({"a": 0.5, "b": 0.25, "c": 0.25}, folder)
    for seed in (0, 7):
        loader = BlendedLoader(mixture, SEQ, seed, 8, 8)
        assert {d: facts["tokens"] for d, facts in loader.facts.items()} == seen.proxy_domains
        drawn = loader.realised(seen.proxy_tokens // SEQ)
        for d, (target, _) in seen.epochs(dict(zip("abc", mixture.weights, strict=True))).items():
            per_epoch = (seen.proxy_domains[d] - 1) // SEQ
            assert drawn[d] / per_epoch == pytest.approx(target, rel=2 / per_epoch + 2 / drawn[d])
    assert {p.name for p in folder.glob("valid_*.idx")} == {p.name for p in search.shards_dir.glob("valid_*.idx")}


def test_subsets_are_made_once_and_again_when_the_budget_changes(tmp_path):
    search = search_over(tmp_path)
    first = (proxy_shards(search) / "train_a.bin").stat().st_mtime_ns
    assert (proxy_shards(search) / "train_a.bin").stat().st_mtime_ns == first
    longer = Search(dataclasses.replace(search.config, target_tokens=81_920), search.stream)
    held = IndexedDataset(proxy_shards(longer) / "train_a").num_tokens
    assert (
        held
        == exposure(longer, longer.inventory).proxy_domains["a"]
        < exposure(search, search.inventory).proxy_domains["a"]
    )


def test_without_the_setting_proxies_read_the_shards(tmp_path):
    search = search_over(tmp_path, matched=False)
    assert proxy_shards(search) == search.shards_dir
    assert settings(search.config)["settings"]["shards"]["match_repetition"] is False
    assert settings(search_over(tmp_path).config)["settings"]["shards"]["match_repetition"] is True


def test_fewer_epochs_than_the_target_are_a_warning_with_both_numbers(tmp_path):
    weights = {"a": 0.9, "b": 0.1, "c": 0.0}
    off, on = (search_over(tmp_path, matched, target=200_000) for matched in (False, True))
    seen = exposure(off, off.inventory)
    said = seen.to_json(weights)
    target, proxy = said["epochs"]["a"].values()
    assert target == pytest.approx(0.9 * 200_000 / seen.tokens["a"]) and proxy == pytest.approx(target * 2_048 / 2e5)
    assert not said["matches"] and f"a {target:.2g} times (a proxy: {proxy:.2g})" in said["warnings"][0]
    assert "match_repetition=true" in said["warnings"][0] and "c " not in said["warnings"][0].split(":")[0]
    matched = exposure(on, on.inventory).to_json(weights)
    assert matched["matches"] and not matched["warnings"]


def test_a_domain_too_scarce_for_a_short_proxy_is_named_though_matching_is_on():
    seen = Exposure(10**6, 10**3, {"a": 2_000, "b": 10**6}, match({"a": 2_000, "b": 10**6}, 10**6, 10**3, SEQ))
    assert list(seen.unmatched({"a": 0.5, "b": 0.5})) == ["a"]
    assert "too little text" in seen.to_json({"a": 0.5, "b": 0.5})["warnings"][0]


def test_fits_are_told_at_which_weight_proxies_begin_to_repeat(tmp_path):
    search = search_over(tmp_path)
    runs = Runs((0,), ("c", "a", "b"), np.full((1, 3), 1 / 3), {"a": np.ones(1)})
    seen = exposure(search, search.inventory)
    once = with_epochs(search, runs).once
    assert [w * 2_048 / seen.proxy_domains[d] for d, w in zip(runs.domains, once, strict=True)] == pytest.approx(
        [1] * 3
    )
    (search.out / "earlier_losses.csv").parent.mkdir(exist_ok=True)
    (search.out / "earlier_losses.csv").touch()
    assert with_epochs(search, runs).once is None, "an earlier search's proxies repeated at other weights"


def test_dry_run_shows_epochs_of_target_and_proxy(tmp_path, capsys):
    write_tiny_shards(tmp_path / "data", documents=200)
    keys = [
        "shards.data_dir=" + str(tmp_path / "data"),
        "mixtures.domains=[a,b,c]",
        "fit.target=a",
        "train.enabled=false",
    ]
    keys += ["fit.target_test=null", "mixtures.max_epochs=40"]
    arguments = [part for key in keys for part in ("--set", key)]
    for matched in ("false", "true"):
        more = ["--set", f"shards.match_repetition={matched}", "--out", str(tmp_path / "out"), "--dry-run"]
        assert cli.main([*SMOKE, *arguments, *more]) == 0
        text = capsys.readouterr().out
        target, proxy = map(float, next(line for line in text.splitlines() if line.startswith("  a ")).split()[-2:])
        assert target > 1 and (proxy == pytest.approx(target, rel=0.01)) == (matched == "true")
        assert ("match_repetition=true" in text) == (matched == "false")


@pytest.mark.slow
def test_a_search_says_whether_its_proxies_stand_for_the_target(tmp_path):
    keys = ("shards.match_repetition=true", "mixtures.count=8", "train.enabled=false", "mixtures.holdout=0")
    keys += ("fit.surrogates=[power,effective_repeats]",)
    command = [*SMOKE, "--out", str(tmp_path), *(part for key in keys for part in ("--set", key))]
    assert cli.main(command) == 0
    fit = json.loads((tmp_path / "fit.json").read_text())
    assert "effective_repeats" in fit["targets"]["readme"]["candidates"]
    found = json.loads((tmp_path / "optimum.json").read_text())["repetition"]
    largest = max(found["epochs"].values(), key=lambda e: e["target"])
    assert largest["target"] > 1 and largest["proxy"] == pytest.approx(largest["target"], rel=0.05)
    assert "repeat every domain as often as the target run" in (tmp_path / "report.md").read_text()
    assert np.isfinite(json.loads((tmp_path / "optimum.json").read_text())["objective"]["predicted"])
    assert any("token frequencies of all training text" in warning for warning in fit["warnings"]), (
        "20 steps learn more"
    )
    tables = f"{tmp_path / 'mixtures.csv'},{tmp_path / 'losses.csv'}"
    scales = [*command, "--scale", f"big=1e6,1e6,{tables}"]
    assert cli.main([*scales, "--stage", "scales"]) == 0 and cli.main([*scales, "--stage", "report"]) == 0
    sizes = json.loads((tmp_path / "scales.json").read_text())
    assert [scale["name"] for scale in sizes["scales"]] == ["proxies", "big"]
    assert sizes["scales"][0]["tokens"] == 5_120 and sizes["ranks"][0]["spearman"] == pytest.approx(1)
    assert (sizes["at_target"]["tokens"], sizes["at_target"]["params"]) == (400_000, 1e6), (
        "no main run: the largest size"
    )
    assert "rank as large ones" in (tmp_path / "report.md").read_text()
