"""What benchmarks share: reports of test runs, rows in files, the order of cases."""

from __future__ import annotations

import json
from dataclasses import dataclass

import kernels
import measure

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_conformance" name="test_equals_dense[gather_merge-triton-cuda-tube70-bfloat16]"/>
<testcase classname="tests.test_conformance" name="test_equals_dense[gather_merge-sum-triton-cuda-tube70-bfloat16]">
  <failure message="wrong"/></testcase>
<testcase classname="tests.test_conformance" name="test_equals_dense[temporal_attention-cuda-cuda-heads64-bfloat16]">
  <skipped message="no library"/></testcase>
<testcase classname="tests.test_conformance" name="test_any_strides[spatial_attention-triton-cuda-every_other-tube70]">
  <error message="illegal memory access"/></testcase>
</testsuite></testsuites>
"""


def test_conformance_from_a_report(tmp_path, capsys):
    (tmp_path / "report.xml").write_text(REPORT)
    conformance = kernels.Conformance("cuda", [tmp_path / "report.xml"])
    assert conformance.why_not("gather_merge", "triton") is None
    assert conformance.why_not("gather_merge-sum", "triton").startswith("1 of 1 tests failed")
    assert conformance.why_not("spatial_attention", "triton").startswith("1 of 1 tests failed")
    for never_ran in (("temporal_attention", "cuda"), ("gather_embed", "triton"), ("gather_merge", "cuda")):
        assert conformance.why_not(*never_ran) == "no test of it ran"
    assert capsys.readouterr().out.count("is not timed") == 5


def test_attention_is_timed_first():
    names = [case.variant.function for case in kernels.cases("cuda")]
    attention = ["attention" in name for name in names]
    assert attention == sorted(attention, reverse=True) and 0 < sum(attention) < len(names)
    others = kernels.cases("cuda", kernels.other_shapes("cuda"))
    assert not {case.name for case in kernels.cases("cuda")} & {case.name for case in others}


@dataclass
class Row:
    name: str
    case: int
    value: float


def test_rows_take_the_place_of_those_of_the_same_case(tmp_path):
    path = tmp_path / "rows.json"
    measure.update([Row("a", 1, 0.1), Row("b", 1, 0.2)], path, ("name", "case"))
    measure.update([Row("a", 1, 0.3), Row("a", 2, 0.4)], path, ("name", "case"))
    assert [tuple(row.values()) for row in json.loads(path.read_text())] == [
        ("b", 1, 0.2),
        ("a", 1, 0.3),
        ("a", 2, 0.4),
    ]
