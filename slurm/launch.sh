# shellcheck shell=bash
# What the job files share. They source it from the repo root, where `sbatch` was called, and then say what to run:
#
#   train_run CONFIG [key=value ...]        train, or go on after the newest checkpoint; done at once when complete
#   evaluate_run CONFIG [key=value ...]     score the final adapter
#   train_and_evaluate CONFIG [key=value ...]
#                                           both; in an array each task with its number as seed, in folders of its own
#   chain INDEX CONFIG ... [key=value ...]  the same, for each CONFIG in turn, in the background, on GPU INDEX of the job
#   await_chains                            wait for all chains and sum them up
#
# A run that is stopped by a signal (the time limit is near, a preemption) saves, and the job goes back into the queue.
# A run that fails ends its job, or its chain, with its exit code.
#
# VENV=FOLDER in the environment of `sbatch` names the Python environment: else it is .venv, else whatever is active.

trap on_signal USR1 TERM # first of all: an untrapped signal would end the job here and now
trap finish EXIT
on_signal() { # until_ended acts on it
  [ -n "$signalled" ] || say "told to stop"
  signalled=1
}
signalled=
chains=()
STOPPED=75           # exit code of a run that was stopped and saved (as in sysexits.h: try again later)
MAX_FRUITLESS_RUNS=3 # stopped in a row without a new checkpoint: then the job is not requeued any more
LEAVING_SECONDS=60   # for a run that has saved; what hangs on its way out shall not cost the restart
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # as torchrun sets it, but not for one process; chains share the cores
# A cancelled job's torchrun kills its workers this long after their SIGTERM, and 30 s are short for a large checkpoint.
# (Slurm's own KillWait may be shorter still.)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"

say() { printf '=== %(%F %T)T | %s\n' -1 "$*"; }

leave() { # CODE MESSAGE
  say "$2"
  exit "$1"
}

config_value() { # KEY CONFIG [key=value ...]
  local key=$1
  shift
  python config.py --config "$@" --get "$key"
}

# ---- one experiment ----

train_run() {
  local folder pid code saved_at
  folder=$(config_value output_dir "$@") || exit
  rm -f "$folder/PREEMPTED" # an old one would speak for this run
  say "train $*"
  start_torchrun train.py --config "$@"
  pid=$!
  until_ended ask_workers_to_save "$pid"
  wait "$pid"
  code=$?
  # The marker decides, not the exit code: after a SIGTERM torchrun says 1 even when every worker has saved.
  [ ! -e "$folder/PREEMPTED" ] || leave_stopped "$folder" "train $1"
  [ "$code" -eq 0 ] || leave "$code" "train $1: FAILED with exit code $code"
  say "train $1: done"
}

evaluate_run() {
  local folder pid code
  folder=$(config_value output_dir "$@") || exit
  say "evaluate $*"
  start_torchrun evaluate.py --config "$@"
  pid=$!
  until_ended end_now "$pid"
  wait "$pid"
  code=$?
  [ "$code" -eq 0 ] || [ -z "$signalled" ] || leave_stopped "$folder" "evaluate $1"
  [ "$code" -eq 0 ] || leave "$code" "evaluate $1: FAILED with exit code $code"
  say "evaluate $1: done"
}

train_and_evaluate() {
  local seeded
  seed_of_task "$@"
  train_run "$@" "${seeded[@]}"
  evaluate_run "$@" "${seeded[@]}"
}

# seed_of_task CONFIG [key=value ...]: put into `seeded` what an array's task adds to a run: its number as seed, and
# folders of its own. A curriculum goes on from the adapter of the same seed.
seed_of_task() {
  local key value
  seeded=()
  [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || return 0
  seeded=("seed=$SLURM_ARRAY_TASK_ID")
  for key in output_dir results_dir init_adapter; do
    value=$(config_value "$key" "$@") || exit
    [ -z "$value" ] || seeded+=("$key=${value}_seed$SLURM_ARRAY_TASK_ID")
  done
}

# leave_stopped FOLDER WHAT: to be requeued, unless run after run is stopped before it gets anywhere.
leave_stopped() {
  local fruitless=0 before=none newest
  newest=$(find "$1" -maxdepth 1 -name 'checkpoint-*' -printf '%f\n' | sort -V | tail -n 1)
  newest=${newest:-none}
  if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then # else the job was submitted anew, and counts anew
    read -r fruitless before 2> /dev/null < "$1/restarts"
  fi
  if [ "$newest" = "$before" ]; then fruitless=$((fruitless + 1)); else fruitless=0; fi
  echo "$fruitless $newest" > "$1/restarts"
  [ "$fruitless" -lt "$MAX_FRUITLESS_RUNS" ] ||
    leave 1 "$2: FAILED: stopped $fruitless times in a row without a new checkpoint (newest: $newest), so not requeued; \
give the job more --time, or set a smaller save_steps, and submit it again"
  leave "$STOPPED" "$2: stopped by a signal, newest checkpoint: $newest"
}

# ---- processes and signals ----

# until_ended STOP PID...: return when all have ended. Once a signal has come, call `STOP PID...` every few seconds:
# a run that is still loading has no handler yet and misses the first call.
until_ended() {
  local stop=$1 pid running
  shift
  while true; do
    running=()
    for pid in "$@"; do
      kill -0 "$pid" 2> /dev/null && running+=("$pid")
    done
    [ ${#running[@]} -gt 0 ] || return 0
    set -- "${running[@]}" # an ended one's id may soon be a stranger's
    [ -z "$signalled" ] || "$stop" "$@"
    sleep 5 &
    wait -n # for the end of a run or of the pause, or a signal (which would have to wait for a child in the foreground)
  done
}

# start_torchrun SCRIPT ARGUMENTS...: in the background, on all GPUs of the job; $! is its process id.
start_torchrun() {
  # SIGUSR1 kills torchrun and orphans its workers. Ignored here, it stays ignored through exec, in the workers too
  # until they set their handler; so neither a signal to the whole job nor one that comes early does harm.
  local torchrun=(bash -c 'trap "" USR1; exec "$@"' - torchrun --nproc_per_node="$(gpus_on_node)")
  if ! several_nodes; then
    "${torchrun[@]}" --standalone "$@" & # --standalone picks a free port: jobs and chains share nodes
  else
    # One torchrun a node. The port follows from the job id, so that jobs with the same first node do not meet on it.
    # srun takes the number of CPUs from sbatch only when told.
    srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
      "${torchrun[@]}" --nnodes="$SLURM_JOB_NUM_NODES" --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" \
      --rdzv-endpoint="$(hostname):$((20000 + SLURM_JOB_ID % 10000))" "$@" &
  fi
}

several_nodes() { [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; }

gpus_on_node() {
  local devices
  IFS=, read -ra devices <<< "${CUDA_VISIBLE_DEVICES:-}"
  echo "$((${#devices[@]} ? ${#devices[@]} : ${SLURM_GPUS_ON_NODE:-1}))"
}

ask_workers_to_save() { # PID of torchrun, or of the srun that started one on each node
  if [ -e "$folder/PREEMPTED" ]; then # in train_run's folder: they have saved
    : "${saved_at:=$SECONDS}"
    [ $((SECONDS - saved_at)) -lt "$LEAVING_SECONDS" ] || kill -TERM "$1"
  elif ! several_nodes; then
    pkill -USR1 -P "$1"
  else
    # A signal to the job step would also reach helpers that die of it. torchrun is, on each node, the Python process
    # with the job's rendezvous id.
    # shellcheck disable=SC2016 # $1 is the inner shell's
    timeout 30 srun --overlap --ntasks-per-node=1 \
      bash -c 'pkill -USR1 -P "$(pgrep -d, -f "^[^ ]*python[^ ]* [^ ]*torchrun .*--rdzv-id=$1 ")" 2> /dev/null
        true' - "$SLURM_JOB_ID" # true: on one node it may have just ended, or not begun
  fi
}

end_now() { kill -TERM "$1"; } # an evaluation has nothing to save

pass_on() { kill -USR1 "$@"; } # to chains, which are shells like this one

# ---- experiments side by side ----

chain() {
  local index=$1 devices configs=() overrides=() argument
  shift
  for argument in "$@"; do
    if [[ $argument == *=* ]]; then overrides+=("$argument"); else configs+=("$argument"); fi
  done
  IFS=, read -ra devices <<< "${CUDA_VISIBLE_DEVICES:-}"
  [ -n "${devices[index]}" ] || leave 2 "error: the job has no GPU number $index; ask for more with --gres"
  CUDA_VISIBLE_DEVICES=${devices[index]} run_chain >> "$(chain_log "$index")" 2>&1 &
  chains[index]=$!
  say "GPU $index: ${configs[*]} > $(chain_log "$index")"
}

run_chain() { # of chain's configs and overrides
  local config seeded
  trap on_signal USR1 TERM # a subshell starts without its parent's traps
  for config in "${configs[@]}"; do
    seed_of_task "$config" "${overrides[@]}"
    train_run "$config" "${overrides[@]}" "${seeded[@]}"
    is_evaluated "$config" "${overrides[@]}" "${seeded[@]}" ||
      evaluate_run "$config" "${overrides[@]}" "${seeded[@]}"
  done
  say "all done"
}

chain_log() { echo "slurm/logs/${SLURM_JOB_NAME}_${SLURM_JOB_ID}_gpu$1.out"; }

is_evaluated() { # CONFIG [key=value ...]: are there scores, and no model that is newer?
  local folder scores
  folder=$(config_value output_dir "$@")
  scores=$(config_value results_dir "$@")/predict_results.json
  [ -e "$scores" ] && [ -z "$(find "$folder" -maxdepth 1 -name '*.safetensors' -newer "$scores")" ]
}

await_chains() {
  local index code result=0
  until_ended pass_on "${chains[@]}"
  for index in "${!chains[@]}"; do
    wait "${chains[index]}"
    code=$?
    say "GPU $index: exit code $code: $(tail -n 1 "$(chain_log "$index")")"
    # A stopped chain has to go on, whatever became of the others: their failure is said again at the end of that start.
    [ "$code" -eq 0 ] || [ "$result" -eq "$STOPPED" ] || result=$code
    [ "$code" -ne "$STOPPED" ] || result=$code
  done
  exit "$result"
}

# ---- the end of the job ----

finish() {
  local code=$?
  [ "$code" -ne "$STOPPED" ] || requeue
  say "end of the job, exit code $code"
  exit "$code"
}

requeue() {
  # In an array, the plain job id of the task that started last stands for all the tasks.
  local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} state
  job=${job:-$SLURM_JOB_ID}
  state=$(squeue --noheader --format=%T --jobs="$job")
  if [ "$state" = RUNNING ]; then
    say "requeue $job"
    scontrol requeue "$job" && exit 0 # Slurm kills this script meanwhile
  else # COMPLETING: cancelled, and requeueing would bring it back against its owner's will
    say "not requeued, for Slurm is ending the job ($state); submit it again to go on"
  fi
}

# ---- the start of the job ----

cd "$SLURM_SUBMIT_DIR" || exit
mkdir -p slurm/logs
if [ -n "${VENV:-}" ] || [ -e .venv ]; then
  # shellcheck source=/dev/null
  source "${VENV:-.venv}/bin/activate" || exit 2
fi
command -v torchrun > /dev/null || leave 2 "error: no torchrun; run make, or set VENV, or activate an environment"
say "$SLURM_JOB_NAME | job $SLURM_JOB_ID | $SLURM_JOB_NODELIST | GPUs ${CUDA_VISIBLE_DEVICES:-none} | restart" \
  "${SLURM_RESTART_COUNT:-0} | commit $(git describe --always --dirty --exclude='*' 2> /dev/null || echo unknown)"
