#!/usr/bin/env bash
# Starts the ranks of this machine with torchrun. What is not torchrun's goes to `megatron-rl train`; a run that its folder holds
# already goes on (`--auto-resume`).
#
#   launch/torchrun.sh recipe.yaml                                          one machine, a rank a GPU
#   launch/torchrun.sh --nproc-per-node 2 recipe.yaml optimizer.lr=1e-6     one machine, two ranks
#   launch/torchrun.sh --nnodes 4 --node-rank 1 --master-addr node0 recipe.yaml              this is the second of four
#   launch/torchrun.sh --nnodes 4 --rdzv-endpoint node0:29400 --rdzv-id 7 recipe.yaml        the same on all of them
#
#   --python PYTHON    the environment's Python; else that of .venv beside this script's folder, else python
#   --nnodes, --nproc-per-node, --node-rank, --master-addr, --master-port, --rdzv-backend, --rdzv-endpoint, --rdzv-id, --rdzv-conf,
#   --local-addr, --log-dir, --redirects, --tee, --standalone    are torchrun's own
#
# Where an option is not given, the environment's NNODES, NPROC_PER_NODE, NODE_RANK, MASTER_ADDR and MASTER_PORT are taken.
# SIGTERM is passed on: ranks end their step, save, and this ends with 143. Exit codes are those of `megatron-rl train`.
set -euo pipefail

home="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
usage() { sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

python="" options=() words=()
declare -A given=()

# take NAME VALUE: an option of torchrun's.
take() {
    given[$1]="$2"
    options+=("--$1=$2")
}

while (($#)); do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --python) python="${2:?--python needs the path of a Python}"; shift ;;
        --standalone) options+=(--standalone); given[standalone]=yes ;;
        --nnodes=* | --nproc[-_]per[-_]node=* | --node[-_]rank=* | --master[-_]addr=* | --master[-_]port=* | --rdzv[-_]*=* | \
            --local[-_]addr=* | --log[-_]dir=* | --redirects=* | --tee=*)
            name="${1%%=*}"
            name="${name//_/-}"
            take "${name#--}" "${1#*=}"
            ;;
        --nnodes | --nproc[-_]per[-_]node | --node[-_]rank | --master[-_]addr | --master[-_]port | --rdzv[-_]* | --local[-_]addr | \
            --log[-_]dir | --redirects | --tee)
            name="${1//_/-}"
            take "${name#--}" "${2:?$1 needs a value}"
            shift
            ;;
        *) words+=("$1") ;;
    esac
    shift
done

if ((${#words[@]} == 0)); then
    usage >&2
    exit 2
fi
[[ -n "${given[nnodes]:-}" || -z "${NNODES:-}" ]] || take nnodes "$NNODES"
[[ -n "${given[nproc-per-node]:-}" ]] || take nproc-per-node "${NPROC_PER_NODE:-gpu}"
if [[ -z "${given[rdzv-endpoint]:-}${given[standalone]:-}" ]]; then
    if [[ "${given[nnodes]:-1}" == 1 && -z "${given[master-addr]:-}${MASTER_ADDR:-}" ]]; then
        options+=(--standalone)
    else
        [[ -n "${given[node-rank]:-}" || -z "${NODE_RANK:-}" ]] || take node-rank "$NODE_RANK"
        [[ -n "${given[master-addr]:-}" || -z "${MASTER_ADDR:-}" ]] || take master-addr "$MASTER_ADDR"
        [[ -n "${given[master-port]:-}" || -z "${MASTER_PORT:-}" ]] || take master-port "$MASTER_PORT"
        if [[ -z "${given[master-addr]:-}" || ( -z "${given[node-rank]:-}" && "${given[nnodes]:-1}" != 1 ) ]]; then
            printf 'torchrun.sh: failed: several machines find each other by --master-addr and --node-rank, or --rdzv-endpoint\n' >&2
            printf '    Give them, or MASTER_ADDR and NODE_RANK in the environment: see --help.\n' >&2
            exit 2
        fi
    fi
elif [[ -n "${given[rdzv-endpoint]:-}" && -z "${given[rdzv-backend]:-}" ]]; then
    options+=(--rdzv-backend=c10d)
fi

[[ -n "$python" || ! -x "$home/.venv/bin/python" ]] || python="$home/.venv/bin/python"
exec "${python:-python}" -m megatron_rl.train.elastic "${options[@]}" -m megatron_rl.cli train "${words[@]}" --auto-resume
