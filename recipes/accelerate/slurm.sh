#!/bin/bash
# sbatch recipes/accelerate/slurm.sh recipes/llama-3.1-8b.yaml train.gradient_accumulation_steps=1
#
# Two machines of eight GPUs under Slurm: one process a GPU, started by srun. 120 seconds before the time is up
# every process gets SIGTERM: the update under way is finished, a checkpoint written, and the job queued
# again; the same command then goes on from that checkpoint. run_dir lies on a disk that all machines see.
#SBATCH --job-name=qlora-kit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since Slurm 22.05 srun gives a process one core without it

srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
  export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
  exec python -m qlora_kit train "$@"
' bash "$@"
code=$?

# 143: stopped by SIGTERM, with a checkpoint.
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
