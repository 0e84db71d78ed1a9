#!/usr/bin/env bash
# One stage of a first run on a GPU machine that has its image and nothing else: no network, no make, no git.
#
#   bash benchmarks/first_gpu_run.sh STAGE [OPTIONS] [-- ARGUMENTS]
#
#   check    ceilings; how long a first step takes; every shipped tile; training steps under compute-sanitizer
#   test     the tests that take a device, in a process per core
#   tune     tiles for the sizes small, medium and large, into one table
#   bench    the GPU benchmark, what is wanted most first
#   profile  where the time of a step goes
#
# Options: --commit ID      of the code (git describe --always --dirty); needed where there is no git
#          --out FOLDER     of the results; default the environment variable OUT, or out/first_gpu_run/results
#          --minutes N      after which it has ended and packed, at most; default 9
#          --wheels FOLDER  of packages to install, if it is there; default .whl
#          --device NAME    default cuda; cpu rehearses, with --tiny
#          --tiny           a trunk of a few units: shows that everything runs, and measures nothing
# ARGUMENTS go to the stage's program (pytest, ple_fast.tune, run_gpu.py, device_profile.py); those of check and test
# that name tests stand in the place of the default. PYTHON: the interpreter, default python3.
#
# FOLDER gets STAGE.log, written as it goes, and STAGE.tar.gz, packed every 20 seconds and at the end, stopped or not.
# What the stages hand on (packages, compiled kernels, tiles, results so far) is in out/first_gpu_run, and the next call
# goes on from it.
# Exit code: 0, 1 if something failed, 2 for wrong arguments, 3 if the time was over before the end.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

refuse() { echo "first_gpu_run.sh: $1 (the head of the file lists stages and options)" >&2; exit 2; }

stage=${1:-}; [ $# -eq 0 ] || shift
commit=${PLE_FAST_COMMIT:-}; out=${OUT:-out/first_gpu_run/results}; minutes=9; wheels=.whl; device=cuda; tiny=()
while [ $# -gt 0 ]; do
  case $1 in
    --tiny) tiny=(--tiny); shift; continue ;;
    --) shift; break ;;
    --commit|--out|--minutes|--wheels|--device) [ $# -gt 1 ] || refuse "$1: expected a value" ;;
    *) refuse "expected an option, got '$1'; arguments of the stage's program come after --" ;;
  esac
  case $1 in
    --commit) commit=$2 ;; --out) out=$2 ;; --minutes) minutes=$2 ;; --wheels) wheels=$2 ;; --device) device=$2 ;;
  esac
  shift 2
done
extra=("$@")
case $stage in check|test|tune|bench|profile) ;; *) refuse "expected a stage: check, test, tune, bench or profile; got '$stage'" ;; esac
[[ $minutes =~ ^[0-9]{1,4}(\.[0-9]{1,3})?$ ]] || refuse "--minutes: expected a number, got '$minutes'"
[ -n "$commit" ] || [ -e .git ] || refuse "--commit: expected the commit of this tree, because there is no git here"
[ "$device" != cpu ] || [ ${#tiny[@]} -gt 0 ] || refuse "--device cpu is for --tiny: it shows that everything runs"

python=${PYTHON:-python3}
state=$PWD/out/first_gpu_run; work=$state/$stage
case $stage in check|test|profile) rm -rf "$work" ;; esac   # the others go on from what they have
mkdir -p "$out" "$work" "$state/triton" "$state/inductor" || exit 2
out=$(cd "$out" && pwd)
# The log lives on when a signal goes to all processes, or nobody reads the output any more.
exec > >(trap '' TERM INT HUP; exec tee -p "$out/$stage.log") 2>&1
log_writer=$!

IFS=. read -r whole part <<< "$minutes"
part=${part:-0}000
seconds=$((60 * 10#$whole + 60 * 10#${part:0:3} / 1000))
reserve=$((seconds > 120 ? 25 : 5))   # for programs to end, and for the pack
left() { local rest=$((seconds - reserve - SECONDS)); echo $((rest > 0 ? rest : 0)); }
share() { local part=$(($(left) * $1 / 100)); printf '%d.%02d' $((part / 60)) $((part % 60 * 100 / 60)); }   # percent, in minutes

export TRITON_CACHE_DIR=$state/triton TORCHINDUCTOR_CACHE_DIR=$state/inductor PYTHONUNBUFFERED=1
export PLE_FAST_COMMIT=$commit PYTHONPATH=$PWD:$PWD/kernels:$PWD/encoder${PYTHONPATH:+:$PYTHONPATH}

pack() {
  local part=$out/.$stage.$BASHPID.part
  tar -czf "$part" -C "$state" --exclude=claims "$stage" 2>/dev/null   # 1: a file grew meanwhile
  mv -f "$part" "$out/$stage.tar.gz"
}
packer=; failed=(); late=()
# ends PID TENTHS: wait so long for a process to end. Not by wait, which bash 5.2 never leaves if the process ended while
# a signal interrupted another wait.
ends() { local n; for ((n = 0; n < $2; n++)); do kill -0 "$1" || return 0; sleep 0.1; done 2>/dev/null; }
finish() {
  local code=$? program
  trap - EXIT
  trap '' TERM INT HUP PIPE
  [ -z "$packer" ] || kill "$packer" 2>/dev/null
  program=$(jobs -pr)
  if [ -n "$program" ]; then
    pack   # whoever stopped this may not wait for the program to end
    kill -TERM $program 2>/dev/null
    for program in $program; do ends "$program" 150; done
  fi
  pack
  rm -f "$out/.$stage".*.part
  echo "packed after $SECONDS s"
  exec >&- 2>&-
  ends "$log_writer" 30   # longer, if a program left something behind that holds the log open
  exit "$code"
}
trap finish EXIT
trap 'echo "stopped by a signal"; exit 143' TERM INT HUP
( while sleep 20; do pack; done ) > /dev/null 2>&1 &
packer=$!

# run NAME COMMAND...: within the time that is left; a failure is noted, and the stage goes on.
run() {
  local name=$1 code left; left=$(left); shift
  echo "== $name ($left s left)"
  [ "$left" -gt 0 ] || { late+=("$name"); return; }
  timeout --signal=TERM --kill-after=10 "$left" "$@" &
  wait $!
  code=$?
  case $code in
    0) ;;
    3|124|137) echo "== $name: the time was over"; late+=("$name") ;;
    *) echo "== $name: failed with exit code $code"; failed+=("$name") ;;
  esac
}

# On a CPU kernels are interpreted.
[ "$device" != cpu ] || export TRITON_INTERPRET=1 PLE_FAST_BACKEND=triton

if compgen -G "$wheels/*.whl" > /dev/null; then
  run "install $wheels" "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$state/site" "$wheels"/*.whl
fi
[ ! -d "$state/site" ] || export PYTHONPATH=$PYTHONPATH:$state/site
# What measures takes the tiles of this GPU; what tests takes those that ship.
case $stage in bench|profile)
  [ -n "${PLE_FAST_TILES+set}" ] || [ ! -s "$state/tune/tiles.json" ] || export PLE_FAST_TILES=$state/tune/tiles.json ;;
esac
echo "stage $stage of ${commit:-the commit of git}, on $device, tiles ${PLE_FAST_TILES:-as shipped}, $("$python" --version)"

common=(--device "$device" "${tiny[@]}")
# suite NAME PERCENT PYTEST-ARGUMENTS...: in a process per core. Whatever plugins of pytest the image has, none is needed.
suite() {
  local name=$1 minutes; minutes=$(share "$2"); shift 2
  run "$name" env -u PLE_FAST_BACKEND PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 "$python" tests/processes.py --out "$work/$name" --minutes "$minutes" -- --device "$device" --skip-missing "$@"
}
tuner=(-m ple_fast.tune --processes "$(nproc)")
[ "$device" != cpu ] || tuner=(benchmarks/rehearsal.py)
tuned() {   # tuned NAME ARGUMENTS...: all sizes in one dtype
  local name=$1; shift
  run "$name" "$python" "${tuner[@]}" --trunk small --trunk medium --trunk large --device "$device" --out "$work/tiles.json" --minutes "$(share 95)" "$@"
}

case $stage in
  check)
    [ ${#extra[@]} -gt 0 ] || extra=(tests/test_shipped_tiles.py)
    run ceilings "$python" benchmarks/device_checks.py ceilings --out "$work" "${common[@]}"
    run first-step "$python" benchmarks/device_checks.py first_step --out "$work" "${common[@]}"
    suite shipped-tiles 60 "${extra[@]}"
    run sanitizer "$python" benchmarks/device_checks.py sanitizer --out "$work" "${common[@]}"
    ;;
  test)
    suite tests 95 --only-device -m "not slow" "${extra[@]}"
    ;;
  tune)
    tuned tune "${extra[@]}"
    tuned tune-tf32 --dtype float32 --tf32 "${extra[@]}"
    ;;
  bench)
    run bench "$python" benchmarks/run_gpu.py "${common[@]}" --continue --skip-missing --results "$work" --minutes "$(share 90)" "${extra[@]}"
    ;;
  profile)
    run profile "$python" benchmarks/device_profile.py "${common[@]}" --out "$work" --minutes "$(share 90)" "${extra[@]}"
    ;;
esac

# Programs that keep to their minutes end well, and say what they left.
! grep -q '^time is over' "$out/$stage.log" || late+=("what the log names after 'time is over'")
for name in "${failed[@]}"; do echo "FAILED: $name"; done
for name in "${late[@]}"; do echo "NOT THROUGH: $name"; done
[ ${#failed[@]} -eq 0 ] || exit 1
[ ${#late[@]} -eq 0 ] || exit 3
echo "stage $stage is through"
