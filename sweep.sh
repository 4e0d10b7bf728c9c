#!/bin/bash
# A sweep: each cell of a grid pre-trained and probed, several at once, then laws fitted and drawn.
#
#   data.py -> pretrain.py, a cell each -> finetune.py, a probe each -> fit_laws.py: table, figures
#
#   bash sweep.sh                    # the whole study, small, on the simulated population
#   DATA=pool PROBES="ucihar wisdm_watch" USERS="4 8 all" SEEDS="0 1" OUT=runs/pool bash sweep.sh
#   bash sweep.sh --list             # a line a cell: its state, the time left and its commands
#   sbatch --array=1-N sweep.sh      # the same cells as a Slurm job array; N: lines of --list
#
# Stop it, kill it, start it again or twice at once: what is done is skipped, what was cut off goes
# on where it was, what another sweep works on is waited for, what failed before is tried once more.
# A cell is done when these very commands have finished on these very data (OUT/CELL/commands says
# which did); pretrain.py refuses to go on with a run of other flags. What a cell says stands in
# OUT/CELL/log.txt. The last task of a job array to end fits the laws; `bash sweep.sh` does, too.
# Exit status: 0 if every cell is done, 1 if not or if the fit failed, 2 for a senseless grid.

#SBATCH --requeue --open-mode=append
#SBATCH --signal=B:USR1@60
# Each of these is a variable of the environment; what stands here is the default.
DATA=${DATA:-simulated}                           # a set, or several pooled: a+b; made if missing
[ "$DATA" != simulated ] || PROBES=${PROBES-simulated} FLAGS=${FLAGS---batch 64 --evaluations 10}
PROBES=${PROBES-}                                 # labelled sets to probe on; "" for none
users=(${USERS:-4 8 16 32})                       # training users, or `all`
hours=(${HOURS:-0.025 0.1 0.4})                   # hours per user at most, or `all`
models=(${MODELS:-16x2x2 32x3x4 64x3x4})          # width x depth x heads
seeds=(${SEEDS:-0})                               # each with its own users, weights, batches, masks
STEPS=${STEPS:-150}                               # updates a cell
FLAGS=${FLAGS:-}                                  # more for every pretrain.py: "--optimizer adamw"
OUT=${OUT:-runs/$DATA}                            # a folder a cell in here
RESULTS=${RESULTS:-results/$(basename "$OUT")}    # the table, laws.json and the figures
cores=${SLURM_CPUS_ON_NODE:-$(OMP_NUM_THREADS= nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}
JOBS=${JOBS:-$cores}                              # cells at once: two of one thread beat one of two
THREADS=${THREADS:-}                              # of each cell; by default, the cores shared out
# ---------------------------------------------------------------- the cells
set -f                                            # words are words, never file patterns
code=$(dirname "$0")                              # Slurm runs a copy of this script, and knows of what
[ -f "$code/pretrain.py" ] || code=$(dirname "$(scontrol show job "$SLURM_JOB_ID" |
    sed -n '/Command=/{s/^ *Command=\([^ ]*\).*/\1/p;q;}')")
PYTHON=${PYTHON:-$(for p in ${VIRTUAL_ENV:+python} "$code/.venv/bin/python" python python3; do
    command -v "$p" && break
done)}

refuse() { echo "sweep.sh: $1" >&2; exit 2; }
every() {                                         # name, what its words must be, that as a regex, the words
    local name=$1 what=$2 form=$3 word; shift 3
    for word in "$@"; do [[ $word =~ ^($form)$ ]] || refuse "$name has '$word', which is not $what"; done
}
case "$# ${1-}" in
    "0 " | "1 --list") ;;
    "1 --help") sed -n '2,/^# ---/{/^# ---/d;/^#SBATCH/d;s/^# \{0,1\}//;p;}' "$0"; exit ;;
    *) refuse "'$*' is not --list or --help, which is all it takes; the grid is set by variables (see --help)" ;;
esac
number='[1-9][0-9]*'
every USERS "a number or all" "$number|all" "${users[@]}"
every HOURS "a number or all" '[0-9]*\.?[0-9]+|all' "${hours[@]}"
every MODELS "WIDTHxDEPTHxHEADS" "${number}x${number}x$number" "${models[@]}"
every SEEDS "a number" '[0-9]+' "${seeds[@]}"
every "STEPS, JOBS or THREADS" "a number above 0" "$number" "$STEPS" "$JOBS" $THREADS
every "DATA or PROBES" "the name of a data set" '[A-Za-z0-9_.+-]+' "$DATA" $PROBES

grid=()
for s in "${seeds[@]}"; do for u in "${users[@]}"; do for h in "${hours[@]}"; do for m in "${models[@]}"; do
    [[ " ${grid[*]} " == *" u$u-h$h-$m-s$s "* ]] || grid+=("u$u-h$h-$m-s$s")
done; done; done; done
cells=("${grid[@]}")                              # those to work on here
if [ -n "$SLURM_ARRAY_TASK_ID" ]; then
    [ "$SLURM_ARRAY_TASK_ID" -ge 1 ] && [ "$SLURM_ARRAY_TASK_ID" -le ${#grid[@]} ] ||
        refuse "task $SLURM_ARRAY_TASK_ID of the job array has no cell: the grid has ${#grid[@]}, so sbatch \
--array=1-${#grid[@]}"
    cells=("${grid[SLURM_ARRAY_TASK_ID - 1]}") JOBS=1
fi
probes=($PROBES) THREADS=${THREADS:-$((cores > JOBS ? cores / JOBS : 1))}
export OMP_NUM_THREADS=$THREADS OMP_WAIT_POLICY=passive

# ---------------------------------------------------------------- their commands, and what state they are in
fingerprints() {                                  # of the data, then of each probe's: in `prints`
    local set
    prints=()
    for set in "$DATA" "${probes[@]}"; do
        prints+=("$(sed -n 's/.*"fingerprint": "\([0-9a-f]*\)".*/\1/p' \
            $(printf "data/%s/meta.json " ${set//+/ }) 2>/dev/null | tr '\n' ' ')")
    done
}
pretraining() {                                   # cell -> dir; words: its command; key: what tells it from others
    dir="$OUT/$1" words=(--data "$DATA")
    set -- ${1//-/ }                              # u8 h0.1 64x3x4 s0
    [ "$1" = uall ] || words+=(--users "${1#u}")
    [ "$2" = hall ] || words+=(--hours-per-user "${2#h}")
    set -- ${3//x/ } "${4#s}"
    words+=(--width "$1" --depth "$2" --heads "$3" --steps "$STEPS" --seed "$4" $FLAGS)
    key="pretrain.py ${words[*]} # ${prints[0]}"
    words=("$PYTHON" "$code/pretrain.py" --out "$dir" --threads "$THREADS" "${words[@]}")
}
probing() {                                       # number of a probe -> words, key; after `pretraining`
    words=("$PYTHON" "$code/finetune.py" "$dir" --data "${probes[$1]}" --mode probe)
    key="finetune.py --data ${probes[$1]} --mode probe # ${prints[$1 + 1]}"
}
has_run() {                                       # file: it is there, and `key` among the commands that finished
    local line
    [ -s "$1" ] && [ -f "$dir/commands" ] || return
    while IFS= read -r line; do [ "$line" = "$key" ] && return; done < "$dir/commands"
    return 1
}
finished() {                                      # cell
    local i
    pretraining "$1"; has_run "$dir/result.json" || return
    for i in "${!probes[@]}"; do probing "$i"; has_run "$dir/finetune/${probes[i]}-probe.json" || return; done
}
survey() {                                        # a line a cell: state, seconds left, name; one on all of them
    local cell state took
    for cell in "${grid[@]}"; do
        state=to-do took=0
        if finished "$cell"; then state=done; elif [ -f "$OUT/$cell/failed" ]; then state=failed; fi
        [ ! -s "$OUT/$cell/seconds" ] || read -r took < "$OUT/$cell/seconds"
        echo "$state $took $cell"
    done | "$PYTHON" -c '
import collections, fcntl, sys
def running(cell):
    try: fcntl.flock(open(f"{sys.argv[1]}/{cell}/.sweep"), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error: return isinstance(error, BlockingIOError)
def flops(cell):                                  # a window: patch 5, mask .75, decoder 64x1; see model.py
    W, D, heads = map(int, cell.split("-")[2].split("x"))
    return 3160 * W + D * (480 * W * W + 1600 * W) + 5.67e6
rows = [line.split() for line in sys.stdin]
known = [(flops(cell), int(took)) for state, took, cell in rows if state == "done" and int(took) > 0]
count, total = collections.Counter(), 0
for state, took, cell in rows:                    # at the pace of cells of that model, or else of all, by FLOPs
    state = "running" if state == "to-do" and running(cell) else state
    like = [(f, t) for f, t in known if f == flops(cell)] or known
    left = flops(cell) * sum(t for f, t in like) / sum(f for f, t in like) if like else None
    if state == "done": left = 0
    count[state] += 1
    if state != "failed": total = None if None in (left, total) else total + left / int(sys.argv[2])
    print(state, "?" if left is None else round(left), cell)
time = "time left not known" if total is None else f"{int(total) // 60}:{int(total) % 60:02d} left"
print("[{done} of {0} done, {running} running, {failed} failed, {1}]".format(
    len(rows), time, **{state: count[state] for state in ("done", "running", "failed")}))
' "$OUT" "$JOBS"
}
progress() { survey | tail -n 1; }

# ---------------------------------------------------------------- working on them
stop= child= requeue= workers=()                  # the exit status that a signal asks for; who is to be told of it
run() {                                           # words -> their exit status; a signal to this shell reaches them
    local status
    "$@" & child=$!
    [ -z "$stop" ] || kill -TERM $child 2>/dev/null
    wait $child; status=$?
    while kill -0 $child 2>/dev/null; do wait $child; status=$?; done         # a signal ends a wait, not the child
    child=
    return $status
}
step() {                                          # file: run `words` unless that was done; note `key` when it is
    has_run "$1" && return
    [ "$1" != "$dir/result.json" ] || rm -f "$dir/commands"                   # probes of other weights don't count
    echo "$(date '+%F %T') \$ ${words[*]}" >> "$dir/log.txt" &&
        run "${words[@]}" >> "$dir/log.txt" 2>&1 && echo "$key" >> "$dir/commands"
}
attempt() {                                       # cell; file 9 is its lock -> 75 if another process has it
    "$PYTHON" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null || return 75
    local began=$SECONDS took=0 status i=0 said
    pretraining "$1"; step "$dir/result.json"; status=$?
    while [ $status = 0 ] && [ $i -lt ${#probes[@]} ]; do
        probing $i; step "$dir/finetune/${probes[i]}-probe.json"; status=$?; i=$((i + 1))
    done
    [ ! -s "$dir/seconds" ] || read -r took < "$dir/seconds"
    echo $((took += SECONDS - began)) > "$dir/seconds"
    case $status in
        75 | 130 | 143) return $status ;;         # busy; stopped: it has saved
        0) if finished "$1"; then
               said="loss $(sed -n 's/^ *"loss": \([0-9.]*\).*/\1/p' "$dir/result.json") in $took s"
           else status=1; echo "the commands ended well, but left no result" >> "$dir/log.txt"; fi ;;
        137) echo "killed from outside. Out of memory? Fewer JOBS, or a smaller --batch in FLAGS" \
                 >> "$dir/log.txt" ;;
    esac
    if [ $status != 0 ]; then
        echo $status > "$dir/failed"
        said="FAILED with exit status $status; the last lines of $dir/log.txt:
$(tail -n 5 "$dir/log.txt" | sed 's/^/    /')"
    fi
    echo "$(date +%T) $(progress) $1: $said"
}
work() {                                          # one of the JOBS: whatever cell is free, until none is left
    local todo=("${cells[@]}") busy cell
    trap '' INT HUP                               # a terminal sends these to all; `main` says what is to be done
    trap 'stop=1; [ -z "$child" ] || kill -TERM $child 2>/dev/null' TERM
    while [ ${#todo[@]} -gt 0 ]; do
        busy=()
        for cell in "${todo[@]}"; do
            finished "$cell" || [ -f "$OUT/$cell/failed" ] && continue
            mkdir -p "$OUT/$cell" && attempt "$cell" 9>> "$OUT/$cell/.sweep"  # locked while anyone has it open
            [ $? != 75 ] || busy+=("$cell")
            [ -z "$stop" ] || return
        done
        todo=("${busy[@]}")
        [ ${#todo[@]} = 0 ] || run sleep 1
        [ -z "$stop" ] || return
    done
}

# ---------------------------------------------------------------- the sweep
leave() { stop=$1; kill -TERM $child "${workers[@]}" 2>/dev/null; }    # they save and end, then so does this
stopped() {                                       # the end, if there was a signal
    [ -n "$stop" ] || return
    echo "sweep.sh: stopped; what ran has saved, and the same command goes on" >&2
    local job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
    [ -z "$requeue" ] || scontrol requeue "$job"
    exit "$stop"
}
unfinished() { for cell in "$@"; do finished "$cell" || echo "$cell"; done; }
list() {
    local state left cell more line i
    survey | while read -r state left cell more; do
        [ -z "$more" ] || { echo "$state $left $cell $more" >&2; break; }
        pretraining "$cell"; line="${words[*]}"
        for i in "${!probes[@]}"; do probing "$i"; line="$line; ${words[*]}"; done
        printf '%-7s %6s s left  %-24s %s\n' "${state/-/ }" "$left" "$cell" "$line"
    done
}
main() {                                          # read whole before it runs: editing this file disturbs no sweep
    local set cell j w open fitted
    trap 'leave 130' INT; trap 'requeue=; leave 143' TERM; trap 'leave 129' HUP
    trap 'requeue=1; leave 143' USR1              # from Slurm, a minute before the time limit; scancel sends TERM
    "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))' ||
        refuse "'$PYTHON' has no PyTorch: pip install -r requirements.txt, or set PYTHON to one that has"
    for set in ${DATA//+/ } ${PROBES//+/ }; do
        [ -f "data/$set/meta.json" ] || run "$PYTHON" "$code/data.py" "$set" ||
            { stopped; refuse "the data set '$set' isn't there"; }
    done
    stopped
    fingerprints
    mkdir -p "$OUT" || refuse "$OUT can't be made"
    for cell in "${cells[@]}"; do rm -f "$OUT/$cell/failed"; done
    echo "$(date +%T) $(progress) $OUT, $JOBS at a time, $THREADS threads each"

    for ((j = 0; j < JOBS && j < ${#cells[@]}; j++)); do work & workers+=($!); done
    # if this is killed (-9), end them, too
    exec 8> >(trap '' INT TERM HUP; read -r _ || kill -TERM "${workers[@]}" 2>/dev/null)
    for w in "${workers[@]}"; do while kill -0 "$w" 2>/dev/null; do wait "$w"; done; done
    echo over >&8; exec 8>&-; workers=()
    stopped

    open=$(unfinished "${cells[@]}")
    if [ -n "$open" ]; then
        echo "sweep.sh: not done: "$open"; $OUT/CELL/log.txt says why, and the same command tries again" >&2
        exit 1
    fi
    [ -z "$(unfinished "${grid[@]}")" ] || exit 0 # other tasks of the job array are still to come
    touch "$OUT/.fitted"
    run "$PYTHON" "$code/fit_laws.py" "$OUT" --out "$RESULTS"; fitted=$?
    stopped
    # 2 with a fresh table: a grid too small for a law
    [ $fitted = 0 ] || { [ $fitted = 2 ] && [ ! "$RESULTS/results.csv" -ot "$OUT/.fitted" ]; }
}
if [ "${1-}" = --list ]; then fingerprints; list; else main; fi
exit
