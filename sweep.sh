#!/bin/bash
# A sweep: every cell of a grid is pre-trained and probed, several at once; then laws are fitted.
#
#   bash sweep.sh                    # the whole study, small, on a simulated population
#   DATA=pool PROBES=ucihar USERS="4 8 all" HOURS="0.05 0.2" FLAGS="--rotate 0.5" bash sweep.sh
#   bash sweep.sh --list             # one line per cell: done, running, failed or to do; commands
#   sbatch --array=1-N sweep.sh      # one Slurm task per cell (N lines of --list); then sweep.sh
#
# Stop it, kill it, run it again or twice at once: a cell that is done is skipped, one that was cut
# off resumes, one that another sweep works on is left to it, one that failed is tried again. A cell
# is done when OUT/CELL/done has what would run now: its commands, and its data's fingerprints.
# Exit status: 0 if all is done, 1 if a cell isn't, 2 for an invalid grid, or one without a law.

#SBATCH --requeue --open-mode=append --signal=B:USR1@60
# ---------------------------------------------------------------- the grid
set -f -a        # no file patterns; variables and functions are passed to the shells of xargs
DATA=${DATA:-simulated}                          # a data set, or several: a+b; prepared if missing
quick="--patch 10 --mask-ratio 0.5 --patience 0.1 --batch 32 --lr 0.05"      # minutes, not hours
[ "$DATA" != simulated ] || : "${PROBES=simulated}" "${FLAGS=$quick}"
users=(${USERS:-6 12 24})                        # training users, or all
hours=(${HOURS:-0.0111 0.0222 0.0444})           # hours per user at most, or all: 4, 8, 16 windows
models=(${MODELS:-16x1x2})                       # width x depth x heads
seeds=(${SEEDS:-0 1 2})                          # each seed draws users, weights, batches, masks
STEPS=${STEPS:-20000}                            # a cell ends when its loss stops falling, or here
OUT=${OUT:-runs/$DATA}                           # one folder per cell
RESULTS=${RESULTS:-results/$(basename "$OUT")}   # the table, the laws and the figures
cores=${SLURM_CPUS_ON_NODE:-$(getconf _NPROCESSORS_ONLN)}
JOBS=${JOBS:-$cores}                             # cells at once: two of one thread beat one of two
THREADS=${THREADS:-$((cores > JOBS ? cores / JOBS : 1))}         # of each cell

refuse() { echo "sweep.sh: $1" >&2; exit 2; }
check() {                                        # name, regular expression, its meaning, words
    for word in "${4-}" "${@:5}"; do [[ $word =~ ^($2)$ ]] || refuse "$1: '$word' is not $3"; done
}
[ "$*" != --help ] || { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit; }
[ $# = 0 ] || [ "$*" = --list ] || refuse "'$*' is not --list or --help; --help shows the variables"
check USERS '[1-9][0-9]*|all' "a number or all" "${users[@]}"
check HOURS '[0-9]*\.?[0-9]+|all' "a number or all" "${hours[@]}"
check MODELS '[1-9][0-9]*(x[1-9][0-9]*){2}' WIDTHxDEPTHxHEADS "${models[@]}"
check SEEDS '[0-9]+' "a number" "${seeds[@]}"
check "STEPS, JOBS, THREADS" '[1-9][0-9]*' "a number above 0" "$STEPS" "$JOBS" "$THREADS"
check "DATA, PROBES" '[A-Za-z0-9_.+-]+' "the name of a data set" "$DATA" $PROBES
grid=$(for s in "${seeds[@]}"; do for u in "${users[@]}"; do for h in "${hours[@]}"; do
    for m in "${models[@]}"; do echo "${u/all/9999} ${h/all/9999} u$u-h$h-$m-s$s"; done
done; done; done | LC_ALL=C awk '!seen[$3]++ { print $1 * $2, $3 }' |    # the least data first
    LC_ALL=C sort -s -n -k 1,1 | cut -d ' ' -f 2)
cells=$grid task=${SLURM_ARRAY_JOB_ID-${SLURM_JOB_ID-}}${SLURM_ARRAY_TASK_ID+_$SLURM_ARRAY_TASK_ID}
if [ -n "${SLURM_ARRAY_TASK_ID-}" ]; then
    cells=$(sed -n "${SLURM_ARRAY_TASK_ID}p" <<< "$grid") JOBS=1
    [ -n "$cells" ] || refuse "no cell $SLURM_ARRAY_TASK_ID: sbatch --array=1-$(wc -l <<< "$grid")"
fi
code=$(dirname "$0"); [ -f "$code/pretrain.py" ] || code=$SLURM_SUBMIT_DIR   # Slurm runs a copy
PYTHON=${PYTHON:-$(command -v ${VIRTUAL_ENV:+python} "$code/.venv/bin/python" python3 | head -n 1)}
here=$(printf '%q %q/' "$PYTHON" "$code") out_dir=$(printf %q/ "$OUT") OMP_NUM_THREADS=$THREADS
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2000000000   # glibc keeps what is freed: faster steps

# ---------------------------------------------------------------- a cell
commands() {                                     # of a cell, and what its data are, on one line
    local u h width depth heads s line set; IFS=-x read -r u h width depth heads s <<< "$1"
    line="--users ${u#u} --hours-per-user ${h#h} --width $width --depth $depth --heads $heads"
    line=${line/--users all /}; line=${line/--hours-per-user all /}
    line="${here}pretrain.py --data $DATA $line --seed ${s#s} --steps $STEPS${FLAGS:+ $FLAGS}"
    line+=" --out $out_dir$1 --threads $THREADS"
    for set in $PROBES; do line+=" && ${here}finetune.py $out_dir$1 --data $set --mode probe"; done
    set=$(printf ' data/%s/meta.json' ${DATA//+/ } ${PROBES//+/ })
    echo "$line #" $(grep -hos '"fingerprint": "[^"]*"' $set)
}
record() {                                       # the same without paths and threads
    local line; line=$(commands "$1"); line=${line//"$here"/}; echo "${line/ --threads $THREADS/}"
}
is_done() { [ -s "$OUT/$1/result.json" ] && [ "$(cat "$OUT/$1/done" 2>&1)" = "$(record "$1")" ]; }
lock() { "$PYTHON" -c "from fcntl import *; flock(9, $1)" 2>/dev/null; }
state() {
    if is_done "$1"; then echo done; elif [ -f "$OUT/$1/failed" ]; then echo failed
    elif [ ! -f "$OUT/$1/.sweep" ] || lock "LOCK_SH | LOCK_NB" 9< "$OUT/$1/.sweep"; then echo to do
    else echo running; fi
}
progress() {
    for cell in $grid; do state "$cell"; done | awk '{ n[$1]++ } END {
        printf "%d of %d done, %d running, %d failed\n", n["done"], NR, n["running"], n["failed"] }'
}
work() {                                         # on one cell, in its own shell
    local dir="$OUT/$1" how= lines=1
    mkdir -p "$dir" && exec 2>&1 3>&1 9>> "$dir/.sweep"     # 9 is locked until the last of us ends
    lock "$round" && ! is_done "$1" && [ ! -f "$dir/failed" ] || return 0     # others work, or did
    rm -f "$dir/done"
    echo "$(date) $(commands "$1")" >> "$dir/log.txt"
    eval "$(commands "$1")" >> "$dir/log.txt" 2>&1 && record "$1" > "$dir/done"
    is_done "$1" || { touch "$dir/failed"; how=" FAILED, see $dir/log.txt" lines=5; }
    echo "$(($(date +%s) - began)) s, $(progress), $1$how: $(tail -n $lines "$dir/log.txt")"
}

# ---------------------------------------------------------------- all cells, then the laws
leave() { stop=$1; [ -z "$job" ] || kill -TERM -- "-$job" 2>/dev/null; }
run() {                                          # a command, in a process group of its own
    set -m; "$@" & job=$!; set +m
    exec 8> >(trap '' INT TERM HUP; read -r _; kill -TERM -- "-$job" 2>/dev/null)  # after kill -9
    [ -z "$stop" ] || leave "$stop"
    while wait "$job"; status=$?; kill -0 "$job" 2>/dev/null; do :; done     # signals end a wait
    exec 8>&-
    [ -n "$stop" ] || return $status
    echo "sweep.sh: stopped; the same command resumes" >&2
    [ -z "$requeue" ] || scontrol requeue "$requeue"
    exit "$stop"
}
all_cells() {                                    # ends with the last process of the last cell
    trap : TERM
    xargs -n 1 -P "$JOBS" bash -c 'work "$0"' <<< "$cells" 2>/dev/null | (trap '' TERM; exec cat)
}
main() {                                         # bash reads it whole before it runs
    local set cell open job= stop= requeue=
    trap 'leave 130' INT; trap 'requeue=; leave 143' TERM; trap 'leave 129' HUP
    trap 'requeue=$task; leave 143' USR1         # from Slurm, a minute before the time limit
    mkdir -p "$OUT" && exec 9>> "$OUT/.lock" && run lock LOCK_EX || refuse "$PYTHON can't lock $OUT"
    for set in ${DATA//+/ } ${PROBES//+/ }; do
        [ -f "data/$set/meta.json" ] || run "$PYTHON" "$code/data.py" "$set" || exit 2
    done
    exec 9>&-
    for cell in $cells; do rm -f "$OUT/$cell/failed"; done
    began=$(date +%s); echo "$(progress); $JOBS at a time into $OUT"
    for round in "LOCK_EX | LOCK_NB" LOCK_EX; do run all_cells; done    # then cells of others
    open=$(for cell in $cells; do is_done "$cell" || echo "$cell"; done)
    [ -z "$open" ] || { echo "sweep.sh: not done, see OUT/CELL/log.txt:" $open >&2; exit 1; }
    [ "$cells" != "$grid" ] || run "$PYTHON" "$code/fit_laws.py" "$OUT" --out "$RESULTS"
}
[ "$*" = --list ] || { main; exit; }
for cell in $grid; do
    printf '%-8s %s  %s\n' "$(state "$cell")" "$cell" "$(commands "$cell")"
done
progress >&2
