"""Running cells: session, runner, worker, records."""
