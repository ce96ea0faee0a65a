"""`forwardgrad bench` from the command line to the report, on a network that takes no time; times are never tested."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.command import run
from tests.support.stored import ENVIRONMENT, reported, row

from forwardgrad.lab.bench import joules, measuring, roofline, timing
from forwardgrad.lab.bench.arms import NAMED, TABLE_1, chosen_arms
from forwardgrad.lab.bench.cases import BenchCase, build_case
from forwardgrad.lab.energy import EnergyCounter, EnergyMeter
from forwardgrad.lab.report.blocks import kinds
from forwardgrad.lab.report.sections import bench as bench_section
from forwardgrad.lab.report.sections import bench_figures, bench_goals
from forwardgrad.lab.store.files import write_json
from forwardgrad.lab.store.store import Store

TINY = ("bench", "--models", "mlp-2x8", "--batch-size", 4, "--rounds", 5)
LIMITS = roofline.Ceilings(1e11, 1e10)


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's limits take seconds to measure, and have a test of their own."""
    monkeypatch.setattr(roofline, "ceilings", lambda on: LIMITS)


def stored(out: Path) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads((out / "bench.json").read_text())["cases"]
    return cases


def test_a_run_is_printed_stored_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    arms = "forward,low-rank,low-rank-k2,func-jvp,forward(tangents=2, law=sphere)"
    status, out, err = run(monkeypatch, capsys, *TINY, "--arms", arms, "--repeats", 10, "--threads", 2, "--out", tmp_path)
    assert status == 0
    assert torch.get_num_threads() == threads
    assert "[1/1] mlp-2x8, batch 4, contiguous" in err
    (case,) = stored(tmp_path)
    assert (case["rounds"], case["layout"], case["accelerator"], case["parameters"]) == (5, "contiguous", "cpu", 784 * 8 + 8 + 8 * 10 + 10)
    assert case["command"].startswith("forwardgrad bench --models mlp-2x8")
    found = {arm["name"]: arm for arm in case["arms"]}
    assert list(found) == ["plain", "backprop", "forward", "low-rank", "low-rank-k2", "func-jvp", "forward(tangents=2, law=sphere)"]
    assert all(len(arm["times"]) == 5 and arm["seconds"]["value"] > 0 and arm["peak_bytes"] > 0 for arm in found.values())
    assert found["plain"]["to_plain"]["value"] == found["backprop"]["to_backprop"]["value"] == 1
    assert found["forward"]["peak_bytes"] > 4 * case["parameters"]  # directions, which become gradients
    assert found["plain"]["drawing"] is found["backprop"]["drawing"] is None
    assert found["forward"]["drawing"]["seconds"]["value"] > 0
    assert set(found["low-rank-k2"]["further"]) == {"value", "low", "high", "refused"}
    assert found["low-rank"]["further"] is None
    assert found["forward"]["worth"]["variance"] == found["func-jvp"]["worth"]["variance"] == case["parameters"] + 1
    assert found["low-rank-k2"]["worth"]["variance"] == found["low-rank"]["worth"]["variance"] / 2
    assert [entry["cosine"] for entry in found["backprop"]["to_cosine"]] == [0.1, 0.5]
    assert json.loads((tmp_path / "bench.json").read_text())["environment"]["threads"] == 2
    lines = out.splitlines()
    assert lines[0] == "MLP of 2 layers, width 8 · batch 4 · 6,370 parameters · contiguous · 5 rounds"
    assert [line.split("  ")[0] for line in lines[2 : 2 + len(found)]] == list(found)
    assert "Limits of the machine, measured in the same run: 100 GFLOP/s of a float32 matrix product, 10.0 GB/s of a large triad." in out
    markdown = (tmp_path / "report.md").read_text()
    assert "## The cost of one step" in markdown
    assert "`forwardgrad bench --models mlp-2x8" in markdown
    assert (tmp_path / "figures" / "cost-of-one-step.svg").read_text().count("<svg") == 1


def test_the_roofline_is_that_of_the_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, capsys, *TINY, "--arms", "plain", "--repeats", 0, "--out", tmp_path)
    plain, backprop = stored(tmp_path)[0]["arms"]
    products = 2 * 4 * (784 * 8 + 8 * 10)
    found = plain["roofline"]
    assert found["flops"] == products
    assert found["seconds"] == max(found["flops"] / 1e11, found["bytes"] / 1e10)
    assert found["near"] == "bytes"
    assert found["reached"] == found["seconds"] / plain["seconds"]["value"]
    assert backprop["roofline"]["flops"] == 2 * products + 2 * 4 * 8 * 10  # the first layer's input needs no gradient
    assert backprop["to_cosine"] == []


def test_other_cases_are_kept_and_the_same_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ("--arms", "plain", "--repeats", 0, "--out", tmp_path)
    assert run(monkeypatch, capsys, *TINY, *plain)[0] == 0
    first = stored(tmp_path)
    assert run(monkeypatch, capsys, "bench", "--models", "mlp-2x8", "--batch-size", "8,4", "--rounds", 6, *plain)[0] == 0
    assert [(case["batch"], case["rounds"]) for case in stored(tmp_path)] == [(8, 6), (4, 6)]
    path = tmp_path / "bench.json"
    elsewhere = {**json.loads(path.read_text())["environment"], "device": "Another Processor"}
    write_json(path, {"schema": 1, "environment": elsewhere, "cases": first})
    assert run(monkeypatch, capsys, "bench", "--models", "mlp-3x8", "--rounds", 5, *plain)[0] == 0
    assert [case["model"] for case in stored(tmp_path)] == ["mlp-3x8"]  # times of two machines do not stand in one table


def test_the_order_in_memory_is_backpropagations_choice(tmp_path: Path) -> None:
    options = measuring.BenchOptions(rounds=5)
    found = measuring.measure_steps(Store(tmp_path), [BenchCase("cnn", 1)], [NAMED["plain"]], options, device="cpu", say=lambda _: None)
    (case,) = stored(tmp_path)
    assert json.loads(json.dumps(found)) == [case]  # what is returned is what is stored
    assert set(case["tried"]) == {"contiguous", "channels-last"}
    assert case["layout"] == min(case["tried"], key=case["tried"].get)
    assert "all arms ran in the order in memory in which backpropagation is faster" in bench_section.bench_text(case)


def test_what_keeps_an_arm_from_running_is_said_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    impossible = "forward(law=orthogonal, tangents=100000)"
    status, out, _ = run(monkeypatch, capsys, *TINY, "--arms", impossible, "--repeats", 0, "--out", tmp_path)
    assert status == 0
    assert f"{impossible}: there are at most as many orthogonal tangents as weights" in out
    arms = stored(tmp_path)[0]["arms"]
    assert [bool(arm["failed"]) for arm in arms] == [False, False, True]
    where = "MLP of 2 layers, width 8 · batch 4 · 6,370 parameters · contiguous · 5 rounds"
    text = (tmp_path / "report.md").read_text()
    assert f"| {where} | {impossible} (not measured: there are at most as many" in text


def test_steps_of_another_optimizer_stand_beside_those_of_sgd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, asked = tmp_path / "bench.json", ("--arms", "plain", "--repeats", 0, "--out", tmp_path)
    assert run(monkeypatch, capsys, *TINY, *asked)[0] == 0
    old = json.loads(path.read_text())
    for key in ("optimizer", "optimizer_bytes"):  # as files were before they said so
        assert old["cases"][0].pop(key) == {"optimizer": "sgd", "optimizer_bytes": 0}[key]
    write_json(path, old)
    status, out, err = run(monkeypatch, capsys, *TINY, *asked, "--optimizer", "adam")
    assert status == 0
    assert "[1/1] mlp-2x8, batch 4, contiguous, adam" in err
    assert "MLP of 2 layers, width 8 · batch 4 · 6,370 parameters · contiguous · Adam · 5 rounds" in out
    assert "MLP of 2 layers, width 8, batch 4, Adam: beside every peak the optimizer holds 51.0 kB from step to step." in out
    assert [(one.get("optimizer"), one.get("optimizer_bytes")) for one in stored(tmp_path)] == [(None, None), ("adam", 8 * 6370 + 16)]
    assert run(monkeypatch, capsys, *TINY, *asked)[0] == 0
    assert [one["optimizer"] for one in stored(tmp_path)] == ["adam", "sgd"]  # it took the place of the file's old case
    assert "gradient and SGD update, or that of the optimizer that a title names" in (tmp_path / "report.md").read_text()


def test_networks_with_table_ones_arms_are_known(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert measuring.timed_networks(store, "cpu") == set()
    measuring.measure_steps(store, [BenchCase("logistic", 64)], TABLE_1, measuring.BenchOptions(rounds=5), device="cpu", say=lambda _: None)
    measuring.measure_steps(
        store, [BenchCase("mlp-2x8", 64)], [NAMED["plain"]], measuring.BenchOptions(rounds=5), device="cpu", say=lambda _: None
    )
    assert measuring.timed_networks(store, "cpu") == {"logistic"}


def between(value: float | None, width: float = 0.1) -> dict[str, Any]:
    if value is None:
        return {"value": None, "low": None, "high": None, "refused": timing.NOISY}
    return {"value": value, "low": value * (1 - width / 2), "high": value * (1 + width / 2), "refused": None}


def arm(name: str, seconds: float, to_backprop: float | None, **rest: Any) -> dict[str, Any]:
    known = NAMED[name]
    return {
        "name": name,
        "label": known.label,
        "kind": known.kind,
        "spec": known.estimator_text,
        "engine": known.engine,
        "failed": None,
        "times": [seconds] * 5,
        "seconds": between(seconds),
        "to_backprop": between(to_backprop),
        "to_plain": between(1000 * seconds),
        "further": None,
        "examples_per_second": 64 / seconds,
        "peak_bytes": 5_000_000,
        "process": None,
        "drawing": None,
        "roofline": {"flops": 10, "bytes": 20, "seconds": 0.5 * seconds, "near": "products", "reached": 0.5},
        "worth": None,
        "worth_failed": None,
        "to_cosine": [],
        **rest,
    }


def case(model: str, batch: int, *arms: dict[str, Any]) -> dict[str, Any]:
    return {"model": model, "data": "mnist", "batch": batch, "layout": "contiguous", "tried": {}, "accelerator": "cpu", "parameters": 1000,
            "rounds": 5, "seed": 0, "repeats": 10, "arms": list(arms), "command": "forwardgrad bench",
            "ceilings": {"flops_per_second": 1e11, "bytes_per_second": 1e10}}  # fmt: skip


def made(*cases: dict[str, Any]) -> dict[str, Any]:
    return {"schema": 1, "environment": ENVIRONMENT, "cases": list(cases)}


NN = case(
    "nn",
    64,
    arm("plain", 0.001, 0.25),
    arm("backprop", 0.004, 1.0),
    arm("forward", 0.006, 1.5),
    arm("low-rank", 0.0024, 0.6, drawing={"seconds": between(1e-4), "share": between(0.04)}),
    arm("low-rank-k16", 0.02, None, further=between(1.05), process={"tally": 4_000_000, "process": 5_000_000, "agree": False}),
    arm("local-feedback", 0.005, 1.2, worth={"limit": 0.4},
        to_cosine=[{"cosine": 0.1, "estimates": 2, "low": 1, "high": 3, "seconds": 0.01},
                   {"cosine": 0.5, "estimates": None, "low": None, "high": None, "seconds": None}]),
    {"name": "mezo", "label": "MeZO, plain torch", "kind": "peer", "spec": None, "engine": "eager", "failed": "out of luck"},
)  # fmt: skip
NN_ROW = "NN · MNIST · batch 64 · 1,000 parameters · contiguous · 5 rounds"


def test_the_section_says_what_was_measured_and_what_was_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write_json(store.root / "bench.json", made(NN))
    text = reported(store)
    assert "In steps of backpropagation, a step costs 1.50 (the forward gradient) and 0.600 (rank 1) on NN · MNIST, batch 64." in text
    rank = row(text, "The cost of one step", NN_ROW, "rank 1 (forward(perturb=low-rank(rank=1, period=1)))")
    assert (rank["time"], rank["/ backprop"]) == ("2.40 ms (2.28 ms to 2.52 ms)", "0.600 (0.570 to 0.630)")
    assert (rank["random numbers"], rank["roofline"]) == ("4.00 % (3.80 % to 4.20 %)", "50 % (products, 1.20 ms)")
    many = row(text, "The cost of one step", NN_ROW, "rank 1, K = 16 (forward(tangents=16, perturb=low-rank(rank=1, period=1)))")
    assert many["/ backprop"] == "– (too noisy)"
    assert many["peak memory"] == "5.00 MB (process 5.00 MB)"
    assert f"1 ratio shown as – (too noisy): {timing.NOISY}." in text
    assert "agrees with the tally of tensors (within 5 % and 1 MB) in 0 of 1 step that hold 1.00 MB or more; it is 1.25 times" in text
    local = row(text, "The cost of one step", NN_ROW, "local losses with feedback (local(feedback=true, head=pooled, cells=4))")
    assert (local["to cosine 0.1"], local["to cosine 0.5"]) == ("10.0 ms (2 estimates (1 to 3))", "never (tends to 0.400)")
    assert "Baydin et al. (2022, arXiv:2202.08587) publish 2.46" in text
    assert "MeZO, plain torch (not measured: out of luck)" in text
    assert "K = 16" not in (tmp_path / "figures" / "cost-of-one-step.svg").read_text()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    reported(store)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_is_said_of_steps_is_said_of_sgds() -> None:
    """Goals, the sentence and the bars are about plain SGD; other optimizers have lines of their own."""
    adam = {**NN, "optimizer": "adam", "optimizer_bytes": 8000}
    assert all(outcome.value is None for outcome in bench_goals.outcomes([adam]))
    assert bench_section._usual([adam, NN]) == [NN]
    both = [{**case("vgg-4x8", n, arm("backprop", n, 1.0)), **more} for n in (1, 4, 16) for more in ({}, {"optimizer": "adam"})]
    captions = [picture.caption for picture in kinds.pictures_of([bench_section.bench_section(made(*both))])]
    assert sum("vgg-4x8, contiguous." in words for words in captions) == sum("contiguous, Adam." in words for words in captions) == 1


def test_a_sweep_of_convolutions_is_drawn_apart_from_that_of_layers() -> None:
    depths = [case(f"{kind}-{n}x16", 4, arm("backprop", n, 1.0)) for n in (4, 8, 16) for kind in ("mlp", "vgg")]
    captions = " ".join(picture.caption for picture in kinds.pictures_of([bench_section.bench_section(made(*depths))]))
    assert "against depth; width 16, batch 4." in captions
    assert "against depth; VGG, width 16, batch 4." in captions
    assert bench_figures.network_of(depths[1]) == "VGG of 4 convolutions, width 16"


def test_a_terminal_gets_the_same_in_aligned_rows() -> None:
    lines = bench_section.bench_text(NN).splitlines()
    assert lines[0] == NN_ROW
    assert len({line.index("/ backprop") for line in lines[1:2]} | {lines[4].index("1.50 (")}) == 1
    assert lines[8].startswith("mezo: out of luck")


def test_goals_are_met_missed_too_noisy_or_not_measured() -> None:
    deep = case("mlp-64x1024", 256, arm("plain", 1, 0.3, peak_bytes=10), arm("low-rank", 1, 1, peak_bytes=25),
                arm("backprop-checkpoint", 1, 1, peak_bytes=50))  # fmt: skip
    shallow = case("mlp-8x1024", 256, arm("low-rank", 1, 1, peak_bytes=20))
    gpu = {**NN, "accelerator": "cuda", "batch": 8}
    told = {outcome.goal.figure: outcome for outcome in bench_goals.outcomes([NN, deep, shallow, gpu])}
    assert told["rank-1 step / backpropagation step, NN"].verdict == "missed"
    assert told["rank-1 step / backpropagation step, NN"].value == 0.6
    assert told["dense Gaussian step / backpropagation step, NN"].verdict == "met"  # at most 1.5
    assert told["each further tangent of 16 / plain forward pass, NN"].verdict == "met"
    assert told["rank-1 step / backpropagation step, CNN"].verdict == "not measured"
    assert told["rank-1 step / backpropagation step, NN, batch 8"].verdict == "not measured"  # a GPU's figure is not the processor's
    deep_plain, deep_checkpoint, depth = (outcome for figure, outcome in told.items() if "MLP" in figure)
    assert (deep_plain.value, deep_plain.verdict) == (2.5, "met")
    assert (deep_checkpoint.value, deep_checkpoint.verdict) == (0.5, "missed")  # below a half, not at it
    assert (depth.value, depth.verdict) == (1.25, "missed")
    elsewhere = [outcome for outcome in told.values() if outcome.goal.elsewhere]
    assert len(elsewhere) == 5
    assert all(outcome.verdict.startswith("not measured here: ") and "--device cuda" in outcome.verdict for outcome in elsewhere)
    noisy = case("nn", 64, arm("low-rank", 1, None))
    assert bench_goals.outcomes([noisy])[0].verdict == "too noisy"


def test_a_sweep_is_drawn_against_what_was_varied(tmp_path: Path) -> None:
    depths = [case(f"mlp-{n}x16", 4, arm("backprop", n, 1.0), arm("low-rank", n, 0.5 + n / 100)) for n in (2, 4, 8)]
    batches = [case("nn", n, arm("backprop", n, 1.0), arm("low-rank", n, None if n == 16 else 0.5)) for n in (1, 16, 64)]
    section = bench_section.bench_section(made(*depths, *batches))
    pictures = [picture.name for picture in kinds.pictures_of([section])]
    assert pictures == ["cost-of-one-step", "cost-of-one-step-depth-0", "cost-of-one-step-batch-0"]
    trends = bench_figures.trends_of([(n, c) for n, c in zip((1, 16, 64), batches, strict=True)], lambda a: a["to_backprop"])
    assert [(trend.label, trend.at) for trend in trends] == [("backpropagation, plain torch", (1, 16, 64)), ("rank 1", (1, 64))]


def test_times_stored_by_earlier_versions_stay_in_the_report(tmp_path: Path) -> None:
    times = (("plain forward", "plain", 0.001), ("forward gradient", "forward", 0.005))
    arms = [
        {"name": name, "kind": kind, "n": 30, "seconds": s, "low": 0.9 * s, "high": 1.1 * s,
         "ratio": 1000 * s, "ratio_low": 900 * s, "ratio_high": 1100 * s}
        for name, kind, s in times
    ]  # fmt: skip
    network = {"model": "nn", "data": "mnist", "batch": 64, "parameters": 1863690, "arms": arms}
    store = Store(tmp_path)
    write_json(store.root / "cost.json", {"schema": 1, "environment": ENVIRONMENT, "networks": [network]})
    write_json(store.root / "bench.json", made(NN))
    text = reported(store)
    where = "NN · MNIST · batch 64 · 1,863,690 parameters · contiguous · 30 rounds"
    forward = row(text, "The time of a step, as measured earlier", where, "forward gradient")
    assert (forward["/ plain"], forward["/ backprop"], forward["peak memory"]) == ("5.00 (4.50 to 5.50)", "–", "–")
    assert row(text, "The cost of one step", NN_ROW, "forward gradient (forward)")["/ backprop"] == "1.50 (1.42 to 1.58)"


def test_joules_stand_beside_the_times_where_the_machine_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A counter that moves by 8 J whenever it is read, so a block has one difference. Elsewhere there is no column."""
    ticks = itertools.count(1)
    meter = EnergyMeter([EnergyCounter("cpu", lambda: 8.0 * next(ticks))])
    monkeypatch.setattr(joules, "BLOCK", 0.001)
    status, silent, _ = run(monkeypatch, capsys, *TINY, "--arms", "forward", "--out", tmp_path / "silent")
    assert status == 0
    assert not any("joules" in arm for arm in stored(tmp_path / "silent")[0]["arms"])
    assert "energy" not in silent.splitlines()[1]
    monkeypatch.setattr(measuring, "energy_meter", lambda on: meter)
    status, out, _ = run(monkeypatch, capsys, *TINY, "--arms", "forward", "--out", tmp_path)
    assert status == 0
    assert "energy" in out.splitlines()[1].split()
    assert all(" J cpu (" in line for line in out.splitlines()[2:5])
    for arm in stored(tmp_path)[0]["arms"]:
        assert 0 < arm["joules"]["cpu"]["low"] <= arm["joules"]["cpu"]["value"] <= arm["joules"]["cpu"]["high"] <= 8


def test_a_method_with_numbers_for_every_output_is_not_tried_on_a_vocabulary() -> None:
    """It would fill the memory of the machine before it could fail."""
    case = BenchCase("gpt-1x64", 1, "contiguous", sequence=4)
    arms = chosen_arms("feedback,fixed-feedback,local-feedback,zeroth-order")
    steps, failed = measuring._first_steps(arms, build_case(case, torch.device("cpu")))
    assert set(failed) == {"feedback", "fixed-feedback", "local-feedback"}
    assert "each of 50,257 outputs" in failed["feedback"]
    assert {arm.name for arm in steps} == {"plain", "backprop", "zeroth-order"}


def test_texts_of_another_length_are_another_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = ("bench", "--models", "bert-1x64", "--batch-size", 2, "--rounds", 5, "--repeats", 0, "--arms", "low-rank", "--out", tmp_path)
    for length in (4, 6, 6):
        status, out, err = run(monkeypatch, capsys, *network, "--sequence", length)
        assert (status, f"BERT of 1 block, width 64 · batch 2 of {length} tokens" in out) == (0, True), err
    assert [case["sequence"] for case in stored(tmp_path)] == [4, 6]
    assert "batch 2 of 6 tokens" in (tmp_path / "report.md").read_text()
