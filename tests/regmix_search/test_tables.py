"""RegMix's CSV files: what is read back is what was written, and every broken file is named."""

from pathlib import Path

import numpy as np
import pytest

from regmix_search.ledger import Ledger, Trial
from regmix_search.tables import read_ledger, read_losses, read_mixtures, read_runs, write_losses, write_mixtures

MIXTURES = "index,train_web,train_code\n1,0.25,0.75\n2,1.0,0.0\n7,0.5,0.5\n"
LOSSES = "index,metric/web_val_loss,metric/code_val_loss\n7,3.5,2.5\n1,3.0,2.0\n2,4.0,1.0\n"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "mixtures.csv").write_text(MIXTURES)
    (tmp_path / "losses.csv").write_text(LOSSES)
    return tmp_path / "mixtures.csv", tmp_path / "losses.csv"


def test_rows_are_joined_on_index_not_on_place(files: tuple[Path, Path]) -> None:
    runs = read_runs(*files)
    assert runs.index == (1, 2, 7) and runs.domains == ("web", "code") and runs.unfinished == ()
    np.testing.assert_array_equal(runs.weights, [[0.25, 0.75], [1, 0], [0.5, 0.5]])
    assert {t: v.tolist() for t, v in runs.losses.items()} == {"web": [3.0, 4.0, 3.5], "code": [2.0, 1.0, 2.5]}


def test_select_and_without_keep_rows_together(files: tuple[Path, Path]) -> None:
    runs = read_runs(*files)
    some = runs.select([7, 1])
    assert some.index == (7, 1) and some.losses["web"].tolist() == [3.5, 3.0]
    np.testing.assert_array_equal(some.weights, [[0.5, 0.5], [0.25, 0.75]])
    assert runs.without([2]).index == (1, 7)
    with pytest.raises(ValueError, match="runs 3 have no finished losses"):
        runs.without([3])


def test_what_is_written_is_read_bit_for_bit(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).dirichlet(np.ones(5), size=9)
    weights /= weights.sum(axis=1, keepdims=True)
    losses = {"a b": np.random.default_rng(1).normal(5, 1, 9), "c": np.linspace(1, 2, 9)}
    index, domains = list(range(10, 19)), [f"d{i}" for i in range(5)]
    write_mixtures(tmp_path / "m.csv", index, domains, weights)
    write_losses(tmp_path / "l.csv", index, losses)
    found_index, found_domains, found = read_mixtures(tmp_path / "m.csv")
    assert found_index == tuple(index) and found_domains == tuple(domains)
    np.testing.assert_array_equal(found, weights / weights.sum(axis=1, keepdims=True))
    _, columns = read_losses(tmp_path / "l.csv")
    assert list(columns) == list(losses)
    for name, values in losses.items():
        np.testing.assert_array_equal(columns[name], values)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["l.csv", "m.csv"]  # no temporary file stays behind


def test_rounded_rows_are_normalised(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("index,train_a,train_b\n1,0.25,0.746\n")
    np.testing.assert_allclose(read_mixtures(path)[2].sum(), 1, atol=1e-15)


def test_a_search_under_way_may_lack_losses(files: tuple[Path, Path]) -> None:
    files[1].write_text("index,metric/web_val_loss\n2,4.0\n")
    with pytest.raises(ValueError, match=r"losses\.csv: no losses for index 1, 7 of .*mixtures\.csv"):
        read_runs(*files)
    runs = read_runs(*files, partial=True)
    assert runs.index == (2,) and runs.unfinished == (1, 7) and runs.weights.tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("which", "text", "message"),
    [
        (1, LOSSES + "9,1,1\n", r"index 9 is in no row of .*mixtures\.csv"),
        (1, LOSSES + "2,1,1\n", r"losses\.csv: index 2 appears more than once"),
        (0, MIXTURES + "7,1,0\n", r"mixtures\.csv: index 7 appears more than once"),
        (1, LOSSES.replace("4.0", "nan"), r"line 4, column metric/web_val_loss: 'nan' is not a finite number"),
        (1, LOSSES.replace("4.0", ""), r"line 4, column metric/web_val_loss: '' is not"),
        (1, LOSSES.replace("\n2,", "\nt2,"), r"line 4, column index: 't2' is not a whole number"),
        (0, MIXTURES.replace("0.25", "0.35"), r"do not sum to 1 .*index 1: 1\.1, off by \+0\.1"),
        (0, MIXTURES.replace("1.0,0.0", "1.2,-0.2"), r"index 2, train_code: weight -0\.2 is negative"),
        (0, MIXTURES.replace("7,0.5,0.5", "7,1.0"), r"line 4: 2 cells, the header has 3"),
        (0, MIXTURES.replace("index", "run"), "one has run ids"),
        (0, MIXTURES.replace("index", "key"), "needs one column `index`"),
        (0, MIXTURES.replace("train_code", "code"), r"columns \['code'\] do not start with `train_`"),
        (0, MIXTURES.replace("train_code", "train_web"), r"columns \['train_web'\] appear more than once"),
        (0, "index,train_web\n", "no rows"),
        (0, "", "needs one column `index`"),
    ],
)
def test_broken_files_are_named(files: tuple[Path, Path], which: int, text: str, message: str) -> None:
    files[which].write_text(text)
    with pytest.raises(ValueError, match=message):
        read_runs(*files)


def test_a_missing_file_is_named(files: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=r"gone\.csv: no such file"):
        read_runs(files[0], files[0].with_name("gone.csv"))


RATIOS = "run,name,index,web,code\nb-7,x,0,0.5,0.5\na-1,y,1,0.25,0.75\n"
METRICS = "run,name,index,arc bpb,hella\na-1,y,0,1.5,2.5\nb-7,x,1,1.0,2.0\n"


def test_olmix_tables_are_joined_on_the_run_and_never_on_place(tmp_path: Path) -> None:
    """Olmix's own loader pairs these rows by place; `name` and `index` say nothing about a run."""
    ratios, metrics = tmp_path / "ratios.csv", tmp_path / "metrics.csv"
    ratios.write_text(RATIOS)
    metrics.write_text(METRICS)
    runs = read_runs(ratios, metrics)
    assert runs.index == ("b-7", "a-1") and runs.domains == ("web", "code")
    assert {t: v.tolist() for t, v in runs.losses.items()} == {"arc bpb": [1.0, 1.5], "hella": [2.0, 2.5]}
    ratios.write_text(RATIOS.replace("run,", "run_id,"))
    assert read_runs(ratios, metrics).index == ("b-7", "a-1")


@pytest.mark.parametrize(
    ("which", "text", "message"),
    [
        (1, METRICS + "c,z,2,1,1\n", r"metrics\.csv: index c is in no row of"),
        (1, METRICS.replace("a-1", "b-7"), r"metrics\.csv: run b-7 appears more than once"),
        (0, RATIOS + "c,z,2,1,0\n", r"no losses for index c of"),
        (0, RATIOS.replace("b-7,", ","), r"line 2, column run: no run id"),
        (1, METRICS.replace("2.5", "inf"), r"line 2, column hella: 'inf' is not a finite number"),
        (0, RATIOS.replace("0.75", "0.65"), r"do not sum to 1 .*index a-1: 0\.9, off by -0\.1"),
        (0, RATIOS.replace("name", "run_id"), "needs one column `index`"),
    ],
)
def test_broken_olmix_tables_are_named(tmp_path: Path, which: int, text: str, message: str) -> None:
    files = [tmp_path / "ratios.csv", tmp_path / "metrics.csv"]
    for i, content in enumerate((RATIOS, METRICS)):
        files[i].write_text(text if i == which else content)
    with pytest.raises(ValueError, match=message):
        read_runs(*files)


def test_a_ledger_is_a_table(tmp_path: Path) -> None:
    """Finished trials only; those held back come apart; a trial with other losses is named."""
    kinds = ("repeat", "holdout", "train", "train")
    trials = [Trial(i, kind, {"web": 0.2 * i, "code": 1 - 0.2 * i}, seed=0) for i, kind in enumerate(kinds)]
    ledger = Ledger(tmp_path / "trials.jsonl", trials, {}, retries=0)
    for trial in (ledger.ask(), ledger.ask(), ledger.ask()):
        assert trial is not None
        ledger.tell(trial, {"readme": 4.0 + trial.index})
    ledger.fail(ledger.ask(), "boom", retry=False)  # type: ignore[arg-type]
    runs, held = read_ledger(tmp_path / "trials.jsonl")
    assert runs.index == (0, 2) and held.index == (1,) and runs.unfinished == (3,)
    np.testing.assert_allclose(runs.weights, [[0, 1], [0.4, 0.6]])
    assert runs.losses["readme"].tolist() == [4.0, 6.0] and held.losses["readme"].tolist() == [5.0]
    odd = Ledger(tmp_path / "odd.jsonl", trials[:3], {})
    for losses in ({"readme": 1.0}, {"readme": 1.0}, {"prose": 1.0}):
        odd.tell(odd.ask(), losses)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="trials 0 and 2 differ in their losses: prose, readme"):
        read_ledger(tmp_path / "odd.jsonl")
    with pytest.raises(ValueError, match="no finished trials"):
        read_ledger(tmp_path / "none.jsonl")
