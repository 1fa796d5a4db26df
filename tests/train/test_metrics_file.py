import pytest

from householder.train.metrics import MetricsWriter, read_metrics


def write(path, steps, **options):
    with MetricsWriter(path, **options) as metrics:
        for step in steps:
            metrics.write({"step": step, "loss": step / 3})


def test_a_new_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    write(path, [5])
    assert [r["step"] for r in read_metrics(path)] == [5]


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [10, 20, 30])
    write(path, [21, 31], after_step=20)
    assert [r["step"] for r in read_metrics(path)] == [10, 20, 21, 31]


def test_a_line_cut_short_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [10, 20])
    with open(path, "a") as file:
        file.write('{"step": 30, "lo')
    assert [r["step"] for r in read_metrics(path)] == [10, 20]
    write(path, [30], after_step=20)
    assert [r["step"] for r in read_metrics(path)] == [10, 20, 30]


def test_records_are_there_before_the_file_is_closed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as metrics:
        metrics.write({"step": 1, "loss": 1 / 3})
        assert read_metrics(path) == [{"step": 1, "loss": 0.3333333}]


def test_numbers_that_json_has_not_are_refused(tmp_path):
    with (
        MetricsWriter(tmp_path / "metrics.jsonl") as metrics,
        pytest.raises(ValueError, match="not JSON compliant"),
    ):
        metrics.write({"step": 1, "loss": float("nan")})
