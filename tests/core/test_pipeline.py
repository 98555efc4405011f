"""Plans of pipelines: what crosses between stages, what is shared, what is predicted; and how they are drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hvdscale.cli.main import main
from hvdscale.errors import PlanError
from hvdscale.model import Costs, Edge, Graph, Node, make_schedule, simulate
from hvdscale.model.drawing import as_picture, as_text
from hvdscale.model.pipeline import INPUT, Pipeline, plan_pipeline

TIE = {"embed.weight": 400}


def language_model() -> Graph:
    """An embedding, six blocks, a head tied to the embedding; the first block's output goes to the last one too."""
    blocks = [Node(f"block{i}", 10.0, 1000, 50) for i in range(6)]
    nodes = (Node("embed", 1.0, 400, 10, TIE), *blocks, Node("head", 2.0, 400, 20, TIE))
    return Graph(nodes, (*(Edge(i, i + 1, 64) for i in range(7)), Edge(1, 6, 64)))


def plan(**more: object) -> Pipeline:
    arguments = {"ranks": 2, "microbatches": 4, "objective": "time", **more}
    return plan_pipeline(language_model(), **arguments)  # type: ignore[arg-type]


def test_what_crosses_is_known_by_pair_of_stages() -> None:
    made = plan(ranks=4)
    assert made.part.part_of == (0, 0, 1, 1, 2, 2, 3, 3)
    assert made.crossing == {(0, 1): (1,), (0, 3): (1,), (1, 2): (3,), (2, 3): (5,)}
    assert made.ties == {"embed.weight": (0, 3)}
    assert [made.stages_of(rank) for rank in range(4)] == [(0,), (1,), (2,), (3,)]


def test_the_input_travels_from_the_first_stage_to_those_that_read_it() -> None:
    made = plan(readers=[0, 7])
    assert made.crossing[0, 1] == (INPUT, 1, 3)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_schedule_is_made_for_any_number_of_microbatches(schedule: str, recompute: bool) -> None:
    made = plan(schedule=schedule, recompute=recompute)
    for microbatches in (4, 3, 1):
        training = made.training(microbatches)
        assert training.microbatches == microbatches
        kinds = [action.kind for row in training.actions for action in row]
        assert (kinds.count("F"), kinds.count("T"), kinds.count("D")) == (2 * microbatches, 2, 2)
        assert kinds.count("C") == recompute * microbatches
        alone = {action.kind for row in made.evaluation(microbatches).actions for action in row}
        assert alone == {"F", "SF", "RF"}
    assert made.training(3) is made.training(3)


def test_a_shared_parameter_on_one_rank_needs_no_sum() -> None:
    made = plan(ranks=1, schedule="interleaved", chunks=2)
    assert made.ties == {}
    assert made.stages == 2


def test_stages_and_predictions_are_described() -> None:
    text = plan().describe("s")
    assert text.splitlines()[:2] == [
        "stage  rank  layers               parameters  activations  share of work",
        "0      0     embed .. block2 (4)  3.4 kB      160 B        49.2%",
    ]
    assert "schedule 1f1b, 4 micro-batches on 2 ranks: bubble 2" in text
    assert "embed.weight is shared by stages 0, 1" in text


@pytest.mark.parametrize(
    ("more", "rule"),
    [
        ({"ranks": 9}, r"9 stages \(9 ranks with 1 each\) needs a layer; the model has 8 \(embed, block0"),
        ({"ranks": 2, "chunks": 5, "schedule": "interleaved"}, "10 stages"),
        ({"microbatches": 0}, "micro-batches"),
        ({"schedule": "2f2b"}, "'2f2b' is none"),
        ({"memory_cap": 10.0}, "more than 10 bytes"),
    ],
)
def test_what_cannot_be_is_refused(more: dict[str, object], rule: str) -> None:
    with pytest.raises(PlanError, match=rule):
        plan(**more)


def test_a_drawing_shows_each_action_where_it_runs() -> None:
    lines = as_text(simulate(make_schedule("1f1b", 2, 2)), width=60).splitlines()
    assert lines[1:] == ["rank 0  |F0 F1 ......B0----...B1----|", "rank 1  |...F0 B0----F1 B1----......|"]
    narrow = as_text(simulate(make_schedule("interleaved", 4, 16, 4)), width=100).splitlines()
    assert {len(line) for line in narrow[1:]} == {100}


def test_a_picture_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    played = simulate(make_schedule("zb", 3, 4), Costs.even(3))
    as_picture(played, tmp_path / "plan.png", measured=played, unit="ms")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_plays_and_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    common = ["plan", "--ranks", "2", "--microbatches", "4"]
    assert main([*common, "--schedule", "all"]) == 0
    shown = capsys.readouterr().out
    assert [line.split(":")[0] for line in shown.splitlines() if "in all" in line] == [
        "gpipe",
        "1f1b",
        "interleaved",
        "zb",
    ]
    assert main([*common, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["makespan"] == 15
    assert figures["bubble"] == pytest.approx(0.2)
    assert figures["peak_activations"] == [2, 1]
    assert main([*common, "--actions", "--recompute"]) == 0
    assert capsys.readouterr().out.startswith("F0 SF0>1 F1 SF1>1 C0 RB0<1 B0")
    for wrong in (
        ["--forward", "1,2,3"],
        ["--forward", "0"],
        ["--transfer", "-1"],
        ["--schedule", "all", "--plot", "x"],
    ):
        assert main([*common, *wrong]) == 1
        assert "hvdscale: " in capsys.readouterr().err
