#!/usr/bin/env bash
# shellcheck disable=SC2317 # functions that a trap calls, and those whose text is sent to the nodes
# The inside of a SLURM job: starts the ranks of a run and its servers on the nodes of the allocation, and ends as they end.
# What `megatron-rl launch --slurm` prints calls it; it runs as the job's batch script, on the first node.
#
#   job.sh --nodes 2 --ranks-per-node 8 --server-nodes 1 --servers-per-node 8 --logs DIR --python PYTHON -- recipe.yaml name=value
#
#   --nodes N              nodes that train, the first of the allocation; 0: servers alone
#   --ranks-per-node N     ranks on each of them
#   --cpus-per-rank N      cores of a rank; else a rank may use all of the job's on its node
#   --server-nodes N       nodes that serve, the last of the allocation; 0: none
#   --colocated            servers on the nodes that train, on the same GPUs
#   --servers-per-node N   SGLang servers on each of these
#   --urls FILE            where servers write their URLs and the run finds them; else, where there are servers, a file of this job
#   --api-key-file FILE    the servers' API key; else FILE.key beside the URLs, made by the first job that needs it
#   --logs DIR             logs go into DIR/job-ID
#   --python PYTHON        runs `-m megatron_rl.cli`: in the container where there is one
#   --requeue N            how often the job is put back into the queue when it was told to stop; 0: never
#   --container IMAGE      with --runtime pyxis or apptainer, and any number of --mount HOST:CONTAINER
#
# Told to stop (SIGTERM to this script or to the steps: preemption, the end of its time), the ranks save, and the job is put back
# into the queue; started again it goes on with `--auto-resume`. `scancel JOB` ends it for good. SLURM itself puts a job back that
# has lost a node.
#
# Exit codes are those of `megatron-rl train`: 0 all steps are done, 2 something to mend, 143 told to stop and saved; 137 where ranks
# had to be killed, since another one had failed.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
STOPPED=143      # of a run that was told to stop, and has saved
PATIENCE=60      # seconds for servers to end
ENDING=120       # seconds that the tasks of a step have to end by themselves once one of them has; then they are killed
LAUNCH=5         # seconds in which SLURM starts the tasks of a step
LAST_LINES=20    # of a log, shown when its part has failed

nodes=0 ranks_per_node=1 cpus_per_rank="" server_nodes=0 colocated="" servers_per_node=1 urls="" key="" logs="" python=""
requeue=0 container="" runtime=pyxis mounts=() words=()
training="" serving="" told="" begun=0

say() { printf '%s job %s: %s\n' "$(date +%T)" "$SLURM_JOB_ID" "$*"; }

# fail WHAT-WENT-WRONG WHAT-TO-DO
fail() {
    printf 'job.sh: failed: %s\n    %s\n' "$1" "$2" >&2
    exit 2
}

usage() { sed -n '3,/^set /{/^set /d; s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

main() {
    read_options "$@"
    find_nodes
    prepare_folder
    unset SLURM_CPUS_PER_TASK SRUN_CPUS_PER_TASK # a rank's; some versions of srun would give the one task of servers no more
    trap on_told TERM INT USR1 USR2
    local ranks="${hosts[*]:0:nodes}"
    say "start ${SLURM_RESTART_COUNT:-0}: ranks on ${ranks:-no node of this job}; servers on ${server_hosts[*]:-no node of this job}"
    say "logs in $folder"
    ((${#server_hosts[@]} == 0)) || start_servers
    ((nodes == 0)) || start_ranks
    wait_for_the_first
    local code=0
    end_the_other || code=$?
    finish "$code"
}

read_options() {
    while (($#)); do
        [[ "$1" == --colocated || "$1" == --help || "$1" == -h || "$1" == -- ]] || (($# > 1)) || fail "$1 has no value" "See --help."
        case "$1" in
            --nodes) nodes="$2" ;;
            --ranks-per-node) ranks_per_node="$2" ;;
            --cpus-per-rank) cpus_per_rank="$2" ;;
            --server-nodes) server_nodes="$2" ;;
            --servers-per-node) servers_per_node="$2" ;;
            --urls) urls="$2" ;;
            --api-key-file) key="$2" ;;
            --logs) logs="$2" ;;
            --python) python="$2" ;;
            --requeue) requeue="$2" ;;
            --container) container="$2" ;;
            --runtime) runtime="$2" ;;
            --mount) mounts+=("$2") ;;
            --colocated) colocated=yes; shift; continue ;;
            --help | -h) usage; exit 0 ;;
            --) shift; words=("$@"); break ;;
            *) fail "unknown option $1" "$here/job.sh --help tells what there is." ;;
        esac
        shift 2
    done
    [[ -n "${SLURM_JOB_ID:-}" ]] || fail "this is no SLURM job" "Submit it: megatron-rl launch CONFIG --slurm --submit."
    [[ -n "$logs" && -n "$python" && ${#words[@]} -gt 0 ]] || fail "--logs, --python or the settings file is missing" "See --help."
}

find_nodes() {
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    local wanted=$((nodes + server_nodes))
    ((${#hosts[@]} == wanted)) || fail "the allocation has ${#hosts[@]} nodes, and $wanted are needed" "Ask for --nodes=$wanted."
    server_hosts=("${hosts[@]:nodes}")
    [[ -z "$colocated" ]] || server_hosts=("${hosts[@]}")
}

prepare_folder() {
    folder="$logs/job-$SLURM_JOB_ID"
    (umask 077 && mkdir -p "$folder") || fail "$folder cannot be written" "Set launch.logs to a folder that all nodes see."
    if [[ -z "$urls" && ${#server_hosts[@]} -gt 0 ]]; then
        urls="$folder/urls"
        rm -f "$urls" # of servers that were killed when this job ran before
    fi
    [[ -z "$urls" || -n "$key" ]] || make_key "$urls.key"
}

# Of several jobs that make it at once one does, and all read that: a link is whole or not there, and never over another.
make_key() {
    local own="$1.$SLURM_JOB_ID"
    key="$1"
    [[ ! -s "$key" ]] || return 0
    (umask 077 && mkdir -p "$(dirname "$own")") || fail "$own cannot be written" "Set servers.urls_file to a file that all nodes see."
    (umask 077 && head -c 32 /dev/urandom | od -A n -v -t x1 | tr -d ' \n' >"$own")
    ln "$own" "$key" 2>/dev/null || true
    rm "$own"
}

# The address by which SLURM itself reaches a node.
address_of() {
    local found
    found="$(scontrol show node --oneliner "$1" | grep -o ' NodeAddr=[^ ]*' | cut -d = -f 2)" || true
    printf '%s\n' "${found:-$1}"
}

# The same as a number, so that a server listens there and nowhere else. A machine's own name may mean its loopback to itself.
interface_of() {
    local name found
    name="$(address_of "$1")"
    found="$(getent ahosts "$name" | awk 'NR == 1 {print $1}')" || true
    [[ -n "$found" && "$found" != 127.* && "$found" != ::1 ]] || found="$name"
    printf '%s\n' "$found"
}

# Below the ports that systems give out by themselves; one that nobody listens on. This script runs on the first node.
free_port() {
    local port=$((20000 + (SLURM_JOB_ID * 31 + ${SLURM_RESTART_COUNT:-0} * 7) % 12000))
    while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
        port=$((20000 + (port + 1) % 12000))
    done
    printf '%s\n' "$port"
}

# -- what runs in the steps: its text is sent along, so that a container needs no file of ours -----------------------------

# A rank: SLURM's words in torchrun's.
as_rank() {
    export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"
    export LOCAL_WORLD_SIZE="$1" MASTER_ADDR="$2" MASTER_PORT="$3"
    shift 3
    exec "$@"
}

# The servers of a node: its interface is the one of this number.
as_servers() {
    local count="$1" logs="$2" interfaces
    read -r -a interfaces <<<"$3"
    shift 3
    exec "$@" "servers.host=${interfaces[SLURM_NODEID]}" "servers.logs=$logs/servers-$SLURM_NODEID" --servers "$count"
}

# step NAME HOSTS-WITH-COMMAS OPTIONS... -- FUNCTION ARGUMENTS...: an srun in the background, its tasks in their container.
# Not with --kill-on-bad-exit: it sends SIGTERM to the others, whose 143 would hide the code of the one that has failed, and look as
# if all had been told to stop and had saved.
step() {
    local name="$1" list="$2" options=() inside=() each
    shift 2
    while [[ "$1" != -- ]]; do options+=("$1"); shift; done
    local function="$2"
    shift 2
    if [[ -n "$container" && "$runtime" == pyxis ]]; then
        options+=("--container-image=$container" "--container-workdir=$PWD")
        ((${#mounts[@]} == 0)) || options+=("--container-mounts=$(IFS=,; printf '%s' "${mounts[*]}")")
    elif [[ -n "$container" ]]; then
        inside=(apptainer exec --nv --pwd "$PWD")
        for each in "${mounts[@]}"; do inside+=(--bind "$each"); done
        inside+=("$container")
    fi
    # The functions get their own arguments first, then the program: the container's command goes between.
    local own=()
    while [[ "$1" != --program ]]; do own+=("$1"); shift; done
    shift
    srun --job-name="$name" --nodelist="$list" --kill-on-bad-exit=0 --wait="$ENDING" --quiet --cpu-bind=none --open-mode=append --input=none \
        "${options[@]}" bash -c "$(declare -f "$function"); $function \"\$@\"" "$name" "${own[@]}" "${inside[@]}" "$@" &
    begun=$SECONDS
}

joined() { local IFS=,; printf '%s' "$*"; }

start_servers() {
    local interfaces=() host options=(--nodes="${#server_hosts[@]}" --ntasks="${#server_hosts[@]}" --ntasks-per-node=1)
    for host in "${server_hosts[@]}"; do interfaces+=("$(interface_of "$host")"); done
    [[ -z "$colocated" ]] || options+=(--overlap)
    step serve "$(joined "${server_hosts[@]}")" "${options[@]}" --output="$folder/serve-%n.log" \
        -- as_servers "$servers_per_node" "$folder" "${interfaces[*]}" --program \
        "$python" -m megatron_rl.cli serve "${words[@]}" "servers.api_key_file=$key" --urls "$urls"
    serving=$!
    [[ -z "$colocated" || "$nodes" == 0 ]] || wait_for_urls
}

# Servers on the GPUs of the ranks take their memory first.
wait_for_urls() {
    local wanted=$((servers_per_node * ${#server_hosts[@]}))
    say "waiting for $wanted servers"
    while [[ -z "$told" ]] && (("$(grep -c '^http' "$urls" 2>/dev/null || true)" + 0 < wanted)) && kill -0 "$serving" 2>/dev/null; do
        sleep 1
    done
}

start_ranks() {
    local options=(--nodes="$nodes" --ntasks="$((nodes * ranks_per_node))" --ntasks-per-node="$ranks_per_node" --distribution=block)
    local found=()
    [[ -z "$told" ]] || return 0
    [[ -z "$cpus_per_rank" ]] || options+=(--cpus-per-task="$cpus_per_rank")
    [[ -z "$colocated" ]] || options+=(--overlap)
    [[ -z "$urls" ]] || found=(servers.count=0 "servers.urls_file=$urls" "servers.api_key_file=$key")
    step train "$(joined "${hosts[@]:0:nodes}")" "${options[@]}" --output="$folder/rank-%t.log" \
        -- as_rank "$ranks_per_node" "$(address_of "${hosts[0]}")" "$(free_port)" --program \
        "$python" -m megatron_rl.cli train "${words[@]}" "${found[@]}" --auto-resume
    training=$!
}

# -- ending ----------------------------------------------------------------------------------------------------------------

runs() { [[ -n "$1" ]] && kill -0 "$1" 2>/dev/null; }

# signal_step NAME SIGNAL: srun itself takes SIGTERM for the end of everything, and kills; so the tasks are told directly. Not
# every version of scancel ends with 0 when it has told them.
signal_step() {
    local found
    found="$(squeue --steps --jobs="$SLURM_JOB_ID" --noheader --format='%i %j' | awk -v name="$1" '$2 == name {print $1}')"
    [[ -n "$found" ]] || return 1
    scancel --signal="$2" "$found" 2>/dev/null || true
}

# Once: a second SIGTERM would end what has saved and is tidying up. A step that is only being created would not hear it.
tell() {
    local name="$1" process="$2"
    while runs "$process" && { ((SECONDS < begun + LAUNCH)) || ! signal_step "$name" TERM; }; do sleep 1; done
}

on_told() {
    told=yes
    say "told to stop"
    if [[ -n "$training" ]]; then tell train "$training"; elif [[ -n "$serving" ]]; then tell serve "$serving"; fi
}

# Returns when one of the parts has ended. A signal interrupts the waiting, and is answered meanwhile.
wait_for_the_first() {
    local parts=()
    [[ -z "$serving" ]] || parts+=("$serving")
    [[ -z "$training" ]] || parts+=("$training")
    ((${#parts[@]})) || return 0
    while :; do
        local each
        for each in "${parts[@]}"; do runs "$each" || return 0; done
        wait -n "${parts[@]}" || true
    done
}

# code_of PROCESS: what it has ended with, however often the waiting is interrupted.
code_of() {
    local code=0
    while runs "$1"; do wait "$1" || true; done
    wait "$1" || code=$?
    return "$code"
}

# One part has ended: the other is told to, and waited for. Returns what the job ends with.
end_the_other() {
    local code=0 servers=0
    if [[ -z "$training" ]]; then
        [[ -z "$serving" ]] || code_of "$serving" || servers=$?
        ((nodes == 0)) || servers=$STOPPED # told before there was a rank
        [[ -z "$told" || "$servers" != 0 ]] || servers=$STOPPED
        return "$servers"
    fi
    if runs "$training" && ! runs "$serving"; then
        code_of "$serving" || servers=$?
        if [[ -z "$told" && "$servers" != 0 ]]; then
            say "servers ended with $servers; the run is told to save. Their logs: $folder/serve-*.log"
        fi
        tell train "$training"
    fi
    code_of "$training" || code=$?
    say "ranks ended with $code"
    [[ -z "$serving" ]] || end_servers
    [[ "$servers" == 0 || "$servers" == "$STOPPED" ]] || return "$servers"
    return "$code"
}

end_servers() {
    local left=$PATIENCE
    tell serve "$serving"
    while runs "$serving" && ((left--)); do sleep 1; done
    runs "$serving" || return 0
    say "servers did not end within $PATIENCE s: killed"
    signal_step serve KILL || true
    code_of "$serving" || true
}

finish() {
    local code="$1"
    case "$code" in
        0) say "done" ;;
        2) show_last; say "something is to be mended: see above" ;;
        "$STOPPED") say "it has stopped as it was told to${training:+; what was begun is saved}"; again ;;
        *) show_last; say "failed with $code. Submitted again, the run goes on from its last checkpoint" ;;
    esac
    exit "$code"
}

# The last words of whoever spoke.
show_last() {
    local file
    for file in "$folder"/rank-0.log "$folder"/serve-0.log; do
        [[ -s "$file" ]] || continue
        say "the end of $file:"
        tail -n "$LAST_LINES" "$file"
    done
}

# Back into the queue, unless somebody has cancelled the job, or SLURM has taken it back by itself.
again() {
    local state
    state="$(scontrol show job --oneliner "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z_]*' | cut -d = -f 2)" || true
    if [[ "$state" != RUNNING ]]; then
        say "not put back into the queue: its state is ${state:-unknown}"
    elif ((${SLURM_RESTART_COUNT:-0} >= requeue)); then
        say "not put back into the queue: it was $requeue times (launch.requeue). Submitted again it goes on"
    else
        say "back into the queue"
        trap '' TERM INT USR1 USR2
        scontrol requeue "$SLURM_JOB_ID" && sleep "$PATIENCE" # SLURM ends this script
    fi
}

main "$@"
