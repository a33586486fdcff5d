"""docs/acceptance-data.md: every test that it names exists. And what no other file tests of what it lists."""

import ast
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from test_file_defects import write_sparse

from megatron_lite.data.indexed import IndexedDataset, ShardMeta, write_meta
from megatron_lite.data.native import kernels
from megatron_lite.data.samples import DomainSamples
from megatron_lite.data.sidecar import measure_layout
from megatron_lite.mesh import Mesh
from megatron_lite.run import resolve
from megatron_lite.testing import tiny_config, write_tiny_shards

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "acceptance-data.md"


def named_tests(text):
    """(file, function) of every `test_file::test_name` in the text."""
    return re.findall(r"`(test_\w+)::(test_\w+)`", text)


def missing(ids):
    defined = {
        (path.stem, node.name)
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    return [f"{file}::{name}" for file, name in ids if (file, name) not in defined]


def test_every_test_that_the_table_names_exists():
    ids = named_tests(TABLE.read_text())
    assert len(ids) > 40 and missing(ids) == []
    assert missing([("test_data_acceptance", "test_that_nobody_wrote"), ("test_nothing", "test_x")]) != []
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    bare = [row for row in rows if "::" not in row and not row.startswith(("| defect", "| line"))]
    assert bare == [], "a row without a test"


@pytest.mark.parametrize("order", ["documents", "contiguous"])
def test_the_order_does_not_depend_on_how_long_the_run_will_be(tmp_path, order):
    """Megatron: 12.5 % more train_samples gave 17 % of the samples already consumed to other documents."""
    mixture, mesh = write_tiny_shards(tmp_path), Mesh(0, 1, torch.device("cpu"))
    epoch = sum(IndexedDataset(prefix).num_tokens for domain in mixture.domains for prefix in domain.prefixes)
    loaders = []
    for tokens in (epoch // 2, epoch // 2 * 9 // 8, 3 * epoch, 20 * epoch):  # below one epoch, a little more, many
        config = tiny_config(tmp_path / str(tokens), f"schedule.total_tokens={tokens}", f"data.sample_order={order}")
        loaders.append(resolve(config, mixture, mesh)[0])
    steps = 3 * epoch // (loaders[0].seq_length * loaders[0].global_batch_size)
    for step in (*range(20), steps // 2, steps - 1):
        first, *others = [torch.cat([batch.tokens_BT for batch in one.step(step)]) for one in loaders]
        assert all(torch.equal(first, other) for other in others), f"step {step}"
    assert len({one.fingerprint() for one in loaders}) == 1  # and so a longer run may go on from a shorter one


def test_epochs_cost_no_memory_by_document(tmp_path):
    """Megatron: 24 bytes for each document and epoch at the peak. Here two numbers for every 256 documents."""
    documents, seq_length = 2_000_000, 2048
    prefix, lengths = str(tmp_path / "train_x"), np.full(documents, 50, dtype=np.int32)
    write_sparse(prefix, lengths)
    layout = measure_layout(f"{prefix}.idx", f"{prefix}.bin", lengths, [], [])
    write_meta(prefix, ShardMeta("ab", 100, 0, documents, 50 * documents, 1, "uint16", layout=layout))
    del lengths
    tracemalloc.start()
    domain = DomainSamples([IndexedDataset(prefix)], seq_length, 0, "x", kernels())
    for epoch in range(4):
        assert domain.gather(epoch * domain.samples_per_epoch + np.arange(4)).max() <= 8
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < documents, f"{peak / documents:.2f} bytes a document"
