"""Block sizes by device kind, as data: JSON files that say where each number comes from."""
