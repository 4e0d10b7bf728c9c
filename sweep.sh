#!/bin/bash
# Every cell of a grid is pre-trained, several at once, then probed; then the law is fitted.
#   bash sweep.sh                # the whole study, small, on simulated people: about 5 minutes
#   SPREAD=0 bash sweep.sh       # the same with clones; SEED=1: with other people
#   DATA=motionsense+uschad PROBES= USERS="4 8 16 32" TOTAL="0.89" STEPS=1500 bash sweep.sh
#   bash sweep.sh --list         # a line a cell: done, failed or to do, its command; then the cost
#   sbatch --array=1-N sweep.sh  # one Slurm task for each of N cells; then: bash sweep.sh
# Stop it, kill it: the same command goes on. Exit status: 0 all is done, 1 it isn't, 2 a senseless
# grid, or no data.
#SBATCH --requeue --open-mode=append
set -f -a                # no file patterns; variables and functions reach the shells of xargs
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2000000000   # glibc keeps freed memory: faster steps
crowd=simulated-spread${SPREAD:=1}-seed${SEED:=0}          # simulated people: a set for each
DATA=${DATA:-$crowd}                             # a data set, or several: a+b; made if missing
if [ "$DATA" = "$crowd" ]; then                  # minutes, not hours
    MODELS=${MODELS:-16x1x2} STEPS=${STEPS:-250} PROBES=${PROBES-$crowd}
    FLAGS="--patch 20 --mask-ratio 0.5 --lr 0.05 ${FLAGS-}"
fi
users=(${USERS:-3 6 12 24 48})                   # people to train on
hours=(${TOTAL:-${HOURS:-0.0083 0.0333}})        # of each: 30, 120 s; TOTAL: of all together
models=(${MODELS:-64x3x4})                       # width x depth x heads
seeds=(${SEEDS:-0 1 2 3 4 5})                     # each draws users, weights, batches, masks
STEPS=${STEPS:-20000}                            # the most that a cell may take
[ "$STEPS" -gt 5000 ] || FLAGS="--patience 0 ${FLAGS-}"          # a short cell runs to its end
OUT=${OUT:-runs/$DATA}                           # a folder for each cell, u24-h0.0667-16x1x2-s0
cores=${SLURM_CPUS_ON_NODE:-$(getconf _NPROCESSORS_ONLN)} JOBS=${JOBS:-$cores}    # cells at once
threads=$((cores > JOBS && JOBS > 0 ? cores / JOBS : 1))         # two cells of 1 beat one of 2
code=$(dirname "$0"); [ -f "$code/pretrain.py" ] || code=$SLURM_SUBMIT_DIR   # Slurm runs a copy
PYTHON=${PYTHON:-$(command -v ${VIRTUAL_ENV:+python} "$code/.venv/bin/python" python3 | head -n 1)}

plan() {         # print the cells, the least data first, or refuse the grid
    "$PYTHON" - "$code" "$DATA" "${TOTAL-}" \
        "${users[*]}" "${hours[*]}" "${models[*]}" "${seeds[*]}" <<'END'
import itertools, re, sys; code, name, total, *grid = sys.argv[1:]
sys.path.insert(0, code); sys.argv[0] = "sweep.sh"
from data import command, load, require, training_users
def main():
    windows, users, _, meta = load(name); train = training_users(meta, 0)
    longest = max(sum(users == user) for user in train) * meta["seconds"] / 3600
    cells = {}
    for u, h, m, s in itertools.product(*map(str.split, grid)):
        require(re.fullmatch(r"[1-9]\d* \d*\.?\d+ \d+x\d+x\d+ \d+", f"{u} {h} {m} {s}"), "not a "
                f"grid: users {u}, hours {h}, model {m} (as 64x3x4), seed {s}")
        h = f"{float(h) / int(u):.4g}" if total else h
        require(int(u) <= len(train), f"{u} users: there are {len(train)} to train on")
        require(float(h) < 1.02 * longest, f"{h} hours: nobody has more than {longest:.4f}")
        cells[f"u{u}-h{h}-{m}-s{s}"] = int(u) * float(h)
    print(*sorted(cells, key=cells.get))
command(main)
END
}
command_of() {   # a cell, u24-h0.0667-16x1x2-s0
    local u h width depth heads s; IFS=-x read -r u h width depth heads s <<< "$1"
    printf '%q ' "$PYTHON" "$code/pretrain.py" --data "$DATA" --users ${u#u} \
        --hours-per-user ${h#h} --width $width --depth $depth --heads $heads --seed ${s#s} \
        --steps "$STEPS" ${FLAGS-} --out "$OUT/$1"
}
state() {        # done, failed or to do: by the last end in its log; another sweep may be writing
    local last; last=$(grep -E "^(done|failed): " "$OUT/$1/log.txt" 2>/dev/null | tail -n 1)
    if [ -s "$OUT/$1/result.json" ] && [ "$last" = "done: $(command_of "$1")" ]; then echo done
    elif [[ $last = failed:* ]]; then echo failed; else echo "to do"; fi
}
work() {         # on a cell, in a shell of its own; say a line
    local log=$OUT/$1/log.txt how=done line
    mkdir -p "$OUT/$1" && eval "$(command_of "$1") --threads $threads" >> "$log" 2>&1 || how=failed
    line=$(tail -n 1 "$log"); echo "$how: $(command_of "$1")" >> "$log"
    [ $how = done ] && line=${line%%,*} || line="FAILED, see $log: $line"
    echo "$1 $line"
}
cost() {         # of all cells, from 15 steps of each model; a start takes 3 s
    local try m cell; try=$(mktemp -d)
    for m in "${models[@]}"; do
        cell=${cells[0]%-*-*}-$m-s${seeds[0]}    # the first one's users and hours
        eval "$(command_of $cell) --threads $threads --steps 15 --out '$try/$m'" > /dev/null
    done
    grep -rh '^ "seconds"' "$try" | tr -dc '0-9.\n' | awk -v n=${#cells[@]} -v jobs="$JOBS" '
        { cell += ($1 * '"$STEPS"' / 15 + 3) / '${#models[@]}' }
        END { printf "%d cells, about %.0f minutes here\n", n, n * cell / jobs / 60 + 0.5 }'
    rm -r "$try"
}

refuse() { echo "sweep.sh: $1" >&2; exit 2; }
[ "${*:---list}" = --list ] || refuse "'$*' is not --list"
[ "$JOBS" -gt 0 ] || refuse "JOBS $JOBS is below 1"
for set in ${DATA//+/ } ${PROBES//+/ }; do
    words="simulated --users 120 --hours-per-user 0.0333 --spread $SPREAD --seed $SEED --name $set"
    [ "$set" = "$crowd" ] || words=$set
    [ -f "data/$set/meta.json" ] || "$PYTHON" "$code/data.py" $words || exit 2
done
cells=$(plan) || exit 2; cells=($cells)
task=${SLURM_ARRAY_TASK_ID-} all=${#cells[@]}
if [ -n "$task" ]; then
    [ "$task" -gt 0 ] && [ "$task" -le $all ] || refuse "no cell $task of $all"
    cells=(${cells[task - 1]})
fi
if [ $# = 1 ]; then
    for cell in "${cells[@]}"; do
        printf '%-6s %s  %s\n' "$(state $cell)" $cell "$(command_of $cell)"
    done
    cost; exit
fi
undone() { for cell in "${cells[@]}"; do [ "$(state $cell)" = done ] || echo $cell; done; }
todo=$(undone); all=${#cells[@]} left=$(wc -w <<< "$todo") SECONDS=0 n=0
xargs -r -n 1 -P "$JOBS" bash -c 'work "$0"' <<< "$todo" | while read -r line; do
    n=$((n + 1)) half=$((2 * n + JOBS - 1))      # of the others at work, half is done
    minutes=$(((2 * SECONDS * (left - n) / half + 59) / 60))
    echo "$((all - left + n)) of $all, $minutes min left: $line"
done
[ -z "$(undone)" ] || { echo "sweep.sh: not done:" $(undone) >&2; exit 1; }
[ -z "$task" ] || exit 0
for set in $PROBES; do                           # as many processes as cells at once
    printf '%s\0' "${cells[@]/#/$OUT/}" | xargs -0 -n $(((all + JOBS - 1) / JOBS)) -P "$JOBS" \
        bash -c '"$PYTHON" "$code/finetune.py" "$@" --data "$0"' "$set" || exit 1
done
"$PYTHON" "$code/fit_laws.py" "$OUT" --out "${RESULTS:-results/$(basename "$OUT")}"
