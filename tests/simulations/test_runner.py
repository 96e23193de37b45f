"""A tiny study through the whole runner."""

import json
import signal
import subprocess
from dataclasses import dataclass, replace

import pytest

from simulations.runner import Cell, Page, Study, Table, ledger, publication, run
from simulations.runner.loop import in_turn, parsed
from simulations.runner.publication import places
from simulations.runner.study import shared_changes
from smi_fed.checks import Count, Natural, SettingError, checked, read

WHERE = {"device": "cpu", "versions": {"torch": "2"}}


@checked
class Settings:
    size: Count = 1
    seed: Natural = 0


def compose(words):
    return read(Settings, {key: int(value) for key, value in (word.split("=") for word in words)})


def area(settings, cell):
    return {"area": cell["width"] * settings.size}


def dies(_settings, cell):
    if cell["width"] == 2:
        signal.raise_signal(signal.SIGKILL)
    return {"area": cell["width"]}


@dataclass
class Counting:
    """A tiny study that remembers what it measured."""

    fails: tuple = ()

    def __post_init__(self):
        self.measured = []
        self.study = Study(
            name="tiny", about="", measure=self.measure, compose=compose, place=lambda _: ("cpu", 0), in_turn="width",
            cells=lambda options: [Cell({"width": width, "height": h}) for width in options.widths for h in (1, 2)],
            table=lambda lines: [Table("areas", [["area"], *([str(line["area"])] for line in lines)])],
            options=lambda parser: parser.add_argument("--widths", type=int, nargs="+", default=[1, 2]),
        )  # fmt: skip

    def measure(self, settings, cell):
        self.measured.append((settings.seed, cell["width"], cell["height"]))
        if self.measured[-1] in self.fails:
            raise self.fails[self.measured[-1]]
        return area(settings, cell)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository with a library, studies and docs, of one commit."""
    root = tmp_path / "project"
    for name in (*ledger.SOURCES, "docs", "simulations"):
        (root / name).mkdir(parents=True)
        (root / name / "a.py").write_text("one")
    monkeypatch.setattr(ledger, "PROJECT", root)
    git(root, "init", "-q")
    commit(root)
    return root


def git(root, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *who, *words], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def commit(root):
    git(root, "add", "-A")
    git(root, "commit", "-qm", "x")
    return git(root, "rev-parse", "HEAD")


def test_a_line_tells_what_was_measured_by_which_code_and_where(tmp_path, project, capsys):
    tiny = Counting()
    done = run(tiny.study, ["--output", str(tmp_path / "out"), "--seeds", "3", "4", "size=5"])
    assert done.status == 0
    assert tiny.measured == [(s, w, h) for s in (3, 4) for h in (1, 2) for w in (1, 2)]  # widths alternate
    lines = [json.loads(text) for text in (tmp_path / "out" / "pieces.jsonl").read_text().splitlines()]
    assert lines == list(done.lines)
    assert lines[1] | {"environment": 0, "key": 0} == {
        "key": 0, "seed": 3, "width": 2, "height": 1, "area": 10, "changes": ["size=5"], "environment": 0,
        "code": {"commit": git(project, "rev-parse", "HEAD"), "sources": ledger.sources_digest()},
    }  # fmt: skip
    assert lines[1]["environment"]["device"] == "cpu"
    assert "│ 10" in capsys.readouterr().out


def test_a_study_that_was_killed_goes_on(tmp_path, project):
    words = ["--output", str(tmp_path)]
    killed = Counting({(0, 2, 1): KeyboardInterrupt()})
    assert run(killed.study, words).status == 130
    path = tmp_path / "pieces.jsonl"
    assert len(path.read_text().splitlines()) == 1
    path.write_text(path.read_text() + '{"key": "half')  # a crash amid a line
    tiny = Counting()
    assert len(run(tiny.study, words).lines) == 4
    assert tiny.measured == [(0, 2, 1), (0, 1, 2), (0, 2, 2)]
    assert len(ledger.read_lines(path)) == 4
    again = Counting()
    assert run(again.study, words).status == 0
    assert again.measured == []
    assert [line["area"] for line in run(again.study, [*words, "--widths", "2"]).lines] == [2, 2]


def test_other_code_measures_anew_and_other_docs_do_not(tmp_path, project):
    def measured():
        tiny = Counting()
        run(tiny.study, ["--output", str(tmp_path / "out"), "--widths", "1"])
        return len(tiny.measured)

    assert (measured(), measured()) == (2, 0)
    (project / "docs" / "a.py").write_text("two")
    commit(project)
    assert measured() == 0
    for name in ledger.SOURCES:
        (project / name / "a.py").write_text("two")
        assert (measured(), measured()) == (2, 0)
    (project / "simulations" / "a.py").write_text("two")
    commit(project)
    assert (measured(), measured()) == (2, 0)


def test_no_git_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "PROJECT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert ledger.code_version()["commit"] is None
    monkeypatch.setenv("PATH", "")
    assert ledger.code_version()["commit"] is None


def check_height(_settings, cell):
    if cell["height"] == 2:
        raise SettingError("height", 2, "1")


@pytest.mark.parametrize(
    ("words", "changes", "says"),
    [
        (["size=0"], {}, "size: got 0"),
        (["--seeds", "0", "-1"], {}, "seed: got -1"),
        (["--seeds", "0", "seed=1"], {}, "not both"),
        ([], {"check": check_height}, "height: got 2"),
        ([], {"place": lambda _: ("cuda:99", 0)}, "device: got 'cuda:99'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(tmp_path, capsys, words, changes, says):
    tiny = Counting()
    assert run(replace(tiny.study, **changes), ["--output", str(tmp_path), *words]).status == 2
    assert says in capsys.readouterr().err
    assert tiny.measured == []


def test_a_directory_that_cannot_be_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(Counting().study, ["--output", str(tmp_path / "file")]).status == 2
    assert "file" in capsys.readouterr().err


def test_a_cell_that_fails_leaves_the_others_theirs(tmp_path, capsys):
    tiny = Counting({(0, 1, 1): RuntimeError("no luck")})
    done = run(tiny.study, ["--output", str(tmp_path)])
    assert done.status == 1
    assert [(line["width"], line["height"]) for line in done.lines] == [(2, 1), (1, 2), (2, 2)]
    assert "not measured: seed 0, width 1, height 1: RuntimeError: no luck" in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_that_dies_leaves_the_others_theirs(tmp_path):
    cells = [Cell({"width": 2}), Cell({"width": 1})]
    study = replace(Counting().study, measure=dies, own_process=True, cells=lambda _: cells)
    done = run(study, ["--output", str(tmp_path)])
    assert done.status == 1
    assert [line["width"] for line in done.lines] == [1]


def test_overrides_may_stand_behind_seeds():
    options = parsed(Counting().study, ["a=1", "--seeds", "1", "2", "b=[1,2]", "--output", "of=1", "~c", "+d=1"])
    assert options.seeds == [1, 2]
    assert sorted(options.overrides) == ["+d=1", "a=1", "b=[1,2]", "~c"]
    assert str(options.output) == "of=1"


def test_cells_alternate():
    cells = [Cell({"m": m, "n": n}) for m in "abc" for n in ((1, 2) if m != "b" else (0,))]
    assert [each["m"] + str(each["n"]) for each in in_turn(cells, "m")] == ["a1", "b0", "c1", "a2", "c2"]
    assert in_turn(cells, "none of its") == cells


def line(area, **more):
    return {"key": f"{area}{more}", "seed": area, "area": area, "code": {"commit": "a"}, "environment": WHERE, **more}


def test_what_is_kept_is_of_one_code_and_told_on_its_page(tmp_path):
    page = Page("docs/a.md", note=lambda lines: f", {len(lines)} of them.")
    study = replace(Counting().study, page=page)
    for name in ("docs", "benchmarks/results", "first", "second"):
        (tmp_path / name).mkdir(parents=True)
    old, one, two = line(7, code=None), line(1, changes=["size=2"]), line(2, changes=["size=2"])
    for name, lines in (("first", [old, line(3, changes=[]), one]), ("second", [two])):
        for each in lines:
            ledger.append_line(tmp_path / name / "pieces.jsonl", each)
    publication.keep(study, [tmp_path / "first", tmp_path / "second"], tmp_path)
    results = tmp_path / "benchmarks" / "results"
    assert publication.kept("tiny", results)[1] == [one, two]
    text = publication.section(study, results)
    assert "areas\n" in text
    assert text.endswith(
        "`python -m simulations.tiny --seeds 1 2 size=2`, 2 of them. [Raw pieces](benchmarks/results/tiny.jsonl).\n"
    )
    publication.keep(replace(study, apart="seed"), [tmp_path / "first"], tmp_path)
    assert publication.kept("tiny", results)[1] == [old, line(3, changes=[]), one]
    with pytest.raises(ValueError, match="no measured lines"):
        publication.keep(study, [tmp_path / "docs"], tmp_path)


def test_a_document_stands_for_lines(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps({"environment": WHERE, "rows": [{"seed": 1}, {"seed": 2}]}))
    assert publication.kept("tiny", tmp_path)[1] == [{"environment": WHERE, "seed": seed} for seed in (1, 2)]


def test_a_table_in_markdown():
    table = Table("t", [["a", "b"], ["1", "2"]], ["note"])
    assert publication.markdown(table) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n\nnote\n"


def test_a_page_says_where_each_part_was_measured_if_not_alike():
    cpu = {"data": "digits", "changes": ["server.threads=1"], "environment": {"device_name": "Some CPU"}}
    gpu = {"data": "real", "changes": [], "environment": {"device_name": "Some GPU"}}
    lines = [cpu, gpu, cpu | {"data": "shapes"}]
    said = "*digits*, *shapes* on Some CPU with `server.threads=1`; *real* on Some GPU"
    assert places(lines, "data") == f" Measured: {said}."
    assert places([cpu, cpu | {"data": "shapes"}], "data") == ""
    assert places([{"changes": []}, gpu], "data") == " Measured: *real* on Some GPU; the rest on an unnamed device."
    assert shared_changes([cpu, cpu]) == ["server.threads=1"]
    assert shared_changes(lines) == []
