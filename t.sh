. /work/venv/bin/activate
export PYTHONPATH=/tmp/x OMP_NUM_THREADS=1
T="--batch-size 3 --batch-length 7 --deter 16 --hidden 16 --units 16 --stoch 3 --cnn-depth 2 --pretrain 2 --train-every 20 --prefill 40 --total-frames 80 --eval-episodes 2 --threads 1 --log-every 20"
D="nice python /work/main/dreamerv2.py"
cd /tmp/x; rm -rf runs other
echo "== chdir in constructor, new"; $D --env-id odd:Chdir-v0 $T 2>/dev/null; echo rc $?; ls runs other
echo "== resume relative"; (mkdir -p z; cd z; $D --env-id odd:Chdir-v0 $T --resume runs/a 2>&1 | tail -3; ls; ls ../other/runs)
echo "== chdir reset + evaluate film"; $D --env-id odd:ChdirReset-v0 $T --resume runs/b >/dev/null 2>&1; echo rc $?; $D --evaluate runs/b --env-id odd:ChdirReset-v0 ; echo rc $?
echo "== exit init"; $D --env-id odd:ExitInit-v0 $T; echo rc $?
echo "== raise init"; $D --env-id odd:RaiseInit-v0 $T; echo rc $?
echo "== raise init async"; $D --env-id odd:RaiseInit-v0 $T --async-envs --num-envs 2; echo rc $?
echo "== float image"; $D --env-id odd:Reward1-v0 $T 2>/dev/null; echo rc $?
echo "== hardexit"; $D --env-id odd:HardExit-v0 $T ; echo rc $?
echo "== hardexit async"; $D --env-id odd:HardExit-v0 $T --async-envs --num-envs 2; echo rc $?
