"""Overrides of small searches: of two configurations, each of which is measured in seconds."""

TINY = (
    *("model.layers=1", "workload=synthetic", "workload.users=20", "workload.items=100", "workload.visits=400"),
    *("workload.max_history=16", "workload.num_candidates=4", "warmup_batches=1", "gate.requests=2", "gate.measured=8"),
    *("tracking=none", "engine=hstu", "kernel=torch", "cache=none", "scenario.max_wait_ms=0"),
)
SEARCH = (*TINY, "scenario.max_batch=4", "engine.cpu_threads=1,2", "probe_s=1", "certify_runs=0")
