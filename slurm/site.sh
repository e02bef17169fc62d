# shellcheck shell=bash disable=SC2034
# The site profile: the only file to adapt for a new cluster. Copy it, fill it in, and either keep it here or set
# ORPO_DIST_SITE=/path/to/site.sh. The templates and `orpo-dist submit` read it. Empty means the cluster's default.
#
# Plain sbatch takes partition, account and qos from the environment: `source slurm/site.sh` once, then
# `sbatch slurm/multi_node.sbatch recipe.yaml`.

SITE_PARTITION=""
SITE_ACCOUNT=""
SITE_QOS=""
SITE_CONSTRAINT=""

# How GPUs are requested (%d: number per node): --gpus-per-node=%d, --gres=gpu:%d or --gres=gpu:a100:%d.
SITE_GPU_REQUEST="--gpus-per-node=%d"
# Additional sbatch options for every job, separated by spaces: "--mail-type=END --mem=0".
SITE_SBATCH=""

# Folders shared by all nodes, and folders local to each node; a run's folder must not be in a local folder.
SITE_SHARED_FOLDERS=""
SITE_LOCAL_FOLDERS="/tmp /var/tmp /dev/shm /scratch"
# Where models and tokenised data are stored (HF_HOME): shared and large. Empty: taken from the environment.
SITE_CACHE=""
# A fast local folder for temporary files (TMPDIR). Empty: taken from the environment.
SITE_SCRATCH=""

# Container: runtime `pyxis` or `apptainer`, the image, and what to mount (source:target, separated by commas).
SITE_CONTAINER_RUNTIME=""
SITE_CONTAINER_IMAGE=""
SITE_CONTAINER_MOUNTS=""

# How often a job may be restarted after its time limit, preemption or a failure.
SITE_MAX_RESTARTS=20
# What `AutoTrainProject(backend="slurm")` requests, as flags of `orpo-dist submit`.
SITE_SUBMIT="--nodes 1 --gpus-per-node 8 --time 24:00:00"

# Runs on every node before anything else: modules, a virtual environment, variables.
site_setup() {
    # module load cuda/13.0
    # source /shared/venvs/orpo/bin/activate
    :
}

# Runs on every node before training; a node where it fails is excluded from the restart.
site_health_check() {
    # dcgmi health --check
    :
}

[ -z "$SITE_PARTITION" ] || export SBATCH_PARTITION=$SITE_PARTITION
[ -z "$SITE_ACCOUNT" ] || export SBATCH_ACCOUNT=$SITE_ACCOUNT
[ -z "$SITE_QOS" ] || export SBATCH_QOS=$SITE_QOS
[ -z "$SITE_CONSTRAINT" ] || export SBATCH_CONSTRAINT=$SITE_CONSTRAINT
