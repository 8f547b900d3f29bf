"""Generated documents are what the code would generate now."""

from pathlib import Path

from pipeline.reference import documents

DOCS = Path(__file__).parents[2] / "docs"


def test_the_generated_documents_are_current():
    for name, text in documents().items():
        assert (DOCS / name).read_text() == text, f"docs/{name} is out of date: run `make docs`"
