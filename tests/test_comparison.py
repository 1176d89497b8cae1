"""Runs put together: means, the best rate, who reached what; and the report that readers get of them."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from hf_tst.experiments.arms import Arm, StepCost
from hf_tst.experiments.budget import ArmRun
from hf_tst.experiments.pictures import draw_heat_map, encode_pictures, pictures
from hf_tst.experiments.report import format_comparison, render_page, verdicts, write_report
from hf_tst.experiments.result import CurvePoint, RunResult
from hf_tst.experiments.summary import compare_runs
from hf_tst.experiments.tables import tables

STEPS = {"max_steps": 100, "tst_bag_size": 4}
ARMS = {
    "baseline": Arm("baseline", {}, {**STEPS, "tst_phase_ratio": 0}, StepCost(6, 6)),
    "tst": Arm("tst", {}, {**STEPS, "tst_phase_ratio": 0.5}, StepCost(8, 6)),
}


def outcome(name, seed, final, rate=1e-3, middle=4.0, arm=None):
    result = None
    if final != "missing":
        losses = (7.0, middle, final)
        curve = [CurvePoint(50 * i, 1000 * i, 500 * i, 3.0 * i + seed, loss) for i, loss in enumerate(losses)]
        result = RunResult(curve, {"recovery": 0.06}, 3 * 2**30 + seed, "GPU", 9, "Abacus", "torch 99")
    run, settings = f"{name}-lr{rate:g}-seed{seed}", {"learning_rate": rate, "seed": seed}
    return ArmRun(run, Path(run), settings, result=result, arm=arm or ARMS[name])


def compared(*outcomes, **options):
    return compare_runs("flops", outcomes, **options)


def arms(comparison):
    return {arm.arm: arm for arm in comparison.arms}


def test_means_and_the_best_rate_of_each_arm():
    comparison = compared(
        outcome("baseline", 0, 3.0), outcome("baseline", 1, 3.2),
        outcome("baseline", 0, 2.9, rate=2e-3), outcome("baseline", 1, 3.5, rate=2e-3),
        outcome("tst", 0, 3.0), outcome("tst", 1, 3.4), outcome("tst", 0, 2.8, rate=2e-3), outcome("tst", 1, 3.1, rate=2e-3),
    )  # fmt: skip
    baseline, tst = arms(comparison).values()
    assert (baseline.best.learning_rate, tst.best.learning_rate) == (1e-3, 2e-3)
    assert baseline.best.mean_final_eval_loss == pytest.approx(3.1)
    assert baseline.best.sd_final_eval_loss == pytest.approx(0.1414, abs=1e-4)  # of a sample of two
    assert tst.difference_to_baseline == pytest.approx((2.8 - 3.0 + 3.1 - 3.2) / 2)
    assert len(baseline.learning_rates) == 2
    assert baseline.best.peak_memory_bytes == 3 * 2**30 + 1
    assert [point.seconds for point in baseline.best.curve] == [0.5, 3.5, 6.5]
    notes = " ".join(comparison.notes)
    assert "baseline: the best learning rate is the lowest of those tried" in notes
    assert "tst: the best learning rate is the highest of those tried" in notes


def test_runs_that_diverged_or_are_missing_are_in_no_mean():
    comparison = compared(
        outcome("baseline", 0, 3.0), outcome("baseline", 1, None), outcome("baseline", 2, "missing"),
        outcome("tst", 0, 7.5), outcome("tst", 1, "missing"),
    )  # fmt: skip
    baseline, tst = arms(comparison).values()
    assert (
        baseline.best.mean_final_eval_loss,
        baseline.best.sd_final_eval_loss,
        baseline.best.final_eval_losses,
    ) == (3.0, None, {0: 3.0})
    assert (baseline.best.diverged_seeds, baseline.best.missing_seeds) == ([1], [2])
    assert tst.best.mean_final_eval_loss is None
    assert (tst.best.diverged_seeds, tst.best.missing_seeds, tst.reached_baseline_loss) == ([0], [1], None)
    text = format_comparison(comparison)
    assert "1, 1 diverged, 1 missing" in text
    assert "not finite" in text
    assert "NaN" not in json.dumps(comparison.to_dict())


def test_a_rate_at_which_a_run_diverged_is_not_the_best_if_there_is_another():
    comparison = compared(
        outcome("tst", 0, 2.0, rate=9e-3), outcome("tst", 1, None, rate=9e-3), outcome("tst", 0, 3.0), outcome("tst", 1, 3.1),
        outcome("baseline", 0, 3.0),
    )  # fmt: skip
    assert arms(comparison)["tst"].best.learning_rate == 1e-3


def test_the_first_evaluation_that_is_down_to_the_baselines_end():
    comparison = compared(outcome("baseline", 0, 3.0), outcome("tst", 0, 2.5, middle=2.9))
    reached = arms(comparison)["tst"].reached_baseline_loss
    assert reached.step == 50
    # 50 steps of 10 latent tokens, all superposed, at 8 operations each.
    assert reached.flops == 50 * 10 * 8
    assert arms(comparison)["baseline"].reached_baseline_loss.step == 100
    comparison = compared(outcome("baseline", 0, 3.0), outcome("tst", 0, 3.1))
    assert arms(comparison)["tst"].reached_baseline_loss is None
    assert "not reached" in format_comparison(comparison)


def test_the_baselines_end_is_that_of_the_same_seeds():
    theirs = [outcome("baseline", seed, final) for seed, final in enumerate((4.8, 5.2, 5.3))]
    tst = arms(compared(*theirs, outcome("tst", 0, 4.9, middle=6.0)))["tst"]
    assert tst.difference_to_baseline == pytest.approx(0.1)
    assert tst.reached_baseline_loss is None
    # The other way round: the curve of the arm is that of the seeds which the baseline has.
    ours = [outcome("tst", seed, final, middle=6.0) for seed, final in enumerate((4.7, 5.2, 5.3))]
    tst = arms(compared(theirs[0], *ours))["tst"]
    assert tst.difference_to_baseline == pytest.approx(-0.1)
    assert tst.reached_baseline_loss.step == 100
    assert tst.reached_baseline_loss.seconds == 6.0
    alone = compared(theirs[0], outcome("tst", 1, 4.0))
    assert arms(alone)["tst"].reached_baseline_loss is None
    assert "not reached" not in format_comparison(alone)


def test_runs_evaluated_at_their_end_alone_do_not_say_when_they_reached_what():
    ends = [outcome("baseline", 0, 3.0), outcome("tst", 0, 2.5)]
    for run in ends:
        del run.result.curve[1]
    comparison = compared(*ends)
    assert [arm.reached_baseline_loss for arm in comparison.arms] == [None, None]
    assert "not measured" in format_comparison(comparison)
    assert "not reached" not in format_comparison(comparison)


def test_where_the_arms_differ_is_the_mean_over_seeds_of_runs_in_pairs():
    def run(name, seed, *losses, rate=1e-3):
        run = outcome(name, seed, 3.0, rate=rate)
        empty = [None] * (10 - len(losses))
        return replace(run, result=replace(run.result, loss_by_frequency=[*losses, *empty]))

    comparison = compared(
        run("baseline", 0, 1.0, 4.0), run("baseline", 1, 2.0, 5.0), run("tst", 0, 1.5, 3.0), run("tst", 1, 2.7, 4.5),
        run("tst", 2, 9.0, 9.0),
    )  # fmt: skip
    header, baseline, tst = tables(comparison)["Loss by frequency of the target token"]
    assert len(header) == 11
    assert baseline == ("baseline", "1.500", "4.500", *["-"] * 8)
    assert tst == ("tst", "+0.600", "-0.750", *["-"] * 8)
    assert "Loss by position in the row" not in tables(comparison)
    assert not any("Loss by" in title for title in tables(compared(outcome("tst", 0, 2.5))))


def test_operations_of_both_phases():
    assert ARMS["tst"].flops_until(100, 1000) == 50 * 10 * 8 + 50 * 10 * 6
    assert ARMS["tst"].flops_until(0, 0) == 0


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.attributes = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.sources += [value for name, value in attrs if name in ("src", "href")]


def test_the_page_holds_all_and_escapes_all():
    hostile = "<script>alert(1)</script>"
    comparison = compared(
        outcome("baseline", 0, 3.0), outcome("tst", 0, "missing"), facts={"command": hostile, hostile: "x"}, notes=[hostile]
    )  # fmt: skip
    html = render_page(comparison, "comparison.html", encode_pictures(comparison))
    page = Page(html)
    assert "script" not in page.tags
    assert html.count("&lt;script&gt;alert(1)") == 3
    assert len(page.sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert ("name", "viewport") in page.attributes
    assert ("content", "width=device-width, initial-scale=1") in page.attributes
    assert "@media print" in html
    assert not re.search(r"url\(|@import", html)
    outside_of_code = render_page(comparison, "comparison.md").replace(f"`{hostile}`", "")
    assert hostile not in outside_of_code


def test_a_command_is_code_that_nothing_in_it_ends():
    command = "hf-tst compare --train_file 'a/*.jsonl' --validation_file 'b/*.jsonl' | tee `date`"
    runs = [outcome("baseline", 0, 3.0), outcome("tst", 0, 2.5)]
    text = render_page(compared(*runs, facts={"command": command}), "comparison.md")
    assert f"- command: `` {command} ``\n" in text


def test_the_files_of_the_report(tmp_path):
    comparison = compared(outcome("baseline", 0, 3.0), outcome("tst", 0, 2.5), facts={"command": "x"})
    written = write_report(comparison, tmp_path)
    assert sorted(path.name for path in written) == [
        f"comparison.{ending}" for ending in ("html", "json", "md", "png")
    ]
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    values = json.loads((tmp_path / "comparison.json").read_text())
    assert [arm["best"]["mean_final_eval_loss"] for arm in values["arms"]] == [3.0, 2.5]
    assert values["arms"][1]["reached_baseline_loss"]["step"] == 100
    text = (tmp_path / "comparison.md").read_text()
    assert "![" in text
    assert (
        "| tst | 0.001 | 2.5000 | -0.5000 | 1 | 2,000 | 1,000 | 7e+03 | 6.0 s | 3.00 GiB (GPU) | 100 | 7e+03 |"
        in text
    )


def test_a_resumed_run_which_was_evaluated_once_more_is_drawn_with_the_others(tmp_path):
    runs = [outcome(arm, seed, 3.0) for arm in ("baseline", "tst") for seed in (0, 1)]
    runs[-1].result.curve.insert(1, CurvePoint(30, 600, 300, 1.8, 5.0))
    comparison = compared(*runs)
    assert [point.step for point in arms(comparison)["tst"].best.curve] == [0, 50, 100]
    write_report(comparison, tmp_path)
    assert (tmp_path / "comparison.png").is_file()


def test_a_picture_that_fails_leaves_the_tables(tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise ValueError("no picture")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(ValueError, match="no picture"):
        write_report(compared(outcome("baseline", 0, 3.0), outcome("tst", 0, 2.5)), tmp_path)
    assert json.loads((tmp_path / "comparison.json").read_text())["arms"]
    for ending in ("md", "html"):
        text = (tmp_path / f"comparison.{ending}").read_text()
        assert "2.5000" in text
        assert "comparison.png" not in text


def test_a_comparison_of_which_nothing_has_run(tmp_path):
    comparison = compared(outcome("baseline", 0, "missing"), outcome("tst", 0, None))
    write_report(comparison, tmp_path)
    assert "missing" in (tmp_path / "comparison.md").read_text()


def test_a_report_begins_with_its_verdict():
    runs = [
        outcome(arm, seed, 3.0 - 0.1 * (arm == "tst") + 0.01 * seed)
        for arm in ("baseline", "tst")
        for seed in (0, 1, 2)
    ]
    comparison = compared(*runs)
    verdict = "tst is ahead of the baseline by 0.100 ± 0.000 nats, in 3 of 3 seeds."
    for page in ("comparison.html", "comparison.md"):
        text = render_page(comparison, page)
        assert "baseline and tst, at equal FLOPs" in text
        assert text.index(verdict) < text.index("Equal FLOPs. Loss")
    assert format_comparison(comparison).endswith(verdict)
    assert "Difference to the baseline over FLOPs" in pictures(comparison)
    alone = compared(outcome("baseline", 0, 3.0), outcome("tst", 0, 3.2))
    assert verdicts(alone) == ["tst is behind the baseline by 0.200 nats, one seed only."]
    assert not verdicts(compared(outcome("baseline", 0, 3.0), outcome("tst", 1, 2.0)))


def test_the_switch_is_where_it_is_and_not_at_the_next_evaluation():
    run = outcome("tst", 0, 2.5)
    run.result.curve[1] = CurvePoint(40, 1600, 400, 2.4, 4.0)
    switch = arms(compared(run))["tst"].switch
    assert (switch.step, switch.raw_tokens, switch.flops) == (50, 50 * 10 * 4, 50 * 10 * 8)
    assert switch.eval_loss == pytest.approx(4.0 - 1.5 * 10 / 60)
    assert arms(compared(outcome("baseline", 0, 3.0)))["baseline"].switch is None


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_heat_map_is_centred_on_the_baseline_and_frames_no_cell_of_one_seed(seeds):
    grid, runs = {}, [outcome("baseline", seed, 3.0) for seed in range(seeds)]
    for size, final in ((2, 2.8), (4, 3.1)):
        name = f"s{size}"
        arm = Arm(name, {}, {"max_steps": 100, "tst_bag_size": size, "tst_phase_ratio": 0.5}, StepCost(6, 6))
        grid[name] = {
            "tst_bag_size": size,
            "tst_phase_ratio": 0.5,
            "tst_offset_weighting": "uniform",
            "tst_mode": "full",
        }
        runs += [outcome(name, seed, final, arm=arm) for seed in range(seeds)]
    axes = Figure().subplots()
    draw_heat_map(compared(*runs, grid=grid), axes, "uniform, full")
    assert sum(axes.images[0].get_clim()) / 2 == pytest.approx(3.0)
    assert len(axes.patches) == (seeds > 1)
    assert f"{seeds} seed" in axes.texts[0].get_text()
