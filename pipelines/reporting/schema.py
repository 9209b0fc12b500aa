"""The JSON schema of a report, as it lies beside this file; run as a module, this writes it anew."""

from __future__ import annotations

import json
from pathlib import Path

from qat2int8.pipelines.reporting.document import ReportDocument

__all__ = ["SCHEMA", "schema_text"]

SCHEMA = Path(__file__).with_name("report.schema.json")


def schema_text() -> str:
    """The schema of what a report file holds."""
    schema = ReportDocument.model_json_schema(mode="serialization")
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A report of qat2int8"}
    return json.dumps({**schema, **about}, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf-8")
