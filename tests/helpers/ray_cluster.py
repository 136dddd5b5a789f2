"""A Ray cluster of one node or several on this machine, which listens on 127.0.0.1 alone.

    python -m helpers.ray_cluster PROCESSORS [NODES]        # each node has as many processors

It prints its address, and ends with its standard input. `ray start` would listen on all addresses.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

# Ray's own switch for systems whose firewall asks about each port: the node's address is then 127.0.0.1.
LOCAL_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


def main() -> None:
    os.environ.update(LOCAL_ONLY)
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # the path of a socket is short
        node: dict[str, Any] = {
            "num_cpus": int(sys.argv[1]),
            "num_gpus": 0,
            "include_dashboard": False,
            "include_log_monitor": False,
            "no_monitor": True,
            "object_store_memory": 80 * 2**20,
            "temp_dir": folder,
        }
        os.environ["TMPDIR"] = folder  # of its processes: one that is killed leaves files
        Path(folder, "ray").mkdir()  # where Ray notes which cluster runs
        cluster = Cluster(initialize_head=True, head_node_args=node)
        del node["no_monitor"]  # the head's
        for _ in range(1, int(sys.argv[2]) if len(sys.argv) > 2 else 1):
            cluster.add_node(**node)
        print(cluster.address, flush=True)
        sys.stdin.read()
        cluster.shutdown()


if __name__ == "__main__":
    main()
