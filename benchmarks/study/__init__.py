"""The study behind docs/which-objective.md: comparisons of objectives, their raw numbers, tables and figures."""
