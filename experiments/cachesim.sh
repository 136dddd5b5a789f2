#!/usr/bin/env bash
# Which cache policy keeps the right users? MovieLens-100K, and synthetic traces of 2 million requests.
# Usage: experiments/cachesim.sh [OUTPUT_ROOT]   (about 15 minutes on one core; answer: reports/cachesim.md)
set -euo pipefail
root=${1:-outputs}
simulate() { ${PYTHON:-python3} -m grbench cachesim "$@" output_root=$root; }
synthetic="workload=synthetic workload.visits=2000000 workload.users=2000000"
simulate
simulate $synthetic workload.revisit_rate=0.3
simulate $synthetic workload.revisit_rate=0.6
simulate $synthetic workload.revisit_rate=0.8
simulate workload=synthetic workload.visits=2000000 workload.users=200000
# The margin over lru again: other seeds, other visits made of the same ratings, and users of whom none comes more often.
small="workload=synthetic workload.visits=200000 policies=[lru,predictive]"
simulate -m $small workload.users=200000 workload.revisit_rate=0.3,0.6,0.8 seed=1,2,3
simulate -m $small workload.users=200000 workload.revisit_rate=0.6 workload.burstiness=0.8 seed=1,2,3
simulate -m $small workload.users=20000 seed=1,2,3
simulate -m workload.max_history=128,256,2048 policies=[lru,predictive]
simulate -m workload.visit_events=4,8,32 policies=[lru,predictive]
simulate -m $small workload.users=20000 workload.user_zipf=0 seed=1,2,3
