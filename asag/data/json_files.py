"""Reading JSON files with errors that name the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from asag.data.errors import DataIssue, DatasetError


def load_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        DatasetError: the file is absent, unreadable or not JSON (with line and column).
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        problem, remedy = "no such file", "check the path"
    except OSError as error:
        problem, remedy = f"cannot be read ({error.strerror})", "check the path and its permissions"
    except json.JSONDecodeError as error:
        problem = f"not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        remedy = "the file may be cut off or edited by hand; export or download it again"
    except UnicodeDecodeError as error:
        problem = f"not text in UTF-8 (byte {error.start})"
        remedy = "export it again as UTF-8 JSON"
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        problem, remedy = f"not a COCO file: {error}", "export or download it again"
    raise DatasetError([DataIssue(str(path), problem, remedy)])
