import json
import shutil

import pytest

from simulations import results

RUN = {
    "clients": 4, "model_megabytes": 21.5, "before_megabytes": 500.4, "peak_megabytes": 800.0,
    "peak_megabytes_by_round": [790.0, 800.0], "server_seconds_per_client": 1.5,
    "inversion_seconds_per_client": 0.25, "distillation_seconds_per_client": 1.0, "seconds": 9.0,
}  # fmt: skip
SHARED = {
    "seed": 0, "changes": ["distillation.steps=100"], "code": {"commit": "a", "sources": "b"},
    "environment": {"device_name": "Some CPU", "cores": 2, "threads": 1},
}  # fmt: skip
SCALE = [
    SHARED | RUN | {"key": "a"},
    SHARED | RUN | {"key": "b", "clients": 64, "peak_megabytes": 880.0, "server_seconds_per_client": 1.2},
]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of what `results` writes to."""
    for name in ("docs", "benchmarks"):
        shutil.copytree(results.PROJECT / name, tmp_path / name)
    shutil.copy(results.PROJECT / "README.md", tmp_path)
    monkeypatch.setattr(results, "PROJECT", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "benchmarks" / "results")
    return tmp_path


def files(project):
    return {path.relative_to(project): path.read_bytes() for path in project.rglob("*") if path.is_file()}


def test_the_scale_benchmark_is_kept_and_told(project, tmp_path_factory):
    measured = tmp_path_factory.mktemp("scale")
    text = "".join(json.dumps(line) + "\n" for line in SCALE)
    (measured / "pieces.jsonl").write_text(text)
    (project / "benchmarks/results/scale.json").write_text("{}")  # of an earlier form, which gives way
    before = files(project)
    assert results.main(["--scale", str(measured)]) == 0
    assert (project / "benchmarks/results/scale.jsonl").read_text() == text
    assert (project / "docs/scale.png").read_bytes().startswith(b"\x89PNG")
    text = (project / "docs/many-clients.md").read_text()
    section = text.partition("<!-- scale:start -->\n")[2].partition("<!-- scale:end -->")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert rows[0] == (
        "| clients | peak, MB | before the round, MB | server, seconds per client | of it inversion | "
        "of it distillation |"
    )
    assert rows[2:] == ["| 4 | 800 | 500 | 1.50 | 0.25 | 1.00 |", "| 64 | 880 | 500 | 1.20 | 0.25 | 1.00 |"]
    assert "64 over 4 clients: 1.10 times the peak memory, 0.80 times the server's seconds per client." in section
    assert "`python -m simulations.scale --clients 4 64 --rounds 2 distillation.steps=100`" in section
    assert "models of 21.5 MB, Some CPU, 2 cores" in section
    assert "](../benchmarks/results/scale.jsonl)" in section
    after = files(project)
    changed = {str(path) for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed == {f"benchmarks/results/scale.{kind}" for kind in ("json", "jsonl")} | {
        "docs/scale.png", "docs/many-clients.md",
    }  # fmt: skip


def test_a_directory_without_lines_is_told(project, tmp_path, capsys):
    before = files(project)
    assert results.main(["--compare", str(tmp_path / "nowhere")]) == 2
    assert "no measured lines in" in capsys.readouterr().err
    assert files(project) == before


def test_without_arguments_everything_stays(project):
    before = files(project)
    assert results.main([]) == 0
    assert files(project) == before


def test_a_section_goes_to_its_own_page(monkeypatch):
    monkeypatch.setattr(results, "SECTIONS", {
        "one": ("README.md", lambda: "[raw](benchmarks/results/a.json)\n"),
        "two": ("docs/page.md", lambda: "[raw](benchmarks/results/a.json)\n"),
    })  # fmt: skip
    one, two = (f"a\n<!-- {name}:start -->\nold\n<!-- {name}:end -->\nb\n" for name in ("one", "two"))
    assert results.filled(one, "README.md") == one.replace("old", "[raw](benchmarks/results/a.json)")
    assert results.filled(two, "docs/page.md") == two.replace("old", "[raw](../benchmarks/results/a.json)")
    with pytest.raises(ValueError, match=r"docs/page.md: no markers <!-- two:start -->"):
        results.filled(one, "docs/page.md")
    with pytest.raises(ValueError, match="no markers"):
        results.filled("<!-- one:start -->\nopen", "README.md")
