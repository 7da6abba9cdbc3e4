"""Jobs of every launcher, for tests."""

from lindm.llm.cluster.jobs import GKEJob, RayJob, SlurmJob, TPUJob

WORDS = ["--model", "/lindm/model", "--data", "/lindm/data", "--out", "/lindm/run"]
PACKAGE = "lindm[tpu] @ git+https://git.example.org/lindm@v0.1.0"
SLURM = SlurmJob(nodes=4)
TPU = TPUJob(topology="v5e:4x4", zone="us-west4-a", shared="10.0.0.2:/share", package=PACKAGE)
GKE = GKEJob(topology="v5p:2x2x4", image="registry.io/me/lindm:1", claim="runs")
RAY = RayJob(workers=2, cpus=4, image="registry.io/me/lindm:1", claim="runs")
JOBS = [
    SLURM,
    SlurmJob(nodes=1, gpus_per_node=8, cpus_per_node=32, time="1-12:00:00", partition="a,b", account="me", name="x"),
    TPU,
    TPUJob(
        topology="v6e:2x2", zone="z", project="p", spot=True, package="lindm[tpu] @ file:///lindm/lindm-0.1.0-py3-none-any.whl"
    ),
    TPUJob(topology="v5p:4x4x4", zone="z", queued=True, shared="nfs:/", package="lindm[tpu] @ https://x.io/a b.whl"),
    TPUJob(
        topology="v5p:4x4x4", zone="z", queued=True, spot=True, shared="nfs:/", package="lindm[data,tpu] @ git+ssh://x.io/lindm"
    ),
    GKE,
    GKEJob(topology="v5e:1x1", image="i", bucket="my-bucket", service_account="writer", spot=True, namespace="n"),
    RAY,
    RayJob(workers=3, gpus=2, cpus=8, image="i", claim="c", restarts=0),
    RayJob(topology="v6e:4x4", cpus=100, image="i", claim="c"),
]
