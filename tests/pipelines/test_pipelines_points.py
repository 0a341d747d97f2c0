"""metrics.jsonl: each point once, whoever records it, and whatever a killed process has left."""

from pathlib import Path

from contracts.points import METRICS, Point, read_points
from pipelines.run.points import PointStream, latest


def point(number: int, key: str = "k1", **metrics: float) -> Point:
    return Point(
        point=0, time=1.0, stage="iteration-001/training", key=key, unit="step", number=number, iteration=1,
        global_step=number, metrics=metrics,
    )  # fmt: skip


def test_points_are_recorded_once_also_by_several_processes(tmp_path: Path) -> None:
    one, two = PointStream(tmp_path), PointStream(tmp_path)
    one.record([point(1, loss=1.0), point(2, loss=0.5)])
    two.record([point(2, loss=0.5), point(3, loss=0.25)])
    one.record([point(3, loss=0.25), point(4, loss=0.1)])
    PointStream(tmp_path).record([point(1, loss=1.0)])
    assert [(found.point, found.number) for found in read_points(tmp_path)] == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_a_torn_line_and_lines_of_others_are_passed_over(tmp_path: Path) -> None:
    PointStream(tmp_path).record([point(1, loss=1.0)])
    with (tmp_path / METRICS).open("ab") as file:
        file.write(b'not ours\n{"point":1,"time":12')
    stream = PointStream(tmp_path)
    stream.record([point(1, loss=1.0), point(2, loss=0.5)])
    assert [found.number for found in read_points(tmp_path)] == [1, 2]
    assert b'"time":12\n' not in (tmp_path / METRICS).read_bytes()


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    PointStream(tmp_path).record([point(1, loss=float("nan"), norm=float("inf"), rate=0.1)])
    assert read_points(tmp_path)[0].metrics == {"rate": 0.1}


def test_the_table_of_an_earlier_version_makes_way(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"iteration": 0, "reward_mean": 0.5}\n')
    PointStream(tmp_path).record([point(1, loss=1.0)])
    assert [found.number for found in read_points(tmp_path)] == [1]
    assert (tmp_path / METRICS).read_text().count("\n") == 1


def test_a_stage_that_was_made_again_counts_by_its_latest_key(tmp_path: Path) -> None:
    PointStream(tmp_path).record([point(1, "k1"), point(2, "k1"), point(1, "k2")])
    (own,) = latest(read_points(tmp_path)).values()
    assert [(found.key, found.number) for found in own] == [("k2", 1)]
