"""Results files and what is made of them: the schema, documents, comparisons, the command line."""

import copy
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich")

from rich.console import Console

from benchmarks import cli, compare, digest, pages, plots, report, results, show
from benchmarks.decode import Decode
from benchmarks.device import Cpu

SIZES = {"batch": 1, "heads": 1, "kv_heads": 1, "keys": 8, "head_dim": 8}
DECODE = Decode(suite="decode", dtype=torch.float32, **SIZES)


def seconds(median, spread=0.1):
    low, high = median * (1 - spread), median * (1 + spread)
    return {"median": median, "lower": low, "upper": high, "quiet_rounds": 5, "rounds": 9}


def peer(median, error=1e-3, **more):
    share = 1e-3 / median
    found = {"seconds": seconds(median), "errors": {"out": error}, "peak_bytes": 1 << 20}
    return found | {"share_of_floor": share} | more


def result(case="S1024", suite="attention-fwd", ours=2e-3, theirs=4e-3, **more):
    return {
        "suite": suite,
        "case": case,
        "dtype": "bfloat16",
        "rank": 0,
        "baseline": "torch SDPA",
        "flops": 1e9,
        "moved_bytes": 1e6,
        "tokens": None,
        "floor_seconds": 1e-3,
        "bound": "compute",
        "peers": {
            "fastattn cpu": peer(ours, ours=True),
            "torch SDPA": peer(theirs),
            "FlexAttention": {"refused": "no <such> thing"},
        },
    } | more


def document(*found, kind="amd", date="2026-11-24T00:00:00+00:00", commit="abc", **more):
    machine = {"kind": kind, "device": "cpu", "date": date, "commit": commit, "cpu": "A CPU"}
    machine |= {"threads": 2, "isa": "avx512", "torch": "2.13", "python": "3.11"}
    ceilings = {"gemm_flops": {"float32": 2e11}, "fma_flops": 5e11, "memory_bytes": 3e10}
    whole = {"version": 2, "complete": True, "seconds": 1.0, "options": {}, "machine": machine}
    whole |= {"ceilings": ceilings, "clocks": [{"cpu_mhz": 2e3}], "results": list(found)}
    return whole | more


# ---- files ---------------------------------------------------------------------------------------


def test_written_files_read_back(tmp_path):
    path = tmp_path / "amd" / "a.json"
    results.write(path, document(result()))
    assert results.read_all([tmp_path]) == [(path, document(result()))]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("machine", "threads"), "two", r"document.machine.threads has a str"),
        (("ceilings",), {}, "document.ceilings has no gemm_flops"),
        (("extra",), 1, "document has an unknown key extra"),
        (("results", 0, "rank"), True, r"results\[0\].rank has a bool"),
        (("results", 0, "peers", "torch SDPA", "seconds", "median"), None, "median has a NoneType"),
        (("results",), {}, "must be a list"),
    ],
)
def test_what_is_not_as_the_schema_has_it_is_refused(place, value, message, tmp_path):
    bad = document(result())
    *path, last = place
    inner = bad
    for step in path:
        inner = inner[step]
    inner[last] = value
    with pytest.raises(ValueError, match=message):
        results.write(tmp_path / "bad.json", bad)
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    with pytest.raises(ValueError, match="is no results file"):
        results.read(tmp_path / "bad.json")


def test_committed_results_are_readable():
    assert results.read_all([results.RESULTS])


def test_newer_files_replace_the_cases_they_have():
    old = document(result("a", ours=1.0), result("b"), date="2026-01-01")
    new = document(result("a"), date="2026-02-01")
    other = document(result("a"), kind="h200", date="2026-01-15")
    kinds = results.by_kind([("old", old), ("other", other), ("new", new)])
    assert {kind: [path for path, _ in files] for kind, files in kinds.items()} == {
        "amd": ["new", "old"],
        "h200": ["other"],
    }
    assert [r["case"] for r in kinds["amd"][1][1]["results"]] == ["b"]


def test_machines_that_were_held_back_and_older_kernels_are_named_so():
    held = document(result(), kind="held", date="2026-03-01", commit="new")
    held["machine"] |= {"environment": {"FASTATTN_CPU_ISA": "avx2"}, "isa": "avx2"}
    new = document(result(), date="2026-02-01", commit="new")
    old = document(result(), kind="intel", date="2026-01-01", commit="old")
    kinds = results.by_kind([("old", old), ("new", new), ("held", held)])
    assert digest.titles(kinds) == {
        "amd": "A CPU, 2 threads, avx512",
        "intel": "A CPU, 2 threads, avx512: older kernels, of 2026-01-01",
        "held": "A CPU, 2 threads, avx2, torch and fastattn held to it",
    }
    assert list(kinds) == ["amd", "intel", "held"]


# ---- documents -----------------------------------------------------------------------------------


def test_tables_say_where_peers_are_faster():
    found = [result("fast"), result("slow", ours=4e-3, theirs=2e-3)]
    assert digest.faster_peers(found) == ["slow bf16: torch SDPA is 2.00× faster"]
    refused = result("no")
    refused["peers"]["fastattn cpu"] = {"refused": "not yet"}
    assert digest.faster_peers([refused]) == ["no bf16: torch SDPA takes it, ours does not"]
    assert digest.reached(found) == "25–50 %"


def test_the_readme_gets_its_table(tmp_path):
    kinds = results.by_kind([(tmp_path / "a.json", document(result(), result("minor", rank=1)))])
    text = report.in_readme(f"before{report.BEGIN}old{report.END}after", kinds)
    assert text.startswith("before") and text.endswith("after") and "old" not in text
    assert "| attention-fwd | S1024 | bf16 | 2 | 4 | **2.00** | 50% | 1.0e-03 | 1.0e-03 |" in text
    assert "minor" not in text and "registers 0.5" in text and "memory 30 GB/s" in text


def test_the_readme_says_which_rows_are_older_and_where_others_are_faster():
    new, old = document(result(ours=9e-3)), document(result("S9"), date="2026-01-01")
    text = report.readme_tables(results.by_kind([(Path("old"), old), (Path("new"), new)]))
    assert "| S1024 | bf16" in text and "| S9 (2026-01-01) | bf16" in text
    assert "Others are faster here:\n\n- S1024 bf16: torch SDPA is 2.25× faster\n" in text


def test_the_readme_shows_the_newest_machine_and_folds_the_others(tmp_path):
    new, old = document(result()), document(result(), kind="intel", date="2026-01-01")
    old["machine"]["cpu"] = "An old one"
    plots.draw(new, tmp_path / "new.json")
    files = [(tmp_path / "old.json", old), (tmp_path / "new.json", new)]
    shown, folded = report.readme_tables(results.by_kind(files)).split("<details>")
    assert "A CPU" in shown and "new-attention-fwd.png)" in shown
    assert "<summary>An old one, 2 threads, avx512</summary>" in folded and ".png" not in folded


def test_the_performance_page_has_everything(tmp_path):
    train = result("GPT", "train-step", tokens=1000)
    train["peers"]["fastattn cpu"] |= {"peak_bytes": 9 << 20, "facts": {"gradient_bytes": 7 << 20}}
    path = tmp_path / "a.json"
    pictures = plots.draw(document(result(), train), path)
    assert [p.name for p in pictures] == ["a-attention-fwd.png", "a-train-step.png"]
    kinds = results.by_kind([(path, document(result(), train))])
    short, whole = pages.performance_page(kinds, tmp_path).split("## A CPU, 2 threads, avx512")
    row = "| [attention-fwd](#amd-attention-fwd) | 1 | **2.00** | torch SDPA | 50 % |  |"
    assert row in short and "No peer that was measured here is faster anywhere." in short
    assert '<a id="amd-attention-fwd"></a>' in whole and "### train-step" in whole
    assert "![attention-fwd](../a-attention-fwd.png)" in whole and "multiply-add ports" in whole
    case = "| S1024 | bf16 | 2 | 50% | 1.0e-03 | 1.0 | **2.00** | torch SDPA |  |  |"
    assert case in whole and "| **fastattn cpu** | 2 | 1.8–2.2 | 50% |" in whole
    assert "| GPT | **fastattn cpu** | 500,000 | 2 | 0.5 | 50.0% |" in whole
    assert "no <such> thing: FlexAttention (1)" in whole


def test_the_performance_page_says_where_others_are_faster(tmp_path):
    slow = result("slow", ours=4e-3, theirs=2e-3)
    runs = [document(slow), document(result("old"), date="2026-01-01", complete=False)]
    files = [(tmp_path / f"{i}.json", run) for i, run in enumerate(runs)]
    text = pages.performance_page(results.by_kind(files[::-1]), tmp_path)
    assert "- attention-fwd, slow bf16: torch SDPA is 2.00× faster" in text
    assert "| **1.25** (0.50–2.00) | torch SDPA | 25–50 % | 1 |" in text
    assert "*2026-01-01, commit abc*" in text and "commit abc; some cases left out for time" in text


def test_the_best_of_the_others_stands_in_a_case_s_line():
    found = result(theirs=8e-3)
    found["peers"]["FlexAttention"] = peer(3e-3)
    assert digest.case_row(found)[6:] == ["**4.00**", "torch SDPA", "**1.50**", "FlexAttention"]
    found["peers"]["fastattn cpu"] = {"refused": "not yet"}
    assert digest.case_row(found) == ["S1024", "bf16", *[""] * 8]


def test_a_gpu_has_its_data_sheet_s_mfu_too():
    train = result("GPT", "train-step", tokens=1000)
    header, _, rows = digest.training([train], {"machine": {"data_sheet_flops": 1e12}})
    assert header[-1] == "of the data sheet's 1" and rows[0][-2:] == ["50.0%", "50.0%"]


def test_pictures_that_a_run_did_not_draw_are_drawn_by_the_report(tmp_path):
    report.draw_missing([(tmp_path / "a.json", document(result()))])
    assert (tmp_path / "a-attention-fwd.png").exists()


def test_one_page_holds_all_of_it(tmp_path):
    path = tmp_path / "r" / "a.json"
    results.write(path, document(result()))
    page = tmp_path / "page.html"
    assert cli.main(["report", str(tmp_path / "r"), "--html", str(page)]) == 0
    text = page.read_text()
    assert "<svg" in text and "no &lt;such&gt; thing" in text
    assert "src=" not in text and "http://" not in text.replace("http://www.w3.org", "")


def test_committed_documents_are_what_the_results_say(capsys):
    assert cli.main(["report", "--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("rich", [True, False])
def test_a_run_is_shown_line_by_line_in_a_log(rich, capsys, monkeypatch):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    with show.Show(1) as shown:
        shown.begin(DECODE)
        shown.done(result())
    text = capsys.readouterr().out
    assert "2 ms, 50% of the floor, error 1.0e-03, ×2.00 of torch SDPA" in text
    shown.summary([result()])
    text = capsys.readouterr().out
    assert "no <such> thing: FlexAttention (1)" in text and ("1.8–2.2" in text) == rich
    refused = copy.deepcopy(result())
    refused["peers"]["fastattn cpu"] = {"refused": "not yet"}
    assert "ours can't: fastattn cpu: not yet" in show.line(refused)


def test_a_run_is_shown_live_on_a_terminal():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    with show.Show(1, console) as shown:
        shown.begin(DECODE)
        shown.done(result())
    assert "1/1" in text.getvalue() and "fastattn cpu" in text.getvalue()


def test_the_live_table_leaves_room_for_the_bar():
    """A result is two lines here: six of ten lines are left for three of them."""
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=10)
    with show.Show(5, console) as shown:
        for name in "abcde":
            shown.done(result(name))
        assert [r["case"] for r in shown._last()] == ["c", "d", "e"]


# ---- comparisons ---------------------------------------------------------------------------------


def test_compare_tells_what_changed_beyond_the_noise(tmp_path, capsys):
    before = document(result("a"), result("b"), result("gone"))
    after = document(result("a", ours=3e-3), result("b", ours=2.1e-3, theirs=3.9e-3))
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for path, each in zip(paths, (before, after), strict=True):
        results.write(tmp_path / path, each)
    assert cli.main(["compare", *paths]) == 0
    out = capsys.readouterr().out
    assert "1.50× slower" in out and "1 of 4 times changed" in out


def test_check_compares_ratios(monkeypatch, tmp_path, capsys):
    known = {results.key(r): r for r in [result("a"), result("b")]}
    twice_as_slow_machine = document(result("a", ours=4e-3, theirs=8e-3))
    assert not compare.verdicts(known, twice_as_slow_machine, 0.25)[1]
    lines, failed = compare.verdicts(known, document(result("a", ours=3e-3), result("new")), 0.25)
    assert (
        failed == {results.key(result("a"))} and len(lines) == 1 and "2.00 → 1.33  FELL" in lines[0]
    )
    assert not compare.verdicts(known, document(result("a", ours=3e-3)), 0.5)[1]
    results.write(tmp_path / "other.json", document(result(), kind="another machine"))
    assert cli.main(["check", "--against", str(tmp_path)]) == 0
    assert "nothing to compare with" in capsys.readouterr().out


# ---- the command line ----------------------------------------------------------------------------


def test_a_run_from_the_command_line(monkeypatch, tmp_path, capsys):
    from benchmarks import ceilings

    monkeypatch.setattr(ceilings, "SIZES", {"cpu": (64, 1 << 20)})
    monkeypatch.setattr(ceilings, "FMA_ROUNDS", 1000)
    out = tmp_path / "run.json"
    filters = ["--suite", "decode", "--dtype", "bf16", "--peer", "folded", "--seconds", "0.01"]
    assert cli.main(["--device", "cpu", "--quick", *filters, "--out", str(out)]) == 0
    (found,) = results.read(out)["results"]
    assert set(results.timed(found)) == {"fastattn cpu", "torch SDPA, group folded"}
    printed = capsys.readouterr().out
    assert "of the floor" in printed and "Ceilings" in printed and "pictures" in printed
    assert (tmp_path / "run-decode.png").exists()
    # gone on with, by another suite, for which there is no time
    more = ["--suite", "varlen", "--resume", "--budget", "1e-9"]
    assert cli.main(["--device", "cpu", "--quick", *more, "--out", str(out)]) == 0
    assert "left out 2 of 2 cases" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shape", "S3"], "no case is left"),
        (["--peer", "nobody"], "no peer has nobody"),
        (["--backend", "tpu"], "no backend tpu; there are cuda, triton, cpu, reference"),
        (["compare", "a.json", "b.json"], "a.json"),
        (["report", "."], "no results file"),
    ],
)
def test_mistakes_are_told_in_a_line(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "find", lambda kind: Cpu())
    assert cli.main(argv) == 1
    assert message in capsys.readouterr().err


def test_list(capsys):
    assert cli.main(["--device", "cpu", "--list", "--suite", "decode"]) == 0
    printed = capsys.readouterr().out
    assert "0 decode               B8 H32/8 keys 4096 D128" in printed
    assert "FlashInfer                      not for cpu" in printed and "Liger" not in printed


def test_runs_on_a_gpu_are_supervised(monkeypatch, tmp_path):
    gpu = SimpleNamespace(torch_device=torch.device("cuda"))
    monkeypatch.setattr(cli, "find", lambda kind: gpu)
    monkeypatch.setattr(cli.machine, "describe", lambda device: {"kind": "h200", "gpu": "H200"})
    given = []
    monkeypatch.setattr(cli.supervise, "supervise", lambda *args: given.append(args) or 0)
    out = tmp_path / "run.json"
    out.touch()
    assert cli.main(["--budget", "90", "--quick", "--out", str(out)]) == 0
    command, path, budget = given[0]
    assert path == out and budget == 90 and not out.exists()
    assert command(42.0)[-6:] == ["--supervised", "--resume", "--out", str(out), "--budget", "42"]
