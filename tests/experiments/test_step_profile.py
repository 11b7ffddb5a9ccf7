"""The profile of a training step: kinds of operations and their seconds."""

import gzip
import json

import pytest

from experiments.throughput import step_profile


@pytest.mark.parametrize(
    "operation, kind",
    [
        ("convolution.17", "convolutions"),
        ("conv_general_dilated.3", "convolutions"),
        ("dot_general.479", "matrix products"),
        ("dot.4", "matrix products"),
        ("transpose_copy_fusion.9", "transposes, copies, concatenation"),
        ("concatenate.20", "transposes, copies, concatenation"),
        ("wrapped_reduce-window", "sums"),
        ("bitcast_reduce_fusion.47", "sums"),
        ("multiply_add_fusion", "elementwise"),
        ("multiply_erf_fusion.3", "elementwise"),
    ],
)
def test_the_kind_of_an_operation(operation, kind):
    assert step_profile.kind_of(operation) == kind


def test_convolutions_are_what_the_others_leave_of_a_step(tmp_path):
    events = [
        {"ph": "X", "dur": duration, "args": {"hlo_op": name}}
        for name, duration in [("dot.1", 3000.0), ("convolution", 10.0), ("add_fusion", 1000.0)] * step_profile.STEPS
    ]
    events += [{"ph": "M", "args": {}}, {"ph": "X", "dur": 1e6}]
    (tmp_path / "x.trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    kinds = step_profile.seconds_by_kind(step_profile.traced(tmp_path), 0.01)
    assert list(kinds) == ["convolutions", "matrix products", "elementwise"]
    assert kinds == pytest.approx({"convolutions": 0.006, "matrix products": 0.003, "elementwise": 0.001})
