"""One module a question; each prints a table and, with --json, writes rows with machine, threads, torch and commit."""
