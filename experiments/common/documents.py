"""What programs write and read as JSON."""

from collections.abc import Mapping
from typing import Any

Document = dict[str, Any]  # of any depth: the checker of types does not follow it
Row = Mapping[str, Any]  # of a table, or whatever is only read
