import re
from pathlib import Path

from simulations.results import filled

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_library_example_runs(capsys):
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (example,) = [code for code in examples if "invert(" in code]
    exec(example, {})
    assert "torch.Size([10, 3, 32, 32]) torch.Size([10, " in capsys.readouterr().out


def test_the_tables_are_those_of_the_kept_results():
    text = README.read_text(encoding="utf-8")
    assert filled(text) == text


def test_every_file_that_the_readme_names_is_there():
    text = README.read_text()
    linked = re.findall(r"\]\((?!http)([^)]+)\)", text)
    named = re.findall(r"`(conf/[\w/]+\.yaml)`", text)
    assert linked
    assert [path for path in linked + named if not (README.parent / path).exists()] == []
