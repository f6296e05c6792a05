# From here on it is the same for every run. Set above: FOLDER JOB CONFIG CODE PYTHON SLOTS GPUS GRACE SECRETS, STEP (more
# options of srun), INSIDE (what commands run inside of).
#
# Ray's head on the first node, a raylet on each, the driver beside the head. A warning (the time limit, a preemption)
# makes the driver finish its step, save and end with 75; then the job is queued again, under the same number.
set -uo pipefail
umask 077
cd "$FOLDER" || exit 78
warned=0 driving=
pid=$JOB/$SLURM_JOB_ID.pid token=$JOB/$SLURM_JOB_ID.token nodes=$SLURM_JOB_NUM_NODES
say() { printf '%s job %s, start %s: %s\n' "$(date +%FT%T)" "$SLURM_JOB_ID" "$((${SLURM_RESTART_COUNT:-0} + 1))" "$*"; }
warn() {
    [ "$warned" = 0 ] || return
    warned=1
    say "asked to leave: finishing the step and saving"
    [ -n "$driving" ] || return
    until [ -s "$pid" ] || ! kill -0 "$driving" 2>/dev/null; do sleep 0.2; done
    kill -TERM "$(cat "$pid")"
}
trap warn USR1 TERM

export HOME="${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}" PATH PYTHON SLOTS GPUS
export PYTHONPATH=$CODE PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
if [ -n "$SECRETS" ]; then
    set -a
    # shellcheck source=/dev/null
    . "$SECRETS" || exit 78
    set +a
fi

# Nobody else gets in: a token of this job's own, in a file. Jobs that share a node share no port and no folder.
rm -f "$token" "$pid"
od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$token" || exit 1
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token RAY_USAGE_STATS_ENABLED=0
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=$((GRACE > 40 ? GRACE - 20 : 20))
export PORT=$((20000 + SLURM_JOB_ID % 1000 * 10)) SCRATCH=/tmp/ray-$SLURM_JOB_ID
unset RAY_ADDRESS RAY_AUTH_TOKEN
gpus=() none=()
[ "$GPUS" = 0 ] || gpus=(--gpus-per-node="$GPUS") none=(--gres=none)
step() { srun "${STEP[@]}" --export=ALL --overlap --no-kill --kill-on-bad-exit=0 "$@"; }
clean() {
    trap '' USR1 TERM
    [ -z "${ray:-}" ] || { kill "$ray" && wait "$ray"; } 2>/dev/null
    timeout 60 srun --export=ALL --overlap --nodes="$nodes" --ntasks-per-node=1 "${none[@]}" rm -rf "$SCRATCH" 2>/dev/null
    rm -f "$token" "$pid"
}
trap clean EXIT

# The address by which the other nodes know this one; a name that stands for loopback is of no use to them.
read -r -d '' address <<'BASH'
ip=$(getent ahostsv4 "$(hostname)" | awk '$1 !~ /^127\./ { print $1; exit }')
ip=${ip:-$(hostname -I | awk '{ print $1 }')}
BASH
eval "$address"
# shellcheck disable=SC2154
export HEAD=$ip
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
say "nodes $SLURM_JOB_NODELIST, head $first ($HEAD), port $PORT"

# Ray gives a node up that does not come up within 30 s, and a busy file system takes longer: then once more.
read -r -d '' raylet <<'BASH'
trap : TERM  # Ray hears it too, and may take its time to leave
device=$(ip -o -4 addr show to "$ip/32" 2>/dev/null | awk '{ print $2; exit }')
[ -z "$device" ] || export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$device}
own=(--node-ip-address="$ip" --num-cpus="$SLOTS" --num-gpus="$GPUS" --object-store-memory=200000000
    --node-manager-port=$((PORT + 1)) --object-manager-port=$((PORT + 2)) --runtime-env-agent-port=$((PORT + 3))
    --dashboard-agent-listen-port=$((PORT + 4)) --dashboard-agent-grpc-port=$((PORT + 5))
    --metrics-export-port=$((PORT + 6)) --min-worker-port=0 --max-worker-port=0 --disable-usage-stats --block)
role=(--address="$HEAD:$PORT")
[ "$ip" != "$HEAD" ] || role=(--head --port="$PORT" --ray-client-server-port=$((PORT + 7)) --include-dashboard=false
    --temp-dir="$SCRATCH")
for try in 1 2 3 4 5; do
    [ "$ip" = "$HEAD" ] || until (exec 3<>"/dev/tcp/$HEAD/$PORT") 2>/dev/null; do sleep 0.5; done
    rm -rf "$SCRATCH"
    SECONDS=0
    "$PYTHON" -m ray.scripts.scripts start "${role[@]}" "${own[@]}" && break
    [ "$SECONDS" -lt 240 ] || break
    echo "Ray on $ip gave up at try $try"
done
BASH
step --nodes="$nodes" --ntasks-per-node=1 "${gpus[@]}" "${INSIDE[@]}" bash -c "$address
$raylet" >"$JOB/$SLURM_JOB_ID.ray" 2>&1 &
ray=$!
until (exec 3<>"/dev/tcp/$HEAD/$PORT") 2>/dev/null; do
    kill -0 "$ray" 2>/dev/null || { say "Ray ended before it began:"; tail -n 20 "$JOB/$SLURM_JOB_ID.ray"; exit 1; }
    sleep 0.5
done

# The driver waits for all nodes, then trains. It alone is told of a warning, once.
read -r -d '' driver <<'BASH'
trap 'kill "$!"; exit 75' TERM
echo $$ >"$1"
"$PYTHON" - "$HEAD:$PORT" "$2" <<'WAIT' &
import sys, time, ray
alive, last = 0, time.monotonic() + 600
while alive < int(sys.argv[2]):
    if time.monotonic() > last:
        sys.exit(f"Ray came up on {alive} of {sys.argv[2]} nodes within 600 s; the .ray file beside this one says why")
    try:
        ray.is_initialized() or ray.init(address=sys.argv[1], logging_level="CRITICAL", log_to_driver=False)
        alive = sum(node["Alive"] for node in ray.nodes())
    except ConnectionError:
        pass  # the head answers before its own node does
    time.sleep(0.5)
WAIT
wait "$!" || exit 1
trap - TERM
exec "$PYTHON" -m pipeline train "$3" --address "$HEAD:$PORT"
BASH
code=75
if [ "$warned" = 0 ]; then
    step --nodes=1 --ntasks=1 --nodelist="$first" "${none[@]}" "${INSIDE[@]}" bash -c "$driver" driver "$pid" "$nodes" "$CONFIG" &
    driving=$!
    while kill -0 "$driving" 2>/dev/null; do  # a signal ends the wait, not the driver
        wait "$driving"
        code=$?
    done
fi
say "the driver ended with $code"

# 75: run it again. Not when it was cancelled meanwhile, nor after `submit stop`, which has set Requeue=0.
[ "$warned" = 1 ] && [ "$code" -gt 128 ] && code=75
if [ "$code" = 75 ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    clean
    trap - EXIT
    scontrol requeue "$SLURM_JOB_ID" 2>/dev/null && { say "queued again"; sleep 120; }
fi
exit "$code"
