# shellcheck shell=bash disable=SC2034
# The site profile: all that a new cluster needs. Copy it, fill it in, and either keep it here, or name it with
# ORPO_DIST_SITE=/path/to/site.sh. The templates and `orpo-dist submit` read it. Empty means: the cluster's default.
#
# Plain sbatch learns partition, account and qos from the environment: `source slurm/site.sh` once, then
# `sbatch slurm/multi_node.sbatch recipe.yaml`.

SITE_PARTITION=""
SITE_ACCOUNT=""
SITE_QOS=""
SITE_CONSTRAINT=""

# How GPUs are asked for (%d: their number per node): --gpus-per-node=%d, --gres=gpu:%d or --gres=gpu:a100:%d.
SITE_GPU_REQUEST="--gpus-per-node=%d"
# More options of sbatch for every job, separated by blanks: "--mail-type=END --mem=0".
SITE_SBATCH=""

# Folders that all nodes share, and folders that are each node's own; a run's folder must not be in the latter.
SITE_SHARED_FOLDERS=""
SITE_LOCAL_FOLDERS="/tmp /var/tmp /dev/shm /scratch"
# Where models and tokenised data are kept (HF_HOME): shared, and large. Empty: as the environment says.
SITE_CACHE=""
# A fast folder of each node for temporary files (TMPDIR). Empty: as the environment says.
SITE_SCRATCH=""

# Container: runtime `pyxis` or `apptainer`, the image, and what to mount (source:target, separated by commas).
SITE_CONTAINER_RUNTIME=""
SITE_CONTAINER_IMAGE=""
SITE_CONTAINER_MOUNTS=""

# How often a job may start again after its time limit, preemption or a failure.
SITE_MAX_RESTARTS=20
# What `AutoTrainProject(backend="slurm")` asks for, as flags of `orpo-dist submit`.
SITE_SUBMIT="--nodes 1 --gpus-per-node 8 --time 24:00:00"

# Run on every node before anything else: modules, a virtual environment, variables.
site_setup() {
    # module load cuda/13.0
    # source /shared/venvs/orpo/bin/activate
    :
}

# Run on every node before training; a node where it fails is excluded from the restart.
site_health_check() {
    # dcgmi health --check
    :
}

[ -z "$SITE_PARTITION" ] || export SBATCH_PARTITION=$SITE_PARTITION
[ -z "$SITE_ACCOUNT" ] || export SBATCH_ACCOUNT=$SITE_ACCOUNT
[ -z "$SITE_QOS" ] || export SBATCH_QOS=$SITE_QOS
[ -z "$SITE_CONSTRAINT" ] || export SBATCH_CONSTRAINT=$SITE_CONSTRAINT
