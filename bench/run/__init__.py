"""Running a plan: gates and rounds of worker processes, their environment and their artifacts."""
