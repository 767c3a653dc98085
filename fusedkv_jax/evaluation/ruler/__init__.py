"""RULER's thirteen long-context tasks (arXiv 2404.06654): generators and scores."""

from fusedkv_jax.evaluation.ruler.material import Material
from fusedkv_jax.evaluation.ruler.tasks import (
    ALL,
    TASKS,
    Sample,
    Task,
    check_files,
    expand,
    load_material,
    make,
    string_match_all,
    string_match_part,
)

__all__ = [
    "ALL",
    "TASKS",
    "Material",
    "Sample",
    "Task",
    "check_files",
    "expand",
    "load_material",
    "make",
    "string_match_all",
    "string_match_part",
]
